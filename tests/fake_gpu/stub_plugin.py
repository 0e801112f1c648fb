"""pytest plugin (``-p tests.fake_gpu.stub_plugin``): the fake device, with Triton's own launcher on the stub driver.

Tensors are on a device and kernels are compiled and launched as on an H100; no kernel runs. It shows what is compiled,
when, and what the host's part of a step costs.
"""

from __future__ import annotations

import os
import sys

if "torch" in sys.modules:
    raise RuntimeError("the fake device should be loaded before torch, which looks for devices once")
os.environ["TRITON_INTERPRET"] = "0"

from tests.fake_gpu import loading, stub_driver

device = loading.load()
# no kernel runs, so nobody reads what is freed; and times are looked at
device.reuse_memory_at_once()
stub = stub_driver.load()

import torch  # noqa: E402

# what Triton asks for the stream that it launches on
torch._C._cuda_getCurrentRawStream = device.current_stream
