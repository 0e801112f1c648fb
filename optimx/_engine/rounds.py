"""Sums that an update needs of a whole tensor, parts of which lie on several ranks: lengths, sums of rows and columns.

An update of such tensors stops where it needs them: ``Bucket.update`` is a generator, and yields what this process
found. All updates of a step stop together; what they have found meets in one vector, of all ranks that have parts; and
they go on with the sums of all. Vectors have a place for everything that any rank could find: which there are, and how
long they are, depends on parameters, meshes and the algorithm's walk alone, never on gradients or backends of a rank.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from .. import _compat
from .sharding import all_reduced, cutting, has_dtensors, is_here, local

#: What meets: whether there is a gradient; sums of squared gradients over rows and over columns, with averages of rows,
#: added up, if these are whole; else those after them; squared lengths of parameters and of their steps.
PRESENT, SUMS, MEANS, LENGTHS = range(4)


class Share(NamedTuple):
    """What a process has found of a tensor; what all have found, when the update goes on.

    Attributes:
        position: Of the parameter among all.
        name: ``"rows"``, ``"columns"``, ``"means"``, ``"lengths"``. What no other rank has a part of stays as it is.
        numbers: Written.
    """

    position: int
    name: str
    numbers: Tensor


#: Stops with the number of a round, and what it has found for it.
Update = Generator[tuple[int, Sequence[Share]], None, None]

_Group = tuple[Any, int]


@dataclass(frozen=True)
class _Slot:
    """The place of one share: how long it is, and dimensions of a mesh over whose ranks it is added up."""

    numel: int
    groups: tuple[_Group, ...]


class Rounds:
    """The rounds of an optimizer's steps.

    Args:
        walk: Of its rule.
        params: All of its parameters.
    """

    def __init__(self, walk: str, params: Sequence[Tensor]) -> None:
        self._slots: list[dict[tuple[int, str], _Slot]] = [{}, {}, {}, {}]
        self._wide = False
        if walk == "elementwise" or not has_dtensors(params):
            return
        for position, param in enumerate(params):
            if is_here(param) and cutting(param):
                self._wide |= param.dtype is torch.float64
                for number, name, slot in _slots_of(walk, param):
                    self._slots[number][position, name] = slot

    def check(self, grads: Sequence[Any], groups: Sequence[dict[str, Any]]) -> None:
        """Raise RuntimeError, on all ranks, where some of them have no gradient of a tensor that has to be whole.

        On a CPU, where looking at what others have does not wait for a device. Elsewhere such a part is left as it is,
        and counts nothing.

        Args:
            grads: Of all parameters; None where there is none.
            groups: Of the optimizer.
        """
        slots = self._slots[PRESENT]
        if not slots:
            return
        device = torch.device("cpu")
        counts = {
            position: torch.full((1,), float(grads[position] is not None), device=device) for position, _ in slots
        }
        self._meet(PRESENT, slots, [Share(position, "present", count) for position, count in counts.items()], device)
        members = [(g, i) for g, group in enumerate(groups) for i in range(len(group["params"]))]
        for (position, _), slot in slots.items():
            count, n = int(counts[position]), prod(mesh.size(dim) for mesh, dim in slot.groups)
            if 0 < count < n:
                g, i = members[position]
                raise RuntimeError(
                    "gradients should be on all ranks or on none but parameter "
                    f"{i} of group {g} has one on {count} of {n}"
                )

    def run(self, updates: Iterable[Update], device: torch.device) -> None:
        """Let the updates of a step come to their ends.

        Args:
            updates: All of them, which are not begun.
            device: Where vectors are made.
        """
        joined = together(updates)
        found = next(joined, None)
        for number, slots in enumerate(self._slots[SUMS:], SUMS):
            shares = found[1] if found is not None and found[0] == number else None
            if slots:
                self._meet(number, slots, shares or (), device)
            if shares is not None:
                found = next(joined, None)
        if found is not None:
            raise RuntimeError(f"updates should have ended but wait for other ranks in round {found[0]}")

    def _meet(
        self, number: int, slots: dict[tuple[int, str], _Slot], shares: Sequence[Share], device: torch.device
    ) -> None:
        dtype = torch.float64 if number in (PRESENT, LENGTHS) or self._wide else torch.float32
        vector = torch.zeros(sum(slot.numel for slot in slots.values()), dtype=dtype, device=device)
        place_of = dict(zip(slots, vector.split([slot.numel for slot in slots.values()]), strict=True))
        shared = [share for share in shares if (share.position, share.name) in slots and share.numbers.numel()]
        places = [place_of[share.position, share.name].view(share.numbers.shape) for share in shared]
        numbers = [share.numbers for share in shared]
        if shared:
            _compat.foreach_copy_(places, numbers)
        for mesh, dim in dict.fromkeys(group for slot in slots.values() for group in slot.groups):
            mine = [place_of[key] for key, slot in slots.items() if (mesh, dim) in slot.groups]
            together = vector if len(mine) == len(slots) else torch.cat(mine)
            total = all_reduced(together, [mesh.get_group(dim)], dist.ReduceOp.SUM)
            if total is not vector:
                _compat.foreach_copy_(mine, total.to(device).split([place.numel() for place in mine]))
        if shared:
            _compat.foreach_copy_(numbers, places)


def together(updates: Iterable[Update]) -> Update:
    """Several updates as one, which stops when all have stopped, or ended."""
    waiting = [(update, found) for update in updates if (found := next(update, None)) is not None]
    while waiting:
        number = min(at for _, (at, _) in waiting)
        here = [(update, shares) for update, (at, shares) in waiting if at == number]
        yield number, [share for _, shares in here for share in shares]
        waiting = [entry for entry in waiting if entry[1][0] != number]
        waiting += [(update, found) for update, _ in here if (found := next(update, None)) is not None]


def _slots_of(walk: str, param: Tensor) -> list[tuple[int, str, _Slot]]:
    """Round, name and place of everything that meets of a DTensor."""
    mesh = _compat.dtensor_spec(param).mesh
    shape = local(param).shape

    def slot(numel: int, *dims: int) -> _Slot:
        return _Slot(numel, tuple((mesh, i) for i in cutting(param, *dims)))

    everywhere = range(-param.dim(), 0)
    found = [(LENGTHS, "lengths", slot(2, *everywhere))]
    if local(param).device.type == "cpu":
        found.append((PRESENT, "present", slot(1, *everywhere)))
    if walk == "factored" and param.dim() > 1:
        matrices, (rows, columns) = prod(shape[:-2]), shape[-2:]
        rows_first = SUMS if not cutting(param, -1) else MEANS
        found += [
            (SUMS, "rows", slot(matrices * rows, -1)),
            (SUMS, "columns", slot(matrices * columns, -2)),
            (rows_first, "means", slot(matrices, -2)),
        ]
    return [entry for entry in found if entry[2].groups]
