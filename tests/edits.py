"""The table of what people change between two steps: on an optimizer of ours, or on a stock one."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from optimx._engine.step import MultiTensorStep
from tests.cases import CASES, Case, make_params, train
from tests.engine import params_of

Edit = Callable[[Optimizer], "Optimizer | None"]
#: Each edit, and whether it can be made to a stock optimizer of these arguments.
EDITS: dict[str, tuple[Edit, Callable[[Case, dict[str, Any]], bool]]] = {}


def edit(when: Callable[[Case, dict[str, Any]], bool] = lambda case, kwargs: True) -> Callable[[Edit], Edit]:
    def register(function: Edit) -> Edit:
        EDITS[function.__name__] = function, when
        return function

    return register


def has_state(case: Case, kwargs: dict[str, Any]) -> bool:
    return bool(case.state_names(**kwargs))


def tensors_of(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a parameter's shape, in one order for ours and for stock."""
    return {name: state[name] for name in sorted(state) if state[name].dim()}


def complete(optimizer: Optimizer) -> Optimizer:
    """Torch's Adagrad makes its states in ``__init__`` and fails without; ours makes what is missing."""
    if isinstance(optimizer, torch.optim.Adagrad) and not isinstance(optimizer, MultiTensorStep):
        for param in params_of(optimizer):
            if not optimizer.state[param]:
                optimizer.state[param].update(step=torch.zeros(()), sum=torch.zeros_like(param))
    return optimizer


def other_strides(tensor: Tensor) -> Tensor:
    """A copy whose memory runs through the dimensions in the opposite order."""
    dims = [*reversed(range(tensor.dim()))]
    return tensor.detach().permute(dims).contiguous().permute(dims)


# parameters


@edit()
def param_data_elsewhere(optimizer):
    for param in params_of(optimizer):
        param.data = param.data.clone()


@edit()
def param_data_misaligned(optimizer):
    for param in params_of(optimizer):
        param.data = torch.cat([param.data.new_zeros(1), param.data.flatten()])[1:].view(param.shape)


@edit()
def param_data_other_values(optimizer):
    for param in params_of(optimizer):
        param.data = torch.full_like(param, 0.5)


@edit()
def param_strides(optimizer):
    for param in params_of(optimizer):
        param.data = other_strides(param)


@edit()
def param_and_state_strides(optimizer):
    for param in params_of(optimizer):
        param.data = other_strides(param)
        for name, value in tensors_of(optimizer.state[param]).items():
            optimizer.state[param][name] = other_strides(value)


@edit()
def param_set_(optimizer):
    with torch.no_grad():
        for param in params_of(optimizer):
            param.set_(param.detach().clone())


@edit()
def params_swapped_for_tensors(optimizer):
    for param in params_of(optimizer):
        param.grad = None
        torch.utils.swap_tensors(param, Parameter(param.detach() + 1))


@edit()
def param_share_memory(optimizer):
    for param in params_of(optimizer):
        if param.device.type == "cpu":
            param.share_memory_()


@edit()
def shapes_change(optimizer):
    for param in params_of(optimizer):
        param.grad = None
        param.data = param.data[1:].clone()
        optimizer.state[param].clear()


@edit()
def float64_with_fresh_state(optimizer):
    for param in params_of(optimizer):
        param.grad = None
        param.data = param.data.double()
    optimizer.state.clear()


@edit()
def float64_with_converted_state(optimizer):
    for param in params_of(optimizer):
        param.grad = None
        param.data = param.data.double()
        for name, value in tensors_of(optimizer.state[param]).items():
            optimizer.state[param][name] = value.double()


@edit()
def float64_with_state_data_converted(optimizer):
    for param in params_of(optimizer):
        param.grad = None
        param.data = param.data.double()
        for value in tensors_of(optimizer.state[param]).values():
            value.data = value.data.double()


@edit()
def requires_grad_off(optimizer):
    params_of(optimizer)[0].requires_grad_(False)


# groups


@edit()
def add_param_group(optimizer):
    optimizer.add_param_group({"params": make_params([(7,)], params_of(optimizer)[0].device), "lr": 0.5})


@edit()
def add_empty_group(optimizer):
    optimizer.param_groups.insert(0, {**optimizer.param_groups[0], "params": [], "lr": 7.0})


@edit()
def remove_last_param(optimizer):
    optimizer.param_groups[-1]["params"].pop()


@edit()
def remove_first_param(optimizer):
    del optimizer.param_groups[0]["params"][0]


@edit()
def remove_group(optimizer):
    del optimizer.param_groups[0]


@edit()
def replace_params_list(optimizer):
    group = optimizer.param_groups[0]
    group["params"] = [Parameter(param.detach().clone()) for param in group["params"]]


@edit()
def reorder_params(optimizer):
    optimizer.param_groups[0]["params"].reverse()


@edit()
def move_param_to_next_group(optimizer):
    first, second, *_ = optimizer.param_groups
    second["params"].insert(0, first["params"].pop())


