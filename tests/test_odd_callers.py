"""What users, and libraries written for torch's classes, do to an optimizer beside calling ``step``."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import optimx
from tests.cases import CASES, Case, assert_same, loop, make_params, train, twins
from tests.conftest import INTERPRETED
from tests.engine import each_case_natively, params_of, usual

SHAPES = [(5,), (3, 4)]
of_torch = [case for case in CASES if case.is_torchs]
each_of_torch = pytest.mark.parametrize("case", of_torch, ids=lambda case: case.name)
natively = pytest.mark.skipif(INTERPRETED, reason="about Python, not about kernels")

pytestmark = natively


# settings


@pytest.mark.parametrize("make", ["array", "float32"])
@each_case_natively
def test_lr_of_numpy(case: Case, make: str) -> None:
    """What scipy's interpolations give; written anew, or in place."""
    numpy = pytest.importorskip("numpy")
    kinds = {"array": numpy.array, "float32": numpy.float32}
    ours, plain, _ = (case.cls(make_params(SHAPES), **usual(case)) for _ in range(3))
    for step in range(3):
        lr = 0.1 / (step + 1)
        ours.param_groups[0]["lr"], plain.param_groups[0]["lr"] = kinds[make](lr), float(kinds[make](lr).item())
        train([ours, plain], 1, first=step)
    if make == "array":
        ours.param_groups[0]["lr"] = rate = numpy.array(0.5)
        train([ours], 1, first=3)
        rate *= 0.5
        plain.param_groups[0]["lr"] = 0.5
        train([plain], 1, first=3)
        plain.param_groups[0]["lr"] = 0.25
        train([ours, plain], 1, first=4)
    torch.testing.assert_close(params_of(ours), params_of(plain), rtol=0, atol=0)


@each_case_natively
def test_a_default_that_groups_lack(case: Case) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES), usual(case))
    train([ours, stock], 1)
    ours.defaults["lookahead_steps"] = 6
    train([ours, stock], 2, first=1)
    assert_same(ours, stock)


@pytest.mark.parametrize("name", ["max_grad_norm", "normalize_grads"])
@each_case_natively
def test_a_group_with_a_setting_of_the_whole(case: Case, name: str) -> None:
    """Clipping by group is another thing, and must not be left out silently: wherever the group comes from."""
    message = f"{name} should be an argument of the optimizer"
    with pytest.raises(ValueError, match=message):
        case.cls([{"params": make_params(SHAPES), name: 1.0}])
    optimizer = case.cls(make_params(SHAPES), **usual(case))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": make_params([(2,)]), name: 1.0})
    assert len(optimizer.param_groups) == 1
    saved = optimizer.state_dict()
    saved["param_groups"][0][name] = 1.0
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    train([optimizer], 1)
    optimizer.param_groups[0][name] = 1.0
    with pytest.raises(ValueError, match=message):
        train([optimizer], 1)


def test_flat_shards_are_not_clipped_by_a_local_norm() -> None:
    """FSDP1 marks its flat parameters, and the ones they were made of."""
    params = make_params(SHAPES)
    params[1]._fsdp_flattened = True
    with pytest.raises(ValueError, match=r"norm_group should be the process group .* model.clip_grad_norm_"):
        optimx.AdamW(params, max_grad_norm=1.0)
    optimizer = optimx.AdamW(params)
    train([optimizer], 1)
    optimizer.max_grad_norm = 1.0
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match="norm_group should be the process group"):
        train([optimizer], 1)
    torch.testing.assert_close(before, [param.detach() for param in params], rtol=0, atol=0)


# subclasses


@each_of_torch
def test_init_of_the_base_is_passed_over(case: Case) -> None:
    """``super(Adam, self).__init__(params, defaults)``, or torch's Optimizer directly."""

    def direct(self: Any, params: Any, defaults: dict[str, Any]) -> None:
        Optimizer.__init__(self, params, defaults)

    def by_super(self: Any, params: Any, defaults: dict[str, Any]) -> None:
        super(case.cls, self).__init__(params, defaults)

    if case.name == "adagrad":
        pytest.skip("its __init__ makes the states, in torch too")
    for init in (direct, by_super) if case.name != "adamw" else (direct,):
        cls = type("Mine", (case.cls,), {"__init__": init})
        kwargs = usual(case)
        ours = cls(make_params(SHAPES), case.cls(make_params([(1,)]), **kwargs).defaults)
        stock = loop(case, make_params(SHAPES), **kwargs)
        train([ours, stock], 2)
        assert_same(ours, stock)


@each_case_natively
def test_public_attributes_are_copied(case: Case) -> None:
    optimizer = case.cls(make_params(SHAPES), **usual(case), max_grad_norm=1.0)
    optimizer.numbers, optimizer.owner = {"warmup": [1, 2.0]}, SimpleNamespace(optimizer=optimizer)
    train([optimizer], 1)

    def public(other: Any) -> set[str]:
        return {name for name in vars(other) if not name.startswith("_")}

    for twin in (copy.copy(optimizer), copy.deepcopy(optimizer)):
        assert public(twin) == public(optimizer)
        assert torch.equal(twin.grad_norm, optimizer.grad_norm)
        assert twin.numbers == optimizer.numbers
    assert copy.deepcopy(optimizer).owner.optimizer is not optimizer
    # pickle takes what is data, and no class of a user's that it may not find
    unpickled = pickle.loads(pickle.dumps(optimizer))
    assert public(unpickled) == public(optimizer) - {"owner"}
    plain = case.cls(make_params(SHAPES), **usual(case))
    train([plain], 1)
    # nothing that nobody set
    assert public(pickle.loads(pickle.dumps(plain))) == public(plain)
    assert not case.is_torchs or public(plain) == {"defaults", "state", "param_groups"}


