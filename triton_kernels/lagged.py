"""The walk of updates whose size in a tensor follows from the step before: cautious steps, divided by their last share.

Three launches: what that share makes of each tensor's hyperparameters; the update that all algorithms share, which
counts the elements that take a step; the new shares. Nothing waits for the host, and sums meet in a fixed order.

Beside what :mod:`.update` takes, an algorithm's module has ``measure`` and ``ADAPTED``, see :mod:`.measured`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import SKIP, Launcher, launch
from .flags import divisor
from .storage import PLAIN, Storage
from .tensor_sums import BLOCK_SIZE, tensor_sums_
from .tensor_table import TensorTable
from .update import NO_RIDERS, TAKEN, Riders, update_


@triton.jit(do_not_specialize=["n_tensors"])
def _lagged_adapt_kernel(
    means_ptr,  # int64 [n_tensors]: addresses of the float32 shares of the step before
    hyper_ptr,  # float64 [n_tensors, N_COLUMNS], in which columns are divided
    control_ptr,  # float64 [3]: NORM, FACTOR, SKIP
    n_tensors,
    COLUMNS: tl.constexpr,  # those that are divided
    N_COLUMNS: tl.constexpr,
    HAS_CONTROL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    if HAS_CONTROL:
        if tl.load(control_ptr + SKIP) != 0:
            return
    tensors = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = tensors < n_tensors
    mean_ptrs = tl.load(means_ptr + tensors, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    factor = 1.0 / divisor(tl.load(mean_ptrs, mask=mask, other=1.0).to(tl.float64))
    for i in tl.static_range(len(COLUMNS)):
        columns = hyper_ptr + tensors * N_COLUMNS + COLUMNS[i]
        tl.store(columns, tl.load(columns, mask=mask, other=0.0) * factor, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["partials_ptr"])
def _lagged_keep_kernel(
    partials_ptr,  # [n_programs]: how many elements took a step
    first_ptr,  # int32 [n_tensors + 1]: program with which a tensor begins
    numels_ptr,  # int64 [n_tensors]: of whole tensors
    means_ptr,  # int64 [n_tensors]: addresses of the float32 shares, which are written
    control_ptr,  # float64 [3]: NORM, FACTOR, SKIP
    HAS_CONTROL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    if HAS_CONTROL:
        if tl.load(control_ptr + SKIP) != 0:
            return
    tensor = tl.program_id(0)
    first = tl.load(first_ptr + tensor)
    last = tl.load(first_ptr + tensor + 1)
    total = tl.zeros((BLOCK_SIZE,), tl.float64)
    for i in range(first, last, BLOCK_SIZE):
        programs = i + tl.arange(0, BLOCK_SIZE)
        total += tl.load(partials_ptr + programs, mask=programs < last, other=0.0).to(tl.float64)
    count = tl.sum(total, axis=0)
    # where none has taken it, as without a gradient, nothing is known; a thousandth would make the coming step a
    # thousand times too long
    if count > 0:
        mean = count / tl.load(numels_ptr + tensor).to(tl.float64)
        tl.store(tl.load(means_ptr + tensor).to(tl.pointer_type(tl.float32)), mean.to(tl.float32))


def lagged_update_(
    algorithm: Any,
    table: TensorTable,
    grads: Tensor,
    hyper: Tensor,
    control: Tensor | None,
    *,
    variant: tuple[bool, ...],
    dtypes: tuple[torch.dtype, ...],
    means: Tensor,
    partials: Tensor,
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
        grads: int64 ``[n_tensors]``, addresses; 0 leaves a tensor, and its share, as it is.
        hyper: float64 ``[n_tensors, len(HYPER)]``, of which the columns ``ADAPTED`` are changed.
        control: float64 ``[3]`` from :func:`~.grad_norm.finish_`: the gradients' factor and whether to do nothing.
        variant: The variant of the algorithm.
        dtypes: Of params, grads, each state and each companion.
        means: int64 ``[n_tensors]``, addresses of float32 scalars: the shares, which are read and written.
        partials: float32 ``[len(riders.sums) + 1, n_chunks]``, written: sums that ride along, then those of this walk.
        storage: How they are kept.
        riders: What rides along; their own ``partials`` are not looked at.
        numels: int64 ``[n_tensors]``, elements of the whole tensors, if other parts of these are updated elsewhere.
        warmup: Compile, launch nothing.

    Yields:
        Only of parts of tensors: how many elements took a step, float64 ``[n_tensors]``, which are to be added up in
        place over all parts.
    """
    some_control = hyper if control is None else control
    adapt = _adapt_launcher(algorithm, control is not None)
    n_programs = triton.cdiv(table.n_tensors, _ADAPTED)
    launch(adapt, n_programs, means, hyper, some_control, table.n_tensors, warmup=warmup)
    update_(
        algorithm, table, grads, hyper, control, variant=variant, dtypes=dtypes, storage=storage,
        riders=riders._replace(sums=(*riders.sums, TAKEN.value), partials=partials), warmup=warmup,
    )  # fmt: skip
    counts, first, whole = partials[-1], table.first_chunk, table.numels
    if numels is not None:
        whole = numels
        counts = torch.empty(table.n_tensors, dtype=torch.float64, device=table.device)
        tensor_sums_(partials[-1:], first, counts.view(1, -1), maxima=(False,), warmup=warmup)
        yield counts
        first = torch.arange(table.n_tensors + 1, dtype=torch.int32, device=table.device)
    keep = _keep_launcher(counts.dtype, control is not None)
    launch(keep, table.n_tensors, counts, first, whole, means, some_control, warmup=warmup)


#: Tensors whose rows a program adapts.
_ADAPTED = 64


@cache
def _adapt_launcher(algorithm: Any, has_control: bool) -> Launcher:
    return Launcher(
        _lagged_adapt_kernel, COLUMNS=tuple(map(algorithm.HYPER.index, algorithm.ADAPTED)),
        N_COLUMNS=len(algorithm.HYPER), HAS_CONTROL=has_control, BLOCK_SIZE=_ADAPTED, num_warps=2,
    )  # fmt: skip


@cache
def _keep_launcher(dtype: torch.dtype, has_control: bool) -> Launcher:
    """Of partial results of a dtype: what is launched is compiled once."""
    return Launcher(_lagged_keep_kernel, HAS_CONTROL=has_control, BLOCK_SIZE=BLOCK_SIZE, num_warps=2)
