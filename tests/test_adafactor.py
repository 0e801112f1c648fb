"""Adafactor beyond what all optimizers are tested for: matrices, transformers' definition and checkpoints."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import optimx
from optimx.adafactor import AdafactorLoop
from tests.cases import BY_NAME, CLOSE, VARIANTS, Case, assert_same, make_params, set_grads, train, twins
from tests.conftest import INTERPRETED
from tests.engine import KERNELS, each, interpreted, params_of
from tests.reference.adafactor import adafactor

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

ADAFACTOR = BY_NAME["adafactor"]

#: Around tiles of 8 rows, 16 or 32 columns and strips of 16 rows; wide and tall; kernels of convolutions; batches.
SHAPES = [
    (), (0,), (1,), (33,), (3, 0), (1, 1), (1, 40), (40, 1), (7, 31), (8, 32), (9, 33), (16, 8), (17, 129), (300, 3),
    (3, 300), (4, 3, 3, 3), (6, 5, 1, 1), (2, 3, 5, 5), (5, 17, 9), (2, 2, 1, 20),
]  # fmt: skip

if INTERPRETED:
    # at milliseconds a program
    SHAPES = [(), (0,), (33,), (1, 40), (17, 9), (9, 33), (2, 2, 3, 3), (3, 9, 5)]

ITS_VARIANTS = [variant for variant in VARIANTS if variant.case is ADAFACTOR and variant.is_formula]


def reference_arguments(optimizer: optimx.Adafactor) -> dict[str, Any]:
    """The group as the reference takes it."""
    group = {name: value for name, value in optimizer.param_groups[0].items() if name not in ("params", "foreach")}
    group.pop("state_dtype", None)
    return group


def flat(tensor: Tensor) -> list[float]:
    return tensor.detach().double().flatten().tolist()


# numbers


@each(ITS_VARIANTS, KERNELS)
def test_equals_the_paper(case: Case, kwargs: dict, device: torch.device) -> None:
    """In float64, beside loops over lists of floats."""
    params = make_params(SHAPES, device, torch.float64)
    begun = [flat(param) for param in params]
    ours = case.cls(params, **kwargs)
    gradients: list[list[list[float]]] = [[] for _ in params]
    for step in range(3):
        set_grads(params, step, scale=0.3)
        for history, param in zip(gradients, params, strict=True):
            history.append(flat(param.grad))
        ours.step()
    for param, theta, history in zip(params, begun, gradients, strict=True):
        if param.numel():
            expected = adafactor(theta, history, shape=param.shape, **reference_arguments(ours))
            assert flat(param) == pytest.approx(expected, rel=1e-10, abs=1e-12), tuple(param.shape)


# interpreted, torch's variant is beside stock's loop
@each(ITS_VARIANTS, [variant for variant in KERNELS if not variant.in_stock])
def test_the_loop_equals_the_kernels(case: Case, kwargs: dict, device: torch.device) -> None:
    ours, loop = (case.cls(make_params(SHAPES, device, torch.float64), **kwargs) for _ in range(2))
    for step in range(3):
        for optimizer in (ours, loop):
            set_grads(params_of(optimizer), step, scale=0.3)
        ours.step()
        for param in params_of(loop):
            # torch's own divides by the size of an empty tensor
            param.grad = param.grad if param.numel() else None
        AdafactorLoop.step(loop)
    for a, b in zip(params_of(ours), params_of(loop), strict=True):
        torch.testing.assert_close(a, b, **CLOSE[torch.float64])
        if b.numel():
            torch.testing.assert_close(ours.state[a], loop.state[b], **CLOSE[torch.float64])


@pytest.mark.parametrize("max_grad_norm", [None, 0.3, 1e4], ids=["plain", "clipped", "not_clipped"])
@pytest.mark.parametrize(
    # interpreted, float64 is beside the paper
    "dtype",
    [pytest.param(torch.float32, id="float32", marks=interpreted), pytest.param(torch.float64, id="float64")],
)
def test_shapes_beside_stock(dtype: torch.dtype, max_grad_norm: float | None, device: torch.device) -> None:
    ours, stock, copies = twins(ADAFACTOR, make_params(SHAPES, device, dtype), {}, max_grad_norm=max_grad_norm)
    for step in range(3):
        for optimizer in (ours, stock):
            set_grads(params_of(optimizer), step)
        if max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(copies, max_grad_norm)
        ours.step()
        stock.step()
        if max_grad_norm is not None:
            torch.testing.assert_close(ours.grad_norm, norm.to(ours.grad_norm.dtype), rtol=1e-5, atol=0.0)
    assert_same(ours, stock, CLOSE[torch.float32])


#: Of memory, and whether the kernels take it.
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "transposed": (lambda p: p.mT.contiguous().mT, True),
    "channels_last": (lambda p: p.to(memory_format=torch.channels_last), False),
    "reversed": (lambda p: p.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), False),
    "gaps": (lambda p: torch.stack([p, p], -1)[..., 0], False),
}


@interpreted
@pytest.mark.parametrize("kwargs", [{}, {"variant": "hf", "beta1": 0.9}], ids=["torch", "hf"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, kwargs: dict, device: torch.device) -> None:
    lay, by_kernels = LAYOUTS[layout]
    plain = make_params([(2, 3, 7, 9)], device)
    laid = [Parameter(lay(plain[0].detach().clone()))]
    a, b = optimx.Adafactor(laid, **kwargs), optimx.Adafactor(plain, **kwargs)
    train([a, b], 2)
    torch.testing.assert_close(laid[0], plain[0], **CLOSE[torch.float32])
    for name, value in b.state[plain[0]].items():
        torch.testing.assert_close(a.state[laid[0]][name], value, **CLOSE[torch.float32])
    (row,) = optimx.explain(a).rows
    assert (row.backend != "torch") == by_kernels
    if not by_kernels:
        assert row.reason in ("neither rows nor columns are contiguous", "parameter's memory has gaps or overlaps")


@pytest.mark.parametrize("shape", [(1100, 600), (3, 700, 400), (600_000,), (2, 600_000), (5, 40, 3, 3)], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_pieces(shape: tuple[int, ...], transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors go through the cache in pieces: by columns, rows, or matrices."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    lay = LAYOUTS["transposed"][0] if transposed and len(shape) > 1 else torch.clone
    optimizers = []
    for piece in (1 << 62, 1 << 16):
        monkeypatch.setattr("optimx._engine.cpu.factored.PIECE", piece)
        optimizer = optimx.Adafactor([Parameter(lay(value.clone()))], beta1=0.5)
        train([optimizer], 2)
        optimizers.append(optimizer)
    assert_same(*optimizers)


def test_small_gradients_are_clamped() -> None:
    """Below eps1, where an outer product of roots would not do."""
    ours, stock, _ = twins(ADAFACTOR, make_params([(40, 30), (60,)]), {"lr": 0.5, "eps": (1e-2, 1e-3)})
    for step in range(3):
        for optimizer in (ours, stock):
            set_grads(params_of(optimizer), step, scale=10.0 ** (-2 * step))
            optimizer.step()
    assert_same(ours, stock)


@interpreted
def test_rows_and_columns_without_gradients(device: torch.device) -> None:
    """Behind units that are off lie averages of 1e-30; the product of a row's and a column's is 0 in float32."""
    shape = (17, 33)
    plain, paper, loop = (make_params([shape], device) for _ in range(3))
    ours, theirs, one_by_one = (
        optimx.Adafactor(plain, variant="hf", lr=None),
        TransformersAdafactor(paper),
        optimx.Adafactor(loop, variant="hf", lr=None),
    )
    for step in range(2):
        for params in (plain, paper, loop):
            set_grads(params, step, scale=1e-3)
            params[0].grad[3] = params[0].grad[:, 5] = 0.0
        ours.step()
        theirs.step()
        AdafactorLoop.step(one_by_one)
    torch.testing.assert_close(plain, paper, **CLOSE[torch.float32])
    torch.testing.assert_close(loop, paper, **CLOSE[torch.float32])


@interpreted
@pytest.mark.parametrize("kwargs", [{}, {"variant": "hf"}], ids=["torch", "hf"])
def test_large_loss_scales(kwargs: dict, device: torch.device) -> None:
    """A scale grows as long as gradients are finite, and their squares are not any more."""
    plain, scaled = (optimx.Adafactor(make_params([(17, 33), (21,)], device), **kwargs) for _ in range(2))
    scale = 2.0**100
    for step in range(2):
        for optimizer in (plain, scaled):
            set_grads(params_of(optimizer), step)
        for param in params_of(scaled):
            param.grad *= scale
        scaled.grad_scale = torch.tensor(scale, device=device)
        scaled.found_inf = torch.tensor(0.0, device=device)
        plain.step()
        scaled.step()
    for a, b in zip(params_of(scaled), params_of(plain), strict=True):
        torch.testing.assert_close(a, b, **CLOSE[torch.float32])


@interpreted
@pytest.mark.parametrize("kwargs", [{}, {"variant": "hf"}], ids=["torch", "hf"])
def test_an_infinite_norm_clips_to_zero(kwargs: dict, device: torch.device) -> None:
    """As torch's clipping does: only what is infinite itself is lost."""
    bad, good = params = make_params([(5, 6), (17, 33)], device)
    optimizer = optimx.Adafactor(params, max_grad_norm=1.0, **kwargs)
    before = good.detach().clone()
    set_grads(params, 0)
    bad.grad[2, 3] = math.inf
    optimizer.step()
    assert not bad.isfinite().all()
    torch.testing.assert_close(good, before)


