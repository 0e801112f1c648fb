"""Lengths of tensors and of their steps, from partial results of programs: for steps as long as the tensor.

Partial results are squares, float64 ``[n_programs, 2]``, of parameters and of steps. Those of a tensor follow each
other, and are added up in a fixed order. Of a tensor whose parts lie in several processes they are added up in each
first, then over all: :func:`lengths_` is the first of these sums.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import SKIP, Launcher, launch

BLOCK_SIZE = 256


@triton.jit
def squared_lengths(partials_ptr, first_ptr, tensor, BLOCK_SIZE: tl.constexpr):
    """Of a parameter and of its step, float64."""
    first = tl.load(first_ptr + tensor)
    last = tl.load(first_ptr + tensor + 1)
    of_params = tl.zeros((BLOCK_SIZE,), tl.float64)
    of_steps = tl.zeros((BLOCK_SIZE,), tl.float64)
    for i in range(first, last, BLOCK_SIZE):
        programs = i + tl.arange(0, BLOCK_SIZE)
        mask = programs < last
        of_params += tl.load(partials_ptr + 2 * programs, mask=mask, other=0.0)
        of_steps += tl.load(partials_ptr + 2 * programs + 1, mask=mask, other=0.0)
    return tl.sum(of_params, axis=0), tl.sum(of_steps, axis=0)


@triton.jit
def _lengths_kernel(
    partials_ptr,  # float64 [n_programs, 2]
    first_ptr,  # int32 [n_tensors + 1]: program with which a tensor begins
    control_ptr,  # float64 [3]: NORM, FACTOR, SKIP
    lengths_ptr,  # float64 [n_tensors, 2], written
    HAS_CONTROL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    if HAS_CONTROL:
        if tl.load(control_ptr + SKIP) != 0:
            return
    tensor = tl.program_id(0)
    of_params, of_steps = squared_lengths(partials_ptr, first_ptr, tensor, BLOCK_SIZE)
    tl.store(lengths_ptr + 2 * tensor, of_params)
    tl.store(lengths_ptr + 2 * tensor + 1, of_steps)


def lengths_(partials: Tensor, first: Tensor, control: Tensor | None, *, warmup: bool = False) -> tuple[Tensor, Tensor]:
    """Add up the partial results of each tensor.

    Args:
        partials: float64 ``[n_programs, 2]``.
        first: int32 ``[n_tensors + 1]``: programs of tensor ``i`` begin there, and end where the next one's begin.
        control: float64 ``[3]`` from :func:`~.grad_norm.finish_`, or None. Nothing is written in a skipped step.
        warmup: Compile, launch nothing.

    Returns:
        What may stand in place of ``partials`` and ``first``: sums, float64 ``[n_tensors, 2]``, one for each tensor.
    """
    n_tensors = len(first) - 1
    lengths = torch.empty(n_tensors, 2, dtype=torch.float64, device=partials.device)
    some_control = partials if control is None else control
    launch(_launcher(control is not None), n_tensors, partials, first, some_control, lengths, warmup=warmup)
    return lengths, torch.arange(n_tensors + 1, dtype=torch.int32, device=partials.device)


@cache
def _launcher(has_control: bool) -> Launcher:
    return Launcher(_lengths_kernel, HAS_CONTROL=has_control, BLOCK_SIZE=BLOCK_SIZE, num_warps=2)
