"""What only a GPU can show: no host synchronisation, CUDA graphs, streams, tensors past 2**31 elements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import optimx
from tests.cases import BY_NAME, CASES, CLOSE, HALF, Case, assert_same, loop, make_params, set_grads, twins
from tests.engine import params_of, usual

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def small_tiles() -> None:
    """None here: a GPU's own, also where the kernels are interpreted."""


def rows() -> list:
    """Every optimizer, and the kernel variants that have other states or a first step of their own."""
    more: dict[str, dict[str, dict[str, Any]]] = {
        "adam": {"amsgrad": {"amsgrad": True}},
        "sgd": {
            "plain": {"momentum": 0.0},
            "dampening": {"dampening": 0.5},
            "nesterov": {"nesterov": True},
        },
        "rmsprop": {"plain": {"momentum": 0.0}, "centered": {"centered": True}},
        "lamb": {"unadapted": {"weight_decay": 0.0}},
    }
    # with Lion's own, averages of 16-bit numbers cancel to 0 often, and the sign of what is left is anybody's
    default = {"lion": {"betas": (0.8765, 0.9876)}}
    return [
        pytest.param(
            case,
            {**usual(case, lr=0.01), **default.get(case.name, {}), **kwargs},
            id=f"{case.name}_{name}" if name else case.name,
        )
        for case in CASES
        for name, kwargs in {"": {}, **more.get(case.name, {})}.items()
    ]


each_row = pytest.mark.parametrize(("case", "kwargs"), rows())
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def two_groups(case: Case) -> Callable[[list[Tensor]], list[dict[str, Any]]]:
    return lambda params: [{"params": params[:4]}, {"params": params[4:], **usual(case, lr=0.05, weight_decay=0.3)}]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"fused": True},
        {"max_grad_norm": 1.0},
        {"normalize_grads": True},
        {"capturable": True},
        {"lr": "tensor"},
        {"lr": "tensor", "capturable": True},
    ],
    ids=str,
)
@each_row
def test_no_synchronisation(case: Case, kwargs: dict, more: dict) -> None:
    if not all(name in ("max_grad_norm", "capturable") or case.has(name) for name in more):
        pytest.skip("there is no such argument")
    kwargs = {**kwargs, **more}
    if kwargs["lr"] == "tensor":
        kwargs["lr"] = torch.tensor(0.1, device="cuda")
    params = make_params(device="cuda")
    optimizer = case.cls(two_groups(case)(params), **kwargs)
    scheduler = None if "lr" in more else torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.9**t)
    for step in range(6):
        set_grads(params, step)
        if step < 2:
            optimizer.step()
            continue
        with no_sync():
            optimizer.step()
            if scheduler:
                scheduler.step()


@each_row
def test_the_first_step_does_not_synchronise_either(case: Case, kwargs: dict) -> None:
    warm = make_params(device="cuda")
    optimizer = case.cls(warm, **kwargs, max_grad_norm=1.0)
    for step in range(2):
        set_grads(warm, step)
        optimizer.step()
    params = make_params(device="cuda")
    optimizer = case.cls(params, **kwargs, max_grad_norm=1.0)
    set_grads(params, 0)
    with no_sync():
        optimizer.step()


@pytest.mark.parametrize("clip", [1.0, optimx.AutoClip(50.0, 16), optimx.ZClip(warmup=2)], ids=lambda c: str(c)[:8])
@each_case
def test_rules_do_not_synchronise(case: Case, clip: Any) -> None:
    """All together, also in a step that is skipped, and in the one after it, which may hear of it."""
    params = make_params(device="cuda")
    optimizer = case.cls(
        two_groups(case)(params), **usual(case), skip_nonfinite=True, skip_spikes=optimx.Spikes(8), max_skips=3,
        max_grad_norm=clip,
    )  # fmt: skip
    for step in range(8):
        set_grads(params, step)
        if step == 4:
            params[3].grad.view(-1)[-1] = float("nan")
        if step == 6:
            params[3].grad.mul_(1e6)
        with no_sync() if step >= 2 else nullcontext():
            optimizer.step()
        assert bool(optimizer.step_was_skipped) == (step in (4, 6))
    assert {name: int(count) for name, count in optimizer.counters.items() if name != "clipped"} == {
        "steps": 8, "skipped": 2, "nonfinite": 1, "in_a_row": 0,
    }  # fmt: skip
    bad = optimx.last_bad(optimizer)
    assert (bad.step, bad.names) == (5, ("parameter 3 of group 0",))


def test_clip_grad_norm_does_not_synchronise() -> None:
    params = make_params(device="cuda")
    for step in range(3):
        set_grads(params, step)
        expected = torch.nn.utils.get_total_norm([p.grad for p in params])
        torch.cuda.synchronize()
        with no_sync():
            norm = optimx.clip_grad_norm_(params, 1.0)
        torch.testing.assert_close(norm, expected)
        torch.testing.assert_close(torch.nn.utils.get_total_norm([p.grad for p in params]).cpu(), torch.tensor(1.0))


