"""Gradients that are clipped before their norm is taken: adaptively, each alone, and those of a group together."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import optimx
from optimx._engine.grad_transforms import TRANSFORMS, transformed
from tests.cases import CASES, Case, make_params, set_grads
from tests.engine import interpreted, params_of

SHAPES = [(5,), (7, 3), (4, 3, 2, 2), (0, 3), (3, 0), (129, 130), (), (1,)]
WITH_AGC = ("SGD", "Adam", "AdamW", "NAdam", "Lion", "LAMB", "RMSprop")


@pytest.fixture(scope="module")
def timm_agc() -> Callable[..., None]:
    """timm's function, without the rest of timm, which needs a torchvision that suits torch."""
    found = find_spec("timm")
    if found is None:
        pytest.skip("timm is not installed")
    file = Path(found.submodule_search_locations[0]) / "utils" / "agc.py"
    spec = spec_from_file_location("timm_agc", file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.adaptive_clip_grad


def grads_after(params: list[Parameter], grad_scale: Tensor | None = None, **settings: Any) -> list[Tensor]:
    """Gradients after the transforms of a group."""
    names = [name for name in TRANSFORMS if name in settings]
    grads = [param.grad for param in params]
    return transformed([{"params": params, **settings}], params, grads, names, grad_scale)


def with_grads(*shapes: tuple[int, ...], scale: float = 1.0, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    params = make_params(shapes, dtype=dtype)
    set_grads(params, 0, scale=scale)
    return params


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agc_is_timms(timm_agc: Callable[..., None], dtype: torch.dtype, scale: float) -> None:
    """Some units are clipped, and others are not; one of a parameter is zero, one of a gradient."""
    params = with_grads(*SHAPES, scale=scale, dtype=dtype)
    with torch.no_grad():
        params[1][2] = 0.0
    params[1].grad[3] = 0.0
    params[5].grad[:50] *= 1e-5
    ours = grads_after(params, agc=0.01)
    before = [param.grad.clone() for param in params]
    timm_agc(params, 0.01)
    for mine, param, grad in zip(ours, params, before, strict=True):
        assert torch.equal(mine, param.grad)
        assert scale < 1.0 or not mine.numel() or not torch.equal(mine, grad)
    assert torch.equal(ours[5][:50], before[5][:50])


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agc_in_steps(timm_agc: Callable[..., None], case: Case, max_grad_norm: float | None) -> None:
    """A group of any optimizer has it; gradients keep their values, and one is missing in a step."""
    ours = case.cls([{"params": make_params(SHAPES), "agc": 0.02}], max_grad_norm=max_grad_norm)
    plain = case.cls(make_params(SHAPES), max_grad_norm=max_grad_norm)
    for step in range(3):
        for optimizer in (ours, plain):
            set_grads(params_of(optimizer), step, skip=(1,) if step == 1 else ())
        before = [None if param.grad is None else param.grad.clone() for param in params_of(ours)]
        timm_agc(params_of(plain), 0.02)
        ours.step()
        plain.step()
        for param, grad in zip(params_of(ours), before, strict=True):
            assert (param.grad is None) == (grad is None)
            assert grad is None or torch.equal(param.grad, grad)
        if max_grad_norm is not None:
            torch.testing.assert_close(ours.grad_norm, plain.grad_norm)
    for mine, theirs in zip(params_of(ours), params_of(plain), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", WITH_AGC)
def test_agc_is_an_argument(name: str) -> None:
    params, others = make_params([(3, 4)]), make_params([(2, 3)])
    optimizer = getattr(optimx, name)([{"params": params}, {"params": others, "agc": None}], lr=0.1, agc=0.01)
    assert [group["agc"] for group in optimizer.param_groups] == [0.01, None]
    assert "agc" not in getattr(optimx, name)(params, lr=0.1).param_groups[0]


def clip_alone(groups: list[dict[str, Any]]) -> None:
    for group in groups:
        for param in group["params"]:
            clip_grad_norm_([param], group["max_param_norm"])


def clip_by_group(groups: list[dict[str, Any]]) -> None:
    for group in groups:
        clip_grad_norm_(group["params"], group["max_group_norm"])


CLIPPING = {"max_param_norm": clip_alone, "max_group_norm": clip_by_group}


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("name", CLIPPING)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_clipping_of_parts(case: Case, name: str, max_grad_norm: float | None) -> None:
    """Three groups that differ, one of which is short enough; the norm of all is that of what has been clipped."""

    def groups(params: list[Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": params[:3], name: 0.3}, {"params": params[3:6], name: 5.0}, {"params": params[6:], name: 1e3}
        ]  # fmt: skip

    params, twins = make_params(SHAPES), make_params(SHAPES)
    ours = case.cls(groups(params), max_grad_norm=max_grad_norm)
    plain = case.cls(twins, max_grad_norm=max_grad_norm)
    for step in range(3):
        for each in (params, twins):
            set_grads(each, step, skip=(1,) if step == 1 else ())
        CLIPPING[name](groups(twins))
        ours.step()
        plain.step()
        if max_grad_norm is not None:
            torch.testing.assert_close(ours.grad_norm, plain.grad_norm)
    torch.testing.assert_close(params, twins, rtol=1e-5, atol=1e-6)


def test_transforms_come_in_order(timm_agc: Callable[..., None]) -> None:
    params = with_grads(*SHAPES)
    ours = grads_after(params, max_group_norm=0.5, max_param_norm=0.4, agc=0.3, centralize_grads=True)
    for param in params:
        if param.dim() > 1:
            param.grad -= param.grad.mean(dim=tuple(range(1, param.dim())), keepdim=True)
    timm_agc(params, 0.3)
    clip_alone([{"params": params, "max_param_norm": 0.4}])
    clip_by_group([{"params": params, "max_group_norm": 0.5}])
    torch.testing.assert_close(ours, [param.grad for param in params])


SETTINGS = {"agc": 0.01, "max_param_norm": 0.3, "max_group_norm": 0.3}
each_setting = pytest.mark.parametrize(("name", "value"), SETTINGS.items(), ids=SETTINGS)


@pytest.mark.parametrize("scaler_class", [optimx.GradScaler, torch.amp.GradScaler], ids=["ours", "torchs"])
@pytest.mark.parametrize("fused", [None, True])
@each_setting
def test_scaled_gradients_are_clipped_as_they_are_without(
    name: str, value: float, fused: bool | None, scaler_class: type
) -> None:
    """Clipping sees no scale, wherever it is divided away; an infinite gradient still skips the step."""
    params, twins = make_params([(6, 5), (3,)]), make_params([(6, 5), (3,)])
    ours = optimx.SGD([{"params": params, name: value}], lr=0.1, fused=fused)
    plain = optimx.SGD([{"params": twins, name: value}], lr=0.1)
    scaler = scaler_class("cpu", init_scale=1024.0)
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
    torch.testing.assert_close(params, twins)
    assert not torch.equal(params[0], make_params([(6, 5)])[0])


@each_setting
def test_scaled_gradients_of_leftovers(name: str, value: float) -> None:
    """Torch's own step gets them unscaled and clipped."""
    params = [Parameter(torch.randn(4, 3, dtype=torch.complex64)), Parameter(torch.randn(4, 3))]
    twins = deepcopy(params)
    ours = optimx.SGD([{"params": params, name: value}], lr=0.1)
    plain = optimx.SGD([{"params": twins, name: value}], lr=0.1)
    for param, twin in zip(params, twins, strict=True):
        twin.grad = torch.randn_like(param)
        param.grad = 64.0 * twin.grad
    ours.grad_scale, ours.found_inf = torch.tensor(64.0), torch.tensor(0.0)
    ours.step()
    plain.step()
    torch.testing.assert_close(params, twins)


@each_setting
def test_complex_gradients_have_lengths(name: str, value: float) -> None:
    param = Parameter(torch.full((2, 3), 1e-6, dtype=torch.complex64))
    param.grad = torch.full((2, 3), 3 + 4j)
    (clipped,) = grads_after([param], **{name: value})
    norms = torch.linalg.vector_norm(clipped, dim=1) if name == "agc" else torch.linalg.vector_norm(clipped)
    expected = 0.01 * 1e-3 if name == "agc" else 0.3
    torch.testing.assert_close(norms, torch.full_like(norms, expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 700), (700,), ()], ids=str)
@each_setting
def test_gradients_of_16_bits_are_rounded_once(
    name: str, value: float, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    params = with_grads(shape, scale=3.0, dtype=dtype)
    wide = [Parameter(param.detach().float()) for param in params]
    wide[0].grad = params[0].grad.float()
    (ours,), (exact,) = grads_after(params, **{name: value}), grads_after(wide, **{name: value})
    assert torch.equal(ours, exact.to(dtype))


@each_setting
def test_bad_gradients_stay_bad(name: str, value: float) -> None:
    """A step with one can still be skipped."""
    for bad in (torch.inf, -torch.inf, torch.nan):
        params = make_params([(6, 5), (3,)])
        optimizer = optimx.SGD([{"params": params, name: value}], lr=0.1, skip_nonfinite=True)
        set_grads(params, 0)
        params[0].grad[2, 3] = bad
        optimizer.step()
        assert optimizer.step_was_skipped
        assert torch.equal(params[1], make_params([(6, 5), (3,)])[1])


@interpreted
@each_setting
def test_settings_may_change_between_steps(device: torch.device, name: str, value: float) -> None:
    params, twins = make_params([(300,), (4, 5)], device), make_params([(300,), (4, 5)], device)
    ours, plain = optimx.AdamW(params), optimx.AdamW(twins)
    for step, setting in enumerate([None, value, None, 10 * value]):
        ours.param_groups[0][name] = setting
        set_grads(params, step)
        set_grads(twins, step)
        if setting is not None:
            for twin, grad in zip(twins, grads_after(twins, **{name: setting}), strict=True):
                twin.grad = grad
        ours.step()
        plain.step()
    assert all(map(torch.equal, params, twins))


@each_setting
def test_checkpoints_keep_settings(name: str, value: float) -> None:
    optimizer, other = (optimx.SGD([{"params": make_params([(3,)]), name: one}]) for one in (value, None))
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0][name] == value


@pytest.mark.parametrize("value", [0, 0.0, -1.0, float("nan")], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_values_of_no_use(name: str, value: float) -> None:
    for bad, error in ((value, ValueError), (True, TypeError), ("1", TypeError)):
        with pytest.raises(error, match=f"{name} should be"):
            optimx.SGD([{"params": make_params([(3,)]), name: bad}])
    optimizer = optimx.SGD(make_params([(3,)]))
    set_grads(params_of(optimizer), 0)
    optimizer.param_groups[0][name] = 0.0
    with pytest.raises(ValueError, match=f"{name} should be > 0 but is: 0.0"):
        optimizer.step()
    assert torch.equal(params_of(optimizer)[0], make_params([(3,)])[0])


@each_setting
def test_sparse_gradients_are_refused(name: str, value: float) -> None:
    param = Parameter(torch.ones(4, 2))
    param.grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(RuntimeError, match=f"gradients should be dense for {name}"):
        optimx.SGD([{"params": [param], name: value}], lr=0.1).step()


@each_setting
def test_a_composites_norm_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} should be None in 'a' .* but is: {value}"):
        optimx.Composite({"a": optimx.SGD([{"params": make_params([(3,)]), name: value}])}, max_grad_norm=1.0)


def test_groups_that_other_ranks_have_parts_of_are_refused() -> None:
    params = make_params([(3,)])
    optimizer = optimx.SGD([{"params": params, "max_group_norm": 1.0}], norm_group=object())
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match="max_group_norm should be None with norm_group"):
        optimizer.step()
    assert torch.equal(params[0], make_params([(3,)])[0])


def test_configs_leave_the_last_layer_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    rules = [{"match": "1.*", "agc": None}]
    optimizer = optimx.build(model, {"optimizer": {"name": "sgd", "agc": 0.01}, "groups": {"rules": rules}}).optimizer
    found = {name: group["agc"] for group in optimizer.param_groups for name in group["param_names"]}
    assert found == {"0.weight": 0.01, "0.bias": 0.01, "1.weight": None, "1.bias": None}
