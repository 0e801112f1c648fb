"""Warmup and what follows by the names people know: short forms of ScheduleLR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch.optim import Optimizer

from .._checks import above, as_steps, at_least
from .conventions import Convention
from .endless import Constant, Exponential, InverseSqrt, MultiStep, Noam
from .phases import Phases, Warmup
from .restarts import Restarts
from .schedule import RATIO, Absolute, Schedule
from .schedule_lr import ScheduleLR
from .shapes import Cosine, Decay, Linear, Polynomial
from .warmup_lr import as_warmup


class _WarmupDecayLR(ScheduleLR):
    """A warmup, then a decay with a horizon."""

    decay: Callable[[int, float | Absolute], Decay]

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
        warmup = as_warmup(warmup_steps)
        total = as_steps("total_steps", total_steps)
        if warmup.steps > total:
            raise ValueError(f"warmup_steps should be <= total_steps, {total}, but is: {warmup.steps}")
        RATIO.check("min_lr_ratio", min_lr_ratio)
        # DeepSpeed's cosine counts differently from its linear decay
        if convention == "deepspeed" and self.decay is Cosine:
            convention = "deepspeed-cosine"
        decay = self.decay(total - warmup.steps, min_lr_ratio)
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


class WarmupLinearLR(_WarmupDecayLR):
    """A warmup, then a straight line down to the floor. Arguments as for :class:`WarmupCosineLR`."""

    decay = Linear


class WarmupPolynomialLR(_WarmupDecayLR):
    """A warmup, then ``(1 - p) ^ power`` down to the floor. Arguments as for :class:`WarmupCosineLR`, and:

    Args:
        power: > 0 (default: 1).
    """

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
        self.decay = partial(Polynomial, power=power)
        super().__init__(optimizer, warmup_steps, total_steps, min_lr_ratio, convention=convention, **options)


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
        RATIO.check("min_lr_ratio", min_lr_ratio)
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
        RATIO.check("warmup_factor", warmup_factor)
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