@interpreted
@pytest.mark.parametrize(
    "edit", [{"beta1": 0.9}, {"variant": "hf"}, {"scale_parameter": False}, {"relative_step": False}], ids=str
)
def test_groups_take_settings_between_steps(edit: dict, device: torch.device) -> None:
    """Also those that they do not have by default."""
    ours, fresh = (optimx.Adafactor(make_params([(9, 33), (21,)], device)) for _ in range(2))
    train([ours, fresh], 1)
    for optimizer in (ours, fresh):
        optimizer.param_groups[0].update(edit)
    fresh = copy.deepcopy(fresh)
    train([ours, fresh], 2, first=1)
    assert_same(ours, fresh)
    assert all(("exp_avg" in state) == ("beta1" in edit) for state in ours.state.values())


def test_nothing_of_a_parameters_size_is_allocated() -> None:
    (param,) = params = [Parameter(torch.randn(2048, 2048))]
    optimizer = optimx.Adafactor(params)
    for _ in range(2):
        param.grad = torch.randn_like(param)
        optimizer.step()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    allocated = [event.cpu_memory_usage for event in profile.events()]
    assert max(allocated) < 0.01 * param.numel() * 4
    # scratch memory that stays
    scratch = sum(memory.numel() for bucket in optimizer._engine.plans[0].buckets for memory in bucket._scratch)
    assert scratch < 0.13 * param.numel()


