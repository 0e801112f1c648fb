"""Loops with a GradScaler, torch's and ours, beside stock's fused step (or its loop) with torch's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import optimx
from optimx._backend import interpreted
from tests.cases import CASES, CLOSE, Case, assert_same, make_params, set_grads, twins

pytestmark = [pytest.mark.interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

INF, NAN = float("inf"), float("nan")
VARIANTS = [pytest.param(c, kw, id=f"{c.name}-{name}") for c in CASES for name, kw in c.variants.items()]
SHAPES = [(), (0,), (129,), (3, 5, 7)]
SCALE = 2.0**10

each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
each_scaler = pytest.mark.parametrize(
    "scaler_cls", [torch.amp.GradScaler, optimx.GradScaler], ids=["torchs_scaler", "our_scaler"]
)
each_fused = pytest.mark.parametrize("fused", [None, True], ids=["default", "fused"])

#: The norm is a float32 sum in another order.
NORM = {"rtol": 1e-5, "atol": 0.0}


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def copies(params: Sequence[Tensor]) -> list[Parameter]:
    return [Parameter(p.detach().clone()) for p in params]


def turn(params: Sequence[Tensor]) -> None:
    """Give complex gradients an imaginary part."""
    for param in params:
        if param.is_complex():
            param.grad = param.grad * (1 - 2j)


def backward(
    scaler: torch.amp.GradScaler,
    optimizer: torch.optim.Optimizer,
    step: int,
    bad: tuple[int, float] | None = None,
    scale: float = 1.0,
    skip: Sequence[int] = (),
) -> None:
    """Backward of a loss whose gradients are those of `set_grads`, times the loss scale; then spoil one.

    Args:
        bad: Index of a parameter, and what to write into its gradient's last element.
    """
    params = params_of(optimizer)
    set_grads(params, step, scale, skip)
    turn(params)
    pairs = [(p, p.grad) for p in params if p.grad is not None]
    optimizer.zero_grad()
    loss = sum((p * grad.conj()).real.float().sum() for p, grad in pairs)
    scaler.scale(loss).backward()
    if bad is not None:
        params[bad[0]].grad.view(-1)[-1] = bad[1]


def amp_step(
    scaler: torch.amp.GradScaler,
    optimizer: torch.optim.Optimizer,
    step: int,
    bad: tuple[int, float] | None = None,
    clip: float | None = None,
    clip_: Callable = clip_grad_norm_,
    **kwargs: Any,
) -> Tensor | None:
    """One turn of the loop in torch's documentation; the norm if it is asked to clip."""
    backward(scaler, optimizer, step, bad, **kwargs)
    norm = None
    if clip is not None:
        scaler.unscale_(optimizer)
        norm = clip_(params_of(optimizer), clip)
    scaler.step(optimizer)
    scaler.update()
    return norm


def new_scaler(cls: type[torch.amp.GradScaler], device: torch.device, **kwargs: Any) -> torch.amp.GradScaler:
    return cls(device.type, **{"init_scale": SCALE, "growth_interval": 2, **kwargs})


