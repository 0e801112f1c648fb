"""What an optimizer is measured beside: every way in which torch takes its steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from . import foreach
from .packages import check_compiles

__all__ = ["COMPILED", "COPY", "DEFAULT", "FOREACH", "FUSED", "LOOP", "MOST_COMPILED", "OURS", "STOCK", "compiled_step",
           "looped", "source_of", "ways"]  # fmt: skip

DEFAULT, FOREACH, FUSED = "torch default", "torch foreach", "torch fused"
#: The step of torch's foreach implementation under ``torch.compile``.
COMPILED = "torch.compile foreach"
#: Of an optimizer that neither torch nor :mod:`optimx.measuring.foreach` has: the loop that ours falls back to.
LOOP = "plain loop"
STOCK = (DEFAULT, FOREACH, FUSED, COMPILED, LOOP)
OURS, COPY = "optimx", "copy"

#: torch.compile writes a step out tensor by tensor: some 200 take it more than a minute.
MOST_COMPILED = 200


def ways(cls: type[Optimizer]) -> dict[str, Callable[..., Optimizer]]:
    """What makes stock's optimizer for one of ours, by the name of the implementation.

    Stock is torch's class; where torch has none, that of :mod:`optimx.measuring.foreach`; where that has none, the loop
    over parameters that ours falls back to. The one under :data:`COMPILED` is for :func:`compiled_step`.
    """
    made: dict[str, Callable[..., Optimizer]] = {}
    module, stock = source_of(cls)
    if module is torch.optim:
        flags = inspect.signature(stock).parameters
        made[DEFAULT] = stock
        for name, flag in ((FOREACH, "foreach"), (FUSED, "fused")):
            if flag in flags:
                made[name] = partial(stock, **{flag: True})
    else:
        made[LOOP if module is None else FOREACH] = stock
    if FOREACH in made:
        made[COMPILED] = made[FOREACH]
    return made


def source_of(cls: type[Optimizer]) -> tuple[Any, Callable[..., Optimizer]]:
    """The module that stock is from, and what makes it; None and :func:`looped` where nobody has it."""
    for module in (torch.optim, foreach):
        if hasattr(module, cls.__name__):
            return module, getattr(module, cls.__name__)
    return None, partial(looped, cls)


def looped(cls: Any, params: Any, **arguments: Any) -> Optimizer:
    """Our optimizer, stepped by the plain loop over parameters that it falls back to."""
    optimizer = cls(params, **arguments)
    optimizer.step = optimizer._stock_step
    return optimizer


def compiled_step(*optimizers: Optimizer) -> Callable[[], None]:
    """Their steps as torch.compile has them. What was compiled before in this process is forgotten.

    Raises:
        Missing: They have more than :data:`MOST_COMPILED` tensors together.
    """
    tensors = sum(len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups)
    check_compiles(tensors, MOST_COMPILED)
    # optimizers of a class share their code, of which torch.compile keeps a few versions and then gives up
    torch.compiler.reset()
    steps = [torch.compile(optimizer.step) for optimizer in optimizers]

    def step() -> None:
        for each in steps:
            each()

    return step
