"""Flags of groups: what they do, that they are no part of groups where they are off, and that nothing ignores one."""

from __future__ import annotations

import sys
from copy import deepcopy
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import optimx
from optimx._engine.cpu import batch, elementwise
from optimx._engine.flags import FLAGS, OF_UPDATES
from tests.cases import (
    CASES,
    HALF,
    VARIANTS,
    Case,
    assert_same,
    make_params,
    set_grads,
    train,
    train_rounded,
    twins,
)
from tests.conftest import INTERPRETED
from tests.engine import each, interpreted, params_of, pick

SHAPES = [(5,), (7, 3), (4, 3, 2, 2), (0, 3), (3, 0), (129, 130), ()]
WITH_FLAGS = [case for case in CASES if case.cls.rule.flags]
each_with_flags = pytest.mark.parametrize("case", WITH_FLAGS, ids=lambda case: case.name)


def usual(case: Case, **more: Any) -> dict[str, Any]:
    """Arguments in which every flag of the algorithm may be set."""
    decoupled = {"decoupled_weight_decay": True} if case.cls in (optimx.Adam, optimx.NAdam) else {}
    return {"lr": 0.05, "weight_decay": 0.5, **decoupled, **more}


def centralize(params: list[Tensor]) -> None:
    """In place, in float64."""
    for param in params:
        if param.grad is not None and param.dim() > 1:
            wide = param.grad.double()
            param.grad = (wide - wide.mean(dim=tuple(range(1, param.dim())), keepdim=True)).to(param.dtype)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_centralized_gradients(case: Case, max_grad_norm: float | None) -> None:
    ours = case.cls([{"params": make_params(SHAPES), "centralize_grads": True}], max_grad_norm=max_grad_norm)
    plain = case.cls(make_params(SHAPES), max_grad_norm=max_grad_norm)
    for step in range(3):
        set_grads(params_of(ours), step, skip=(1,) if step == 1 else ())
        set_grads(params_of(plain), step, skip=(1,) if step == 1 else ())
        before = [None if param.grad is None else param.grad.clone() for param in params_of(ours)]
        centralize(params_of(plain))
        ours.step()
        plain.step()
        for param, grad in zip(params_of(ours), before, strict=True):
            assert (param.grad is None) == (grad is None)
            assert grad is None or torch.equal(param.grad, grad)
        if max_grad_norm is not None:
            torch.testing.assert_close(ours.grad_norm, plain.grad_norm)
    for mine, theirs in zip(params_of(ours), params_of(plain), strict=True):
        # Adafactor and Adam divide by what centralization may have made tiny
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.equal(params_of(ours)[1], make_params(SHAPES)[1])


@interpreted
def test_centralized_gradients_of_leftovers() -> None:
    """Torch's own step gets them, clipped or not, and leaves gradients as they were."""
    for max_grad_norm in (None, 0.1):
        params = [Parameter(torch.randn(4, 3, dtype=torch.complex64)), Parameter(torch.randn(4, 3))]
        twins = deepcopy(params)
        ours = optimx.AdamW(params, lr=0.1, centralize_grads=True, max_grad_norm=max_grad_norm)
        plain = optimx.AdamW(twins, lr=0.1, max_grad_norm=max_grad_norm)
        for param, twin in zip(params, twins, strict=True):
            param.grad = torch.randn_like(param)
            twin.grad = param.grad - param.grad.mean(dim=1, keepdim=True)
        before = [param.grad.clone() for param in params]
        ours.step()
        plain.step()
        for param, twin, grad in zip(params, twins, before, strict=True):
            torch.testing.assert_close(param, twin)
            assert torch.equal(param.grad, grad)


def test_centralized_gradients_under_a_scaler() -> None:
    """Means of scaled gradients are scaled means; an infinite gradient still skips the step."""
    params, twins = make_params([(6, 5)]), make_params([(6, 5)])
    ours = optimx.AdamW(params, lr=0.1, fused=True, centralize_grads=True)
    plain = optimx.AdamW(twins, lr=0.1, centralize_grads=True)
    scaler = optimx.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros((), requires_grad=True))
    for step in range(3):
        set_grads(params, step, scale=1024.0)
        set_grads(twins, step)
        if step == 1:
            params[0].grad[2, 3] = torch.inf
        else:
            plain.step()
        scaler.step(ours)
        scaler.update(1024.0)
        assert bool(ours.step_was_skipped) == (step == 1)
    torch.testing.assert_close(params, twins)


def test_bfloat16_means_are_rounded_once() -> None:
    param = Parameter(torch.zeros(2, 4096, dtype=torch.bfloat16))
    param.grad = (1 + torch.arange(4096).remainder(3) / 64).to(torch.bfloat16).expand(2, -1).clone()
    exact = (param.grad.double() - param.grad.double().mean(1, keepdim=True)).to(torch.bfloat16)
    optimx.SGD([{"params": [param], "centralize_grads": True}], lr=1.0).step()
    assert torch.equal(-param.detach(), exact)


