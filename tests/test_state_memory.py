"""States of small tensors lie together on a CPU, where one formula updates all of them; nobody else should notice."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from tests.cases import CASES, Case, assert_same, make_params, train, twins
from tests.conftest import INTERPRETED
from tests.test_contract import params_of

pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels find states wherever they are")

#: With vectors, which are copied in another way, and without.
SHAPES = {"matrices": [(5, 6)] * 9, "vectors": [(7,)] * 9}

FORMULAS = ("adafactor", "adamax", "asgd", "lamb", "lion", "nadam", "rmsprop")
each_formula = pytest.mark.parametrize("case", [c for c in CASES if c.name in FORMULAS], ids=lambda case: case.name)
each_case = pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in (*FORMULAS, "adamw")], ids=lambda case: case.name
)
each_shape = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())


def start(case: Case, shapes: list[tuple[int, ...]]) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer, str]:
    """Ours, the oracle, and a state. AdamW has a formula where settings differ."""

    def groups(params: Any) -> list[Any]:
        params = list(params)
        return [{"params": [p], "lr": 0.01 * 0.9**i} for i, p in enumerate(params)] if case.name == "adamw" else params

    ours, stock, _ = twins(case, make_params(shapes), {}, groups)
    return ours, stock, case.state_names(params_of(ours)[0])[0]


def states_of(optimizer: torch.optim.Optimizer, name: str) -> list[Tensor]:
    return [optimizer.state[param][name] for param in params_of(optimizer)]


def memories(states: list[Tensor]) -> int:
    """How many pieces of memory they lie in."""
    return len({state.untyped_storage().data_ptr() for state in states})


@each_shape
@each_formula
def test_they_stay_together(case: Case, shapes: list[tuple[int, ...]]) -> None:
    """Where settings become different, and in a copy or after loading."""
    name = case.state_names(make_params(shapes)[0])[0]
    first, second = make_params(shapes), make_params(shapes)
    ours: Any = case.cls([{"params": first}, {"params": second}])
    train([ours], 1)
    assert memories(states_of(ours, name)) == 1
    ours.param_groups[0]["maximize"] = True
    train([ours], 1)
    assert memories(states_of(ours, name)) == 2
    clones = [Parameter(param.detach().clone()) for param in (*first, *second)]
    loaded: Any = case.cls([{"params": clones[: len(first)]}, {"params": clones[len(first) :]}])
    loaded.load_state_dict(ours.state_dict())
    copies = [loaded, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    before = copy.deepcopy(ours.state_dict()["state"])
    train(copies, 1)
    assert [memories(states_of(optimizer, name)) for optimizer in copies] == [2, 2, 2]
    # another optimizer's memory is not theirs
    torch.testing.assert_close(ours.state_dict()["state"], before, rtol=0.0, atol=0.0)
    train([ours], 1)
    assert memories(states_of(ours, name)) == 2
    for optimizer in copies:
        torch.testing.assert_close(optimizer.state_dict()["state"], ours.state_dict()["state"], rtol=0.0, atol=0.0)
    ours.add_param_group({"params": make_params(shapes), "maximize": True})
    train([ours], 1)
    # a third one where bias corrections of the first step are other ones
    assert memories(states_of(ours, name)) <= 3


@each_shape
@each_case
def test_gradients_come_and_go(case: Case, shapes: list[tuple[int, ...]]) -> None:
    """States lie together for one pattern of gradients; others find them where they are."""
    ours, stock, name = start(case, shapes)
    for step, skip in enumerate([(), (0, 1), (5,), (), (0, 1), (0, 1, 2, 3), (), ()]):
        train([ours, stock], 1, first=step, skip=skip)
        if step == 5:
            for optimizer in (ours, stock):
                state = states_of(optimizer, name)[2]
                state.data = state * 2
    assert_same(ours, stock)


@pytest.mark.parametrize("after", [0, 1], ids=["first_step", "second_step"])
@each_shape
@each_case
def test_memory_is_replaced(case: Case, shapes: list[tuple[int, ...]], after: int) -> None:
    """Beneath a state that stays the same tensor; neither the first, the last nor the largest."""
    ours, stock, name = start(case, shapes)
    for step in range(4):
        train([ours, stock], 1, first=step)
        if step == after:
            for optimizer in (ours, stock):
                state = states_of(optimizer, name)[1]
                state.data = state * 50
    assert_same(ours, stock)
    assert memories(states_of(ours, name)) == 1


def share(states: list[Tensor]) -> None:
    """With other processes, as Hogwild does."""
    states[1].data = states[1].clone().share_memory_()


def make_views(states: list[Tensor]) -> None:
    """Of somebody's own tensor."""
    states[1].data, states[2].data = torch.stack([states[1], states[2]]).unbind()


@pytest.mark.parametrize("move", [share, make_views], ids=["shared", "views"])
@each_shape
@each_case
def test_memory_that_others_see_stays(
    case: Case, shapes: list[tuple[int, ...]], move: Callable[[list[Tensor]], None]
) -> None:
    ours, stock, name = start(case, shapes)
    train([ours, stock], 1)
    move(states_of(ours, name))
    addresses = [state.data_ptr() for state in states_of(ours, name)]
    train([ours, stock], 2, first=1)
    assert [state.data_ptr() for state in states_of(ours, name)] == addresses
    assert_same(ours, stock)


@each_case
def test_a_checkpoint_is_not_larger(case: Case) -> None:
    """What lies together is saved once."""
    ours, stock, _ = start(case, [(700,)] * 20)
    train([ours, stock], 2)
    sizes = []
    for optimizer in (ours, stock):
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        sizes.append(len(file.getvalue()))
    # entries of a zip file: a tensor each for stock
    assert sizes[0] <= sizes[1]
