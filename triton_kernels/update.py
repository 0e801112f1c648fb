"""The walk that every elementwise update shares: one launch for all tensors of a bucket, whatever their groups.

An algorithm is two ``@triton.jit`` functions on values, in a module of its own (``adam.py``, ``sgd.py``, ...):

``update(p, g, states, hyper, VARIANT, out) -> p``: one step of a block of elements. ``p``, ``g`` and the tuple
``states`` are in the dtype to compute in; ``g`` is unscaled, clipped and negated to maximize already. ``hyper`` is the
tensor's hyperparameter row without its first column, ``VARIANT`` the launcher, a tuple of bools. Each byte is read
once, before, and written once: new states with ``save(out, i, value)``, as soon as they are known, because the compiler
leaves stores where they are written, and a state that waits for its store holds registers (Adam in 16 bits: 66 for 52).

``prepare(raw, scalars) -> (row, scalars)``: the whole row of a tensor from its raw hyperparameters and its scalar state
(the step count, mostly), and the scalar state after the step; in float64, vectorized over tensors. Rules of ``optimx``
have the same function for the host.

The module names its columns: ``HYPER`` (what ``prepare`` makes and ``update`` reads; the first is always the factor of
the gradient, 1 or -1) and ``RAW``.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codecs import GROUP
from .device import (
    FACTOR,
    SKIP,
    TRITON_DTYPE,
    Launcher,
    chunk,
    chunk_pointer,
    chunk_pointers,
    compute_dtype,
    fold,
    for_each_block,
    groups_of,
    launch,
    load,
    load_noise,
    load_row,
    read,
    read_states,
    runs_of,
    store,
    write,
)
from .storage import PLAIN, Formats, Storage, constants
from .tensor_table import LaunchSize, TensorTable

#: Sums over a tensor: squares of the new parameter, of its change, and of the first moment before; of products of that
#: and the gradient; and how many elements take a cautious step, which is what the algorithm's ``measure`` tells first.
PARAM_SQ, UPDATE_SQ, MOMENT_SQ, GRAD_MOMENT, TAKEN = (tl.constexpr(i) for i in range(5))


class Riders(NamedTuple):
    """What rides along with an update that reads every number anyway.

    Attributes:
        sums: Which sums over each chunk are written, from ``PARAM_SQ`` on.
        moment: Which state is the first moment.
        partials: float32 ``[len(sums), n_chunks]``, written; what stands there stays where a step is skipped.
        averages: int64 ``[n_tensors]``, addresses of averages of the parameters, which move; None: there are none.
        average_dtype: Of these.
        weight: float64 scalar, what the new parameter counts in them.
    """

    sums: tuple[int, ...] = ()
    moment: int = 0
    partials: Tensor | None = None
    averages: Tensor | None = None
    average_dtype: torch.dtype | None = None
    weight: Tensor | None = None


NO_RIDERS = Riders()


def named_after(function: str, launch: str = "") -> Any:
    """Profilers show ``_adam_kernel`` and ``_adam_prepare_kernel``, not one name for all."""

    def name(specialization: Any) -> str:
        algorithm = specialization.constants[function].fn.__module__.rpartition(".")[2]
        return f"_{algorithm}_{launch}kernel"

    return name


@triton.jit
def _update_block(carry, pointers, args, first, offsets, mask, CONSTANTS: tl.constexpr):
    groups = groups_of(first, offsets, mask, CONSTANTS[3])
    runs = runs_of(first, offsets, mask, CONSTANTS[5])
    return _update((pointers, offsets, mask, groups, runs, args[2], CONSTANTS[4]), args, carry, CONSTANTS)


@triton.jit
def _update(block, args, carry, CONSTANTS: tl.constexpr):
    UPDATE: tl.constexpr = CONSTANTS[0]
    SUMS: tl.constexpr = CONSTANTS[6]
    scale, hyper = args[0], args[1]
    p = read(block, 0, scale.dtype)
    g = load(block[0][1] + block[1], block[2], scale.dtype) * scale
    # all loads come first, because nothing tells the compiler that the stores write elsewhere
    states = read_states(block, CONSTANTS[2], scale.dtype)
    if CONSTANTS[8]:
        average_ptr = block[0][len(block[0]) - 1] + block[1]
        average = load(average_ptr, block[2], scale.dtype)
    kept = write(block, 0, UPDATE(p, g, states, hyper, CONSTANTS[1], block))
    if CONSTANTS[8]:
        store(average_ptr, moved(average, kept, args[3]), block[2])
    found = ()
    for i in tl.static_range(len(SUMS)):
        if SUMS[i] == PARAM_SQ:
            term = kept * kept
        elif SUMS[i] == UPDATE_SQ:
            term = (kept - p) * (kept - p)
        elif SUMS[i] == MOMENT_SQ:
            term = states[CONSTANTS[7]] * states[CONSTANTS[7]]
        elif SUMS[i] == TAKEN:
            # worked out in the update as well: the compiler does it once
            term = CONSTANTS[9](p, g, states, hyper, CONSTANTS[1])[0]
        else:
            term = states[CONSTANTS[7]] * g
        if block[2] is not None:
            # past the end 0 / 0 may have come out
            term = tl.where(block[2], term, 0.0)
        found = found + (carry[i] + fold(term),)
    return found


@triton.jit
def moved(average, value, weight):
    """An average that has moved towards a value, as ``torch.lerp``: the value itself for a weight of 1."""
    away = value - average
    return tl.where(weight < 0.5, average + weight * away, value - away * (1.0 - weight))


@triton.jit(
    repr=named_after("UPDATE"), do_not_specialize=["n_partials"],
    do_not_specialize_on_alignment=["steps_ptr", "weight_ptr", "sums_ptr"],
)  # fmt: skip
def _update_kernel(
    fixed_ptr,  # int64 [n_tensors, 1 + n_states + n_companions]: params, then each state, then each companion
    grads_ptr,  # int64 [n_tensors]; 0 where there is none in this step
    numels_ptr,  # int64 [n_tensors]
    rows_ptr,  # int32 [n_tensors]: row of hyper_ptr
    hyper_ptr,  # float64 [n_rows, N_COLUMNS]
    chunk_tensor_ptr,  # int32 [n_chunks]
    chunk_start_ptr,  # int64 [n_chunks]
    control_ptr,  # float64 [3]: NORM, FACTOR, SKIP
    noise_ptr,  # int64 [n_tensors, 5], see Noise
    steps_ptr,  # int64 [n_tensors], see Noise
    averages_ptr,  # int64 [n_tensors]: averages of the parameters
    weight_ptr,  # float64 scalar: what the new parameter counts in these
    sums_ptr,  # float32 [n_sums, n_partials], written: a column a program
    n_partials,
    UPDATE: tl.constexpr,  # the algorithm
    MEASURE: tl.constexpr,  # it, too, where TAKEN is among the sums
    VARIANT: tl.constexpr,  # its variant: a tuple of bools
    N_STATES: tl.constexpr,
    DTYPES: tl.constexpr,  # of params, grads, each state and each companion
    EACH: tl.constexpr,  # see storage.constants, as the next two
    FORMATS: tl.constexpr,
    NOISE: tl.constexpr,
    SUMS: tl.constexpr,  # which are written, see Riders
    MOMENT: tl.constexpr,  # which state they are of
    AVERAGE: tl.constexpr,  # dtype of the averages, None: they are left alone
    COMPUTE: tl.constexpr,
    N_COLUMNS: tl.constexpr,
    HAS_CONTROL: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    if HAS_CONTROL:
        # a bad gradient under GradScaler: nothing may change
        if tl.load(control_ptr + SKIP) != 0:
            return
    tensor, start, remaining = chunk(grads_ptr, chunk_tensor_ptr, chunk_start_ptr, numels_ptr, CHUNK_SIZE)
    pointers = chunk_pointers(fixed_ptr, grads_ptr, tensor, start, DTYPES, EACH)
    noise, is_straight = load_noise(noise_ptr, steps_ptr, tensor, start, NOISE)
    scale, hyper = load_row(hyper_ptr, tl.load(rows_ptr + tensor), N_COLUMNS, COMPUTE)
    if HAS_CONTROL:
        scale *= tl.load(control_ptr + FACTOR).to(COMPUTE)
    weight = scale
    if AVERAGE is not None:
        pointers = pointers + (chunk_pointer(averages_ptr, tensor, start, AVERAGE),)
        weight = tl.load(weight_ptr).to(COMPUTE)
    nothing = ()
    for _ in tl.static_range(len(SUMS)):
        nothing = nothing + (tl.zeros((BLOCK_SIZE // 4,), COMPUTE),)
    sums = for_each_block(
        _update_block,
        (UPDATE, VARIANT, N_STATES, EACH, FORMATS, NOISE, SUMS, MOMENT, AVERAGE is not None, MEASURE), nothing,
        pointers, (scale, hyper, noise, weight), remaining, CHUNK_SIZE, BLOCK_SIZE, is_straight,
    )  # fmt: skip
    for i in tl.static_range(len(SUMS)):
        total = tl.sum(sums[i], axis=0)
        if SUMS[i] == GRAD_MOMENT:
            # of gradients before clipping
            total = total / tl.abs(scale)
        tl.store(sums_ptr + i * n_partials + tl.program_id(0), total.to(tl.float32))


@triton.jit(do_not_specialize=["n_tensors"], repr=named_after("PREPARE", "prepare_"))
def _prepare_kernel(
    raw_ptr,  # float64 [n_tensors, N_RAW]
    given_ptr,  # int64 [n_tensors, N_RAW]: the address of a float32 device scalar that replaces the value, or 0
    scalars_ptr,  # int64 [n_tensors, N_SCALARS]: addresses of the float32 scalar states, which are written
    grads_ptr,  # int64 [n_tensors]: what has no gradient, at address 0, counts no step
    hyper_ptr,  # float64 [n_tensors, N_COLUMNS], written
    control_ptr,  # float64 [3]: NORM, FACTOR, SKIP
    n_tensors,
    PREPARE: tl.constexpr,  # the algorithm
    N_RAW: tl.constexpr,
    N_SCALARS: tl.constexpr,
    N_COLUMNS: tl.constexpr,
    HAS_CONTROL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    if HAS_CONTROL:
        if tl.load(control_ptr + SKIP) != 0:
            return
    tensors = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = tensors < n_tensors
    raw = ()
    for i in tl.static_range(N_RAW):
        offsets = tensors * N_RAW + i
        # past the end some number that no formula stumbles over
        value = tl.load(raw_ptr + offsets, mask=mask, other=0.5)
        address = tl.load(given_ptr + offsets, mask=mask, other=0)
        scalar = tl.load(address.to(tl.pointer_type(tl.float32)), mask=mask & (address != 0), other=0.0)
        raw = raw + (tl.where(address != 0, scalar.to(tl.float64), value),)
    scalars = ()
    scalar_ptrs = ()
    for i in tl.static_range(N_SCALARS):
        address = tl.load(scalars_ptr + tensors * N_SCALARS + i, mask=mask, other=0)
        scalar_ptrs = scalar_ptrs + (address.to(tl.pointer_type(tl.float32)),)
        scalars = scalars + (tl.load(scalar_ptrs[i], mask=mask, other=0.5).to(tl.float64),)
    row, scalars = PREPARE(raw, scalars)
    for i in tl.static_range(N_COLUMNS):
        tl.store(hyper_ptr + tensors * N_COLUMNS + i, row[i], mask=mask)
    counted = tl.load(grads_ptr + tensors, mask=mask, other=0) != 0
    for i in tl.static_range(N_SCALARS):
        tl.store(scalar_ptrs[i], scalars[i].to(tl.float32), mask=counted)


def prepare_(
    algorithm: Any,
    raw: Tensor,
    given: Tensor,
    scalars: Tensor,
    grads: Tensor,
    hyper: Tensor,
    control: Tensor | None,
    *,
    warmup: bool = False,
) -> None:
    """Turn raw hyperparameters into the rows of :func:`update_`, and count the step, all on the device.

    Args:
        algorithm: A module as described above.
        raw: float64 ``[n_tensors, len(RAW)]``.
        given: int64 like ``raw``, addresses of float32 scalars that replace raw values, or 0.
        scalars: int64 ``[n_tensors, n_scalars]``, addresses of the scalar states.
        grads: int64 ``[n_tensors]``, addresses; of a tensor whose gradient is missing, 0, nothing is counted.
        hyper: float64 ``[n_tensors, len(HYPER)]``, written.
        control: float64 ``[3]`` from :func:`~.grad_norm.finish_`, or None. Where it says skip, nothing is written.
        warmup: Compile, launch nothing.
    """
    launcher = _prepare_launcher(algorithm, scalars.shape[1], control is not None)
    some_control = hyper if control is None else control
    n_programs = triton.cdiv(len(hyper), _PREPARED)
    launch(launcher, n_programs, raw, given, scalars, grads, hyper, some_control, len(hyper), warmup=warmup)


#: Tensors whose rows a program prepares.
_PREPARED = 64


@cache
def _prepare_launcher(algorithm: Any, n_scalars: int, has_control: bool) -> Launcher:
    return Launcher(
        _prepare_kernel, PREPARE=algorithm.prepare, N_RAW=len(algorithm.RAW), N_SCALARS=n_scalars,
        N_COLUMNS=len(algorithm.HYPER), HAS_CONTROL=has_control, BLOCK_SIZE=_PREPARED, num_warps=2,
    )  # fmt: skip


def update_(
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
    warmup: bool = False,
) -> None:
    """Update every tensor of ``table`` in place.

    Args:
        algorithm: A module as described above.
        table: Roles: params, then each state of the variant, then each companion.
        grads: int64 ``[n_tensors]``, addresses; 0 leaves a tensor as it is.
        hyper: float64 ``[n_rows, len(HYPER)]``; ``table.rows`` says which is whose.
        control: float64 ``[3]`` from :func:`~.grad_norm.finish_`: the gradients' factor and whether to do nothing.
        variant: The variant of the algorithm, the last arguments of its ``update``.
        dtypes: Of params, grads, each state and each companion.
        storage: How they are kept.
        riders: What rides along.
        warmup: Compile, launch nothing.
    """
    if table.n_chunks == 0:
        return
    launcher = _update_launcher(
        algorithm, variant, dtypes, storage.formats, table.size, control is not None, riders.sums, riders.moment,
        riders.average_dtype,
    )  # fmt: skip
    launch(
        launcher, table.n_chunks, table.fixed, grads, table.numels, table.rows, hyper, table.chunk_tensor,
        table.chunk_start, hyper if control is None else control, *storage.noise_of(table),
        grads if riders.averages is None else riders.averages, hyper if riders.weight is None else riders.weight,
        hyper if riders.partials is None else riders.partials, table.n_chunks, warmup=warmup,
    )  # fmt: skip


@cache
def _update_launcher(
    algorithm: Any,
    variant: tuple[bool, ...],
    dtypes: tuple[torch.dtype, ...],
    formats: Formats,
    size: LaunchSize,
    has_control: bool,
    sums: tuple[int, ...] = (),
    moment: int = 0,
    average_dtype: torch.dtype | None = None,
) -> Launcher:
    storage = constants(dtypes, formats, size)
    if average_dtype is not None:
        # its accesses are as wide as others'
        storage["BLOCK_SIZE"] = min(storage["BLOCK_SIZE"], max(GROUP.value, size.block([average_dtype])))
    return Launcher(
        _update_kernel, UPDATE=algorithm.update, MEASURE=algorithm.measure if TAKEN.value in sums else None,
        VARIANT=variant, **storage, SUMS=sums, MOMENT=moment,
        AVERAGE=None if average_dtype is None else TRITON_DTYPE[average_dtype], COMPUTE=compute_dtype(dtypes[0]),
        N_COLUMNS=len(algorithm.HYPER), HAS_CONTROL=has_control, CHUNK_SIZE=size.chunk_size, num_warps=size.num_warps,
    )  # fmt: skip
