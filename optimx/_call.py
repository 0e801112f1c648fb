"""Members of a bucket on a CPU that are updated by one call of torch's operator, or of a formula."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._batch import Batch, split_by_size

if TYPE_CHECKING:
    from ._native import NativeBucket

#: Settings that are one member's or two's, if there are as many of them, and members up to this many elements: a call
#: for each takes longer than a formula for all (measured from 4 to 1024 elements).
FEW, MANY, TINY = 2, 8, 1 << 8


class Call:
    """Members with equal settings.

    Attributes:
        parts: Calls that can take this one's place.
        setting: For an operator the hyperparameters, for a formula the row.
    """

    def __init__(self, bucket: NativeBucket, members: list[int] | None, index: int) -> None:
        self.members = members
        self.index = index
        self.parts: Sequence[Call] = [self]
        self.setting: tuple[Any, ...] = ()
        self.params, *self.states = map(self.pick, (bucket.params, *bucket.states))
        self.roles = (self.params, *self.states)
        small, self.large = split_by_size(self.params)
        self.batches = [Batch(indices, self.roles) for indices in small]
        self.steps: Sequence[Tensor] = []
        self.first_step: Sequence[Tensor] = []
        if bucket.counts is not None:
            self.steps = self.pick([bucket.counts.views[i] for i in bucket.count_indices])
            # where all counts are equal, one of them does: a thousand fewer tensors to fetch from memory
            self.first_step = [self.steps[0]] * len(self.steps)

    def read(self, settings: Sequence[tuple[Any, ...]]) -> None:
        """Take the setting of this step."""
        self.setting = settings[self.index]

    def settle(self, bucket: NativeBucket) -> Iterator[tuple[Sequence[Tensor], Tensor]]:
        """Let states of small tensors move together for a formula; yields those that did, and their home."""
        if bucket.has_formula:
            yield from self._settle(bucket)

    def _settle(self, bucket: NativeBucket) -> Iterator[tuple[Sequence[Tensor], Tensor]]:
        for batch in self.batches:
            batch.homes[1:] = homes = [*map(bucket.home_of, batch.roles[1:])]
            yield from ((role, home) for role, home in zip(batch.roles[1:], homes, strict=True) if home is not None)

    def pick(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors if self.members is None else [tensors[i] for i in self.members]


class MixedCall(Call):
    """Small members whose settings are different, a call each; or one formula for all, with settings by element."""

    def __init__(self, bucket: NativeBucket, parts: Sequence[Call]) -> None:
        super().__init__(bucket, [i for part in parts for i in part.members or ()], parts[0].index)
        self.parts = parts
        self._indices = [part.index for part in parts for _ in part.params]
        self._by_element = bucket.rule.by_element
        self._elements = [torch.tensor(batch.sizes, device="cpu") for batch in self.batches]
        self._dtype = bucket.compute_dtype
        #: For each batch the setting, in which tensors stand for what differs; empty if too much does.
        self.settings: list[tuple[Any, ...]] = []

    def read(self, settings: Sequence[tuple[Any, ...]]) -> None:
        for part in self.parts:
            part.read(settings)
        columns = [*zip(*(settings[i] for i in self._indices), strict=True)]
        self.settings = []
        if all(i in self._by_element or column.count(column[0]) == len(column) for i, column in enumerate(columns)):
            for batch, elements in zip(self.batches, self._elements, strict=True):
                setting = [column[0] for column in columns]
                for i in self._by_element:
                    values = torch.tensor([columns[i][j] for j in batch.indices], dtype=self._dtype, device="cpu")
                    setting[i] = values.repeat_interleave(elements)
                self.settings.append(tuple(setting))

    def settle(self, bucket: NativeBucket) -> Iterator[tuple[Sequence[Tensor], Tensor]]:
        return self._settle(bucket)


def mix(bucket: NativeBucket, calls: Sequence[Call], settings: Sequence[tuple[Any, ...]]) -> Sequence[Call]:
    """The same calls, those mixed that a formula could make in one."""
    by_element = bucket.rule.by_element
    alike: dict[tuple[Any, ...], list[Call]] = {}
    others: list[Call] = []
    for call in calls:
        if len(call.params) <= FEW and not call.large and all(param.numel() <= TINY for param in call.params):
            setting = settings[call.index]
            common = tuple(value for i, value in enumerate(setting) if i not in by_element)
            alike.setdefault(common, []).append(call)
        else:
            others.append(call)
    mixed: list[Call] = []
    for parts in alike.values():
        if len(parts) < MANY:
            others += parts
        else:
            mixed.append(MixedCall(bucket, parts))
    return mixed + others
