"""What tests of the engine share besides the table: which of its rows they run over, and which of them interpreted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from operator import attrgetter
from typing import Any

import pytest
from torch import Tensor
from torch.optim import Optimizer

from tests.cases import BY_NAME, CASES, VARIANTS, Case, Variant, loop, set_grads

interpreted = pytest.mark.interpreted


def first_of(variants: Iterable[Variant], key: Callable[[Variant], Any]) -> list[Variant]:
    """The first variant of each kind."""
    found: dict[Any, Variant] = {}
    for variant in variants:
        found.setdefault(key(variant), variant)
    return [*found.values()]


#: What can be held against stock.
BESIDE_STOCK = [variant for variant in VARIANTS if variant.in_stock]
_FORMULAS = [variant for variant in VARIANTS if variant.is_formula]
#: One variant of every kernel that is compiled: that in which the most of its arithmetic takes part.
KERNELS = first_of(sorted(_FORMULAS, key=lambda variant: -len(variant.kwargs)), attrgetter("kernel"))
#: Every optimizer, and its variants that keep something else, or begin in another way.
STATES = first_of((variant for variant in _FORMULAS if variant.in_stock), attrgetter("kept"))
#: Of these, one of each kind that the engine treats differently.
PLANS = first_of(STATES, attrgetter("plan"))
#: The optimizers of :data:`PLANS`; and without those whose tiles take the interpreter five times as long as a vector.
KINDS = [BY_NAME[name] for name in dict.fromkeys(variant.case.name for variant in PLANS)]
QUICK = [case for case in KINDS if case.cls.rule.walk != "factored"]


def pick(*names: str) -> list[Variant]:
    """Variants by their ids."""
    return [next(variant for variant in VARIANTS if variant.id == name) for name in names]


def params(variants: Iterable[Variant], taken: Collection[Variant | Case], **more: Any) -> list[Any]:
    """Parameters ``case`` and ``kwargs`` of a test, with further arguments.

    Args:
        taken: Those that run interpreted as well, or their optimizers: the interpreter, at milliseconds a program,
            takes fewer.
    """
    names = {entry.id if isinstance(entry, Variant) else entry.name for entry in taken}
    return [
        pytest.param(case, {**kwargs, **more}, id=f"{case.name}-{name}", marks=[interpreted] * bool(names & {*labels}))
        for case, name, kwargs in variants
        for labels in [(case.name, f"{case.name}-{name}")]
    ]


def with_flags(*flags: dict[str, bool]) -> list[Variant]:
    """The optimizers that have these arguments, with them."""
    return [Variant(case, str(kwargs), kwargs) for kwargs in flags for case in CASES if all(map(case.has, kwargs))]


def each(variants: Iterable[Variant], taken: Collection[Variant | Case], **more: Any) -> pytest.MarkDecorator:
    """Decorate a test of ``case`` and ``kwargs``, see :func:`params`."""
    return pytest.mark.parametrize(("case", "kwargs"), params(variants, taken, **more))


def each_of(cases: Iterable[Case], taken: Collection[Case] = QUICK) -> pytest.MarkDecorator:
    """Decorate a test of ``case``; ``taken`` run interpreted as well."""
    marked = [pytest.param(case, id=case.name, marks=[interpreted] * (case in taken)) for case in cases]
    return pytest.mark.parametrize("case", marked)


each_case = each_of(CASES)
each_case_and_walk = each_of(CASES, KINDS)
#: For what the kernels have little part in: no count, and two of them.
each_case_thinly = each_of(CASES, [BY_NAME["sgd"], BY_NAME["nadam"]])
each_case_natively = each_of(CASES, ())
each_kind = each_of(KINDS, ())
each_variant = each(BESIDE_STOCK, KERNELS)


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
