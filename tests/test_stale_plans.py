"""Whatever changes between two steps, the next step sees it: each edit is made to ours and to stock alike."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from optimx._engine import engine
from tests.cases import (
    BY_NAME,
    CASES,
    CLOSE,
    VARIANTS,
    Case,
    assert_same,
    loop,
    make_leftovers,
    make_params,
    set_grads,
    train,
    twins,
)
from tests.edits import EDITS, SETTINGS, apply, complete, other_strides, tensors_of
from tests.engine import KINDS, PLANS, STATES, each, interpreted, params, params_of, pick, usual

SHAPES = [(5,), (3, 4), (6,)]


#: What the interpreter takes: a count more than Adam has, counts on the device, and a first step of its own.
TAKEN = pick("nadam-default", "asgd-default", "sgd-dampening")
#: Without those that subtract two averages: what edits make of them belongs together no more.
ROWS = [variant for variant in STATES if not variant.kwargs.get("centered")]
each_row = each(ROWS, TAKEN, lr=0.1)


def two_groups(params: list[Tensor]) -> list[dict[str, Any]]:
    # Rprop takes no weight decay
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.2, "weight_decay": 0.3}]


_EDITED = [
    pytest.param(*row.values, name, id=f"{row.id}-{name}", marks=row.marks)
    for row in params(ROWS, TAKEN, lr=0.1)
    for name, (_, when) in EDITS.items()
    if when(*row.values)
]


@pytest.mark.parametrize(("case", "kwargs", "name"), _EDITED)
def test_edit_between_steps(case: Case, kwargs: dict, name: str, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), kwargs, two_groups)
    train([ours, stock], 2)
    ours, stock = (apply(name, optimizer) for optimizer in (ours, stock))
    train([ours, stock], 2, first=2)
    # also where the dtype changed: the first steps were in float32; RMSprop's are ten times lr, and round so
    assert_same(ours, stock, {"rtol": 2e-6, "atol": 2e-6} if case.name == "rmsprop" else CLOSE[torch.float32])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_hyperparameter_is_edited(case: Case) -> None:
    edited = {setting for values in SETTINGS.values() for setting in values}
    edited |= {"decoupled_weight_decay", "fused", "capturable"}
    edited |= {setting for _, _, switched in SWITCHES for setting in switched}
    # nothing reads it in a group, or but to refuse a step
    edited |= {"initial_accumulator_value", "train_mode"}
    assert case.cls(make_params([()])).defaults.keys() <= edited


#: An order in which none takes away what a later one needs.
ROW = [
    "param_data_elsewhere",
    "state_tensor_replaced",
    "weight_decay",
    "first_state_cleared",
    "add_param_group",
    "step_written_in_place",
    "mu_product_written_in_place",
    "eta_written_in_place",
    "param_and_state_strides",
    "state_data_elsewhere",
    "capturable",
    "deepcopied",
    "momentum_buffer_deleted",
    "reorder_params",
    "step_replaced",
    "mu_replaced",
    "lr_to_tensor",
    "load_own_state_dict",
    "last_state_cleared",
    "move_param_to_next_group",
    "remove_first_param",
    "betas",
    "dampening",
    "param_data_other_values",
]


@each(ROWS, PLANS, lr=0.1)
def test_edits_in_a_row(case: Case, kwargs: dict, device: torch.device) -> None:
    """Plans that are kept for other patterns of gradients must not come back when something else has changed."""
    ours, stock, _ = twins(case, make_params(SHAPES, device), kwargs, two_groups)
    train([ours, stock], 1)
    for step, name in enumerate(name for name in ROW if EDITS[name][1](case, kwargs)):
        ours, stock = (apply(name, optimizer) for optimizer in (ours, stock))
        train([ours, stock], 1, first=2 * step + 1, skip=[step % 2])
        train([ours, stock], 1, first=2 * step + 2)
    # forty steps at lr 0.1 make the roundings of CLOSE ten times as large
    assert_same(ours, stock, {"rtol": 2e-5, "atol": 2e-6})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh_state", "converted_state"])
@each_row
def test_model_to_half(case: Case, kwargs: dict, fresh: bool, dtype: torch.dtype, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), {**kwargs, **usual(case, eps=1e-3)})
    train([ours, stock], 2)
    for optimizer in (ours, stock):
        for param in params_of(optimizer):
            param.grad = None
            param.data = param.data.to(dtype)
            if fresh:
                optimizer.state[param].clear()
            for name, value in tensors_of(optimizer.state[param]).items():
                optimizer.state[param][name] = value.to(dtype)
        complete(optimizer)
    train([ours, stock], 2, first=2)
    # stock's loop rounds after each of its ten operations, ours once a step
    assert_same(ours, stock, {"rtol": 0.05, "atol": 0.02})
    assert all(value.dtype is dtype for p in params_of(ours) for value in (p, *tensors_of(ours.state[p]).values()))


#: Arguments before and after, which add states.
SWITCHES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("adam", {}, {"amsgrad": True}),
    ("adamw", {}, {"amsgrad": True}),
    ("sgd", {"momentum": 0.0}, {"momentum": 0.9}),
    ("sgd", {"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.5}),
    ("sgd", {"momentum": 0.0}, {"momentum": 0.9, "nesterov": True}),
    ("rmsprop", {"momentum": 0.0}, {"momentum": 0.9}),
    ("rmsprop", {"momentum": 0.0}, {"centered": True}),
    ("rmsprop", {"momentum": 0.0}, {"momentum": 0.9, "centered": True}),
]


@interpreted
@pytest.mark.parametrize(("name", "kwargs", "switched"), SWITCHES, ids=str)
def test_states_that_a_setting_adds(name: str, kwargs: dict, switched: dict, device: torch.device) -> None:
    """Stock (but its SGD) fails with a KeyError; it is given zeros, what it would have begun with."""
    case = BY_NAME[name]
    ours, stock, copies = twins(case, make_params(SHAPES, device), {"lr": 0.1, **kwargs})
    before = {key: stock.param_groups[0][key] for key in switched}
    train([ours, stock], 2)
    for param in copies if name != "sgd" else ():
        for added in {*case.state_names(**switched)} - {*case.state_names(**kwargs)}:
            stock.state[param][added] = torch.zeros_like(param)
    for step, setting in enumerate((switched, before, switched), start=1):
        for optimizer in (ours, stock):
            optimizer.param_groups[0].update(setting)
        train([ours, stock], 2, first=2 * step)
        assert_same(ours, stock)


@pytest.mark.parametrize("index", [0, -1], ids=["first", "last"])
@each_row
def test_deleted_state_is_made_anew(case: Case, kwargs: dict, index: int, device: torch.device) -> None:
    """Stock (but its SGD) fails with a KeyError; it is given what it would have begun with."""
    ours, stock, copies = twins(case, make_params(SHAPES, device), kwargs)
    train([ours, stock], 2)
    param, twin, group = params_of(ours)[index], copies[index], stock.param_groups[0]
    for step, name in enumerate((*case.state_names(**kwargs), *case.cls.rule.scalars)):
        del ours.state[param][name]
        if isinstance(stock, torch.optim.SGD):
            del stock.state[twin][name]
        elif name in case.cls.rule.scalars:
            stock.state[twin][name].fill_(case.cls.rule.new_scalar(name, group))
        else:
            stock.state[twin][name] = case.cls.rule.new_state(name, twin, group, stock.defaults)
        train([ours, stock], 1, first=2 + step)
        assert_same(ours, stock)


@each_row
def test_hyperparameter_lists_changed_in_place(case: Case, kwargs: dict, device: torch.device) -> None:
    lists = {"betas": [0.9, 0.999], "etas": [0.5, 1.2], "step_sizes": [1e-6, 0.11]}
    ours, stock, _ = twins(case, make_params(SHAPES, device), kwargs)
    for optimizer in (ours, stock):
        optimizer.param_groups[0].update(copy.deepcopy({name: v for name, v in lists.items() if case.has(name)}))
    for step in range(4):
        train([ours, stock], 1, first=step)
        for optimizer in (ours, stock):
            for value in optimizer.param_groups[0].values():
                if isinstance(value, list) and isinstance(value[0], float):
                    value[step % 2] *= 0.8
    assert_same(ours, stock)


@each([variant for variant in VARIANTS if variant.name.startswith("tensor_")], KINDS)
def test_hyperparameter_tensors_written_in_place(case: Case, kwargs: dict, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), kwargs)
    for step in range(3):
        train([ours, stock], 1, first=step)
        for optimizer in (ours, stock):
            group = optimizer.param_groups[0]
            for value in (group["lr"], *group.get("betas", ())):
                if isinstance(value, Tensor):
                    value.mul_(0.5)
    assert_same(ours, stock)


@pytest.mark.parametrize(
    "skips",
    [
        pytest.param([(0,), (1,), (0,), (1,)], id="alternating"),
        pytest.param([(), (1,), (), (1,), ()], id="vanishing"),
        pytest.param([(0, 1, 2), (1, 2), (2,), ()], id="appearing"),
        pytest.param([(0, 1), (0, 1, 2), (0, 1), (2,)], id="none_between"),
        pytest.param([(i % 3, i * i % 3) for i in range(8)], id="more_patterns_than_plans"),
    ],
)
@each_row
def test_gradients_come_and_go(case: Case, kwargs: dict, skips: list[tuple[int, ...]], device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), kwargs, two_groups)
    for step, skip in enumerate(skips):
        train([ours, stock], 1, first=step, skip=skip)
        # counts of a pattern's own, written while another is in use
        for optimizer in (ours, stock):
            state = optimizer.state.get(params_of(optimizer)[0], {})
            for name in case.cls.rule.scalars if step == 2 and state else ():
                state[name].add_(5) if name == "step" else state[name].mul_(0.5)
    assert_same(ours, stock)


@interpreted
@pytest.mark.parametrize("case", [case for case in CASES if "step" in case.cls.rule.scalars], ids=lambda c: c.name)
def test_a_bucket_that_comes_late(case: Case, device: torch.device) -> None:
    """Its counts and those of the buckets that are there come to lie together, and all go on counting."""
    early, late = make_params([(5,)], device), make_params([(7,)], device, torch.float64)
    ours, stock, _ = twins(case, [*early, *late], usual(case))
    for step, skip in enumerate([(1,), (), (), (0,), ()]):
        train([ours, stock], 1, first=step, skip=skip)
    assert_same(ours, stock, CLOSE[torch.float32])
    if "step" in case.cls.rule.scalars:
        assert [float(ours.state[param]["step"]) for param in params_of(ours)] == [4.0, 4.0]


@interpreted
@pytest.mark.parametrize("case", [case for case in CASES if "step" in case.cls.rule.scalars], ids=lambda c: c.name)
def test_members_of_one_bucket_with_steps_of_their_own(case: Case, device: torch.device) -> None:
    """What depends on a count, RAdam's rectification from its sixth step on for one, is each member's own."""
    ours, stock, _ = twins(case, make_params([(3,)] * 4, device), usual(case))
    for step in range(7):
        train([ours, stock], 1, first=step, skip=range(3 - step))
    (plan, *_) = ours._engine.plans
    (bucket,) = plan.buckets
    assert len(bucket.positions) == 4
    assert_same(ours, stock)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda grad: other_strides(grad), id="strides"),
        pytest.param(lambda grad: torch.stack([grad, grad], -1)[..., 0], id="gaps"),
        pytest.param(lambda grad: torch.cat([grad.new_zeros(1), grad.flatten()])[1:].view(grad.shape), id="misaligned"),
        pytest.param(lambda grad: grad.flatten()[0].expand(grad.shape), id="expanded"),
    ],
)
@each_row
def test_gradient_layout_changes(
    case: Case, kwargs: dict, make: Callable[[Tensor], Tensor], device: torch.device
) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), kwargs)
    for step in range(4):
        for optimizer in (ours, stock):
            set_grads(params_of(optimizer), step)
            for param in params_of(optimizer) if step % 2 else ():
                param.grad = make(param.grad)
            optimizer.step()
    assert_same(ours, stock)


@each_row
def test_freed_memory_is_reused_at_other_sizes(case: Case, kwargs: dict, device: torch.device) -> None:
    """Addresses come back with other shapes and dtypes; nothing may take them for the tensors that were there."""
    ours, stock, _ = twins(case, make_params([(64,), (64,)], device), kwargs)
    for round_, size in enumerate([64, 32, 64, 16, 48]):
        for optimizer in (ours, stock):
            for param in params_of(optimizer):
                param.grad = None
                optimizer.state.pop(param, None)
                # first free, then ask for as many bytes
                param.data = param.data.new_empty(0)
                dtype = torch.float64 if size == 32 else torch.float32
                param.data = torch.linspace(0, 1, size, device=device, dtype=dtype)
            complete(optimizer)
        train([ours, stock], 1, first=round_)
        assert_same(ours, stock, CLOSE[torch.float32])


@each_row
def test_state_memory_is_reused_at_another_dtype(case: Case, kwargs: dict, device: torch.device) -> None:
    if case.name == "adafactor":
        pytest.skip("steps by averages as they are stored, here rounded")
    ours, stock, (twin,) = twins(case, make_params([(64,)], device), kwargs)
    train([ours, stock], 2)
    mine, theirs = ours.state[params_of(ours)[0]], stock.state[twin]
    for i, name in enumerate(case.state_names(**kwargs)):
        rounded = mine[name].to(torch.bfloat16)
        mine[name].data = mine[name].new_empty(0)
        mine[name].data = rounded.clone()
        theirs[name].copy_(rounded)
        train([ours, stock], 1, first=2 + i)
        assert mine[name].dtype is torch.bfloat16
        torch.testing.assert_close(params_of(ours)[0], twin, **CLOSE[torch.float32])
        for key, value in tensors_of(mine).items():
            torch.testing.assert_close(value.float(), theirs[key], **CLOSE[value.dtype])
            # the next step of both begins with what ours has rounded
            theirs[key].copy_(value)


@each_row
def test_two_optimizers_over_the_same_parameters(case: Case, kwargs: dict, device: torch.device) -> None:
    params = make_params(SHAPES, device)
    ours, stock, copies = twins(case, params, kwargs)
    ours_2, stock_2 = case.cls(params, **case.other), loop(case, copies, **case.other)
    for step in range(3):
        train([ours, stock], 1, first=step)
        train([ours_2, stock_2], 1, first=10 + step, skip=[step])
    assert_same(ours, stock)
    assert_same(ours_2, stock_2)


@each_row
def test_copies_share_nothing(case: Case, kwargs: dict, device: torch.device) -> None:
    """An optimizer, its copy, and one that loaded its checkpoint: each goes on as if the others were not there."""
    params = make_params(SHAPES, device)
    ours, stock, _ = twins(case, params, kwargs)
    train([ours, stock], 2)
    loaded = case.cls([Parameter(param.detach().clone()) for param in params], **kwargs)
    loaded.load_state_dict(copy.deepcopy(ours.state_dict()))
    pairs = [(ours, stock), (copy.deepcopy(ours), copy.deepcopy(stock)), (loaded, copy.deepcopy(stock))]
    for step in range(2, 5):
        for i, pair in enumerate(pairs):
            train(pair, 1, first=step + 10 * i, skip=[(step + i) % 3])
    for pair in pairs:
        assert_same(*pair)


@each_row
def test_alternating_with_stock_over_one_state(case: Case, kwargs: dict, device: torch.device) -> None:
    """Stock counts in the very tensors that are ours."""
    params = make_params(SHAPES, device)
    ours, stock, _ = twins(case, params, kwargs)
    guest = loop(case, params, **kwargs)
    train([ours, stock], 1)
    guest.state = ours.state
    for step in range(1, 5):
        train([guest if step % 2 else ours, stock], 1, first=step)
    assert_same(ours, stock)


@pytest.mark.parametrize(
    "skips",
    [[(0,), (1,)], [(2,), (0,)], [(), (2,)], [(0,), (1,), (2,)]],
    ids=["overlap", "ends", "subset", "rotating"],
)
@each_row
def test_plans_of_recurring_patterns_are_kept(
    case: Case, kwargs: dict, skips: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """A mixture of experts has other gradients every step; patterns that overlap must not plan anew each time."""
    made = []

    class CountedPlan(engine.StepPlan):
        def __init__(self, *args: Any) -> None:
            made.append(self)
            super().__init__(*args)

    monkeypatch.setattr(engine, "StepPlan", CountedPlan)
    optimizer = case.cls(make_params([(1,)] * 3, device), **kwargs)
    for step in range(4 * len(skips)):
        if step == 2 * len(skips):
            made.clear()
        train([optimizer], 1, first=step, skip=skips[step % len(skips)])
    assert made == []


@each_row
def test_what_was_replaced_is_freed(case: Case, kwargs: dict, device: torch.device) -> None:
    """Plans are kept for other patterns of gradients, not to hold a model's old parameters and state in memory."""
    params = make_params([(5,), (3,)], device)
    optimizer = case.cls(params, **kwargs)
    for step in range(3):
        train([optimizer], 1, first=step, skip=[step])
    old = [weakref.ref(tensor) for param in params for tensor in (param, *tensors_of(optimizer.state[param]).values())]
    optimizer.state.clear()
    optimizer.param_groups[0]["params"] = make_params([(5,), (3,)], device, seed=1)
    del params
    train([optimizer], 2)
    gc.collect()
    assert [reference() for reference in old] == [None] * len(old)


@each_row
def test_gradients_are_freed_by_zero_grad(case: Case, kwargs: dict, device: torch.device) -> None:
    params = [*make_params(SHAPES, device), *make_leftovers(case, [(3,)], device)]
    optimizer = case.cls(params, **kwargs)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        grads = [weakref.ref(param.grad) for param in params]
        optimizer.step()
        optimizer.zero_grad()
        assert [grad() for grad in grads] == [None] * len(params)
