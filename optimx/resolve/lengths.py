"""Lengths: 50 steps, 0.05 of the total, "2ep"."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config.errors import Problems, join
from ..config.sections import EPOCHS, Duration
from ..config.values import convert

__all__ = ["ROUNDING", "Clock", "in_steps"]

#: By convention: what its project makes of a number of steps that is not whole, where that is not the nearest one.
ROUNDING: dict[str | None, Callable[[float], int]] = {
    "hf": math.ceil,
    "hf-cosine-warmup": math.ceil,
    # a step is in a phase that ends after it; products of whole numbers may be off by rounding
    "timm": lambda steps: math.ceil(steps - 1e-6),
}


@dataclass
class Clock:
    """What lengths are measured by."""

    steps_per_epoch: int | None
    total: int | None = None
    #: makes whole steps
    rounding: Callable[[float], int] = round
    #: whether a fraction has been taken of it
    used: bool = False
    #: paths of those that the config has, but wrong: a problem of their own, which is told already
    bad: set[str] = field(default_factory=set)

    def steps(self, value: Any, path: str, problems: Problems) -> int | None:
        """50, 0.05 (of the total) or "2ep" as steps; None with a problem, or with one that is told."""
        if isinstance(value, str):
            if self.steps_per_epoch is not None:
                number, more = EPOCHS.fullmatch(value).groups()  # type: ignore[union-attr]
                steps = self.rounding(float(number) * self.steps_per_epoch) + int((more or "0").replace(" ", ""))
                return max(steps, 0)
            unit, rule = "schedule.steps_per_epoch", "should be steps, as there is no schedule.steps_per_epoch,"
        elif value == 0 or value >= 1:
            return int(value)
        elif self.total is not None:
            self.used = True
            return self.rounding(value * self.total)
        else:
            unit = "schedule.total"
            rule = "should be steps or epochs, as there is no schedule.total to take a fraction of,"
        if unit not in self.bad:
            problems.add(path, rule, value)
        return None

    def length(self, value: Any, path: str, problems: Problems) -> int | None:
        """The same of a value that nobody has checked."""
        before = len(problems)
        value = convert(value, Duration, path, problems)
        return None if len(problems) > before else self.steps(value, path, problems)


def in_steps(value: Any, path: str, clock: Clock, problems: Problems) -> Any:
    """A copy with epochs as steps, anywhere within."""
    if isinstance(value, str) and EPOCHS.fullmatch(value):
        return clock.steps(value, path, problems)
    if isinstance(value, (list, tuple)):
        return [in_steps(item, f"{path}[{i}]", clock, problems) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {key: in_steps(item, join(path, key), clock, problems) for key, item in value.items()}
    return value
