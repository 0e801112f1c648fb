"""LAMB: Adam whose step in each tensor is as long as the tensor, times lr.

Three launches: the norms of parameters and of unscaled steps, a partial result a chunk; the trust ratio of each tensor;
the update that all algorithms share. Nothing waits for the host, and norms meet in a fixed order: bitwise repeatable.

Bytes a parameter, float32: param, grad, exp_avg and exp_avg_sq 4 each = 16 for the norms, then param 4+4, grad 4,
exp_avg 4+4, exp_avg_sq 4+4 = 28: 44 in all. Averages stored by the first pass would make it 40; but a step worked out
from averages rounded to 16 bits is another one (exp_avg_sq may have become 0), so both passes read the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import (
    FACTOR,
    SKIP,
    Launcher,
    bias_correction,
    chunk,
    chunk_pointers,
    compute_dtype,
    divide,
    divide_by,
    for_each_block,
    gradient_factor,
    groups_of,
    launch,
    lerp,
    load,
    load_row,
    read,
    read_states,
    save,
    sqrt,
)
from .lengths import BLOCK_SIZE, lengths_, squared_lengths
from .storage import PLAIN, Formats, Storage, constants
from .tensor_table import LaunchSize, TensorTable
from .update import update_

RAW = (
    "lr", "beta1", "beta2", "eps", "weight_decay", "bias_correction", "max_trust_ratio", "always_adapt", "maximize",
)  # fmt: skip
#: ``size`` is lr, and becomes lr times the trust ratio; the largest such ratio is 0 where a tensor is not adapted.
HYPER = (
    "factor", "beta1_c", "beta2", "beta2_c", "bias1", "bias2_sqrt", "eps", "weight_decay", "size", "largest",
)  # fmt: skip

_N_COLUMNS = tl.constexpr(len(HYPER))
_SIZE = tl.constexpr(HYPER.index("size"))
_LARGEST = tl.constexpr(HYPER.index("largest"))


@triton.jit
def prepare(raw, scalars):
    lr, beta1, beta2, eps, weight_decay, corrected, largest, always_adapt, maximize = raw
    step = scalars[0] + 1.0
    row = (
        gradient_factor(maximize),
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        bias_correction(tl.where(corrected != 0, beta1, 0.0), step),
        tl.sqrt(bias_correction(tl.where(corrected != 0, beta2, 0.0), step)),
        eps,
        weight_decay,
        lr,
        tl.where((weight_decay != 0) | (always_adapt != 0), largest, 0.0),
    )
    return row, (step,)


@triton.jit
def _averages(g, states, hyper):
    beta1_c, beta2, beta2_c = hyper[:3]
    return lerp(states[0], g, beta1_c), beta2 * states[1] + beta2_c * g * g


@triton.jit
def _adam_step(p, m, v, hyper):
    """A step before it gets its length."""
    bias1, bias2_sqrt, eps, weight_decay = hyper[3:7]
    step = divide(m, bias1 * (divide_by(sqrt(v), bias2_sqrt) + eps))
    return tl.where(weight_decay != 0, step + weight_decay * p, step)


@triton.jit
def update(p, g, states, hyper, VARIANT: tl.constexpr, out):
    """States: exp_avg, exp_avg_sq."""
    m, v = _averages(g, states, hyper)
    save(out, 0, m)
    save(out, 1, v)
    return p - hyper[7] * _adam_step(p, m, v, hyper)


@triton.jit
def _read_all(block, COMPUTE: tl.constexpr):
    return read(block, 0, COMPUTE), read_states(block, 2, COMPUTE)


@triton.jit
def _norms_block(sums, pointers, args, first, offsets, mask, CONSTANTS: tl.constexpr):
    of_params, of_steps = sums
    scale, hyper = args
    groups = groups_of(first, offsets, mask, CONSTANTS[0])
    p, states = _read_all((pointers, offsets, mask, groups, (), (), CONSTANTS[1]), scale.dtype)
    g = load(pointers[1] + offsets, mask, scale.dtype) * scale
    m, v = _averages(g, states, hyper)
    step = _adam_step(p, m, v, hyper)
    if mask is not None:
        # without eps, 0 / 0 past the end
        step = tl.where(mask, step, 0.0)
    return of_params + p * p, of_steps + step * step


@triton.jit
def _lamb_norms_kernel(
    fixed_ptr,  # int64 [n_tensors, 3 + n_companions]: params, exp_avgs, exp_avg_sqs, then each companion
    grads_ptr,  # int64 [n_tensors]; 0 where there is none in this step
    numels_ptr,  # int64 [n_tensors]
    rows_ptr,  # int32 [n_tensors]: row of hyper_ptr
    hyper_ptr,  # float64 [n_rows, 10]
    chunk_tensor_ptr,  # int32 [n_chunks]
    chunk_start_ptr,  # int64 [n_chunks]
    control_ptr,  # float64 [3]: NORM, FACTOR, SKIP
    partials_ptr,  # float64 [n_chunks, 2], written: squares of parameters, and of steps
    DTYPES: tl.constexpr,
    EACH: tl.constexpr,  # see storage.constants, as the next one
    FORMATS: tl.constexpr,
    COMPUTE: tl.constexpr,
    HAS_CONTROL: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    if HAS_CONTROL:
        if tl.load(control_ptr + SKIP) != 0:
            return
    tensor, start, remaining = chunk(grads_ptr, chunk_tensor_ptr, chunk_start_ptr, numels_ptr, CHUNK_SIZE)
    pointers = chunk_pointers(fixed_ptr, grads_ptr, tensor, start, DTYPES, EACH)
    scale, hyper = load_row(hyper_ptr, tl.load(rows_ptr + tensor), _N_COLUMNS, COMPUTE)
    if HAS_CONTROL:
        scale *= tl.load(control_ptr + FACTOR).to(COMPUTE)
    nothing = tl.zeros((BLOCK_SIZE,), COMPUTE)
    of_params, of_steps = for_each_block(
        _norms_block, (EACH, FORMATS), (nothing, nothing), pointers, (scale, hyper), remaining, CHUNK_SIZE, BLOCK_SIZE
    )
    partial_ptr = partials_ptr + 2 * tl.program_id(0)
    tl.store(partial_ptr, tl.sum(of_params, axis=0).to(tl.float64))
    tl.store(partial_ptr + 1, tl.sum(of_steps, axis=0).to(tl.float64))


@triton.jit
def _lamb_ratio_kernel(
    partials_ptr,  # float64 [n_chunks, 2]
    first_chunk_ptr,  # int32 [n_tensors + 1]
    hyper_ptr,  # float64 [n_tensors, 10], whose column ``size`` is multiplied by the trust ratio
    control_ptr,  # float64 [3]: NORM, FACTOR, SKIP
    HAS_CONTROL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    if HAS_CONTROL:
        if tl.load(control_ptr + SKIP) != 0:
            return
    tensor = tl.program_id(0)
    of_params, of_steps = squared_lengths(partials_ptr, first_chunk_ptr, tensor, BLOCK_SIZE)
    param_norm, step_norm = tl.sqrt(of_params), tl.sqrt(of_steps)
    row = hyper_ptr + tensor * _N_COLUMNS
    largest = tl.load(row + _LARGEST)
    # a norm of 0 tells nothing; comparisons keep NaN, so that it reaches the parameters, as everywhere
    ratio = tl.where((param_norm == 0) | (step_norm == 0), 1.0, param_norm / step_norm)
    ratio = tl.where(ratio > largest, largest, ratio)
    tl.store(row + _SIZE, tl.load(row + _SIZE) * tl.where(largest == 0, 1.0, ratio))


def lamb_(
    algorithm: Any,
    table: TensorTable,
    grads: Tensor,
    hyper: Tensor,
    control: Tensor | None,
    *,
    dtypes: tuple[torch.dtype, ...],
    storage: Storage = PLAIN,
    whole: bool = True,
    warmup: bool = False,
) -> Iterator[Tensor]:
    """Update every tensor of ``table`` in place.

    Args:
        algorithm: This module.
        table: Roles: params, exp_avgs, exp_avg_sqs, then each companion. Each tensor has a row of its own, in order.
        grads: int64 ``[n_tensors]``, addresses.
        hyper: float64 ``[n_tensors, len(HYPER)]``, as :func:`~.update.prepare_` left it; ``size`` is changed.
        control: float64 ``[3]`` from :func:`~.grad_norm.finish_`: the gradients' factor and whether to do nothing.
        dtypes: Of params, grads, exp_avgs, exp_avg_sqs and each companion.
        storage: How they are kept.
        whole: No other parts of the tensors are updated elsewhere.
        warmup: Compile, launch nothing.

    Yields:
        Only of parts of tensors: squared lengths of parameters and of steps, float64 ``[n_tensors, 2]``, which are to
        be added up in place over all parts.
    """
    if table.n_chunks == 0:
        return
    partials, first = torch.empty(table.n_chunks, 2, dtype=torch.float64, device=table.device), table.first_chunk
    norms, ratio = _launchers(dtypes, storage.formats, table.size, control is not None)
    some_control = hyper if control is None else control
    launch(
        norms, table.n_chunks, table.fixed, grads, table.numels, table.rows, hyper, table.chunk_tensor,
        table.chunk_start, some_control, partials, warmup=warmup,
    )  # fmt: skip
    if not whole:
        partials, first = lengths_(partials, first, control, warmup=warmup)
        yield partials
    launch(ratio, table.n_tensors, partials, first, hyper, some_control, warmup=warmup)
    update_(algorithm, table, grads, hyper, control, variant=(), dtypes=dtypes, storage=storage, warmup=warmup)


@cache
def _launchers(
    dtypes: tuple[torch.dtype, ...], formats: Formats, size: LaunchSize, has_control: bool
) -> tuple[Launcher, Launcher]:
    storage = constants(dtypes, formats, size)
    norms = Launcher(
        _lamb_norms_kernel, **{name: storage[name] for name in ("DTYPES", "EACH", "FORMATS", "BLOCK_SIZE")},
        COMPUTE=compute_dtype(dtypes[0]), HAS_CONTROL=has_control, CHUNK_SIZE=size.chunk_size,
        num_warps=size.num_warps,
    )  # fmt: skip
    return norms, Launcher(_lamb_ratio_kernel, HAS_CONTROL=has_control, BLOCK_SIZE=BLOCK_SIZE, num_warps=2)