def snapshot(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    params = params_of(optimizer)
    return [t.detach().clone() for p in params for t in (p, *optimizer.state.get(p, {}).values())]


def assert_equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    assert len(a) == len(b)
    assert all(map(torch.equal, a, b))


#: Steps 1 and 4 are skipped; the scale grows in between.
BAD_STEPS = [None, (2, -INF), None, None, (3, NAN), None]


@each_fused
@each_scaler
@each_case
def test_equals_stock(case: Case, scaler_cls: type, fused: bool | None, device: torch.device) -> None:
    params = make_params(SHAPES, device=device)
    stock = case.stock(copies(params), lr=0.01, weight_decay=0.1, fused=True)
    ours = case.cls(params, lr=0.01, weight_decay=0.1, fused=fused)
    scaler, torchs = new_scaler(scaler_cls, device), new_scaler(torch.amp.GradScaler, device)
    scales = []
    for step, bad in enumerate(BAD_STEPS):
        for optimizer, loss_scaler in ((ours, scaler), (stock, torchs)):
            optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
            amp_step(loss_scaler, optimizer, step, bad)
        assert scaler.get_scale() == torchs.get_scale()
        assert bool(ours.step_was_skipped) == (bad is not None)
        scales.append(scaler.get_scale())
        assert_same(ours, stock)
    assert scales == [SCALE, SCALE / 2, SCALE / 2, SCALE, SCALE / 2, SCALE / 2]
    assert scaler.state_dict() == torchs.state_dict()
    assert ours.grad_norm is None
    assert not hasattr(ours, "grad_scale")
    assert not hasattr(ours, "found_inf")


@pytest.mark.parametrize(("case", "kwargs"), VARIANTS)
def test_variants(case: Case, kwargs: dict, device: torch.device) -> None:
    """Where only the device knows the step counts, it also computes what depends on them."""
    ours, stock, _ = twins(case, make_params([(), (129,)], device=device), kwargs)
    scaler, torchs = new_scaler(optimx.GradScaler, device), new_scaler(torch.amp.GradScaler, device)
    for step, bad in enumerate([None, (1, INF), None]):
        amp_step(scaler, ours, step, bad)
        amp_step(torchs, stock, step, bad)
    assert_same(ours, stock)


@each_scaler
@each_case
def test_clipping_inside_the_step(case: Case, scaler_cls: type, device: torch.device) -> None:
    """Norm and limit are of the unscaled gradients, as after unscale_."""
    params = make_params(SHAPES, device=device)
    stock = case.stock(copies(params), lr=0.01, fused=True)
    ours = case.cls(params, lr=0.01, max_grad_norm=2.0)
    scaler, torchs = new_scaler(scaler_cls, device), new_scaler(torch.amp.GradScaler, device)
    clipped = []
    for step, (bad, scale) in enumerate(zip(BAD_STEPS, [1.0, 1.0, 1e-3, 100.0, 1.0, 1.0], strict=True)):
        amp_step(scaler, ours, step, bad, scale=scale)
        norm = amp_step(torchs, stock, step, bad, clip=2.0, scale=scale)
        assert ours.grad_norm.shape == ()
        torch.testing.assert_close(ours.grad_norm, norm, **NORM, equal_nan=True)
        assert_same(ours, stock)
        clipped.append(ours.grad_norm.item() > 2.0)
    assert clipped == [True, True, False, True, False, True]  # NaN is not greater


@each_scaler
@each_case
def test_unscale_and_clip_by_hand(case: Case, scaler_cls: type, device: torch.device) -> None:
    params = make_params(SHAPES, device=device)
    stock = case.stock(copies(params), lr=0.01, fused=True)
    ours = case.cls(params, lr=0.01)
    scaler, torchs = new_scaler(scaler_cls, device), new_scaler(torch.amp.GradScaler, device)
    for step, bad in enumerate(BAD_STEPS):
        amp_step(scaler, ours, step, bad, clip=2.0, clip_=optimx.clip_grad_norm_)
        amp_step(torchs, stock, step, bad, clip=2.0)
        assert bool(ours.step_was_skipped) == (bad is not None)
        assert scaler.get_scale() == torchs.get_scale()
        assert_same(ours, stock)


@each_scaler
@each_case
def test_unscale_by_hand_and_clip_inside(case: Case, scaler_cls: type, device: torch.device) -> None:
    """What unscale_ has unscaled must not be unscaled again."""
    params = make_params(SHAPES, device=device)
    stock = case.stock(copies(params), lr=0.01, fused=True)
    ours = case.cls(params, lr=0.01, max_grad_norm=2.0)
    scaler, torchs = new_scaler(scaler_cls, device), new_scaler(torch.amp.GradScaler, device)
    for step, bad in enumerate(BAD_STEPS):
        amp_step(scaler, ours, step, bad, clip=INF)
        amp_step(torchs, stock, step, bad, clip=2.0)
        assert_same(ours, stock)


@pytest.mark.parametrize("value", [INF, NAN])
@pytest.mark.parametrize("index", range(3), ids=["scalar", "several_chunks", "bf16"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0], ids=["plain", "clipping"])
@each_scaler
def test_skipped_step_changes_nothing(
    scaler_cls: type, max_grad_norm: float | None, index: int, value: float, device: torch.device
) -> None:
    """Bitwise: parameters, states and step counts."""
    params = make_params([(), (300,)], device=device)
    params += make_params([(70,)], device=device, dtype=torch.bfloat16)
    optimizer = optimx.AdamW(params, lr=0.01, amsgrad=True, max_grad_norm=max_grad_norm)
    scaler = new_scaler(scaler_cls, device)
    amp_step(scaler, optimizer, 0)
    assert not optimizer.step_was_skipped
    before, scale = snapshot(optimizer), scaler.get_scale()
    amp_step(scaler, optimizer, 1, (index, value))
    assert_equal(snapshot(optimizer), before)
    assert optimizer.step_was_skipped
    assert optimizer.step_was_skipped.dtype is torch.bool
    assert scaler.get_scale() == scale / 2
    amp_step(scaler, optimizer, 2)
    assert not optimizer.step_was_skipped
    assert all(optimizer.state[p]["step"] == 2 for p in params)
    assert not any(map(torch.equal, snapshot(optimizer), before))


@each_fused
@each_scaler
@each_case
def test_first_step_skipped(case: Case, scaler_cls: type, fused: bool | None, device: torch.device) -> None:
    params = make_params(SHAPES, device=device)
    stock = case.stock(copies(params), lr=0.01, fused=True)
    ours = case.cls(params, lr=0.01, fused=fused)
    scaler, torchs = new_scaler(scaler_cls, device), new_scaler(torch.amp.GradScaler, device)
    before = [p.detach().clone() for p in params]
    for step in range(2):
        amp_step(scaler, ours, step, (2, INF))
        amp_step(torchs, stock, step, (2, INF))
        assert_equal(params, before)
        for param in params:
            assert all(not state.any() for state in ours.state[param].values()), "moments and counts stay zero"
    for step in range(2, 4):
        amp_step(scaler, ours, step)
        amp_step(torchs, stock, step)
    assert_same(ours, stock)


@pytest.mark.parametrize(
    "duplicate",
    [lambda o: o, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))],
    ids=["same", "deepcopy", "pickle"],
)
@each_case
def test_steps_with_and_without_scaler(case: Case, duplicate: Callable, device: torch.device) -> None:
    """Nothing of the scaler's stays behind, nor is a count lost between device and host."""
    params = make_params([(5,), (129,)], device=device)
    ours, stock = case.cls(params, lr=0.01), case.stock(copies(params), lr=0.01, fused=True)
    scaler, torchs = new_scaler(optimx.GradScaler, device), new_scaler(torch.amp.GradScaler, device)

    def plain_step(step: int) -> None:
        for optimizer in (ours, stock):
            set_grads(params_of(optimizer), step)
            optimizer.step()

    plain_step(0)
    for step, bad in ((1, None), (2, (0, INF))):
        amp_step(scaler, ours, step, bad)
        amp_step(torchs, stock, step, bad)
    ours = duplicate(ours)
    plain_step(3)
    assert not ours.step_was_skipped
    assert_same(ours, stock)
    assert all(ours.state[p]["step"] == 3 for p in params_of(ours))


