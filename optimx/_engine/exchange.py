"""Tensors that are cut over ranks, put together for a step: each on one rank, which treats it, and cut again.

Two collectives a step for all tensors that are cut over the same ranks, whatever their number; each rank puts together
about as much work as any other. Which collectives there are depends on parameters and settings alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from .. import _compat
from .matrices import MatrixVariant, Scratch
from .newton_schulz import first_dtype
from .sharding import cutting, reachable, shard_lengths


class Whole(NamedTuple):
    """A tensor that is cut.

    Attributes:
        position: Of the parameter among all.
        shape: Of all of it.
        dim: Along which it is cut.
        variant: What tensors have in common that are treated together.
    """

    position: int
    shape: torch.Size
    dim: int
    variant: MatrixVariant

    def shapes(self, n_ranks: int) -> list[tuple[int, ...]]:
        """Of the parts on each rank, as torch's ``Shard`` cuts them."""
        lengths = shard_lengths(self.shape[self.dim], n_ranks)
        return [(*self.shape[: self.dim], n, *self.shape[self.dim + 1 :]) for n in lengths]


#: Given ``[n, ...]``, n whole tensors of a variant, and their positions: overwrites them.
Treat = Callable[[Tensor, MatrixVariant, Sequence[int]], None]


def unsuitable(param: Tensor, variant: MatrixVariant) -> str:
    """Why a DTensor that is cut cannot be treated like this in one piece; empty if it can."""
    over = cutting(param)
    if len(over) > 1:
        return "several dimensions of the mesh cut it"
    # tensor parallelism beneath FSDP2 has strided shards, which say no
    if not all(_compat.dtensor_spec(param).placements[i].is_shard() for i in over):
        return "its shards are strided"
    if variant.normalized:
        return "its rows are normalized"
    return "its matrices have steps of different sizes" if len({*variant.times}) > 1 else ""


def exchanges(params: Iterable[tuple[int, Tensor, MatrixVariant]]) -> list[Exchange]:
    """What exchanges the parts of DTensors that are cut; of those that are suitable.

    Args:
        params: Positions, parameters and variants of all of them, in the same order on all ranks.
    """
    alike: dict[tuple[Any, int, torch.dtype], list[Whole]] = {}
    for position, param, variant in params:
        if not unsuitable(param, variant):
            (over,) = cutting(param)
            spec, dtype = _compat.dtensor_spec(param), first_dtype(variant.dtype)
            whole = Whole(position, param.shape, spec.placements[over].dim % param.dim(), variant)
            alike.setdefault((spec.mesh, over, dtype), []).append(whole)
    return [Exchange(mesh.get_group(dim), dtype, tensors) for (mesh, dim, dtype), tensors in alike.items()]


class Exchange:
    """The exchange of tensors of one dtype that are cut over the ranks of a group.

    Args:
        group: The process group.
        dtype: In which tensors travel.
        tensors: The same on all its ranks, in the same order.
    """

    def __init__(self, group: Any, dtype: torch.dtype, tensors: Sequence[Whole]) -> None:
        self.group = group
        self._dtype = dtype
        n_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        owners = shared_out([tensor.variant.cost for tensor in tensors], n_ranks)
        #: Those of each rank.
        self._of_ranks = [[t for t, owner in zip(tensors, owners, strict=True) if owner == r] for r in range(n_ranks)]
        self._here = [[prod(t.shapes(n_ranks)[rank]) for t in owned] for owned in self._of_ranks]
        mine = self._of_ranks[rank]
        shapes = [t.shapes(n_ranks) for t in mine]
        self._there = [[prod(of_ranks[r]) for of_ranks in shapes] for r in range(n_ranks)]
        #: Which of those that this rank owns are treated together, and shapes of their parts.
        self._alike: dict[tuple[MatrixVariant, torch.Size, int], list[int]] = {}
        for i, tensor in enumerate(mine):
            self._alike.setdefault((tensor.variant, tensor.shape, tensor.dim), []).append(i)
        self._shapes = shapes
        self._memory: Scratch | None = None

    def meet(self, parts: Mapping[int, Tensor], device: torch.device, treat: Treat) -> None:
        """Treat all tensors in one piece.

        Args:
            parts: Of each tensor, by its position, this rank's part, which is overwritten. One that is not there is
                zeros.
            device: Of the parts.
            treat: What happens to whole tensors.
        """
        memory = self._memory = self._memory or Scratch(reachable(device, self.group))
        splits = [*map(sum, self._here)], [*map(sum, self._there)]
        sent, received = (
            memory(name, (sum(n),), self._dtype) for name, n in zip(("sent", "received"), splits, strict=True)
        )
        tensors, numels = [*chain.from_iterable(self._of_ranks)], [*chain.from_iterable(self._here)]
        pairs = []
        for tensor, place in zip(tensors, sent.split(numels), strict=True):
            if tensor.position in parts:
                pairs.append((parts[tensor.position].view(-1), place))
            else:
                place.zero_()
        mine, places = [part for part, _ in pairs], [place for _, place in pairs]
        if pairs:
            _compat.foreach_copy_(places, mine)
        dist.all_to_all_single(received, sent, splits[1], splits[0], group=self.group)
        self._treat(received, memory, treat)
        dist.all_to_all_single(sent, received, splits[0], splits[1], group=self.group)
        if pairs:
            _compat.foreach_copy_(mine, places)

    def _treat(self, received: Tensor, memory: Scratch, treat: Treat) -> None:
        """Put those together that this rank owns, treat them, and leave their parts where they were."""
        n_mine = len(self._shapes)
        pieces = received.split([*chain.from_iterable(self._there)])
        mine = self._of_ranks[dist.get_rank(self.group)]
        for (variant, shape, dim), members in self._alike.items():
            wholes = memory("whole", (len(members), *shape), self._dtype)
            for whole, i in zip(wholes, members, strict=True):
                lengths = [of_rank[dim] for of_rank in self._shapes[i]]
                for r, place in enumerate(whole.split(lengths, dim)):
                    place.copy_(pieces[r * n_mine + i].view(place.shape))
            treat(wholes, variant, [mine[i].position for i in members])
            for whole, i in zip(wholes, members, strict=True):
                lengths = [of_rank[dim] for of_rank in self._shapes[i]]
                for r, place in enumerate(whole.split(lengths, dim)):
                    pieces[r * n_mine + i].view(place.shape).copy_(place)


def shared_out(costs: Sequence[int], n_ranks: int) -> list[int]:
    """Which rank does which work: the most expensive first, each for the rank with the least to do so far."""
    loads, owners = [0] * n_ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(range(n_ranks), key=loads.__getitem__)
        loads[owners[i]] += costs[i]
    return owners
