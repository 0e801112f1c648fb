"""What kernels share: constants for dtypes, launching, loads and stores, arithmetic that rounds correctly."""

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


#: Options every kernel is compiled with. Triton up to 3.9 fuses products and sums by default, 3.10 will not: the
#: numbers must not depend on that, nor on TRITON_DEFAULT_FP_FUSION.
OPTIONS = {"enable_fp_fusion": True}


def compute_dtype(dtype: torch.dtype) -> tl.dtype:
    """Kernels compute in float32; in float64 where the parameter is."""
    return tl.float64 if dtype is torch.float64 else tl.float32


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def launch(kernel: Any, n_programs: int, warmup: bool) -> Callable[..., Any]:
    """``kernel`` on a one-dimensional grid; with ``warmup`` it is only compiled."""
    grid = (n_programs,)
    if warmup:
        # the interpreter compiles nothing, and that of triton 3.5 does not pretend to
        start = partial(getattr(kernel, "warmup", _nothing), grid=grid)
    else:
        start = kernel[grid]

    def on_its_device(*args: Any, **kwargs: Any) -> Any:
        # triton launches on the current device, wherever the tensors are
        device = args[0].device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return start(*args, **OPTIONS, **kwargs)

    return on_its_device


@triton.jit
def chunk(chunk_tensor_ptr, chunk_start_ptr, numels_ptr, CHUNK_SIZE: tl.constexpr):
    """A program's share: which tensor, from which element on, and how many elements are left there."""
    pid = tl.program_id(0)
    tensor = tl.load(chunk_tensor_ptr + pid)
    start = tl.multiple_of(tl.load(chunk_start_ptr + pid), CHUNK_SIZE)
    return tensor, start, tl.load(numels_ptr + tensor) - start


@triton.jit
def for_each_block(
    BLOCK: tl.constexpr,
    CONSTANTS: tl.constexpr,
    carry,
    args,
    remaining,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """``carry = BLOCK(carry, args, offsets, mask, CONSTANTS)`` over a chunk; returns the last.

    A mask that comes from a loaded size forbids 128-bit accesses, so only a tensor's last chunk has one.
    """
    if remaining >= CHUNK_SIZE:
        for i in range(0, CHUNK_SIZE, BLOCK_SIZE):
            carry = BLOCK(carry, args, i + tl.arange(0, BLOCK_SIZE), None, CONSTANTS)
    else:
        for i in range(0, remaining.to(tl.int32), BLOCK_SIZE):
            offsets = i + tl.arange(0, BLOCK_SIZE)
            carry = BLOCK(carry, args, offsets, offsets < remaining, CONSTANTS)
    return carry


@triton.jit
def chunk_pointer(addresses_ptr, index, start, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The address of element ``start`` of tensor ``index``, as a pointer the compiler may widen accesses on."""
    base = tl.load(addresses_ptr + index).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(base, ALIGNMENT) + start


@triton.jit
def role_pointers(fixed_ptr, tensor, start, DTYPES: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Of a parameter, and a tuple of those of its states; ``DTYPES`` has the gradient's in second place."""
    N_ROLES: tl.constexpr = len(DTYPES) - 1
    p_ptr = chunk_pointer(fixed_ptr, tensor * N_ROLES, start, DTYPES[0], ALIGNMENT)
    state_ptrs = ()
    for i in tl.static_range(1, N_ROLES):
        state_ptrs = state_ptrs + (chunk_pointer(fixed_ptr, tensor * N_ROLES + i, start, DTYPES[1 + i], ALIGNMENT),)
    return p_ptr, state_ptrs


@triton.jit
def load_row(hyper_ptr, row, N_COLUMNS: tl.constexpr, COMPUTE: tl.constexpr):
    """A hyperparameter row: the factor of the gradient, and a tuple of the rest."""
    row_ptr = hyper_ptr + row * N_COLUMNS
    hyper = ()
    for i in tl.static_range(1, N_COLUMNS):
        hyper = hyper + (tl.load(row_ptr + i).to(COMPUTE),)
    return tl.load(row_ptr).to(COMPUTE), hyper


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
def divide_by(x, y):
    """:func:`divide` by the same ``y`` for all elements, to the same bits in half of the instructions.

    The compiler takes ``1 / y`` out of the walk through a chunk. One correction by the remainder, which is exact, then
    rounds correctly (Markstein, 1990), as long as the remainder does not underflow: for roots of float32 it does not.
    """
    if x.dtype == tl.float64:
        return x / y
    else:
        inverse = tl.div_rn(1.0, y)
        quotient = x * inverse
        corrected = tl.fma(tl.fma(-quotient, y, x), inverse, quotient)
        # an infinite one leaves no remainder
        return tl.where(quotient == float("inf"), quotient, corrected)


@triton.jit
def load(pointers, mask, COMPUTE: tl.constexpr):
    """Values in the dtype kernels compute in; 0 where ``mask`` is off. ``mask=None`` is the full-chunk path."""
    if mask is None:
        return tl.load(pointers).to(COMPUTE)
    else:
        return tl.load(pointers, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def load_all(pointers, offsets, mask, COMPUTE: tl.constexpr):
    """A tuple of values, one of each pointer."""
    values = ()
    for i in tl.static_range(len(pointers)):
        values = values + (load(pointers[i] + offsets, mask, COMPUTE),)
    return values


@triton.jit
def store(pointers, values, mask):
    """Round to the stored dtype once, at the end."""
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def save(out, i: tl.constexpr, value):
    """Store a block of state ``i``; ``out`` is what an update was given for it."""
    state_ptrs, offsets, mask = out
    store(state_ptrs[i] + offsets, value, mask)


@triton.jit
def with_l2(g, p, l2):
    """The gradient with the L2 penalty's; an infinite parameter without one must not turn the state to NaN."""
    return tl.where(l2 != 0, g + l2 * p, g)


@triton.jit
def lerp(a, b, weight):
    return a + weight * (b - a)


@triton.jit
def maximum(a, b):
    """The larger; NaN where either is, as in torch."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sign(x):
    """-1, 0 or 1; NaN stays NaN, as in torch."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit
def gradient_factor(maximize):
    """What a gradient is multiplied by, from the flag as a number."""
    return tl.where(maximize != 0, -1.0, 1.0).to(tl.float64)


@triton.jit
def bias_correction(beta, step):
    """``1 - beta**step`` of float64 blocks; in float32 the first steps would keep four digits."""
    return 1.0 - tl.exp(step * tl.log(beta))
