"""Where stock is wrong: each test asserts that ours is right, and that stock still is not.

Where a newer torch has mended it, the second half is skipped, and the row can go.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import (
    BY_NAME,
    CASES,
    Case,
    assert_same,
    loop,
    make_params,
    set_grad,
    set_grads,
    train,
    train_rounded,
    twins,
)
from tests.engine import params_of, usual

pytestmark = pytest.mark.interpreted

SGD = BY_NAME["sgd"]


def mended(what: str) -> None:
    pytest.skip(f"torch {torch.__version__}: {what}")


# fused SGD in 16 bits on a CPU: vectors of parameters stay as they are, and their momentum becomes garbage


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True, "maximize": True},
    ],
    ids=str,
)
def test_fused_sgd_in_16_bits(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    shapes = [(64,), (100,), (5, 40)]
    kwargs = {"lr": 0.1, "fused": True, **kwargs}
    ours, exact, _ = twins(SGD, make_params(shapes, dtype=dtype), kwargs)
    train_rounded(ours, exact, 3, dtype)
    assert_same(ours, exact)

    stock = SGD.stock(make_params(shapes, dtype=dtype), **kwargs)
    train([stock], 3)
    # far from rounding: parameters that have not moved
    close = [torch.allclose(a.double(), b, rtol=0.05) for a, b in zip(*map(params_of, (stock, exact)), strict=True)]
    if all(close):
        mended("fused SGD is right in 16 bits")
    assert not any(close)


# fused SGD with momentum and a first gradient that comes late: a TypeError


def test_fused_sgd_with_a_late_first_gradient() -> None:
    kwargs = {"lr": 0.1, "momentum": 0.9, "fused": True}
    ours, exact, _ = twins(SGD, make_params([(5,), (3, 4)]), kwargs)
    train([ours, exact], 2, skip=[1])
    train([ours, exact], 2, first=2)
    assert_same(ours, exact)

    stock = SGD.stock(make_params([(5,), (3, 4)]), **kwargs)
    train([stock], 2, skip=[1])
    try:
        train([stock], 1, first=2)
    except TypeError:
        return
    mended("fused SGD takes late first gradients")


# fused SGD whose first step GradScaler skips: a momentum that nobody has written


def skipped_first_step(optimizer: Any) -> None:
    """As GradScaler does it for optimizers that unscale by themselves."""
    set_grads(params_of(optimizer), 0)
    optimizer.grad_scale = torch.tensor(1.0)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_fused_sgd_whose_first_step_is_skipped(dampening: float) -> None:
    kwargs = {"lr": 0.1, "momentum": 0.9, "dampening": dampening, "fused": True}
    ours, exact, _ = twins(SGD, make_params([(64,), (3,)]), kwargs)
    before = [param.detach().clone() for param in params_of(ours)]
    skipped_first_step(ours)
    assert all(map(torch.equal, params_of(ours), before))
    buffers = [state["momentum_buffer"] for state in ours.state.values() if state]
    assert not any(buffer.any() for buffer in buffers)
    train([ours, exact], 2)
    assert_same(ours, exact)

    stock = SGD.stock(make_params([(64,), (3,)]), **kwargs)
    skipped_first_step(stock)
    if not any(state.get("momentum_buffer") is not None for state in stock.state.values()):
        mended("fused SGD keeps no momentum of a skipped first step")
    if dampening:
        # whatever was in its memory, the step that follows is dampened, as no first step is
        train([stock], 1)
        first = loop(SGD, make_params([(64,), (3,)]), **kwargs)
        train([first], 1)
        assert not any(torch.allclose(a, b) for a, b in zip(*map(params_of, (stock, first)), strict=True))


# float32 parameters with bf16 gradients: a RuntimeError, or a state of the gradient's dtype


def set_bf16_grads(params: list[Tensor], step: int) -> None:
    copies = [param.detach().clone() for param in params]
    set_grads(copies, step)
    for param, twin in zip(params, copies, strict=True):
        set_grad(param, twin.grad.bfloat16())


@pytest.mark.parametrize("ours", [{}, {"max_grad_norm": 0.5}], ids=["plain", "clipped"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32_parameters_with_bf16_gradients(case: Case, ours: dict[str, Any]) -> None:
    optimizer, exact, copies = twins(case, make_params([(5,), (3, 4), ()]), usual(case), **ours)
    for step in range(3):
        set_bf16_grads(params_of(optimizer), step)
        for param, twin in zip(params_of(optimizer), copies, strict=True):
            twin.grad = param.grad.float()
        if ours:
            torch.nn.utils.clip_grad_norm_(copies, 0.5)
        optimizer.step()
        exact.step()
    assert_same(optimizer, exact)


#: Torch's implementations that raise: all fused ones, and those that interpolate.
RAISING = [
    *[(case.name, {"fused": True}) for case in CASES if case.is_torchs and case.has("fused")],
    *[(name, {"foreach": on}) for name in ("adam", "adamw", "adamax", "nadam", "radam") for on in (True, False)],
]


@pytest.mark.parametrize(("name", "flags"), RAISING, ids=str)
def test_stock_raises_at_bf16_gradients(name: str, flags: dict[str, bool]) -> None:
    case = BY_NAME[name]
    stock = case.stock(make_params([(5,)]), **usual(case, **flags))
    set_bf16_grads(params_of(stock), 0)
    try:
        stock.step()
    except RuntimeError:
        return
    mended(f"{case.stock.__name__} takes bf16 gradients")


@pytest.mark.parametrize(("name", "state"), [("sgd", "momentum_buffer"), ("rprop", "step_size")])
def test_state_of_stock_has_the_dtype_of_the_gradient(name: str, state: str) -> None:
    case = BY_NAME[name]
    dtypes = []
    for cls in (case.cls, case.stock):
        optimizer = cls(make_params([(5,)]), **usual(case))
        set_bf16_grads(params_of(optimizer), 0)
        optimizer.step()
        dtypes.append(optimizer.state[params_of(optimizer)[0]][state].dtype)
    assert dtypes[0] is torch.float32
    if dtypes[1] is torch.float32:
        mended(f"{case.stock.__name__} makes a float32 {state}")


# checkpoints of 16-bit parameters: scalar states that are not called "step" are loaded in 16 bits


@pytest.mark.parametrize(("name", "scalars"), [("nadam", ["mu_product"]), ("asgd", ["eta", "mu"])], ids=str)
def test_scalar_states_loaded_in_16_bits(name: str, scalars: list[str]) -> None:
    case = BY_NAME[name]
    loaded = []
    for cls in (case.cls, case.stock):
        source, fresh = (cls(make_params([(5,)], dtype=torch.bfloat16), lr=0.01) for _ in range(2))
        train([source], 2)
        fresh.load_state_dict(copy.deepcopy(source.state_dict()))
        before, after = (optimizer.state[params_of(optimizer)[0]] for optimizer in (source, fresh))
        loaded.append([torch.equal(before[scalar], after[scalar].float()) for scalar in scalars])
    assert all(loaded[0])
    if all(loaded[1]):
        mended(f"{case.stock.__name__} loads {scalars} as they were")


# betas that are tensors of one element: a RuntimeError or a TypeError, where betas without dimensions are taken


@pytest.mark.parametrize("flags", [{}, {"fused": True}], ids=["default", "fused"])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_betas_of_one_element(name: str, flags: dict[str, bool]) -> None:
    kwargs = {"lr": torch.tensor(0.01), "betas": (torch.tensor(0.8), torch.tensor([0.95])), **flags}
    ours, exact, _ = twins(BY_NAME[name], make_params([(5,), ()]), kwargs)
    train([ours, exact], 3)
    assert_same(ours, exact)

    stock = BY_NAME[name].stock(make_params([(5,), ()]), **kwargs)
    try:
        train([stock], 3)
    except (RuntimeError, TypeError):
        return
    assert_same(ours, stock)
    mended(f"{name} takes betas of one element")


# a group added to Adagrad: no state, a KeyError


@pytest.mark.parametrize("flags", [{}, {"fused": True}], ids=["default", "fused"])
def test_group_added_to_adagrad(flags: dict[str, bool]) -> None:
    case = BY_NAME["adagrad"]
    ours, stock = (cls(make_params([(5,)]), **flags) for cls in (case.cls, case.stock))
    for optimizer in (ours, stock):
        optimizer.add_param_group({"params": make_params([(3, 4)])})
    exact = loop(case, [{"params": make_params([shape])} for shape in [(5,), (3, 4)]])
    train([ours, exact], 3)
    assert_same(ours, exact)
    try:
        train([stock], 3)
    except KeyError:
        return
    mended("Adagrad takes groups added later")


# states that a setting needs from now on: a KeyError


@pytest.mark.parametrize(
    ("name", "setting"),
    [("rmsprop", {"momentum": 0.9}), ("rmsprop", {"centered": True}), ("adam", {"amsgrad": True})],
    ids=str,
)
def test_settings_that_need_another_state(name: str, setting: dict[str, Any]) -> None:
    case = BY_NAME[name]
    ours, stock = (cls(make_params([(5,)]), lr=0.1) for cls in (case.cls, case.stock))
    for optimizer in (ours, stock):
        train([optimizer], 2)
        optimizer.param_groups[0].update(setting)
    train([ours], 1, first=2)
    assert set(case.state_names(**setting)) <= ours.state[params_of(ours)[0]].keys()
    try:
        train([stock], 1, first=2)
    except KeyError:
        return
    mended(f"{case.stock.__name__} makes missing states")


# an empty parameter: a division by its size


@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
def test_adafactor_with_an_empty_parameter(
    foreach: bool, torchs_adafactor_loop: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As every other optimizer takes them."""
    # tests with the loop as an oracle leave empty parameters out
    monkeypatch.setattr(torch.optim._adafactor, "_single_tensor_adafactor", torchs_adafactor_loop)
    ours, stock = BY_NAME["adafactor"].cls, BY_NAME["adafactor"].stock
    train([ours(make_params([(0,), (3, 0), (5,)]))], 2)
    try:
        train([stock(make_params([(0,)]), foreach=foreach)], 1)
    except ZeroDivisionError:
        return
    mended("Adafactor takes empty parameters")


# parameters of two dtypes in one group: the first one's default eps is everybody's


def test_adafactors_default_eps_is_each_parameters_own() -> None:
    ours, stock = BY_NAME["adafactor"].cls, BY_NAME["adafactor"].stock
    alone, second, of_stock = (make_params([(5,)], dtype=torch.float64)[0] for _ in range(3))
    others = [make_params([(5,)], dtype=torch.bfloat16)[0] for _ in range(2)]
    optimizers = [ours([alone]), ours([others[0], second]), stock([others[1], of_stock], foreach=False)]
    for optimizer in optimizers:
        for param in params_of(optimizer):
            # far below the eps of bfloat16
            param.grad = torch.linspace(1e-6, 2e-6, 5, dtype=param.dtype)
        optimizer.step()
    assert torch.equal(second, alone)
    if torch.allclose(of_stock, alone, rtol=1e-3):
        mended("Adafactor's eps is of each parameter's dtype")
