"""Checkpoints: what stock saved continues with ours and the other way round, mid-training, with the same keys."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from tests.cases import BY_NAME, CASES, CLOSE, Case, assert_close, assert_same, make_params, set_grads, train, twins
from tests.engine import (
    BESIDE_STOCK,
    PLANS,
    QUICK,
    STATES,
    builders,
    each,
    each_case,
    each_of,
    interpreted,
    params_of,
    usual,
    with_flags,
)

SHAPES = [(5,), (3, 4), ()]

with_fused = [case for case in CASES if case.has("fused")]
each_case_with_fused = pytest.mark.parametrize("case", with_fused, ids=lambda case: case.name)


def through_a_file(value: Any, weights_only: bool = True) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


def rebuilt(make: Callable[..., Optimizer], optimizer: Optimizer, **kwargs: Any) -> Optimizer:
    """A fresh optimizer on copies of the parameters, with other hyperparameters than will be loaded."""
    copies = [Parameter(param.detach().clone()) for param in params_of(optimizer)]
    fresh = make([{"params": copies[:1]}, {"params": copies[1:]}], lr=7.0, **kwargs)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    return fresh


def two_groups(params: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": params[:1]}, {"params": params[1:], "lr": 0.02}]


def scalars_of(case: Case, optimizer: Optimizer) -> list[Tensor]:
    """Copies of the scalar states."""
    names = case.cls.rule.scalars
    return [optimizer.state[param][name].detach().clone() for param in params_of(optimizer) for name in names]


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


#: Arithmetic has no part in checkpoints, which states there are does; of a fused optimizer they are counted elsewhere.
SAVED = [*STATES, *(variant for variant in BESIDE_STOCK if "fused" in variant.kwargs)]
TAKEN = [variant for variant in PLANS if variant.case in QUICK]


@each(SAVED, TAKEN)
def test_state_dict_has_stocks_keys_shapes_and_dtypes(case: Case, kwargs: dict, device: torch.device) -> None:
    dicts = []
    for make in builders(case):
        params = [*make_params(SHAPES, device), *make_params([(2, 3)], device, torch.bfloat16)]
        optimizer = make(two_groups(params), **kwargs)
        # a step count is float32 on the parameter's device under fused=True, on the CPU elsewhere
        train([optimizer], 2, skip=[1])
        dicts.append(described(optimizer.state_dict()))
    assert dicts[0] == dicts[1]


@each_case
def test_settings_of_the_whole_optimizer_are_not_in_the_state_dict(case: Case) -> None:
    make_ours, make_stock = builders(case)
    keys = make_stock(make_params(SHAPES)).state_dict()["param_groups"][0].keys()
    assert make_ours(make_params(SHAPES), max_grad_norm=1.0).state_dict()["param_groups"][0].keys() == keys


@each(SAVED, TAKEN)
def test_ours_to_stock_to_ours(case: Case, kwargs: dict, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), {"lr": 0.05, **kwargs}, two_groups)
    train([ours, stock], 2)
    relay: Optimizer = ours
    for step, make in enumerate(reversed(builders(case)), 2):
        relay = rebuilt(make, relay)
        train([relay, stock], 1, first=step, skip=[step - 2])
    assert_same(relay, stock)
    assert relay.param_groups[1]["lr"] == stock.param_groups[1]["lr"]


#: What of a group says which states there are, and other arguments.
TOGGLES: list[tuple[str, dict[str, tuple[Any, Any]], dict[str, Any]]] = [
    ("sgd", {"momentum": (0.0, 0.9)}, {}),
    ("sgd", {"momentum": (0.0, 0.9)}, {"dampening": 0.5, "weight_decay": 0.1}),
    ("sgd", {"nesterov": (False, True)}, {"momentum": 0.9}),
    ("rmsprop", {"momentum": (0.0, 0.9)}, {}),
    ("rmsprop", {"centered": (False, True)}, {"momentum": 0.9}),
    ("adamw", {"amsgrad": (False, True)}, {}),
]


@interpreted
@pytest.mark.parametrize(("name", "toggled", "kwargs"), TOGGLES, ids=str)
def test_states_toggled_a_group(name: str, toggled: dict, kwargs: dict, device: torch.device) -> None:
    """Going through checkpoints: states stay where they were, and come where they are missing."""
    case = BY_NAME[name]
    off, on = ({key: values[i] for key, values in toggled.items()} for i in (0, 1))

    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": params[:1], **off}, {"params": params[1:], **on}]

    ours, stock, _ = twins(case, make_params(SHAPES, device), {"lr": 0.1, **kwargs}, groups)
    train([ours, stock], 2)
    assert_same(ours, stock)
    for step, settings in enumerate([(on, off), (on, off), (off, on)], 2):
        ours, stock = rebuilt(case.cls, ours), rebuilt(case.stock, stock)
        for optimizer in (ours, stock):
            for group, setting in zip(optimizer.param_groups, settings, strict=True):
                group.update(setting)
        for param in params_of(stock) if name != "sgd" else ():
            # torch's other classes make states at the first step only, and then fail with a KeyError
            for key in set(case.state_names(**kwargs, **on)) - stock.state[param].keys():
                if param is not params_of(stock)[0] or step == 2:
                    stock.state[param][key] = torch.zeros_like(param)
        train([ours, stock], 1, first=step)
        assert_same(ours, stock)


@interpreted
@pytest.mark.parametrize("fused", [None, True, False])
@pytest.mark.parametrize("saved", [None, True, False])
@each_case_with_fused
def test_across_fused_flags(case: Case, saved: bool | None, fused: bool | None, device: torch.device) -> None:
    """The flags of the saved groups replace the optimizer's own, as in stock."""
    source = case.stock(two_groups(make_params(SHAPES, device)), **usual(case, fused=saved))
    train([source], 2)
    ours, stock = rebuilt(case.cls, source, fused=fused), rebuilt(case.stock, source, fused=fused)
    assert ours.param_groups[0]["fused"] is saved
    train([ours, stock], 2, first=2)
    assert_same(ours, stock)
    assert described(ours.state_dict()) == described(stock.state_dict())


