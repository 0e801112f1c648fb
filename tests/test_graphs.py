"""Steps that a CUDA graph records: what is read at replay, whose the tables are, and what cannot be recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import optimx
from optimx import _compat
from optimx._engine import engine
from tests.cases import Case, assert_same, make_params, set_grads
from tests.engine import params_of, usual
from tests.test_gpu import each_case, each_row, rows

pytestmark = pytest.mark.gpu


def captured_step(optimizer: torch.optim.Optimizer) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def warm_up(optimizers: tuple[torch.optim.Optimizer, ...], fill: Callable[[int], None]) -> None:
    """Three steps on a side stream, as torch asks for before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(3):
            fill(step)
            for optimizer in optimizers:
                optimizer.step()
    torch.cuda.current_stream().wait_stream(side)


def filler(params: list[Parameter], twin: list[Parameter]) -> Callable[[int], None]:
    """Writes a step's gradients; those of ``params`` stay where they are, as a graph needs them."""
    for p in params:
        p.grad = torch.zeros_like(p)

    def fill(step: int) -> None:
        set_grads(twin, step)
        for p, q in zip(params, twin, strict=True):
            p.grad.copy_(q.grad)

    return fill


def replay_beside(captured: torch.optim.Optimizer, eager: torch.optim.Optimizer) -> None:
    """Three steps of a graph, and the same without one."""
    fill = filler(params_of(captured), params_of(eager))
    warm_up((captured, eager), fill)
    graph = captured_step(captured)
    for step in range(3, 6):
        fill(step)
        graph.replay()
        eager.step()


@pytest.mark.parametrize("max_grad_norm", [None, 1.0], ids=["plain", "clipping"])
@each_row
def test_graph_replay_equals_eager(case: Case, kwargs: dict, max_grad_norm: float | None) -> None:
    """lr is read at replay, counts go on, the tables belong to the graph."""
    params, twin = make_params(device="cuda"), make_params(device="cuda")
    captured, eager = (
        case.cls(
            some,
            **{**kwargs, "lr": torch.tensor(0.1, device="cuda"), "capturable": True, "max_grad_norm": max_grad_norm},
        )
        for some in (params, twin)
    )
    fill = filler(params, twin)
    warm_up((captured, eager), fill)
    graph = captured_step(captured)
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
    if max_grad_norm is not None:
        torch.testing.assert_close(captured.grad_norm, eager.grad_norm)


@pytest.mark.parametrize("max_grad_norm", [None, optimx.AutoClip(50.0)], ids=["plain", "autoclip"])
@each_case
def test_graph_replay_skips(case: Case, max_grad_norm: optimx.AutoClip | None) -> None:
    """What a step finds at replay decides about that step; counters and norms go on."""
    params, twin = make_params(device="cuda"), make_params(device="cuda")
    kwargs = {**usual(case), "capturable": True, "skip_nonfinite": True, "max_grad_norm": max_grad_norm}
    captured, eager = (case.cls(some, **kwargs) for some in (params, twin))
    fill = filler(params, twin)
    warm_up((captured, eager), fill)
    graph = captured_step(captured)
    for step in range(3, 8):
        fill(step)
        if step == 5:
            for some in (params, twin):
                some[3].grad.view(-1)[-1] = float("nan")
        before = [param.detach().clone() for param in params]
        graph.replay()
        eager.step()
        assert all(map(torch.equal, before, params)) == bool(captured.step_was_skipped) == (step == 5)
    assert_same(captured, eager)
    assert int(captured.counters["steps"]) == 8
    torch.testing.assert_close(captured.guard_state, eager.guard_state, rtol=0.0, atol=0.0, equal_nan=True)
    assert optimx.last_bad(captured) == optimx.last_bad(eager)
    assert optimx.last_bad(captured).step == 6


def test_graph_replay_normalizes() -> None:
    params, twin = make_params(device="cuda"), make_params(device="cuda")
    captured, eager = (optimx.LAMB(some, normalize_grads=True, capturable=True) for some in (params, twin))
    replay_beside(captured, eager)
    assert_same(captured, eager)
    torch.testing.assert_close(captured.grad_norm, eager.grad_norm)


@each_case
def test_capture_without_capturable_is_refused_where_torch_refuses(case: Case) -> None:
    optimizer = case.cls(make_params(device="cuda"), **usual(case))
    if "capturable" not in optimizer.defaults:
        pytest.skip("torch does not ask for it")
    set_grads(params_of(optimizer), 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="capturable is False"):
        captured_step(optimizer)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0], ids=["plain", "clipping"])
