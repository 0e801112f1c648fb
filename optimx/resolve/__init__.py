"""Sections of a config, checked and turned into what makes an optimizer, its groups and a scheduler."""

from .checks import attempt
from .groups import resolve_groups
from .optimizer import CompositeRecipe, OptimizerRecipe, resolve_optimizer
from .schedule import ScheduleRecipe, resolve_schedule

__all__ = ["CompositeRecipe", "OptimizerRecipe", "ScheduleRecipe", "attempt", "resolve_groups", "resolve_optimizer",
           "resolve_schedule"]  # fmt: skip
