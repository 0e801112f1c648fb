"""Sections of a config, checked and turned into what makes an optimizer, its groups and a scheduler."""

from .checks import attempt
from .groups import resolve_groups
from .optimizer import CompositeRecipe, OptimizerRecipe, resolve_optimizer
from .schedule import ScheduleRecipe, resolve_schedule
from .search import Dimension, resolve_search
from .whole import Recipes, resolve

__all__ = ["CompositeRecipe", "Dimension", "OptimizerRecipe", "Recipes", "ScheduleRecipe", "attempt", "resolve",
           "resolve_groups", "resolve_optimizer", "resolve_schedule", "resolve_search"]  # fmt: skip
