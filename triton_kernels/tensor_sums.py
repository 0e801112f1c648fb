"""Sums over tensors, from partial results of programs, which lie in a row for each kind."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from .device import Launcher, launch

BLOCK_SIZE = 256


@triton.jit(do_not_specialize=["n_partials"], do_not_specialize_on_alignment=["partials_ptr"])
def _tensor_sums_kernel(
    partials_ptr,  # [n_rows, n_partials]
    n_partials,
    first_ptr,  # int32 [n_tensors + 1]: program with which a tensor begins
    sums_ptr,  # float64 [n_rows, n_tensors], written
    MAXIMA: tl.constexpr,  # of each row, whether it has maxima
    BLOCK_SIZE: tl.constexpr,
):
    tensor = tl.program_id(0)
    first = tl.load(first_ptr + tensor)
    last = tl.load(first_ptr + tensor + 1)
    for row in tl.static_range(len(MAXIMA)):
        total = tl.zeros((BLOCK_SIZE,), tl.float64)
        for i in range(first, last, BLOCK_SIZE):
            programs = i + tl.arange(0, BLOCK_SIZE)
            found = tl.load(partials_ptr + row * n_partials + programs, mask=programs < last, other=0.0).to(tl.float64)
            if MAXIMA[row]:
                total = tl.maximum(total, found, propagate_nan=tl.PropagateNan.ALL)
            else:
                total += found
        if MAXIMA[row]:
            # where all are >= 0, NaN is neither: a sum of what is no number shows it
            of_tensor = tl.max(total, axis=0) + tl.sum(tl.where(total != total, total, 0.0), axis=0)
        else:
            of_tensor = tl.sum(total, axis=0)
        tl.store(sums_ptr + row * tl.num_programs(0) + tensor, of_tensor)


def tensor_sums_(
    partials: Tensor, first: Tensor, sums: Tensor, *, maxima: Sequence[bool], warmup: bool = False
) -> None:
    """Combine the partial results of each tensor, in a fixed order.

    Args:
        partials: Numbers ``[n_rows, n_programs]``, of which the last dimension has no gaps; rows may.
        first: int32 ``[n_tensors + 1]``: programs of tensor ``i`` begin there, and end where the next one's begin.
        sums: float64 ``[n_rows, n_tensors]``, written.
        maxima: Of each row, whether the largest is taken in place of the sum.
        warmup: Compile, launch nothing.
    """
    if len(first) > 1 and sums.numel():
        launch(_launcher((*maxima,)), len(first) - 1, partials, partials.stride(0), first, sums, warmup=warmup)


@cache
def _launcher(maxima: tuple[bool, ...]) -> Launcher:
    return Launcher(_tensor_sums_kernel, MAXIMA=maxima, BLOCK_SIZE=BLOCK_SIZE, num_warps=2)
