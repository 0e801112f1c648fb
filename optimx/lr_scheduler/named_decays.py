"""Decays without a warmup by the names people know: short forms of ScheduleLR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch.optim import Optimizer

from .._checks import as_steps, one_of
from .conventions import CONVENTIONS
from .endless import InverseTime, NaturalExponential, Piecewise
from .schedule import RATIO, Absolute
from .schedule_lr import ScheduleLR
from .shapes import REX, LinearCosine, Tanh


class LinearCosineLR(ScheduleLR):
    """:class:`LinearCosine`: a line times a cosine.

    Args:
        optimizer: Any torch optimizer.
        total_steps: Length of the decay.
        num_cycles: Waves of the cosine (default: 0.5).
        alpha, beta: >= 0 (default: 0 and 0.001).
        options: ``last_epoch``, ``base_lrs`` and ``on_mismatch`` of :class:`ScheduleLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        num_cycles: float = 0.5,
        alpha: float = 0.0,
        beta: float = 0.001,
        **options: Any,
    ) -> None:
        super().__init__(
            optimizer,
            LinearCosine(as_steps("total_steps", total_steps), num_cycles=num_cycles, alpha=alpha, beta=beta),
            **options,
        )


class _RateLR(ScheduleLR):
    """A decay by a rate that needs no horizon."""

    decay: ClassVar[type[NaturalExponential | InverseTime]]

    def __init__(
        self,
        optimizer: Optimizer,
        rate: float,
        decay_steps: float = 1.0,
        staircase: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(optimizer, self.decay(rate, decay_steps=decay_steps, staircase=staircase), **options)


class NaturalExpLR(_RateLR):
    """``exp(-rate * step / decay_steps)``.

    Args:
        optimizer: Any torch optimizer.
        rate: >= 0.
        decay_steps: > 0 (default: 1).
        staircase: Only at the end of every ``decay_steps`` (default: False).
        options: ``last_epoch``, ``base_lrs`` and ``on_mismatch`` of :class:`ScheduleLR`.
    """

    decay = NaturalExponential


class InverseTimeLR(_RateLR):
    """``1 / (1 + rate * step / decay_steps)``. Arguments as for :class:`NaturalExpLR`."""

    decay = InverseTime


class PiecewiseConstantLR(ScheduleLR):
    """Levels between milestones.

    Args:
        optimizer: Any torch optimizer.
        milestones: Increasing steps, each the first with the next level.
        levels: Factors on each group's own learning rate, one more than milestones.
        convention: With ``"tf"`` a milestone is the last step with the level before it (default: ``"every-step"``).
        options: ``last_epoch``, ``base_lrs`` and ``on_mismatch`` of :class:`ScheduleLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[int],
        levels: Sequence[float],
        *,
        convention: str = "every-step",
        **options: Any,
    ) -> None:
        late = one_of("convention", convention, CONVENTIONS) == "tf"
        schedule = Piecewise(tuple(milestones), tuple(levels))
        if late:
            schedule = replace(schedule, milestones=tuple(milestone + 1 for milestone in schedule.milestones))
        super().__init__(optimizer, schedule, **options)


class TanhLR(ScheduleLR):
    """:class:`Tanh`: slowly, fast, slowly.

    Args:
        optimizer: Any torch optimizer.
        total_steps: Length of the decay.
        min_lr_ratio: The floor, as a ratio of each group's own learning rate, or :class:`Absolute` (default: 0).
        lower, upper: Where on the hyperbolic tangent it begins and ends (default: -7 and 3).
        options: ``last_epoch``, ``base_lrs`` and ``on_mismatch`` of :class:`ScheduleLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        min_lr_ratio: float | Absolute = 0.0,
        lower: float = -7.0,
        upper: float = 3.0,
        **options: Any,
    ) -> None:
        RATIO.check("min_lr_ratio", min_lr_ratio)
        steps = as_steps("total_steps", total_steps)
        super().__init__(optimizer, Tanh(steps, min_lr_ratio, lower=lower, upper=upper), **options)


class REXLR(ScheduleLR):
    """:class:`REX`: nearly constant, then fast.

    Args:
        optimizer: Any torch optimizer.
        total_steps: Length of the decay.
        min_lr_ratio: The floor, as a ratio of each group's own learning rate, or :class:`Absolute` (default: 0).
        options: ``last_epoch``, ``base_lrs`` and ``on_mismatch`` of :class:`ScheduleLR`.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, min_lr_ratio: float | Absolute = 0.0, **options: Any
    ) -> None:
        RATIO.check("min_lr_ratio", min_lr_ratio)
        super().__init__(optimizer, REX(as_steps("total_steps", total_steps), min_lr_ratio), **options)
