"""One optimizer over two GPUs, and GPUs that are not the current one."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import optimx
from tests.cases import Case, make_params
from tests.engine import each_kind, usual

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

SHAPES = [(5,), (3, 5), (300,), (7,)]


def trained(case: Case, devices: list[str], scaler: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Parameters after four steps, the last two of which wait for nothing."""
    params = [
        Parameter(param.detach().to(device)) for param, device in zip(make_params(SHAPES), cycle(devices), strict=False)
    ]
    optimizer = case.cls(params, **usual(case), **kwargs)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        if scaler is not None:
            scaler.scale(torch.ones((), device="cuda"))
        for param in params:
            grad = torch.randn(param.shape, generator=generator) * (1.0 if scaler is None else 8.0)
            param.grad = grad.to(param.device)
        if scaler is not None and step == 1:
            params[2].grad[1] = float("inf")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update(8.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.current_device() == 0
    (plan,) = optimizer._engine.plans
    assert not plan.leftovers
    return [param.detach().cpu() for param in params]


@pytest.mark.parametrize("amp", [False, True], ids=["plain", "amp"])
@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 0.5}, {"capturable": True, "max_grad_norm": 0.5}], ids=str)
@each_kind
def test_same_on_any_devices(case: Case, kwargs: dict[str, Any], amp: bool) -> None:
    runs = [
        trained(case, devices, optimx.GradScaler("cuda", init_scale=8.0) if amp else None, kwargs)
        for devices in (["cuda:0"], ["cuda:1"], ["cuda:1", "cuda:0"])
    ]
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=1e-5, atol=1e-6)


def test_clip_grad_norm() -> None:
    params = [Parameter(torch.zeros(3, device=device)) for device in ("cuda:1", "cuda:0")]
    for param in params:
        param.grad = torch.full_like(param, 2.0)
    norm = optimx.clip_grad_norm_(params, 1.0)
    assert norm.device == params[0].device
    torch.testing.assert_close(norm.cpu(), torch.tensor(24.0).sqrt())
    torch.testing.assert_close(params[1].grad.cpu(), torch.full((3,), 1 / 6**0.5), rtol=1e-5, atol=0)


def test_tensor_hyperparameter_of_another_device() -> None:
    """A kernel could not read it; torch says what it says."""
    param = Parameter(torch.ones(3, device="cuda:1"))
    optimizer = optimx.AdamW([param], lr=torch.tensor(0.1, device="cuda:0"), capturable=True)
    param.grad = torch.ones_like(param)
    assert "another device" in optimx.explain(optimizer).rows[0].reason
