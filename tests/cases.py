"""The table of what is tested: one row an optimizer; and the little that all tests of the engine share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import optimx
from optimx._engine.flags import OF_UPDATES
from optimx.lamb import LAMBLoop
from optimx.lion import LionLoop
from optimx.schedule_free_adamw import ScheduleFreeAdamWLoop
from optimx.schedule_free_sgd import ScheduleFreeSGDLoop
from tests.reference.adadelta import adadelta
from tests.reference.adafactor import adafactor
from tests.reference.adagrad import adagrad
from tests.reference.adam import adam
from tests.reference.adamax import adamax
from tests.reference.asgd import asgd
from tests.reference.flagged import FlaggedLoop
from tests.reference.lamb import lamb
from tests.reference.lion import lion
from tests.reference.nadam import nadam
from tests.reference.radam import radam
from tests.reference.rmsprop import rmsprop
from tests.reference.rprop import rprop
from tests.reference.schedule_free_adamw import schedule_free_adamw
from tests.reference.schedule_free_sgd import schedule_free_sgd
from tests.reference.sgd import sgd


@dataclass(frozen=True)
class Case:
    """An optimizer and what it replaces.

    Attributes:
        cls: Ours.
        stock: Torch's class; for optimizers of our own, the plain loop that they fall back to.
        reference: The paper's algorithm on lists of floats.
        variants: Arguments that lead to different arithmetic, by a readable id; also those that stock has not.
        other: Hyperparameters for a second group.
        stored: Hyperparameters that a state begins with, in the dtype of the parameter.
        takes_complex: Whether it updates complex parameters.
    """

    cls: type[torch.optim.Optimizer]
    stock: type[torch.optim.Optimizer]
    reference: Callable[..., list[float]]
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)
    stored: tuple[str, ...] = ()
    takes_complex: bool = True

    @property
    def name(self) -> str:
        """That of its file, by which configs name it."""
        return self.cls.__module__.rpartition(".")[2]

    @property
    def is_torchs(self) -> bool:
        """Whether torch has a class of this name."""
        return self.stock.__module__.startswith("torch.")

    def has(self, argument: str) -> bool:
        """Whether torch's class (or ours, where torch has none) has this argument."""
        return argument in inspect.signature(self.stock if self.is_torchs else self.cls).parameters

    def rounded(self, kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """The arguments, with what a state begins with rounded to ``dtype``, and an eps that depends on it told."""
        defaults = inspect.signature(self.cls).parameters
        values = {name: float(kwargs.get(name, defaults[name].default)) for name in self.stored}
        rounded = {**kwargs, **{name: float(torch.tensor(value).to(dtype)) for name, value in values.items()}}
        if self.name == "adafactor" and kwargs.get("variant", "torch") == "torch":
            eps1, eps2 = kwargs.get("eps", (None, 1e-3))
            rounded["eps"] = (torch.finfo(dtype).eps if eps1 is None else eps1, eps2)
        return rounded

    def state_names(self, param: Tensor | None = None, **kwargs: Any) -> tuple[str, ...]:
        """State tensors that are not scalar, with these arguments; of a vector, if there is no ``param``."""
        param = torch.zeros(1) if param is None else param
        optimizer: Any = self.cls([Parameter(torch.zeros(1))], **kwargs)
        rule = optimizer.rule
        return rule.state_names(rule.variant_of(rule.group_variant(optimizer.param_groups[0]), param))


class Variant(NamedTuple):
    """An optimizer and arguments of it.

    What a test says of it is derived from the rule: two variants of one kernel, of one kind of state, or of one kind of
    plan are told apart by nothing else.
    """

    case: Case
    name: str
    kwargs: dict[str, Any]

    @property
    def id(self) -> str:
        return f"{self.case.name}-{self.name}"

    @property
    def in_stock(self) -> bool:
        """Whether stock has all of these arguments."""
        return all(map(self.case.has, self.kwargs))

    @property
    def is_formula(self) -> bool:
        """Whether the numbers are others, not only who computes them, or in what hyperparameters are given."""
        return "fused" not in self.kwargs and not self.name.startswith("tensor_")

    @property
    def kernel(self) -> tuple[Any, ...]:
        """What is compiled: of a vector, where a kernel also depends on the shape."""
        return self.case.cls.rule.module, *self._of_group()[0]

    @property
    def kept(self) -> tuple[Any, ...]:
        """What is kept of a parameter, and whether its first step is another than those after it."""
        variant, is_first = self._of_group()
        return self.case.name, self.case.cls.rule.state_names(variant), is_first

    @property
    def plan(self) -> tuple[Any, ...]:
        """What the engine treats differently: the walk, how many scalars and where, a first step, nothing kept."""
        rule, (variant, is_first) = self.case.cls.rule, self._of_group()
        return (
            rule.walk_of(variant),
            len(rule.scalars),
            rule.scalars_on_device,
            is_first,
            bool(rule.state_names(variant)),
        )

    def _of_group(self) -> tuple[tuple[bool, ...], bool]:
        rule: Any = self.case.cls.rule
        (group,) = self.case.cls([Parameter(torch.zeros(1))], **self.kwargs).param_groups
        return rule.group_variant(group), rule.is_first({}, rule.values(group))


#: Where eps is 1e-8 its place does not show: each has a variant with one that does.
_DECAY: dict[str, dict[str, Any]] = {
    "default": {},
    "decay": {"weight_decay": 0.1},
    "maximize": {"weight_decay": 0.1, "maximize": True},
    "tensor_lr": {"lr": torch.tensor(0.01)},
}
_ADAM: dict[str, dict[str, Any]] = {
    **_DECAY,
    "betas": {"lr": 0.01, "betas": (0.8, 0.95), "eps": 0.1},
    "beta1_zero": {"betas": (0.0, 0.9)},
}
_AMSGRAD: dict[str, dict[str, Any]] = {
    **_ADAM,
    "amsgrad": {"weight_decay": 0.1, "amsgrad": True},
    "tensor_betas": {"lr": torch.tensor(0.01), "betas": (torch.tensor(0.8), torch.tensor([0.95]))},
    "fused": {"fused": True, "weight_decay": 0.1},
}
_DECOUPLED: dict[str, dict[str, Any]] = {
    **_ADAM,
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True, "lr": 0.01},
    "decoupled_maximize": {"weight_decay": 0.1, "decoupled_weight_decay": True, "lr": 0.01, "maximize": True},
}
#: Flags, where decay is decoupled.
_FLAGS: dict[str, dict[str, Any]] = {
    "cautious_decay": {"lr": 0.05, "weight_decay": 0.5, "cautious_weight_decay": True},
    "cautious": {"lr": 0.05, "weight_decay": 0.5, "cautious": True},
    "cautious_both": {"lr": 0.05, "weight_decay": 0.5, "cautious": True, "cautious_weight_decay": True},
    "cautious_last": {"lr": 0.05, "weight_decay": 0.5, "cautious": "last_mean"},
}
#: And where there is an average of squares.
_CLIPPED: dict[str, dict[str, Any]] = {
    **_FLAGS,
    # averages of squares that are slow to follow
    "clipped": {"lr": 0.05, "weight_decay": 0.5, "betas": (0.9, 0.8), "update_clipping": True},
    "clipped_cautious": {"lr": 0.05, "betas": (0.9, 0.8), "eps": 0.01, "update_clipping": True, "cautious": True},
}
_DECOUPLED_FLAGS: dict[str, dict[str, Any]] = {
    name: {**flags, "decoupled_weight_decay": True} for name, flags in _CLIPPED.items()
}
_BETAS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.3, "betas": (0.5, 0.6)}

