"""Sections of a config, checked and turned into what makes an optimizer, its groups and a scheduler."""

from .checks import attempt
from .optimizer import OptimizerPlan, plan_groups, plan_optimizer
from .schedule import SchedulePlan, plan_schedule

__all__ = ["OptimizerPlan", "SchedulePlan", "attempt", "plan_groups", "plan_optimizer", "plan_schedule"]