# names


def test_patched_into_torchs_namespace() -> None:
    """As a framework is swapped that picks optimizers by name. In a process of its own."""
    script = """
import io, torch, optimx
names = [name for name in torch.optim.__all__ if getattr(optimx, name, None) is not getattr(torch.optim, name)]
names = [name for name in names if isinstance(getattr(optimx, name), type)]
assert "AdamW" in names and "Adafactor" in names, names
for name in names:
    setattr(torch.optim, name, getattr(optimx, name))
for name in names:
    # Muon has no such argument
    for extra in ({}, {"foreach": False})[: 1 + (name != "Muon")]:
        class Mine(getattr(torch.optim, name)):
            def step(self, closure=None):
                return super().step(closure)
        param = torch.nn.Parameter(torch.ones(4, 3))
        optimizer = Mine([param], lr=0.1, **extra)
        param.grad = torch.full((4, 3), 0.5)
        optimizer.step()
        assert not torch.equal(param, torch.ones(4, 3)), name
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        again = getattr(torch.optim, name)([param], lr=0.1, **extra)
        again.load_state_dict(torch.load(file))
        again.step()
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("adam", "Adam"),
        ("adam", "adam"),
        ("sgd", "_single_tensor_sgd"),
        ("optimizer", "Optimizer"),
        ("optimizer", "required"),
        ("lbfgs", "LBFGS"),
        ("sparse_adam", "SparseAdam"),
        ("lr_scheduler", "_LRScheduler"),
        ("swa_utils", "PARAM_LIST"),
        ("_multi_tensor", "AdamW"),
    ],
)
def test_names_that_other_projects_import(module: str, name: str) -> None:
    theirs = getattr(importlib.import_module(f"torch.optim.{module}"), name)
    ours = getattr(importlib.import_module(f"optimx.{module}"), name)
    assert ours is (optimx.Adam if name == "Adam" else theirs)
    with pytest.raises(AttributeError, match="nonsense"):
        importlib.import_module(f"optimx.{module}").nonsense  # noqa: B018


# what wraps them


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clipping_in_one_compiled_graph(norm_type: float) -> None:
    import torch._dynamo

    results = []
    for clip in (torch.nn.utils.clip_grad_norm_, optimx.clip_grad_norm_):
        torch._dynamo.reset()
        params = make_params(SHAPES)
        for i, param in enumerate(params):
            param.grad = torch.full_like(param, 1.0 + i)
        compiled = torch.compile(lambda ps, clip=clip: clip(ps, 1.0, norm_type), fullgraph=True, backend="eager")
        results.append([compiled(params), *(param.grad for param in params)])
    torch._dynamo.reset()
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("weight_decay", [None, 0.0])
def test_adafactor_without_a_bound(weight_decay: float | None) -> None:
    """``lr=inf``: the relative step alone."""
    kwargs = {} if weight_decay is None else {"weight_decay": weight_decay}
    ours = optimx.Adafactor(make_params(SHAPES), lr=float("inf"), **kwargs)
    stock = torch.optim.Adafactor(make_params(SHAPES), lr=float("inf"), foreach=False, **kwargs)
    train([ours, stock], 3)
    assert all(bool(param.isfinite().all()) for param in params_of(ours))
    assert_same(ours, stock)


def test_transformers_schedule_of_adafactor() -> None:
    """It writes step sizes into the groups, which neither transformers' optimizer nor ours reads then."""
    import tests.models  # noqa: F401  (makes torchvision importable, which transformers imports)

    optimization = pytest.importorskip("transformers.optimization")

    def run(make: Any) -> tuple[list[Tensor], list[Any]]:
        params = make_params([(4, 3), (3,)])
        optimizer = make(params)
        schedule = optimization.AdafactorSchedule(optimizer)
        for step in range(3):
            train([optimizer], 1, first=step)
            schedule.step()
        return [param.detach() for param in params], schedule.get_lr()

    arguments: dict[str, Any] = {"lr": None, "scale_parameter": True, "relative_step": True, "warmup_init": True}
    theirs = run(lambda params: optimization.Adafactor(params, **arguments))
    ours = run(lambda params: optimx.Adafactor(params, **arguments, variant="hf"))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(ours[1]), torch.tensor([float(lr) for lr in theirs[1]]), rtol=1e-4, atol=0)
    with pytest.raises(RuntimeError, match=r"use optimx.lr_scheduler.AdafactorSchedule"):
        run(lambda params: optimx.Adafactor(params))


def test_adagrad_rounds_once_in_16_bits() -> None:
    """The sum of gradient and weight decay, too, is not rounded before it is squared."""
    for dtype in (torch.bfloat16, torch.float16):
        params = make_params([(64,)], dtype=dtype)
        wide = [Parameter(param.detach().double()) for param in params]
        ours = optimx.Adagrad(params, lr=0.1, weight_decay=0.3)
        exact = torch.optim.Adagrad(wide, lr=0.1, weight_decay=0.3, foreach=False)
        grad = torch.randn(64, generator=torch.Generator().manual_seed(1)).to(dtype)
        params[0].grad, wide[0].grad = grad, grad.double()
        ours.step()
        exact.step()
        assert torch.equal(params[0], wide[0].to(dtype))
        assert torch.equal(ours.state[params[0]]["sum"], exact.state[wide[0]]["sum"].to(dtype))
