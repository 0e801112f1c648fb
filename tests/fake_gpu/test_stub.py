"""Whole steps on the stub driver: what is compiled, when, and how many launches a step is. `make fake-gpu`.

Kernels are compiled and launched as on an H100; none runs, so no number is looked at.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import optimx
from tests.cases import CASES, Case
from tests.engine import usual

plugin: Any = sys.modules.get("tests.fake_gpu.stub_plugin")
if plugin is None:
    pytest.skip("needs -p tests.fake_gpu.stub_plugin: `make fake-gpu`", allow_module_level=True)

#: A vector, a matrix and the kernels of a convolution: Adafactor cuts each in its own way.
SHAPES = [(64,), (8, 24), (4, 2, 3, 3)]
COUNTS = (1, 2, 3, 16, 17, 40)
WAYS: dict[str, dict[str, Any]] = {"plain": {}, "clip": {"max_grad_norm": 1.0}, "capturable": {"capturable": True}}


@pytest.fixture(autouse=True)
def nothing_is_specialized_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches go by handle: they have to find out whether the JIT would have taken another kernel."""
    from optimx.triton_kernels import device

    monkeypatch.setattr(device, "verify", True)


each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def params_of(count: int) -> list[Parameter]:
    params = [Parameter(torch.ones(shape, device="cuda")) for shape in SHAPES for _ in range(count)]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def two_groups(case: Case, params: list[Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[::2]}, {"params": params[1::2], **usual(case, lr=0.05)}]


@pytest.mark.parametrize("way", WAYS)
@each_case
def test_nothing_is_compiled_for_another_step_or_count(case: Case, way: str) -> None:
    for count in COUNTS:
        optimizer = case.cls(two_groups(case, params_of(count)), **usual(case), **WAYS[way])
        compiled = plugin.stub.modules
        for step in range(1, 18):
            optimizer.param_groups[0]["lr"] = 0.1 / step
            optimizer.step()
            if step == 3:
                # of some rules the first step is another kernel's, and the second the first of those that follow
                first = plugin.stub.modules
        assert plugin.stub.modules == first
        assert count == 1 or first == compiled, f"compiled anew for {count} tensors of each shape"
        assert {row.backend for row in optimx.explain(optimizer).rows} == {"triton"}


@pytest.mark.parametrize("scaler_cls", [torch.amp.GradScaler, optimx.GradScaler], ids=["torch", "optimx"])
@each_case
def test_nothing_is_compiled_for_another_count_under_a_scaler(case: Case, scaler_cls: Any) -> None:
    for count in COUNTS:
        optimizer = case.cls(params_of(count), **usual(case), max_grad_norm=1.0)
        scaler = scaler_cls("cuda", init_scale=8.0)
        compiled = plugin.stub.modules
        for _ in range(4):
            scaler.scale(torch.ones((), device="cuda"))
            scaler.step(optimizer)
            scaler.update()
        assert count == 1 or plugin.stub.modules == compiled


@pytest.mark.parametrize(("way", "launches"), [("plain", 1), ("clip", 3), ("capturable", 2)])
@pytest.mark.parametrize("count", [1, 1000])
def test_launches_of_a_step(way: str, launches: int, count: int) -> None:
    params = [Parameter(torch.ones(64, device="cuda")) for _ in range(count)]
    optimizer = optimx.AdamW(params, **WAYS[way])
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        before = plugin.stub.launches
        optimizer.step()
    assert plugin.stub.launches - before == launches
