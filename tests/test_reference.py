"""The references are right: they equal torch.optim's for-loops, or what can be worked out by other means."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from optimx.adafactor import EXTRAS
from tests.reference.adadelta import adadelta
from tests.reference.adafactor import adafactor
from tests.reference.adagrad import adagrad
from tests.reference.adam import adam
from tests.reference.adamax import adamax
from tests.reference.asgd import asgd
from tests.reference.lamb import lamb
from tests.reference.lion import lion
from tests.reference.nadam import nadam
from tests.reference.radam import radam
from tests.reference.rmsprop import rmsprop
from tests.reference.rprop import rprop
from tests.reference.sgd import sgd

STEPS = 40

#: The same operations in float64, in another order: a few roundings of 1e-16 a step.
RTOL = 1e-12


@dataclass(frozen=True)
class Row:
    """A reference and the torch class that it must equal, with arguments that lead to different arithmetic."""

    reference: Callable[..., list[float]]
    stock: type[torch.optim.Optimizer]
    variants: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        return self.reference.__name__


# where eps is 1e-8 its place would not show: each has a variant with one that does
ROWS = [
    Row(
        sgd,
        torch.optim.SGD,
        {
            "default": {},
            "decay": {"lr": 0.1, "weight_decay": 0.1},
            "maximize": {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
            "momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
            "momentum_maximize": {"lr": 0.1, "momentum": 0.9, "maximize": True},
            "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.4},
            "dampening_without_momentum": {"lr": 0.1, "dampening": 0.4},
            "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        },
    ),
    Row(
        rmsprop,
        torch.optim.RMSprop,
        {
            "default": {},
            "decay": {"weight_decay": 0.1},
            "maximize": {"weight_decay": 0.1, "maximize": True},
            "alpha_eps": {"alpha": 0.8, "eps": 0.1},
            "momentum": {"momentum": 0.9, "eps": 0.1},
            "centered": {"centered": True, "alpha": 0.9, "eps": 0.1},
            "centered_momentum": {"centered": True, "momentum": 0.9, "weight_decay": 0.1, "maximize": True},
        },
    ),
    Row(
        adagrad,
        torch.optim.Adagrad,
        {
            "default": {},
            "decay": {"lr": 0.1, "weight_decay": 0.1},
            "maximize": {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
            "lr_decay": {"lr": 0.1, "lr_decay": 0.1},
            "initial_accumulator_value": {"lr": 0.1, "initial_accumulator_value": 0.5},
            "all": {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5, "weight_decay": 0.1, "eps": 0.1},
        },
    ),
    Row(
        adadelta,
        torch.optim.Adadelta,
        {
            "default": {},
            "decay": {"weight_decay": 0.1},
            "maximize": {"weight_decay": 0.1, "maximize": True},
            "lr": {"lr": 0.3},
            "rho_eps": {"rho": 0.5, "eps": 0.1},
        },
    ),
    Row(
        adafactor,
        torch.optim.Adafactor,
        {
            "default": {},
            "decay": {"lr": 0.3, "weight_decay": 0.1},
            "maximize": {"weight_decay": 0.1, "maximize": True},
            "eps": {"lr": 0.5, "eps": (0.3, 2.0)},
            "beta2_decay_d": {"lr": 0.5, "beta2_decay": -0.3, "d": 1.2},
        },
    ),
    Row(
        adamax,
        torch.optim.Adamax,
        {
            "default": {},
            "decay": {"lr": 0.1, "weight_decay": 0.1},
            "maximize": {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
            "betas_eps": {"lr": 0.1, "betas": (0.5, 0.8), "eps": 0.1},
            "beta1_zero": {"lr": 0.1, "betas": (0.0, 0.9)},
        },
    ),
    Row(
        nadam,
        torch.optim.NAdam,
        {
            "default": {},
            "decay": {"lr": 0.1, "weight_decay": 0.1},
            "decoupled": {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
            "maximize": {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
            "maximize_decoupled": {
                "lr": 0.1,
                "weight_decay": 0.1,
                "decoupled_weight_decay": True,
                "maximize": True,
            },
            "betas_eps": {"lr": 0.1, "betas": (0.5, 0.8), "eps": 0.1},
            "momentum_decay": {"lr": 0.1, "momentum_decay": 1.0},
        },
    ),
    Row(
        radam,
        torch.optim.RAdam,
        {
            "default": {},
            "decay": {"lr": 0.1, "weight_decay": 0.1},
            "decoupled": {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
            "maximize": {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
            "maximize_decoupled": {
                "lr": 0.1,
                "weight_decay": 0.1,
                "decoupled_weight_decay": True,
                "maximize": True,
            },
            "betas_eps": {"lr": 0.1, "betas": (0.5, 0.8), "eps": 0.1},
            # rho stays below 5: the averages of squares are never used; a threshold of 4 would use them
            "never_rectified": {"lr": 0.1, "betas": (0.9, 0.64)},
        },
    ),
    Row(
        rprop,
        torch.optim.Rprop,
        {
            "default": {},
            "maximize": {"maximize": True},
            "etas": {"etas": (0.3, 1.7)},
            "step_sizes": {"lr": 0.1, "step_sizes": (0.05, 0.13)},
            "lr_above_step_sizes": {"lr": 1.0, "step_sizes": (0.01, 0.5)},
        },
    ),
    Row(
        asgd,
        torch.optim.ASGD,
        {
            "default": {},
            "decay": {"lr": 0.1, "weight_decay": 0.1},
            "maximize": {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
            "lambd_alpha": {"lr": 0.1, "lambd": 0.5, "alpha": 0.6},
            # averages do not influence the parameters: see test_asgd_average_equals_torchs
            "t0": {"lr": 0.1, "lambd": 0.1, "t0": 10},
        },
    ),
]

VARIANTS = [
    pytest.param(row, kwargs, id=f"{row.name}-{variant}") for row in ROWS for variant, kwargs in row.variants.items()
]

#: Arguments of torch that choose an implementation, not a formula.
NOT_ARITHMETIC = {"params", "foreach", "capturable", "differentiable", "fused"}


def make_problem(size: int = 9, steps: int = STEPS) -> tuple[list[float], list[list[float]]]:
    """Parameters and gradients. The last parameter's gradient is 0 twice in three steps, in the first one too."""
    rng = random.Random(0)
    theta = [rng.gauss(0, 1) for _ in range(size)]
    gradients = [[rng.gauss(0, 1) for _ in theta] for _ in range(steps)]
    for t, gradient in enumerate(gradients):
        if t % 3 != 2:
            gradient[-1] = 0.0
    return theta, gradients


