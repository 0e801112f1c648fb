"""Who had infinite or NaN gradients, and steps that were skipped in a row: known late, and nobody waits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _compat
from .grad_norm import NORM, Measurement
from .guards import COUNTERS, IN_A_ROW, RECENT, STEPS


@dataclass(frozen=True)
class BadStep:
    """A step with infinite or NaN gradients.

    Attributes:
        step: Which, 1 for the first; steps are counted as :attr:`counters` does.
        names: Parameters with such gradients in this process, in the order of the optimizer. Empty where only other
            ranks have some, or the sum of squares has overflowed.
        n_params: Parameters that have gradients.
        norms: Gradient norms of the steps before, the last one last.
    """

    step: int
    names: tuple[str, ...]
    n_params: int
    norms: tuple[float, ...]

    @property
    def first(self) -> str | None:
        """The parameter in which it began, as far as gradients tell; None where they do not.

        Backward goes from the last layer to the first, and what is NaN stays NaN: the last bad parameter is the first
        one that was. If all are bad, the loss or the forward pass was.
        """
        return self.names[-1] if 0 < len(self.names) < self.n_params else None

    def __str__(self) -> str:
        if not self.names:
            where = "in no single gradient of this process"
        elif self.first is None:
            where = f"in all {self.n_params} gradients: the loss or the forward pass was infinite or NaN"
        else:
            where = f"first in the gradient of {self.first!r}, in {len(self.names)} of {self.n_params}"
        before = ", ".join(f"{norm:.4g}" for norm in self.norms) or "none"
        return f"step {self.step}: infinite or NaN {where}; gradient norms of the steps before: {before}"


class _Record:
    """The last bad step of a plan, kept where its gradients are.

    Args:
        optimizer: Whose.
        n_params: Parameters that have gradients.
        measured: What was measured of them.
    """

    def __init__(self, optimizer: Any, n_params: int, measured: Measurement) -> None:
        self.n_params = n_params
        self.buckets = [bucket for bucket, _ in measured.partials]
        self._marks = [torch.zeros_like(partials[1]) for _, partials in measured.partials]
        self._counters = torch.zeros_like(_counters_of(optimizer))

    def note(self, optimizer: Any, measured: Measurement) -> None:
        """Keep what was found, if it is bad."""
        is_bad = ~measured.control[NORM].isfinite()
        found = [_counters_of(optimizer), *(partials[1] for _, partials in measured.partials)]
        for kept, new in zip((self._counters, *self._marks), found, strict=True):
            kept.copy_(torch.where(is_bad.to(kept.device, non_blocking=True), new, kept))

    def read(self, names: Sequence[str]) -> BadStep | None:
        """What is kept; this waits."""
        positions = set()
        for bucket, marks in zip(self.buckets, self._marks, strict=True):
            members = bucket.member_of_partial[marks != 0].unique().tolist()
            positions |= {bucket.positions[i] for i in members}
        return _bad_step(self._counters.tolist(), sorted(positions), self.n_params, names)


class BadGradients:
    """What the rules of an optimizer have found of its gradients, and have not told yet."""

    def __init__(self) -> None:
        # of the last plan, and of the one before
        self._records: list[_Record] = []
        self._known: BadStep | None = None
        self._arriving: tuple[Tensor, Any] | None = None

    def note(self, optimizer: Any, grads: Sequence[Any], measured: Measurement) -> None:
        """Take note of a step about which the rules have decided.

        Args:
            optimizer: Whose step.
            grads: Of all parameters, in this process; None where there is none.
            measured: What was measured of them.
        """
        n_params = sum(grad is not None for grad in grads)
        if measured.partials:
            buckets = [bucket for bucket, _ in measured.partials]
            if not self._records or self._records[-1].buckets != buckets:
                self._records = [*self._records[-1:], _Record(optimizer, n_params, measured)]
            self._records[-1].note(optimizer, measured)
        elif measured.control.device.type == "cpu" and not math.isfinite(measured.control[NORM]):
            positions = [i for i, grad in zip(count(), grads) if grad is not None and not _is_finite(grad)]
            self._known = _bad_step(_counters_of(optimizer).tolist(), positions, n_params, names_of(optimizer))

    def last(self, names: Sequence[str]) -> BadStep | None:
        """The last bad step; this waits for the device."""
        found = [self._known, *(record.read(names) for record in self._records)]
        return max((one for one in found if one is not None), key=lambda one: one.step, default=None)

    def skips_in_a_row(self, optimizer: Any) -> int:
        """How many steps were skipped in a row, as far as it is known here: of a device a step or some late."""
        if optimizer.guard_state is None or _compat.is_capturing():
            return 0
        counters = _counters_of(optimizer)
        if counters.device.type == "cpu":
            return int(counters[IN_A_ROW])
        n_skips = 0
        if self._arriving is not None and self._arriving[1].query():
            n_skips = int(self._arriving[0])
            self._arriving = None
        if self._arriving is None:
            arrival = torch.empty((), dtype=counters.dtype, device="cpu", pin_memory=True)
            arrival.copy_(counters[IN_A_ROW], non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(counters.device))
            self._arriving = arrival, event
        return n_skips


def check_skips(optimizer: Any, bad: BadGradients) -> None:
    """Raise RuntimeError where as many steps were skipped in a row as the optimizer allows; then counting begins anew.

    Args:
        optimizer: Whose step is about to be taken.
        bad: What its rules have found.
    """
    n_skips = bad.skips_in_a_row(optimizer)
    if optimizer.max_skips is None or n_skips < optimizer.max_skips:
        return
    _counters_of(optimizer)[IN_A_ROW].fill_(0.0)
    last = bad.last(names_of(optimizer))
    raise RuntimeError(
        f"steps skipped in a row should be fewer than max_skips={optimizer.max_skips} but are: {n_skips}"
        + (f"; {last}" if last is not None else "")
    )


def names_of(optimizer: Optimizer) -> list[str]:
    """Names of all parameters: those that groups have, or places."""
    names: list[str] = []
    for g, group in enumerate(optimizer.param_groups):
        names += group.get("param_names") or [f"parameter {i} of group {g}" for i in range(len(group["params"]))]
    return names


def _counters_of(optimizer: Any) -> Tensor:
    assert optimizer.guard_state is not None
    return optimizer.guard_state["counters"]


def _bad_step(
    counters: Sequence[float], positions: Sequence[int], n_params: int, names: Sequence[str]
) -> BadStep | None:
    """What counters say, and positions of bad gradients."""
    step = int(counters[STEPS])
    if not step:
        return None
    before = range(max(0, step - RECENT), step - 1)
    norms = tuple(counters[len(COUNTERS) + i % RECENT] for i in before)
    return BadStep(step, tuple(names[i] for i in positions), n_params, norms)


def _is_finite(grad: Tensor) -> bool:
    values = grad if grad.layout is torch.strided else grad.coalesce().values()
    return bool(values.isfinite().all())
