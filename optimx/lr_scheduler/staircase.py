"""A schedule that changes once an epoch, or on every so many steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .schedule import Schedule, check_schedules, check_steps


@dataclass(frozen=True)
class Staircase(Schedule):
    """A schedule that changes on every ``every`` steps, and in between keeps its value: once an epoch, for one.

    Args:
        schedule: The schedule, in steps as others.
        every: >= 1.

    Raises:
        ValueError: ``every`` is < 1.
        TypeError: ``schedule`` is no schedule.
    """

    schedule: Schedule
    every: int

    def __post_init__(self) -> None:
        check_schedules("schedule", (self.schedule,))
        check_steps(self, "every", least=1)

    @property
    def steps(self) -> int | None:  # type: ignore[override]
        return self.schedule.steps

    @property
    def overlaps(self) -> bool:  # type: ignore[override]
        return self.schedule.overlaps

    def resized(self, steps: int) -> Schedule:
        return replace(self, schedule=self.schedule.resized(steps))

    def at(self, step: float, peak: float, base: float, lead: int = 0, tail: int = 0) -> float:
        return self.schedule.at(step - step % self.every, peak, base, lead, tail)
