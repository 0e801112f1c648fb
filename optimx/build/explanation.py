"""What a build is made of, in tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .._table import aligned
from ..config import ScheduleConfig
from ..explain import Explanation, explain
from ..lr_scheduler import ScheduleLR
from ..param_groups import GroupsDescription, describe

__all__ = ["BuildExplanation", "explain_build", "is_function_of_step"]


@dataclass(frozen=True)
class BuildExplanation:
    """What :meth:`Build.explain` found; prints as tables.

    Attributes:
        groups: The parameter groups; the learning rates are those that the schedule's factors are of.
        backends: What their steps run on.
        scheduler: Its class, empty if there is none.
        rates: Step, least and greatest learning rate of the groups: at the beginning, at the end of the warmup, in
            the middle, on the last step and after it. Empty for a scheduler that is no function of the step.
    """

    groups: GroupsDescription
    backends: Explanation
    scheduler: str
    rates: tuple[tuple[int, float, float], ...]

    @property
    def table(self) -> list[tuple[str, ...]]:
        """The learning rates as texts, after a row with the names of the columns."""
        rows = [(f"{step:,}", f"{least:.4g}", f"{greatest:.4g}") for step, least, greatest in self.rates]
        return [("step", "least lr", "greatest lr"), *rows]

    def __str__(self) -> str:
        parts = [str(self.groups), str(self.backends)]
        if self.scheduler:
            parts.append("\n".join([self.scheduler, *(aligned(self.table, range(3)) if self.rates else ())]))
        return "\n\n".join(parts)


def explain_build(
    model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None, section: ScheduleConfig | None
) -> BuildExplanation:
    """Of the parts of a :class:`Build`."""
    groups = [_before_any_schedule(group) for group in optimizer.param_groups]
    name = "" if scheduler is None else type(scheduler).__name__
    rates: tuple[tuple[int, float, float], ...] = ()
    if scheduler is not None and section is not None and is_function_of_step(scheduler):
        rates = tuple(_rate(scheduler, step) for step in _milestones(scheduler, section))
    return BuildExplanation(describe(model, groups), explain(optimizer), name, rates)


def is_function_of_step(scheduler: LRScheduler | None) -> TypeGuard[ScheduleLR]:
    """Whether its values can be foretold: :class:`ScheduleLR`, but around no scheduler of torch's."""
    return isinstance(scheduler, ScheduleLR) and getattr(scheduler, "after", None) is None


def _before_any_schedule(group: Mapping[str, Any]) -> dict[str, Any]:
    """The group at the learning rate that the schedule's factors are of."""
    told = dict(group)
    told["lr"] = told.pop("initial_lr", told.get("lr"))
    return told


def _milestones(scheduler: Any, section: ScheduleConfig) -> list[int]:
    warmup = section.warmup["steps"] if isinstance(section.warmup, dict) else int(section.warmup or 0)
    total = scheduler.schedule.steps if section.total is None else int(section.total)
    return sorted({0, warmup, *(() if not total else (total // 2, total - 1, total))})


def _rate(scheduler: Any, step: int) -> tuple[int, float, float]:
    (rates,) = scheduler.preview(1, step)
    return step, min(rates), max(rates)
