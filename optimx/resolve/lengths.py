"""Lengths: 50 steps, 0.05 of the total, "2ep"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config.errors import Problems, join
from ..config.sections import EPOCHS, Duration
from ..config.values import convert

__all__ = ["Clock", "in_steps"]


@dataclass
class Clock:
    """What lengths are measured by."""

    steps_per_epoch: int | None
    total: int | None = None
    #: whether a fraction has been taken of it
    used: bool = False
    #: paths of those that the config has, but wrong: a problem of their own, which is told already
    bad: set[str] = field(default_factory=set)

    def steps(self, value: Any, path: str, problems: Problems) -> int | None:
        """50, 0.05 (of the total) or "2ep" as steps; None with a problem, or with one that is told."""
        if isinstance(value, str):
            if self.steps_per_epoch is not None:
                return round(float(EPOCHS.fullmatch(value)[1]) * self.steps_per_epoch)  # type: ignore[index]
            unit, rule = "schedule.steps_per_epoch", "should be steps, as there is no schedule.steps_per_epoch,"
        elif value == 0 or value >= 1:
            return int(value)
        elif self.total is not None:
            self.used = True
            return round(value * self.total)
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
