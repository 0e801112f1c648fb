"""Measuring what steps cost: how they are timed, beside whom, and :func:`step_cost` of a model."""

from .cost import StepCost, StepCostRow, StepCostTorchRow
from .step_cost import step_cost

__all__ = ["StepCost", "StepCostRow", "StepCostTorchRow", "step_cost"]
