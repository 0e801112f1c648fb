"""Warmup and what follows by the names people know: short forms of ScheduleLR."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

from torch.optim import Optimizer

from .._checks import above, as_steps, at_least, one_of
from .endless import Constant, Exponential, InverseSqrt, MultiStep, Noam
from .phases import Convention, Hold, Phases, Warmup
from .restarts import Restarts
from .schedule import Absolute, Schedule, check_ratio
from .schedule_lr import ScheduleLR
from .shapes import DECAYS, Cosine, Decay, Linear, Polynomial
from .warmup_lr import as_warmup


class _WarmupDecayLR(ScheduleLR):
    """A warmup, then a decay with a horizon; ``shape`` are arguments of the decay."""

    decay: ClassVar[type[Decay]]

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int | Warmup,
        total_steps: int,
        min_lr_ratio: float | Absolute = 0.0,
        *,
        convention: str | Convention = "every-step",
        shape: Mapping[str, float] = MappingProxyType({}),
        **options: Any,
    ) -> None:
        warmup = as_warmup(warmup_steps)
        total = as_steps("total_steps", total_steps)
        if warmup.steps > total:
            raise ValueError(f"warmup_steps should be <= total_steps, {total}, but is: {warmup.steps}")
        check_ratio("min_lr_ratio", min_lr_ratio)
        decay = self.decay(total - warmup.steps, min_lr_ratio, **shape)
        super().__init__(optimizer, Phases((warmup, decay), convention), **options)


class WarmupCosineLR(_WarmupDecayLR):
    """A warmup, then a cosine down to the floor.

    Args:
        optimizer: Any torch optimizer.
        warmup_steps: Length of a linear warmup from zero, or a :class:`Warmup`.
        total_steps: Length of both together.
        min_lr_ratio: The floor, as a ratio of each group's own learning rate, or :class:`Absolute` (default: 0).
        convention: Whose off-by-one is followed, see :class:`Convention` (default: ``"every-step"``: no step has
            learning rate zero, the peak is applied once, the floor is reached right after the last step).
        options: ``last_epoch``, ``base_lrs`` and ``on_mismatch`` of :class:`ScheduleLR`.

    Raises:
        ValueError: An argument is out of range, or the warmup is longer than the total.
    """

    decay = Cosine

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int | Warmup,
        total_steps: int,
        min_lr_ratio: float | Absolute = 0.0,
        *,
        convention: str | Convention = "every-step",
        **options: Any,
    ) -> None:
        if convention == "deepspeed":
            convention = "deepspeed-cosine"
        super().__init__(optimizer, warmup_steps, total_steps, min_lr_ratio, convention=convention, **options)


class WarmupLinearLR(_WarmupDecayLR):
    """A warmup, then a straight line down to the floor. Arguments as for :class:`WarmupCosineLR`."""

    decay = Linear


class WarmupPolynomialLR(_WarmupDecayLR):
    """A warmup, then ``(1 - p) ^ power`` down to the floor. Arguments as for :class:`WarmupCosineLR`, and:

    Args:
        power: > 0 (default: 1).
    """

    decay = Polynomial

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int | Warmup,
        total_steps: int,
        min_lr_ratio: float | Absolute = 0.0,
        power: float = 1.0,
        *,
        convention: str | Convention = "every-step",
        **options: Any,
    ) -> None:
        shape = {"power": power}
        super().__init__(
            optimizer, warmup_steps, total_steps, min_lr_ratio, convention=convention, shape=shape, **options
        )


class WarmupConstantLR(ScheduleLR):
    """A warmup, then each group's own learning rate for as long as it lasts.

    Args:
        optimizer: Any torch optimizer.
        warmup_steps: Length of a linear warmup from zero, or a :class:`Warmup`.
        convention: See :class:`Convention` (default: ``"every-step"``).
        options: ``last_epoch``, ``base_lrs`` and ``on_mismatch`` of :class:`ScheduleLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int | Warmup,
        *,
        convention: str | Convention = "every-step",
        **options: Any,
    ) -> None:
        super().__init__(optimizer, Phases((as_warmup(warmup_steps), Constant()), convention), **options)


class WarmupExponentialLR(ScheduleLR):
    """A warmup, then ``gamma ^ (step / decay_steps)``.

    Args:
        optimizer: Any torch optimizer.
        warmup_steps: Length of a linear warmup from zero, or a :class:`Warmup`.
        gamma: In (0, 1].
        decay_steps: Steps that multiply the learning rate by ``gamma`` (default: 1).
        min_lr_ratio: The floor, as a ratio of each group's own learning rate, or :class:`Absolute` (default: 0).
        staircase: All at once, at the end of every ``decay_steps`` (default: False).
        convention: See :class:`Convention` (default: ``"every-step"``).
        options: ``last_epoch``, ``base_lrs`` and ``on_mismatch`` of :class:`ScheduleLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int | Warmup,
        gamma: float,
        decay_steps: float = 1.0,
        min_lr_ratio: float | Absolute = 0.0,
        *,
        staircase: bool = False,
        convention: str | Convention = "every-step",
        **options: Any,
    ) -> None:
        check_ratio("min_lr_ratio", min_lr_ratio)
        decay = Exponential(gamma, decay_steps=decay_steps, staircase=staircase, floor=min_lr_ratio)
        super().__init__(optimizer, Phases((as_warmup(warmup_steps), decay), convention), **options)


