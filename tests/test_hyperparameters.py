"""Parameter groups, schedulers, and hyperparameters of any type: the same with ours and with stock."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from tests.cases import CLOSE, Case, add_group, assert_same, loop, make_params, train, twins
from tests.conftest import INTERPRETED
from tests.engine import a_step, builders, each_case, each_case_and_walk, outcomes, params_of, usual

SHAPES = [(5,), (3, 4)]


@each_case
def test_hundreds_of_groups(case: Case, device: torch.device) -> None:
    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        settings = [usual(case, lr=0.1 / (i + 1), weight_decay=i / 500) for i, _ in enumerate(params)]
        return [{"params": [param], **setting} for param, setting in zip(params, settings, strict=True)]

    # the interpreter takes 5 ms a parameter and step
    ours, stock, _ = twins(case, make_params([(2,)] * (50 if INTERPRETED else 465), device), {}, groups)
    train([ours, stock], 2)
    assert_same(ours, stock)


@each_case
def test_parameters_in_the_second_group_only(case: Case, device: torch.device) -> None:
    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": [], "lr": 9.0}, {"params": params, **usual(case)}]

    ours, stock, _ = twins(case, make_params(SHAPES, device), {}, groups)
    train([ours, stock], 2)
    assert_same(ours, stock)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@each_case
def test_duplicate_parameters(case: Case, device: torch.device) -> None:
    """Torch warns, and steps such a parameter twice."""
    a, b = make_params(SHAPES, device)
    c, d = make_params(SHAPES, device)
    ours, stock = case.cls([a, b, a], **usual(case)), loop(case, [c, d, c], **usual(case))
    train([ours, stock], 2)
    assert_same(ours, stock)


@each_case
def test_group_added_midway(case: Case, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case))
    train([ours, stock], 2)
    for optimizer in (ours, stock):
        add_group(optimizer, {"params": make_params([(7,), ()], device, seed=1), **case.other})
    train([ours, stock], 2, first=2)
    assert_same(ours, stock)


@each_case_and_walk
def test_maximize_of_a_group_flipped(case: Case, device: torch.device) -> None:
    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": params[:1]}, {"params": params[1:], "maximize": True}]

    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case, weight_decay=0.1), groups)
    train([ours, stock], 2)
    for group in (*ours.param_groups, *stock.param_groups):
        group["maximize"] = not group["maximize"]
    train([ours, stock], 2, first=2)
    assert_same(ours, stock)


@each_case
def test_named_parameters(case: Case, device: torch.device) -> None:
    dicts = []
    for make in builders(case):
        torch.manual_seed(0)
        model = nn.Linear(3, 2).to(device)
        optimizer = make(model.named_parameters(), lr=0.1)
        a_step(optimizer)
        assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
        dicts.append(optimizer.state_dict())
    assert dicts[0]["param_groups"] == dicts[1]["param_groups"]


SCHEDULERS: dict[str, Callable[..., lr_scheduler.LRScheduler]] = {
    "step": lambda opt, **_: lr_scheduler.StepLR(opt, 1, gamma=0.5),
    "one_cycle": lambda opt, **kwargs: lr_scheduler.OneCycleLR(opt, max_lr=[0.1, 0.2], total_steps=6, **kwargs),
    "cosine": lambda opt, **_: lr_scheduler.CosineAnnealingLR(opt, T_max=3),
    "lambda": lambda opt, **_: lr_scheduler.LambdaLR(opt, [lambda step: 1.0 / (1 + step), lambda step: 0.5**step]),
    "cyclic": lambda opt, **kwargs: lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=2, **kwargs),
    "warmup": lambda opt, **_: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.5)], [2]
    ),
}


@pytest.mark.parametrize("lr", [0.1, "tensor"], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
@each_case
def test_schedulers(case: Case, name: str, lr: float | str, device: torch.device) -> None:
    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": params[:1]}, {"params": params[1:], **usual(case, lr=initial(), weight_decay=0.1)}]

    def initial() -> float | Tensor:
        return torch.tensor(0.1) if lr == "tensor" else lr

    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case, lr=initial()), groups)
    # momentum, or the first of the betas, runs against the lr
    cycle = case.has("momentum") or case.has("betas")
    with warnings.catch_warnings():
        # "lr_scheduler.step() before optimizer.step()": schedulers watch the step they wrapped
        warnings.simplefilter("error", UserWarning)
        schedulers = [SCHEDULERS[name](optimizer, cycle_momentum=cycle) for optimizer in (ours, stock)]
        for step in range(4):
            train([ours, stock], 1, first=step)
            for scheduler in schedulers:
                scheduler.step()
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()
    # a tensor lr is a float32 in stock's arithmetic too, but it rounds each product
    assert_same(ours, stock, {"rtol": 1e-5, "atol": 1e-6} if lr == "tensor" else None)


@each_case
def test_plateau_scheduler_and_swa(case: Case, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case))
    plateaus = [lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0) for optimizer in (ours, stock)]
    swas = [torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2) for optimizer in (ours, stock)]
    for step in range(3):
        train([ours, stock], 1, first=step)
        for plateau, swa in zip(plateaus, swas, strict=True):
            plateau.step(1.0)
            swa.step()
    assert_same(ours, stock)


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0d", "1d"])
@each_case_and_walk
def test_tensor_lr_changed_in_place(case: Case, shape: tuple[int, ...], device: torch.device) -> None:
    kwargs = usual(case, lr=torch.full(shape, 0.1), weight_decay=0.1)
    ours, stock, _ = twins(case, make_params(SHAPES, device), kwargs)
    for step, lr in enumerate([0.1, 0.02, 0.3]):
        for optimizer in (ours, stock):
            optimizer.param_groups[0]["lr"].fill_(lr)
        train([ours, stock], 1, first=step)
    assert_same(ours, stock, {"rtol": 1e-5, "atol": 1e-6})
    assert ours.param_groups[0]["lr"].shape == shape


def _numpy(name: str, value: float) -> Any:
    return getattr(pytest.importorskip("numpy"), name)(value)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: {"lr": 1, "weight_decay": 0, "eps": 1, "momentum": 1}, id="int"),
        pytest.param(lambda: {"lr": True}, id="bool"),
        pytest.param(lambda: {"lr": _numpy("float64", 0.1), "eps": _numpy("float64", 1e-3)}, id="numpy_float64"),
        pytest.param(lambda: {"lr": _numpy("float32", 0.1), "eps": _numpy("float32", 1e-3)}, id="numpy_float32"),
        pytest.param(lambda: {"betas": (_numpy("float64", 0.5), _numpy("float64", 0.9))}, id="numpy_betas"),
        pytest.param(lambda: {"betas": [0.5, 0.9], "etas": [0.4, 1.5], "step_sizes": [0.01, 1]}, id="lists"),
        pytest.param(lambda: {"lr": float("nan")}, id="nan"),
    ],
)
@each_case
def test_types_of_hyperparameters(case: Case, make: Callable[[], dict[str, Any]], device: torch.device) -> None:
    kwargs = usual(case, **make())
    ours, stock = outcomes(case, lambda make: make(make_params(SHAPES, device), **kwargs))
    if isinstance(stock, tuple):
        assert ours == stock
        return
    train([ours, stock], 2)
    close = CLOSE[torch.float32]
    for a, b in zip(params_of(ours), params_of(stock), strict=True):
        torch.testing.assert_close(a, b, **close, equal_nan=True)


@each_case
def test_int_hyperparameters_written_into_groups(case: Case, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), {})
    for optimizer in (ours, stock):
        optimizer.param_groups[0].update(usual(case, lr=1, betas=(0, 0), weight_decay=1, eps=1, momentum=1))
    train([ours, stock], 2)
    assert_same(ours, stock)
