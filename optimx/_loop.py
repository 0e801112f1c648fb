"""What our own optimizers share, of which torch has no class: checked arguments, and the plain loop over parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._checks import at_least, within


def check_at_least_zero(**values: Any) -> None:
    """Raise ValueError for a number below 0 (or NaN), or a tensor of several."""
    for name, value in values.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name} should have one element but has: {value.numel()}")
        at_least(0).check(name, value)


def check_betas(betas: Sequence[float]) -> None:
    """Raise ValueError unless they are two numbers in [0, 1)."""
    if len(betas) != 2:
        raise ValueError(f"betas should be two numbers but is: {betas}")
    for i, beta in enumerate(betas):
        within("[0, 1)").check(f"betas[{i}]", beta)


def each_parameter(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], Tensor, Tensor, dict[str, Any]]]:
    """Group, parameter, gradient (negated to maximize) and state of everything that has a gradient."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise RuntimeError(f"{type(optimizer).__name__} does not support sparse gradients")
            yield group, param, -param.grad if group["maximize"] else param.grad, optimizer.state[param]


def as_number(value: Any) -> Any:
    """A hyperparameter that operators take like a number, whatever the device: a tensor has no dimension then."""
    return value.reshape(()) if isinstance(value, Tensor) else value


def as_real(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Complex tensors as pairs of real numbers, which torch's optimizers take to be independent."""
    return tuple(torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors)
