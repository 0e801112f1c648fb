"""What there is to measure: optimx's optimizers, what stands beside each, and the memory that its step must move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import optimx
from optimx.measuring.stock import source_of

#: A walk: what it reads a second time in a float32 step, in bytes a parameter, from those of the state.
READ_AGAIN: dict[str, Callable[[float], float]] = {
    "elementwise": lambda state: 0.0,
    # parameter, gradient and states once more, for the lengths
    "measured": lambda state: 8.0 + state,
    # the gradient for the sums; gradient and parameter for the length of the step
    "factored": lambda state: 12.0,
    # what is orthogonalized, in 16 bits: written, read for its norm, divided by it, read for the step
    "orthogonal": lambda state: 10.0,
}


class Cost(NamedTuple):
    """Bytes a float32 parameter of a matrix.

    Attributes:
        state: What the optimizer keeps.
        moved: What a step reads and writes.
        clipped: What a step with ``max_grad_norm`` reads and writes.
    """

    state: float
    moved: float
    clipped: float


def optimizers() -> list[str]:
    """Names of optimx's own optimizers, in the order of the alphabet."""
    base = optimx.MultiTensorStep
    things = {name: getattr(optimx, name) for name in optimx.__all__}
    ours = [name for name, thing in things.items() if isinstance(thing, type) and issubclass(thing, base)]
    return sorted((name for name in ours if things[name] is not base), key=str.lower)


def of_all_shapes() -> list[str]:
    """Names of those that take vectors, too."""
    return [name for name in optimizers() if getattr(optimx, name).rule.walk != "orthogonal"]


def cost_of(name: str, arguments: dict[str, Any]) -> Cost:
    """What the rule of an optimizer with these arguments says of its memory: its states, and how it walks over them."""
    param = torch.nn.Parameter(torch.empty(1024, 1024, device="meta"))
    optimizer = getattr(optimx, name)([param], **arguments)
    (group,), rule = optimizer.param_groups, optimizer.rule
    names = rule.state_names(rule.variant_of(rule.group_variant(group), param))
    states = [rule.new_state(state, param, group, optimizer.defaults) for state in names]
    state = sum(each.numel() * each.element_size() for each in states) / param.numel()
    # parameter and gradient are read, the parameter is written, states are read and written
    moved = 12 + 2 * state + READ_AGAIN[rule.walk](state)
    # the norm is one more pass over the gradients; a factored walk has it from its sums
    return Cost(state, moved, moved + (0 if rule.walk == "factored" else 4))


def stock_of(name: str) -> tuple[str, Callable[..., torch.optim.Optimizer]]:
    """What an optimizer is held against: where that is from, and what makes it.

    It is torch's class; where torch has none, the one of :mod:`optimx.measuring.foreach`; where that has none, see
    :func:`optimx.measuring.stock.looped`.
    """
    module, make = source_of(getattr(optimx, name))
    return "its plain loop" if module is None else module.__name__, make
