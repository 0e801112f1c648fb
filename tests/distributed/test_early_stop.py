"""EarlyStop on gloo ranks whose metrics differ: the first rank's counts, and all stop together."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from optimx import EarlyStop
from tests.distributed import ranks

WORLD = 2
#: The other rank's would go on for ever, or stop at once.
METRICS = {"first": [3.0, 2.1, 2.1, 2.1, 2.1, 2.1], "second": [3.0, float("nan"), 1.0, 0.5, 0.25, 0.1]}

Found = tuple[list[bool], dict[str, Any], "str | None"]


def follow(rank: int, late: bool, alone: bool = False) -> Found:
    groups = [dist.new_group([i]) for i in range(WORLD)]
    stop = EarlyStop(patience=3, late=late, process_group=groups[rank] if alone else None)
    metrics = [*METRICS.values()][rank]
    # one rank has numbers, the other one tensors
    answers = [stop(torch.tensor(metric) if rank else metric) for metric in metrics]
    return answers, stop.state_dict(), stop.reason


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> ranks.Results:
    checks = {f"together-{late}": partial(follow, late=late) for late in (False, True)}
    checks["alone"] = partial(follow, late=False, alone=True)
    return ranks.run(checks, WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("late", [False, True])
def test_the_first_rank_decides(results: ranks.Results, late: bool) -> None:
    first, second = results[f"together-{late}"]
    assert first == second
    answers, state, reason = first
    assert answers == ([False] * 5 + [True] if late else [False] * 4 + [True] * 2)
    # as float64, on both
    assert state["best"] == 2.1
    assert reason is not None


def test_a_group_of_its_own(results: ranks.Results) -> None:
    (_, first, _), (answers, second, reason) = results["alone"]
    assert first["best"] == 2.1
    assert second["best"] == pytest.approx(0.1)
    assert answers == [False, True, False, False, False, False]
    assert reason is None
