"""Checkpoints: what stock saved continues with ours and the other way round, mid-training, with the same keys."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from tests.cases import CASES, CLOSE, Case, assert_same, make_params, set_grads, train, twins

pytestmark = pytest.mark.interpreted

SHAPES = [(5,), (3, 4), ()]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def through_a_file(value: Any, weights_only: bool = True) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


def rebuilt(cls: type[Optimizer], optimizer: Optimizer, **kwargs: Any) -> Optimizer:
    """A fresh optimizer on copies of the parameters, with other hyperparameters than will be loaded."""
    copies = [Parameter(param.detach().clone()) for param in params_of(optimizer)]
    fresh = cls([{"params": copies[:1]}, {"params": copies[1:]}], lr=7.0, **kwargs)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    return fresh


def two_groups(params: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": params[:1]}, {"params": params[1:], "lr": 0.2, "weight_decay": 0.3}]


def described(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Everything of a state dict but the values of large tensors."""
    return {
        "groups": state_dict["param_groups"],
        "state": {
            i: {name: (value.shape, value.dtype, value.device.type, value.stride()) for name, value in state.items()}
            for i, state in state_dict["state"].items()
        },
        "keys": [*state_dict],
    }


VARIANTS = [
    pytest.param(case, kwargs, id=f"{case.name}-{name}")
    for case in CASES
    for name, kwargs in case.variants.items()
    if not any(map(torch.is_tensor, (kwargs.get("lr"), *kwargs.get("betas", ()))))
]


@pytest.mark.parametrize(("case", "kwargs"), VARIANTS)
def test_state_dict_has_stocks_keys_shapes_and_dtypes(case: Case, kwargs: dict, device: torch.device) -> None:
    dicts = []
    for cls in (case.cls, case.stock):
        params = [*make_params(SHAPES, device), *make_params([(2, 3)], device, torch.bfloat16)]
        optimizer = cls(two_groups(params), **kwargs)
        # a step count is float32 on the parameter's device under fused=True, on the CPU elsewhere
        train([optimizer], 2, skip=[1])
        dicts.append(described(optimizer.state_dict()))
    assert dicts[0] == dicts[1]


def test_max_grad_norm_is_not_in_the_state_dict() -> None:
    params = make_params(SHAPES)
    keys = CASES[0].stock(params).state_dict()["param_groups"][0].keys()
    assert CASES[0].cls(params, max_grad_norm=1.0).state_dict()["param_groups"][0].keys() == keys


@pytest.mark.parametrize(("case", "kwargs"), VARIANTS)
def test_ours_to_stock_to_ours(case: Case, kwargs: dict, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), {"lr": 0.1, **kwargs}, two_groups)
    train([ours, stock], 2)
    relay: Optimizer = ours
    for step, cls in enumerate((case.stock, case.cls), 2):
        relay = rebuilt(cls, relay)
        train([relay, stock], 1, first=step, skip=[step - 2])
    assert_same(relay, stock)
    assert relay.param_groups[1]["lr"] == stock.param_groups[1]["lr"]


@pytest.mark.parametrize("fused", [None, True, False])
@pytest.mark.parametrize("saved", [None, True, False])
@each_case
def test_across_fused_flags(case: Case, saved: bool | None, fused: bool | None, device: torch.device) -> None:
    """The flags of the saved groups replace the optimizer's own, as in stock."""
    source = case.stock(two_groups(make_params(SHAPES, device)), lr=0.1, fused=saved)
    train([source], 2)
    ours, stock = rebuilt(case.cls, source, fused=fused), rebuilt(case.stock, source, fused=fused)
    assert ours.param_groups[0]["fused"] is saved
    train([ours, stock], 2, first=2)
    assert_same(ours, stock)
    assert described(ours.state_dict()) == described(stock.state_dict())


@pytest.mark.parametrize("flags", [{"foreach": True}, {"foreach": False}, {"fused": True, "capturable": True}], ids=str)
@each_case
def test_across_other_flags(case: Case, flags: dict[str, bool], device: torch.device) -> None:
    ours, stock, copies = twins(case, make_params(SHAPES, device), {"lr": 0.1}, two_groups)
    train([ours, stock], 2)
    saved = ours.state_dict()
    for group in saved["param_groups"]:
        group.update(flags)
    fresh = case.cls(two_groups(params_of(ours)), lr=0.1)
    fresh.load_state_dict(saved)
    train([fresh, stock], 2, first=2)
    for a, b in zip(params_of(fresh), copies, strict=True):
        torch.testing.assert_close(a, b, **CLOSE[torch.float32])
        assert fresh.state[a]["step"] == stock.state[b]["step"]


