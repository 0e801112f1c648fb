"""The table of what is tested: one row an optimizer; and the little that all tests of the engine share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import optimx


@dataclass(frozen=True)
class Case:
    """An optimizer and the torch class it replaces.

    Attributes:
        cls, stock: Ours and torch's.
        variants: Arguments that lead to different arithmetic, by a readable id.
    """

    cls: type[torch.optim.Optimizer]
    stock: type[torch.optim.Optimizer]
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.cls.__name__.lower()


_ADAM_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "decay": {"weight_decay": 0.1},
    "amsgrad": {"weight_decay": 0.1, "amsgrad": True},
    "maximize": {"weight_decay": 0.1, "maximize": True},
    "betas": {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6},
    "beta1_zero": {"betas": (0.0, 0.9)},
    "tensor_lr": {"lr": torch.tensor(0.01)},
    "tensor_betas": {"lr": torch.tensor(0.01), "betas": (torch.tensor(0.8), torch.tensor([0.95]))},
    "fused": {"fused": True, "weight_decay": 0.1},
}

CASES = [
    Case(optimx.Adam, torch.optim.Adam, _ADAM_VARIANTS),
    Case(optimx.AdamW, torch.optim.AdamW, _ADAM_VARIANTS),
]

#: Cases for tests that one variant each is enough for.
by_case = [(case, case.name) for case in CASES]

#: Shapes that bite with chunks of 128 elements.
SHAPES = [(), (0,), (1,), (63,), (127,), (128,), (129,), (3, 5, 7), (16, 24)]

#: Same formula, computed in float32 (float64) by both, in another order: a few roundings a step. 16 bits, against a
#: reference that rounds what is stored once a step (see `train_rounded`): an ulp where a rounding falls the other way.
CLOSE: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 2e-6, "atol": 2e-7},
    torch.bfloat16: {"rtol": 4 * 2**-7, "atol": 1e-5},
    torch.float16: {"rtol": 4 * 2**-10, "atol": 1e-6},
}
HALF = (torch.bfloat16, torch.float16)


def make_params(
    shapes: Iterable[Sequence[int]] = SHAPES,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(tuple(s), generator=generator).to(device, dtype)) for s in shapes]


def set_grads(params: Iterable[Tensor], step: int, scale: float = 1.0, skip: Sequence[int] = ()) -> None:
    """Fresh gradients that depend on ``step`` only; none for the parameters at indices ``skip``."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator).mul(scale).to(param.device, param.dtype)
        param.grad = None if i in skip else torch.empty_like(param).copy_(grad)


def twins(
    case: Case, params: Sequence[Tensor], kwargs: dict[str, Any], groups: Callable[[Any], Any] = list, **ours: Any
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer, list[Parameter]]:
    """Our optimizer on ``params`` and the oracle, stock's for-loop, on copies: ``(ours, stock, stock's params)``.

    In 16 bits stock's loop rounds after each of its ten operations, so there the copies are float64.
    """
    copies = []
    for param in params:
        copy = param.detach().clone(memory_format=torch.preserve_format)
        copies.append(Parameter(copy.double() if param.dtype in HALF else copy))
    kwargs = deepcopy(kwargs)
    loop = {key: value for key, value in kwargs.items() if key != "fused"}
    return (
        case.cls(groups(params), **deepcopy(kwargs), **ours),
        case.stock(groups(copies), **loop, foreach=False),
        copies,
    )


def assert_same(
    ours: torch.optim.Optimizer, stock: torch.optim.Optimizer, tolerance: dict[str, float] | None = None
) -> None:
    """Parameters and state of two optimizers, in order."""
    pairs = zip(
        (p for g in ours.param_groups for p in g["params"]),
        (p for g in stock.param_groups for p in g["params"]),
        strict=True,
    )
    for i, (a, b) in enumerate(pairs):
        close = tolerance or CLOSE[a.dtype]
        torch.testing.assert_close(a, b, **close, check_dtype=a.dtype not in HALF, msg=lambda m, i=i: f"{i}: {m}")
        mine, theirs = ours.state.get(a, {}), stock.state.get(b, {})
        assert mine.keys() == theirs.keys(), f"parameter {i}"
        for key, value in theirs.items():
            torch.testing.assert_close(
                mine[key],
                value,
                **close,
                check_device=key != "step",
                check_dtype=a.dtype not in HALF,
                msg=lambda m, i=i, k=key: f"{k} of {i}: {m}",
            )


def train_rounded(ours: torch.optim.Optimizer, stock: torch.optim.Optimizer, steps: int, dtype: torch.dtype) -> None:
    """Like `train`; what a float64 oracle stores is rounded to ``dtype`` once a step, as our optimizers store it."""
    copies = [p for g in stock.param_groups for p in g["params"]]
    for step in range(steps):
        train([ours], 1, first=step)
        set_grads(copies, step)
        for copy in copies:
            copy.grad = copy.grad.to(dtype).to(copy.dtype)
        stock.step()
        for copy in copies if dtype in HALF else ():
            stored = [copy.data, *(v for k, v in stock.state[copy].items() if k != "step")]
            for tensor in stored:
                tensor.copy_(tensor.to(dtype))


def train(optimizers: Sequence[torch.optim.Optimizer], steps: int, first: int = 0, **kwargs: Any) -> None:
    """Step the optimizers side by side on the same gradients."""
    for step in range(first, first + steps):
        for optimizer in optimizers:
            set_grads([p for g in optimizer.param_groups for p in g["params"]], step, **kwargs)
            optimizer.step()