@each(with_flags({"foreach": True}, {"foreach": False}, {"fused": True, "capturable": True}), QUICK)
def test_across_other_flags(case: Case, kwargs: dict[str, bool], device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case), two_groups)
    train([ours, stock], 2)
    saved = ours.state_dict()
    for group in saved["param_groups"]:
        group.update(kwargs)
    fresh = case.cls(two_groups(params_of(ours)), lr=0.1)
    fresh.load_state_dict(saved)
    train([fresh, stock], 2, first=2)
    assert_same(fresh, stock)


@interpreted
@each_case_with_fused
def test_state_on_a_device_without_capturable(case: Case, device: torch.device) -> None:
    """Flags edited in the groups after fused steps leave the counts where they are."""
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case, fused=True))
    train([ours, stock], 2)
    ours.param_groups[0]["fused"] = None
    train([ours, stock], 2, first=2)
    assert_same(ours, stock)


@pytest.mark.parametrize("when", ["before", "after"])
@each_case
def test_load_before_and_after_the_first_step(case: Case, when: str, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case), two_groups)
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
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case), two_groups)
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
    if case.cls.rule.scalars:
        assert [value["step"].item() for value in first.state.values()] == [2] * len(SHAPES)


@pytest.mark.parametrize("source", ["stock", "ours"])
@each_case
def test_live_state_dict_does_not_share_counts(case: Case, source: str, device: torch.device) -> None:
    """``ours.load_state_dict(other.state_dict())`` without a copy: torch hands the very tensors over."""
    make_ours, make_stock = builders(case)
    other = (make_stock if source == "stock" else make_ours)(make_params(SHAPES, device), **usual(case))
    train([other], 2)
    ours = make_ours(make_params(SHAPES, device), **usual(case))
    ours.load_state_dict(other.state_dict())
    before = scalars_of(case, other)
    train([ours], 3)
    assert scalars_of(case, other) == before
    after = scalars_of(case, ours)
    train([other], 1)
    assert scalars_of(case, ours) == after
    if case.cls.rule.scalars:
        assert [state["step"].item() for state in ours.state.values()] == [5] * len(SHAPES)
        assert [state["step"].item() for state in other.state.values()] == [3] * len(SHAPES)