@each_scaler
def test_no_gradients_at_all(scaler_cls: type, device: torch.device) -> None:
    params = make_params([(5,)], device=device)
    optimizer = optimx.AdamW(params, max_grad_norm=1.0)
    scaler = new_scaler(scaler_cls, device)
    scaler.scale(torch.zeros((), device=device))  # the scale is made at its first use
    before = snapshot(optimizer)
    scaler.step(optimizer)
    assert_equal(snapshot(optimizer), before)
    assert not optimizer.step_was_skipped


@pytest.mark.parametrize("bad", [None, (1, INF)], ids=["good", "bad"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e6], ids=["plain", "clipped", "not_clipped"])
def test_gradients_are_left_alone(
    max_grad_norm: float | None, bad: tuple[int, float] | None, device: torch.device
) -> None:
    """Our scaler has them unscaled in registers. Torch's writes them, if only times 1."""
    params = make_params([(), (300,), (3, 5, 7)], device=device)
    params += make_params([(5,)], device=device, dtype=torch.complex64)
    params += make_params([(70,)], device=device, dtype=torch.float16)
    optimizer = optimx.AdamW(params, max_grad_norm=max_grad_norm)
    scaler = new_scaler(optimx.GradScaler, device)
    for step in range(2):
        backward(scaler, optimizer, step, bad)
        grads = [p.grad for p in params]
        before = [(grad.clone(), grad._version) for grad in grads]
        scaler.step(optimizer)
        scaler.update()
        assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))
        for grad, (values, version) in zip(grads, before, strict=True):
            assert torch.equal(grad, values)
            assert grad._version == version


