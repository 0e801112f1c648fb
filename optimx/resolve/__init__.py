"""Sections of a config, checked and turned into what makes an optimizer, its groups and a scheduler."""

from .checks import attempt
from .optimizer import OptimizerRecipe, resolve_groups, resolve_optimizer
from .schedule import ScheduleRecipe, resolve_schedule

__all__ = ["OptimizerRecipe", "ScheduleRecipe", "attempt", "resolve_groups", "resolve_optimizer", "resolve_schedule"]
