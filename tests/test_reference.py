"""The references are right: they equal torch.optim's for-loops, or what can be worked out by other means."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from optimx._engine.flags import FLAGS
from optimx.adafactor import EXTRAS
from tests.cases import BY_NAME, CASES, Case, Variant
from tests.engine import BESIDE_STOCK, each, each_of
from tests.reference.adam import adam
from tests.reference.asgd import asgd
from tests.reference.lamb import lamb
from tests.reference.lion import lion

STEPS = 40

#: The same operations in float64, in another order: a few roundings of 1e-16 a step.
RTOL = 1e-12


FORMULAS = [variant for variant in BESIDE_STOCK if variant.is_formula]
OF_TORCH = [variant for variant in FORMULAS if variant.case.is_torchs]
(ASGD, LION, LAMB) = (BY_NAME[name] for name in ("asgd", "lion", "lamb"))

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


def train_stock(case: Case, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Parameters and state after torch's for-loop."""
    theta, gradients = make_problem()
    param = torch.nn.Parameter(torch.tensor(theta, dtype=torch.float64))
    optimizer = case.stock([param], foreach=False, **kwargs)
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


@each(OF_TORCH, ())
@pytest.mark.usefixtures("default_float64")
def test_equals_torch(case: Case, kwargs: dict[str, Any]) -> None:
    param, _ = train_stock(case, kwargs)
    assert_close(case.reference(*make_problem(), **case.rounded(kwargs, torch.float64)), param)


@each_of([case for case in CASES if case.is_torchs], ())
def test_arguments_are_torchs(case: Case) -> None:
    ours = dict(list(inspect.signature(case.reference).parameters.items())[2:])
    torchs = inspect.signature(case.stock).parameters
    for beyond_torchs in {"averaged", "shape", "decoupled_weight_decay", *EXTRAS} - torchs.keys():
        ours.pop(beyond_torchs, None)
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in ours.values())
    assert {name: parameter.default for name, parameter in ours.items()} == {
        name: parameter.default for name, parameter in torchs.items() if name not in NOT_ARITHMETIC
    }


@pytest.mark.parametrize("t0", [0, 10, 36, 37, 38, 1e6])
@pytest.mark.usefixtures("default_float64")
def test_asgd_average_equals_torchs(t0: float) -> None:
    kwargs = {"lr": 0.1, "lambd": 0.1, "weight_decay": 0.1, "maximize": True, "t0": t0}
    param, state = train_stock(ASGD, kwargs)
    assert_close(asgd(*make_problem(), **kwargs), param)
    assert_close(asgd(*make_problem(), **kwargs, averaged=True), state["ax"])
    # the first step that averages is t0 + 3
    assert torch.equal(param, state["ax"]) == (t0 + 3 > STEPS)


@each([variant for variant in OF_TORCH if len(variant.case.cls.rule.scalars) > 1], ())
def test_equals_torch_with_float32_scalars(case: Case, kwargs: dict[str, Any]) -> None:
    # mu_product (rounded once a step) and eta are float32 here, and scale updates that add up to about 1: 2**-24 = 6e-8
    param, _ = train_stock(case, kwargs)
    assert_close(case.reference(*make_problem(), **kwargs), param, atol=1e-7)


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


@each([variant for variant in FORMULAS if variant.case is LION and not FLAGS.keys() & variant.kwargs.keys()], ())
def test_lion_equals_its_closed_form(case: Case, kwargs: dict[str, Any]) -> None:
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


_OF_LAMB = [variant for variant in FORMULAS if variant.case is LAMB]
_OF_LAMB += [Variant(LAMB, "normalize_grads", {"lr": 0.1, "normalize_grads": True, "eps": 0.01})]


@each(_OF_LAMB, ())
def test_lamb_equals_tensor_expressions(case: Case, kwargs: dict[str, Any]) -> None:
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
        decaying = expected
        if kwargs.get("cautious_weight_decay"):
            decaying = torch.where(direction * expected >= 0, expected, 0.0)
        u = torch.add(direction, decaying, alpha=weight_decay)
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
    expected = adam(theta, gradients, lr=1e-3, eps=1e-6, weight_decay=0.1, decoupled_weight_decay=True)
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