@each_scaler
@pytest.mark.parametrize("max_grad_norm", [None, 1e-8, 1.0], ids=["plain", "clipped", "not_clipped"])
def test_gradients_that_float16_holds_only_scaled(
    max_grad_norm: float | None, scaler_cls: type, device: torch.device
) -> None:
    """Around 1e-9, below float16's smallest number: unscaled in float32, they still move the parameters."""
    size, scale = 2.0**-30, 2.0**14
    params = make_params([(), (129,), (5, 7)], device=device, dtype=torch.float16)
    exact = [Parameter(p.detach().double()) for p in params]
    ours = optimx.AdamW(params, lr=0.5, eps=size / 1000, max_grad_norm=max_grad_norm)
    stock = torch.optim.AdamW(exact, lr=0.5, eps=size / 1000, foreach=False)
    scaler = new_scaler(scaler_cls, device, init_scale=scale)
    scaler.scale(torch.zeros((), device=device))  # the scale is made at its first use
    set_grads(exact, 0)
    for param, twin in zip(params, exact, strict=True):
        param.grad = (twin.grad * size * scale).half()
        assert param.grad.all()
        twin.grad = param.grad.double() / scale
    norm = clip_grad_norm_(exact, max_grad_norm or INF)
    before = [p.detach().clone() for p in params]
    scaler.step(ours)
    stock.step()
    for param, twin, old in zip(params, exact, before, strict=True):
        torch.testing.assert_close(param.double(), twin, **CLOSE[torch.float16])
        assert not (param == old).any()
    if max_grad_norm is not None:
        torch.testing.assert_close(ours.grad_norm.double(), norm, **NORM)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0], ids=["plain", "clipping"])
@each_scaler
def test_large_finite_gradients_are_no_reason_to_skip(
    scaler_cls: type, max_grad_norm: float | None, device: torch.device
) -> None:
    """The sum of their squares is beyond float32 while they are scaled; also of those that torch's own step updates."""
    params = make_params([(3,), (129,), (5, 14)], device=device)
    params[2] = Parameter(params[2].detach()[:, ::2])
    ours = optimx.AdamW(params, lr=0.01, max_grad_norm=max_grad_norm)
    stock = torch.optim.AdamW(copies(params), lr=0.01, fused=True)
    scaler, torchs = new_scaler(scaler_cls, device), new_scaler(torch.amp.GradScaler, device)
    for step in range(2):
        amp_step(scaler, ours, step, scale=1e17)
        amp_step(torchs, stock, step, scale=1e17, clip=max_grad_norm)
        assert not ours.step_was_skipped
        assert scaler.get_scale() == torchs.get_scale()
    assert_same(ours, stock)


@each_scaler
@each_case
def test_parameters_without_gradient_keep_their_count(case: Case, scaler_cls: type, device: torch.device) -> None:
    params = make_params(SHAPES, device=device)
    stock = case.stock(copies(params), lr=0.01, fused=True)
    ours = case.cls([{"params": params[:2]}, {"params": params[2:]}], lr=0.01)
    scaler, torchs = new_scaler(scaler_cls, device), new_scaler(torch.amp.GradScaler, device)
    turns = [(None, (0,)), ((2, INF), (0, 3)), (None, ()), ((3, NAN), (2,)), (None, (2,))]
    for step, (bad, skip) in enumerate(turns):
        amp_step(scaler, ours, step, bad, skip=skip)
        amp_step(torchs, stock, step, bad, skip=skip)
    assert_same(ours, stock)
    assert [ours.state[p]["step"].item() for p in params] == [2, 3, 2, 3]


