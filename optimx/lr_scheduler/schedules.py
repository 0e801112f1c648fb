"""Shapes: how a learning rate falls from a group's own value to its floor."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import KW_ONLY, dataclass, replace

from ._schedule import (
    Absolute,
    Schedule,
    check_above,
    check_at_least,
    check_milestones,
    check_ratio,
    check_steps,
    resolve,
)

# decays with a horizon: functions of the progress p


@dataclass(frozen=True)
class Decay(Schedule):
    """A decay with a horizon: ``floor + (peak - floor) * shape(p)`` with the progress ``p = step / steps``.

    Args:
        steps: Its length; the floor is reached right after the last of them.
        floor: Ratio of each group's own learning rate, or :class:`Absolute` (default: 0).

    Raises:
        ValueError: ``steps`` < 0, ``floor`` not in [0, 1], or an argument of the shape is out of range.
        TypeError: ``steps`` is no int.
    """

    steps: int
    floor: float | Absolute = 0.0

    def __post_init__(self) -> None:
        check_steps(self, "steps")
        check_ratio("floor", self.floor)

    def shape(self, p: float) -> float:
        """1 at progress 0, 0 at progress 1 (unless the shape's own arguments say otherwise)."""
        raise NotImplementedError

    def at(self, step: float, peak: float, base: float, lead: int = 0, tail: int = 0) -> float:
        span = self.steps + lead - tail
        p = min((step + lead) / span, 1.0) if span > 0 else 1.0
        floor = resolve(self.floor, base)
        # a peak that restarts have lowered stops at the floor
        return floor + (max(peak, floor) - floor) * self.shape(p)

    def resized(self, steps: int) -> Schedule:
        return replace(self, steps=steps)


@dataclass(frozen=True)
class Linear(Decay):
    """``1 - p``."""

    def shape(self, p: float) -> float:
        return 1.0 - p


@dataclass(frozen=True)
class Cosine(Decay):
    """``(1/2 (1 + cos(2 pi num_cycles p^k))) ^ power`` (SGDR's cosine, https://arxiv.org/abs/1608.03983).

    Args:
        steps: Its length.
        floor: Ratio of each group's own learning rate, or :class:`Absolute` (default: 0).
        power: Exponent of the cosine (default: 1).
        num_cycles: Waves; half a wave goes down once, a whole one comes back to the peak (default: 0.5).
        k: k-decay's exponent of the progress (https://arxiv.org/abs/2004.05909; default: 1).
    """

    _: KW_ONLY
    power: float = 1.0
    num_cycles: float = 0.5
    k: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above("power", self.power, 0)
        check_above("num_cycles", self.num_cycles, 0)
        check_above("k", self.k, 0)

    def shape(self, p: float) -> float:
        # rounding may leave the cosine below 0, which has no root
        return max(0.5 * (1.0 + math.cos(2.0 * math.pi * self.num_cycles * p**self.k)), 0.0) ** self.power


@dataclass(frozen=True)
class CosineWithHardRestarts(Decay):
    """Cosines from the peak to the floor, ``cycles`` of equal length within ``steps``, which they need not divide.

    Args:
        steps: Length of all cycles together.
        floor: Ratio of each group's own learning rate, or :class:`Absolute` (default: 0).
        cycles: How many (default: 1). For cycles that change, see :class:`Restarts`.
    """

    _: KW_ONLY
    cycles: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self, "cycles", least=1)

    def shape(self, p: float) -> float:
        if p >= 1.0:
            return 0.0
        # a restart lies on a whole number, which the product may miss by rounding
        position = p * self.cycles + 1e-12
        return 0.5 * (1.0 + math.cos(math.pi * (position - math.floor(position))))


@dataclass(frozen=True)
class Polynomial(Decay):
    """``(1 - p) ^ power``.

    Args:
        steps: Its length.
        floor: Ratio of each group's own learning rate, or :class:`Absolute` (default: 0).
        power: > 0 (default: 1).
    """

    _: KW_ONLY
    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above("power", self.power, 0)

    def shape(self, p: float) -> float:
        return (1.0 - p) ** self.power


@dataclass(frozen=True)
class OneMinusPower(Decay):
    """``1 - p ^ power``.

    Args:
        steps: Its length.
        floor: Ratio of each group's own learning rate, or :class:`Absolute` (default: 0).
        power: > 0 (default: 2, "1-square").
    """

    _: KW_ONLY
    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above("power", self.power, 0)

    def shape(self, p: float) -> float:
        return 1.0 - p**self.power


@dataclass(frozen=True)
class OneMinusSqrt(Decay):
    """``1 - sqrt(p)``, the cooldown of https://arxiv.org/abs/2405.18392."""

    def shape(self, p: float) -> float:
        return 1.0 - math.sqrt(p)


@dataclass(frozen=True)
class NormalizedExponential(Decay):
    """``(rate^p - rate) / (1 - rate)``: an exponential that does reach the floor.

    Args:
        steps: Its length.
        floor: Ratio of each group's own learning rate, or :class:`Absolute` (default: 0).
        rate: In (0, 1), the smaller the steeper (default: 0.1).
    """

    _: KW_ONLY
    rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate < 1:
            raise ValueError(f"rate should be in (0, 1) but is: {self.rate}")

    def shape(self, p: float) -> float:
        return (self.rate**p - self.rate) / (1.0 - self.rate)


