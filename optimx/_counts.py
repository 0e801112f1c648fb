"""Scalar states: step counts, mostly. Those of many parameters lie in one tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor


class CountBuffer:
    """Scalar states of many parameters in one tensor, ``[n_names, n_params]``, so that one addition counts a step.

    The tensors ``state[p]["step"]`` become views of it; they stay the objects they were, because others may hold them.

    Args:
        counts: For each name the parameters' tensors, the step counts first.
    """

    def __init__(self, counts: Sequence[Sequence[Tensor]]) -> None:
        self.values = torch.stack([count.detach().reshape(()) for role in counts for count in role])
        for i, count in enumerate(chain.from_iterable(counts)):
            count.set_(self.values.untyped_storage(), i, (), ())
        self.views = counts[0]
        self.values = self.values.view(len(counts), -1)
        self.steps = self.values[0]
        self._expected: Tensor | None = None
        # weak: a buffer outlives the plans that count with it, and must not keep their tensors alive
        self._last_user: Callable[[], object] = lambda: None

    def owns(self, step: Tensor) -> bool:
        """Whether this is the step count that became a view."""
        offset = int(step.storage_offset())
        return offset < len(self.steps) and self.views[offset] is step

    def has(self, state: dict[str, Any], names: Sequence[str]) -> bool:
        """Whether all scalar states of a parameter are views at its index."""
        first = state[names[0]]
        return all(
            state[name].untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and state[name].storage_offset() == first.storage_offset() + i * len(self.steps)
            for i, name in enumerate(names)
        )

    def count(self, increments: Tensor | None) -> None:
        """Add 1 to all step counts, or ``increments`` where only some parameters step."""
        self.steps.add_(1 if increments is None else increments)
        if self._expected is not None:
            self._expected[0].add_(1 if increments is None else increments)

    def set_others(self, indices: Sequence[int], values: Tensor) -> None:
        """Give the scalar states after the step count, of these parameters, new values ``[n_names - 1, n]``."""
        for tensor in (self.values, self._expected):
            if tensor is not None:
                tensor[1:, indices] = values.to(tensor.dtype)

    def unchanged_since(self, user: object) -> bool:
        """Whether ``user`` was the last to count here and nobody wrote a count since; remembers ``user``."""
        expected = self._expected
        if self._last_user() is user and expected is not None and torch.equal(self.values, expected):
            return True
        self._last_user, self._expected = weakref.ref(user), self.values.clone()
        return False


class Counts:
    """The count buffers of an optimizer."""

    _KEPT = 8

    def __init__(self) -> None:
        self._buffers: dict[int, CountBuffer] = {}

    def home(
        self, names: Sequence[str], states: Sequence[dict[str, Any]], device: torch.device, others: Iterable[Any] = ()
    ) -> tuple[CountBuffer, list[int]]:
        """Bring the scalar states ``names`` into one buffer on ``device``; returns it and each parameter's index.

        Where a new buffer has to be made, it takes the counts of ``others`` too, all that are alike: patterns of
        gradients that overlap would otherwise take counts out of each other's buffers forever.
        """
        for state in states:
            for name in names:
                if state[name].device != device:
                    # towards the host a copy that nobody waits for would be read too early
                    state[name] = state[name].to(device, non_blocking=device.type != "cpu")
        steps = [state[names[0]] for state in states]
        buffers = {id(buffer): buffer for buffer in map(self._find, steps)}
        buffer = next(iter(buffers.values())) if len(buffers) == 1 else None
        if buffer is None or not all(buffer.has(state, names) for state in states):
            like = (device, steps[0].dtype)
            alike = [state for state in others if isinstance(state, dict) and _has_counts(state, names, like)]
            members = {id(state[names[0]]): state for state in (*states, *alike)}.values()
            buffer = CountBuffer([[state[name] for state in members] for name in names])
            self._buffers[buffer.values.untyped_storage().data_ptr()] = buffer
            while len(self._buffers) > self._KEPT:
                del self._buffers[next(iter(self._buffers))]
        return buffer, [int(step.storage_offset()) for step in steps]

    def _find(self, step: Tensor) -> CountBuffer | None:
        buffer = self._buffers.get(step.untyped_storage().data_ptr())
        # a copy or a view that somebody made of a view is not ours to count with
        return buffer if buffer is not None and buffer.owns(step) else None


def _has_counts(state: dict[str, Any], names: Sequence[str], like: tuple[torch.device, torch.dtype]) -> bool:
    tensors = [state.get(name) for name in names]
    return all(isinstance(t, Tensor) and t.dim() == 0 and (t.device, t.dtype) == like for t in tensors)
