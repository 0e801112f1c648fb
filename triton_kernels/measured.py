"""The walk of updates whose size in a tensor follows from all of it: LAMB's trust ratio, cautious steps, StableAdamW.

Three launches: sums over each chunk; what they make of each tensor's hyperparameters; the update that all algorithms
share. Nothing waits for the host, and sums meet in a fixed order: bitwise repeatable.

Beside what :mod:`.update` takes, an algorithm's module has:

``measure(p, g, states, hyper, VARIANT) -> (a, b)``: two blocks of values, of which the squared lengths over a tensor
are wanted. States are those of before the step: averages stored by this pass would save reading them again, but a step
worked out from averages rounded to 16 bits is another one (exp_avg_sq may have become 0), so both passes read the same.

``adapt(squares, numel, hyper, VARIANT) -> factor``: what the columns ``ADAPTED`` of the tensor's row are multiplied by;
float64, ``hyper`` is the row without its first column.
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
    chunk,
    chunk_pointers,
    compute_dtype,
    for_each_block,
    groups_of,
    launch,
    load,
    load_row,
    read,
    read_states,
)
from .lengths import BLOCK_SIZE, lengths_, squared_lengths
from .storage import PLAIN, Formats, Storage, constants
from .tensor_table import LaunchSize, TensorTable
from .update import NO_RIDERS, Riders, named_after, update_


@triton.jit
def _read_all(block, N_STATES: tl.constexpr, COMPUTE: tl.constexpr):
    return read(block, 0, COMPUTE), read_states(block, N_STATES, COMPUTE)


@triton.jit
def _measure_block(sums, pointers, args, first, offsets, mask, CONSTANTS: tl.constexpr):
    of_a, of_b = sums
    scale, hyper = args
    MEASURE: tl.constexpr = CONSTANTS[0]
    groups = groups_of(first, offsets, mask, CONSTANTS[3])
    p, states = _read_all((pointers, offsets, mask, groups, (), (), CONSTANTS[4]), CONSTANTS[2], scale.dtype)
    g = load(pointers[1] + offsets, mask, scale.dtype) * scale
    a, b = MEASURE(p, g, states, hyper, CONSTANTS[1])
    if mask is not None:
        # what is worked out of nothing may be NaN: without eps, 0 / 0
        a, b = tl.where(mask, a, 0.0), tl.where(mask, b, 0.0)
    return of_a + a * a, of_b + b * b


@triton.jit(repr=named_after("MEASURE", "measure_"))
def _measure_kernel(
    fixed_ptr,  # int64 [n_tensors, 1 + n_states + n_companions]: params, then each state, then each companion
    grads_ptr,  # int64 [n_tensors]; 0 where there is none in this step
    numels_ptr,  # int64 [n_tensors]
    rows_ptr,  # int32 [n_tensors]: row of hyper_ptr
    hyper_ptr,  # float64 [n_rows, N_COLUMNS]
    chunk_tensor_ptr,  # int32 [n_chunks]
    chunk_start_ptr,  # int64 [n_chunks]
    control_ptr,  # float64 [3]: NORM, FACTOR, SKIP
    partials_ptr,  # float64 [n_chunks, 2], written: squared lengths
    MEASURE: tl.constexpr,  # the algorithm
    VARIANT: tl.constexpr,  # its variant: a tuple of bools
    N_STATES: tl.constexpr,
    DTYPES: tl.constexpr,
    EACH: tl.constexpr,  # see storage.constants, as the next one
    FORMATS: tl.constexpr,
    COMPUTE: tl.constexpr,
    N_COLUMNS: tl.constexpr,
    HAS_CONTROL: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    if HAS_CONTROL:
        if tl.load(control_ptr + SKIP) != 0:
            return
    tensor, start, remaining = chunk(grads_ptr, chunk_tensor_ptr, chunk_start_ptr, numels_ptr, CHUNK_SIZE)
    pointers = chunk_pointers(fixed_ptr, grads_ptr, tensor, start, DTYPES, EACH)
    scale, hyper = load_row(hyper_ptr, tl.load(rows_ptr + tensor), N_COLUMNS, COMPUTE)
    if HAS_CONTROL:
        scale *= tl.load(control_ptr + FACTOR).to(COMPUTE)
    nothing = tl.zeros((BLOCK_SIZE,), COMPUTE)
    of_a, of_b = for_each_block(
        _measure_block, (MEASURE, VARIANT, N_STATES, EACH, FORMATS), (nothing, nothing), pointers, (scale, hyper),
        remaining, CHUNK_SIZE, BLOCK_SIZE,
    )  # fmt: skip
    partial_ptr = partials_ptr + 2 * tl.program_id(0)
    tl.store(partial_ptr, tl.sum(of_a, axis=0).to(tl.float64))
    tl.store(partial_ptr + 1, tl.sum(of_b, axis=0).to(tl.float64))


@triton.jit(repr=named_after("ADAPT", "adapt_"))
def _adapt_kernel(
    partials_ptr,  # float64 [n_chunks, 2]
    first_chunk_ptr,  # int32 [n_tensors + 1]
    numels_ptr,  # int64 [n_tensors]: of whole tensors
    hyper_ptr,  # float64 [n_tensors, N_COLUMNS], in which columns are multiplied
    control_ptr,  # float64 [3]: NORM, FACTOR, SKIP
    ADAPT: tl.constexpr,  # the algorithm
    VARIANT: tl.constexpr,
    COLUMNS: tl.constexpr,  # those that are multiplied
    N_COLUMNS: tl.constexpr,
    HAS_CONTROL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    if HAS_CONTROL:
        if tl.load(control_ptr + SKIP) != 0:
            return
    tensor = tl.program_id(0)
    squares = squared_lengths(partials_ptr, first_chunk_ptr, tensor, BLOCK_SIZE)
    row = hyper_ptr + tensor * N_COLUMNS
    hyper = ()
    for i in tl.static_range(1, N_COLUMNS):
        hyper = hyper + (tl.load(row + i),)
    factor = ADAPT(squares, tl.load(numels_ptr + tensor).to(tl.float64), hyper, VARIANT)
    for i in tl.static_range(len(COLUMNS)):
        tl.store(row + COLUMNS[i], tl.load(row + COLUMNS[i]) * factor)


def measured_update_(
    algorithm: Any,
    table: TensorTable,
    grads: Tensor,
    hyper: Tensor,
    control: Tensor | None,
    *,
    variant: tuple[bool, ...],
    dtypes: tuple[torch.dtype, ...],
    storage: Storage = PLAIN,
    riders: Riders = NO_RIDERS,
    numels: Tensor | None = None,
    warmup: bool = False,
) -> Iterator[Tensor]:
    """Update every tensor of ``table`` in place.

    Args:
        algorithm: A module as described above.
        table: Roles: params, then each state of the variant, then each companion. Each tensor has a row of its own, in
            order.
        grads: int64 ``[n_tensors]``, addresses; 0 leaves a tensor as it is.
        hyper: float64 ``[n_tensors, len(HYPER)]``, of which the columns ``ADAPTED`` are changed.
        control: float64 ``[3]`` from :func:`~.grad_norm.finish_`: the gradients' factor and whether to do nothing.
        variant: The variant of the algorithm.
        dtypes: Of params, grads, each state and each companion.
        storage: How they are kept.
        riders: What rides along with the last pass.
        numels: int64 ``[n_tensors]``, elements of the whole tensors, if other parts of these are updated elsewhere.
        warmup: Compile, launch nothing.

    Yields:
        Only of parts of tensors: squared lengths, float64 ``[n_tensors, 2]``, which are to be added up in place over
        all parts.
    """
    if table.n_chunks == 0:
        return
    partials, first = torch.empty(table.n_chunks, 2, dtype=torch.float64, device=table.device), table.first_chunk
    measure, adapt = _launchers(algorithm, variant, dtypes, storage.formats, table.size, control is not None)
    some_control = hyper if control is None else control
    launch(
        measure, table.n_chunks, table.fixed, grads, table.numels, table.rows, hyper, table.chunk_tensor,
        table.chunk_start, some_control, partials, warmup=warmup,
    )  # fmt: skip
    if numels is not None:
        partials, first = lengths_(partials, first, control, warmup=warmup)
        yield partials
    whole = table.numels if numels is None else numels
    launch(adapt, table.n_tensors, partials, first, whole, hyper, some_control, warmup=warmup)
    update_(
        algorithm, table, grads, hyper, control, variant=variant, dtypes=dtypes, storage=storage, riders=riders,
        warmup=warmup,
    )  # fmt: skip


@cache
def _launchers(
    algorithm: Any,
    variant: tuple[bool, ...],
    dtypes: tuple[torch.dtype, ...],
    formats: Formats,
    size: LaunchSize,
    has_control: bool,
) -> tuple[Launcher, Launcher]:
    storage = constants(dtypes, formats, size)
    del storage["NOISE"]
    n_columns = len(algorithm.HYPER)
    measure = Launcher(
        _measure_kernel, MEASURE=algorithm.measure, VARIANT=variant, **storage, COMPUTE=compute_dtype(dtypes[0]),
        N_COLUMNS=n_columns, HAS_CONTROL=has_control, CHUNK_SIZE=size.chunk_size, num_warps=size.num_warps,
    )  # fmt: skip
    adapt = Launcher(
        _adapt_kernel, ADAPT=algorithm.adapt, VARIANT=variant,
        COLUMNS=tuple(map(algorithm.HYPER.index, algorithm.ADAPTED)), N_COLUMNS=n_columns, HAS_CONTROL=has_control,
        BLOCK_SIZE=BLOCK_SIZE, num_warps=2,
    )  # fmt: skip
    return measure, adapt
