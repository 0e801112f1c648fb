"""The norm of many gradients, what follows from it (clip factor, skip), and gradients scaled in place.

One read of the gradients writes a partial result per chunk; :func:`finish_` meets them in a fixed order, so a norm is
bitwise repeatable. Nothing waits for the host: the results stay in ``control``, float64 ``[3]``:

``control[0]``: the norm. ``control[1]``: the factor for the gradients (clip coefficient, and the inverse loss scale).
``control[2]``: not 0 if the step must be skipped.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import (
    FACTOR,
    NORM,
    SKIP,
    TRITON_DTYPE,
    Launcher,
    chunk,
    chunk_pointer,
    compute_dtype,
    fold,
    for_each_block,
    launch,
    load,
    store,
)
from .tensor_table import LaunchSize, TensorTable


@triton.jit
def _norm_block(carry, pointers, inv_scale, first, offsets, mask, CONSTANTS: tl.constexpr):
    """Adds a block of gradients to a norm, and to the mark whether any is infinite or NaN.

    With ``CONSTANTS[1]`` also to the largest one, and to the number of those that are 0.
    """
    NORM_TYPE: tl.constexpr = CONSTANTS[0]
    g = load(pointers[0] + offsets, mask, inv_scale.dtype)
    bad = (g != g) | (tl.abs(g) == float("inf"))
    g *= inv_scale
    if NORM_TYPE == 2:
        power = g * g
    else:
        power = tl.abs(g)
    found = (_combine(carry[0], power, NORM_TYPE), carry[1] | bad)
    if CONSTANTS[1]:
        is_zero = g == 0.0
        if mask is not None:
            is_zero = is_zero & mask
        found = found + (_combine(carry[2], tl.abs(g), 0), carry[3] + fold(is_zero.to(tl.float32)))
    return found


@triton.jit(do_not_specialize=["n_partials"], do_not_specialize_on_alignment=["grad_scale_ptr", "partials_ptr"])
def _norm_kernel(
    grads_ptr,  # int64 [n_tensors]; 0 where there is none in this step
    numels_ptr,  # int64 [n_tensors]
    chunk_tensor_ptr,  # int32 [n_chunks]
    chunk_start_ptr,  # int64 [n_chunks]
    grad_scale_ptr,  # float32 scalar: what GradScaler multiplied the loss by
    partials_ptr,  # float64 [2, n_partials], written: sums (maxima for NORM_TYPE 0), and 1 if not all is finite
    n_partials,
    G_DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    NORM_TYPE: tl.constexpr,  # 1, 2, or 0 for infinity
    HAS_SCALE: tl.constexpr,
    WATCHED: tl.constexpr,  # two more rows of partials_ptr: the largest one, and how many are 0
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    tensor, start, remaining = chunk(grads_ptr, chunk_tensor_ptr, chunk_start_ptr, numels_ptr, CHUNK_SIZE)
    g_ptr = chunk_pointer(grads_ptr, tensor, start, G_DTYPE)
    inv_scale = tl.full((), 1.0, COMPUTE)
    if HAS_SCALE:
        inv_scale = (1.0 / tl.load(grad_scale_ptr).to(tl.float64)).to(COMPUTE)

    nothing = tl.zeros((BLOCK_SIZE,), COMPUTE), tl.zeros((BLOCK_SIZE,), tl.int1)
    if WATCHED:
        nothing = nothing + (tl.zeros((BLOCK_SIZE,), COMPUTE), tl.zeros((BLOCK_SIZE // 4,), tl.float32))
    found = for_each_block(
        _norm_block, (NORM_TYPE, WATCHED), nothing, (g_ptr,), inv_scale, remaining, CHUNK_SIZE, BLOCK_SIZE
    )
    pid = tl.program_id(0)
    tl.store(partials_ptr + pid, _reduce(found[0], NORM_TYPE).to(tl.float64))
    tl.store(partials_ptr + n_partials + pid, tl.max(found[1].to(tl.int32), axis=0).to(tl.float64))
    if WATCHED:
        tl.store(partials_ptr + 2 * n_partials + pid, _reduce(found[2], 0).to(tl.float64))
        tl.store(partials_ptr + 3 * n_partials + pid, tl.sum(found[3], axis=0).to(tl.float64))


@triton.jit
def _combine(a, b, NORM_TYPE: tl.constexpr):
    if NORM_TYPE == 0:
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    else:
        return a + b


@triton.jit
def _reduce(values, NORM_TYPE: tl.constexpr):
    if NORM_TYPE == 0:
        # tl.max drops NaN
        nan = tl.sum(tl.where(values != values, values, 0.0), axis=0)
        return tl.max(tl.where(values != values, 0.0, values), axis=0) + nan
    else:
        return tl.sum(values, axis=0)


@triton.jit(
    do_not_specialize=["n_partials"],
    do_not_specialize_on_alignment=["partials_ptr", "grad_scale_ptr", "found_inf_ptr", "norm_ptr", "control_ptr"],
)
def _finish_kernel(
    partials_ptr,  # float64 [2, n_partials]
    n_partials,
    grad_scale_ptr,  # float32 scalar: what GradScaler multiplied the loss by
    found_inf_ptr,  # float32 scalar: read with HAS_FOUND_INF; written with CHECK_FINITE
    norm_ptr,  # float32 or float64 scalar, written
    control_ptr,  # float64 [3], written: NORM, FACTOR, SKIP
    max_norm: tl.float32,
    NORM_DTYPE: tl.constexpr,
    NORM_TYPE: tl.constexpr,
    CLIP: tl.constexpr,
    CLAMP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    CHECK_FINITE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    total = tl.zeros((BLOCK_SIZE,), tl.float64)
    bad = tl.zeros((BLOCK_SIZE,), tl.float64)
    for i in range(0, n_partials, BLOCK_SIZE):
        offsets = i + tl.arange(0, BLOCK_SIZE)
        mask = offsets < n_partials
        total = _combine(total, tl.load(partials_ptr + offsets, mask=mask, other=0.0), NORM_TYPE)
        bad = tl.maximum(bad, tl.load(partials_ptr + n_partials + offsets, mask=mask, other=0.0))
    norm = _reduce(total, NORM_TYPE)
    if NORM_TYPE == 2:
        norm = tl.sqrt(norm)
    scale = tl.full((), 1.0, tl.float64)
    if CLIP:
        scale = max_norm / (norm + 1e-6)
        if CLAMP:
            # as torch.clamp: NaN stays NaN
            scale = tl.where(scale > 1.0, 1.0, scale)
    if HAS_SCALE:
        scale /= tl.load(grad_scale_ptr).to(tl.float64)
    skip = tl.full((), 0.0, tl.float32)
    if HAS_FOUND_INF:
        skip = tl.load(found_inf_ptr)
    if CHECK_FINITE:
        skip = tl.max(bad, axis=0).to(tl.float32)
        tl.store(found_inf_ptr, skip)
    tl.store(norm_ptr, norm.to(NORM_DTYPE))
    tl.store(control_ptr + NORM, norm)
    tl.store(control_ptr + FACTOR, scale)
    tl.store(control_ptr + SKIP, skip.to(tl.float64))


@triton.jit
def _scale_block(carry, pointers, scale, first, offsets, mask, CONSTANTS: tl.constexpr):
    store(pointers[0] + offsets, load(pointers[0] + offsets, mask, scale.dtype) * scale, mask)
    return carry


@triton.jit(do_not_specialize_on_alignment=["scale_ptr"])
def _scale_kernel(
    grads_ptr,  # int64 [n_tensors]; 0 where there is none in this step
    numels_ptr,  # int64 [n_tensors]
    chunk_tensor_ptr,  # int32 [n_chunks]
    chunk_start_ptr,  # int64 [n_chunks]
    scale_ptr,  # float64 scalar
    G_DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    scale = tl.load(scale_ptr).to(COMPUTE)
    # most steps clip nothing: 8 of 12 bytes saved
    if scale == 1.0:
        return
    tensor, start, remaining = chunk(grads_ptr, chunk_tensor_ptr, chunk_start_ptr, numels_ptr, CHUNK_SIZE)
    g_ptr = chunk_pointer(grads_ptr, tensor, start, G_DTYPE)
    for_each_block(_scale_block, None, (), (g_ptr,), scale, remaining, CHUNK_SIZE, BLOCK_SIZE)


#: Norm types with a kernel, and the number each goes by there.
NORM_TYPES = {1.0: 1, 2.0: 2, float("inf"): 0}


def norm_(
    table: TensorTable,
    grads: Tensor,
    grad_scale: Tensor | None,
    partials: Tensor,
    offset: int,
    *,
    dtype: torch.dtype,
    norm_type: float,
    watched: bool = False,
    warmup: bool = False,
) -> None:
    """Write one partial result a chunk to ``partials[:, offset : offset + table.n_chunks]``.

    Args:
        table: Whose sizes and chunks to use; its addresses are not read.
        grads: int64 ``[n_tensors]``, addresses; 0 where there is no gradient.
        grad_scale: float32 scalar, the loss scale to divide gradients by first, or None.
        partials: float64 ``[2, n_partials]``: sums of powers (maxima, for the infinity norm) and non-finite marks.
        offset: Column to begin at.
        dtype: Of the gradients.
        norm_type: A key of :data:`NORM_TYPES`.
        watched: ``partials`` has two more rows, for the largest element and the number of zeros.
        warmup: Compile, launch nothing.
    """
    if table.n_chunks == 0:
        return
    launch(
        _norm_launcher(dtype, norm_type, table.size, grad_scale is not None, watched), table.n_chunks,
        grads, table.numels, table.chunk_tensor, table.chunk_start, partials if grad_scale is None else grad_scale,
        partials[0, offset:], partials.shape[1], warmup=warmup,
    )  # fmt: skip


@cache
def _norm_launcher(
    dtype: torch.dtype, norm_type: float, size: LaunchSize, has_scale: bool, watched: bool = False
) -> Launcher:
    return Launcher(
        _norm_kernel, G_DTYPE=TRITON_DTYPE[dtype], COMPUTE=compute_dtype(dtype), NORM_TYPE=NORM_TYPES[norm_type],
        HAS_SCALE=has_scale, WATCHED=watched, CHUNK_SIZE=size.chunk_size, BLOCK_SIZE=size.block_size,
        num_warps=size.num_warps,
    )  # fmt: skip


def finish_(
    partials: Tensor,
    norm: Tensor,
    control: Tensor,
    *,
    norm_type: float,
    max_norm: float | None,
    clamp: bool = True,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    check_finite: bool = False,
    warmup: bool = False,
) -> None:
    """Meet the partial results of all launches.

    Args:
        partials: float64 ``[2, n_partials]`` from :func:`norm_`.
        norm: Scalar, float32 or float64, written.
        control: float64 ``[3]``, written.
        norm_type: As given to :func:`norm_`.
        max_norm: Clip to this norm; None: do not clip.
        clamp: Leave gradients below ``max_norm`` as they are; False: scale them up to it.
        grad_scale: As given to :func:`norm_`.
        found_inf: float32 scalar; the step is skipped where it is not 0.
        check_finite: Write ``found_inf`` from what :func:`norm_` saw, instead of reading it.
        warmup: Compile, launch nothing.
    """
    launcher = finish_launcher(
        norm.dtype, norm_type, max_norm is not None, clamp, grad_scale is not None, found_inf is not None, check_finite
    )
    launch(
        launcher, 1, partials, partials.shape[1], control if grad_scale is None else grad_scale,
        control if found_inf is None else found_inf, norm, control, 0.0 if max_norm is None else float(max_norm),
        warmup=warmup,
    )  # fmt: skip


@cache
def finish_launcher(
    dtype: torch.dtype,
    norm_type: float,
    clip: bool,
    clamp: bool,
    has_scale: bool,
    has_found_inf: bool,
    check_finite: bool,
) -> Launcher:
    return Launcher(
        _finish_kernel, NORM_DTYPE=TRITON_DTYPE[dtype], NORM_TYPE=NORM_TYPES[norm_type], CLIP=clip, CLAMP=clamp,
        HAS_SCALE=has_scale, HAS_FOUND_INF=has_found_inf and not check_finite, CHECK_FINITE=check_finite,
        BLOCK_SIZE=1024, num_warps=8,
    )  # fmt: skip


def scale_(
    table: TensorTable,
    grads: Tensor,
    scale: Tensor,
    *,
    dtype: torch.dtype,
    warmup: bool = False,
) -> None:
    """Multiply gradients by a float64 scalar in place; where it is 1, nothing is read or written.

    Args:
        table: Whose sizes and chunks to use; its addresses are not read.
        grads: int64 ``[n_tensors]``, addresses; 0 where there is no gradient.
        scale: float64 scalar.
        dtype: Of the gradients.
        warmup: Compile, launch nothing.
    """
    if table.n_chunks == 0:
        return
    launch(
        _scale_launcher(dtype, table.size), table.n_chunks, grads, table.numels, table.chunk_tensor, table.chunk_start,
        scale, warmup=warmup,
    )  # fmt: skip


@cache
def _scale_launcher(dtype: torch.dtype, size: LaunchSize) -> Launcher:
    return Launcher(
        _scale_kernel, G_DTYPE=TRITON_DTYPE[dtype], COMPUTE=compute_dtype(dtype), CHUNK_SIZE=size.chunk_size,
        BLOCK_SIZE=size.block_size, num_warps=size.num_warps,
    )  # fmt: skip
