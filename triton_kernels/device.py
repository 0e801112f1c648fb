"""What kernels share: constants for dtypes, the walk from a program to its chunk."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

#: Kernels take dtypes as constexpr: an address in a table has none of its own.
TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float64: tl.float64,
}


def compute_dtype(dtype: torch.dtype) -> tl.dtype:
    """Kernels compute in float32; in float64 where the parameter is."""
    return tl.float64 if dtype is torch.float64 else tl.float32


def launch(kernel: Any, n_programs: int, warmup: bool) -> Callable[..., Any]:
    """``kernel`` on a one-dimensional grid; with ``warmup`` it is only compiled."""
    grid = (n_programs,)
    start = partial(kernel.warmup, grid=grid) if warmup else kernel[grid]

    def on_its_device(*args: Any, **kwargs: Any) -> Any:
        # triton launches on the current device, wherever the tensors are
        device = args[0].device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return start(*args, **kwargs)

    return on_its_device


@triton.jit
def chunk_pointer(addresses_ptr, index, start, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The address of element ``start`` of tensor ``index``, as a pointer the compiler may widen accesses on."""
    base = tl.load(addresses_ptr + index).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(base, ALIGNMENT) + start


@triton.jit
def sqrt(x):
    """Correctly rounded: ``tl.sqrt`` alone is approximate for float32."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def divide(x, y):
    """Correctly rounded: ``/`` alone is approximate for float32."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def load(pointers, mask, COMPUTE: tl.constexpr):
    """Values in the dtype kernels compute in; 0 where ``mask`` is off. ``mask=None`` is the full-chunk path."""
    if mask is None:
        return tl.load(pointers).to(COMPUTE)
    else:
        return tl.load(pointers, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def store(pointers, values, mask):
    """Round to the stored dtype once, at the end."""
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)