def train_stock(row: Row, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Parameters and state after torch's for-loop."""
    theta, gradients = make_problem()
    param = torch.nn.Parameter(torch.tensor(theta, dtype=torch.float64))
    optimizer = row.stock([param], foreach=False, **kwargs)
    for gradient in gradients:
        param.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    return param.detach(), optimizer.state[param]


def assert_close(actual: Tensor | Sequence[float], expected: Tensor | Sequence[float], atol: float = 0.0) -> None:
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=RTOL, atol=atol)


@pytest.fixture
def default_float64() -> Iterator[None]:
    """torch keeps NAdam's mu_product and ASGD's eta and mu in the default dtype, whatever the parameters' dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize(("row", "kwargs"), VARIANTS)
@pytest.mark.usefixtures("default_float64")
def test_equals_torch(row: Row, kwargs: dict[str, Any]) -> None:
    param, _ = train_stock(row, kwargs)
    assert_close(row.reference(*make_problem(), **kwargs), param)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_arguments_are_torchs(row: Row) -> None:
    ours = dict(list(inspect.signature(row.reference).parameters.items())[2:])
    for beyond_torchs in ("averaged", "shape", *EXTRAS):
        ours.pop(beyond_torchs, None)
    torchs = inspect.signature(row.stock).parameters
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in ours.values())
    assert {name: parameter.default for name, parameter in ours.items()} == {
        name: parameter.default for name, parameter in torchs.items() if name not in NOT_ARITHMETIC
    }


@pytest.mark.parametrize("t0", [0, 10, 36, 37, 38, 1e6])
@pytest.mark.usefixtures("default_float64")
def test_asgd_average_equals_torchs(t0: float) -> None:
    kwargs = {"lr": 0.1, "lambd": 0.1, "weight_decay": 0.1, "maximize": True, "t0": t0}
    param, state = train_stock(Row(asgd, torch.optim.ASGD, {}), kwargs)
    average = asgd(*make_problem(), **kwargs, averaged=True)
    assert_close(average, state["ax"])
    # the first step that averages is t0 + 3
    assert torch.equal(param, state["ax"]) == (t0 + 3 > STEPS)


@pytest.mark.parametrize(("row", "kwargs"), [p for p in VARIANTS if p.values[0].reference in (nadam, asgd)])
def test_equals_torch_with_float32_scalars(row: Row, kwargs: dict[str, Any]) -> None:
    # mu_product (rounded once a step) and eta are float32 here, and scale updates that add up to about 1: 2**-24 = 6e-8
    param, _ = train_stock(row, kwargs)
    assert_close(row.reference(*make_problem(), **kwargs), param, atol=1e-7)


def test_lion_by_hand() -> None:
    # c: 2, 0, 0.125; m: 1, 0.5; so the second step stays and the third follows the momentum against the gradient
    gradients = [[4.0], [-1.0], [-0.25]]
    trajectory = [lion([1.0], gradients[:t], lr=0.25, betas=(0.5, 0.75)) for t in range(4)]
    assert trajectory == [[1.0], [0.75], [0.75], [0.5]]


def test_lion_decays_without_gradients() -> None:
    assert_close(lion([2.0, -3.0], [[0.0, 0.0]] * 5, lr=0.1, weight_decay=0.5), [2 * 0.95**5, -3 * 0.95**5])


def test_lion_reads_no_magnitudes() -> None:
    theta, gradients = make_problem()
    # a power of two: exact
    scaled = [[g / 1024 for g in gradient] for gradient in gradients]
    assert lion(theta, scaled, weight_decay=0.1) == lion(theta, gradients, weight_decay=0.1)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"lr": 0.1, "weight_decay": 0.1}, {"lr": 0.1, "betas": (0.5, 0.8), "weight_decay": 0.1, "maximize": True}],
    ids=["default", "decay", "maximize"],
)
def test_lion_equals_its_closed_form(kwargs: dict[str, Any]) -> None:
    """The gradients do not depend on theta, so theta is a sum over steps and the averages are sums over gradients."""
    lr, (beta1, beta2) = kwargs.get("lr", 1e-4), kwargs.get("betas", (0.9, 0.99))
    theta, gradients = make_problem()
    g = torch.tensor(gradients, dtype=torch.float64) * (-1 if kwargs.get("maximize") else 1)
    previous_m = (average_weights(beta2, STEPS) @ g).roll(1, 0)
    previous_m[0] = 0
    signs = (beta1 * previous_m + (1 - beta1) * g).sign()
    kept = (1 - lr * kwargs.get("weight_decay", 0.0)) ** torch.arange(STEPS, -1, -1, dtype=torch.float64)
    expected = kept[0] * torch.tensor(theta, dtype=torch.float64) - lr * kept[1:] @ signs
    assert_close(lion(theta, gradients, **kwargs), expected)


def average_weights(beta: float, steps: int) -> Tensor:
    """Row t has the weights of gradients 0 to t in the exponential average after step t."""
    t = torch.arange(steps, dtype=torch.float64)
    return (1 - beta) * (beta ** (t[:, None] - t)).tril()


LAMB_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "decay": {"lr": 0.1, "weight_decay": 0.3},
    "betas_eps": {"lr": 0.1, "betas": (0.5, 0.8), "eps": 0.1},
    "no_bias_correction": {"lr": 0.1, "bias_correction": False},
    "no_decay": {"lr": 0.1, "weight_decay": 0.0},
    "always_adapt": {"lr": 0.1, "weight_decay": 0.0, "always_adapt": True},
    "max_trust_ratio": {"lr": 0.1, "max_trust_ratio": 2.0},
    "normalize_grads": {"lr": 0.1, "normalize_grads": True, "eps": 0.01},
    "maximize": {"lr": 0.1, "maximize": True},
}


@pytest.mark.parametrize("kwargs", LAMB_VARIANTS.values(), ids=LAMB_VARIANTS.keys())
def test_lamb_equals_tensor_expressions(kwargs: dict[str, Any]) -> None:
    """The averages as matrix products, the update as a unit vector times a length."""
    theta, gradients = make_problem()
    lr, eps = kwargs.get("lr", 1e-3), kwargs.get("eps", 1e-6)
    weight_decay, limit = kwargs.get("weight_decay", 0.01), kwargs.get("max_trust_ratio", math.inf)
    g = torch.tensor(gradients, dtype=torch.float64)
    if kwargs.get("normalize_grads"):
        g = torch.nn.functional.normalize(g, dim=1)
    if kwargs.get("maximize"):
        g = -g
    hats = []
    for beta, x in zip(kwargs.get("betas", (0.9, 0.999)), (g, g.square()), strict=True):
        weights = average_weights(beta, STEPS)
        hats.append((weights / weights.sum(1, keepdim=True) if kwargs.get("bias_correction", True) else weights) @ x)
    directions = hats[0] / (hats[1].sqrt() + eps)

    expected = torch.tensor(theta, dtype=torch.float64)
    limited = 0
    for direction in directions:
        u = torch.add(direction, expected, alpha=weight_decay)
        length = u.norm()
        if weight_decay > 0 or kwargs.get("always_adapt"):
            limited += int(expected.norm() > limit * length)
            length = torch.minimum(expected.norm(), limit * length)
        expected = expected - lr * length * torch.nn.functional.normalize(u, dim=0)
    assert_close(lamb(theta, gradients, **kwargs), expected)
    # the limit has to matter, and not always
    assert (0 < limited < STEPS) == ("max_trust_ratio" in kwargs)


def test_lamb_by_hand() -> None:
    # the first Adam update is the gradient's sign: here of 2-norm sqrt(2), and the parameters' is 5
    step = 0.1 * 5 / math.sqrt(2)
    kwargs: dict[str, Any] = {"lr": 0.1, "eps": 0.0, "weight_decay": 0.0}
    assert_close(lamb([3.0, 4.0], [[7.0, -0.01]], **kwargs, always_adapt=True), [3 - step, 4 + step])
    assert_close(lamb([3.0, 4.0], [[7.0, -0.01]], **kwargs), [2.9, 4.1])
    # weight decay is a part of the update: (1, -1) + 0.5 * (3, 4) = (2.5, 1), of 2-norm sqrt(7.25)
    kwargs["weight_decay"] = 0.5
    ratio = 5 / math.sqrt(7.25)
    assert_close(lamb([3.0, 4.0], [[7.0, -0.01]], **kwargs), [3 - 0.25 * ratio, 4 - 0.1 * ratio])
    # without bias correction the first update is (1 - beta1) / sqrt(1 - beta2) of the sign
    kwargs["weight_decay"] = 0.0
    assert_close(
        lamb([3.0, 4.0], [[7.0, -0.01]], **kwargs, betas=(0.9, 0.96), bias_correction=False), [3 - 0.05, 4 + 0.05]
    )


def test_lamb_without_weight_decay_is_adam() -> None:
    theta, gradients = make_problem()
    for maximize in (False, True):
        kwargs: dict[str, Any] = {"lr": 0.1, "eps": 1e-6, "maximize": maximize}
        expected = adam(theta, gradients, **kwargs)
        assert_close(lamb(theta, gradients, weight_decay=0.0, **kwargs), expected)
        # nothing is adapted, so there is nothing to bound
        assert_close(lamb(theta, gradients, weight_decay=0.0, max_trust_ratio=0.5, **kwargs), expected)


def test_lamb_with_a_limit_that_always_binds_is_adamw() -> None:
    theta, gradients = make_problem()
    expected = adam(theta, gradients, lr=1e-3, eps=1e-6, weight_decay=0.1, decoupled=True)
    assert_close(lamb(theta, gradients, lr=0.1, weight_decay=0.1, max_trust_ratio=0.01), expected)


def test_lamb_ratio_is_one_for_zero_norms() -> None:
    # parameters that are 0
    assert_close(lamb([0.0, 0.0], [[7.0, -0.01]], lr=0.1, eps=0.0), [-0.1, 0.1])
    assert_close(lamb([0.0, 0.0], [[7.0, -0.01]], lr=0.1, eps=0.0, max_trust_ratio=0.5), [-0.05, 0.05])
    # an update that is 0
    assert lamb([3.0, 4.0], [[0.0, 0.0]], weight_decay=0.0, always_adapt=True) == [3.0, 4.0]


def test_lamb_normalized_gradients_have_no_scale() -> None:
    theta, gradients = make_problem()
    # powers of two, another one each step: exact
    scaled = [[g * 2.0 ** (t % 7 - 3) for g in gradient] for t, gradient in enumerate(gradients)]
    assert lamb(theta, scaled, normalize_grads=True) == lamb(theta, gradients, normalize_grads=True)
    assert lamb(theta, scaled) != lamb(theta, gradients)
    # zeros have no norm to divide by
    assert_close(lamb([3.0, 4.0], [[0.0, 0.0]], lr=0.1, normalize_grads=True), [3 * 0.9, 4 * 0.9])
