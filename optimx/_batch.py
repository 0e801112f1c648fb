"""Small tensors on a CPU: copied together, because an operator call costs more than their elements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _compat

#: Elements of small tensors that are copied together.
BATCH = 1 << 16
#: Contiguous tensors up to this many elements are copied together rather than one by one.
SMALL = 1 << 12


def split_by_size(tensors: Sequence[Tensor]) -> tuple[list[list[int]], list[int]]:
    """Indices of small tensors, batch by batch, and of large (or not contiguous) ones."""
    small: list[list[int]] = []
    large: list[int] = []
    room = 0
    for i, tensor in enumerate(tensors):
        numel = tensor.numel()
        if numel > SMALL or not tensor.is_contiguous():
            large.append(i)
            continue
        if numel > room:
            small.append([])
            room = BATCH
        if small:
            small[-1].append(i)
            room -= numel
    return small, large


class Batch:
    """Small tensors that are updated together.

    Attributes:
        roles: For each role (parameter, then states) the tensors.
        homes: For each role its elements in one tensor, if they lie so; None: they are to be copied.
    """

    def __init__(self, indices: list[int], roles: Sequence[Sequence[Tensor]]) -> None:
        self.indices = indices
        self.roles = [[role[i] for i in indices] for role in roles]
        self.homes: list[Tensor | None] = [None] * len(roles)
        self.sizes = [tensor.numel() for tensor in self.roles[0]]
        self.numel = sum(self.sizes)
        self._are_vectors = all(tensor.dim() == 1 for tensor in self.roles[0])
        self._views: dict[int, list[Tensor]] = {}

    def flatten(self, grads: Sequence[Tensor]) -> Tensor:
        """The batch's gradients, of those of a call, in one tensor."""
        members = [grads[i] for i in self.indices]
        # makes each of them a vector first, in twice the time
        return torch.cat(members) if self._are_vectors else _compat.flatten_dense_tensors(members)

    def gather(self, slot: int, memory: Tensor) -> None:
        """Copy the tensors of a role to scratch memory.

        Args:
            slot: 0 for gradients, then the roles.
            memory: As many elements, the same ones at every call.
        """
        tensors = self.roles[slot - 1]
        if self._are_vectors and tensors[0].dtype is memory.dtype:
            torch.cat(tensors, out=memory)
        else:
            _compat.foreach_copy_(self.views(slot, memory), tensors)

    def scatter(self, slot: int, memory: Tensor) -> None:
        """Copy them back."""
        _compat.foreach_copy_(self.roles[slot - 1], self.views(slot, memory))

    def views(self, slot: int, memory: Tensor) -> list[Tensor]:
        """The tensors' places in scratch memory. A thousand views cost more than the step: they stay."""
        if slot not in self._views:
            shapes = [tensor.shape for tensor in self.roles[0]]
            parts = memory.split(self.sizes)
            self._views[slot] = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return self._views[slot]
