"""Small tensors on a CPU: updated together, because an operator call costs more than their elements."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ... import _compat
from ..bucket import Members, picker

#: Elements of small tensors that are updated together.
BATCH = 1 << 16
#: Contiguous tensors up to this many elements are updated together rather than one by one.
SMALL = 1 << 12
#: Fewer tensors whose states are neighbours in memory are copied, with others, rather than updated where they are.
RUN = 8


def is_small(tensor: Tensor) -> bool:
    """Whether a tensor is updated together with others."""
    return tensor.numel() <= SMALL and tensor.is_contiguous()


def split_by_size(tensors: Sequence[Tensor]) -> tuple[list[list[int]], list[int]]:
    """Indices of small tensors, batch by batch, and of large (or not contiguous) ones; without those of no elements."""
    small = [i for i, tensor in enumerate(tensors) if is_small(tensor) and tensor.numel()]
    return cut(small, tensors), [i for i, tensor in enumerate(tensors) if not is_small(tensor)]


def cut(indices: Sequence[int], tensors: Sequence[Tensor], most: int = BATCH) -> list[list[int]]:
    """Indices of tensors, batch by batch of ``most`` elements."""
    batches: list[list[int]] = []
    room = 0
    for i in indices:
        numel = tensors[i].numel()
        if numel > room or not batches:
            batches.append([])
            room = most
        batches[-1].append(i)
        room -= numel
    return batches


def runs(indices: Sequence[int], roles: Sequence[Sequence[Tensor]]) -> list[list[int]]:
    """Indices cut into runs of tensors that follow each other in memory, in every role, in the order of memory."""
    if not indices or not roles:
        return [[*indices]] if indices else []
    ordered = sorted(indices, key=lambda i: roles[0][i].data_ptr())
    result = [ordered[:1]]
    for before, after in pairwise(ordered):
        if all(_follows(role[before], role[after]) for role in roles):
            result[-1].append(after)
        else:
            result.append([after])
    return result


def _follows(a: Tensor, b: Tensor) -> bool:
    """Whether a contiguous tensor begins where another one ends, in the same storage."""
    return (
        a.data_ptr() + a.nbytes == b.data_ptr()
        and a.dtype is b.dtype
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    )


def in_order(tensors: Sequence[Tensor]) -> bool:
    """Whether addresses rise."""
    return all(a.data_ptr() < b.data_ptr() for a, b in pairwise(tensors))


class Batch:
    """Tensors that are updated together, because calls for each would take longer.

    Args:
        indices: Which of a call's members.
        members: The call's members.
        together: Their states lie one after the other, in this order.

    Attributes:
        sizes: Elements of each tensor.
        numel: Elements of all.
        are_small: They are small, most of them at least: what is done with all costs less in one tensor.
    """

    def __init__(self, indices: list[int], members: Members, together: bool = False) -> None:
        self.indices = indices
        self.together = together
        self._pick = picker(indices)
        params = self._pick(members.params)
        self.sizes = [param.numel() for param in params]
        self.numel = sum(self.sizes)
        self.are_small = self.numel <= SMALL * len(self.sizes)
        self._are_vectors = all(param.dim() == 1 for param in params)
        self._views: dict[Hashable, list[Tensor]] = {}

    def of(self, members: Members) -> Members:
        """The batch's tensors of those of its call."""
        return members.pick(self._pick)

    def flatten(self, role: Sequence[Tensor]) -> Tensor:
        """The elements of a role's tensors in one tensor."""
        # the second one makes each of them a vector first, in twice the time
        return torch.cat([*role]) if self._are_vectors else _compat.flatten_dense_tensors([*role])

    def where_they_are(self, role: Sequence[Tensor]) -> Tensor:
        """All elements of a role that lies together, as one tensor."""
        return role[0].as_strided((sum(map(Tensor.numel, role)),), (1,))

    def gather(self, slot: Hashable, role: Sequence[Tensor], memory: Tensor) -> None:
        """Copy the tensors of a role to scratch memory.

        Args:
            slot: 0 for gradients, then the roles.
            role: Its tensors.
            memory: As many elements, the same ones at every call.
        """
        if self._are_vectors and role[0].dtype is memory.dtype:
            torch.cat([*role], out=memory)
        else:
            _compat.foreach_copy_(self.views(slot, role, memory), role)

    def scatter(self, slot: Hashable, role: Sequence[Tensor], memory: Tensor) -> None:
        """Copy them back."""
        _compat.foreach_copy_(role, self.views(slot, role, memory))

    def views(self, slot: Hashable, role: Sequence[Tensor], memory: Tensor) -> list[Tensor]:
        """The tensors' places in scratch memory. A thousand views cost more than the step: they stay."""
        if slot not in self._views:
            parts = memory.split([*map(Tensor.numel, role)])
            self._views[slot] = [part.view(tensor.shape) for part, tensor in zip(parts, role, strict=True)]
        return self._views[slot]


def batches_of(members: Members, together: bool) -> tuple[list[Batch], list[int]]:
    """Batches of a call's small members, and indices of the large ones; who has no elements is neither.

    Args:
        members: The call's.
        together: Take tensors whose states lie together on their own; False: where states lie makes no difference.
    """
    small = [i for i, param in enumerate(members.params) if is_small(param) and param.numel()]
    large = [i for i, param in enumerate(members.params) if not is_small(param)]
    batches: list[Batch] = []
    if together:
        scattered: list[int] = []
        for run in runs(small, members.states):
            if len(run) >= min(RUN, len(small)):
                batches += [Batch(indices, members, together=True) for indices in cut(run, members.params)]
            else:
                scattered += run
        small = sorted(scattered)
    batches += [Batch(indices, members) for indices in cut(small, members.params)]
    return batches, large
