"""The gradient noise scale: gaussian gradients whose noise is known, a real accumulation, what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optimx
from optimx import NoiseScale, noise_scale

SMALL, LARGE = 8, 64
#: G^2 and S of the gaussian gradients.
SQUARED_NORM, VARIANCE = 1.0, 95.8


def gaussian_gradients(seed: int, steps: int, params: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Mean gradients of a step's first ``SMALL`` samples and of all ``LARGE``, float64."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(params, generator=generator, dtype=torch.float64)
    deviation = torch.rand(params, generator=generator, dtype=torch.float64)
    mean *= math.sqrt(SQUARED_NORM) / mean.norm()
    deviation *= math.sqrt(VARIANCE) / deviation.norm()
    found = []
    for _ in range(steps):
        grads = mean + deviation * torch.randn(LARGE, params, generator=generator, dtype=torch.float64)
        found.append((grads[:SMALL].mean(0), grads.mean(0)))
    return found


def test_estimates_have_no_bias() -> None:
    estimates = [
        noise_scale(small.square().sum(), large.square().sum(), SMALL, LARGE)
        for small, large in gaussian_gradients(0, 4000)
    ]
    for values, truth in zip(zip(*estimates, strict=True), (SQUARED_NORM, VARIANCE), strict=True):
        sample = torch.stack(values)
        error = sample.std() / math.sqrt(len(sample))
        # four standard errors
        assert abs(sample.mean() - truth) < 4 * error
        assert error < 0.02 * truth


def test_numbers_without_noise() -> None:
    found = noise_scale(9.0, 9.0, 1, 4)
    assert found == (9.0, 0.0)
    assert isinstance(found.squared_norm, float)
    # |g_b|^2 = G^2 + S / b
    found = noise_scale(2.0 + 6.0 / 3, 2.0 + 6.0 / 12, 3, 12)
    assert found == pytest.approx((2.0, 6.0))


def averaged(seed: int, decay: float = 0.99) -> NoiseScale:
    noise = NoiseScale(SMALL, LARGE // SMALL, decay=decay)
    param = nn.Parameter(torch.zeros(64))
    for small, large in gaussian_gradients(seed, 500):
        # as a loss that is divided by the number of micro-batches leaves it
        param.grad = (small / noise.accumulation).float()
        noise.after_first_backward([param])
        noise.update(large.norm().float())
    return noise


def test_averages_of_gaussian_gradients() -> None:
    runs = [averaged(seed) for seed in range(8)]
    scales = torch.stack([noise.scale for noise in runs])
    assert scales.mean() == pytest.approx(VARIANCE / SQUARED_NORM, rel=0.1)
    assert torch.stack([noise.variance for noise in runs]).mean() == pytest.approx(VARIANCE, rel=0.03)
    assert torch.stack([noise.squared_norm for noise in runs]).mean() == pytest.approx(SQUARED_NORM, rel=0.1)
    # it has seen the last hundred steps, or the last one
    assert averaged(0, 0.0).scale != pytest.approx(VARIANCE / SQUARED_NORM, rel=0.1)


def test_averages_are_of_both_apart() -> None:
    """Each debiased; the mean of the quotients would be another."""
    noise = NoiseScale(1, 4, decay=0.75)
    for name in ("squared_norm", "variance", "scale"):
        assert getattr(noise, name).isnan()
    found = []
    for small, large in ((3.0, 1.5), (2.0, 1.75), (4.0, 1.0)):
        noise.update(large, small_norm=small)
        found.append(noise_scale(small**2, large**2, 1, 4))
    weights = [0.75**2, 0.75, 1.0]
    squared_norm, variance = (
        sum(w * x for w, x in zip(weights, xs, strict=True)) / sum(weights) for xs in zip(*found, strict=True)
    )
    assert float(noise.squared_norm) == pytest.approx(squared_norm)
    assert float(noise.variance) == pytest.approx(variance)
    assert float(noise.scale) == pytest.approx(variance / squared_norm)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


@pytest.mark.parametrize("grad_scale", [1.0, 256.0])
def test_accumulation_in_a_training_loop(grad_scale: float) -> None:
    """What the loop feeds is what the gradients of the two batches are; a step is not changed by it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    expected = copy.deepcopy(model)
    x, y = torch.randn(12, 6), torch.randn(12, 1)
    noise = NoiseScale(micro_batch=3, accumulation=4)
    for i in range(4):
        part = slice(3 * i, 3 * i + 3)
        (loss_of(model, x[part], y[part]) / 4 * grad_scale).backward()
        if i == 0:
            noise.after_first_backward(model.parameters(), torch.tensor(grad_scale))
    norm = optimx.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]) / grad_scale
    noise.update(norm)

    def squared_norm(rows: slice) -> float:
        grads = torch.autograd.grad(loss_of(expected, x[rows], y[rows]), [*expected.parameters()])
        return sum(float(grad.double().square().sum()) for grad in grads)

    truth = noise_scale(squared_norm(slice(3)), squared_norm(slice(12)), 3, 12)
    assert float(noise.squared_norm) == pytest.approx(truth.squared_norm, rel=1e-4)
    assert float(noise.variance) == pytest.approx(truth.variance, rel=1e-4)
    assert noise.batch == 12
    assert NoiseScale(3, 4, ranks=2).batch == 24


