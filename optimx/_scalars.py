"""Scalar states on a CPU (step counts, mostly), read and counted where they lie.

Those that were created together lie in one tensor (see :mod:`optimx._states`), where one addition counts the step of
all of them. Those that somebody else put there, who may be another process, are counted one by one.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _compat

#: Members a piece of memory must hold on average, to be counted at once. Else every scalar is counted for itself.
MANY = 8


class Span(NamedTuple):
    """Scalars of some members that are neighbours in memory, with gaps that are other parameters' scalars.

    Attributes:
        first: The member that comes first in memory.
        length: Scalars from there to the last one.
        members: Their indices; a slice where they follow each other.
        offsets: Where they are in the span; a slice where there are no gaps.
        increments: 1 for members and 0 in the gaps; None without gaps.
    """

    first: int
    length: int
    members: list[int] | slice
    offsets: list[int] | slice
    increments: Tensor | None

    def of(self, role: Sequence[Tensor]) -> Tensor:
        """The span as one tensor."""
        return role[self.first].as_strided((self.length,), (1,))

    def members_of(self, role: Sequence[Tensor]) -> Tensor:
        """The members' scalars."""
        span = self.of(role)
        return span if isinstance(self.offsets, slice) else span[self.offsets]


class Scalars:
    """How the scalar states of a bucket's members lie in memory.

    Args:
        roles: For each name the members' scalars, step counts first.
        known: Addresses of all scalar states of the optimizer: in gaps between members nothing else may lie.
    """

    def __init__(self, roles: Sequence[Sequence[Tensor]], known: Container[int]) -> None:
        self._spans = _spans(roles, known)
        self._found: Tensor | None = None
        self._left: Tensor | None = None

    def read(self, roles: Sequence[Sequence[Tensor]]) -> tuple[Tensor, bool]:
        """The values, ``[n_names, n_members]``, and whether they are what :meth:`count` left."""
        self._found = found = self._read(roles)
        return found, self._left is not None and torch.equal(found, self._left)

    def _read(self, roles: Sequence[Sequence[Tensor]]) -> Tensor:
        if not self._spans:
            # some write theirs as a vector of one element
            return torch.stack([torch.cat([scalar.reshape(1) for scalar in role]) for role in roles])
        if len(self._spans) == 1:
            return torch.stack([self._spans[0].members_of(role) for role in roles])
        values = torch.empty(len(roles), len(roles[0]), dtype=roles[0][0].dtype, device="cpu")
        for span in self._spans:
            for row, role in zip(values, roles, strict=True):
                row[span.members] = span.members_of(role)
        return values

    def count(self, roles: Sequence[Sequence[Tensor]], others: Tensor | None) -> None:
        """Count a step, and set the scalars that are not step counts to ``others``, ``[n_names - 1, n_members]``."""
        steps, *rest = roles
        if others is not None:
            others = others.to(steps[0].dtype)
        if self._found is not None:
            counted = self._found[:1] + 1
            self._left = counted if others is None else torch.cat([counted, others])
        if len(steps) == 1 and not rest:
            steps[0].add_(1)
            return
        for span in self._spans:
            span.of(steps).add_(1 if span.increments is None else span.increments)
            for row, role in zip(() if others is None else others, rest, strict=True):
                span.of(role)[span.offsets] = row[span.members]
        if not self._spans:
            _compat.foreach_add_(steps, 1)
            for row, role in zip(() if others is None else others, rest, strict=True):
                _compat.foreach_copy_(role, row.unbind())

    def common_step(self, steps: Sequence[Tensor]) -> float | None:
        """The step count of all members; None if they differ."""
        if len(steps) == 1:
            return steps[0].item()
        all_steps = self._spans[0].members_of(steps) if len(self._spans) == 1 else self._read([steps])[0]
        fewest, most = all_steps.aminmax()
        step = most.item()
        return step if fewest.item() == step else None


def _spans(roles: Sequence[Sequence[Tensor]], known: Container[int]) -> list[Span]:
    """Few spans that hold all members, or none."""
    steps, *others = ([scalar.data_ptr() for scalar in role] for role in roles)
    width = roles[0][0].element_size()
    by_storage: dict[tuple[int, ...], list[int]] = {}
    for i, members_scalars in enumerate(zip(*roles, strict=True)):
        by_storage.setdefault(tuple(s.untyped_storage().data_ptr() for s in members_scalars), []).append(i)
    if len(by_storage) > max(1, len(steps) // MANY):
        return []
    spans = []
    for members in by_storage.values():
        first = min(members, key=steps.__getitem__)
        offsets = [(steps[i] - steps[first]) // width for i in members]
        length = max(offsets) + 1
        for addresses in (steps, *others):
            # all names in the same order, and nobody else's numbers between them
            if any(
                addresses[i] != addresses[first] + width * offset for i, offset in zip(members, offsets, strict=True)
            ):
                return []
            if length > len(members) and any(addresses[first] + width * i not in known for i in range(length)):
                return []
        dense = offsets == [*range(length)]
        increments = None
        if length > len(members):
            increments = torch.zeros(length, dtype=roles[0][0].dtype, device="cpu")
            increments[offsets] = 1
        in_order = members == [*range(members[0], members[-1] + 1)]
        spans.append(
            Span(
                first,
                length,
                slice(members[0], members[-1] + 1) if in_order else members,
                slice(None) if dense else offsets,
                increments,
            )
        )
    return spans