@pytest.mark.parametrize("max_grad_norm", [None, 1.0], ids=["plain", "clipping"])
@each_scaler
def test_mixed_dtypes(scaler_cls: type, max_grad_norm: float | None, device: torch.device) -> None:
    """One bad gradient, and all dtypes skip; a good step moves all."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    params = [p for dtype in dtypes for p in make_params([(5,), (200,)], device=device, dtype=dtype)]
    optimizer = optimx.AdamW(params, lr=0.5, max_grad_norm=max_grad_norm)
    scaler = new_scaler(scaler_cls, device)
    for step in range(4):
        before = snapshot(optimizer)
        amp_step(scaler, optimizer, 2 * step, (2 * step + 1, NAN))
        assert optimizer.step_was_skipped
        # the first creates state
        assert_equal(snapshot(optimizer) if step else params, before if step else [p.detach() for p in params])
        before = copies(params)
        amp_step(scaler, optimizer, 2 * step + 1)
        assert not any(map(torch.equal, params, before))
        assert all(optimizer.state[p]["step"] == step + 1 for p in params)


#: Parameters of which some or all go to torch's own step (the last: its memory has gaps); whether the step then takes
#: the scale itself.
MIXTURES: dict[str, tuple[Callable[[list[Tensor]], list[dict]], bool]] = {
    "gaps": (lambda p: [{"params": p}], True),
    "foreach_group": (lambda p: [{"params": p[:2]}, {"params": p[2:], "foreach": True}], False),
    "loop_group": (lambda p: [{"params": p[:2], "foreach": False, "lr": 0.05}, {"params": p[2:]}], False),
    "not_fused_group": (lambda p: [{"params": p[:2], "fused": False}, {"params": p[2:]}], False),
    "all_foreach": (lambda p: [{"params": p, "foreach": True}], False),
}


@pytest.mark.parametrize("max_grad_norm", [None, 2.0], ids=["plain", "clipping"])
@pytest.mark.parametrize("mixture", MIXTURES)
@each_scaler
def test_with_parameters_on_torchs_step(
    scaler_cls: type, mixture: str, max_grad_norm: float | None, device: torch.device
) -> None:
    params = make_params([(3,), (130,), (5, 14)], device=device)
    params[2] = Parameter(params[2].detach()[:, ::2])
    groups, takes_scale = MIXTURES[mixture]
    ours = optimx.AdamW(groups(params), lr=0.01, max_grad_norm=max_grad_norm)
    assert ours._step_supports_amp_scaling is takes_scale
    stock = torch.optim.AdamW(groups(copies(params)), lr=0.01)
    scaler, torchs = new_scaler(scaler_cls, device), new_scaler(torch.amp.GradScaler, device)
    for step, bad in enumerate([None, (1, INF), None, (2, NAN), None]):
        before = snapshot(ours)
        amp_step(scaler, ours, step, bad)
        amp_step(torchs, stock, step, bad, clip=max_grad_norm)
        if bad is not None:
            assert_equal(snapshot(ours), before)
        if takes_scale:
            assert bool(ours.step_was_skipped) == (bad is not None)
        assert scaler.get_scale() == torchs.get_scale()
    assert_same(ours, stock)


@pytest.mark.parametrize("max_grad_norm", [None, 2.0], ids=["plain", "clipping"])
@each_case
def test_complex_parameters(case: Case, max_grad_norm: float | None, device: torch.device) -> None:
    """Torch's scaler has no kernel for them. Equal to a loop without a scaler that leaves out the bad steps."""
    params = make_params([(130,)], device=device) + make_params([(4,)], device=device, dtype=torch.complex64)
    ours = case.cls(params, lr=0.01, max_grad_norm=max_grad_norm)
    stock = case.stock(copies(params), lr=0.01, foreach=False)
    scaler = new_scaler(optimx.GradScaler, device)
    for step, bad in enumerate([None, (0, INF), None, (1, NAN), None]):
        before = snapshot(ours)
        amp_step(scaler, ours, step, bad)
        if bad is not None:
            assert_equal(snapshot(ours), before)
            continue
        set_grads(params_of(stock), step)
        turn(params_of(stock))
        norm = clip_grad_norm_(params_of(stock), max_grad_norm or INF)
        stock.step()
        if max_grad_norm is not None:
            torch.testing.assert_close(ours.grad_norm, norm, **NORM)
    assert scaler.get_scale() == SCALE / 4
    assert_same(ours, stock, CLOSE[torch.float32])


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, True),
        ({"fused": True}, True),
        ({"foreach": None, "fused": None}, True),
        ({"foreach": True}, False),
        ({"foreach": False}, False),
        ({"fused": False}, False),
        ({"differentiable": True}, False),
    ],
    ids=str,
)
@each_case
def test_who_takes_the_scale(case: Case, kwargs: dict, expected: bool) -> None:
    """Where torch's implementation was asked for, the scaler unscales and decides, as for stock."""
    optimizer = case.cls(make_params([(3,)]), **kwargs)
    for one in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert one._step_supports_amp_scaling is expected


