"""What tests of the engine share besides the table: which of its rows, and with which arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from tests.cases import CASES, Case, loop, set_grads

interpreted = pytest.mark.interpreted

#: Rules that the engine treats differently: one count and an operator; none, and a first step of its own; several;
#: several on the device; launches of its own.
DIFFERENT = ("adamw", "sgd", "nadam", "asgd", "lamb")

each_case = pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=interpreted) for c in CASES])
#: For what is about Python more than about kernels: the interpreter, at milliseconds a program, takes fewer.
each_case_natively = pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[interpreted] if c.name in DIFFERENT else []) for c in CASES]
)
each_different_case = pytest.mark.parametrize("case", [c for c in CASES if c.name in DIFFERENT], ids=lambda c: c.name)


def _kernels() -> set[str]:
    richest: dict[tuple, tuple[int, str]] = {}
    for case in CASES:
        for name, kwargs in case.variants.items():
            if name != "fused" and not name.startswith("tensor_"):
                rule = case.cls.rule
                group = case.cls([Parameter(torch.zeros(1))], **kwargs).param_groups[0]
                key = rule.module, rule.group_variant(group)
                richest[key] = max(richest.get(key, (0, "")), (len(kwargs), f"{case.name}-{name}"))
    return {name for _, name in richest.values()}


#: One variant of every kernel that is compiled: that in which the most of its arithmetic takes part.
KERNELS = _kernels()
#: Cases, arguments and ids.
VARIANTS = [(case, kwargs, f"{case.name}-{name}") for case in CASES for name, kwargs in case.variants.items()]
#: All of them natively; interpreted, those of :data:`KERNELS`.
each_variant_natively = pytest.mark.parametrize(
    ("case", "kwargs"),
    [pytest.param(case, kw, id=name, marks=[interpreted] if name in KERNELS else []) for case, kw, name in VARIANTS],
)


def builders(case: Case) -> tuple[Callable[..., Optimizer], Callable[..., Optimizer]]:
    """What makes ours, and what makes the optimizer it stands for: torch's class, or the loop of one of our own."""
    return case.cls, case.stock if case.is_torchs else partial(loop, case)


def usual(case: Case, **more: Any) -> dict[str, Any]:
    """Those of these arguments that the optimizer has; with a momentum, so that all of them have a state."""
    if case.name == "adafactor" and "eps" in more:
        more["eps"] = (more["eps"], 1e-3)
    return {name: value for name, value in {"lr": 0.1, "momentum": 0.9, **more}.items() if case.has(name)}


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def a_step(optimizer: Optimizer, step: int = 0) -> None:
    set_grads(params_of(optimizer), step)
    optimizer.step()


def outcomes(case: Case, build: Callable[[Callable[..., Optimizer]], Optimizer]) -> list[Any]:
    """What happens with ours and with stock: the optimizer, or ``(type, message)`` of the error."""
    results: list[Any] = []
    for make in builders(case):
        try:
            results.append(build(make))
        except Exception as error:
            results.append((type(error), str(error)))
    return results
