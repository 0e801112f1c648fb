"""pytest plugin (``-p tests.fake_gpu.plugin``): this process has two CUDA devices, which are host memory.

The device is as strict as a real one: tensors on two devices, the wrong current device, waits under
``set_sync_debug_mode``, freed memory, what cannot be captured. Triton's interpreter runs the kernels. What it does not
show: races between streams, times, a GPU's arithmetic, and what Triton's compiler accepts.
"""
# ruff: noqa: E402

from __future__ import annotations

import os
import sys
from typing import Any

if "torch" in sys.modules:
    raise RuntimeError("the fake device should be loaded before torch, which looks for devices once")
os.environ["TRITON_INTERPRET"] = "1"

from tests.fake_gpu import loading

device = loading.load()

import torch

from tests.fake_gpu.device import kernels

kernels.install()

import optimx._engine.backends

# the interpreter reads this device's memory
optimx._engine.backends.interpreter_reaches.add("cuda")

assert torch.cuda.is_available()

from tests.fake_gpu import waits

waits.refuse()


#: What tests have in their names -> why they have nothing to say here.
SKIPPED = {
    "sparse": "the fake GPU has no sparse tensors",
    "test_steps_run_ahead_of_the_device": "the fake GPU has done everything when a call returns: nothing is in flight",
    "test_lamb_norms_over_many_chunks": "millions of elements take the interpreter minutes",
}


def pytest_collection_modifyitems(items: list[Any]) -> None:
    import pytest

    for item in items:
        for part, reason in SKIPPED.items():
            if part in item.name:
                item.add_marker(pytest.mark.skip(reason=reason))
