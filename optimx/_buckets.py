"""What a bucket of either backend holds: the tensors one launch (or one native call) updates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ._counts import CountBuffer, Counts
    from ._plan import BucketKey
    from ._rule import Row, UpdateRule


class Bucket:
    """Parallel lists, one entry a parameter.

    Attributes:
        positions: Index in the step's list of all parameters.
        groups: Index of the parameter's group.
        states: For each state name of the rule, the tensors.
        counts, count_indices: Where the scalar states are; None where the rule has none.
        increments: None if all of ``counts`` are members', else 1 for members and 0 for others.
    """

    counts: CountBuffer | None
    count_indices: list[int]
    increments: Tensor | None

    def __init__(self, key: BucketKey, rule: UpdateRule) -> None:
        self.key = key
        self.rule = rule
        self.params: list[Tensor] = []
        self.positions: list[int] = []
        self.groups: list[int] = []
        self._state_names = rule.state_names(key.structure)
        self.states: list[list[Tensor]] = [[] for _ in self._state_names]
        self._state_dicts: list[dict[str, Any]] = []

    def add(self, param: Tensor, position: int, group: int, state: dict[str, Any]) -> None:
        """Make a parameter a member."""
        self.params.append(param)
        self.positions.append(position)
        self.groups.append(group)
        self._state_dicts.append(state)
        for tensors, name in zip(self.states, self._state_names, strict=True):
            tensors.append(state[name])

    def home(self, counts: Counts, all_states: Iterable[Any]) -> None:
        """Bring the scalar states together. This may move those of another bucket; they are to be asked once more."""
        self.counts, self.count_indices = None, []
        if self.rule.counts:
            device = self.key.device if self.key.on_device else torch.device("cpu")
            self.counts, self.count_indices = counts.home(self.rule.counts, self._state_dicts, device, all_states)

    def finish(self) -> None:
        """All members are there, and scalar states at home."""
        self.increments = None
        # looking at every state would take a sixth of a step on many small tensors; who swaps the memory beneath states
        # does it to all of them, so a few tell. Where addresses are kept, all of those are compared
        shapes = [(param.dim(), param.numel()) for param in self.params]
        self._watched = sorted({0, len(shapes) - 1, shapes.index(max(shapes))})
        if self.counts is not None and len(self.count_indices) != len(self.counts.views):
            self.increments = torch.zeros_like(self.counts.steps)
            self.increments[self.count_indices] = 1
        self._count_tensors = [self._state_dicts[i][name] for i in self._watched for name in self.rule.counts]
        self._count_addresses = [*map(Tensor.data_ptr, self._count_tensors)]
        #: Group and count index of each distinct row
        self._keys: list[tuple[int, int]] = []
        self._new_counts: list[tuple[float, ...]] = []

    def inherit(self, former: Iterable[Bucket]) -> None:
        """Take over what belonged to buckets that nobody will use any more."""

    def drop_states(self) -> None:
        """Forget the members' states, as before their first step."""
        for state in self._state_dicts:
            for name in self._state_names:
                del state[name]

    def values_of(self, values: Sequence[tuple[Any, ...]]) -> Sequence[tuple[Any, ...]]:
        """Each group's hyperparameters, for the members and the step at hand."""
        values = [*map(self.rule.values_for, values, repeat(self.key.dtypes[0]))]
        return [*map(self.rule.first_values, values)] if self.key.first else values

    def host_rows(self, values: Sequence[tuple[Any, ...]]) -> tuple[list[Row], list[int] | None]:
        """The distinct hyperparameter rows of the coming step.

        Returns:
            The rows, and each member's row; None if those are the ones of the last call.
        """
        values = self.values_of(values)
        counts = None if self.counts is None else self.counts.values.t().tolist()
        row_of_member = None
        unchanged = self.counts is None or self.counts.unchanged_since(self)
        if not (unchanged and self._keys):
            distinct: dict[tuple[Any, ...], int] = {}
            self._keys, row_of_member = [], []
            for i, group in enumerate(self.groups):
                index = self.count_indices[i] if counts else 0
                row = distinct.setdefault((group, *counts[index]) if counts else (group,), len(distinct))
                if row == len(self._keys):
                    self._keys.append((group, index))
                row_of_member.append(row)
            self._row_of_member = row_of_member
        steps = [self.rule.prepare(values[g], tuple(counts[i]) if counts else ()) for g, i in self._keys]
        self._new_counts = [new for _, new in steps]
        return [row for row, _ in steps], row_of_member

    def count(self) -> None:
        """The step happens: bring scalar states on the host up to date (if they are many, after :meth:`host_rows`)."""
        if self.counts is None:
            return
        self.counts.count(self.increments)
        if len(self.rule.counts) > 1:
            others = torch.tensor([new[1:] for new in self._new_counts], dtype=torch.float64, device="cpu")
            self.counts.set_others(self.count_indices, others[self._row_of_member].t())

    def send(self, grads: Sequence[Tensor], values: Sequence[tuple[Any, ...]]) -> None:
        """Get ready for the launches of this step; may fail, and changes no parameter, state or count."""

    def compile(self, control: Tensor | None) -> None:
        """Compile what :meth:`update` needs; may fail, and changes nothing."""

    def watched_states(self) -> list[Tensor]:
        """State tensors whose shapes, strides and dtypes are compared every step."""
        return [tensors[i] for tensors in self.states for i in self._watched]

    def matches(self) -> bool:
        """Whether what the bucket itself stands on is unchanged (see :meth:`StepPlan.fits`)."""
        return [*map(Tensor.data_ptr, self._count_tensors)] == self._count_addresses

    def update(self, grads: Sequence[Tensor], control: Tensor | None) -> None:
        """Update all members in place, with the hyperparameters :meth:`send` was given.

        Args:
            grads: The members' gradients.
            control: float64 ``[3]``, norm, gradient factor and skip mark, on any device; None: plain gradients.
        """
        raise NotImplementedError
