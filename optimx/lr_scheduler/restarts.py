"""Cycles: warm restarts around any shape, one cycle, triangles."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Annotated, Literal

from .._checks import above, as_steps, at_least, one_of, within
from .schedule import Ratio, Schedule, check_steps, resolve


@dataclass(frozen=True)
class Restarts(Schedule):
    """A schedule again and again (SGDR, https://arxiv.org/abs/1608.03983): ``Restarts(Cosine(10), mult=2)``.

    Cycle ``i`` has ``round(first * mult^i)`` steps, at least one, and the peak ``peak_decay^i``, but not below the
    floor. For a warmup in each cycle repeat one that has it: ``Restarts(Warmup(2) >> Cosine(8))``; it keeps its
    length, and what comes after it takes the rest of the cycle.

    Args:
        cycle: The first cycle; its ``steps`` are the first period.
        mult: Factor on the length from cycle to cycle, > 0; may be fractional, or below 1 (default: 1).
        peak_decay: Factor on the peak from cycle to cycle, in (0, 1] (default: 1).
        cycles: How many; after them the value stays where the last one ended (default: None, endless).
        lengths: The lengths themselves, instead of ``mult`` and ``cycles`` (default: None).

    Raises:
        ValueError: An argument is out of range, the first cycle has no steps, or a cycle is too short for its warmup.
        TypeError: ``cycle`` is no schedule that has a length.
    """

    cycle: Schedule
    _: KW_ONLY
    mult: Annotated[float, above(0)] = 1
    peak_decay: Annotated[float, within("(0, 1]")] = 1.0
    cycles: int | None = None
    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.cycle, Schedule) or self.cycle.steps is None:
            raise TypeError(f"cycle should be a schedule that has a length but is: {self.cycle!r}")
        as_steps("steps of the first cycle", self.cycle.steps, least=1)
        super().__post_init__()
        check_steps(self, "cycles", least=1)
        if self.lengths is not None:
            if self.mult != 1 or self.cycles is not None:
                raise ValueError(f"lengths should come without mult and cycles but is: {self.lengths}")
            lengths = tuple(as_steps(f"lengths[{i}]", length, least=1) for i, length in enumerate(self.lengths))
            if not lengths:
                raise ValueError("lengths should be one or more but is: ()")
            object.__setattr__(self, "lengths", lengths)
        # a whole number's powers are exact as an int
        if self.mult == int(self.mult):
            object.__setattr__(self, "mult", int(self.mult))
        self.cycle.resized(self._shortest)

    @property
    def overlaps(self) -> bool:  # type: ignore[override]
        return self.cycle.overlaps

    @property
    def steps(self) -> int | None:  # type: ignore[override]
        return None if self._count is None else self._total

    @property
    def _count(self) -> int | None:
        return self.cycles if self.lengths is None else len(self.lengths)

    @cached_property
    def _total(self) -> int:
        return sum(map(self._length, range(self._count or 0)))

    @property
    def _shortest(self) -> int:
        if self.lengths is not None:
            return min(self.lengths)
        if self.mult >= 1:
            return self._length(0)
        return 1 if self.cycles is None else self._length(self.cycles - 1)

    def _length(self, i: int) -> int:
        if self.lengths is not None:
            return self.lengths[i]
        return max(round((self.cycle.steps or 0) * self.mult**i), 1)

    def _find(self, step: float) -> tuple[int, int]:
        """The cycle that a step is in, and where it begins: counted, as a logarithm misses some by rounding."""
        if self.lengths is None and self.mult == 1:
            i = int(step // self._length(0))
            return i, i * self._length(0)
        i, begin, length = 0, 0, self._length(0)
        while step >= begin + length:
            if length == 1 and self.lengths is None and self.mult < 1:
                # all of the rest have one step
                return i + int(step) - begin, int(step)
            begin += length
            i += 1
            length = self._length(i)
        return i, begin

    def at(self, step: float, peak: float, base: float, lead: int = 0, tail: int = 0) -> float:
        if self.steps is not None and step >= self.steps:
            i = (self._count or 1) - 1
            begin = self.steps - self._length(i)
        else:
            i, begin = self._find(step)
        # only the first cycle can begin with a peak that a warmup has applied
        cycle = self.cycle.resized(self._length(i))
        return cycle.at(step - begin, peak * self.peak_decay**i, base, lead if i == 0 else 0)


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Up to the group's own learning rate and far down (https://arxiv.org/abs/1708.07120).

    The numbers are those of :class:`torch.optim.lr_scheduler.OneCycleLR` with ``max_lr`` the group's own: phases end
    on step ``pct_start * steps - 1`` and on ``steps - 1``; later steps stay there.

    Args:
        steps: Length of the cycle.
        pct_start: Part of it that goes up, in [0, 1] (default: 0.3).
        div_factor: It begins at 1 / div_factor, >= 1 (default: 25).
        final_div_factor: It ends at 1 / (div_factor * final_div_factor), >= 1 (default: 1e4).
        anneal_strategy: ``"cos"`` (default) or ``"linear"``.
        three_phase: Down as fast as up, then on to the end, instead of down to the end at once (default: False).
    """

    overlaps = False

    steps: int
    _: KW_ONLY
    pct_start: float = 0.3
    div_factor: Annotated[float, at_least(1)] = 25.0
    final_div_factor: Annotated[float, at_least(1)] = 1e4
    anneal_strategy: Literal["cos", "linear"] = "cos"
    three_phase: bool = False

    def __post_init__(self) -> None:
        check_steps(self, "steps", least=1)
        most = 0.5 if self.three_phase else 1.0
        within(f"[0, {most}]").check("pct_start", self.pct_start)
        super().__post_init__()
        one_of("anneal_strategy", self.anneal_strategy, ("cos", "linear"))

    @cached_property
    def _points(self) -> list[tuple[float, float]]:
        """(step, factor), between which it is annealed."""
        start = 1.0 / self.div_factor
        points = [(0.0, start), (max(self.pct_start * self.steps - 1, 0.0), 1.0)]
        if self.three_phase:
            points.append((max(2 * self.pct_start * self.steps - 2, 0.0), start))
        return [*points, (self.steps - 1.0, start / self.final_div_factor)]

    def at(self, step: float, peak: float, base: float, lead: int = 0, tail: int = 0) -> float:
        for (begin, low), (end, high) in zip(self._points, self._points[1:], strict=False):
            if step < end:
                p = (step - begin) / (end - begin)
                x = p if self.anneal_strategy == "linear" else 0.5 * (1.0 - math.cos(math.pi * p))
                return peak * (low + (high - low) * x)
        return peak * self._points[-1][1]


@dataclass(frozen=True)
class Cyclic(Schedule):
    """Triangles between the floor and the group's own learning rate (https://arxiv.org/abs/1506.01186).

    The numbers are those of :class:`torch.optim.lr_scheduler.CyclicLR` with ``max_lr`` the group's own and
    ``base_lr`` the floor.

    Args:
        step_size_up: Steps up (default: 2000).
        step_size_down: Steps down (default: None, as many).
        floor: Ratio of each group's own learning rate, or :class:`Absolute` (default: 0.1).
        mode: ``"triangular"`` (default), ``"triangular2"`` (half as high every cycle) or ``"exp_range"``
            (``gamma^step`` as high).
        gamma: In (0, 1], for "exp_range" (default: 1).
        steps: Length, after which the value stays (default: None, endless).
    """

    overlaps = False

    step_size_up: int = 2000
    step_size_down: int | None = None
    _: KW_ONLY
    floor: Ratio = 0.1
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    gamma: Annotated[float, within("(0, 1]")] = 1.0
    steps: int | None = None

    def __post_init__(self) -> None:
        check_steps(self, "step_size_up", "step_size_down", least=1)
        check_steps(self, "steps")
        super().__post_init__()
        one_of("mode", self.mode, ("triangular", "triangular2", "exp_range"))

    def at(self, step: float, peak: float, base: float, lead: int = 0, tail: int = 0) -> float:
        if self.steps is not None:
            step = min(step, self.steps)
        up = self.step_size_up
        down = self.step_size_down or up
        cycle, x = divmod(step, up + down)
        height = x / up if x <= up else (up + down - x) / down
        if self.mode == "triangular2":
            height /= 2**cycle
        elif self.mode == "exp_range":
            height *= self.gamma**step
        floor = resolve(self.floor, base)
        return floor + (max(peak, floor) - floor) * height