def test_a_late_metric_is_not_waited_for() -> None:
    stop = optimx.EarlyStop(patience=1, late=True)
    metrics = torch.tensor([3.0, 2.0, 2.0], device="cuda")
    with no_sync():
        assert [stop(metric) for metric in metrics.unbind()] == [False] * 3
        assert stop.flush()
    assert (stop.best, stop.best_step) == (2, 1)


def test_noise_scale_does_not_synchronise() -> None:
    noise = optimx.NoiseScale(2, 2)
    param = Parameter(torch.zeros(1000, device="cuda"))
    param.grad = torch.ones_like(param)
    scale, norm = (torch.full((), number, device="cuda") for number in (2.0, 3.0))
    for step in range(3):
        # the first one compiles, and takes the averages to the device
        with no_sync() if step else nullcontext():
            noise.after_first_backward([param], scale)
            noise.update(norm)
            found = noise.scale
    assert found.is_cuda
    expected = optimx.noise_scale(1000.0, 9.0, 2, 4)
    torch.testing.assert_close(float(found), expected.variance / expected.squared_norm, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scaler_cls", [torch.amp.GradScaler, optimx.GradScaler], ids=["torch", "optimx"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@each_row
def test_amp_does_not_synchronise(case: Case, kwargs: dict, scaler_cls, max_grad_norm: float | None) -> None:
    params = make_params(device="cuda")
    if scaler_cls is torch.amp.GradScaler:
        # without it torch's scaler itself waits to see whether to call the step
        if not case.has("fused"):
            pytest.skip("torch's GradScaler waits")
        kwargs = {**kwargs, "fused": True}
    optimizer = case.cls(params, **kwargs, max_grad_norm=max_grad_norm)
    scaler = scaler_cls("cuda", init_scale=8.0)
    skipped = []
    for step in range(6):
        scaler.scale(torch.ones((), device="cuda"))
        set_grads(params, step, scale=8.0)
        if step == 4:
            params[3].grad[5] = float("inf")
        before = [p.detach().clone() for p in params]
        torch.cuda.synchronize()
        if step >= 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            scaler.step(optimizer)
            scaler.update()
            skipped.append(optimizer.step_was_skipped)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert (step == 4) == all(map(torch.equal, before, params))
    assert [bool(flag) for flag in skipped] == [False] * 4 + [True, False]
    if "step" in case.cls.rule.scalars:
        assert {float(optimizer.state[p]["step"]) for p in params} == {5.0}


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("max_grad_norm", [None, 1.0], ids=["plain", "clipping"])
@each_row
def test_real_tile_sizes(case: Case, kwargs: dict, dtype: torch.dtype, max_grad_norm: float | None) -> None:
    """Full chunks, in 128-bit accesses, and the tails around them; one tensor that begins off 16 bytes."""
    params = make_params([(8191,), (8192,), (8193,), (300, 77)], "cuda", dtype)
    storage = torch.randn(20_001, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    params.append(Parameter(storage[1:]))
    if dtype is torch.float16 and max_grad_norm and kwargs.get("centered"):
        pytest.skip("squares of clipped gradients vanish in float16; the root is of a negative number")
    # clipped gradients are small enough that their squares vanish in float16; then eps alone must not be the divisor
    kwargs = {**kwargs, **(usual(case, lr=0.01, eps=1e-3) if dtype is torch.float16 else {})}
    ours, stock, copies = twins(case, params, case.rounded(kwargs, dtype), max_grad_norm=max_grad_norm)
    for step in range(4):
        set_grads(params, step)
        for param, copy in zip(params, copies, strict=True):
            copy.grad = param.grad.to(copy.dtype, copy=True)
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(copies, max_grad_norm)
        ours.step()
        stock.step()
        for copy in copies if dtype in HALF else ():
            for tensor in (copy.data, *(v for k, v in stock.state[copy].items() if k not in case.cls.rule.scalars)):
                tensor.copy_(tensor.to(dtype))
    assert_same(ours, stock, tolerance(case, dtype))


def tolerance(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Of many elements."""
    if dtype in HALF:
        # some lie near 0, where an average rounded the other way is a visible part of the step
        return {**CLOSE[dtype], "atol": 1e-4}
    if dtype is torch.float64 and case.name == "nadam":
        # stock keeps mu_product in float32
        return CLOSE[torch.float32]
    if dtype is torch.float32 and case.name == "rmsprop":
        # its first steps are ten times lr: so are the roundings, where momentum cancels
        return {"rtol": 2e-6, "atol": 2e-6}
    return CLOSE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("adapt", [True, False], ids=["adapted", "unadapted"])
def test_lamb_norms_over_many_chunks(dtype: torch.dtype, adapt: bool) -> None:
    """Tensors of one chunk and of hundreds, whose norms differ by orders of magnitude, beside float64; repeatable."""
    shapes = [(1,), (8192,), (0,), (8193,), (300, 777), (3_000_017,), (5,), (1_048_576,)]
    scales = [1.0, 1e-3, 1.0, 100.0, 0.1, 3.0, 1e-2, 10.0]
    kwargs = {"lr": 0.01, "weight_decay": 0.1 if adapt else 0.0}
    runs = []
    for _ in range(2):
        params = make_params(shapes, "cuda", dtype)
        for param, scale in zip(params, scales, strict=True):
            param.data.mul_(scale)
        exact = [Parameter(param.detach().double()) for param in params]
        ours = optimx.LAMB(params, **kwargs)
        lamb = BY_NAME["lamb"]
        stock = loop(lamb, exact, **kwargs)
        for step in range(3):
            set_grads(params, step)
            for param, twin in zip(params, exact, strict=True):
                twin.grad = param.grad.double()
            ours.step()
            stock.step()
            for twin in exact:
                stored = (twin.data, stock.state[twin]["exp_avg"], stock.state[twin]["exp_avg_sq"])
                for tensor in stored:
                    tensor.copy_(tensor.to(dtype))
        for param, twin, scale in zip(params, exact, scales, strict=True):
            # of millions of elements some lie near 0, where what is left is the rounding of a step: of the tensor's
            # size, or 1
            atol = (scale if adapt else max(scale, 1.0)) * (1e-4 if dtype in HALF else 2e-6)
            torch.testing.assert_close(param.double(), twin.detach(), rtol=CLOSE[dtype]["rtol"], atol=atol)
        runs.append(params)
    assert all(map(torch.equal, *runs))


@each_row
def test_on_a_side_stream(case: Case, kwargs: dict) -> None:
    ours, stock, _ = twins(case, make_params([(100, 100)] * 8, "cuda"), kwargs)
    side = torch.cuda.Stream()
    for step in range(10):
        for optimizer in (ours, stock):
            set_grads(params_of(optimizer), step)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # what strays to another stream comes too early
            torch.cuda._sleep(1_000_000)
            ours.step()
        stock.step()
        torch.cuda.current_stream().wait_stream(side)
    assert_same(ours, stock, {"rtol": 1e-5, "atol": 2e-6})


@each_row
def test_steps_run_ahead_of_the_device(case: Case, kwargs: dict) -> None:
    """Hundreds of uploads in flight: none may overtake another."""
    ours, stock, _ = twins(case, make_params([(64,)] * 20, "cuda"), kwargs)
    for step in range(2):
        for optimizer in (ours, stock):
            set_grads(params_of(optimizer), step)
            optimizer.step()
    torch.cuda._sleep(200_000_000)
    for optimizer in (ours, stock):
        for i in range(300):
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + i)
            optimizer.step()
    assert_same(ours, stock, {"rtol": 1e-4, "atol": 1e-5})


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Lion", "LAMB"])
def test_more_than_2_to_the_31_elements(name: str) -> None:
    free, _ = torch.cuda.mem_get_info()
    numel = 2**31 + 1000
    if free < 5 * numel * 2 * 1.2:
        pytest.skip("needs 26 GB")
    param = Parameter(torch.ones(numel, device="cuda", dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    # LAMB's step is as long as the parameter times lr, whatever it is longer by before
    kwargs = {"weight_decay": 0.25} if name == "LAMB" else {"weight_decay": 0.0}
    optimizer = getattr(optimx, name)([param], lr=0.5, **kwargs)
    optimizer.step()
    for part in (param[:10], param[2**31 - 5 : 2**31 + 5], param[-10:]):
        torch.testing.assert_close(part.float(), torch.full((10,), 0.5, device="cuda"))


@pytest.mark.parametrize("capturable", [False, True], ids=["plain", "capturable"])
@each_row
def test_checkpoint_after_amp_has_counts_where_torch_has_them(case: Case, kwargs: dict, capturable: bool) -> None:
    params = make_params(device="cuda")
    optimizer = case.cls(params, **kwargs, capturable=capturable)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0)
    for step in range(3):
        scaler.scale(torch.ones((), device="cuda"))
        set_grads(params, step, scale=2.0)
        scaler.step(optimizer)
        scaler.update()
    saved = deepcopy(optimizer.state_dict())
    counts = [state[name] for state in saved["state"].values() for name in case.cls.rule.scalars]
    on_device = capturable or case.cls.rule.scalars_on_device
    assert {count.device.type for count in counts} <= {"cuda" if on_device else "cpu"}
    if "step" in case.cls.rule.scalars:
        assert {float(state["step"]) for state in saved["state"].values()} == {3.0}
    scaler.scale(torch.ones((), device="cuda"))
    set_grads(params, 3, scale=2.0)
    scaler.step(optimizer)
    if "step" in case.cls.rule.scalars:
        assert {float(optimizer.state[p]["step"]) for p in params} == {4.0}