@each_case
def test_state_on_a_device_without_capturable(case: Case, device: torch.device) -> None:
    """Flags edited in the groups after fused steps leave the counts where they are."""
    ours, stock, _ = twins(case, make_params(SHAPES, device), {"lr": 0.1, "fused": True})
    train([ours, stock], 2)
    ours.param_groups[0]["fused"] = None
    train([ours, stock], 2, first=2)
    assert_same(ours, stock)


@pytest.mark.parametrize("when", ["before", "after"])
@each_case
def test_load_before_and_after_the_first_step(case: Case, when: str, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), {"lr": 0.1}, two_groups)
    train([ours, stock], 2)
    for optimizer in (ours, stock):
        saved = through_a_file(optimizer.state_dict())
        with torch.no_grad():
            if when == "after":
                train([optimizer], 2, first=50)
            for i, param in enumerate(params_of(optimizer)):
                param.fill_(0.5 + i)
            optimizer.load_state_dict(saved)
    train([ours, stock], 2, first=2)
    assert_same(ours, stock)


@each_case
def test_same_dict_loaded_twice(case: Case, device: torch.device) -> None:
    """One live dict, several optimizers: they count for themselves."""
    ours, stock, _ = twins(case, make_params(SHAPES, device), {"lr": 0.1}, two_groups)
    train([ours, stock], 2)
    saved = copy.deepcopy(ours.state_dict())
    first, second = (case.cls(two_groups([Parameter(p.detach().clone()) for p in params_of(ours)])) for _ in range(2))
    first.load_state_dict(copy.deepcopy(saved))
    second.load_state_dict(copy.deepcopy(saved))
    train([first], 2, first=2)
    train([second, stock], 2, first=2)
    assert_same(first, stock)
    assert_same(second, stock)
    first.load_state_dict(saved)
    assert [value["step"].item() for value in first.state.values()] == [2] * len(SHAPES)


@pytest.mark.parametrize("source", ["stock", "ours"])
@each_case
def test_live_state_dict_does_not_share_counts(case: Case, source: str, device: torch.device) -> None:
    """``ours.load_state_dict(other.state_dict())`` without a copy: torch hands the very tensors over."""
    cls = case.stock if source == "stock" else case.cls
    other = cls(make_params(SHAPES, device), lr=0.1)
    train([other], 2)
    ours = case.cls(make_params(SHAPES, device), lr=0.1)
    ours.load_state_dict(other.state_dict())
    train([ours], 3)
    assert [state["step"].item() for state in other.state.values()] == [2] * len(SHAPES)
    train([other], 1)
    assert [state["step"].item() for state in ours.state.values()] == [5] * len(SHAPES)
    assert [state["step"].item() for state in other.state.values()] == [3] * len(SHAPES)


def test_saved_dict_is_alive_as_stocks(device: torch.device) -> None:
    """A state dict holds the optimizer's tensors, not copies: who keeps one without a copy sees later steps."""
    for cls in (CASES[0].stock, CASES[0].cls):
        optimizer = cls(make_params(SHAPES, device))
        train([optimizer], 1)
        saved = optimizer.state_dict()
        train([optimizer], 2, first=1)
        assert saved["state"][0]["exp_avg"] is optimizer.state[params_of(optimizer)[0]]["exp_avg"]
        assert [state["step"].item() for state in saved["state"].values()] == [3] * len(SHAPES)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch"])
@each_case
def test_copies_train_on_their_own(case: Case, copied: str, device: torch.device) -> None:
    copies: dict[str, Callable[[Optimizer], Optimizer]] = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
        "torch": lambda optimizer: through_a_file(optimizer, weights_only=False),
    }
    ours, stock, _ = twins(case, make_params(SHAPES, device), {"lr": 0.1}, two_groups, max_grad_norm=1e9)
    train([ours, stock], 2)
    twin, stock_twin = copies[copied](ours), copies[copied](stock)
    assert type(twin) is case.cls
    assert twin.max_grad_norm == 1e9
    train([ours, stock], 1, first=2)
    train([twin, stock_twin], 2, first=7)
    train([ours, stock], 1, first=3)
    assert_same(ours, stock)
    assert_same(twin, stock_twin)


