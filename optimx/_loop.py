"""What optimizers share of which torch has no class: checked arguments, and the plain loop over parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _compat
from ._checks import at_least, within
from ._engine.optimizer import evaluated
from ._engine.rule import UpdateRule


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


class FormulaLoop(Optimizer):
    """The step of a rule, one parameter after the other, by its formula: on any device, in any layout.

    It goes where torch's class would be, after :class:`MultiTensorStep` among the bases, in an optimizer that torch
    does not have. What no bucket takes falls back to it.

    Raises:
        RuntimeError: In a step, a gradient is sparse or a parameter is complex.
    """

    rule: ClassVar[UpdateRule]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = evaluated(closure)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step(param, param.grad, group)
        return loss

    def _step(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        rule, state = self.rule, self.state[param]
        if grad.layout is not torch.strided or param.is_complex():
            kind = "complex parameters" if param.is_complex() else "sparse gradients"
            raise RuntimeError(f"{type(self).__name__} does not support {kind}")
        variant = rule.variant_of(rule.group_variant(group), param)
        values = tuple(float(value) if hasattr(value, "__array__") else value for value in rule.values(group))
        values = rule.values_for(values, param.dtype, rule.is_first(state, values))
        for name in rule.scalars:
            if not isinstance(state.get(name), Tensor):
                value = float(state[name]) if name in state else rule.new_scalar(name, group)
                device = param.device if rule.scalars_on_device or group.get("capturable") else "cpu"
                state[name] = torch.full((), value, dtype=_compat.scalar_dtype(False), device=device)
        for name in rule.state_names(variant):
            if not isinstance(state.get(name), Tensor):
                state[name] = rule.new_state(name, param, group, self.defaults)
        row, counts = rule.prepare(values, tuple(float(state[name]) for name in rule.scalars))
        dtype = torch.float64 if param.dtype is torch.float64 else torch.float32
        roles = [param, *(state[name] for name in rule.state_names(variant))]
        p, *states = (role.detach().to(dtype, copy=True).reshape(-1) for role in roles)
        g = grad.to(dtype).reshape(-1) * row[0]
        rule.formula(variant, row, p, g, states, tuple(torch.empty_like(p) for _ in range(3)))
        for role, new in zip(roles, (p, *states), strict=True):
            role.copy_(new.view(role.shape))
        for name, count in zip(rule.scalars, counts, strict=True):
            state[name].fill_(count)
