"""Beside stock's for-loop: parameters and state, several steps, in every configuration torch tests its own with."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from optimx._engine.cpu import batch as _batch
from optimx._engine.cpu import elementwise as _native
from optimx._engine.cpu.call import MixedCall
from tests.cases import (
    CASES,
    CLOSE,
    HALF,
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
from tests.conftest import INTERPRETED
from tests.engine import BESIDE_STOCK, PLANS, each, each_case_and_walk, each_variant

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


# interpreted, float64 is beside the paper, and every dtype in test_kernels
@pytest.mark.parametrize("dtype", DTYPES[::2] if INTERPRETED else DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@each_variant
def test_equals_the_loop(case: Case, kwargs: dict, dtype: torch.dtype, device: torch.device) -> None:
    if dtype in HALF:
        kwargs = case.rounded(kwargs, dtype)
    params = make_params(device=device, dtype=dtype)
    ours, stock, _ = twins(case, params, kwargs)
    train_rounded(ours, stock, 3 if INTERPRETED else 4, dtype)
    # stock computes with tensor hyperparameters in their own float32, and with NAdam's mu_product in float32
    single = any(map(torch.is_tensor, (kwargs.get("lr"), *kwargs.get("betas", ())))) or case.name == "nadam"
    assert_same(ours, stock, CLOSE[torch.float32] if single and dtype is torch.float64 else None)


@each(BESIDE_STOCK, PLANS)
def test_groups_that_differ(case: Case, kwargs: dict, device: torch.device) -> None:
    def groups(params):
        return [{"params": params[:3]}, {"params": []}, {"params": params[3:], **case.other}]

    ours, stock, _ = twins(case, make_params(device=device), kwargs, groups)
    train([ours, stock], 4)
    assert_same(ours, stock)


def _mixed_calls(optimizer: Any) -> list[MixedCall]:
    calls = [call for bucket in optimizer._engine.plans[0].buckets for call in bucket._calls]
    return [call for call in calls if isinstance(call, MixedCall) and call.values]


@pytest.mark.skipif(INTERPRETED, reason="kernels take settings by tensor")
@pytest.mark.parametrize("max_grad_norm", [None, 0.5], ids=["plain", "clipped"])
@each([variant for variant in BESIDE_STOCK if variant.case.name in ("adam", "adamw")], ())
def test_a_setting_for_each_tensor(case: Case, kwargs: dict, max_grad_norm: float | None) -> None:
    """On a CPU one formula for all small ones, where settings differ only in what it has by element."""
    shapes = [(), (0,), (1,), (3, 5), (64,), (70, 80), (1200,), *[(i,) for i in range(2, 11)]]

    def groups(params: Any) -> list[dict[str, Any]]:
        return [{"params": [p], "lr": 0.01 * 0.9**i, "weight_decay": 0.1 * (i % 3)} for i, p in enumerate(params)]

    ours, stock, copies = twins(case, make_params(shapes), kwargs, groups, max_grad_norm=max_grad_norm)
    for step in range(7):
        for optimizer in (ours, stock):
            for group in optimizer.param_groups:
                group["lr"] *= 0.9 if step % 2 else 1.0
            optimizer.param_groups[3]["eps"] = 1e-3 if step == 4 else optimizer.param_groups[0]["eps"]
        # a step count of its own, at last
        skip = [4] if step == 5 else []
        train([ours], 1, first=step, skip=skip)
        set_grads(copies, step, skip=skip)
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(copies, max_grad_norm)
        stock.step()
        assert len(_mixed_calls(ours)) == (step != 4)
    assert_same(ours, stock)


@pytest.mark.skipif(INTERPRETED, reason="kernels take settings by tensor")
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True], ids=["default", "amsgrad"])
@pytest.mark.parametrize("case", [c for c in CASES if c.cls.rule.by_element], ids=lambda c: c.name)
def test_a_setting_for_each_tensor_where_parameters_are_infinite(case: Case, amsgrad: bool, value: float) -> None:
    """Without a weight decay a parameter's value is nothing to its state, whoever is updated beside it."""

    def groups(params: Any) -> list[dict[str, Any]]:
        return [{"params": [p], "lr": 0.01 * 0.9**i, "weight_decay": 0.1 * (i % 3)} for i, p in enumerate(params)]

    params = make_params([(i,) for i in range(2, 14)])
    ours, stock, copies = twins(case, params, {"amsgrad": amsgrad}, groups)
    train([ours, stock], 1)
    with torch.no_grad():
        for param in (params[3], copies[3]):
            param[0] = value
    for step in range(1, 3):
        train([ours, stock], 1, first=step)
        assert len(_mixed_calls(ours)) == 1
    assert copies[3].isfinite().logical_not().sum() == 1
    for name, expected in stock.state[copies[3]].items():
        assert expected.isfinite().all()
        torch.testing.assert_close(ours.state[params[3]][name], expected)
    torch.testing.assert_close(params[3], copies[3], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_pieces_equal_the_whole(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: large tensors cut into pieces that fit the cache, small ones in several batches."""
    if INTERPRETED:
        pytest.skip("kernels have no pieces")
    monkeypatch.setattr(_native, "PIECE", 64)
    monkeypatch.setattr(_batch, "BATCH", 64)
    monkeypatch.setattr(_batch, "SMALL", 16)
    kwargs = case.rounded({"weight_decay": 0.1} if case.has("weight_decay") else {}, dtype)
    shapes = [(3,), (300,), (16,), (16,), (16,), (9,), (8, 24), (2,), (64,), (65,)]
    ours, stock, _ = twins(case, make_params(shapes, dtype=dtype), kwargs, max_grad_norm=100.0)
    train_rounded(ours, stock, 3, dtype)
    assert_same(ours, stock)


def _database() -> list:
    try:
        from torch.testing._internal.common_optimizers import optim_db
    except ImportError:  # it needs expecttest and numpy, which a GPU machine may lack; the other tests need neither
        return []

    known = {case.stock: case for case in CASES}
    return [
        pytest.param(known[info.optim_cls], info, i, id=f"{known[info.optim_cls].name}-{config.desc.replace(' ', '_')}")
        for info in optim_db
        if info.optim_cls in known
        for i, config in enumerate(info.optim_inputs_func(device="cpu"))
    ]


@pytest.mark.parametrize(("case", "info", "index"), _database())
def test_torchs_own_configurations(case: Case, info, index: int, device: torch.device) -> None:
    config = info.optim_inputs_func(device=device.type)[index]
    shapes = [(10, 5), (5,), (5, 1), (1,), (2, 3)]
    ours, stock, _ = twins(case, make_params(shapes, device=device), config.kwargs)
    train([ours, stock], 7)
    assert_same(ours, stock)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "info"), {p.values[0].name: p.values[:2] for p in _database()}.values())
def test_torchs_own_gpu_configurations(case: Case, info) -> None:
    for config in info.optim_inputs_func(device="cuda"):
        ours, stock, _ = twins(case, make_params(device="cuda"), config.kwargs)
        train([ours, stock], 7)
        assert_same(ours, stock)


_PAPERS = [variant for variant in BESIDE_STOCK if variant.is_formula]


@each(_PAPERS, _PAPERS)
def test_equals_the_paper(case: Case, kwargs: dict, device: torch.device) -> None:
    """A long run beside float64."""
    rng = random.Random(0)
    theta = [rng.gauss(0, 1) for _ in range(9)]
    # the interpreter takes 5 ms a step; RAdam changes its formula at the sixth
    gradients = [[rng.gauss(0, 1) for _ in theta] for _ in range(12 if INTERPRETED else 200)]
    expected = torch.tensor(case.reference(theta, gradients, **kwargs), dtype=torch.float64)
    # torch keeps mu_product, eta and mu in float32; a float32 weight_sum rounds once a step (test_schedule_free has it
    # in float64); rounding errors of 200 steps of float32 add up
    scalars = case.cls.rule.scalars
    tolerance = 2e-6 if "weight_sum" in scalars else 1e-7 if len(scalars) > 1 else 1e-12
    tolerances = {torch.float64: tolerance, torch.float32: 2e-5}
    if INTERPRETED:
        # the same formula, beside the loop in every dtype
        del tolerances[torch.float32]
    for dtype, tolerance in tolerances.items():
        param = Parameter(torch.tensor(theta, dtype=dtype, device=device))
        optimizer = case.cls([param], **kwargs)
        for gradient in gradients:
            param.grad = torch.tensor(gradient, dtype=dtype, device=device)
            optimizer.step()
        largest = float(expected.detach().abs().max())
        torch.testing.assert_close(param.double().cpu(), expected, rtol=tolerance, atol=tolerance * largest)


@each_case_and_walk
@pytest.mark.parametrize(
    "dtypes",
    [
        pytest.param((torch.float32, torch.bfloat16, torch.float32), id="float32-bf16_grad"),
        pytest.param((torch.bfloat16, torch.bfloat16, torch.float32), id="bf16-float32_state"),
        pytest.param((torch.float32, torch.float32, torch.bfloat16), id="float32-bf16_state"),
        pytest.param((torch.float16, torch.float16, torch.float32), id="float16-float32_state"),
    ],
)
def test_mixed_dtypes(case: Case, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """Where stock fails: computed in float32, each tensor rounded once a step to its own dtype."""
    of_param, of_grad, of_state = dtypes
    # a power of two: Rprop's state begins with it
    kwargs = {"lr": 2**-7, **({"momentum": 0.9} if case.name == "sgd" else {})}
    # more than one chunk each, and for Adafactor's tiles more rows and columns
    shapes = [(5, 7), (300,), (18, 40) if INTERPRETED else (70, 90)]
    params = make_params(shapes, device=device, dtype=of_param)
    exact = [Parameter(param.detach().double()) for param in params]
    ours, stock = case.cls(params, **kwargs), loop(case, exact, **kwargs)
    for param in params:
        names = case.state_names(param, **kwargs)
        group = ours.param_groups[0]
        new = {name: ours.rule.new_state(name, param, group, ours.defaults).to(of_state) for name in names}
        ours.state[param].update(new)
    for step in range(3):
        set_grads(exact, step)
        for param, twin in zip(params, exact, strict=True):
            set_grad(param, twin.grad.to(of_grad))
            twin.grad = param.grad.double()
        ours.step()
        stock.step()
        for twin in exact:
            twin.data.copy_(twin.data.to(of_param))
            for name in case.state_names(twin, **kwargs):
                stock.state[twin][name].copy_(stock.state[twin][name].to(of_state))
    for param, twin in zip(params, exact, strict=True):
        names = case.state_names(param, **kwargs)
        close = CLOSE[max(dtypes, key=lambda d: torch.finfo(d).eps)]
        pairs = [(param, twin), *((ours.state[param][name], stock.state[twin][name]) for name in names)]
        for actual, expected in pairs:
            # an ulp of the tensor's largest number, where numbers cancelled
            atol = close["atol"] + close["rtol"] / 4 * float(expected.detach().abs().max())
            torch.testing.assert_close(actual.double(), expected, rtol=close["rtol"], atol=atol)
        assert all(ours.state[param][name].dtype is of_state for name in names)