@each_case
def test_copy_of_an_optimizer_that_has_not_stepped(case: Case, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), {"lr": 0.1}, max_grad_norm=1e9)
    ours, stock = copy.deepcopy(ours), copy.deepcopy(stock)
    train([ours, stock], 2)
    assert_same(ours, stock)


def test_model_and_optimizer_copied_together(device: torch.device) -> None:
    model = nn.Linear(3, 2).to(device)
    optimizer = CASES[0].cls(model.parameters(), lr=0.1)
    train([optimizer], 2)
    model_2, optimizer_2 = copy.deepcopy((model, optimizer))
    assert params_of(optimizer_2)[0] is model_2.weight
    before = model.weight.detach().clone()
    train([optimizer_2], 1, first=2)
    assert torch.equal(model.weight, before)
    assert not torch.equal(model_2.weight, before)


@pytest.mark.skipif(not hasattr(torch.optim, "swap_in_optimizer_params_and_state"), reason="torch 2.13")
@each_case
def test_swapped_in_parameters_and_state(case: Case, device: torch.device) -> None:
    """The step acts on what is swapped in, in place, and the optimizer's own come back untouched."""
    ours, stock, _ = twins(case, make_params(SHAPES, device), {"lr": 0.1}, two_groups)
    # stock with our default flags: the group keys have to agree, their values come from the swapped-in dict
    swapped = []
    for optimizer in (ours, stock):
        train([optimizer], 2)
        params = {str(i): Parameter(torch.ones_like(param)) for i, param in enumerate(params_of(optimizer))}
        state = copy.deepcopy(optimizer.state_dict())
        state["param_groups"][0]["lr"] = 0.5
        for values in state["state"].values():
            values["step"].fill_(10.0)
        live = [param.detach().clone() for param in params_of(optimizer)]
        live_steps = [value["step"].clone() for value in optimizer.state.values()]
        for step in range(2):
            set_grads(params.values(), 20 + step)
            with torch.optim.swap_in_optimizer_params_and_state(optimizer, params, state):
                assert params_of(optimizer)[0] is params["0"]
                optimizer.step()
        assert all(map(torch.equal, live, params_of(optimizer)))
        assert all(map(torch.equal, live_steps, [value["step"] for value in optimizer.state.values()]))
        assert optimizer.param_groups[0]["lr"] == 0.1
        swapped.append((list(params.values()), state["state"]))
        train([optimizer], 1, first=2)
    torch.testing.assert_close(*swapped, **CLOSE[torch.float32])
    assert_same(ours, stock)


class _Wrapper:
    """As schedule-free wrappers do: keys of its own in the state, before the optimizer's first step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        for param in params_of(self.optimizer):
            state = self.optimizer.state[param]
            state.setdefault("z", param.detach().clone())
            state["seen"] = state.get("seen", 0) + 1
        self.optimizer.step()


@each_case
def test_states_that_others_began(case: Case, device: torch.device) -> None:
    """Stock fails with a KeyError; here only what is missing is filled in."""
    ours, stock, _ = twins(case, make_params(SHAPES, device), {"lr": 0.1, "amsgrad": True})
    initial = [param.detach().clone() for param in params_of(ours)]
    wrapper = _Wrapper(ours)
    for step in range(3):
        set_grads(params_of(ours), step)
        wrapper.step()
        train([stock], 1, first=step)
    for param, z in zip(params_of(ours), initial, strict=True):
        assert torch.equal(ours.state[param].pop("z"), z)
        assert ours.state[param].pop("seen") == 3
    assert_same(ours, stock)


@each_case
def test_state_begun_with_some_of_the_tensors(case: Case, device: torch.device) -> None:
    ours, stock, copies = twins(case, make_params(SHAPES, device), {"lr": 0.1})
    for param, twin in zip(params_of(ours), copies, strict=True):
        ours.state[param]["exp_avg"] = torch.ones_like(param)
        stock.state[twin].update(
            step=torch.tensor(0.0), exp_avg=torch.ones_like(twin), exp_avg_sq=torch.zeros_like(twin)
        )
    train([ours, stock], 2)
    assert_same(ours, stock)


@pytest.mark.parametrize("kind", [int, float], ids=["int", "float"])
@each_case
def test_old_checkpoints_count_with_numbers(case: Case, kind: type, device: torch.device) -> None:
    """Torch before 1.12 saved ``step`` as a number, and had fewer keys in its groups."""
    ours, stock, _ = twins(case, make_params(SHAPES, device), {"lr": 0.1})
    for optimizer in (ours, stock):
        train([optimizer], 3)
        saved = through_a_file(optimizer.state_dict())
        for state in saved["state"].values():
            state["step"] = kind(state["step"].item())
        for group in saved["param_groups"]:
            for key in ("maximize", "foreach", "capturable", "differentiable", "fused"):
                del group[key]
        optimizer.load_state_dict(saved)
        # the loop, as before
        optimizer.param_groups[0]["foreach"] = False if optimizer is stock else None
    train([ours, stock], 2, first=3)
    assert_same(ours, stock)


@each_case
def test_state_dtypes_follow_the_parameters(case: Case, device: torch.device) -> None:
    """As in stock, floating-point state is cast to the parameter's dtype when it is loaded; counts are not."""
    source = case.stock(make_params(SHAPES, device), lr=0.1)
    train([source], 2)
    ours, stock = (cls(make_params(SHAPES, device, torch.float64)) for cls in (case.cls, case.stock))
    for optimizer in (ours, stock):
        optimizer.load_state_dict(through_a_file(source.state_dict()))
    train([ours, stock], 2, first=2)
    assert_same(ours, stock, CLOSE[torch.float64])
    assert described(ours.state_dict()) == described(stock.state_dict())


