"""Whatever changes between two steps, the next step sees it: each edit is made to ours and to stock alike."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from optimx import _step
from tests.cases import CASES, CLOSE, Case, assert_same, make_params, set_grads, train, twins

pytestmark = pytest.mark.interpreted

SHAPES = [(5,), (3, 4), (6,)]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
EDITS: dict[str, Callable[[Optimizer], Optimizer | None]] = {}


def edit(function: Callable[[Optimizer], Optimizer | None]) -> Callable[[Optimizer], Optimizer | None]:
    EDITS[function.__name__] = function
    return function


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def tensors_of(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a parameter's shape."""
    return {name: value for name, value in state.items() if name != "step"}


def other_strides(tensor: Tensor) -> Tensor:
    """A copy whose memory runs through the dimensions in the opposite order."""
    dims = [*reversed(range(tensor.dim()))]
    return tensor.detach().permute(dims).contiguous().permute(dims)


# parameters


@edit
def param_data_elsewhere(optimizer):
    for param in params_of(optimizer):
        param.data = param.data.clone()


@edit
def param_data_misaligned(optimizer):
    for param in params_of(optimizer):
        param.data = torch.cat([param.data.new_zeros(1), param.data.flatten()])[1:].view(param.shape)


@edit
def param_data_other_values(optimizer):
    for param in params_of(optimizer):
        param.data = torch.full_like(param, 0.5)


@edit
def param_strides(optimizer):
    for param in params_of(optimizer):
        param.data = other_strides(param)


@edit
def param_and_state_strides(optimizer):
    for param in params_of(optimizer):
        param.data = other_strides(param)
        for name, value in tensors_of(optimizer.state[param]).items():
            optimizer.state[param][name] = other_strides(value)


@edit
def param_set_(optimizer):
    with torch.no_grad():
        for param in params_of(optimizer):
            param.set_(param.detach().clone())


@edit
def params_swapped_for_tensors(optimizer):
    for param in params_of(optimizer):
        param.grad = None
        torch.utils.swap_tensors(param, Parameter(param.detach() + 1))


@edit
def param_share_memory(optimizer):
    for param in params_of(optimizer):
        if param.device.type == "cpu":
            param.share_memory_()


@edit
def shapes_change(optimizer):
    for param in params_of(optimizer):
        param.grad = None
        param.data = param.data[1:].clone()
        optimizer.state[param].clear()


@edit
def float64_with_fresh_state(optimizer):
    for param in params_of(optimizer):
        param.grad = None
        param.data = param.data.double()
    optimizer.state.clear()


@edit
def float64_with_converted_state(optimizer):
    for param in params_of(optimizer):
        param.grad = None
        param.data = param.data.double()
        for name, value in tensors_of(optimizer.state[param]).items():
            optimizer.state[param][name] = value.double()


@edit
def float64_with_state_data_converted(optimizer):
    for param in params_of(optimizer):
        param.grad = None
        param.data = param.data.double()
        for value in tensors_of(optimizer.state[param]).values():
            value.data = value.data.double()


@edit
def requires_grad_off(optimizer):
    params_of(optimizer)[0].requires_grad_(False)


# groups


@edit
def add_param_group(optimizer):
    optimizer.add_param_group({"params": make_params([(7,)], params_of(optimizer)[0].device), "lr": 0.5})


@edit
def add_empty_group(optimizer):
    optimizer.param_groups.insert(0, {**optimizer.param_groups[0], "params": [], "lr": 7.0})


@edit
def remove_last_param(optimizer):
    optimizer.param_groups[-1]["params"].pop()


@edit
def remove_first_param(optimizer):
    del optimizer.param_groups[0]["params"][0]


@edit
def remove_group(optimizer):
    del optimizer.param_groups[0]


@edit
def replace_params_list(optimizer):
    group = optimizer.param_groups[0]
    group["params"] = [Parameter(param.detach().clone()) for param in group["params"]]


@edit
def reorder_params(optimizer):
    optimizer.param_groups[0]["params"].reverse()


@edit
def move_param_to_next_group(optimizer):
    first, second, *_ = optimizer.param_groups
    second["params"].insert(0, first["params"].pop())


@edit
def swap_groups(optimizer):
    optimizer.param_groups.reverse()


@edit
def replace_group_dict(optimizer):
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.03}


# hyperparameters


def _set(**values: Any) -> Callable[[Optimizer], None]:
    def set_values(optimizer: Optimizer) -> None:
        optimizer.param_groups[0].update(copy.deepcopy(values))

    return set_values