@edit()
def swap_groups(optimizer):
    optimizer.param_groups.reverse()


@edit()
def replace_group_dict(optimizer):
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.03}


# hyperparameters


#: For the first group.
SETTINGS: dict[str, dict[str, Any]] = {
    "lr": {"lr": 0.03},
    "lr_zero": {"lr": 0.0},
    "lr_to_tensor": {"lr": torch.tensor(0.03)},
    "betas": {"betas": (0.5, 0.6)},
    "betas_list": {"betas": [0.5, 0.6]},
    "eps": {"eps": 1e-2},
    "both_eps": {"eps": (1e-2, 0.5)},
    "d": {"d": 2.0},
    "beta2_decay": {"beta2_decay": -0.5},
    "weight_decay": {"weight_decay": 0.5},
    "maximize": {"maximize": True},
    "alpha": {"alpha": 0.5},
    "rho": {"rho": 0.5},
    "lr_decay": {"lr_decay": 0.5},
    "lambd": {"lambd": 0.5},
    "t0": {"t0": 1.0},
    "momentum_decay": {"momentum_decay": 0.5},
    "etas": {"etas": (0.3, 1.5)},
    "step_sizes": {"step_sizes": (0.05, 0.11)},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "no_momentum": {"momentum": 0},
    "max_trust_ratio": {"max_trust_ratio": 0.5},
    "always_adapt": {"always_adapt": True, "weight_decay": 0.0},
    "warmup_steps": {"warmup_steps": 5},
    "r": {"r": 2.0},
    "weight_lr_power": {"weight_lr_power": 0.5},
    "no_bias_correction": {"bias_correction": False},
    "foreach": {"foreach": True},
    "fused_false": {"fused": False},
    "differentiable": {"differentiable": True},
}


def _set(values: dict[str, Any]) -> Edit:
    return lambda optimizer: optimizer.param_groups[0].update(copy.deepcopy(values))


def _has(values: dict[str, Any]) -> Callable[[Case, dict[str, Any]], bool]:
    # Adafactor's eps are two
    kinds = [isinstance(value, tuple) for name, value in values.items() if name == "eps"]
    return lambda case, kwargs: all(map(case.has, values)) and kinds in ([], [case.name == "adafactor"])


EDITS |= {name: (_set(values), _has(values)) for name, values in SETTINGS.items()}


@edit(lambda case, kwargs: case.has("decoupled_weight_decay"))
def decoupled_weight_decay(optimizer):
    group = optimizer.param_groups[0]
    group.update(weight_decay=0.5, decoupled_weight_decay=not group["decoupled_weight_decay"])


@edit(lambda case, kwargs: case.has("fused"))
def fused_true(optimizer):
    # the same numbers; on a GPU stock expects its counts elsewhere then
    if isinstance(optimizer, MultiTensorStep):
        optimizer.param_groups[0]["fused"] = True


@edit(lambda case, kwargs: not (case.is_torchs and case.has("capturable")))
def capturable(optimizer):
    """Of the optimizer. Where torch's groups have the word, torch refuses a CPU, and counts that are there."""
    optimizer.capturable = True


@edit(lambda case, kwargs: case.has("amsgrad"))
def amsgrad_with_its_state(optimizer):
    group = optimizer.param_groups[0]
    group["amsgrad"] = True
    for param in group["params"]:
        optimizer.state[param]["max_exp_avg_sq"] = torch.ones_like(param)


@edit(lambda case, kwargs: hasattr(case.cls, "eval"))
def evaluated_and_trained(optimizer):
    if isinstance(optimizer, MultiTensorStep):
        optimizer.eval()
        optimizer.train()


# state


@edit(has_state)
def state_tensor_replaced(optimizer):
    for param in params_of(optimizer):
        name, *_ = tensors_of(optimizer.state[param])
        optimizer.state[param][name] = torch.ones_like(optimizer.state[param][name])


@edit(has_state)
def state_tensor_of_last_param_replaced(optimizer):
    param = params_of(optimizer)[-1]
    *_, name = tensors_of(optimizer.state[param])
    optimizer.state[param][name] = torch.ones_like(param)


@edit(lambda case, kwargs: case.name == "sgd" and has_state(case, kwargs))
def momentum_buffer_deleted(optimizer):
    del optimizer.state[params_of(optimizer)[1]]["momentum_buffer"]


@edit(lambda case, kwargs: case.name == "sgd" and has_state(case, kwargs))
def momentum_buffer_none(optimizer):
    for param in params_of(optimizer):
        optimizer.state[param]["momentum_buffer"] = None


@edit(has_state)
def state_tensors_swapped_between_params(optimizer):
    first, _, last = params_of(optimizer)
    optimizer.state[first], optimizer.state[last] = optimizer.state[last], optimizer.state[first]
    last.data, first.data = first.data.clone(), last.data.clone()
    first.grad = last.grad = None


