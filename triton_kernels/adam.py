"""Adam and AdamW: one launch for every tensor of a bucket, whatever its parameter group.

Bytes a parameter, float32: param 4+4, grad 4, exp_avg 4+4, exp_avg_sq 4+4 = 28 (amsgrad: 36).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import TRITON_DTYPE, chunk_pointer, compute_dtype, divide, launch, load, sqrt, store
from .tensor_table import TensorTable

#: Columns of a hyperparameter row as the kernel reads it (float64; see :func:`hyper_row`).
HYPER_COLUMNS = 9
#: Columns of a raw row, for :func:`prepare_`: lr, beta1, beta2, eps, weight_decay, maximize, decoupled.
RAW_COLUMNS = 7

_N_COLUMNS = tl.constexpr(HYPER_COLUMNS)
_N_RAW = tl.constexpr(RAW_COLUMNS)


def hyper_row(
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: float,
    decoupled: float,
    *,
    step: float,
) -> tuple[float, ...]:
    """One tensor's hyperparameters in the form the kernel uses, computed in float64.

    ``step`` counts from 1. ``1 - beta`` has columns of its own: ``1 - float32(0.999)`` is wrong by 1e-5.
    """
    return (
        -1.0 if maximize else 1.0,
        1.0 - lr * weight_decay if decoupled else 1.0,
        0.0 if decoupled else weight_decay,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        math.sqrt(1.0 - beta2**step),
        lr / (1.0 - beta1**step),
        eps,
    )


@triton.jit(do_not_specialize=["n_tensors"])
def _adam_prepare_kernel(
    raw_ptr,  # float64 [n_tensors, 7]: lr, beta1, beta2, eps, weight_decay, maximize, decoupled
    scalars_ptr,  # int64 [n_tensors, 7]: the address of a float32 device scalar that replaces the value, or 0
    steps_ptr,  # int64 [n_tensors]: addresses of the float32 step counts
    hyper_ptr,  # float64 [n_tensors, 9], written: what _adam_kernel reads
    control_ptr,  # float64 [3]: norm, scale, skip
    n_tensors,
    HAS_CONTROL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    tensors = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = tensors < n_tensors
    step_ptrs = tl.load(steps_ptr + tensors, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptrs, mask=mask, other=0.0)
    if HAS_CONTROL:
        step += tl.where(tl.load(control_ptr + 2) != 0, 0.0, 1.0)
    else:
        step += 1.0
    tl.store(step_ptrs, step, mask=mask)

    lr = _raw(raw_ptr, scalars_ptr, tensors, 0, mask)
    beta1 = _raw(raw_ptr, scalars_ptr, tensors, 1, mask)
    beta2 = _raw(raw_ptr, scalars_ptr, tensors, 2, mask)
    eps = _raw(raw_ptr, scalars_ptr, tensors, 3, mask)
    weight_decay = _raw(raw_ptr, scalars_ptr, tensors, 4, mask)
    maximize = _raw(raw_ptr, scalars_ptr, tensors, 5, mask)
    decoupled = _raw(raw_ptr, scalars_ptr, tensors, 6, mask)

    # in float64 the difference keeps 13 digits even at the first step, where float32 would keep four
    t = step.to(tl.float64)
    bias1 = 1.0 - tl.exp(t * tl.log(beta1))
    bias2 = 1.0 - tl.exp(t * tl.log(beta2))

    row = hyper_ptr + tensors * _N_COLUMNS
    tl.store(row, tl.where(maximize != 0, -1.0, 1.0).to(tl.float64), mask=mask)
    tl.store(row + 1, tl.where(decoupled != 0, 1.0 - lr * weight_decay, 1.0), mask=mask)
    tl.store(row + 2, tl.where(decoupled != 0, 0.0, weight_decay), mask=mask)
    tl.store(row + 3, 1.0 - beta1, mask=mask)
    tl.store(row + 4, beta2, mask=mask)
    tl.store(row + 5, 1.0 - beta2, mask=mask)
    tl.store(row + 6, tl.sqrt(bias2), mask=mask)
    tl.store(row + 7, lr / bias1, mask=mask)
    tl.store(row + 8, eps, mask=mask)


@triton.jit
def _raw(raw_ptr, scalars_ptr, tensors, COLUMN: tl.constexpr, mask):
    """A hyperparameter: the value the host knows, or the device scalar that stands for it."""
    offsets = tensors * _N_RAW + COLUMN
    value = tl.load(raw_ptr + offsets, mask=mask, other=0.5)
    address = tl.load(scalars_ptr + offsets, mask=mask, other=0)
    scalar = tl.load(address.to(tl.pointer_type(tl.float32)), mask=mask & (address != 0), other=0.0)
    return tl.where(address != 0, scalar.to(tl.float64), value)


@triton.jit
def _adam_block(
    p_ptr, g_ptr, m_ptr, v_ptr, vmax_ptr, offsets, mask,
    scale, decay, l2, beta1_c, beta2, beta2_c, bias2_sqrt, step_size, eps,
    AMSGRAD: tl.constexpr,
):  # fmt: skip
    p = load(p_ptr + offsets, mask, scale.dtype)
    g = load(g_ptr + offsets, mask, scale.dtype) * scale
    m = load(m_ptr + offsets, mask, scale.dtype)
    v = load(v_ptr + offsets, mask, scale.dtype)
    if AMSGRAD:
        # here, because nothing tells the compiler that the stores below write elsewhere
        vmax = load(vmax_ptr + offsets, mask, scale.dtype)
    # not g + 0 * p: an infinite parameter without weight decay must not turn its state to NaN
    g = tl.where(l2 != 0, g + l2 * p, g)
    m += beta1_c * (g - m)
    v = beta2 * v + beta2_c * g * g
    store(m_ptr + offsets, m, mask)
    store(v_ptr + offsets, v, mask)
    if AMSGRAD:
        v = tl.maximum(vmax, v, propagate_nan=tl.PropagateNan.ALL)
        store(vmax_ptr + offsets, v, mask)
    p = p * decay - divide(step_size * m, divide(sqrt(v), bias2_sqrt) + eps)
    store(p_ptr + offsets, p, mask)


@triton.jit
def _adam_kernel(
    fixed_ptr,  # int64 [n_tensors, 3 or 4]: params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs
    grads_ptr,  # int64 [n_tensors]
    numels_ptr,  # int64 [n_tensors]
    rows_ptr,  # int32 [n_tensors]: row of hyper_ptr
    hyper_ptr,  # float64 [n_rows, 9]: see hyper_row
    chunk_tensor_ptr,  # int32 [n_chunks]
    chunk_start_ptr,  # int64 [n_chunks]
    control_ptr,  # float64 [3]: norm, scale, skip
    P_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr,
    V_DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    HAS_CONTROL: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    if HAS_CONTROL:
        # a bad gradient under GradScaler: nothing may change
        if tl.load(control_ptr + 2) != 0:
            return
    pid = tl.program_id(0)
    tensor = tl.load(chunk_tensor_ptr + pid)
    start = tl.multiple_of(tl.load(chunk_start_ptr + pid), CHUNK_SIZE)
    remaining = tl.load(numels_ptr + tensor) - start

    N_ROLES: tl.constexpr = 4 if AMSGRAD else 3
    p_ptr = chunk_pointer(fixed_ptr, tensor * N_ROLES, start, P_DTYPE, ALIGNMENT)
    m_ptr = chunk_pointer(fixed_ptr, tensor * N_ROLES + 1, start, M_DTYPE, ALIGNMENT)
    v_ptr = chunk_pointer(fixed_ptr, tensor * N_ROLES + 2, start, V_DTYPE, ALIGNMENT)
    g_ptr = chunk_pointer(grads_ptr, tensor, start, G_DTYPE, ALIGNMENT)
    vmax_ptr = v_ptr
    if AMSGRAD:
        vmax_ptr = chunk_pointer(fixed_ptr, tensor * N_ROLES + 3, start, V_DTYPE, ALIGNMENT)

    row = hyper_ptr + tl.load(rows_ptr + tensor) * _N_COLUMNS
    scale = tl.load(row).to(COMPUTE)
    if HAS_CONTROL:
        scale *= tl.load(control_ptr + 1).to(COMPUTE)
    decay = tl.load(row + 1).to(COMPUTE)
    l2 = tl.load(row + 2).to(COMPUTE)
    beta1_c = tl.load(row + 3).to(COMPUTE)
    beta2 = tl.load(row + 4).to(COMPUTE)
    beta2_c = tl.load(row + 5).to(COMPUTE)
    bias2_sqrt = tl.load(row + 6).to(COMPUTE)
    step_size = tl.load(row + 7).to(COMPUTE)
    eps = tl.load(row + 8).to(COMPUTE)

    # a mask that comes from a loaded size forbids 128-bit accesses, so only a tensor's last chunk is masked
    if remaining >= CHUNK_SIZE:
        for i in range(0, CHUNK_SIZE, BLOCK_SIZE):
            _adam_block(
                p_ptr, g_ptr, m_ptr, v_ptr, vmax_ptr, i + tl.arange(0, BLOCK_SIZE), None,
                scale, decay, l2, beta1_c, beta2, beta2_c, bias2_sqrt, step_size, eps, AMSGRAD,
            )  # fmt: skip
    else:
        for i in range(0, remaining.to(tl.int32), BLOCK_SIZE):
            offsets = i + tl.arange(0, BLOCK_SIZE)
            _adam_block(
                p_ptr, g_ptr, m_ptr, v_ptr, vmax_ptr, offsets, offsets < remaining,
                scale, decay, l2, beta1_c, beta2, beta2_c, bias2_sqrt, step_size, eps, AMSGRAD,
            )  # fmt: skip


def prepare_(
    raw: Tensor, scalars: Tensor, steps: Tensor, hyper: Tensor, control: Tensor | None, *, warmup: bool = False
) -> None:
    """Count the step and turn raw hyperparameters into the rows of :func:`adam_`, all on the device.

    Args:
        raw: float64 ``[n_tensors, 7]``.
        scalars: int64 ``[n_tensors, 7]``, addresses of float32 scalars that replace raw values, or 0.
        steps: int64 ``[n_tensors]``, addresses of the step counts, which are incremented unless ``control`` says skip.
        hyper: float64 ``[n_tensors, 9]``, written.
        control: float64 ``[3]`` from :func:`~.grad_norm.finish_`, or None.
        warmup: Compile, launch nothing.
    """
    n_tensors, block_size = steps.numel(), 64
    launch(_adam_prepare_kernel, triton.cdiv(n_tensors, block_size), warmup)(
        raw, scalars, steps, hyper, hyper if control is None else control, n_tensors,
        HAS_CONTROL=control is not None, BLOCK_SIZE=block_size, num_warps=2,
    )  # fmt: skip


def adam_(
    table: TensorTable,
    grads: Tensor,
    hyper: Tensor,
    control: Tensor | None,
    *,
    dtypes: Sequence[torch.dtype],
    amsgrad: bool,
    aligned: bool,
    warmup: bool = False,
) -> None:
    """Update every tensor of ``table`` in place.

    Args:
        table: Roles: params, exp_avgs, exp_avg_sqs and, with ``amsgrad``, max_exp_avg_sqs.
        grads: int64 ``[n_tensors]``, addresses.
        hyper: float64 ``[n_rows, 9]``, see :func:`hyper_row`.
        control: float64 ``[3]`` from :func:`~.grad_norm.finish_`: the gradients' factor and whether to do nothing.
        dtypes: Of params, grads, exp_avgs and exp_avg_sqs.
        amsgrad: Use the largest exp_avg_sq so far.
        aligned: All addresses are multiples of 16 bytes.
        warmup: Compile, launch nothing.
    """
    if table.n_chunks == 0:
        return
    p_dtype, g_dtype, m_dtype, v_dtype = (TRITON_DTYPE[dtype] for dtype in dtypes)
    size = table.size
    launch(_adam_kernel, table.n_chunks, warmup)(
        table.fixed, grads, table.numels, table.rows, hyper, table.chunk_tensor, table.chunk_start,
        hyper if control is None else control,
        P_DTYPE=p_dtype, G_DTYPE=g_dtype, M_DTYPE=m_dtype, V_DTYPE=v_dtype, COMPUTE=compute_dtype(dtypes[0]),
        AMSGRAD=amsgrad, HAS_CONTROL=control is not None, ALIGNMENT=16 if aligned else 1,
        CHUNK_SIZE=size.chunk_size, BLOCK_SIZE=size.block(dtypes), num_warps=size.num_warps,
    )  # fmt: skip
