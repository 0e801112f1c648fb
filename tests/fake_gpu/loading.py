"""Load the fake device into this process: before torch, which looks for devices once."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from typing import Any

from .device import build


def load() -> Any:
    """The extension module; torch has two CUDA devices from now on."""
    path = build.extension()
    # torch's own libraries come first: the extension is linked to them
    ctypes.CDLL(str(build.torch_folder() / "lib" / "libtorch_global_deps.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(path))
    import torch  # noqa: F401

    spec: Any = importlib.util.spec_from_file_location(build.NAME, path)
    device: Any = importlib.util.module_from_spec(spec)
    sys.modules[build.NAME] = device
    spec.loader.exec_module(device)

    from .device import storages, torch_cuda

    torch_cuda.install()
    storages.install()
    return device