FLAGGED = [variant for variant in VARIANTS if {*OF_UPDATES} & variant.kwargs.keys()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@each(FLAGGED, pick("adamw-clipped_cautious", "adam-cautious", "nadam-cautious_both", "lion-cautious_both"))
def test_equals_the_loop(device: torch.device, case: Case, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """Two groups that differ, a gradient missing in one step; tensors small and of many chunks."""
    if dtype in HALF and case.cls is optimx.Lion:
        pytest.skip("where numbers cancel, a rounding turns a sign, and a step of 16 bits is another")
    shapes = [(), (0,), (1,), (129,), (3, 5, 7), (30, 20) if INTERPRETED else (300, 70)]
    params = make_params(shapes, device, dtype)
    ours, stock, _ = twins(case, params, kwargs, lambda all: [{"params": all[:3], "lr": 0.02}, {"params": all[3:]}])
    if dtype in HALF:
        train_rounded(ours, stock, 3, dtype)
    else:
        train([ours, stock], 2)
        train([ours, stock], 1, first=2, skip=(1, 4))
        train([ours, stock], 1, first=3)
    assert_same(ours, stock)


@pytest.mark.parametrize("piece", [64, 1 << 19])
@each(FLAGGED, ())
def test_pieces_of_large_tensors(
    monkeypatch: pytest.MonkeyPatch, case: Case, kwargs: dict[str, Any], piece: int
) -> None:
    """A tensor that is cut into pieces takes the step of one that is not."""
    monkeypatch.setattr(elementwise, "PIECE", piece)
    monkeypatch.setattr(batch, "SMALL", 16)
    ours, stock, _ = twins(case, make_params([(300,), (5, 40), (9,)]), kwargs)
    train([ours, stock], 3)
    assert_same(ours, stock)


@pytest.mark.parametrize("more", [{}, {"amsgrad": True}, {"weight_decay": 0.0}, {"maximize": True}], ids=str)
@pytest.mark.parametrize(
    "flags", [{"cautious": True}, {"update_clipping": True}, dict.fromkeys(OF_UPDATES[1:], True)], ids=str
)
@pytest.mark.parametrize("name", ["Adam", "AdamW", "Lion"])
def test_equals_timm(timm: Any, name: str, flags: dict[str, bool], more: dict[str, Any]) -> None:
    """timm's classes in float32, with the per-tensor mean and the clipping that these flags name."""
    if name == "Lion" and ("amsgrad" in more or "update_clipping" in flags):
        pytest.skip("timm's Lion has neither")
    if name == "Adam" and "weight_decay" not in more:
        more = {**more, "decoupled_weight_decay": True}
    kwargs = {"lr": 0.01, "weight_decay": 0.1, **({} if name == "Lion" else {"betas": (0.9, 0.8)}), **more}
    theirs = {**kwargs, "caution": flags.get("cautious", False)}
    theirs.pop("decoupled_weight_decay", None)
    if name != "Lion":
        theirs["clipping_threshold"] = 1.0 if flags.get("update_clipping") else None
    params, copies = make_params(SHAPES[1:3]), make_params(SHAPES[1:3])
    ours = getattr(optimx, name)(params, **kwargs, **flags)
    timms = timm.Lion(copies, **theirs) if name == "Lion" else timm.AdamW(copies, **theirs)
    for step in range(4):
        for optimizer in (ours, timms):
            set_grads(params_of(optimizer), step, scale=1.0 + 3.0 * (step == 2))
            optimizer.step()
    for mine, other in zip(params, copies, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-6)


@pytest.fixture(scope="module")
def timm() -> Any:
    """timm's optimizers without the rest of it, which needs a torchvision that suits torch."""
    found = find_spec("timm")
    if found is None:
        pytest.skip("timm is not installed")
    folder = Path(found.submodule_search_locations[0])
    with patch.dict(sys.modules):
        for name, path in (("timm", folder), ("timm.optim", folder / "optim")):
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [str(path)]
        adamw, lion = (import_module(f"timm.optim.{name}") for name in ("adamw", "lion"))
    return SimpleNamespace(AdamW=adamw.AdamWLegacy, Lion=lion.Lion)


@interpreted
@pytest.mark.parametrize("flag", OF_UPDATES[1:])
def test_a_nan_gradient_reaches_the_parameters(device: torch.device, flag: str) -> None:
    for cls in (optimx.AdamW, optimx.NAdam):
        param = Parameter(torch.ones(300, device=device))
        param.grad = torch.ones_like(param)
        param.grad[7] = torch.nan
        cls([param], **{flag: True}).step()
        assert param[7].isnan()


@each_with_flags
def test_groups_have_what_is_set_alone(case: Case) -> None:
    assert not FLAGS.keys() & case.cls(make_params([(3,)])).param_groups[0].keys()
    for name in case.cls.rule.flags:
        params = make_params([(3,), (4,)])
        optimizer = case.cls(
            [{"params": params[:1], name: False}, {"params": params[1:]}], **usual(case, **{name: True})
        )
        assert [group[name] for group in optimizer.param_groups] == [False, True]


@each_with_flags
@pytest.mark.parametrize("name", OF_UPDATES)
def test_off_is_bitwise_as_before(case: Case, name: str) -> None:
    """A group with flags beside one without: that one takes the very steps that it takes alone."""
    if name not in case.cls.rule.flags:
        pytest.skip(f"{case.name} has no {name}")
    params, alone = make_params([(300,), (40, 5)]), make_params([(300,), (40, 5)])
    flagged = case.cls([{"params": params[:1], name: True}, {"params": params[1:], name: False}], **usual(case))
    plain = [case.cls([param], **usual(case)) for param in alone]
    for step in range(3):
        set_grads(params, step)
        set_grads(alone, step)
        for optimizer in (flagged, *plain):
            optimizer.step()
    assert torch.equal(params[1], alone[1])
    assert not torch.equal(params[0], alone[0])


@each_with_flags
def test_a_flag_may_change_between_steps(case: Case) -> None:
    optimizer, twin = (case.cls(make_params([(300,)]), **usual(case)) for _ in range(2))
    for name in case.cls.rule.flags:
        train([optimizer, twin], 1)
        optimizer.param_groups[0][name] = True
        train([optimizer], 1)
        optimizer.param_groups[0][name] = False
        train([twin], 1)
        assert not torch.equal(params_of(optimizer)[0], params_of(twin)[0])


@each_with_flags
def test_checkpoints_keep_flags(case: Case) -> None:
    """Ours tell of them; with torch's, which have none, the optimizer's own stay."""
    name = case.cls.rule.flags[0]
    optimizer = case.cls(make_params([(3, 4)]), **usual(case, **{name: True}), centralize_grads=True)
    train([optimizer], 1)
    for mine in (True, False):
        other = case.cls(make_params([(3, 4)]), **usual(case, **({name: True} if mine else {})))
        other.load_state_dict(optimizer.state_dict())
        assert other.param_groups[0][name]
        assert other.param_groups[0]["centralize_grads"]
    stock = case.cls(make_params([(3, 4)]), **usual(case))
    train([stock], 1)
    optimizer.load_state_dict(stock.state_dict())
    assert optimizer.param_groups[0][name] is True


def test_what_no_kernel_updates_is_refused() -> None:
    """Torch's step knows no flags; nothing has been changed by then."""
    params = [Parameter(torch.ones(4)), Parameter(torch.ones(4, dtype=torch.complex64))]
    for foreach in (None, True):
        optimizer = optimx.AdamW(params if foreach is None else params[:1], foreach=foreach, cautious_weight_decay=True)
        for param in params:
            param.grad = torch.ones_like(param)
        with pytest.raises(
            RuntimeError, match="should be updated with cautious_weight_decay=True but is left to torch"
        ):
            optimizer.step()
        assert torch.equal(params[0], torch.ones(4))
        assert not optimizer.state


BAD: dict[str, tuple[Any, str]] = {
    "not_decoupled": (
        lambda p: optimx.Adam(p, cautious_weight_decay=True), "cautious_weight_decay should be False without decoupled"
    ),
    "not_decoupled_nadam": (
        lambda p: optimx.NAdam(p, cautious_weight_decay=True), "cautious_weight_decay should be False without decoupled"
    ),
    "number": (lambda p: optimx.Lion(p, cautious_weight_decay=0.1), "should be True or False but is: 0.1"),
    "no_flag": (
        lambda p: optimx.SGD([{"params": p, "cautious_weight_decay": True}], lr=0.1), "is no flag of SGDRule's updates"
    ),
    "composite": (
        lambda p: optimx.Composite({"a": optimx.AdamW(p, centralize_grads=True)}, max_grad_norm=1.0),
        "centralize_grads should be False",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_errors(bad: str) -> None:
    make, message = BAD[bad]
    with pytest.raises((ValueError, RuntimeError), match=message):
        make(make_params([(3,)]))


def test_a_bad_group_is_not_added() -> None:
    optimizer = optimx.Adam(make_params([(3,)]))
    with pytest.raises(ValueError, match="without decoupled"):
        optimizer.add_param_group({"params": make_params([(4,)]), "cautious_weight_decay": True})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused() -> None:
    param = Parameter(torch.ones(4, 2))
    param.grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(RuntimeError, match="gradients should be dense for centralize_grads"):
        optimx.SGD([{"params": [param], "centralize_grads": True}], lr=0.1).step()
