"""A training that goes on from a checkpoint, on other ranks and with stock's class, ends where one process does."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import INTERPRETED
from tests.distributed import ranks
from tests.distributed.checkpoints import (
    ALONE,
    BOTH_WAYS,
    BUILT,
    HALF,
    HALVES,
    OPTIONS,
    SCHEDULES,
    STEPS,
    Half,
    Place,
    built,
    ended,
    of_world,
    on_four,
    resume,
    resume_build,
    train,
)
from tests.distributed.test_engines import BY_PARTS, in_one_process

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def resumed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, ranks.Results]:
    """What the ranks found that loaded the checkpoints of others, by their number."""
    if INTERPRETED:
        # what kernels see of it
        checks = {name: check for name, check in on_four(folder).items() if name.startswith("by_default")}
        return {4: ranks.run(checks, 4, tmp_path_factory.mktemp("ranks"))}
    alone, _ = of_world(1, folder)
    for save in alone.values():
        save(0)
    saved, loaded = of_world(2, folder)
    ranks.run(saved, 2, tmp_path_factory.mktemp("ranks"))
    first, second = of_world(4, folder)
    four = {**first, **second, **on_four(folder)}
    return {
        4: ranks.run(four, 4, tmp_path_factory.mktemp("ranks")),
        2: ranks.run(loaded, 2, tmp_path_factory.mktemp("ranks")),
    }


def assert_ended(result: dict[str, Any], name: str) -> None:
    """Where stock in one process ends, which nothing interrupts."""
    params, states, _ = in_one_process(name, BY_PARTS[name], None, [*range(STEPS)])
    # gradients are added in another order
    torch.testing.assert_close(result["params"], params, rtol=1e-4, atol=1e-5)
    assert len(result["states"]) == len(states)
    for mine, expected in zip(result["states"], states, strict=True):
        assert mine.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(("first", "second"), HALVES, ids=lambda half: str(half))
def test_resumes(first: Half, second: Half, folder: Path, resumed: dict[int, ranks.Results]) -> None:
    alone = second.place == ALONE
    results = [resume(0, first, second, folder)] if alone else resumed[second.place.world][f"{first} to {second}"]
    for result in results:
        assert_ended(result, second.optimizer)


@pytest.mark.parametrize("packages", BOTH_WAYS, ids="-".join)
@pytest.mark.parametrize(
    "options", [pytest.param(name, marks=pytest.mark.interpreted if name == "by_default" else ()) for name in OPTIONS]
)
def test_hands_over(options: str, packages: tuple[str, str], resumed: dict[int, ranks.Results]) -> None:
    for result in resumed[4]["-".join((options, *packages))]:
        assert_ended(result, "AdamW")


@pytest.mark.parametrize("name", ["flattened_in_files", "moved"])
def test_ends_where_one_process_does(name: str, resumed: dict[int, ranks.Results]) -> None:
    for result in resumed[4][name]:
        assert_ended(result, "AdamW")


def test_what_is_written_is_the_state_of_the_call(resumed: dict[int, ranks.Results]) -> None:
    for went_on, loaded in resumed[4]["asynchronous"]:
        assert_ended(went_on, "AdamW")
        assert_ended(loaded, "AdamW")


@cache
def build_in_one_process(schedule: str) -> dict[str, Any]:
    build, trained = built(0, ALONE, schedule)
    rates = train(trained, range(STEPS), build.scheduler)
    assert len({*map(tuple, rates)}) > 1
    return {**ended(trained), "rates": rates[HALF:]}


def assert_built(results: list[dict[str, Any]], schedule: str) -> None:
    """Where the same build in one process ends, which nothing interrupts."""
    expected = build_in_one_process(schedule)
    for result in results:
        assert result["rates"] == expected["rates"]
        torch.testing.assert_close(result["params"], expected["params"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result["states"], expected["states"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("first", "second"), BUILT, ids=str)
def test_a_build_resumes(
    first: Place, second: Place, schedule: str, folder: Path, resumed: dict[int, ranks.Results]
) -> None:
    if second == ALONE:
        results = [resume_build(0, first, second, schedule, folder)]
    else:
        results = resumed[second.world][f"{schedule}-{first} to {second}"]
    assert_built(results, schedule)


def test_a_build_hands_over(resumed: dict[int, ranks.Results]) -> None:
    assert_built(resumed[4]["hand_over_build"], "cosine")