@edit()
def state_written_in_place(optimizer):
    for param in params_of(optimizer):
        for value in tensors_of(optimizer.state[param]).values():
            value.fill_(2.0)


@edit()
def state_data_elsewhere(optimizer):
    for param in params_of(optimizer):
        for value in tensors_of(optimizer.state[param]).values():
            value.data = value.data.clone() + 1


@edit()
def state_data_strides(optimizer):
    for param in params_of(optimizer):
        for value in tensors_of(optimizer.state[param]).values():
            value.data = other_strides(value)


@edit(has_state)
def state_strides(optimizer):
    for param in params_of(optimizer):
        name, *_ = tensors_of(optimizer.state[param])
        optimizer.state[param][name] = other_strides(optimizer.state[param][name])


@edit()
def state_share_memory(optimizer):
    for state in optimizer.state.values():
        for value in state.values():
            if value.device.type == "cpu":
                value.share_memory_()


@edit()
def state_dict_of_param_replaced(optimizer):
    for param in params_of(optimizer):
        optimizer.state[param] = {name: value.clone() for name, value in optimizer.state[param].items()}


@edit()
def state_of_param_replaced_by_equal_tensors(optimizer):
    for param in params_of(optimizer):
        optimizer.state[param] = dict(optimizer.state[param])


@edit()
def first_state_cleared(optimizer):
    optimizer.state[params_of(optimizer)[0]].clear()


@edit()
def last_state_cleared(optimizer):
    optimizer.state[params_of(optimizer)[-1]].clear()


@edit()
def every_state_cleared(optimizer):
    for state in optimizer.state.values():
        state.clear()


@edit()
def state_cleared(optimizer):
    optimizer.state.clear()


@edit()
def state_of_param_deleted(optimizer):
    optimizer.state.pop(params_of(optimizer)[1], None)


@edit()
def state_mapping_replaced(optimizer):
    optimizer.state = type(optimizer.state)(dict, optimizer.state)


@edit()
def extra_state_key(optimizer):
    optimizer.state[params_of(optimizer)[0]]["of_somebody_else"] = torch.ones(2)


# scalar states: the step count, NAdam's mu_product, ASGD's eta and mu


def _value(scalar: str, i: int) -> float:
    return 10.0 * i if scalar == "step" else 0.5 / (i + 1)


def _states(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [optimizer.state[param] for param in params_of(optimizer)]


def _written_in_place(optimizer, scalar):
    for i, state in enumerate(_states(optimizer)):
        state[scalar].fill_(_value(scalar, i))


def _of_one_written_in_place(optimizer, scalar):
    _states(optimizer)[1][scalar].fill_(_value(scalar, 0))


def _of_one_replaced(optimizer, scalar):
    state = _states(optimizer)[1]
    state[scalar] = torch.full_like(state[scalar], _value(scalar, 4))


def _replaced(optimizer, scalar):
    for i, state in enumerate(_states(optimizer)):
        state[scalar] = torch.full_like(state[scalar], _value(scalar, i))


def _replaced_by_views_of_one_tensor(optimizer, scalar):
    views = torch.stack([3 * state[scalar] for state in _states(optimizer)]).unbind()
    for state, view in zip(_states(optimizer), views, strict=True):
        state[scalar] = view


def _replaced_by_clone(optimizer, scalar):
    for state in _states(optimizer):
        state[scalar] = state[scalar].clone()


def _exchanged(optimizer, scalar):
    first, _, last = _states(optimizer)
    first[scalar].fill_(_value(scalar, 4))
    first[scalar], last[scalar] = last[scalar], first[scalar]


def _data_swapped(optimizer, scalar):
    for i, state in enumerate(_states(optimizer)):
        state[scalar].data = torch.full_like(state[scalar].data, _value(scalar, i))


def _of_float64(optimizer, scalar):
    for state in _states(optimizer):
        state[scalar] = state[scalar].double()


for _scalar in dict.fromkeys(name for case in CASES for name in case.cls.rule.scalars):
    for _edit in (
        _written_in_place, _of_one_written_in_place, _of_one_replaced, _replaced, _replaced_by_views_of_one_tensor,
        _replaced_by_clone, _exchanged, _data_swapped, _of_float64,
    ):  # fmt: skip
        EDITS[f"{_scalar}{_edit.__name__}"] = (
            partial(_edit, scalar=_scalar),
            lambda case, kwargs, scalar=_scalar: scalar in case.cls.rule.scalars,
        )


# whole optimizers


@edit()
def load_own_state_dict(optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


@edit()
def load_copied_state_dict(optimizer):
    saved = copy.deepcopy(optimizer.state_dict())
    train([optimizer], 1, first=77)
    optimizer.load_state_dict(saved)


@edit()
def deepcopied(optimizer):
    return copy.deepcopy(optimizer)


@edit()
def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


@edit()
def saved_by_torch(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def apply(name: str, optimizer: Optimizer) -> Optimizer:
    return complete(EDITS[name][0](optimizer) or optimizer)
