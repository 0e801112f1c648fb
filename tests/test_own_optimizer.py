"""The optimizer of docs/own_optimizer.md: the page's code, beside a loop in float64."""

from __future__ import annotations

import copy
import importlib
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import optimx
from tests.cases import make_params, set_grads
from tests.conftest import INTERPRETED
from tests.engine import interpreted, params_of

PAGE = Path(__file__).parents[1] / "docs" / "own_optimizer.md"
BLOCKS = dict(re.findall(r'^```python title="([\w/.]+)"\n(.*?)^```', PAGE.read_text(), re.DOTALL | re.MULTILINE))
SHAPES = [(5,), (3, 4), (300,), (0,), (2, 3)]
EPS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-10}


@pytest.fixture
def adopt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page's modules, in files: Triton reads a kernel's source."""
    for name, code in BLOCKS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("my_optimizers")]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    return importlib.import_module("my_optimizers.adopt")


class Loop:
    """ADOPT as in the paper, in float64."""

    def __init__(self, params: list[Tensor], lrs: list[float]) -> None:
        self.params, self.lrs = [p.detach().double().clone() for p in params], lrs
        self.ms, self.vs = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.t = 0

    def step(self, grads: list[Tensor], max_norm: float | None) -> None:
        grads = [g.double() for g in grads]
        norm = torch.cat([g.flatten() for g in grads]).norm()
        factor = 1.0 if max_norm is None else min(1.0, float(max_norm / (norm + 1e-6)))
        for p, g, m, v, lr in zip(self.params, grads, self.ms, self.vs, self.lrs, strict=True):
            g = g * factor
            if self.t:
                u = (g / v.sqrt().clamp(min=1e-6)).clamp(-(self.t**0.25), self.t**0.25)
                m.mul_(0.9).add_(u, alpha=0.1)
                p.sub_(m, alpha=lr)
                v.mul_(0.9999).add_(g * g, alpha=0.0001)
            else:
                v.copy_(g * g)
        self.t += 1


def in_groups(params: list[Parameter]) -> list[dict]:
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]


@interpreted
@pytest.mark.parametrize("max_norm", [None, 0.5], ids=["plain", "clipped"])
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_equals_the_paper(adopt: ModuleType, device: torch.device, dtype: torch.dtype, max_norm: float | None) -> None:
    params = [Parameter(p.detach().to(dtype)) for p in make_params(SHAPES, device)]
    optimizer = adopt.ADOPT(in_groups(params), lr=0.01, max_grad_norm=max_norm)
    loop = Loop([*map(Tensor.cpu, params)], [0.01] * 2 + [0.02] * 3)
    for step in range(6):
        set_grads(params, step)
        loop.step([p.grad.cpu() for p in params if p.grad is not None], max_norm)
        optimizer.step()
        assert {row.backend for row in optimx.explain(optimizer).rows} != {"torch"}
    for p, expected in zip(params, loop.params, strict=True):
        torch.testing.assert_close(p.detach().cpu().double(), expected, rtol=EPS[dtype], atol=EPS[dtype])


@interpreted
def test_the_loop_it_falls_back_to_is_the_same(adopt: ModuleType, device: torch.device) -> None:
    ours, plain = (adopt.ADOPT(make_params(SHAPES, device), lr=0.01) for _ in range(2))
    for step in range(4):
        for optimizer in (ours, plain):
            set_grads(params_of(optimizer), step)
        ours.step()
        optimx.FormulaLoop.step(plain)
    for a, b in zip(params_of(ours), params_of(plain), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(ours.state[a]["exp_avg_sq"], plain.state[b]["exp_avg_sq"])


class HeavyRule(optimx.UpdateRule):
    """Momentum that uses all that a rule can say on the host: scalars, states of their own kind, a first step, an eps
    of the dtype."""

    module = "no_kernels.of_this"
    scalars = ("step", "size")

    def values(self, group):
        return group["lr"], group["eps"], 0.0

    def values_for(self, values, dtype, first):
        lr, eps, _ = values
        return lr, torch.finfo(dtype).eps if eps is None else eps, float(first)

    def state_names(self, variant):
        return ("buffer",)

    def kind_of(self, name, param, group, defaults):
        return optimx.StateKind(0.25, torch.promote_types(param.dtype, torch.float32))

    def new_scalar(self, name, group):
        return {"step": 0.0, "size": 1.0}[name]

    def is_first(self, state, values):
        return state.get("buffer") is None

    def prepare(self, values, scalars):
        lr, eps, first = values
        step, size = scalars
        return (1.0, lr * size, eps, 1.0 if first else 0.1), (step + 1.0, size * 0.5)

    def formula(self, variant, row, p, g, states, scratch):
        _, lr, eps, take = row
        states[0].lerp_(g, take)
        p.add_(states[0], alpha=-lr).sub_(eps)


class Heavy(optimx.MultiTensorStep, optimx.FormulaLoop):
    rule = HeavyRule()

    def __init__(self, params, lr=0.1, eps=None):
        super().__init__(params, {"lr": lr, "eps": eps})


@pytest.mark.skipif(INTERPRETED, reason="the rule has no kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_the_loop_asks_a_rule_what_the_engine_asks(dtype: torch.dtype, lr: float | Tensor) -> None:
    ours, plain = (Heavy(make_params(SHAPES, dtype=dtype), lr) for _ in range(2))
    first_of = [params_of(optimizer)[0] for optimizer in (ours, plain)]
    for step in range(4):
        for optimizer, first in zip((ours, plain), first_of, strict=True):
            set_grads(params_of(optimizer), step, skip=[step])
            if step == 2:
                # somebody's count that is a number, and a state that is to be made anew
                optimizer.state[first].update(step=3, buffer=None)
        ours.step()
        optimx.FormulaLoop.step(plain)
        assert {row.backend for row in optimx.explain(ours).rows} == {"native"}
    for a, b in zip(params_of(ours), params_of(plain), strict=True):
        torch.testing.assert_close(a, b)
        assert ours.state[a].keys() == plain.state[b].keys()
        for name, value in ours.state[a].items():
            torch.testing.assert_close(value, plain.state[b][name])


def test_checkpoints_hooks_copies(adopt: ModuleType) -> None:
    optimizer = adopt.ADOPT(make_params(SHAPES), lr=0.01)
    set_grads(params_of(optimizer), 0)
    optimizer.step()
    other = adopt.ADOPT(make_params(SHAPES), lr=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin = copy.deepcopy(optimizer)
    with torch.no_grad():
        for p, q in zip(params_of(optimizer), params_of(other), strict=True):
            q.copy_(p)
    for each in (optimizer, other, twin):
        set_grads(params_of(each), 1)
        each.step()
    for ps in zip(*map(params_of, (optimizer, other, twin)), strict=True):
        assert torch.equal(ps[0], ps[1])
        assert torch.equal(ps[0], ps[2])


def test_scaler_skips(adopt: ModuleType) -> None:
    params = make_params(SHAPES)
    optimizer = adopt.ADOPT(params, lr=0.01)
    scaler = optimx.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in params]
    scaler.scale(torch.ones(()))
    set_grads(params, 0, scale=float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.step_was_skipped
    assert all(map(torch.equal, before, params))
    assert scaler.get_scale() == 2.0


def test_sparse_gradients_are_refused(adopt: ModuleType) -> None:
    param = Parameter(torch.ones(3))
    param.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="ADOPT does not support sparse gradients"):
        adopt.ADOPT([param]).step()


def test_the_training_loop_of_the_page_runs(adopt: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runpy.run_path(str(tmp_path / "train.py"))
    assert "native" in capsys.readouterr().out