CASES = [
    Case(
        optimx.AdamW,
        torch.optim.AdamW,
        partial(adam, decoupled_weight_decay=True, weight_decay=1e-2),
        {
            **_AMSGRAD,
            **_CLIPPED,
            "clipped_amsgrad": {"amsgrad": True, "betas": (0.9, 0.8), "update_clipping": True, "cautious": True},
        },
        _BETAS,
    ),
    Case(
        optimx.Adam,
        torch.optim.Adam,
        adam,
        {
            **_AMSGRAD,
            "cautious": {"weight_decay": 0.1, "lr": 0.01, "cautious": True, "maximize": True},
            "cautious_last": {"weight_decay": 0.1, "lr": 0.01, "cautious": "last_mean"},
            "clipped": {"weight_decay": 0.1, "lr": 0.01, "betas": (0.9, 0.8), "update_clipping": True},
            "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True, "lr": 0.01},
        },
        _BETAS,
    ),
    Case(
        optimx.SGD,
        torch.optim.SGD,
        sgd,
        {
            **_DECAY,
            "momentum": {"lr": 0.1, "momentum": 0.9},
            "momentum_decay": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "maximize": True},
            "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
            "dampening_alone": {"lr": 0.1, "dampening": 0.4},
            "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
            "fused": {"fused": True, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        },
        {"lr": 0.05, "weight_decay": 0.3, "momentum": 0.5},
    ),
    Case(
        optimx.RMSprop,
        torch.optim.RMSprop,
        rmsprop,
        {
            **_DECAY,
            "momentum": {"momentum": 0.9, "alpha": 0.9, "eps": 0.1},
            "centered": {"centered": True, "alpha": 0.9, "eps": 0.1, "weight_decay": 0.1},
            "centered_momentum": {"centered": True, "momentum": 0.9, "weight_decay": 0.1, "maximize": True},
        },
        {"lr": 0.05, "weight_decay": 0.3, "alpha": 0.5},
    ),
    Case(
        optimx.Adagrad,
        torch.optim.Adagrad,
        adagrad,
        {
            **_DECAY,
            "lr_decay": {
                "lr": 0.1,
                "lr_decay": 0.5,
                "initial_accumulator_value": 0.1,
                "weight_decay": 0.1,
                "eps": 0.1,
            },
            "fused": {"fused": True, "weight_decay": 0.1},
        },
        {"lr": 0.05, "weight_decay": 0.3, "lr_decay": 0.1},
        stored=("initial_accumulator_value",),
    ),
    Case(
        optimx.Adadelta,
        torch.optim.Adadelta,
        adadelta,
        {**_DECAY, "rho": {"lr": 0.5, "rho": 0.5, "eps": 0.1}},
        {"lr": 0.5, "weight_decay": 0.3, "rho": 0.6},
    ),
    Case(
        optimx.Adafactor,
        torch.optim.Adafactor,
        adafactor,
        {
            **_DECAY,
            "eps": {
                "lr": 0.5,
                "eps": (0.3, 2.0),
                "beta2_decay": -0.5,
                "d": 1.3,
                "weight_decay": 0.1,
                "maximize": True,
            },
            "moment": {"beta1": 0.9, "weight_decay": 0.1},
            "absolute": {"relative_step": False, "scale_parameter": False, "lr": 0.3},
            "hf": {"variant": "hf", "lr": None},
            "hf_moment": {"variant": "hf", "lr": None, "beta1": 0.9, "weight_decay": 0.1},
            "hf_lr": {"variant": "hf", "lr": 0.05, "scale_parameter": False, "clip_threshold": 1.5, "decay_rate": -0.6},
            "hf_warmup": {"variant": "hf", "lr": None, "warmup_init": True, "weight_decay": 0.5, "maximize": True},
        },
        {"lr": 0.3, "weight_decay": 0.3, "beta2_decay": -0.5, "d": 1.5},
        takes_complex=False,
    ),
    Case(optimx.Adamax, torch.optim.Adamax, adamax, _ADAM, _BETAS),
    Case(
        optimx.NAdam,
        torch.optim.NAdam,
        nadam,
        {**_DECOUPLED, **_DECOUPLED_FLAGS, "momentum_decay": {"lr": 0.1, "momentum_decay": 1.0}},
        {**_BETAS, "momentum_decay": 0.1},
    ),
    Case(
        optimx.RAdam,
        torch.optim.RAdam,
        radam,
        # rho stays below 5: the averages of squares are never used; a threshold of 4 would use them
        {**_DECOUPLED, "never_rectified": {"lr": 0.1, "betas": (0.9, 0.64)}},
        _BETAS,
    ),
    Case(
        optimx.Rprop,
        torch.optim.Rprop,
        rprop,
        {
            "default": {},
            "maximize": {"maximize": True},
            "etas": {"lr": 0.1, "etas": (0.3, 1.7), "step_sizes": (0.05, 0.13)},
            "lr_above_step_sizes": {"lr": 1.0, "step_sizes": (0.01, 0.5)},
            "tensor_lr": {"lr": torch.tensor(0.05)},
        },
        {"lr": 0.05, "etas": (0.4, 1.3)},
        stored=("lr",),
    ),
    Case(
        optimx.ASGD,
        torch.optim.ASGD,
        asgd,
        {**_DECAY, "averaged": {"lr": 0.05, "lambd": 0.5, "alpha": 0.6, "t0": 1, "weight_decay": 0.1}},
        {"lr": 0.05, "weight_decay": 0.3, "t0": 2},
    ),
    Case(
        optimx.Lion,
        LionLoop,
        lion,
        {**_DECAY, **_FLAGS, "betas": {"lr": 0.01, "betas": (0.5, 0.8), "weight_decay": 0.5}},
        _BETAS,
    ),
    Case(
        optimx.LAMB,
        LAMBLoop,
        lamb,
        {
            **_ADAM,
            "unadapted": {"weight_decay": 0.0},
            "always_adapt": {"weight_decay": 0.0, "always_adapt": True},
            "clamped": {"weight_decay": 0.1, "max_trust_ratio": 1.0, "lr": 0.05, "maximize": True},
            "uncorrected": {"bias_correction": False, "lr": 0.05},
            "cautious_decay": _FLAGS["cautious_decay"],
        },
        _BETAS,
    ),
    Case(
        optimx.ScheduleFreeAdamW,
        ScheduleFreeAdamWLoop,
        schedule_free_adamw,
        {
            **_DECAY,
            "betas": {"lr": 0.01, "betas": (0.8, 0.95), "eps": 0.1},
            "warmup": {"lr": 0.05, "warmup_steps": 3, "weight_decay": 0.1},
            "weights": {"lr": 0.01, "warmup_steps": 5, "r": 0.5, "weight_lr_power": 1.0, "maximize": True},
        },
        {**_BETAS, "warmup_steps": 2},
        takes_complex=False,
    ),
    Case(
        optimx.ScheduleFreeSGD,
        ScheduleFreeSGDLoop,
        schedule_free_sgd,
        {
            **_DECAY,
            "momentum": {"lr": 0.1, "momentum": 0.7, "weight_decay": 0.1},
            "warmup": {"lr": 0.5, "warmup_steps": 3, "weight_decay": 0.1},
            "weights": {"lr": 0.1, "warmup_steps": 5, "r": 0.5, "weight_lr_power": 1.0, "maximize": True},
        },
        {"lr": 0.05, "weight_decay": 0.3, "momentum": 0.5, "warmup_steps": 2},
        takes_complex=False,
    ),
]
BY_NAME = {case.name: case for case in CASES}