@dataclass(frozen=True)
class Tanh(Decay):
    """``1/2 (1 - tanh(lower (1 - p) + upper p))`` (https://arxiv.org/abs/1806.01593), and the floor after the end.

    Args:
        steps: Its length.
        floor: Ratio of each group's own learning rate, or :class:`Absolute` (default: 0).
        lower, upper: Where on the hyperbolic tangent it begins and ends, ``lower < upper`` (default: -7 and 3).
    """

    _: KW_ONLY
    lower: float = -7.0
    upper: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above("upper", self.upper, self.lower)

    def shape(self, p: float) -> float:
        # tanh never reaches 1
        return 0.5 * (1.0 - math.tanh(self.lower * (1.0 - p) + self.upper * p)) if p < 1.0 else 0.0


@dataclass(frozen=True)
class REX(Decay):
    """``(1 - p) / (1 - p/2)`` (https://arxiv.org/abs/2107.04197)."""

    def shape(self, p: float) -> float:
        return (1.0 - p) / (1.0 - 0.5 * p)


@dataclass(frozen=True)
class LinearCosine(Decay):
    """``(alpha + 1 - p) 1/2 (1 + cos(2 pi num_cycles p)) + beta`` (https://arxiv.org/abs/1709.07417).

    With TensorFlow's default ``beta`` the first value is 1.001.

    Args:
        steps: Its length.
        floor: Ratio of each group's own learning rate, or :class:`Absolute` (default: 0).
        num_cycles: Waves of the cosine (default: 0.5).
        alpha, beta: >= 0 (default: 0 and 0.001).
    """

    _: KW_ONLY
    num_cycles: float = 0.5
    alpha: float = 0.0
    beta: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above("num_cycles", self.num_cycles, 0)
        check_at_least("alpha", self.alpha, 0)
        check_at_least("beta", self.beta, 0)

    def shape(self, p: float) -> float:
        return (self.alpha + 1.0 - p) * 0.5 * (1.0 + math.cos(2.0 * math.pi * self.num_cycles * p)) + self.beta


#: Decays by the names that configurations use.
DECAYS: dict[str, type[Decay]] = {
    "linear": Linear,
    "cosine": Cosine,
    "polynomial": Polynomial,
    "1-sqrt": OneMinusSqrt,
    "1-square": OneMinusPower,
    "exponential": NormalizedExponential,
    "tanh": Tanh,
    "rex": REX,
}


# decays that need no horizon: functions of the number of steps


@dataclass(frozen=True)
class _Endless(Schedule):
    """A decay that goes on for as long as it is asked, or for ``steps``; never below the floor."""

    _: KW_ONLY
    steps: int | None = None
    floor: float | Absolute = 0.0

    def __post_init__(self) -> None:
        check_steps(self, "steps")
        check_ratio("floor", self.floor)

    def factor(self, step: float) -> float:
        raise NotImplementedError

    def at(self, step: float, peak: float, base: float, lead: int = 0, tail: int = 0) -> float:
        if self.steps is not None:
            step = min(step, self.steps - tail)
        return max(peak * self.factor(step + lead), resolve(self.floor, base))

    def resized(self, steps: int) -> Schedule:
        return replace(self, steps=steps)


@dataclass(frozen=True)
class _Rated(_Endless):
    _: KW_ONLY
    decay_steps: float = 1.0
    staircase: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above("decay_steps", self.decay_steps, 0)

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

    gamma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma should be in (0, 1] but is: {self.gamma}")

    def curve(self, x: float) -> float:
        return self.gamma**x


@dataclass(frozen=True)
class NaturalExponential(_Rated):
    """``exp(-rate * step / decay_steps)``.

    Args:
        rate: >= 0.
        decay_steps, staircase, steps, floor: As for :class:`Exponential`.
    """

    rate: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("rate", self.rate, 0)

    def curve(self, x: float) -> float:
        return math.exp(-self.rate * x)


@dataclass(frozen=True)
class InverseTime(_Rated):
    """``1 / (1 + rate * step / decay_steps)``.

    Args:
        rate: >= 0.
        decay_steps, staircase, steps, floor: As for :class:`Exponential`.
    """

    rate: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("rate", self.rate, 0)

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

    timescale: float = 10_000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above("timescale", self.timescale, 0)

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
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self, "warmup_steps", "d_model", least=1)
        check_above("scale", self.scale, 0)

    def factor(self, step: float) -> float:
        n = step + 1.0
        peak = 1.0 if self.d_model is None else (self.d_model * self.warmup_steps) ** -0.5
        return self.scale * peak * min(n / self.warmup_steps, math.sqrt(self.warmup_steps / n))

    def at(self, step: float, peak: float, base: float, lead: int = 0, tail: int = 0) -> float:
        # the floor ends the decay, it does not lift the warmup
        if step + 1 < self.warmup_steps:
            return peak * self.factor(step)
        return super().at(step, peak, base, lead, tail)


# levels


@dataclass(frozen=True)
class Constant(_Endless):
    """The same factor at every step.

    Args:
        level: The factor, >= 0 (default: 1).
        steps: Length (default: None, endless).
    """

    overlaps = False

    level: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("level", self.level, 0)

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
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_milestones(self)
        check_above("gamma", self.gamma, 0)

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
            check_at_least(f"levels[{i}]", level, 0)

    def factor(self, step: float) -> float:
        return self.levels[bisect_right(self.milestones, step)]
