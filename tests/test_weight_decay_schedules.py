"""Weight decay that follows the learning rate: against the formulas, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

import optimx
from optimx.lr_scheduler import Absolute, Cosine, Linear, ScheduleLR, Warmup, corrected_decay, independent_decay

LR, STEPS = 0.02, 12
SHAPE = Warmup(3) >> Cosine(STEPS - 3)


def weights(scheduled: Any, decay: float, group: int = 0) -> list[float]:
    """A weight without gradients, which only decays, before each step of a run; float64."""
    params = [Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2)]
    optimizer = optimx.AdamW(
        [{"params": [p], "lr": lr} for p, lr in zip(params, (LR, LR / 4), strict=True)], weight_decay=decay
    )
    scheduler = ScheduleLR(optimizer, scheduled)
    found = []
    for _ in range(STEPS):
        found.append(float(params[group].detach()))
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        scheduler.step()
    return found


def expected(factor: Any) -> list[float]:
    """The same by a formula of the learning rate over its maximum."""
    found, weight = [], 1.0
    for step in range(STEPS):
        found.append(weight)
        weight *= 1.0 - factor(SHAPE(step))
    return found


@pytest.mark.parametrize("group", [0, 1])
def test_independent_decay(group: int) -> None:
    """What a step takes at the largest learning rate is weight_decay, whatever that rate is."""
    found = weights(independent_decay(SHAPE, [LR, LR / 4]), 0.01, group)
    assert found == pytest.approx(expected(lambda shape: 0.01 * shape), rel=1e-12)


def test_independent_decay_of_one_rate() -> None:
    assert weights(independent_decay(SHAPE, LR), 0.01) == pytest.approx(expected(lambda shape: 0.01 * shape), rel=1e-12)


def test_corrected_decay() -> None:
    found = weights(corrected_decay(SHAPE), 0.5)
    assert found == pytest.approx(expected(lambda shape: 0.5 * (LR * shape) ** 2 / LR), rel=1e-12)


@pytest.mark.parametrize("schedule", [SHAPE, [SHAPE, SHAPE]], ids=["one", "each"])
def test_corrected_decay_of_normalized_layers(schedule: Any) -> None:
    scheduled = corrected_decay(schedule, [True, False])
    assert weights(scheduled, 0.5, 0) == pytest.approx(expected(lambda shape: 0.5 * LR * shape**2), rel=1e-12)
    assert weights(scheduled, 0.5, 1) == pytest.approx(expected(lambda shape: 0.5 * LR / 4 * shape), rel=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: independent_decay(SHAPE, 0.0), "max_lr should be > 0 but is: 0.0"),
        (lambda: independent_decay(SHAPE, [0.1, -1.0]), "max_lr should be > 0 but is: -1.0"),
        (lambda: corrected_decay(Linear(5, floor=Absolute(1e-4))), "schedule should have ratios alone"),
        (lambda: corrected_decay([SHAPE, SHAPE], [True]), "normalized should be 2 bools"),
    ],
    ids=["zero", "negative", "absolute", "count"],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