@each_case
def test_saved_dict_is_alive_as_stocks(case: Case, device: torch.device) -> None:
    """A state dict holds the optimizer's tensors, not copies: who keeps one without a copy sees later steps."""
    for make in builders(case):
        optimizer = make(make_params(SHAPES, device), **usual(case))
        train([optimizer], 1)
        saved = optimizer.state_dict()
        train([optimizer], 2, first=1)
        for i, param in enumerate(params_of(optimizer)):
            assert saved["state"][i].keys() == optimizer.state[param].keys()
            assert all(value is optimizer.state[param][name] for name, value in saved["state"][i].items())


@each_case
def test_own_states_are_loaded_where_they_are(case: Case, device: torch.device) -> None:
    """As by DCP, which has copied into them; at a model's size there is no room for another set. Stock's stay, too."""
    for make in builders(case):
        optimizer = make(make_params([(90, 70)], device), **usual(case))
        train([optimizer], 1)
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        (state,) = optimizer.state.values()
        large = [name for name, value in state.items() if value.numel() > 1]
        assert large
        assert all(state[name].data_ptr() == saved["state"][0][name].data_ptr() for name in large)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "torch": lambda optimizer: through_a_file(optimizer, weights_only=False),
}


@pytest.mark.parametrize("copied", COPIES)
@each_case
def test_copies_train_on_their_own(case: Case, copied: str, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case), two_groups, max_grad_norm=1e9)
    train([ours, stock], 2)
    twin, stock_twin = COPIES[copied](ours), COPIES[copied](stock)
    assert type(twin) is case.cls
    assert twin.max_grad_norm == 1e9
    train([ours, stock], 1, first=2)
    train([twin, stock_twin], 2, first=7)
    train([ours, stock], 1, first=3)
    assert_same(ours, stock)
    assert_same(twin, stock_twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_case
def test_checkpoint_continues_bitwise(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """In 16 bits too, where torch rounds NAdam's mu_product and ASGD's eta and mu to the parameter's dtype."""
    ours = case.cls(two_groups(make_params(SHAPES, device, dtype)), **usual(case))
    train([ours], 3, skip=[1])
    fresh = rebuilt(case.cls, ours)
    train([ours, fresh], 2, first=3)
    mine, theirs = ([params_of(each), each.state_dict()["state"]] for each in (ours, fresh))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("copied", COPIES)
@each(SAVED, ())
def test_copies_continue_bitwise(case: Case, kwargs: dict, copied: str, device: torch.device) -> None:
    ours = case.cls(two_groups(make_params(SHAPES, device)), **copy.deepcopy(kwargs), max_grad_norm=1.0)
    train([ours], 2, skip=[1])
    twin = COPIES[copied](ours)
    assert [twin.max_grad_norm, twin.capturable, twin.normalize_grads] == [1.0, False, False]
    train([ours, twin], 2, first=2)
    mine, theirs = ([params_of(each), each.state_dict()] for each in (ours, twin))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@each_case
def test_copy_keeps_settings_of_the_whole_optimizer(case: Case) -> None:
    keys = case.cls(make_params(SHAPES)).param_groups[0].keys()
    for name, value in (("max_grad_norm", 2.0), ("capturable", True), ("normalize_grads", True)):
        if name in inspect.signature(case.cls).parameters and name not in keys:
            ours = case.cls(make_params(SHAPES), **{name: value})
            for copied in COPIES.values():
                assert getattr(copied(ours), name) == value


@each_case
def test_copy_of_an_optimizer_that_has_not_stepped(case: Case, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case), max_grad_norm=1e9)
    ours, stock = copy.deepcopy(ours), copy.deepcopy(stock)
    train([ours, stock], 2)
    assert_same(ours, stock)


@each_case
def test_model_and_optimizer_copied_together(case: Case, device: torch.device) -> None:
    model = nn.Linear(3, 2).to(device)
    optimizer = case.cls(model.parameters(), **usual(case))
    train([optimizer], 2)
    model_2, optimizer_2 = copy.deepcopy((model, optimizer))
    assert params_of(optimizer_2)[0] is model_2.weight
    before = model.weight.detach().clone()
    train([optimizer_2], 1, first=2)
    assert torch.equal(model.weight, before)
    assert not torch.equal(model_2.weight, before)


@pytest.mark.skipif(not hasattr(torch.optim, "swap_in_optimizer_params_and_state"), reason="torch has none before 2.13")
@each_case
def test_swapped_in_parameters_and_state(case: Case, device: torch.device) -> None:
    """The step acts on what is swapped in, in place, and the optimizer's own come back untouched."""
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case), two_groups)
    # stock with our default flags: the group keys have to agree, their values come from the swapped-in dict
    swapped = []
    for optimizer in (ours, stock):
        train([optimizer], 2)
        params = {str(i): Parameter(torch.ones_like(param)) for i, param in enumerate(params_of(optimizer))}
        state = copy.deepcopy(optimizer.state_dict())
        state["param_groups"][0]["lr"] = 0.5
        for values in state["state"].values():
            if "step" in values:
                values["step"].fill_(10.0)
        live = copy.deepcopy([params_of(optimizer), optimizer.state_dict()["state"]])
        for step in range(2):
            set_grads(params.values(), 20 + step)
            with torch.optim.swap_in_optimizer_params_and_state(optimizer, params, state):
                assert params_of(optimizer)[0] is params["0"]
                optimizer.step()
        now = [params_of(optimizer), optimizer.state_dict()["state"]]
        torch.testing.assert_close(now, live, rtol=0, atol=0)
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
            state.setdefault("initial", param.detach().clone())
            state["seen"] = state.get("seen", 0) + 1
        self.optimizer.step()


