"""Rules, averages and watching where parameters are on a GPU: nobody waits, and a CUDA graph does the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import optimx
from optimx._engine.averages import AVERAGE
from optimx._engine.recorder import Recorder
from optimx._engine.watched_step import OF_GRADS, OF_UPDATES, WatchedStep
from tests.cases import make_params, set_grads
from tests.engine import params_of
from tests.test_gpu import no_sync
from tests.test_graphs import captured_step, filler, warm_up

pytestmark = pytest.mark.gpu

SETTINGS: dict[str, Any] = {
    "skip_nonfinite": True, "skip_spikes": {"window": 8, "sigma": 50.0}, "max_grad_norm": optimx.ZClip(warmup=3),
    "max_skips": 5, "average": optimx.EMA(0.9, warmup=0.7),
}  # fmt: skip
OPTIMIZERS = [optimx.AdamW, optimx.SGD, optimx.LAMB, optimx.Adafactor]


def watched(optimizer: optimx.MultiTensorStep) -> list[WatchedStep]:
    rows: list[WatchedStep] = []
    optimizer._recorder = Recorder(1, (*OF_GRADS, *OF_UPDATES), rows.append)
    return rows


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_nobody_waits(cls: type[optimx.MultiTensorStep]) -> None:
    params, twin = make_params(device="cuda"), make_params(device="cuda")
    optimizer, plain = cls(params, lr=1e-2, **SETTINGS), cls(twin, lr=1e-2, **SETTINGS)
    rows = watched(optimizer)
    for step in range(7):
        for each in (params, twin):
            set_grads(each, step)
            if step == 5:
                each[-1].grad.view(-1)[0] = float("nan")
        torch.cuda.synchronize()
        if step >= 2:
            with no_sync():
                optimizer.step()
        else:
            optimizer.step()
        plain.step()
    optimizer._recorder.flush()
    assert [row.step for row in rows] == [*range(1, 8)]
    assert [row.totals["skipped"] for row in rows] == [0.0] * 5 + [1.0, 0.0]
    assert optimizer.counters["skipped"] == 1
    assert optimx.last_bad(optimizer).names == (f"parameter {len(params) - 1} of group 0",)
    for a, b in zip(params, twin, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.state[a][AVERAGE], plain.state[b][AVERAGE])


def test_too_many_skips_are_known_late() -> None:
    params = make_params(device="cuda")
    optimizer = optimx.AdamW(params, skip_nonfinite=True, max_skips=3)
    with pytest.raises(RuntimeError, match="max_skips=3"):
        for step in range(20):
            set_grads(params, step)
            params[-1].grad.view(-1)[0] = float("nan")
            optimizer.step()
            torch.cuda.synchronize()


@pytest.mark.parametrize("cls", OPTIMIZERS[:3], ids=lambda cls: cls.__name__)
def test_graph_replay_equals_eager(cls: type[optimx.MultiTensorStep]) -> None:
    kwargs = {"lr": 1e-2, "capturable": True, **SETTINGS, "max_skips": None}
    captured, eager = (cls(make_params(device="cuda"), **kwargs) for _ in range(2))
    fill = filler(params_of(captured), params_of(eager))
    rows, expected = watched(captured), watched(eager)
    warm_up((captured, eager), fill)
    graph = captured_step(captured)
    for step in range(3, 7):
        fill(step)
        if step == 5:
            for optimizer in (captured, eager):
                params_of(optimizer)[-1].grad.view(-1)[0].fill_(float("inf"))
        graph.replay()
        eager.step()
    for a, b in zip(params_of(captured), params_of(eager), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(captured.state[a][AVERAGE], eager.state[b][AVERAGE])
    assert captured.counters["skipped"] == 1
    for optimizer in (captured, eager):
        optimizer._recorder.flush()
    assert [row.step for row in rows] == [row.step for row in expected] == [*range(1, 8)]
    for mine, theirs in zip(rows, expected, strict=True):
        assert mine.totals == theirs.totals or mine.step == 6
        for name, numbers in theirs.sums.items():
            assert mine.sums[name] == pytest.approx(numbers, rel=1e-6, nan_ok=True), name