@interpreted
def test_kernels_write_their_tensors_and_nothing_else(device: torch.device) -> None:
    """Between tensors, and past the end of rows, lies what belongs to others."""
    shapes = [(9, 33), (4, 3, 3, 3), (21,), (2, 17, 40)]
    params, around = [], []
    for param in make_params(shapes, device):
        memory = torch.full((param.numel() + 64,), float("nan"), device=device)
        memory[32:-32] = param.detach().flatten()
        around.append(memory)
        params.append(Parameter(memory[32:-32].view(param.shape)))
    optimizer = optimx.Adafactor(params, beta1=0.9)
    train([optimizer], 1)
    states = []
    for param in params:
        for name, value in optimizer.state[param].items():
            if value.dim():
                memory = torch.full((value.numel() + 64,), float("nan"), device=device)
                memory[32:-32] = value.flatten()
                around.append(memory)
                states.append(memory)
                optimizer.state[param][name] = memory[32:-32].view(value.shape)
    train([optimizer], 1, first=1)
    twin = optimx.Adafactor(make_params(shapes, device), beta1=0.9)
    train([twin], 2)
    for a, b in zip(params, params_of(twin), strict=True):
        torch.testing.assert_close(a, b, **CLOSE[torch.float32])
    for memory in around:
        assert memory[:32].isnan().all()
        assert memory[-32:].isnan().all()
        assert memory[32:-32].isfinite().all()


