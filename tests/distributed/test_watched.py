"""Rules about steps, averages and what is measured, where a model is spread over ranks: as in one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

import optimx
from optimx._engine.averages import AVERAGE
from optimx._engine.recorder import Recorder
from optimx._engine.watched_step import OF_GRADS, OF_UPDATES, WatchedStep
from tests.distributed import ranks
from tests.distributed.engines import ENGINES, full, local, one_process

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.interpreted]

STEPS, BAD_STEP = 4, 2
NAMES = ["one_process", "fsdp2", "tensor_parallel"]
SETTINGS: dict[str, Any] = {
    "lr": 1e-2, "max_grad_norm": 0.5, "skip_nonfinite": True, "skip_spikes": True, "average": optimx.EMA(0.5),
}  # fmt: skip


def params_of(optimizer: Any) -> list[torch.Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def trained(rank: int, name: str) -> dict[str, Any]:
    """The last rank finds NaN in one step."""
    made = {**ENGINES, "one_process": one_process}[name](rank, partial(optimx.AdamW, **SETTINGS))
    optimizer = made.optimizer
    rows: list[WatchedStep] = []
    optimizer._recorder = Recorder(1, (*OF_GRADS, *OF_UPDATES), rows.append)
    skipped = []
    for step in range(STEPS):
        optimizer.zero_grad()
        made.loss(step).backward()
        if step == BAD_STEP and rank == dist.get_world_size() - 1:
            # what is no DTensor all ranks have alike
            grads = sorted((param.grad for param in params_of(optimizer)), key=lambda grad: type(grad) is torch.Tensor)
            next(grad for grad in map(local, grads) if grad.numel()).view(-1)[0] = torch.nan
        optimizer.step()
        skipped.append(bool(optimizer.step_was_skipped))
    optimizer._recorder.flush()
    with optimizer.averaged():
        averages = made.params()
    states = [optimizer.state[param] for param in params_of(optimizer)]
    return {
        "params": made.params(), "averages": averages, "skipped": skipped,
        "rows": [(row.step, row.sums, row.totals) for row in rows],
        "kept": [full(state[AVERAGE]) for state in states], "counters": optimizer.guard_state["counters"][:5].tolist(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> ranks.Results:
    return ranks.run({name: partial(trained, name=name) for name in NAMES}, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", NAMES[1:])
def test_as_in_one_process(name: str, two: ranks.Results) -> None:
    expected = two["one_process"][1]
    for found in two[name]:
        assert found["skipped"] == expected["skipped"] == [step == BAD_STEP for step in range(STEPS)]
        assert found["counters"] == expected["counters"]
        for key in ("params", "averages", "kept"):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(found["rows"], expected["rows"], strict=True):
            assert mine[0] == theirs[0]
            if mine[0] == BAD_STEP + 1:
                assert mine[2]["skipped"] == 1.0
                continue
            assert mine[2] == pytest.approx(theirs[2], rel=1e-4)
            for key, numbers in theirs[1].items():
                assert mine[1][key] == pytest.approx(numbers, rel=1e-3, abs=1e-8, nan_ok=True), key
    assert [row[1:] for row in two[name][0]["rows"] if row[0] != 3] == [
        row[1:] for row in two[name][1]["rows"] if row[0] != 3
    ]