@each_case
def test_states_that_others_began(case: Case, device: torch.device) -> None:
    """Stock fails with a KeyError, where it has more than a buffer; here only what is missing is filled in."""
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case, amsgrad=True, centered=True))
    initial = [param.detach().clone() for param in params_of(ours)]
    wrapper = _Wrapper(ours)
    for step in range(3):
        set_grads(params_of(ours), step)
        wrapper.step()
        train([stock], 1, first=step)
    for param, before in zip(params_of(ours), initial, strict=True):
        assert torch.equal(ours.state[param].pop("initial"), before)
        assert ours.state[param].pop("seen") == 3
    assert_same(ours, stock)


@each_case
def test_state_begun_with_some_of_the_tensors(case: Case, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case))
    rule, group = case.cls.rule, ours.param_groups[0]
    for param, twin in zip(params_of(ours), params_of(stock), strict=True):
        first, *others = case.state_names(param, **usual(case))
        begun = torch.ones_like(rule.new_state(first, param, group, ours.defaults))
        ours.state[param][first] = begun
        whole = {name: rule.new_state(name, twin, group, ours.defaults) for name in others}
        counts = {name: torch.tensor(rule.new_scalar(name, group)) for name in rule.scalars}
        stock.state[twin].update({**counts, first: begun.clone(), **whole})
    train([ours, stock], 2)
    assert_same(ours, stock)


@pytest.mark.parametrize("kind", [int, float], ids=["int", "float"])
@each_of([case for case in CASES if case.is_torchs])
def test_old_checkpoints_count_with_numbers(case: Case, kind: type, device: torch.device) -> None:
    """Torch before 1.12 saved ``step`` as a number, and had fewer keys in its groups."""
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case))
    for optimizer in (ours, stock):
        train([optimizer], 3)
        saved = through_a_file(optimizer.state_dict())
        for state in saved["state"].values():
            for name in case.cls.rule.scalars:
                state[name] = (kind if name == "step" else float)(state[name].item())
        for group in saved["param_groups"]:
            # Adafactor came later, and has always had a maximize
            for key in ("maximize", "foreach", "capturable", "differentiable", "fused"):
                if not (case.name == "adafactor" and key == "maximize"):
                    group.pop(key, None)
        optimizer.load_state_dict(saved)
        # the loop, as before
        optimizer.param_groups[0]["foreach"] = False if optimizer is stock else None
    train([ours, stock], 2, first=3)
    assert_same(ours, stock)


@each_case
def test_state_dtypes_follow_the_parameters(case: Case, device: torch.device) -> None:
    """As in stock, floating-point state is cast to the parameter's dtype when it is loaded; counts are not."""
    make_ours, make_stock = builders(case)
    source = make_stock(make_params(SHAPES, device), **usual(case))
    train([source], 2)
    ours, stock = (make(make_params(SHAPES, device, torch.float64)) for make in (make_ours, make_stock))
    for optimizer in (ours, stock):
        optimizer.load_state_dict(through_a_file(source.state_dict()))
    train([ours, stock], 2, first=2)
    for param, twin in zip(params_of(ours), params_of(stock), strict=True):
        assert ours.state[param].keys() == stock.state[twin].keys()
        assert all(ours.state[param][name].dtype is torch.float32 for name in case.cls.rule.scalars)
        # float32 scalars that stock has cast enter its arithmetic as float64
        close = CLOSE[torch.float32 if len(case.cls.rule.scalars) > 1 else torch.float64]
        torch.testing.assert_close(param, twin, **close)
        for name in case.state_names(param, **usual(case)):
            torch.testing.assert_close(ours.state[param][name], stock.state[twin][name], **close)


