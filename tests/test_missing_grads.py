"""Steps in which some gradients are missing, other ones each time: experts that got no token.

On the Triton backend nothing is planned for them: kernels leave a tensor alone whose gradient has address 0. Everywhere
such parameters, their states and their counts stay as they are, and the others take the step that stock takes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import optimx
from optimx._engine import engine
from tests.cases import BY_NAME, Case, assert_same, make_params, set_grads, twins
from tests.conftest import INTERPRETED
from tests.engine import PLANS, QUICK, STATES, each, interpreted, params_of

#: Vectors, matrices and kernels of convolutions; one has several chunks.
SHAPES = [(5,), (3, 4), (2, 1, 3, 3), (), (130,)] * (1 if INTERPRETED else 2)
MAX_NORM = 0.5
#: Clipping rounds in another order. RMSprop with a momentum sums steps of 10, whose ulp is 1e-6, and they cancel. One
#: step too many is a thousand times as much.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

#: Kinds of plans; LAMB's, ASGD's and Adafactor's are another walk or count on the device.
TAKEN = [variant for variant in PLANS if variant.id not in ("sgd-default", "sgd-momentum", "nadam-default")]
#: Without those that subtract two averages, and show how clipping rounds.
ROWS = [variant for variant in STATES if not variant.kwargs.get("centered")]
each_row = each(ROWS, [variant for variant in TAKEN if variant.case in QUICK], lr=0.05)

#: Ways of a step; ``capturable`` counts on the device.
WAYS = ("plain", "clip", "groups", "capturable", "capturable_clip_groups")


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Everything that is planned."""
    made: list[Any] = []

    class CountedPlan(engine.StepPlan):
        def __init__(self, *args: Any) -> None:
            made.append(self)
            super().__init__(*args)

    monkeypatch.setattr(engine, "StepPlan", CountedPlan)
    return made


def plans_once(device: torch.device) -> bool:
    """Torch's native kernels take lists of tensors, which are others where gradients are missing."""
    return INTERPRETED or device.type == "cuda"


class Pair:
    """Ours and stock side by side, of which only gradients and clipping are to be said."""

    def __init__(self, case: Case, kwargs: dict[str, Any], device: torch.device, way: str = "plain") -> None:
        self.params = make_params(SHAPES, device)
        ours: dict[str, Any] = {}
        self.clips = "clip" in way
        if self.clips:
            ours["max_grad_norm"] = MAX_NORM
        if "capturable" in way and device.type == "cuda":
            ours["capturable"] = True

        def groups(params: Sequence[Parameter]) -> Any:
            if "groups" not in way:
                return list(params)
            return [{"params": params[i::3], **(case.other if i == 1 else {})} for i in range(3)]

        self.ours, self.stock, self.copies = twins(case, self.params, kwargs, groups, **ours)
        if "capturable" in way and device.type == "cpu":
            # what a CPU's optimizer does after a step under GradScaler; capturable itself is for graphs
            self._engine.device_counts = True

    @property
    def _engine(self) -> Any:
        return self.ours._engine

    def set_grads(self, step: int, missing: Sequence[int], scale: float = 1.0) -> None:
        set_grads(self.params, step, scale, skip=missing)
        set_grads(self.copies, step, scale, skip=missing)

    def step(self, step: int, missing: Sequence[int]) -> None:
        self.set_grads(step, missing)
        if self.clips:
            clip_grad_norm_(self.copies, MAX_NORM)
        versions = [param._version for param in self.params]
        self.ours.step()
        self.stock.step()
        assert_same(self.ours, self.stock, CLOSE)
        for i, (param, version) in enumerate(zip(self.params, versions, strict=True)):
            assert (param._version == version) == (i in missing), f"what autograd is told of parameter {i}"
        assert all(p.grad is None for i, p in enumerate(self.params) if i in missing)


def some(seed: int, n: int = 1) -> list[int]:
    """Random ones of the parameters."""
    return random.Random(seed).sample(range(len(SHAPES)), n)


