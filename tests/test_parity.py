"""Beside stock's for-loop: parameters and state, several steps, in every configuration torch tests its own with."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn import Parameter

import optimx
from tests.cases import CASES, CLOSE, Case, assert_same, make_params, set_grads, train, train_rounded, twins
from tests.conftest import INTERPRETED
from tests.reference.adam import adam as reference_adam

pytestmark = pytest.mark.interpreted

VARIANTS = [pytest.param(c, kw, id=f"{c.name}-{name}") for c in CASES for name, kw in c.variants.items()]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("case", "kwargs"), VARIANTS)
def test_equals_the_loop(case: Case, kwargs: dict, dtype: torch.dtype, device: torch.device) -> None:
    params = make_params(device=device, dtype=dtype)
    ours, stock, _ = twins(case, params, kwargs)
    train_rounded(ours, stock, 4, dtype)
    # stock computes with tensor hyperparameters in their own float32
    tensors = any(map(torch.is_tensor, (kwargs.get("lr"), *kwargs.get("betas", ()))))
    assert_same(ours, stock, CLOSE[torch.float32] if tensors and dtype is torch.float64 else None)


@pytest.mark.parametrize(("case", "kwargs"), VARIANTS)
def test_groups_that_differ(case: Case, kwargs: dict, device: torch.device) -> None:
    def groups(params):
        return [
            {"params": params[:3]},
            {"params": params[3:5], "lr": 0.05, "weight_decay": 0.3},
            {"params": []},
            {"params": params[5:], "betas": (0.5, 0.6), "eps": 1e-4},
        ]

    ours, stock, _ = twins(case, make_params(device=device), kwargs, groups)
    train([ours, stock], 4)
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


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"weight_decay": 0.1, "amsgrad": True},
        {"weight_decay": 0.1, "maximize": True, "betas": (0.5, 0.9)},
        {"lr": 0.1, "eps": 1e-3, "betas": (0.0, 0.99)},
    ],
    ids=["default", "amsgrad", "maximize", "beta1_zero"],
)
@pytest.mark.parametrize("decoupled", [False, True], ids=["adam", "adamw"])
def test_equals_the_paper(kwargs: dict, decoupled: bool, device: torch.device) -> None:
    rng = random.Random(0)
    theta = [rng.gauss(0, 1) for _ in range(9)]
    # the interpreter takes 5 ms a step
    gradients = [[rng.gauss(0, 1) for _ in theta] for _ in range(40 if INTERPRETED else 200)]
    expected = reference_adam(theta, gradients, decoupled=decoupled, **{"weight_decay": 0.01, **kwargs})
    cls = optimx.AdamW if decoupled else optimx.Adam
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        param = Parameter(torch.tensor(theta, dtype=dtype, device=device))
        optimizer = cls([param], **{"weight_decay": 0.01, **kwargs})
        for gradient in gradients:
            param.grad = torch.tensor(gradient, dtype=dtype, device=device)
            optimizer.step()
        torch.testing.assert_close(param.double().cpu(), torch.tensor(expected).double(), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
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
    params = make_params([(5, 7), (300,), (70, 90)], device=device, dtype=of_param)
    exact = [Parameter(param.detach().double()) for param in params]
    ours, stock = case.cls(params, lr=0.01), case.stock(exact, lr=0.01, foreach=False)
    for param in params:
        param.grad_dtype = of_grad
        ours.state[param].update({k: torch.zeros_like(param, dtype=of_state) for k in ("exp_avg", "exp_avg_sq")})
    for step in range(3):
        set_grads(exact, step)
        for param, twin in zip(params, exact, strict=True):
            param.grad = twin.grad.to(of_grad)
            twin.grad = param.grad.double()
        ours.step()
        stock.step()
        for twin in exact:
            twin.data.copy_(twin.data.to(of_param))
            for tensor in (stock.state[twin]["exp_avg"], stock.state[twin]["exp_avg_sq"]):
                tensor.copy_(tensor.to(of_state))
    for param, twin in zip(params, exact, strict=True):
        close = CLOSE[max(dtypes, key=lambda d: torch.finfo(d).eps)]
        torch.testing.assert_close(param.double(), twin, **close)
        assert ours.state[param]["exp_avg"].dtype is of_state
        torch.testing.assert_close(ours.state[param]["exp_avg"].double(), stock.state[twin]["exp_avg"], **close)