@each_case
def test_default_dtype_float64(case: Case, device: torch.device) -> None:
    """Torch then counts in float64, and checkpoints with float32 counts go on in float32."""
    make_ours, make_stock = builders(case)
    float32 = make_stock(make_params(SHAPES, device), **usual(case))
    train([float32], 2)
    torch.set_default_dtype(torch.float64)
    try:
        ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case))
        train([ours, stock], 2)
        # torch casts scalar states that are not called "step" to the parameter's dtype when it loads them
        relay = rebuilt(make_ours, rebuilt(make_stock, in_two_groups(make_ours, ours)))
        stock_relay = rebuilt(make_stock, rebuilt(make_stock, in_two_groups(make_stock, stock)))
        train([ours, stock, relay, stock_relay], 1, first=2)
        assert_same(ours, stock)
        assert_same(relay, stock_relay)
        ours.load_state_dict(float32.state_dict())
        stock.load_state_dict(copy.deepcopy(float32.state_dict()))
        if case.is_torchs:
            stock.param_groups[0]["foreach"] = False
        train([ours, stock], 1)
        assert_same(ours, stock)
        assert all(count.dtype is torch.float32 for count in scalars_of(case, ours))
    finally:
        torch.set_default_dtype(torch.float32)


def in_two_groups(make: Callable[..., Optimizer], optimizer: Optimizer) -> Optimizer:
    """The same optimizer as :func:`rebuilt` makes them."""
    split = make(two_groups(params_of(optimizer)), lr=0.1)
    split.state = optimizer.state
    for group in split.param_groups:
        group.update({key: value for key, value in optimizer.param_groups[0].items() if key != "params"})
    return split


@each_case
def test_hook_changes_what_is_loaded(case: Case, device: torch.device) -> None:
    """What the hook returns is loaded, not what it was given."""
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case))

    def halve(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(state_dict)
        for state in changed["state"].values():
            for name, value in state.items():
                value.mul_(2.0 if name == "step" else 0.5)
        return changed

    for optimizer in (ours, stock):
        train([optimizer], 2)
        optimizer.register_load_state_dict_pre_hook(halve)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train([ours, stock], 2, first=2)
    assert_same(ours, stock)


@each_case
def test_errors_of_loading(case: Case, device: torch.device) -> None:
    messages = []
    for make in builders(case):
        optimizer = make(make_params(SHAPES, device))
        for source in (make(two_groups(make_params(SHAPES, device))), make(make_params(SHAPES[:1], device))):
            with pytest.raises(ValueError) as error:
                optimizer.load_state_dict(source.state_dict())
            messages.append(str(error.value))
    assert messages[:2] == messages[2:]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@each_case
def test_distributed_checkpoint_state_dicts(case: Case, device: torch.device) -> None:
    """They name parameters, and fill an optimizer's state with a step of zero gradients before they load."""
    from torch.distributed.checkpoint import state_dict as dcp

    results: list[dict[str, Tensor]] = []
    for make in builders(case):
        torch.manual_seed(0)
        model = nn.Linear(3, 2).to(device)
        optimizer = make(model.parameters(), **usual(case))
        train([optimizer], 2)
        saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
        assert saved["state"].keys() == {"weight", "bias"}
        fresh = make(model.parameters(), **usual(case, lr=7.0))
        dcp.set_optimizer_state_dict(model, fresh, saved)
        train([fresh], 2, first=2)
        found = dict(model.named_parameters())
        for name, state in dcp.get_optimizer_state_dict(model, fresh)["state"].items():
            found |= {f"{name}.{key}": value for key, value in state.items()}
        results.append(found)
    mine, stocks = results
    assert mine.keys() == stocks.keys()
    for name, expected in stocks.items():
        # scalars may differ in device: torch moves all but step counts to the parameters' device when it loads them
        assert_close(mine[name], expected, CLOSE[torch.float32], name)
