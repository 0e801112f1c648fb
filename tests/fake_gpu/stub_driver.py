"""The stub driver: Triton's own JIT, ptxas and launcher work as on an H100, and no kernel runs.

``driver/libcuda.c`` is compiled on demand into ``build/``. Once it is loaded, Triton and everybody else who opens
``libcuda.so.1`` in this process get it. What comes out: the kernels that a GPU would get, with the specializations that
a GPU would get, launches that the driver accepts, and the host's time. What does not: numbers.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parent / "driver" / "libcuda.c"
BUILD = Path(__file__).parents[2] / "build" / "stub_driver"
NAME = "libcuda.so.1"


def missing() -> str | None:
    """Why there can be no stub driver here; None where there can."""
    if not compiler():
        return "the stub driver needs a C compiler (cc, gcc or clang on PATH, or CC)"
    return None if find_spec("triton") else "the stub driver is for Triton, which is not installed"


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


def build() -> Path:
    """The folder of ``libcuda.so.1``, compiled where its source has changed.

    Raises:
        RuntimeError: There is no C compiler or no Triton, or it does not compile.
    """
    if reason := missing():
        raise RuntimeError(reason)
    # the header comes with Triton
    include = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "include"
    version = hashlib.sha256(SOURCE.read_bytes() + str(include).encode()).hexdigest()[:16]
    folder = BUILD / version
    if not (folder / NAME).exists():
        folder.mkdir(parents=True, exist_ok=True)
        # several processes may build at once: each its own file, and the last one stays
        fresh = folder / f"{NAME}.{os.getpid()}"
        flags = ["-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{NAME}", f"-I{include}"]
        done = subprocess.run([compiler(), *flags, SOURCE, "-o", fresh], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{SOURCE.name} does not compile:\n{done.stderr}")
        fresh.rename(folder / NAME)
    # Triton 3.5 links against it by the name that has no version
    link = folder / NAME.removesuffix(".1")
    if not link.exists():
        with suppress(FileExistsError):
            link.symlink_to(NAME)
    return folder


class Stub:
    """The loaded driver, and what it has counted."""

    def __init__(self) -> None:
        folder = build()
        # Triton links its launcher against this folder; the dynamic linker knows the library by its name from now on
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        self.library = ctypes.CDLL(str(folder / NAME), mode=ctypes.RTLD_GLOBAL)
        for name in ("stub_launches", "stub_modules", "stub_programs_of_last_launch"):
            getattr(self.library, name).restype = ctypes.c_long

    @property
    def launches(self) -> int:
        """Launches that the driver accepted."""
        return self.library.stub_launches()

    @property
    def modules(self) -> int:
        """Kernels loaded."""
        return self.library.stub_modules()

    @property
    def programs(self) -> int:
        """Programs of the last launch."""
        return self.library.stub_programs_of_last_launch()


@cache
def load() -> Stub:
    """Load the driver into this process, for good."""
    return Stub()


@contextmanager
def active() -> Iterator[Stub]:
    """Let Triton launch on the stub, wherever tensors are: those of a CPU have addresses too."""
    stub = load()
    from triton.runtime import driver

    driver.set_active(_cuda_driver())
    try:
        yield stub
    finally:
        # None: whoever comes next gets the machine's own driver
        driver.set_active(None)


def _cuda_driver() -> Any:
    from triton.backends.nvidia.driver import CudaDriver

    class StubDriver(CudaDriver):
        """Triton's driver for CUDA, but for what it asks torch, whose CPU builds have no answer."""

        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device: (9, 0)

    return StubDriver()