def test_group_added_for_torchs_step(device: torch.device) -> None:
    """Later than the optimizer said that it takes the scale itself."""
    params = make_params([(130,), (5, 7)], device=device)
    ours = optimx.AdamW(params[:1], lr=0.01, max_grad_norm=2.0)
    stock = torch.optim.AdamW(copies(params), lr=0.01, foreach=False)
    ours.add_param_group({"params": params[1:], "foreach": True})
    scaler, torchs = (new_scaler(cls, device) for cls in (optimx.GradScaler, torch.amp.GradScaler))
    for step, bad in enumerate([None, (1, INF), (0, NAN), None]):
        amp_step(scaler, ours, step, bad)
        amp_step(torchs, stock, step, bad, clip=2.0)
    assert_same(ours, stock)


@pytest.mark.parametrize("kwargs", [{"momentum": 0.9}, {"momentum": 0.9, "fused": True}], ids=["default", "fused"])
def test_our_scaler_drives_torchs_optimizers(kwargs: dict, device: torch.device) -> None:
    params = make_params(SHAPES, device=device)
    optimizers = [torch.optim.SGD(p, lr=0.1, **kwargs) for p in (params, copies(params))]
    scalers = [new_scaler(cls, device) for cls in (optimx.GradScaler, torch.amp.GradScaler)]
    for step, bad in enumerate(BAD_STEPS):
        for scaler, optimizer in zip(scalers, optimizers, strict=True):
            amp_step(scaler, optimizer, step, bad)
    assert_same(*optimizers, {"rtol": 0.0, "atol": 0.0})
    assert scalers[0].state_dict() == scalers[1].state_dict()


@each_scaler
def test_two_optimizers_on_one_scaler(scaler_cls: type, device: torch.device) -> None:
    """Each skips for its own gradients; the scale shrinks for either's."""
    params = make_params([(5,), (129,)], device=device)
    ours, sgd = optimx.AdamW(params[:1]), torch.optim.SGD(params[1:], lr=0.1)
    other = optimx.Adam(make_params([(7,)], device=device))
    scaler = new_scaler(scaler_cls, device)
    for step, spoilt in enumerate([None, ours, sgd, other]):
        optimizers = [ours, sgd, other]
        before, scale = [*map(snapshot, optimizers)], scaler._scale and scaler.get_scale()
        for optimizer in optimizers:
            backward(scaler, optimizer, step, (0, INF) if optimizer is spoilt else None)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for optimizer, old in zip(optimizers, before, strict=True):
            moved = not torch.equal(params_of(optimizer)[0], old[0])
            assert moved is (optimizer is not spoilt)
        if spoilt is not None:
            assert scaler.get_scale() == scale / 2
    assert [optimizer.state[params_of(optimizer)[0]]["step"].item() for optimizer in (ours, other)] == [3, 3]


@each_scaler
@each_case
def test_disabled(case: Case, scaler_cls: type, device: torch.device) -> None:
    params = make_params(SHAPES, device=device)
    ours, stock = case.cls(params, max_grad_norm=2.0), case.stock(copies(params))
    scaler = scaler_cls(device.type, enabled=False)
    for step in range(3):
        for optimizer in (ours, stock):
            backward(scaler, optimizer, step)
            scaler.unscale_(optimizer)
            if optimizer is stock:
                norm = clip_grad_norm_(params_of(stock), 2.0)
            scaler.step(optimizer)
            scaler.update()
        torch.testing.assert_close(ours.grad_norm, norm, **NORM)
    assert scaler.get_scale() == 1.0
    assert_same(ours, stock)


@each_scaler
def test_protocol_errors_are_torchs(scaler_cls: type, device: torch.device) -> None:
    params = make_params([(5,)], device=device)
    optimizer = optimx.AdamW(params)
    scaler = new_scaler(scaler_cls, device)
    with pytest.raises(AssertionError, match="_scale is None"):
        scaler.step(optimizer)
    backward(scaler, optimizer, 0)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: None)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step"):
        scaler.unscale_(optimizer)
    scaler.update()
    amp_step(scaler, optimizer, 1)
    assert optimizer.state[params[0]]["step"] == 2


