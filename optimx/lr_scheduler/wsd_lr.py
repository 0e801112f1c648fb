"""Warmup, stable, decay: the named scheduler whose end may be told while it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.optim import Optimizer

from .._checks import as_steps, one_of
from .conventions import Convention
from .phases import Hold, Phases, Warmup
from .schedule import RATIO, Absolute, Schedule
from .schedule_lr import ScheduleLR
from .shapes import DECAYS
from .warmup_lr import as_warmup


class WSDLR(ScheduleLR):
    """Warmup, stable, decay (https://arxiv.org/abs/2404.06395).

    Args:
        optimizer: Any torch optimizer.
        warmup_steps: Length of a linear warmup from zero, or a :class:`Warmup`.
        stable_steps: Steps at each group's own learning rate after the warmup; None for a stable phase that needs no
            horizon: it lasts until :meth:`start_decay`.
        decay_steps: Length of the decay.
        decay: ``"1-sqrt"`` (default), ``"linear"``, ``"cosine"``, ``"polynomial"``, ``"1-square"``,
            ``"exponential"`` (normalised), ``"tanh"`` or ``"rex"``.
        min_lr_ratio: The floor, as a ratio of each group's own learning rate, or :class:`Absolute` (default: 0).
        convention: See :class:`Convention` (default: ``"every-step"``). With ``"hf"`` a warmup given by its length
            begins at ``min_lr_ratio``, as there.
        options: ``last_epoch``, ``base_lrs`` and ``on_mismatch`` of :class:`ScheduleLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int | Warmup,
        stable_steps: int | None,
        decay_steps: int,
        decay: str = "1-sqrt",
        min_lr_ratio: float | Absolute = 0.0,
        *,
        convention: str | Convention = "every-step",
        **options: Any,
    ) -> None:
        RATIO.check("min_lr_ratio", min_lr_ratio)
        warmup = as_warmup(warmup_steps)
        if convention == "hf" and not isinstance(warmup_steps, Warmup):
            warmup = replace(warmup, start=min_lr_ratio)
        self._decay = DECAYS[one_of("decay", decay, DECAYS)](as_steps("decay_steps", decay_steps), min_lr_ratio)
        hold = Hold(None if stable_steps is None else as_steps("stable_steps", stable_steps))
        phases = (warmup, hold) if hold.steps is None else (warmup, hold, self._decay)
        super().__init__(optimizer, Phases(phases, convention), **options)

    def start_decay(self) -> None:
        """End a stable phase without a horizon: the decay begins with the next :meth:`step`.

        Raises:
            RuntimeError: The decay's beginning is fixed already, or the warmup is not over.
        """
        hold_steps = self._hold.steps
        if hold_steps is not None:
            raise RuntimeError(f"stable_steps should be None for start_decay() but is: {hold_steps}")
        stable_steps = math.floor(self.last_epoch + 1 - self.schedule.phases[0].steps)
        if stable_steps < 0:
            raise RuntimeError(f"start_decay() should come after the warmup but comes at step: {self.last_epoch}")
        self._end_hold(stable_steps)

    @property
    def _hold(self) -> Schedule:
        return self.schedule.phases[1]

    def _end_hold(self, stable_steps: int) -> None:
        warmup = self.schedule.phases[0]
        self._set_schedules({"lr": replace(self.schedule, phases=(warmup, Hold(stable_steps), self._decay))})

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"stable_steps": self._hold.steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        before = self._fields
        # the checkpoint was made after start_decay()
        if self._hold.steps is None and state_dict.get("stable_steps") is not None:
            self._end_hold(state_dict["stable_steps"])
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self._fields = before
            raise
