"""What a bucket of either backend holds: the tensors one launch (or one native call) updates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ._plan import BucketKey, StepBuffer, StepCounts
    from ._step import UpdateRule


class Bucket:
    """Parallel lists, one entry a parameter.

    Attributes:
        positions: Index in the step's list of all parameters.
        groups: Index of the parameter's group.
        states: For each state name of the rule, the tensors.
        steps, step_indices: Where the step counts are.
        increments: None if all counts of ``steps`` are members' counts, else 1 for members and 0 for others.
    """

    steps: StepBuffer
    step_indices: list[int]
    increments: Tensor | None

    def __init__(self, key: BucketKey, rule: UpdateRule) -> None:
        self.key = key
        self.rule = rule
        self.params: list[Tensor] = []
        self.positions: list[int] = []
        self.groups: list[int] = []
        self.states: list[list[Tensor]] = [[] for _ in rule.state_names(key.structure)]
        self._state_dicts: list[dict[str, Any]] = []

    def add(self, param: Tensor, position: int, group: int, state: dict[str, Any]) -> None:
        """Make a parameter a member."""
        self.params.append(param)
        self.positions.append(position)
        self.groups.append(group)
        self._state_dicts.append(state)
        for tensors, name in zip(self.states, self.rule.state_names(self.key.structure), strict=True):
            tensors.append(state[name])

    def finish(self, counts: StepCounts, all_states: Iterable[Any]) -> None:
        """All members are there; ``all_states`` are the optimizer's."""
        device = self.key.device if self.key.device_steps else torch.device("cpu")
        self.steps, self.step_indices = counts.home(self._state_dicts, device, all_states)
        self.increments = None
        if len(self.step_indices) != len(self.steps.views):
            self.increments = torch.zeros_like(self.steps.values)
            self.increments[self.step_indices] = 1
        # looking at every state would take a sixth of a step on many small tensors; who swaps the memory beneath states
        # does it to all of them, so a few tell. Where addresses are kept, all of those are compared
        shapes = [(param.dim(), param.numel()) for param in self.params]
        self._watched = sorted({0, len(shapes) - 1, shapes.index(max(shapes))})
        self._step_tensors = [self._state_dicts[i]["step"] for i in self._watched]
        self._step_addresses = [*map(Tensor.data_ptr, self._step_tensors)]

    def send(self, grads: Sequence[Tensor], values: Sequence[tuple[Any, ...]]) -> None:
        """Get ready for the launches of this step; may fail, and changes no parameter, state or count."""

    def compile(self, control: Tensor | None) -> None:
        """Compile what :meth:`update` needs; may fail, and changes nothing."""

    def watched_states(self) -> list[Tensor]:
        """State tensors whose shapes, strides and dtypes are compared every step."""
        return [tensors[i] for tensors in self.states for i in self._watched]

    def matches(self) -> bool:
        """Whether what the bucket itself stands on is unchanged (see :meth:`StepPlan.fits`)."""
        return [*map(Tensor.data_ptr, self._step_tensors)] == self._step_addresses

    def update(self, grads: Sequence[Tensor], values: Sequence[tuple[Any, ...]], control: Tensor | None) -> None:
        """Update all members in place.

        Args:
            grads: The members' gradients.
            values: Hyperparameters of each group, from :meth:`UpdateRule.values`.
            control: float64 ``[3]``, norm, gradient factor and skip mark, on any device; None: plain gradients.
        """
        raise NotImplementedError
