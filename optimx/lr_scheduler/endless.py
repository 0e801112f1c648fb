"""Schedules that need no horizon: decays that go on for as long as they are asked, and levels."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated

from .._checks import above, at_least, within
from .schedule import Ratio, Schedule, check_length, check_milestones, check_steps, resolve


@dataclass(frozen=True)
class _Endless(Schedule, abstract=True):
    """A decay that goes on for as long as it is asked, or for ``steps``; never below the floor."""

    _: KW_ONLY
    steps: int | None = None
    floor: Ratio = 0.0

    def __post_init__(self) -> None:
        check_length(self)
        super().__post_init__()

    def factor(self, step: float) -> float:
        raise NotImplementedError

    def at(self, step: float, peak: float, base: float, lead: int = 0, tail: int = 0) -> float:
        if self.steps is not None:
            step = min(step, max(self.steps - tail, 0))
        return max(peak * self.factor(step + lead), resolve(self.floor, base))


@dataclass(frozen=True)
class _Rated(_Endless, abstract=True):
    _: KW_ONLY
    decay_steps: Annotated[float, above(0)] = 1.0
    staircase: bool = False

    @property
    def overlaps(self) -> bool:  # type: ignore[override]
        return not self.staircase

    def factor(self, step: float) -> float:
        x = step / self.decay_steps
        return self.curve(math.floor(x) if self.staircase else x)

    def curve(self, x: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class Exponential(_Rated):
    """``gamma ^ (step / decay_steps)``.

    Args:
        gamma: In (0, 1].
        decay_steps: Steps that multiply the value by ``gamma`` (default: 1).
        staircase: All at once, at the end of every ``decay_steps`` (default: False).
        steps: Length, after which the value stays (default: None, endless).
        floor: Ratio of each group's own learning rate, or :class:`Absolute`, where it stops (default: 0).
    """

    gamma: Annotated[float, within("(0, 1]")]

    def curve(self, x: float) -> float:
        return self.gamma**x


@dataclass(frozen=True)
class NaturalExponential(Exponential):
    """``exp(-rate * step / decay_steps)``.

    Args:
        rate: >= 0.
        decay_steps, staircase, steps, floor: As for :class:`Exponential`.
    """

    gamma: float = field(default=1.0 / math.e, init=False, repr=False)
    rate: Annotated[float, at_least(0)]

    def curve(self, x: float) -> float:
        return super().curve(self.rate * x)


@dataclass(frozen=True)
class InverseTime(_Rated):
    """``1 / (1 + rate * step / decay_steps)``.

    Args:
        rate: >= 0.
        decay_steps, staircase, steps, floor: As for :class:`Exponential`.
    """

    rate: Annotated[float, at_least(0)]

    def curve(self, x: float) -> float:
        return 1.0 / (1.0 + self.rate * x)


@dataclass(frozen=True)
class InverseSqrt(_Endless):
    """``1 / sqrt(1 + step / timescale)``.

    Args:
        timescale: > 0; after three of them the value is a half (default: 10000).
        steps: Length, after which the value stays (default: None, endless).
        floor: Ratio of each group's own learning rate, or :class:`Absolute`, where it stops (default: 0).
    """

    timescale: Annotated[float, above(0)] = 10_000.0

    def factor(self, step: float) -> float:
        return math.sqrt(self.timescale / (self.timescale + step))


@dataclass(frozen=True)
class Noam(_Endless):
    """Warmup and inverse square root of https://arxiv.org/abs/1706.03762, with ``n = step + 1``.

    ``scale * d_model^-0.5 * min(n^-0.5, n * warmup_steps^-1.5)``; without ``d_model`` normalised to peak 1:
    ``scale * min(n / warmup_steps, sqrt(warmup_steps / n))``.

    Args:
        warmup_steps: >= 1.
        d_model: Width of the model (default: None). The paper's learning rate is the factor; set the group's to 1.
        scale: Factor on all of it (default: 1).
        steps: Length, after which the value stays (default: None, endless).
        floor: Ratio of each group's own learning rate, or :class:`Absolute`, where the decay stops (default: 0).
    """

    overlaps = False

    warmup_steps: int
    _: KW_ONLY
    d_model: int | None = None
    scale: Annotated[float, above(0)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self, "warmup_steps", "d_model", least=1)

    def factor(self, step: float) -> float:
        n = step + 1.0
        peak = 1.0 if self.d_model is None else (self.d_model * self.warmup_steps) ** -0.5
        return self.scale * peak * min(n / self.warmup_steps, math.sqrt(self.warmup_steps / n))

    def at(self, step: float, peak: float, base: float, lead: int = 0, tail: int = 0) -> float:
        # the floor ends the decay, it does not lift the warmup
        if step + 1 < self.warmup_steps:
            return peak * self.factor(step)
        return super().at(step, peak, base, lead, tail)


@dataclass(frozen=True)
class Constant(_Endless):
    """The same factor at every step.

    Args:
        level: The factor, >= 0 (default: 1).
        steps: Length (default: None, endless).
    """

    overlaps = False

    level: Annotated[float, at_least(0)] = 1.0

    def factor(self, step: float) -> float:
        return self.level


@dataclass(frozen=True)
class MultiStep(_Endless):
    """``gamma ^ (number of milestones passed)``.

    Args:
        milestones: Increasing steps, each the first with the next value.
        gamma: > 0 (default: 0.1).
        steps: Length (default: None, endless).
        floor: Ratio of each group's own learning rate, or :class:`Absolute`, where it stops (default: 0).
    """

    overlaps = False

    milestones: tuple[int, ...]
    gamma: Annotated[float, above(0)] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_milestones(self)

    def factor(self, step: float) -> float:
        return self.gamma ** bisect_right(self.milestones, step)


@dataclass(frozen=True)
class Piecewise(_Endless):
    """Levels: ``levels[0]`` until the first milestone, ``levels[1]`` until the second, and so on.

    Args:
        milestones: Increasing steps, each the first with the next level.
        levels: Factors >= 0, one more than milestones.
        steps: Length (default: None, endless).
        floor: Ratio of each group's own learning rate, or :class:`Absolute`, where it stops (default: 0).
    """

    overlaps = False

    milestones: tuple[int, ...]
    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_milestones(self)
        object.__setattr__(self, "levels", tuple(self.levels))
        if len(self.levels) != len(self.milestones) + 1:
            raise ValueError(
                f"levels should be {len(self.milestones) + 1}, one more than milestones, but is: {list(self.levels)}"
            )
        for i, level in enumerate(self.levels):
            at_least(0).check(f"levels[{i}]", level)

    def factor(self, step: float) -> float:
        return self.levels[bisect_right(self.milestones, step)]