@pytest.mark.parametrize(("case", "kwargs"), [row for row in rows() if not row.values[0].cls.rule.scalars])
def test_capture_without_capturable_is_torchs(
    case: Case, kwargs: dict, max_grad_norm: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing counts steps, torch's own step can be recorded; then it is."""
    params, twin = make_params(device="cuda"), make_params(device="cuda")
    captured, eager = (case.cls(some, **kwargs, max_grad_norm=max_grad_norm) for some in (params, twin))
    fill = filler(params, twin)
    warm_up((captured, eager), fill)
    stock_steps: list[list[Tensor]] = []
    stock_step = case.cls._stock_step

    def recorded(optimizer: torch.optim.Optimizer) -> None:
        stock_steps.append(params_of(optimizer))
        stock_step(optimizer)

    with monkeypatch.context() as patch:
        patch.setattr(case.cls, "_stock_step", recorded)
        graph = captured_step(captured)
    assert [[*map(id, step)] for step in stock_steps] == [[*map(id, params)]]
    for step in range(3, 6):
        fill(step)
        graph.replay()
        eager.step()
    # and after the graph, without it
    fill(6)
    for optimizer in (captured, eager):
        optimizer.step()
    assert_same(captured, eager)


def capturable_twins(case: Case, params: list[Parameter], twin: list[Parameter], kwargs: dict[str, Any]) -> Any:
    return (case.cls(some, **kwargs, capturable=True, max_grad_norm=1.0) for some in (params, twin))


def replay_both(
    graph: torch.cuda.CUDAGraph, eager: torch.optim.Optimizer, fill: Callable[[int], None], step: int
) -> None:
    fill(step)
    graph.replay()
    eager.step()


@each_row
def test_several_buckets_and_several_captures(case: Case, kwargs: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every capture uses the plan of the steps before it, and leaves the next ones a plan that they can use."""
    params, twin = (
        [*make_params(device="cuda"), *make_params(device="cuda", dtype=torch.float64, seed=1)] for _ in range(2)
    )
    captured, eager = capturable_twins(case, params, twin, kwargs)
    fill = filler(params, twin)
    warm_up((captured, eager), fill)
    made = []
    plan = engine.StepPlan
    monkeypatch.setattr(engine, "StepPlan", lambda *args: made.append(plan(*args)) or made[-1])
    graphs = [captured_step(captured) for _ in range(3)]
    assert made == []
    assert len(captured._engine.plans) == 1
    step = 3
    for graph in (*graphs, graphs[0]):
        replay_both(graph, eager, fill, step)
        step += 1
        # and one without a graph, whose values are sent anew
        fill(step)
        for optimizer in (captured, eager):
            optimizer.param_groups[0]["lr"] = 0.01 / step
            optimizer.step()
            optimizer.param_groups[0]["lr"] = kwargs["lr"]
        step += 1
    assert_same(captured, eager)


def test_tables_of_a_graph_outlive_other_plans() -> None:
    """Patterns of gradients come and go; the one that was recorded stays."""
    params, twin = make_params(device="cuda"), make_params(device="cuda")
    captured, eager = (optimx.AdamW(some, capturable=True) for some in (params, twin))
    fill = filler(params, twin)
    warm_up((captured, eager), fill)
    graph = captured_step(captured)
    kept = [p.grad for p in params]
    for left_out in range(6):
        fill(left_out)
        for some in (params, twin):
            some[left_out % len(some)].grad = None
        for optimizer in (captured, eager):
            optimizer.step()
        for p, grad in zip(params, kept, strict=True):
            p.grad = grad
        for p in twin:
            p.grad = torch.zeros_like(p)
    replay_both(graph, eager, fill, 9)
    assert_same(captured, eager)
    # states that are gone take the graphs with them
    captured.load_state_dict(captured.state_dict())
    fill(10)
    captured.step()
    assert len(captured._engine.plans) == 1


@each_case
def test_a_capture_that_no_step_came_before(case: Case) -> None:
    """Its tables are the graph's: no later step may use them. Stateless, as states would be made at every replay."""
    params, twin = make_params(device="cuda"), make_params(device="cuda")
    kwargs = {**usual(case), **({"momentum": 0.0} if case.is_torchs and case.has("momentum") else {})}
    captured, eager = capturable_twins(case, params, twin, kwargs)
    fill = filler(params, twin)
    # the states, but no plan
    fill(0)
    for optimizer in (captured, eager):
        optimizer.step()
    captured._engine.plans.clear()
    graph = captured_step(captured)
    fill(1)
    for optimizer in (captured, eager):
        optimizer.step()
    replay_both(graph, eager, fill, 2)
    assert_same(captured, eager)


@each_row
def test_torch_whose_graphs_keep_no_pinned_memory(case: Case, kwargs: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.11 nothing can be sent under capture, so torch's own step is recorded."""
    monkeypatch.setattr(_compat, "graphs_keep_pinned_memory", lambda: False)
    params, twin = make_params(device="cuda"), make_params(device="cuda")
    captured, eager = capturable_twins(case, params, twin, kwargs)
    fill = filler(params, twin)
    warm_up((captured, eager), fill)
    if case.name in ("adafactor", "adagrad") or issubclass(case.stock, optimx.FormulaLoop):
        pytest.skip("that step cannot be recorded")
    graph = captured_step(captured)
    for step in range(3, 6):
        replay_both(graph, eager, fill, step)
    # torch takes RAdam's rho from float32 scalars there, where 2000 and 1993.9 cancel: a thousandth of a step
    assert_same(captured, eager, {"rtol": 2e-6, "atol": 2e-5} if case.name == "radam" else None)


def test_errors_under_capture_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's step in place of a kernel would be recorded, and the error forgotten."""
    from optimx._engine import backends
    from optimx._engine.triton.elementwise import TritonBucket

    monkeypatch.setattr(backends, "strict", False)
    optimizer = optimx.AdamW(make_params(device="cuda"), capturable=True)
    set_grads(params_of(optimizer), 0)

    def launch(*args: Any) -> None:
        raise ValueError("no such instruction")

    monkeypatch.setattr(TritonBucket, "_launch_update", launch)
    with pytest.raises(ValueError, match="no such instruction"):
        captured_step(optimizer)


def test_adafactor_without_capturable_says_so() -> None:
    optimizer = optimx.Adafactor(make_params(device="cuda"))
    set_grads(params_of(optimizer), 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="capturable=True"):
        captured_step(optimizer)


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clip_grad_norm(norm_type: float, warm: bool) -> None:
    """Its tables are the graph's: neither kept for later calls, nor given up when others take their place."""
    # torch's infinity norm takes no empty tensors
    params = make_params([(5,), (3, 5), (300,)], "cuda")
    grads = [torch.zeros_like(p) for p in params]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    others = [make_params([(n,)], "cuda") for n in range(1, 12)]

    def fill(step: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(step)
        expected = [torch.randn(grad.shape, generator=generator) for grad in grads]
        for grad, values in zip(grads, expected, strict=True):
            grad.copy_(values)
        return expected

    def clip_others() -> None:
        for other in others:
            set_grads(other, 0)
            optimx.clip_grad_norm_(other, 1.0, norm_type)

    if warm:
        optimx.clip_grad_norm_(params, 0.5, norm_type)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = optimx.clip_grad_norm_(params, 0.5, norm_type)
    if warm:
        clip_others()
    else:
        # what the capture made has no values yet
        fill(5)
        assert optimx.clip_grad_norm_(params, 0.5, norm_type) > 0.5
    for step in range(2):
        stock = [Parameter(torch.zeros_like(values)) for values in fill(step)]
        for p, values in zip(stock, fill(step), strict=True):
            p.grad = values
        expected = torch.nn.utils.clip_grad_norm_(stock, 0.5, norm_type)
        graph.replay()
        torch.testing.assert_close(norm.cpu(), expected)
        torch.testing.assert_close([grad.cpu() for grad in grads], [p.grad for p in stock])
        # and without the graph
        fill(step)
        torch.testing.assert_close(optimx.clip_grad_norm_(params, 0.5, norm_type).cpu(), expected)


def test_errors_under_capture_of_random_bits() -> None:
    """A graph would repeat those that it has recorded where nobody counts on the device."""
    params = make_params(device="cuda", dtype=torch.bfloat16)
    optimizer = optimx.SGD(params, lr=0.1, capturable=True, param_rounding="stochastic")
    set_grads(params, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"a CUDA graph would repeat the random bits .* SGD counts no steps"):
        captured_step(optimizer)


def test_graph_replay_rounds_anew() -> None:
    """Counts on the device go on, and random bits with them."""
    params, twin = (make_params([(64, 128)], "cuda", torch.bfloat16) for _ in range(2))
    kwargs: dict[str, Any] = {"lr": 1e-2, "capturable": True, "param_rounding": "stochastic", "state_dtype": "8bit"}
    captured, eager = optimx.AdamW(params, **kwargs), optimx.AdamW(twin, **kwargs)
    replay_beside(captured, eager)
    assert torch.equal(*params, *twin)


@pytest.mark.parametrize("cls", [optimx.AdamW, optimx.Lion], ids=lambda cls: cls.__name__)
def test_shares_of_cautious_steps(cls: type[optimx.MultiTensorStep]) -> None:
    """A graph reads and writes them where they are."""
    params, twin = (make_params([(64, 128), (300,)], "cuda") for _ in range(2))
    captured, eager = (cls(some, lr=1e-2, capturable=True, cautious="last_mean") for some in (params, twin))
    replay_beside(captured, eager)
    for a, b in zip(params, twin, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(captured.state[a]["mask_mean"], eager.state[b]["mask_mean"])
        assert 0.0 < captured.state[a]["mask_mean"] < 1.0