class WarmupMultiStepLR(ScheduleLR):
    """``gamma`` at every milestone, times a warmup: detectron2's arguments and numbers.

    Args:
        optimizer: Any torch optimizer.
        milestones: Increasing steps, counted from the beginning of the warmup.
        gamma: Factor at each of them, > 0 (default: 0.1).
        warmup_factor: What the warmup starts with, in [0, 1] (default: 0.001).
        warmup_iters: Its length (default: 1000).
        warmup_method: ``"linear"`` (default), ``"constant"`` or another shape of :class:`Warmup`.
        options: ``last_epoch``, ``base_lrs`` and ``on_mismatch`` of :class:`ScheduleLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[int],
        gamma: float = 0.1,
        warmup_factor: float = 0.001,
        warmup_iters: int = 1000,
        warmup_method: str = "linear",
        **options: Any,
    ) -> None:
        check_ratio("warmup_factor", warmup_factor)
        warmup = Warmup(as_steps("warmup_iters", warmup_iters), warmup_method, warmup_factor)
        super().__init__(optimizer, Phases((warmup, MultiStep(tuple(milestones), gamma)), "product"), **options)


class InverseSqrtLR(ScheduleLR):
    """A warmup, then ``1 / sqrt(1 + step / timescale)``.

    Args:
        optimizer: Any torch optimizer.
        warmup_steps: Length of a linear warmup from zero, or a :class:`Warmup`.
        timescale: > 0 (default: None, the warmup's length, or 10000 without a warmup).
        convention: See :class:`Convention` (default: ``"every-step"``).
        options: ``last_epoch``, ``base_lrs`` and ``on_mismatch`` of :class:`ScheduleLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int | Warmup,
        timescale: float | None = None,
        *,
        convention: str | Convention = "every-step",
        **options: Any,
    ) -> None:
        warmup = as_warmup(warmup_steps)
        decay = InverseSqrt((warmup.steps or 10_000) if timescale is None else timescale)
        super().__init__(optimizer, Phases((warmup, decay), convention), **options)


class NoamLR(ScheduleLR):
    """The schedule of https://arxiv.org/abs/1706.03762, times each group's own learning rate.

    Args:
        optimizer: Any torch optimizer; with ``d_model`` its learning rate is usually 1.
        warmup_steps: Length of the warmup, >= 1.
        d_model: Width of the model (default: None: the peak is each group's own learning rate).
        scale: Factor on all of it (default: 1).
        options: ``last_epoch``, ``base_lrs`` and ``on_mismatch`` of :class:`ScheduleLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        d_model: int | None = None,
        scale: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(optimizer, Noam(warmup_steps, d_model=d_model, scale=scale), **options)


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
        check_ratio("min_lr_ratio", min_lr_ratio)
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


class SGDR(ScheduleLR):
    """Cosines with warm restarts (https://arxiv.org/abs/1608.03983).

    With the defaults it is :class:`torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`.

    Args:
        optimizer: Any torch optimizer.
        T_0: Length of the first cycle, >= 1.
        T_mult: Factor on the length from cycle to cycle, > 0, also fractional or below 1 (default: 1).
        eta_min: The floor, a learning rate, as in torch (default: 0).
        peak_decay: Factor on the peak from cycle to cycle, in (0, 1] (default: 1).
        warmup_steps: Length of a linear warmup from zero, or a :class:`Warmup` (default: 0).
        cycles: How many; then the learning rate stays at ``eta_min`` (default: None, endless).
        warmup_each: The warmup belongs to every cycle, and to its length, instead of coming once before them
            (default: False).
        options: ``last_epoch``, ``base_lrs`` and ``on_mismatch`` of :class:`ScheduleLR`.

    Raises:
        ValueError: An argument is out of range, ``eta_min`` is above a group's learning rate, or a cycle is too
            short for its warmup.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        T_0: int,
        T_mult: float = 1,
        eta_min: float = 0.0,
        *,
        peak_decay: float = 1.0,
        warmup_steps: int | Warmup = 0,
        cycles: int | None = None,
        warmup_each: bool = False,
        **options: Any,
    ) -> None:
        first = as_steps("T_0", T_0, least=1)
        above(0).check("T_mult", T_mult)
        at_least(0).check("eta_min", eta_min)
        warmup = as_warmup(warmup_steps)
        cosine = Cosine(first, Absolute(eta_min) if eta_min else 0.0)
        cycle: Schedule = cosine
        if warmup_each and warmup.steps:
            cycle = Phases((warmup, cosine)).resized(first)
        schedule: Schedule = Restarts(cycle, mult=T_mult, peak_decay=peak_decay, cycles=cycles)
        if warmup.steps and not warmup_each:
            schedule = warmup >> schedule
        super().__init__(optimizer, schedule, **options)