EDITS |= {
    "lr": _set(lr=0.03),
    "lr_zero": _set(lr=0.0),
    "lr_to_tensor": _set(lr=torch.tensor(0.03)),
    "betas": _set(betas=(0.5, 0.6)),
    "betas_list": _set(betas=[0.5, 0.6]),
    "eps": _set(eps=1e-2),
    "weight_decay": _set(weight_decay=0.5),
    "maximize": _set(maximize=True),
    "decoupled_weight_decay": lambda optimizer: optimizer.param_groups[0].update(
        decoupled_weight_decay=not optimizer.param_groups[0]["decoupled_weight_decay"]
    ),
    "foreach": _set(foreach=True),
    "fused_false": _set(fused=False),
}


@edit
def amsgrad_with_its_state(optimizer):
    group = optimizer.param_groups[0]
    group["amsgrad"] = True
    for param in group["params"]:
        optimizer.state[param]["max_exp_avg_sq"] = torch.ones_like(param)


# state


@edit
def state_tensor_replaced(optimizer):
    for param in params_of(optimizer):
        optimizer.state[param]["exp_avg"] = torch.ones_like(param)


@edit
def state_tensor_of_last_param_replaced(optimizer):
    param = params_of(optimizer)[-1]
    optimizer.state[param]["exp_avg_sq"] = torch.ones_like(param)


@edit
def state_tensors_swapped_between_params(optimizer):
    first, _, last = params_of(optimizer)
    optimizer.state[first], optimizer.state[last] = optimizer.state[last], optimizer.state[first]
    last.data, first.data = first.data.clone(), last.data.clone()
    first.grad = last.grad = None


@edit
def state_written_in_place(optimizer):
    for param in params_of(optimizer):
        optimizer.state[param]["exp_avg"].fill_(2.0)


@edit
def state_data_elsewhere(optimizer):
    for param in params_of(optimizer):
        for value in tensors_of(optimizer.state[param]).values():
            value.data = value.data.clone() + 1


@edit
def state_data_strides(optimizer):
    for param in params_of(optimizer):
        for value in tensors_of(optimizer.state[param]).values():
            value.data = other_strides(value)


@edit
def state_strides(optimizer):
    for param in params_of(optimizer):
        optimizer.state[param]["exp_avg"] = other_strides(optimizer.state[param]["exp_avg"])


@edit
def state_share_memory(optimizer):
    for state in optimizer.state.values():
        for value in state.values():
            if value.device.type == "cpu":
                value.share_memory_()


@edit
def state_dict_of_param_replaced(optimizer):
    for param in params_of(optimizer):
        optimizer.state[param] = {name: value.clone() for name, value in optimizer.state[param].items()}


@edit
def state_of_param_replaced_by_equal_tensors(optimizer):
    for param in params_of(optimizer):
        optimizer.state[param] = dict(optimizer.state[param])


@edit
def first_state_cleared(optimizer):
    optimizer.state[params_of(optimizer)[0]].clear()


@edit
def last_state_cleared(optimizer):
    optimizer.state[params_of(optimizer)[-1]].clear()


@edit
def every_state_cleared(optimizer):
    for state in optimizer.state.values():
        state.clear()


@edit
def state_cleared(optimizer):
    optimizer.state.clear()


@edit
def state_of_param_deleted(optimizer):
    del optimizer.state[params_of(optimizer)[1]]


@edit
def state_mapping_replaced(optimizer):
    optimizer.state = type(optimizer.state)(dict, optimizer.state)


@edit
def extra_state_key(optimizer):
    optimizer.state[params_of(optimizer)[0]]["of_somebody_else"] = torch.ones(2)


# step counts


@edit
def step_written_in_place(optimizer):
    for i, param in enumerate(params_of(optimizer)):
        optimizer.state[param]["step"].fill_(10 * i)


@edit
def one_step_written_in_place(optimizer):
    optimizer.state[params_of(optimizer)[1]]["step"].zero_()


@edit
def one_step_replaced(optimizer):
    state = optimizer.state[params_of(optimizer)[1]]
    state["step"] = torch.full_like(state["step"], 40.0)


@edit
def every_step_replaced(optimizer):
    for i, state in enumerate(optimizer.state.values()):
        state["step"] = torch.full_like(state["step"], 10.0 * i)


@edit
def steps_replaced_by_views_of_one_tensor(optimizer):
    states = [*optimizer.state.values()]
    for state, step in zip(states, torch.stack([3 * state["step"] for state in states]).unbind(), strict=True):
        state["step"] = step


@edit
def step_replaced_by_clone(optimizer):
    for state in optimizer.state.values():
        state["step"] = state["step"].clone()


@edit
def step_data_swapped(optimizer):
    for state in optimizer.state.values():
        state["step"].data = torch.zeros_like(state["step"].data)


@edit
def step_of_float64(optimizer):
    for state in optimizer.state.values():
        state["step"] = state["step"].double()


# whole optimizers


