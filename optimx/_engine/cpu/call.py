"""Members of a bucket on a CPU that are updated by one call of torch's operator, or of a formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..bucket import Bucket, Members, picker
from .batch import Batch, batches_of, cut
from .piece import PIECE

#: Rows that are one member's or two's, if there are as many of them, and members up to this many elements: a call
#: for each takes longer than a formula for all (measured from 4 to 1024 elements).
FEW, MANY, TINY = 2, 8, 1 << 8


class Call:
    """Members with equal rows.

    Args:
        bucket: Theirs, bound.
        members: Their indices; None stands for all.
        index: Where their row is among all rows.
        by_formula: A formula takes one tensor a role, so that it makes a difference where states lie (see
            :func:`optimx._engine.cpu.batch.batches_of`), and large tensors come one by one.
        room: Elements of a piece.

    Attributes:
        batches: Of small members.
        large: The others.
        bundles: Batches of those of them that a piece has room for.
        alone: Those that are in none.
        parts: Calls that can take this one's place.
        row: For an operator the hyperparameters, for a formula the row.
    """

    def __init__(
        self, bucket: Bucket, members: list[int] | None, index: int, by_formula: bool, room: int = PIECE
    ) -> None:
        self.index = index
        self.parts: Sequence[Call] = [self]
        self.row: tuple[Any, ...] = ()
        self.indices = members
        self._pick = None if members is None else picker(members)
        its_members = self.of(bucket.members)
        self.batches, self.large = batches_of(its_members, by_formula)
        params = its_members.params
        fitting = [i for i in self.large if not by_formula and params[i].is_contiguous()]
        bundles = [indices for indices in cut(fitting, params, room) if len(indices) > 1]
        self.bundles = [Batch(indices, its_members) for indices in bundles]
        self.alone = sorted({*self.large}.difference(*bundles))

    def of(self, members: Members) -> Members:
        """The call's tensors of those of its bucket."""
        return members if self._pick is None else members.pick(self._pick)

    def of_bucket(self, indices: Sequence[int]) -> Sequence[int]:
        """Indices in the bucket of some of the call's members."""
        return indices if self.indices is None else [self.indices[i] for i in indices]

    def read(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Take the row of this step."""
        self.row = rows[self.index]


class MixedCall(Call):
    """Small members whose rows are different, a call each; or one formula for all, with rows by element."""

    def __init__(self, bucket: Bucket, parts: Sequence[Call], dtype: torch.dtype) -> None:
        indices = [i for part in parts for i in part.indices or ()]
        super().__init__(bucket, indices, parts[0].index, by_formula=True)
        self.parts = parts
        self._indices = [part.index for part in parts for _ in part.indices or ()]
        self._by_element = bucket.rule.by_element
        self._elements = [torch.tensor(batch.sizes, device="cpu") for batch in self.batches]
        self._dtype = dtype
        #: For each batch the values, in which tensors stand for what differs; empty if too much does.
        self.values: list[tuple[Any, ...]] = []

    def read(self, rows: Sequence[tuple[Any, ...]]) -> None:
        for part in self.parts:
            part.read(rows)
        columns = [*zip(*(rows[i] for i in self._indices), strict=True)]
        self.values = []
        if all(i in self._by_element or column.count(column[0]) == len(column) for i, column in enumerate(columns)):
            for batch, elements in zip(self.batches, self._elements, strict=True):
                row = [column[0] for column in columns]
                for i in self._by_element:
                    values = torch.tensor([columns[i][j] for j in batch.indices], dtype=self._dtype, device="cpu")
                    row[i] = values.repeat_interleave(elements)
                self.values.append(tuple(row))


def mix(bucket: Bucket, calls: Sequence[Call], rows: Sequence[tuple[Any, ...]], dtype: torch.dtype) -> Sequence[Call]:
    """The same calls, those mixed that a formula could make in one, computing in ``dtype``."""
    by_element = bucket.rule.by_element
    alike: dict[tuple[Any, ...], list[Call]] = {}
    others: list[Call] = []
    params = bucket.members.params
    for call in calls:
        indices = range(len(params)) if call.indices is None else call.indices
        if len(indices) <= FEW and not call.large and all(params[i].numel() <= TINY for i in indices):
            row = rows[call.index]
            common = tuple(value for i, value in enumerate(row) if i not in by_element)
            alike.setdefault(common, []).append(call)
        else:
            others.append(call)
    mixed: list[Call] = []
    for parts in alike.values():
        if len(parts) < MANY:
            others += parts
        else:
            mixed.append(MixedCall(bucket, parts, dtype))
    return mixed + others
