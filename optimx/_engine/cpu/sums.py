"""Sums over the elements of each of many tensors, float64: by torch's operators, on any device, without waiting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .batch import split_by_size


@lru_cache(maxsize=256)
def integers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers on a device, where they stay: a CUDA graph could not fetch them."""
    sent = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    return sent.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else sent.to(device)


def squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of each tensor."""
    return _of_each([tensors], lambda t: t.double().square(), lambda t: torch.dot(t, t), "sum")


def products(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """The sum of products of elements of each tensor and of another one of its shape."""
    return _of_each([tensors, others], lambda a, b: a.double() * b.double(), lambda a, b: torch.dot(a, b.to(a)), "sum")


def maxima(tensors: Sequence[Tensor]) -> Tensor:
    """The largest absolute value of each tensor; 0 of an empty one."""
    infinity = float("inf")
    return _of_each([tensors], lambda t: t.double().abs(), lambda t: torch.linalg.vector_norm(t, infinity), "max")


def zeros(tensors: Sequence[Tensor]) -> Tensor:
    """How many elements of each tensor are 0."""
    return _of_each([tensors], lambda t: (t == 0).double(), lambda t: t.numel() - t.count_nonzero(), "sum")


def _of_each(
    roles: Sequence[Sequence[Tensor]], map_: Callable[..., Tensor], of_large: Callable[..., Tensor], reduce: str
) -> Tensor:
    """A number for each tensor of the first role.

    Small tensors are put together: an operator call costs more than their elements.

    Args:
        roles: Lists of tensors that belong together, one after the other.
        map_: Of vectors, one a role, their elements' share of the number, float64.
        of_large: Of vectors, one a role, float32 or float64, their number.
        reduce: ``"sum"`` or ``"max"``.
    """
    first = roles[0]
    found = torch.zeros(len(first), dtype=torch.float64, device=first[0].device)
    together, large = split_by_size(first)
    for indices in together:
        flat = [torch.cat([role[i].detach().reshape(-1) for i in indices]) for role in roles]
        lengths = integers(tuple(first[i].numel() for i in indices), found.device)
        numbers = torch.segment_reduce(map_(*flat), reduce, lengths=lengths, unsafe=True)
        found.index_copy_(0, integers((*indices,), found.device), numbers)
    for i in large:
        parts = [role[i].detach().reshape(-1) for role in roles]
        wide = torch.float64 if torch.float64 in {part.dtype for part in parts} else torch.float32
        found[i] = of_large(*(part.to(wide) for part in parts))
    return found