def test_norms_that_are_not_finite_change_nothing() -> None:
    noise = NoiseScale(1, 2)
    noise.update(2.0, small_norm=3.0)
    before = float(noise.scale)
    for bad in ((math.nan, 3.0), (2.0, math.inf), (math.inf, math.inf)):
        noise.update(bad[0], small_norm=bad[1])
        assert float(noise.scale) == before
    noise.update(3.0, small_norm=3.1)
    assert float(noise.scale) != before


def test_resume() -> None:
    first, again = NoiseScale(1, 2), NoiseScale(4, 2)
    first.update(2.0, small_norm=3.0)
    state = first.state_dict()
    again.load_state_dict(state)
    assert torch.equal(again.scale, first.scale)
    first.update(1.0, small_norm=3.0)
    assert torch.equal(state["averages"], again.state_dict()["averages"])
    assert not torch.equal(again.scale, first.scale)


def test_a_norm_is_of_one_step_only() -> None:
    noise = NoiseScale(2, 2)
    param = nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match="after a backward, but no parameter has a gradient"):
        noise.after_first_backward([param])
    param.grad = torch.ones(2)
    noise.after_first_backward([param])
    noise.update(1.0)
    before = noise.state_dict()["averages"]
    with pytest.raises(RuntimeError, match="update should come after after_first_backward, or with small_norm"):
        noise.update(1.0)
    assert torch.equal(noise.state_dict()["averages"], before)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "same": (lambda: noise_scale(1.0, 1.0, 8, 8), ValueError, "large_batch should be > 8 but is: 8"),
    "smaller": (lambda: noise_scale(1.0, 1.0, 8, 4), ValueError, "large_batch should be > 8 but is: 4"),
    "zero": (lambda: noise_scale(1.0, 1.0, 0, 4), ValueError, r"small_batch should be in \(0, inf\) but is: 0"),
    "text": (lambda: noise_scale(1.0, 1.0, "8", 9), TypeError, "small_batch should be a number but is: '8'"),  # type: ignore
    "no-accumulation": (lambda: NoiseScale(8, 1), ValueError, r"accumulation should be >= 2 on one rank.* is: 1"),
    "micro-batch": (lambda: NoiseScale(0, 2), ValueError, "micro_batch should be >= 1 but is: 0"),
    "half": (lambda: NoiseScale(8, 2.5), TypeError, "accumulation should be a whole number but is: 2.5"),  # type: ignore
    "decay": (lambda: NoiseScale(8, 2, decay=1.0), ValueError, r"decay should be in \[0, 1\) but is: 1.0"),
    "state": (lambda: NoiseScale(8, 2).load_state_dict({"average": 1}), ValueError, r"has the keys: \['average'\]"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_ranks_make_two_batches() -> None:
    assert NoiseScale(8, 1, ranks=2).batch == 16