VARIANTS = [Variant(case, name, kwargs) for case in CASES for name, kwargs in case.variants.items()]

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


def make_leftovers(case: Case, shapes: Iterable[Sequence[int]], device: torch.device) -> list[Parameter]:
    """Parameters that torch's own step updates: complex ones; where there is no such thing, with gaps in memory."""
    if case.takes_complex:
        return make_params(shapes, device, torch.complex64)
    return [Parameter(torch.stack([param.detach()] * 2, -1)[..., 0]) for param in make_params(shapes, device)]


def set_grads(params: Iterable[Tensor], step: int, scale: float = 1.0, skip: Sequence[int] = ()) -> None:
    """Fresh gradients that depend on ``step`` only; none for the parameters at indices ``skip``."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator).mul(scale).to(param.device, param.dtype)
        param.grad = None if i in skip else torch.empty_like(param).copy_(grad)


def set_grad(param: Tensor, grad: Tensor) -> None:
    """A gradient of a dtype of its own; skips the test where torch, before ``grad_dtype``, lets no tensor have one."""
    if hasattr(Tensor, "grad_dtype"):
        param.grad_dtype = None  # any
    elif grad.dtype is not param.dtype:
        with pytest.raises(RuntimeError) as refusal:
            param.grad = grad
        pytest.skip(f"torch {torch.__version__}: {refusal.value}")
    param.grad = grad


def add_group(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """Adds it; an Adagrad of torch's that fails at its parameters (`test_stock_defects`) gets states of a new one."""
    optimizer.add_param_group(group)
    if type(optimizer) is torch.optim.Adagrad:
        for param, state in torch.optim.Adagrad(group["params"]).state.items():
            optimizer.state.setdefault(param, state)


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
    return case.cls(groups(params), **deepcopy(kwargs), **ours), loop(case, groups(copies), **kwargs), copies


