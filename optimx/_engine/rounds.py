"""What an update needs of a whole tensor, parts of which lie on several ranks: lengths, sums of rows and columns.

An update of such tensors stops where it needs them: ``Bucket.update`` is a generator, and yields what this process
found. All updates of a step stop together; what they have found meets in one vector, of all ranks that have parts; and
they go on with the sums of all. Vectors have a place for everything that any rank could find: which there are, and how
long they are, depends on parameters, meshes and the algorithm's walk alone, never on gradients or backends of a rank.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from itertools import repeat
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from .. import _compat
from .exchange import Exchange, exchanges
from .rule import UpdateRule
from .sharding import all_reduced, cutting, has_dtensors, is_here, local

#: What meets: whether there is a gradient; sums of squared gradients over rows and over columns, with averages of rows,
#: added up, if these are whole; else those after them; squared lengths of parameters and of their steps, or how many
#: elements took a cautious one; and matrices, which are not added up but put together.
PRESENT, SUMS, MEANS, LENGTHS, MATRICES = range(5)

#: Where updates of each walk stop.
ROUNDS_OF: dict[str, tuple[int, ...]] = {
    "elementwise": (),
    "measured": (LENGTHS,),
    "lagged": (LENGTHS,),
    "factored": (SUMS, MEANS, LENGTHS),
    "orthogonal": (MATRICES,),
}


class Share(NamedTuple):
    """What a process has found of a tensor; what all have found, when the update goes on.

    Attributes:
        position: Of the parameter among all.
        name: ``"rows"``, ``"columns"``, ``"means"``, ``"lengths"``, ``"matrix"``. What no other rank has a part of
            stays as it is.
        numbers: Written.
    """

    position: int
    name: str
    numbers: Tensor


#: Stops with the number of a round, and what it has found for it.
Update = Generator[tuple[int, Sequence[Share]], None, None]


class _Round:
    """A vector that meets in every step."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.numels: list[int] = []
        #: Where the places of shares are among those of all.
        self.place_of: dict[tuple[int, str], int] = {}
        #: Dimensions of meshes over whose ranks places are added up, one after the other, and those places.
        self.groups: dict[tuple[Any, int], list[int]] = {}

    def add(self, position: int, name: str, numel: int, mesh: Any, dims: Iterable[int]) -> None:
        """Make a place for shares, which are added up over some dimensions of a mesh."""
        place = self.place_of[position, name] = len(self.numels)
        self.numels.append(numel)
        for dim in dims:
            self.groups.setdefault((mesh, dim), []).append(place)

    def meet(self, shares: Iterable[Share], device: torch.device) -> None:
        """Add up what all ranks have, in place."""
        vector = torch.zeros(sum(self.numels), dtype=self.dtype, device=device)
        places = vector.split(self.numels)
        shared = [share for share in shares if (share.position, share.name) in self.place_of and share.numbers.numel()]
        numbers = [share.numbers for share in shared]
        mine = [places[self.place_of[share.position, share.name]].view(share.numbers.shape) for share in shared]
        if shared:
            _compat.foreach_copy_(mine, numbers)
        for (mesh, dim), members in self.groups.items():
            theirs = [places[i] for i in members]
            together = vector if len(members) == len(places) else torch.cat(theirs)
            total = all_reduced(together, [mesh.get_group(dim)], dist.ReduceOp.SUM)
            if total is not vector:
                _compat.foreach_copy_(theirs, total.to(device).split([self.numels[i] for i in members]))
        if shared:
            _compat.foreach_copy_(numbers, mine)