@edit
def load_own_state_dict(optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


@edit
def load_copied_state_dict(optimizer):
    saved = copy.deepcopy(optimizer.state_dict())
    train([optimizer], 1, first=77)
    optimizer.load_state_dict(saved)


@edit
def deepcopied(optimizer):
    return copy.deepcopy(optimizer)


@edit
def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


@edit
def saved_by_torch(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def two_groups(params: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.2, "weight_decay": 0.3}]


@pytest.mark.parametrize("name", EDITS)
@each_case
def test_edit_between_steps(case: Case, name: str, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), {"lr": 0.1}, two_groups)
    train([ours, stock], 2)
    ours, stock = (EDITS[name](optimizer) or optimizer for optimizer in (ours, stock))
    train([ours, stock], 2, first=2)
    # also where the dtype changed: the first steps were in float32
    assert_same(ours, stock, CLOSE[torch.float32])


#: An order in which none takes away what a later one needs.
ROW = [
    "param_data_elsewhere",
    "state_tensor_replaced",
    "weight_decay",
    "first_state_cleared",
    "add_param_group",
    "step_written_in_place",
    "param_and_state_strides",
    "state_data_elsewhere",
    "deepcopied",
    "reorder_params",
    "every_step_replaced",
    "lr_to_tensor",
    "load_own_state_dict",
    "last_state_cleared",
    "move_param_to_next_group",
    "remove_first_param",
    "betas",
    "param_data_other_values",
]


def test_edits_in_a_row(device: torch.device) -> None:
    """Plans that are kept for other patterns of gradients must not come back when something else has changed."""
    ours, stock, _ = twins(CASES[0], make_params(SHAPES, device), {"lr": 0.1}, two_groups)
    train([ours, stock], 1)
    for step, name in enumerate(ROW):
        ours, stock = (EDITS[name](optimizer) or optimizer for optimizer in (ours, stock))
        train([ours, stock], 1, first=2 * step + 1, skip=[step % 2])
        train([ours, stock], 1, first=2 * step + 2)
    # thirty-six steps at lr 0.1 make the roundings of CLOSE ten times as large
    assert_same(ours, stock, {"rtol": 2e-5, "atol": 2e-6})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh_state", "converted_state"])
@each_case
def test_model_to_half(case: Case, fresh: bool, dtype: torch.dtype, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), {"lr": 0.1, "eps": 1e-3})
    train([ours, stock], 2)
    for optimizer in (ours, stock):
        for param in params_of(optimizer):
            param.grad = None
            param.data = param.data.to(dtype)
            if fresh:
                optimizer.state[param].clear()
            for name, value in tensors_of(optimizer.state[param]).items():
                optimizer.state[param][name] = value.to(dtype)
    train([ours, stock], 2, first=2)
    # stock's loop rounds after each of its ten operations, ours once a step
    assert_same(ours, stock, {"rtol": 0.05, "atol": 0.02})
    assert all(value.dtype is dtype for p in params_of(ours) for value in (p, *tensors_of(ours.state[p]).values()))


@each_case
def test_amsgrad_turned_on(case: Case, device: torch.device) -> None:
    """Stock fails with a KeyError; a maximum that begins at zero is what it would have begun with."""
    ours, stock, copies = twins(case, make_params(SHAPES, device), {"lr": 0.1})
    train([ours, stock], 2)
    for optimizer in (ours, stock):
        optimizer.param_groups[0]["amsgrad"] = True
    for param in copies:
        stock.state[param]["max_exp_avg_sq"] = torch.zeros_like(param)
    train([ours, stock], 2, first=2)
    assert_same(ours, stock)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("index", [0, -1], ids=["first", "last"])
def test_deleted_state_tensor_is_made_anew(name: str, index: int, device: torch.device) -> None:
    case = CASES[0]
    ours, stock, copies = twins(case, make_params(SHAPES, device), {"lr": 0.1})
    train([ours, stock], 2)
    del ours.state[params_of(ours)[index]][name]
    stock.state[copies[index]][name].zero_()
    train([ours, stock], 1, first=2)
    assert_same(ours, stock)


@each_case
def test_betas_list_changed_in_place(case: Case, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), {"lr": 0.1})
    for optimizer in (ours, stock):
        optimizer.param_groups[0]["betas"] = [0.9, 0.999]
    for step in range(3):
        train([ours, stock], 1, first=step)
        for optimizer in (ours, stock):
            optimizer.param_groups[0]["betas"][0] -= 0.2
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
@each_case
def test_gradients_come_and_go(case: Case, skips: list[tuple[int, ...]], device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), {"lr": 0.1}, two_groups)
    for step, skip in enumerate(skips):
        train([ours, stock], 1, first=step, skip=skip)
        # counts of a pattern's own, written while another is in use
        for optimizer in (ours, stock):
            if step == 2 and optimizer.state[params_of(optimizer)[0]]:
                optimizer.state[params_of(optimizer)[0]]["step"].add_(5)
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
def test_gradient_layout_changes(make: Callable[[Tensor], Tensor], device: torch.device) -> None:
    ours, stock, _ = twins(CASES[0], make_params(SHAPES, device), {"lr": 0.1})
    for step in range(4):
        for optimizer in (ours, stock):
            set_grads(params_of(optimizer), step)
            for param in params_of(optimizer) if step % 2 else ():
                param.grad = make(param.grad)
            optimizer.step()
    assert_same(ours, stock)


