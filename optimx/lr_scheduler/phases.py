"""Phases in sequence: warmup, hold, decay, cooldown, and the conventions of where each begins and ends."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

from .._checks import above, as_steps, one_of
from .conventions import CONVENTIONS, Convention
from .endless import Constant
from .schedule import Absolute, Ratio, Schedule, check_length, check_schedules, check_steps, resolve
from .shapes import DECAYS


@dataclass(frozen=True)
class Warmup(Schedule):
    """A rise to the value with which the next phase begins; before any schedule: ``Warmup(500) >> Cosine(9500)``.

    Args:
        steps: Its length; 0 is no warmup. May be fractional if it is above 1.
        shape: ``"linear"`` (default), ``"cosine"``, ``"sqrt"``, ``"1-sqrt"``, ``"log"``, ``"exponential"``
            (geometric) or ``"constant"`` (stays at the start).
        start: Where it begins, as a ratio of where it ends, or :class:`Absolute` (default: 0; "exponential" and
            "constant" need more).

    Raises:
        ValueError: ``steps`` < 0 or in (0, 1), ``shape`` is unknown, or ``start`` is not in [0, 1] or 0 where it has to
            be more.
        TypeError: ``steps`` is no number.
    """

    overlaps = False

    steps: int
    shape: str = "linear"
    start: Ratio = 0.0

    def __post_init__(self) -> None:
        check_length(self)
        one_of("shape", self.shape, (*_RAMPS, "exponential"))
        super().__post_init__()
        if self.shape in ("exponential", "constant"):
            above(0).check(f"start of a warmup of shape {self.shape!r}", resolve(self.start, 1.0))

    def at(self, step: float, peak: float, base: float, lead: int = 0, tail: int = 0) -> float:
        return self.ramp(step, peak, CONVENTIONS["every-step"])

    def ramp(self, step: float, target: float, convention: Convention) -> float:
        """The value at a step of the warmup that rises to ``target``."""
        start = resolve(self.start, target)
        # only a rise from 0 would waste the step that it begins with
        begin = -1 if convention.warmup_from == "one" and start == 0 else 0
        # the projects that have a logarithm all use ln(n) / ln(steps), complete on the last step
        early = convention.warmup_to == "last" or self.shape == "log"
        end = self.steps - (early and self.shape != "constant")
        # a single step that is to begin with its start does
        if step >= self.steps or step >= end > begin:
            return target
        x = (step - begin) / (end - begin) if end > begin else 0.0
        if self.shape == "exponential":
            return start * (target / start) ** x if start > 0 else target
        return start + (target - start) * _RAMPS[self.shape](x, end - begin)


#: From 0 at x = 0 to 1 at x = 1, over a number of steps.
_RAMPS: dict[str, Callable[[float, int], float]] = {
    "linear": lambda x, steps: x,
    "cosine": lambda x, steps: 0.5 * (1.0 - math.cos(math.pi * x)),
    "sqrt": lambda x, steps: math.sqrt(x),
    "1-sqrt": lambda x, steps: 1.0 - math.sqrt(1.0 - x),
    "log": lambda x, steps: math.log1p(x * steps) / math.log1p(max(steps, 1)),
    "constant": lambda x, steps: 0.0,
}


@dataclass(frozen=True)
class Hold(Constant):
    """Stay at the value that the phase before has reached (after a warmup and at the beginning: the peak).

    Args:
        steps: Its length (default: None, endless: a stable phase that needs no horizon).
    """

    steps: int | None = None
    level: float = field(default=1.0, init=False, repr=False)
    floor: float | Absolute = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        check_steps(self, "steps")


@dataclass(frozen=True)
class Cooldown(Schedule):
    """A decay from the value that the phase before has reached: ``InverseSqrt(steps=9000) >> Cooldown(1000)``.

    Args:
        steps: Its length.
        shape: ``"linear"`` (default), ``"cosine"``, ``"polynomial"``, ``"1-sqrt"``, ``"1-square"``,
            ``"exponential"`` (normalised), ``"tanh"`` or ``"rex"``.
        floor: Ratio of each group's own learning rate, or :class:`Absolute` (default: 0).
    """

    steps: int
    shape: str = "linear"
    floor: Ratio = 0.0

    def __post_init__(self) -> None:
        one_of("shape", self.shape, DECAYS)
        object.__setattr__(self, "steps", as_steps("steps", self.steps))
        super().__post_init__()

    def at(self, step: float, peak: float, base: float, lead: int = 0, tail: int = 0) -> float:
        # below the floor already: it stays there
        floor = Absolute(min(resolve(self.floor, base), peak))
        return DECAYS[self.shape](self.steps, floor).at(step, peak, base, lead, tail)


@dataclass(frozen=True)
class Phases(Schedule):
    """Schedules one after the other, each on its own clock: what ``a >> b`` makes.

    After the last phase the value stays. All but the last need a length.

    Args:
        phases: The schedules.
        convention: A name of :data:`CONVENTIONS` or a :class:`Convention` (default: ``"every-step"``: no step is
            wasted on a learning rate of zero, the peak is applied once, the end is reached right after the last step).

    Raises:
        ValueError: There is no phase, a phase but the last has no length, or the convention is unknown.
        TypeError: A phase is no schedule.
    """

    phases: tuple[Schedule, ...]
    convention: str | Convention = "every-step"

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", check_schedules("phases", self.phases))
        for i, phase in enumerate(self.phases):
            if phase.steps is None and i < len(self.phases) - 1:
                raise ValueError(f"phases[{i}] should have a length, as another one follows, but is: {phase}")
        if not isinstance(self.convention, Convention):
            one_of("convention", self.convention, CONVENTIONS)

    @property
    def steps(self) -> int | None:  # type: ignore[override]
        last = self.phases[-1].steps
        return None if last is None else self._starts[-1] + last

    @property
    def overlaps(self) -> bool:  # type: ignore[override]
        return self.phases[0].overlaps

    @classmethod
    def in_sequence(cls, *schedules: Schedule) -> Phases:
        """Phases of these schedules; phases among them are taken apart, if their conventions agree."""
        conventions = {schedule.convention for schedule in schedules if isinstance(schedule, Phases)}
        if len(conventions) > 1:
            raise ValueError(f"phases in sequence should have one convention but have: {sorted(map(str, conventions))}")
        parts = (schedule.phases if isinstance(schedule, Phases) else (schedule,) for schedule in schedules)
        return cls(tuple(phase for part in parts for phase in part), *conventions)

    def with_convention(self, convention: str | Convention) -> Phases:
        """The same phases under another convention."""
        return replace(self, convention=convention)

    def resized(self, steps: int) -> Schedule:
        """The last phase takes what the others leave."""
        left = as_steps(f"steps - {self._starts[-1]} of the phases before the last", steps - self._starts[-1])
        return replace(self, phases=(*self.phases[:-1], self.phases[-1].resized(left)))

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return tuple(accumulate((phase.steps or 0 for phase in self.phases[:-1]), initial=0))

    @property
    def resolved(self) -> Convention:
        """The convention that its name stands for."""
        return self.convention if isinstance(self.convention, Convention) else CONVENTIONS[self.convention]

    def at(self, step: float, peak: float, base: float, lead: int = 0, tail: int = 0) -> float:
        # of phases that begin together all but the last have no steps
        return self._phase(bisect_right(self._starts, step) - 1, step, peak, base, lead, tail)

    def _phase(self, i: int, step: float, peak: float, base: float, lead: int, tail: int) -> float:
        phase, begin = self.phases[i], self._starts[i]
        if isinstance(phase, Warmup):
            return phase.ramp(step - begin, self._target(i, step, peak, base), self.resolved)
        if begin or self.resolved.decay_from == "before":
            lead = self._lead(i)
        if i < len(self.phases) - 1:
            tail = 0
        elif self.resolved.decay_to == "last":
            tail = 1
        if isinstance(phase, (Hold, Cooldown)):
            peak = self._reached(i, peak, base, lead)
        return phase.at(step - begin, peak, base, lead, tail)

    def _lead(self, i: int) -> int:
        """How many steps before its own first one a phase's clock begins."""
        if self.resolved.decay_from == "start":
            only_warmups = all(isinstance(phase, Warmup) or phase.steps == 0 for phase in self.phases[:i])
            return self._starts[i] if only_warmups else 0
        return int(self.resolved.decay_from in ("last", "before") and self.phases[i].overlaps)

    def _target(self, i: int, step: float, peak: float, base: float) -> float:
        """What a warmup rises to."""
        rest = range(i + 1, len(self.phases))
        following = next((j for j in rest if self.phases[j].steps != 0), None)
        if following is None and rest and self.resolved.target == "product" and self.resolved.decay_from == "start":
            # its clock has run since the start, though no step is its own
            following = rest[0]
        if following is None or self.resolved.target == "peak":
            return peak
        if self.resolved.target == "product":
            return self._phase(following, step, peak, base, 0, 0)
        if isinstance(self.phases[following], Warmup):
            return self._phase(following, self._starts[following], peak, base, 0, 0)
        lead = self._lead(following) if self.resolved.decay_from == "start" else 0
        return self.phases[following].at(0, peak, base, lead)

    def _reached(self, i: int, peak: float, base: float, lead: int) -> float:
        """The value that the phase before has reached where this one's clock begins."""
        before = i - 1
        while before >= 0 and not self.phases[before].steps:
            before -= 1
        if before < 0 or isinstance(self.phases[before], Warmup):
            return peak
        return self._phase(before, self._starts[i] - lead, peak, base, 0, 0)


@dataclass(frozen=True)
class Product(Schedule):
    """Schedules multiplied, all on one clock: what ``a * b`` makes. Floors hold.

    Args:
        factors: The schedules.

    Raises:
        ValueError: There is none.
        TypeError: One of them is no schedule.
    """

    factors: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", check_schedules("factors", self.factors))

    @property
    def steps(self) -> int | None:  # type: ignore[override]
        lengths = [factor.steps for factor in self.factors if factor.steps is not None]
        return max(lengths) if len(lengths) == len(self.factors) else None

    @property
    def overlaps(self) -> bool:  # type: ignore[override]
        return all(factor.overlaps for factor in self.factors)

    def resized(self, steps: int) -> Schedule:
        return replace(self, factors=tuple(factor.resized(steps) for factor in self.factors))

    def at(self, step: float, peak: float, base: float, lead: int = 0, tail: int = 0) -> float:
        for factor in self.factors:
            peak = factor.at(step, peak, base, lead, tail)
        return peak
