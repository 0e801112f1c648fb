"""The recipes of docs/sharding.md end where one process with the whole batch does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from optimx.param_groups import no_decay_groups
from tests.distributed import ranks
from tests.distributed.libraries import LIBRARIES, checks_of_libraries
from tests.distributed.recipes import ADAMW, BLOCKS, CLIP, FLAT, RECIPES, STEPS, whole, whole_state
from tests.distributed.transformer import loss_of_rows, transformer

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> ranks.Results:
    return ranks.run(RECIPES, 4, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def results_of_libraries(tmp_path_factory: pytest.TempPathFactory) -> ranks.Results:
    folder = tmp_path_factory.mktemp("ranks")
    return ranks.run(checks_of_libraries(str(folder)), 2, folder)


def in_one_process(groups_of: Callable[[nn.Module], Any] = nn.Module.parameters) -> dict[str, Any]:
    """Stock on all rows: parameters, norms, and states after half of the steps."""
    model = transformer()
    optimizer = torch.optim.AdamW(groups_of(model), **ADAMW)
    norms, state = [], {}
    for step in range(STEPS):
        if step == STEPS // 2:
            state = whole_state(get_optimizer_state_dict(model, optimizer, options=FLAT))
        loss_of_rows(model, step).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    # all steps clip
    assert min(norms) > CLIP
    return {"params": whole([model]), "norms": norms, "state": state}


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    return in_one_process()


def assert_same(result: dict[str, Any], expected: dict[str, Any]) -> None:
    assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    # gradients are added in another order
    torch.testing.assert_close(result["params"], expected["params"], rtol=1e-5, atol=1e-6)


def test_every_block_runs() -> None:
    assert {*BLOCKS} - {*RECIPES} == {f"with_{library}" for library in LIBRARIES}


@pytest.mark.parametrize("name", RECIPES)
def test_ends_where_one_process_does(name: str, results: ranks.Results, one_process: dict[str, Any]) -> None:
    for result in results[name]:
        assert_same(result, one_process)


def test_flat_state_dict_of_parts_is_that_of_the_model(results: ranks.Results, one_process: dict[str, Any]) -> None:
    expected = one_process["state"]
    for result in results["model_parts"]:
        assert result["state"].keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(result["state"][name], value, rtol=1e-4, atol=1e-6)
            else:
                assert result["state"][name] == value, name


def test_all_gathers_wait_for_the_event_of_the_step_before(results: ranks.Results) -> None:
    # two streams wait for an event
    waits = ([f"recorded {step}", *[f"waited for {step}"] * 2] for step in range(1, STEPS))
    expected = [*chain(*waits), f"recorded {STEPS}"]
    for result in results["event"]:
        assert result["seen"] == expected


@pytest.mark.parametrize("name", checks_of_libraries(""))
def test_libraries(name: str, results_of_libraries: ranks.Results, one_process: dict[str, Any]) -> None:
    expected = one_process
    if name.startswith("transformers"):
        # the Trainer makes groups
        expected = in_one_process(partial(no_decay_groups, weight_decay=ADAMW["weight_decay"]))
    for result in results_of_libraries[name]:
        assert_same(result, expected)
        assert "parts of DTensors" in result["shown"]
        assert result["clips"] is name.endswith("-step")
