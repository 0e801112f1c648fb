"""What is measured of watched steps: beside float64 loops over copies, and nothing else may change."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import optimx
from optimx._engine import backends
from optimx._engine.recorder import Recorder
from optimx._engine.watched_step import MOMENTS, OF_GRADS, OF_UPDATES, WatchedStep
from tests.cases import CASES, Case, make_params, set_grads
from tests.engine import KINDS, each_of, interpreted, params_of, usual

each_case = each_of(CASES, KINDS)


def watched(
    optimizer: optimx.MultiTensorStep, every: int = 1, sums: Any = (*OF_GRADS, *OF_UPDATES)
) -> list[WatchedStep]:
    """What will have been measured."""
    rows: list[WatchedStep] = []
    optimizer._recorder = Recorder(every, sums, rows.append)
    return rows


def flush(optimizer: optimx.MultiTensorStep) -> None:
    recorder = optimizer._recorder
    assert recorder is not None
    recorder.flush()


def moment_of(optimizer: torch.optim.Optimizer, param: Tensor) -> Tensor | None:
    state = optimizer.state.get(param, {})
    return next((state[name].double().clone() for name in MOMENTS if isinstance(state.get(name), Tensor)), None)


def expected(before: Tensor, after: Tensor, grad: Tensor, moment: Tensor | None) -> dict[str, float]:
    g = grad.double().flatten()
    found = {
        "grad_sq": float(g.square().sum()),
        "grad_max": float(g.abs().max()) if g.numel() else 0.0,
        "grad_zeros": float((g == 0).sum()),
        "param_sq": float(after.double().square().sum()),
        "update_sq": float((after.double() - before.double()).square().sum()),
    }
    if moment is not None:
        found |= {"moment_sq": float(moment.square().sum()), "grad_moment": float((moment.flatten() * g).sum())}
    return found


@each_case
@pytest.mark.parametrize("max_grad_norm", [None, 1.0], ids=["plain", "clipping"])
def test_sums(case: Case, max_grad_norm: float | None) -> None:
    """Of every parameter; and parameters and states are the same bits with and without."""
    kwargs = {**usual(case), "max_grad_norm": max_grad_norm}
    ours, plain = case.cls(make_params(), **kwargs), case.cls(make_params(), **kwargs)
    rows = watched(ours)
    params = params_of(ours)
    wanted = []
    for step in range(3):
        for optimizer in (ours, plain):
            set_grads(params_of(optimizer), step, skip=[2] if step == 2 else ())
            for param in params_of(optimizer)[3:]:
                if param.numel():
                    param.grad.view(-1)[:2] = 0.0
        before = [param.detach().clone() for param in params]
        moments = [moment_of(ours, param) for param in params]
        ours.step()
        plain.step()
        wanted.append(
            [
                {} if param.grad is None else expected(old, param.detach(), param.grad, moment)
                for param, old, moment in zip(params, before, moments, strict=True)
            ]
        )
    for a, b in zip(params, params_of(plain), strict=True):
        assert torch.equal(a, b)
        for name, value in ours.state[a].items():
            assert torch.equal(value, plain.state[b][name]) if isinstance(value, Tensor) else True
    assert len(rows) == 2
    flush(ours)
    assert [row.step for row in rows] == [1, 2, 3]
    for row, of_params in zip(rows, wanted, strict=True):
        total = sum(found.get("grad_sq", 0.0) for found in of_params)
        assert row.totals["grad_norm"] == pytest.approx(math.sqrt(total), rel=1e-5)
        factor = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (math.sqrt(total) + 1e-6))
        assert row.totals["clip_factor"] == pytest.approx(factor, rel=1e-5)
        assert row.totals["skipped"] == 0.0
        for i, found in enumerate(of_params):
            for name in (*OF_GRADS, *OF_UPDATES):
                measured = row.sums[name][i]
                if name in found:
                    scale = 1e-5 * math.sqrt(found["grad_sq"] * found["moment_sq"]) if name == "grad_moment" else 0.0
                    tolerance = {"rel": 2e-5, "abs": max(1e-9, scale)}
                    assert measured == pytest.approx(found[name], **tolerance), f"{name} of {i}"
                elif row.step > 1 or name not in ("moment_sq", "grad_moment"):
                    # before the first step there is a moment of zeros, or none
                    assert math.isnan(measured), f"{name} of {i}"


@interpreted
def test_skipped_step_has_gradients_alone() -> None:
    optimizer = optimx.AdamW(make_params([(3,), (5, 7)]), skip_nonfinite=True)
    rows = watched(optimizer)
    set_grads(params_of(optimizer), 0)
    params_of(optimizer)[1].grad.view(-1)[0] = math.inf
    optimizer.step()
    flush(optimizer)
    (row,) = rows
    assert row.totals["skipped"] == 1.0
    assert row.totals["clip_factor"] == 1.0
    assert math.isinf(row.sums["grad_sq"][1])
    assert math.isinf(row.sums["grad_max"][1])
    assert math.isfinite(row.sums["grad_sq"][0])


@interpreted
def test_steps_are_those_asked_for() -> None:
    optimizer = optimx.SGD(make_params(), lr=0.1)
    rows = watched(optimizer, every=3, sums=("grad_sq", "update_sq"))
    for step in range(8):
        set_grads(params_of(optimizer), step)
        optimizer.step()
    flush(optimizer)
    assert [row.step for row in rows] == [1, 4, 7]
    assert all(row.sums.keys() == {"grad_sq", "update_sq"} for row in rows)
    flush(optimizer)
    assert len(rows) == 3


def test_leftovers() -> None:
    """What torch's own step updates."""
    optimizer = optimx.AdamW(make_params(), foreach=True)
    rows = watched(optimizer)
    set_grads(params_of(optimizer), 0)
    before = [param.detach().clone() for param in params_of(optimizer)]
    optimizer.step()
    flush(optimizer)
    for i, param in enumerate(params_of(optimizer)):
        found = expected(before[i], param.detach(), param.grad, None)
        for name in ("grad_sq", "grad_max", "param_sq", "update_sq"):
            assert rows[0].sums[name][i] == pytest.approx(found[name], rel=2e-5)


