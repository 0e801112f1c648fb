"""Scalar states on a CPU (step counts, mostly), read and counted where they lie.

Those that were created together lie in one tensor (see :mod:`optimx._engine.states`), where one addition counts the
step of all of them. Those that somebody else put there, who may be another process, are counted one by one.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _compat

#: Members a piece of memory must hold on average, to be counted at once. Else every scalar is counted for itself.
MANY = 8


class Span(NamedTuple):
    """Scalars of some members that are neighbours in memory, with gaps that are other parameters' scalars.

    Attributes:
        first: The member that comes first in memory.
        length: Scalars from there to the last one.
        members: Their indices, int64; a slice where they follow each other.
        offsets: Where they are in the span, int64; a slice where there are no gaps.
        increments: 1 for members and 0 in the gaps; None without gaps.
    """

    first: int
    length: int
    members: Tensor | slice
    offsets: Tensor | slice
    increments: Tensor | None

    def of(self, role: Sequence[Tensor]) -> Tensor:
        """The span as one tensor."""
        return role[self.first].as_strided((self.length,), (1,))

    def members_of(self, role: Sequence[Tensor]) -> Tensor:
        """The members' scalars."""
        span = self.of(role)
        return span if isinstance(self.offsets, slice) else span[self.offsets]

    def spread(self, values: Tensor) -> Tensor:
        """Values of all members of the bucket, where they are in the span, and 0 in the gaps."""
        spread = torch.zeros(self.length, dtype=values.dtype, device="cpu")
        spread[self.offsets] = values[self.members]
        return spread


class Scalars:
    """How the scalar states of a bucket's members lie in memory.

    Args:
        roles: For each name the members' scalars, step counts first.
        known: Addresses of all scalar states of the optimizer: in gaps between members nothing else may lie.
    """

    def __init__(self, roles: Sequence[Sequence[Tensor]], known: Container[int]) -> None:
        self._spans = _spans(roles, known)
        #: In one piece without gaps, where values are compared and counted as they lie.
        self._whole = self._spans[0] if len(self._spans) == 1 and isinstance(self._spans[0].offsets, slice) else None
        self._found: list[Tensor] = []
        self._left: list[Tensor] = []

    def read(self, roles: Sequence[Sequence[Tensor]]) -> bool:
        """Look at the values; whether those that were equal when :meth:`count` left them still are."""
        if len(roles[0]) == 1:
            self._found = [role[0] for role in roles]
            return True
        self._found = [self._values(role) for role in roles]
        return len(self._left) == len(roles) and all(map(torch.equal, self._found, self._left))

    def forget(self) -> None:
        """Keep no memory of what :meth:`read` found."""
        self._found = []

    def of_members(self, indices: Sequence[int]) -> list[tuple[float, ...]]:
        """The values of some members that :meth:`read` found."""
        if indices == [0]:
            return [tuple(found.item() if found.numel() == 1 else found[0].item() for found in self._found)]
        if len(indices) <= MANY:
            return [tuple(found[i].item() for found in self._found) for i in indices]
        return [*zip(*(found[indices].tolist() for found in self._found), strict=True)]

    def kinds(self, groups: Tensor) -> tuple[Tensor, list[int]]:
        """Members of one group whose values are the same are of one kind.

        Args:
            groups: int64, of each member.

        Returns:
            The kind of each member, int64, and a member of each kind. They are in the order of groups, then of values.
        """
        kinds = groups - groups[0]
        for found in self._found:
            # NaN, which equals nothing, is a kind for each
            values, which = found.unique(return_inverse=True)
            kinds = kinds * len(values) + which
        if len(self._found) > 1 or bool(groups[0] != groups[-1]):
            # numbers without gaps
            _, kinds = kinds.unique(return_inverse=True)
        some = torch.empty(int(kinds.max()) + 1, dtype=torch.int64, device="cpu")
        return kinds, some.scatter_(0, kinds, torch.arange(len(kinds), device="cpu")).tolist()

    def _values(self, role: Sequence[Tensor]) -> Tensor:
        """In the order of members; a view where they lie like that."""
        if self._whole is not None and isinstance(self._whole.members, slice):
            return self._whole.of(role)
        if not self._spans:
            # some write theirs as a vector of one element
            return role[0].reshape(1) if len(role) == 1 else torch.cat([scalar.reshape(1) for scalar in role])
        values = torch.empty(len(role), dtype=role[0].dtype, device="cpu")
        for span in self._spans:
            values[span.members] = span.members_of(role)
        return values

    def count(self, roles: Sequence[Sequence[Tensor]], others: Tensor | None, present: Tensor | None = None) -> None:
        """Count a step, and set the scalars that are not step counts to ``others``, ``[n_names - 1, n_members]``.

        Args:
            present: bool, of each member, whether it takes the step; None: all do.
        """
        steps, *rest = roles
        if others is not None:
            others = others.to(steps[0].dtype)
            if present is not None:
                others = torch.where(present, others, torch.stack([self._values(role) for role in rest]))
        increments = None if present is None else present.to(steps[0].dtype)
        rows = () if others is None else others
        if len(steps) == 1:
            steps[0].add_(1 if increments is None else increments.item())
            for row, role in zip(rows, rest, strict=True):
                role[0].copy_(row.view(role[0].shape))
            return
        for span in self._spans:
            added = span.increments if increments is None else span.spread(increments)
            span.of(steps).add_(1 if added is None else added)
            for row, role in zip(rows, rest, strict=True):
                span.of(role)[span.offsets] = row[span.members]
        if not self._spans:
            _compat.foreach_add_(steps, 1 if increments is None else increments.unbind())
            for row, role in zip(rows, rest, strict=True):
                _compat.foreach_copy_(role, row.unbind())
        # where some took no step, whose values are equal is to be looked at anew
        self._left = [self._values(role).clone() for role in roles] if present is None else []

    def common_step(self, steps: Sequence[Tensor]) -> float | None:
        """The step count of all members; None if they differ."""
        if len(steps) == 1:
            return steps[0].item()
        all_steps = self._values(steps)
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
                slice(members[0], members[-1] + 1) if in_order else torch.tensor(members, device="cpu"),
                slice(None) if dense else torch.tensor(offsets, device="cpu"),
                increments,
            )
        )
    return spans