@pytest.mark.parametrize("way", WAYS)
@each(ROWS, TAKEN, lr=0.05)
def test_a_random_one_is_missing(case: Case, kwargs: dict, way: str, device: torch.device, plans: list[Any]) -> None:
    """Counts are equal at first and differ more and more."""
    pair = Pair(case, kwargs, device, way)
    for step in range(2):
        pair.step(step, [])
    plans.clear()
    for step in range(2, 5):
        pair.step(step, some(step))
    # once all are there again, and once a half is not
    pair.step(5, [])
    pair.step(6, some(6, len(SHAPES) // 2))
    if plans_once(device):
        assert plans == []
        assert {row.backend for row in optimx.explain(pair.ours).rows} == {"triton"}


@each_row
def test_the_same_are_missing(case: Case, kwargs: dict, device: torch.device, plans: list[Any]) -> None:
    """Counts of the others stay equal; and back."""
    pair, missing = Pair(case, kwargs, device), some(0)
    for step in range(2):
        pair.step(step, [])
    plans.clear()
    for step in range(2, 5):
        pair.step(step, missing)
    for step in range(5, 7):
        pair.step(step, [i for i in range(len(SHAPES)) if i not in missing])
    pair.step(7, [])
    assert plans == [] or not plans_once(device)


@pytest.mark.parametrize("way", ["plain", "capturable"])
@each_row
def test_the_first_gradient_comes_late(
    case: Case, kwargs: dict, way: str, device: torch.device, plans: list[Any]
) -> None:
    """Until then it has no state; from then on it is one of many."""
    pair, late = Pair(case, kwargs, device, way), [1, 3]
    for step in range(3):
        pair.step(step, [*late, *some(step)])
    for step in range(3, 5):
        pair.step(step, [])
    plans.clear()
    for step in range(5, 8):
        pair.step(step, [late[step % 2], *some(step)])
    assert plans == [] or not plans_once(device)


@interpreted
def test_a_state_that_lacks_something_is_not_completed(device: torch.device) -> None:
    """Old checkpoints have buffers that are None, and wrappers put keys of their own first: torch completes a state
    when the parameter takes a step, and with dampening a first step is another one."""
    pair = Pair(BY_NAME["sgd"], {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}, device)
    pair.step(0, [])
    for optimizer, params in ((pair.ours, pair.params), (pair.stock, pair.copies)):
        optimizer.state[params[1]]["momentum_buffer"] = None
    pair.set_grads(1, [1])
    pair.ours.step()
    pair.stock.step()
    assert pair.ours.state[pair.params[1]] == {"momentum_buffer": None}
    pair.step(2, [])
    adam = optimx.AdamW(pair.params)
    adam.state[pair.params[1]]["z"] = torch.zeros(4)
    pair.set_grads(3, [1])
    adam.step()
    assert [*adam.state[pair.params[1]]] == ["z"]


@pytest.mark.parametrize("way", ["groups", "capturable_clip_groups"])
@each_row
def test_a_group_loses_all(case: Case, kwargs: dict, way: str, device: torch.device, plans: list[Any]) -> None:
    """And all groups do: nothing happens, and nothing is counted."""
    pair, everything = Pair(case, kwargs, device, way), range(len(SHAPES))
    for step in range(2):
        pair.step(step, [])
    plans.clear()
    for step, missing in enumerate([everything[1::3], everything[::3], everything, [*everything[1:]], []], 2):
        pair.step(step, missing)
    assert plans == [] or not plans_once(device)


@pytest.mark.parametrize("clip", [False, True], ids=["step", "clip"])
@pytest.mark.parametrize("scaler_cls", [torch.amp.GradScaler, optimx.GradScaler], ids=["torch", "optimx"])
@each_row
def test_under_a_scaler(
    case: Case, kwargs: dict, scaler_cls: Any, clip: bool, device: torch.device, plans: list[Any]
) -> None:
    """One step is skipped, for an infinite gradient among those that are there."""
    pair = Pair(case, kwargs, device, "clip" if clip else "plain")
    scalers = [
        (scaler_cls(device.type, init_scale=8.0, growth_interval=100), pair.ours, pair.params),
        (torch.amp.GradScaler(device.type, init_scale=8.0, growth_interval=100), pair.stock, pair.copies),
    ]
    for step in range(6):
        if step == 2:
            plans.clear()
        missing = some(step) if step else []
        pair.set_grads(step, missing, scale=scalers[0][0].get_scale())
        for scaler, optimizer, params in scalers:
            present = [param for param in params if param.grad is not None]
            if step == 3:
                present[-1].grad.view(-1)[-1] = float("inf")
            scaler.scale(torch.ones((), device=device))
            if clip and optimizer is pair.stock:
                scaler.unscale_(optimizer)
                clip_grad_norm_(params, MAX_NORM)
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0][0].get_scale() == scalers[1][0].get_scale() == (4.0 if step >= 3 else 8.0)
        assert_same(pair.ours, pair.stock, CLOSE)
    assert plans == [] or not plans_once(device)


@each_row
def test_the_last_state_is_what_the_next_step_finds(
    case: Case, kwargs: dict, device: torch.device, plans: list[Any]
) -> None:
    """A checkpoint between steps with missing gradients goes on as stock's does."""
    pair = Pair(case, kwargs, device)
    for step in range(4):
        pair.step(step, some(step) if step else [])
    fresh = Pair(case, kwargs, device)
    for ours, theirs in ((fresh.params, pair.params), (fresh.copies, pair.copies)):
        for a, b in zip(ours, theirs, strict=True):
            a.data.copy_(b.data)
    fresh.ours.load_state_dict(pair.ours.state_dict())
    fresh.stock.load_state_dict(pair.stock.state_dict())
    for step in range(4, 7):
        fresh.step(step, some(step))
    assert [*map(id, params_of(fresh.ours))] == [*map(id, fresh.params)]