def interprets(settings: dict[str, Any]) -> bool:
    return "remainder16" in settings.values() and backends.interpreted()


@interpreted
@pytest.mark.parametrize("settings", [{}, {"param_rounding": "remainder16"}, {"state_dtype": "8bit"}], ids=str)
def test_what_is_stored_counts(settings: dict[str, Any]) -> None:
    """A step that rounding eats is none."""
    param = Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
    optimizer = optimx.AdamW([param], lr=1e-6, weight_decay=0.0, **settings)
    rows = watched(optimizer)
    param.grad = torch.ones_like(param)
    optimizer.step()
    flush(optimizer)
    assert torch.equal(param, torch.ones_like(param))
    moved = rows[0].sums["update_sq"][0]
    # kernels see all bits, torch's operators those that show
    assert moved == (pytest.approx(64 * 128 * 1e-12, rel=0.1) if interprets(settings) else 0.0)
    assert rows[0].sums["param_sq"][0] == pytest.approx(64 * 128, rel=1e-4)


@interpreted
@pytest.mark.parametrize("scaler", [torch.amp.GradScaler, optimx.GradScaler])
@pytest.mark.parametrize("fused", [None, True])
def test_scaled_gradients(scaler: type[torch.amp.GradScaler], fused: bool | None) -> None:
    """Sums are of unscaled ones, and to unscale is not to clip."""
    plain, scaled = (optimx.AdamW(make_params([(5, 3), (4,)]), fused=fused, max_grad_norm=1.0) for _ in range(2))
    rows, expected = watched(scaled), watched(plain)
    scale = scaler("cpu", init_scale=256.0)
    scale.scale(torch.ones(()))
    for step in range(3):
        set_grads(params_of(plain), step)
        set_grads(params_of(scaled), step, scale=256.0)
        plain.step()
        scale.step(scaled)
        scale.update()
    for optimizer in (plain, scaled):
        flush(optimizer)
    for mine, theirs in zip(rows, expected, strict=True):
        assert mine.totals == pytest.approx(theirs.totals, rel=1e-5)
        assert mine.totals["clip_factor"] < 1.0
        for name, numbers in theirs.sums.items():
            assert mine.sums[name] == pytest.approx(numbers, rel=1e-5, abs=1e-9, nan_ok=True), name