def loop(case: Case, params: Any, **kwargs: Any) -> torch.optim.Optimizer:
    """Torch's plain for-loop; for optimizers of our own the loop that they fall back to."""
    kwargs.pop("fused", None)
    if "betas" in kwargs:
        # the same numbers, for versions that fail at betas of one element (`test_stock_defects`)
        kwargs["betas"] = tuple(beta.reshape(()) if torch.is_tensor(beta) else beta for beta in kwargs["betas"])
    if case.is_torchs:
        flags = {name: kwargs.pop(name) for name in OF_UPDATES if name in kwargs}
        stock = case.stock(params, **kwargs, foreach=False)
        return FlaggedLoop(stock, **flags) if flags else stock
    optimizer: Any = case.cls(params, **kwargs)
    return case.stock(optimizer.param_groups, optimizer.defaults)


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
        assert_close(a, b, tolerance or CLOSE[a.dtype], f"{i}")
        mine, theirs = ours.state.get(a, {}), stock.state.get(b, {})
        assert mine.keys() == theirs.keys(), f"parameter {i}"
        for key, value in theirs.items():
            assert_close(mine[key], value, tolerance or CLOSE[a.dtype], f"{key} of {i}")


def assert_close(actual: Tensor, expected: Tensor, tolerance: dict[str, float], name: str) -> None:
    """16 bits are compared with float64. Where numbers cancelled, an ulp of the tensor's largest number is left."""
    half = actual.dtype in HALF
    if expected.numel() and actual.dtype.is_floating_point:
        ulp = torch.finfo(actual.dtype).eps * float(expected.detach().abs().max())
        tolerance = {**tolerance, "atol": max(tolerance["atol"], ulp)}
    torch.testing.assert_close(
        actual, expected, **tolerance, check_device=expected.dim() > 0, check_dtype=not half,
        msg=lambda m: f"{name}: {m}",
    )  # fmt: skip


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
            # but scalar states, which stay float32
            stored = [copy.data, *(v for v in stock.state[copy].values() if v.dim())]
            for tensor in stored:
                tensor.copy_(tensor.to(dtype))


def train(optimizers: Sequence[torch.optim.Optimizer], steps: int, first: int = 0, **kwargs: Any) -> None:
    """Step the optimizers side by side on the same gradients."""
    for step in range(first, first + steps):
        for optimizer in optimizers:
            set_grads([p for g in optimizer.param_groups for p in g["params"]], step, **kwargs)
            if type(optimizer) is torch.optim.Adafactor:
                # a copy of torch's forgets it, and asks its groups for a key that they do not have, where a GPU is
                optimizer._warned_capturable_if_run_uncaptured = True
            optimizer.step()