def test_repeatable(triton_backend: torch.device) -> None:
    results = []
    for _ in range(2):
        optimizer = optimx.Adafactor(make_params(SHAPES, triton_backend), max_grad_norm=0.5)
        train([optimizer], 2)
        results.append(params_of(optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# dtypes


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_state_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """float32 averages of 16-bit parameters: as close to float64 as rounding the parameter once a step allows."""
    params = make_params([(20, 30), (50,), (4, 3, 3)], device, dtype)
    ours, stock, copies = twins(ADAFACTOR, params, {}, state_dtype=torch.float32)
    for step in range(4):
        set_grads(params, step)
        for param, twin in zip(params, copies, strict=True):
            twin.grad = param.grad.double()
        ours.step()
        stock.step()
        for param, twin in zip(params, copies, strict=True):
            torch.testing.assert_close(param.double(), twin, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
            twin.data.copy_(param.data)
    for param, twin in zip(params, copies, strict=True):
        for name, value in stock.state[twin].items():
            assert ours.state[param][name].dtype is torch.float32
            torch.testing.assert_close(ours.state[param][name].double(), value.double(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kwargs", [{"state_dtype": torch.float32}, {"variant": "hf", "lr": None}], ids=["torch", "hf"])
def test_float32_state_survives_a_checkpoint(kwargs: dict) -> None:
    """Torch casts loaded states to the parameter's dtype."""
    whole, resumed = (optimx.Adafactor(make_params([(5, 6), (7,)], dtype=torch.bfloat16), **kwargs) for _ in range(2))
    train([whole], 3)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for a, b in zip(params_of(whole), params_of(resumed), strict=True):
        b.data.copy_(a.data)
    train([whole, resumed], 2, first=3)
    for a, b in zip(params_of(whole), params_of(resumed), strict=True):
        assert torch.equal(a, b)
        assert all(value.dtype is torch.float32 for value in resumed.state[b].values())


# transformers


class TransformersAdafactor(torch.optim.Optimizer):
    """What transformers' class does, written from the paper; state and groups as it saves them."""

    def __init__(self, params, lr=None, eps=(1e-30, 1e-3), clip_threshold=1.0, decay_rate=-0.8, beta1=None,
                 weight_decay=0.0, scale_parameter=True, relative_step=True, warmup_init=False) -> None:  # fmt: skip
        super().__init__(params, {name: value for name, value in locals().items() if name in _HF_KEYS})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state, g = self.state[p], p.grad
                if not state:
                    state.update(step=0, RMS=0)
                    if g.dim() > 1:
                        state["exp_avg_sq_row"] = g.new_zeros(g.shape[:-1])
                        state["exp_avg_sq_col"] = g.new_zeros((*g.shape[:-2], g.shape[-1]))
                    else:
                        state["exp_avg_sq"] = torch.zeros_like(g)
                    if group["beta1"] is not None:
                        state["exp_avg"] = torch.zeros_like(g)
                state["step"] += 1
                t = state["step"]
                state["RMS"] = float(p.norm(2)) / math.sqrt(p.numel())
                size = group["lr"]
                if group["relative_step"]:
                    size = min(1e-6 * t if group["warmup_init"] else 1e-2, 1 / math.sqrt(t))
                if group["scale_parameter"]:
                    size *= max(group["eps"][1], state["RMS"])
                omega = t ** group["decay_rate"]
                square = g * g + group["eps"][0]
                if g.dim() > 1:
                    row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
                    row.lerp_(square.mean(-1), omega)
                    col.lerp_(square.mean(-2), omega)
                    scale = (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * col.rsqrt().unsqueeze(-2)
                else:
                    scale = state["exp_avg_sq"].lerp_(square, omega).rsqrt()
                update = g * scale
                update *= size / max(1.0, float(update.norm(2)) / math.sqrt(p.numel()) / group["clip_threshold"])
                if group["beta1"] is not None:
                    update = state["exp_avg"].lerp_(update, 1 - group["beta1"])
                p.mul_(1 - group["weight_decay"] * size).sub_(update)


_HF_KEYS = (
    "lr", "eps", "clip_threshold", "decay_rate", "beta1", "weight_decay", "scale_parameter", "relative_step",
    "warmup_init",
)  # fmt: skip

HF: dict[str, dict[str, Any]] = {
    "default": {},
    "moment": {"beta1": 0.9, "weight_decay": 0.1},
    "lr": {"lr": 0.05, "relative_step": False, "scale_parameter": False, "clip_threshold": 1.5, "decay_rate": -0.6},
    "warmup": {"warmup_init": True},
}


@pytest.mark.parametrize("kwargs", HF.values(), ids=HF)
def test_checkpoints_of_transformers(kwargs: dict) -> None:
    """Begun there, gone on with here; the groups' settings come with the checkpoint."""
    shapes = [(20, 30), (40,), (3, 5, 7), ()]
    theirs = TransformersAdafactor(make_params(shapes, dtype=torch.float64), **kwargs)
    train([theirs], 3)
    ours = optimx.Adafactor(make_params(shapes, dtype=torch.float64), variant="hf", lr=None)
    saved = theirs.state_dict()
    before = copy.deepcopy(saved)
    ours.load_state_dict(saved)
    assert str(saved) == str(before)
    for a, b in zip(params_of(ours), params_of(theirs), strict=True):
        a.data.copy_(b.data)
    train([ours, theirs], 3, first=3)
    for a, b in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    again = optimx.Adafactor(make_params(shapes, dtype=torch.float64), variant="hf", lr=None)
    again.load_state_dict(ours.state_dict())
    assert again.param_groups[0].keys() == ours.param_groups[0].keys()


def test_transformers_own_class() -> None:
    """The same numbers as the real one, where it is installed."""
    theirs_cls = pytest.importorskip("transformers.optimization").Adafactor
    for kwargs in HF.values():
        classes = (theirs_cls, TransformersAdafactor)
        real, written = (cls(make_params([(20, 30), (40,)]), **kwargs) for cls in classes)
        train([real, written], 4)
        for a, b in zip(params_of(real), params_of(written), strict=True):
            torch.testing.assert_close(a, b, **CLOSE[torch.float32])
        assert real.state_dict()["param_groups"][0].keys() >= {*_HF_KEYS}


def test_checkpoints_of_transformers_need_their_definition() -> None:
    theirs = TransformersAdafactor(make_params([(3, 4)]))
    train([theirs], 1)
    ours = optimx.Adafactor(make_params([(3, 4)]))
    with pytest.raises(ValueError, match="variant should be 'hf' to load transformers' checkpoints but is: 'torch'"):
        ours.load_state_dict(theirs.state_dict())
    assert not ours.state


def test_checkpoints_of_torch_go_on_by_either_definition() -> None:
    stock = torch.optim.Adafactor(make_params([(3, 4), (5,)]))
    train([stock], 2)
    ours = optimx.Adafactor(make_params([(3, 4), (5,)]), variant="hf", beta1=0.9)
    ours.load_state_dict(stock.state_dict())
    train([ours], 1)
    assert ours.param_groups[0]["variant"] == "hf"
    assert all("exp_avg" in state for state in ours.state.values())


def test_groups_are_torchs_unless_asked() -> None:
    """A group of torch's definition has torch's keys, so torch loads its checkpoints."""
    plain, stock = optimx.Adafactor(make_params([()])), torch.optim.Adafactor(make_params([()]))
    assert plain.param_groups[0].keys() == stock.param_groups[0].keys()
    assert optimx.Adafactor(make_params([()]), variant="hf").param_groups[0]["variant"] == "hf"


def test_added_groups_have_the_settings() -> None:
    optimizer = optimx.Adafactor(make_params([(3, 4)]), variant="hf", lr=None, beta1=0.9)
    optimizer.add_param_group({"params": make_params([(5,)]), "beta1": None})
    train([optimizer], 1)
    first, second = params_of(optimizer)
    assert "exp_avg" in optimizer.state[first]
    assert "exp_avg" not in optimizer.state[second]


# arguments


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "variant": ({"variant": "tf"}, "variant should be one of hf, torch but is: 'tf'"),
    "beta1": ({"beta1": 1.0}, "beta1 should be in \\[0, 1\\) but is: 1.0"),
    "two_names": ({"d": 1.5, "clip_threshold": 2.0}, "clip_threshold should be d \\(1.5\\), its other name"),
    "decay": ({"beta2_decay": -0.5, "decay_rate": -0.6}, "decay_rate should be beta2_decay \\(-0.5\\)"),
    "relative": ({"variant": "hf", "lr": 0.1, "relative_step": True}, "lr should be None with variant='hf'"),
    "no_lr": ({"lr": None, "relative_step": False}, "lr should be a number with relative_step=False but is: None"),
    "warmup": ({"relative_step": False, "warmup_init": True}, "warmup_init should be False"),
    "state_dtype": ({"state_dtype": torch.int32}, "state_dtype should be one of torch.float32"),
    "clip": ({"clip_threshold": 0.5}, "Clipping threshold d should be >= 1 but is: 0.5"),
}  # fmt: skip


@pytest.mark.parametrize(("kwargs", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimx.Adafactor(make_params([(3,)]), **kwargs)


@pytest.mark.parametrize(
    "setting", [{"clip_threshold": 2.0}, {"decay_rate": -0.5}, {"lr": None}, {"variant": "tf"}], ids=str
)
def test_bad_groups(setting: dict) -> None:
    """Names and values that only the constructor translates."""
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name} should be"):
        optimx.Adafactor([{"params": make_params([(3,)]), **setting}], variant="hf")


def test_complex_parameters_are_refused_as_in_torch() -> None:
    for kwargs in ({}, {"variant": "hf"}):
        params = make_params([(3,)], dtype=torch.complex64)
        set_grads(params, 0)
        with pytest.raises(RuntimeError, match="Adafactor does not support complex parameters"):
            optimx.Adafactor(params, **kwargs).step()


def test_step_sizes() -> None:
    """What transformers' schedule reports."""
    optimizer = optimx.Adafactor(make_params([(30, 20)]) + make_params([(4,)]), variant="hf", lr=None)
    train([optimizer], 200)
    (param, _) = params_of(optimizer)
    rms = float(param.detach().norm()) / math.sqrt(param.numel())
    assert optimizer.step_sizes() == pytest.approx([min(1e-2, 200**-0.5) * rms])
    absolute = optimx.Adafactor(make_params([(3,)]), lr=0.3, relative_step=False, scale_parameter=False)
    assert absolute.step_sizes() == [0.3]


def test_the_schedule_reports_step_sizes() -> None:
    optimizer = optimx.Adafactor(make_params([(30, 20)]), variant="hf", lr=None)
    schedule = optimx.lr_scheduler.AdafactorSchedule(optimizer, initial_lr=0.5)
    assert schedule.get_last_lr() == [0.5]
    train([optimizer], 3)
    schedule.step()
    assert schedule.get_last_lr() == optimizer.step_sizes()
    assert optimizer.param_groups[0]["lr"] == 1e-2
    resumed = optimx.lr_scheduler.AdafactorSchedule(optimizer)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.get_last_lr() == schedule.get_last_lr()
    with pytest.raises(TypeError, match=r"should be an optimx\.Adafactor but is: SGD"):
        optimx.lr_scheduler.AdafactorSchedule(optimx.SGD(make_params([()])))


def test_it_learns() -> None:
    """A regression, as fast as with torch's."""
    losses = []
    for cls, kwargs in ((torch.optim.Adafactor, {}), (optimx.Adafactor, {}), (optimx.Adafactor, {"variant": "hf"})):
        torch.manual_seed(random.Random(0).randrange(100))
        model = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
        x = torch.randn(200, 10)
        y = x[:, :1] * x[:, 1:2]
        optimizer = cls(model.parameters(), lr=0.05, **kwargs)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[2] < 0.5
