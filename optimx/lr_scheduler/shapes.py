"""Decays with a horizon: how a learning rate falls from a group's own value to its floor over a number of steps."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated

from .._checks import above, as_number, at_least, within
from .schedule import Ratio, Schedule, check_length, resolve


@dataclass(frozen=True)
class Decay(Schedule, abstract=True):
    """A decay with a horizon: ``floor + (peak - floor) * shape(p)`` with the progress ``p = step / steps``.

    Args:
        steps: Its length; the floor is reached right after the last of them. May be fractional if it is above 1.
        floor: Ratio of each group's own learning rate, or :class:`Absolute` (default: 0).

    Raises:
        ValueError: ``steps`` < 0 or in (0, 1), ``floor`` not in [0, 1], or an argument of the shape is out of range.
        TypeError: ``steps`` is no number.
    """

    steps: int
    floor: Ratio = 0.0

    def __post_init__(self) -> None:
        check_length(self)
        super().__post_init__()

    def shape(self, p: float) -> float:
        """1 at progress 0, 0 at progress 1 (unless the shape's own arguments say otherwise)."""
        raise NotImplementedError

    def at(self, step: float, peak: float, base: float, lead: int = 0, tail: int = 0) -> float:
        span = self.steps + lead - tail
        p = min((step + lead) / span, 1.0) if span > 0 else 1.0
        floor = resolve(self.floor, base)
        # a peak that restarts have lowered stops at the floor
        return floor + (max(peak, floor) - floor) * self.shape(p)


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
    power: Annotated[float, above(0)] = 1.0
    num_cycles: Annotated[float, above(0)] = 0.5
    k: Annotated[float, above(0)] = 1.0

    def shape(self, p: float) -> float:
        # rounding may leave the cosine below 0, which has no root
        return max(0.5 * (1.0 + math.cos(2.0 * math.pi * self.num_cycles * p**self.k)), 0.0) ** self.power


@dataclass(frozen=True)
class CosineWithHardRestarts(Decay):
    """Cosines from the peak to the floor, ``cycles`` of equal length within ``steps``, which they need not divide.

    Args:
        steps: Length of all cycles together.
        floor: Ratio of each group's own learning rate, or :class:`Absolute` (default: 0).
        cycles: How many, > 0; of a fractional number the last one is cut off (default: 1). For cycles that change, see
            :class:`Restarts`.
    """

    _: KW_ONLY
    cycles: float = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "cycles", as_number("cycles", self.cycles))
        above(0).check("cycles", self.cycles)

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
    power: Annotated[float, above(0)] = 1.0

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
    power: Annotated[float, above(0)] = 2.0

    def shape(self, p: float) -> float:
        return 1.0 - p**self.power


@dataclass(frozen=True)
class OneMinusSqrt(OneMinusPower):
    """``1 - sqrt(p)``, the cooldown of https://arxiv.org/abs/2405.18392."""

    power: float = field(default=0.5, init=False, repr=False)


@dataclass(frozen=True)
class NormalizedExponential(Decay):
    """``(rate^p - rate) / (1 - rate)``: an exponential that does reach the floor.

    Args:
        steps: Its length.
        floor: Ratio of each group's own learning rate, or :class:`Absolute` (default: 0).
        rate: In (0, 1), the smaller the steeper (default: 0.1).
    """

    _: KW_ONLY
    rate: Annotated[float, within("(0, 1)")] = 0.1

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
        above(self.lower).check("upper", self.upper)

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
    num_cycles: Annotated[float, above(0)] = 0.5
    alpha: Annotated[float, at_least(0)] = 0.0
    beta: Annotated[float, at_least(0)] = 0.001

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
