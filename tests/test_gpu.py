"""What only a GPU can show: no host synchronisation, CUDA graphs, streams, tensors past 2**31 elements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch

import optimx
from tests.cases import CASES, CLOSE, HALF, Case, assert_same, make_params, set_grads, twins

pytestmark = pytest.mark.gpu

by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@by_case
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"fused": True},
        {"max_grad_norm": 1.0},
        {"amsgrad": True},
        {"lr": "tensor"},
        {"lr": "tensor", "capturable": True},
    ],
    ids=str,
)
def test_no_synchronisation(case: Case, kwargs: dict) -> None:
    if kwargs.get("lr") == "tensor":
        kwargs = {**kwargs, "lr": torch.tensor(0.1, device="cuda")}
    params = make_params(device="cuda")
    optimizer = case.cls([{"params": params[:4]}, {"params": params[4:], "weight_decay": 0.3}], **kwargs)
    scheduler = None if "lr" in kwargs else torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.9**t)
    for step in range(6):
        set_grads(params, step)
        if step < 2:
            optimizer.step()
            continue
        with no_sync():
            optimizer.step()
            if scheduler:
                scheduler.step()


def test_the_first_step_does_not_synchronise_either() -> None:
    warm = make_params(device="cuda")
    set_grads(warm, 0)
    optimx.AdamW(warm, max_grad_norm=1.0).step()
    params = make_params(device="cuda")
    optimizer = optimx.AdamW(params, max_grad_norm=1.0)
    set_grads(params, 0)
    with no_sync():
        optimizer.step()


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


@pytest.mark.parametrize("scaler_cls", [torch.amp.GradScaler, optimx.GradScaler], ids=["torch", "optimx"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_amp_does_not_synchronise(scaler_cls, max_grad_norm: float | None) -> None:
    params = make_params(device="cuda")
    optimizer = optimx.AdamW(params, max_grad_norm=max_grad_norm)
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
    assert {float(optimizer.state[p]["step"]) for p in params} == {5.0}


@by_case
@pytest.mark.parametrize("kwargs", [{}, {"amsgrad": True}, {"max_grad_norm": 1.0}], ids=str)
def test_graph_replay_equals_eager(case: Case, kwargs: dict) -> None:
    """lr is read at replay, counts go on, the tables belong to the graph."""
    base = {"lr": torch.tensor(0.1, device="cuda"), "capturable": True, **kwargs}
    params = make_params(device="cuda")
    twin = make_params(device="cuda")
    captured, eager = case.cls(params, **base), case.cls(twin, **{**base, "lr": torch.tensor(0.1, device="cuda")})
    for p in params:
        p.grad = torch.zeros_like(p)

    def fill(step: int) -> None:
        set_grads(twin, step)
        for p, q in zip(params, twin, strict=True):
            p.grad.copy_(q.grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(3):
            fill(step)
            captured.step()
            eager.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(3, 8):
        fill(step)
        for optimizer in (captured, eager):
            optimizer.param_groups[0]["lr"].fill_(0.1 * 0.5**step)
        # whatever is allocated meanwhile must not be memory that the graph reads
        junk = [torch.full((1000,), float("nan"), device="cuda") for _ in range(20)]
        graph.replay()
        eager.step()
        del junk
    assert_same(captured, eager)
    if "max_grad_norm" in kwargs:
        torch.testing.assert_close(captured.grad_norm, eager.grad_norm)


def test_capture_without_capturable_is_refused() -> None:
    params = make_params(device="cuda")
    optimizer = optimx.AdamW(params)
    set_grads(params, 0)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturable is False"), torch.cuda.graph(graph):
        optimizer.step()


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("kwargs", [{}, {"amsgrad": True}, {"max_grad_norm": 1.0}], ids=str)
def test_real_tile_sizes(dtype: torch.dtype, kwargs: dict) -> None:
    """Full chunks, in 128-bit accesses, and the tails around them; one tensor that begins off 16 bytes."""
    params = make_params([(8191,), (8192,), (8193,), (300, 777)], "cuda", dtype)
    storage = torch.randn(20_001, device="cuda").to(dtype)
    params.append(torch.nn.Parameter(storage[1:]))
    kwargs = dict(kwargs)
    clip = kwargs.pop("max_grad_norm", None)
    # clipped gradients are small enough that their squares vanish in float16; then eps alone must not be the divisor
    kwargs = {"lr": 0.01, "eps": 1e-3 if dtype is torch.float16 else 1e-8, **kwargs}
    ours, stock, copies = twins(CASES[1], params, kwargs, max_grad_norm=clip)
    for step in range(4):
        set_grads(params, step)
        for param, copy in zip(params, copies, strict=True):
            copy.grad = param.grad.to(copy.dtype, copy=True)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(copies, clip)
        ours.step()
        stock.step()
        for copy in copies if dtype in HALF else ():
            for tensor in (copy.data, *(v for k, v in stock.state[copy].items() if k != "step")):
                tensor.copy_(tensor.to(dtype))
    # of 200,000 elements some lie near 0, where an average rounded the other way is a visible part of the step
    assert_same(ours, stock, {**CLOSE[dtype], "atol": 1e-4} if dtype in HALF else None)


@by_case
def test_on_a_side_stream(case: Case) -> None:
    ours, stock, _ = twins(case, make_params([(1000, 100)] * 8, "cuda"), {})
    side = torch.cuda.Stream()
    for step in range(20):
        for optimizer in (ours, stock):
            set_grads(optimizer.param_groups[0]["params"], step)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            ours.step()
        stock.step()
        torch.cuda.current_stream().wait_stream(side)
    assert_same(ours, stock)


def test_steps_run_ahead_of_the_device() -> None:
    """A thousand uploads in flight: none may overtake another."""
    params = make_params([(64,)] * 50, "cuda")
    ours, stock, _ = twins(CASES[1], params, {"lr": 0.01})
    for step in range(2):
        for optimizer in (ours, stock):
            set_grads(optimizer.param_groups[0]["params"], step)
            optimizer.step()
    torch.cuda._sleep(200_000_000)
    for i in range(1000):
        ours.param_groups[0]["lr"] = 0.01 / (1 + i)
        ours.step()
    for i in range(1000):
        stock.param_groups[0]["lr"] = 0.01 / (1 + i)
        stock.step()
    assert_same(ours, stock, {"rtol": 1e-4, "atol": 1e-5})


def test_more_than_2_to_the_31_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    numel = 2**31 + 1000
    if free < 5 * numel * 2 * 1.2:
        pytest.skip("needs 26 GB")
    param = torch.nn.Parameter(torch.ones(numel, device="cuda", dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    optimx.AdamW([param], lr=0.5, weight_decay=0.0).step()
    for part in (param[:10], param[2**31 - 5 : 2**31 + 5], param[-10:]):
        torch.testing.assert_close(part.float(), torch.full((10,), 0.5, device="cuda"))


def test_checkpoint_after_amp_has_counts_where_torch_has_them() -> None:
    params = make_params(device="cuda")
    optimizer = optimx.AdamW(params)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0)
    for step in range(3):
        scaler.scale(torch.ones((), device="cuda"))
        set_grads(params, step, scale=2.0)
        scaler.step(optimizer)
        scaler.update()
    saved = deepcopy(optimizer.state_dict())
    assert {state["step"].device.type for state in saved["state"].values()} == {"cpu"}
    assert {float(state["step"]) for state in saved["state"].values()} == {3.0}
    scaler.scale(torch.ones((), device="cuda"))
    set_grads(params, 3, scale=2.0)
    scaler.step(optimizer)
    assert {float(optimizer.state[p]["step"]) for p in params} == {4.0}