def test_scaler_checkpoints_are_torchs(device: torch.device) -> None:
    params = make_params([(5,)], device=device)
    optimizer = optimx.AdamW(params)
    scaler = new_scaler(optimx.GradScaler, device, growth_interval=3)
    for step, bad in enumerate([(0, INF), None, None]):
        amp_step(scaler, optimizer, step, bad)
    torchs = torch.amp.GradScaler(device.type)
    torchs.load_state_dict(scaler.state_dict())
    again = optimx.GradScaler(device.type)
    again.load_state_dict(torchs.state_dict())
    assert isinstance(again, torch.amp.GradScaler)
    for one in (scaler, again, torchs):
        amp_step(one, optimizer, 3)
        assert one.get_scale() == SCALE  # halved, and grown after three good steps


@pytest.mark.parametrize("fused", [None, True], ids=["default", "fused"])
@pytest.mark.parametrize("direction", ["to_stock", "from_stock"])
@each_case
def test_checkpoint_after_scaled_steps(case: Case, direction: str, fused: bool | None, device: torch.device) -> None:
    """Skipped steps included, a checkpoint moves both ways and the training goes on equal."""
    params = make_params(SHAPES, device=device)
    ours, stock = case.cls(params, lr=0.01, fused=fused), case.stock(copies(params), lr=0.01, fused=fused)
    source, other = (ours, stock) if direction == "to_stock" else (stock, ours)
    scaler = new_scaler(optimx.GradScaler, device)
    for step, bad in enumerate([(2, INF), None, (3, NAN), None]):
        amp_step(scaler, source, step, bad)
    checkpoint = source.state_dict()
    if direction == "to_stock" and fused is None:
        # where a stock optimizer with these arguments has its step counts
        assert all(state["step"].device.type == "cpu" for state in checkpoint["state"].values())
    other.load_state_dict(copy.deepcopy(checkpoint))
    for p, q in zip(params_of(other), params_of(source), strict=True):
        p.data.copy_(q.data)
    assert_same(ours, stock, {"rtol": 0.0, "atol": 0.0})
    scalers = scaler, new_scaler(torch.amp.GradScaler, device, init_scale=scaler.get_scale())
    for step, bad in enumerate([None, (2, INF), None], start=4):
        for loss_scaler, optimizer in zip(scalers, (source, other), strict=True):
            amp_step(loss_scaler, optimizer, step, bad)
    for optimizer in (ours, stock):
        set_grads(params_of(optimizer), 9)
        optimizer.step()
    assert_same(ours, stock)
    assert all(ours.state[p]["step"] == 5 for p in params)


@each_scaler
def test_many_tensors_in_several_pieces(scaler_cls: type, device: torch.device) -> None:
    big, count = (300, 20) if interpreted() else (70_001, 120)
    shapes = [(big,), (3, big // 3 + 1), *[(i * 37 % 130,) for i in range(count)]]
    params = make_params(shapes, device=device)
    params[1] = Parameter(params[1].detach().t())
    ours = optimx.AdamW(params, lr=0.01, max_grad_norm=1.0)
    stock = torch.optim.AdamW(copies(params), lr=0.01, fused=True)
    scaler, torchs = new_scaler(scaler_cls, device), new_scaler(torch.amp.GradScaler, device)
    for step, bad in enumerate([None, (len(params) - 1, NAN), None]):
        amp_step(scaler, ours, step, bad)
        amp_step(torchs, stock, step, bad, clip=1.0)
    assert_same(ours, stock)


def test_scale_of_the_users(device: torch.device) -> None:
    """Torch multiplies an optimizer.grad_scale that is there already with its own."""
    params = make_params([(5,), (129,)], device=device)
    ours, stock = optimx.AdamW(params, eps=0.1), torch.optim.AdamW(copies(params), eps=0.1, fused=True)
    for optimizer, cls in ((ours, optimx.GradScaler), (stock, torch.amp.GradScaler)):
        scaler = new_scaler(cls, device)
        for step in range(2):
            optimizer.grad_scale = torch.tensor(8.0, device=device)
            amp_step(scaler, optimizer, step)
    assert_same(ours, stock)