@each_case
def test_default_dtype_float64(case: Case, device: torch.device) -> None:
    """Torch then counts in float64, and checkpoints with float32 counts go on in float32."""
    float32 = case.stock(make_params(SHAPES, device), lr=0.1)
    train([float32], 2)
    torch.set_default_dtype(torch.float64)
    try:
        ours, stock, _ = twins(case, make_params(SHAPES, device), {"lr": 0.1})
        train([ours, stock], 2)
        relay = rebuilt(case.cls, rebuilt(case.stock, ours_in_two_groups(case, ours)))
        train([ours, stock], 1, first=2)
        train([relay], 1, first=2)
        assert_same(ours, stock)
        assert_same(relay, stock)
        ours.load_state_dict(float32.state_dict())
        stock.load_state_dict(copy.deepcopy(float32.state_dict()))
        stock.param_groups[0]["foreach"] = False
        train([ours, stock], 1)
        assert_same(ours, stock)
        assert ours.state[params_of(ours)[0]]["step"].dtype is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def ours_in_two_groups(case: Case, ours: Optimizer) -> Optimizer:
    """The same optimizer as :func:`rebuilt` makes them."""
    split = case.cls(two_groups(params_of(ours)), lr=0.1)
    split.state = ours.state
    for group in split.param_groups:
        group.update({key: value for key, value in ours.param_groups[0].items() if key != "params"})
    return split


@each_case
def test_errors_of_loading(case: Case, device: torch.device) -> None:
    messages = []
    for cls in (case.cls, case.stock):
        optimizer = cls(make_params(SHAPES, device))
        for source in (cls(two_groups(make_params(SHAPES, device))), cls(make_params(SHAPES[:1], device))):
            with pytest.raises(ValueError) as error:
                optimizer.load_state_dict(source.state_dict())
            messages.append(str(error.value))
    assert messages[:2] == messages[2:]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@each_case
def test_distributed_checkpoint_state_dicts(case: Case, device: torch.device) -> None:
    """They name parameters, and fill an optimizer's state with a step of zero gradients before they load."""
    from torch.distributed.checkpoint import state_dict as dcp

    results = []
    for cls in (case.cls, case.stock):
        torch.manual_seed(0)
        model = nn.Linear(3, 2).to(device)
        optimizer = cls(model.parameters(), lr=0.1)
        train([optimizer], 2)
        saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
        assert saved["state"].keys() == {"weight", "bias"}
        fresh = cls(model.parameters(), lr=7.0)
        dcp.set_optimizer_state_dict(model, fresh, saved)
        train([fresh], 2, first=2)
        results.append((list(model.parameters()), dcp.get_optimizer_state_dict(model, fresh)["state"]))
    torch.testing.assert_close(*results, **CLOSE[torch.float32])