def test_freed_memory_is_reused_at_other_sizes(device: torch.device) -> None:
    """Addresses come back with other shapes and dtypes; nothing may take them for the tensors that were there."""
    ours, stock, _ = twins(CASES[0], make_params([(64,), (64,)], device), {"lr": 0.1})
    for round_, size in enumerate([64, 32, 64, 16, 48]):
        for optimizer in (ours, stock):
            for param in params_of(optimizer):
                param.grad = None
                optimizer.state.pop(param, None)
                # first free, then ask for as many bytes
                param.data = param.data.new_empty(0)
                dtype = torch.float64 if size == 32 else torch.float32
                param.data = torch.linspace(0, 1, size, device=device, dtype=dtype)
        train([ours, stock], 1, first=round_)
        assert_same(ours, stock, CLOSE[torch.float32])


def test_state_memory_is_reused_at_another_dtype(device: torch.device) -> None:
    ours, stock, (twin,) = twins(CASES[0], make_params([(64,)], device), {"lr": 0.1})
    train([ours, stock], 2)
    exp_avg = ours.state[params_of(ours)[0]]["exp_avg"]
    rounded = exp_avg.to(torch.bfloat16)
    exp_avg.data = exp_avg.new_empty(0)
    exp_avg.data = rounded.clone()
    stock.state[twin]["exp_avg"].copy_(rounded)
    train([ours, stock], 1, first=2)
    torch.testing.assert_close(params_of(ours)[0], twin, **CLOSE[torch.float32])
    assert exp_avg.dtype is torch.bfloat16
    torch.testing.assert_close(exp_avg.float(), stock.state[twin]["exp_avg"], **CLOSE[torch.bfloat16])


@each_case
def test_two_optimizers_over_the_same_parameters(case: Case, device: torch.device) -> None:
    params = make_params(SHAPES, device)
    ours, stock, copies = twins(case, params, {"lr": 0.1})
    ours_2 = case.cls(params, lr=0.02, betas=(0.5, 0.6))
    stock_2 = case.stock(copies, lr=0.02, betas=(0.5, 0.6), foreach=False)
    for step in range(3):
        train([ours, stock], 1, first=step)
        train([ours_2, stock_2], 1, first=10 + step, skip=[step])
    assert_same(ours, stock)
    assert_same(ours_2, stock_2)


@each_case
def test_alternating_with_stock_over_one_state(case: Case, device: torch.device) -> None:
    """Stock counts in the very tensors that are ours."""
    params = make_params(SHAPES, device)
    ours, stock, _ = twins(case, params, {"lr": 0.1})
    guest = case.stock(params, lr=0.1, foreach=False)
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
def test_plans_of_recurring_patterns_are_kept(
    skips: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """A mixture of experts has other gradients every step; patterns that overlap must not plan anew each time."""
    made = []

    class CountedPlan(_step.StepPlan):
        def __init__(self, *args: Any) -> None:
            made.append(self)
            super().__init__(*args)

    monkeypatch.setattr(_step, "StepPlan", CountedPlan)
    optimizer = CASES[0].cls(make_params([(1,)] * 3, device))
    for step in range(4 * len(skips)):
        if step == 2 * len(skips):
            made.clear()
        train([optimizer], 1, first=step, skip=skips[step % len(skips)])
    assert made == []


def test_what_was_replaced_is_freed(device: torch.device) -> None:
    """Plans are kept for other patterns of gradients, not to hold a model's old parameters and state in memory."""
    params = make_params([(5,)], device)
    optimizer = CASES[0].cls(params, lr=0.1)
    train([optimizer], 2)
    old = [weakref.ref(params[0]), weakref.ref(optimizer.state[params[0]]["exp_avg"])]
    optimizer.state.clear()
    optimizer.param_groups[0]["params"] = make_params([(5,)], device, seed=1)
    del params
    train([optimizer], 2)
    gc.collect()
    assert [reference() for reference in old] == [None, None]


def test_gradients_are_freed_by_zero_grad(device: torch.device) -> None:
    params = [*make_params(SHAPES, device), Parameter(torch.ones(3, dtype=torch.complex64, device=device))]
    optimizer = CASES[0].cls(params, lr=0.1)
    for param in params:
        param.grad = torch.ones_like(param)
    grads = [weakref.ref(param.grad) for param in params]
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    assert [grad() for grad in grads] == [None] * len(params)
