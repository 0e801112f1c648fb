"""All sections of a config together, and the model that they are for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..config import Config, GroupsConfig, ScheduleConfig
from ..config.errors import Problems
from .groups import resolve_groups
from .optimizer import Recipe, resolve_optimizer
from .schedule import ScheduleRecipe, resolve_schedule

__all__ = ["Recipes", "resolve"]


@dataclass(frozen=True)
class Recipes:
    """What a config makes of a model.

    Attributes:
        optimizer: That can be made.
        groups: The parameter groups that it is made with.
        groups_config: Their section, resolved.
        schedule: That can be made of the optimizer; None if the config has none.
    """

    optimizer: Recipe
    groups: list[dict[str, Any]]
    groups_config: GroupsConfig
    schedule: ScheduleRecipe | None


def resolve(config: Config, model: nn.Module, bad: Collection[str] = ()) -> Recipes | None:
    """Check the sections, which are of the right types, and turn them into what makes optimizer and scheduler.

    Args:
        config: Of the sections.
        model: Whose parameters.
        bad: Paths that the config has, but with values that could not be read.

    Returns:
        None if what is needed could not be read, and nothing else is to be told.

    Raises:
        ConfigError: Everything that is wrong with them.
    """
    problems = Problems()
    scale = 1.0 if config.batch_scaling is None else config.batch_scaling.factor
    optimizer = groups = schedule = None
    with problems.collected():
        optimizer = resolve_optimizer(config.optimizer, model, scale)
    with problems.collected():
        groups = resolve_groups(config.groups, model, optimizer, scale)
    rehearse = None
    if optimizer is not None and groups is not None:
        rehearse = partial(optimizer.rehearse, groups[0])
    # how long an epoch is, is no schedule yet
    section = config.schedule
    if section is not None and section != ScheduleConfig(steps_per_epoch=section.steps_per_epoch):
        with problems.collected():
            schedule = resolve_schedule(section, rehearse, [*bad, *(problem.path for problem in problems)])
    problems.raise_if_any()
    if optimizer is None or groups is None:
        return None
    return Recipes(optimizer, *groups, schedule)