class Rounds:
    """The rounds of an optimizer's steps.

    Args:
        rule: Its rule.
        groups: Its parameter groups.
    """

    def __init__(self, rule: UpdateRule, groups: Sequence[dict[str, Any]]) -> None:
        self._rule = rule
        self._group_of = [g for g, group in enumerate(groups) for _ in group["params"]]
        params = [param for group in groups for param in group["params"]]
        cut = []
        walks = [rule.walk] * len(groups)
        if has_dtensors(params):
            walks = [rule.walk_of(rule.group_variant(group)) for group in groups]
            cut = [
                (position, param) for position, param in enumerate(params)
                if ROUNDS_OF[walks[self._group_of[position]]] and is_here(param) and cutting(param)
            ]  # fmt: skip
        wide = any(param.dtype is torch.float64 for _, param in cut)
        sums = torch.float64 if wide else torch.float32
        self._rounds = {number: _Round(torch.float64 if number in (PRESENT, LENGTHS) else sums) for number in range(4)}
        for position, param in cut:
            mesh = _compat.dtensor_spec(param).mesh
            for number, name, numel, dims in _shares_of(walks[self._group_of[position]], param):
                if dims:
                    self._rounds[number].add(position, name, numel, mesh, dims)
        self._rounds = {number: each for number, each in self._rounds.items() if each.numels}
        self._exchanges: list[Exchange] = []
        if MATRICES in ROUNDS_OF[rule.walk]:
            settings = [*map(rule.group_variant, groups)] if cut else []
            self._exchanges = exchanges(
                (position, param, rule.variant_of(settings[self._group_of[position]], param))
                for position, param in cut if param.requires_grad
            )  # fmt: skip

    def check(self, grads: Sequence[Any], groups: Sequence[dict[str, Any]]) -> None:
        """Raise RuntimeError, on all ranks, where some of them have no gradient of a tensor that has to be whole.

        On a CPU, where looking at what others have does not wait for a device. Elsewhere such a part is left as it is,
        and counts nothing.

        Args:
            grads: Of all parameters; None where there is none.
            groups: Of the optimizer.
        """
        if PRESENT not in self._rounds:
            return
        positions = [position for position, _ in self._rounds[PRESENT].place_of]
        found = torch.tensor([[grads[i] is not None, True] for i in positions], dtype=torch.float64, device="cpu")
        self._rounds[PRESENT].meet(map(Share, positions, repeat("present"), found), found.device)
        members = [(g, i) for g, group in enumerate(groups) for i in range(len(group["params"]))]
        for position, (count, n) in zip(positions, found.tolist(), strict=True):
            if 0 < count < n:
                g, i = members[position]
                raise RuntimeError(
                    "gradients should be on all ranks or on none but parameter "
                    f"{i} of group {g} has one on {count:.0f} of {n:.0f}"
                )

    def run(self, updates: Iterable[Update], values: Sequence[tuple[Any, ...]], device: torch.device) -> None:
        """Let the updates of a step come to their ends.

        Args:
            updates: All of them, which are not begun.
            values: The hyperparameters of each group.
            device: Where vectors are made.
        """

        def treat_(wholes: Tensor, variant: Any, positions: Sequence[int]) -> None:
            self._rule.treat_wholes_(wholes, variant, [values[self._group_of[position]] for position in positions])

        joined = together(updates)
        found = next(joined, None)
        for number in (SUMS, MEANS, LENGTHS, MATRICES):
            shares = found[1] if found is not None and found[0] == number else None
            if number in self._rounds:
                self._rounds[number].meet(shares or (), device)
            if number == MATRICES:
                parts = {share.position: share.numbers for share in shares or ()}
                for exchange in self._exchanges:
                    exchange.meet(parts, device, treat_)
            if shares is not None:
                found = next(joined, None)
        if found is not None:
            raise RuntimeError(f"updates should have ended but wait for other ranks in round {found[0]}")


def together(updates: Iterable[Update]) -> Update:
    """Several updates as one, which stops when all have stopped, or ended."""
    waiting = [(update, found) for update in updates if (found := next(update, None)) is not None]
    while waiting:
        number = min(at for _, (at, _) in waiting)
        here = [(update, shares) for update, (at, shares) in waiting if at == number]
        yield number, [share for _, shares in here for share in shares]
        waiting = [entry for entry in waiting if entry[1][0] != number]
        waiting += [(update, found) for update, _ in here if (found := next(update, None)) is not None]


def _shares_of(walk: str, param: Tensor) -> list[tuple[int, str, int, list[int]]]:
    """Round, name and length of what may be found of a DTensor, and over which dimensions of its mesh that meets."""
    part = local(param)
    everywhere = cutting(param)
    found = [(LENGTHS, "lengths", 1 if walk == "lagged" else 2, everywhere)] if LENGTHS in ROUNDS_OF[walk] else []
    if part.device.type == "cpu":
        found.append((PRESENT, "present", 2, everywhere))
    if walk == "factored" and param.dim() > 1:
        matrices, (rows, columns) = prod(part.shape[:-2]), part.shape[-2:]
        over_rows, over_columns = cutting(param, -2), cutting(param, -1)
        found += [
            (SUMS, "rows", matrices * rows, over_columns),
            (SUMS, "columns", matrices * columns, over_rows),
            (MEANS if over_columns else SUMS, "means", matrices, over_rows),
        ]
    return found
