"""What the kernels do not do exactly goes to torch's own step: never wrong, at worst stock."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

import optimx
from optimx import _backend, _compat, _step
from tests.cases import CASES, CLOSE, Case, assert_same, make_params, set_grads, train, twins
from tests.conftest import INTERPRETED

pytestmark = pytest.mark.interpreted

SHAPES = [(5,), (3, 4)]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def complex_params(device: torch.device) -> list[Parameter]:
    parts = (make_params(SHAPES, device, seed=seed) for seed in (1, 2))
    return [Parameter(torch.complex(*params)) for params in zip(*parts, strict=True)]


@pytest.fixture
def stock_steps(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The parameters of every call of torch's own step."""
    calls: list[list[Tensor]] = []
    original = _compat.stock_step

    def stock_step(optimizer: Optimizer) -> None:
        calls.append(params_of(optimizer))
        original(optimizer)

    monkeypatch.setattr(_compat, "stock_step", stock_step)
    return calls


def reasons(optimizer: Optimizer) -> list[str]:
    return [row.reason for row in optimx.explain(optimizer).rows]


# who updates what


@pytest.mark.parametrize(
    "kwargs", [{"foreach": True}, {"foreach": False}, {"fused": False}, {"differentiable": True}], ids=str
)
@each_case
def test_asked_for_torchs_implementation(
    case: Case, kwargs: dict[str, bool], stock_steps: list, device: torch.device
) -> None:
    ours, stock = (
        cls(make_params(SHAPES, device), lr=0.1, weight_decay=0.1, **kwargs) for cls in (case.cls, case.stock)
    )
    for optimizer in (ours, stock):
        for param in params_of(optimizer):
            # a differentiable step refuses leaves that require gradients
            param.requires_grad_("differentiable" not in kwargs)
    train([ours, stock], 3)
    ((name, value),) = kwargs.items()
    assert f"asked for: {name}={value}" in reasons(ours)[0]
    assert len(stock_steps) == 3
    # the very same code
    assert all(map(torch.equal, params_of(ours), params_of(stock)))


@pytest.mark.parametrize("kwargs", [{}, {"fused": True}], ids=["default", "fused"])
@each_case
def test_defaults_never_reach_torchs_step(case: Case, kwargs: dict, stock_steps: list, device: torch.device) -> None:
    optimizer = case.cls(make_params(SHAPES, device), **kwargs)
    train([optimizer], 2)
    assert stock_steps == []
    assert reasons(optimizer) == [""]


@pytest.mark.parametrize("max_grad_norm", [None, 0.5], ids=["plain", "clipped"])
@each_case
def test_one_optimizer_of_both_kinds(
    case: Case, max_grad_norm: float | None, stock_steps: list, device: torch.device
) -> None:
    """Complex parameters go to torch's step, their neighbours in the same groups do not."""

    def groups(params: Sequence[Tensor]) -> list[dict[str, Any]]:
        return [{"params": params[:3]}, {"params": params[3:], "lr": 0.02, "weight_decay": 0.3}]

    a, b = make_params(SHAPES, device)
    z, w = complex_params(device)
    ours, stock, copies = twins(case, [a, z, with_gaps(b), w], {"lr": 0.1}, groups, max_grad_norm=max_grad_norm)
    for step in range(4):
        for optimizer in (ours, stock):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            for param in params_of(optimizer):
                grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
                param.grad = grad.to(device)
        if step == 2:
            z.grad = copies[1].grad = None
        if max_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(copies, max_grad_norm)
        grads = [param.grad for param in params_of(ours)]
        ours.step()
        stock.step()
        if max_grad_norm is not None:
            torch.testing.assert_close(ours.grad_norm, norm)
        # gradients are lent to torch's step, and come back
        assert all(param.grad is grad for param, grad in zip(params_of(ours), grads, strict=True))
    assert_same(ours, stock, CLOSE[torch.float32])
    left = [param for call in stock_steps for param in call]
    assert not any(param is a for param in left)
    assert sum(param is w for param in left) == 4
    assert [len(group["params"]) for group in ours.param_groups] == [3, 1]


def with_gaps(param: Tensor) -> Parameter:
    return Parameter(torch.stack([param.detach(), param.detach()], -1)[..., 0])


@each_case
def test_kind_changes_between_steps(case: Case, device: torch.device) -> None:
    """A parameter moves between a bucket and torch's step, and back, with its state."""
    ours, stock, _ = twins(case, make_params(SHAPES, device), {"lr": 0.1})
    train([ours, stock], 1)
    for step, (name, value) in enumerate([("foreach", True), ("foreach", None), ("fused", False), ("fused", None)], 1):
        ours.param_groups[0][name] = value
        train([ours, stock], 1, first=step)
    assert_same(ours, stock)


# what torch takes and kernels do not


@pytest.mark.parametrize("kwargs", [{}, {"amsgrad": True, "weight_decay": 0.1}, {"foreach": True}], ids=str)
@each_case
def test_complex_parameters(case: Case, kwargs: dict, device: torch.device) -> None:
    params = complex_params(device)
    ours, stock = case.cls(params, lr=0.1, **kwargs), case.stock(copy.deepcopy(params), lr=0.1, **kwargs)
    for step in range(3):
        for optimizer in (ours, stock):
            generator = torch.Generator().manual_seed(step)
            for param in params_of(optimizer):
                param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype).to(device)
            optimizer.step()
    assert all(map(torch.equal, params_of(ours), params_of(stock)))
    assert all("complex64" in reason or "foreach" in reason for reason in reasons(ours))


@each_case
def test_fused_with_complex_parameters_fails_as_in_stock(case: Case, device: torch.device) -> None:
    messages = []
    for cls in (case.cls, case.stock):
        params = complex_params(device)
        before = [param.detach().clone() for param in params]
        optimizer = cls(params, fused=True)
        for param in params:
            param.grad = torch.ones_like(param)
        with pytest.raises(RuntimeError) as error:
            optimizer.step()
        messages.append(str(error.value))
        assert all(map(torch.equal, params, before))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("max_grad_norm", [None, 0.5], ids=["plain", "clipped"])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "mixed"])
@each_case
def test_sparse_gradients_fail_as_in_stock(
    case: Case, alone: bool, max_grad_norm: float | None, device: torch.device
) -> None:
    messages = []
    for cls in (case.cls, case.stock):
        dense = make_params([] if alone else SHAPES, device)
        embedding = nn.Embedding(4, 3, sparse=True).to(device)
        params = [*dense, *embedding.parameters()]
        optimizer = cls(params, lr=0.1)
        if cls is case.cls:
            optimizer.max_grad_norm = max_grad_norm
        train([optimizer], 1)
        before = copy.deepcopy([params, optimizer.state_dict()])
        optimizer.zero_grad()
        embedding(torch.tensor([1, 1, 2], device=device)).sum().backward()
        set_grads(dense, 1)
        sparse = embedding.weight.grad
        with pytest.raises(RuntimeError) as error:
            optimizer.step()
        messages.append(str(error.value))
        assert embedding.weight.grad is sparse
        if cls is case.cls:
            # stock has stepped the groups before it
            torch.testing.assert_close([params, optimizer.state_dict()], before, rtol=0, atol=0)
        # and on, as if nothing had been
        train([optimizer], 1, first=1)
    assert messages[0] == messages[1]


@each_case
def test_gradients_flow_through_a_differentiable_step(case: Case, device: torch.device) -> None:
    results = []
    for cls in (case.cls, case.stock):
        lr = torch.tensor(0.1, device=device, requires_grad=True)
        (leaf,) = make_params([(5,)], device)
        param = leaf.clone()
        # as torch's own tests do: a parameter that is no leaf, with a gradient that has a history
        param.grad = leaf.square() + 1
        param.retain_grad()
        optimizer = cls([param], lr=0.1, differentiable=True)
        optimizer.param_groups[0]["lr"] = lr
        state = torch.rand(5, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        optimizer.state[param].update(
            step=torch.tensor(2.0), exp_avg=state.clone(), exp_avg_sq=state.clone().square() + 0.1
        )
        optimizer.step()
        param.sum().backward()
        results.append([param.detach(), leaf.grad, state.grad, lr.grad])
        assert all(tensor.abs().sum() > 0 for tensor in results[-1])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("fused", [None, True], ids=["default", "fused"])
@each_case
def test_capturable_on_a_cpu(case: Case, fused: bool | None) -> None:
    outcomes = []
    for cls in (case.cls, case.stock):
        params = make_params(SHAPES)
        optimizer = cls(params, capturable=True, fused=fused)
        set_grads(params, 0)
        try:
            optimizer.step()
            outcomes.append([param.detach() for param in params])
        except Exception as error:
            outcomes.append((type(error), str(error)))
    if fused:
        torch.testing.assert_close(*outcomes, **CLOSE[torch.float32])
    else:
        assert outcomes[0] == outcomes[1]
        assert outcomes[0][0] is AssertionError


@pytest.mark.parametrize("max_grad_norm", [None, 0.5], ids=["plain", "clipped"])
@each_case
def test_tensor_subclasses(case: Case, max_grad_norm: float | None, stock_steps: list) -> None:
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    ours, stock, copies = twins(case, make_params(SHAPES), {"lr": 0.1})
    first, second = params_of(ours)
    wrapped = Parameter(two_tensor(second.detach().clone(), second.detach().clone()))
    ours = case.cls([first, wrapped], lr=0.1, max_grad_norm=max_grad_norm)
    for step in range(3):
        set_grads(copies, step)
        first.grad = copies[0].grad.clone()
        wrapped.grad = two_tensor(copies[1].grad.clone(), copies[1].grad.clone())
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(copies, max_grad_norm)
        ours.step()
        stock.step()
    torch.testing.assert_close(first, copies[0], **CLOSE[torch.float32])
    for half in (wrapped.detach().a, wrapped.detach().b):
        torch.testing.assert_close(half, copies[1].detach(), **CLOSE[torch.float32])
    assert all(len(call) == 1 and call[0] is wrapped for call in stock_steps)
    assert "TwoTensor" in reasons(ours)[1]


class _Renamed(Tensor):
    """A subclass that redefines no operator is a tensor like any other."""


def test_harmless_subclasses_stay_with_the_kernels(stock_steps: list, device: torch.device) -> None:
    (param,) = make_params([(5,)], device)
    harmless = Parameter(param.detach().clone().as_subclass(_Renamed))
    ours = CASES[0].cls([harmless], lr=0.1)
    stock = CASES[0].stock([param], lr=0.1, foreach=False)
    for step in range(2):
        set_grads([param], step)
        harmless.grad = param.grad.clone()
        ours.step()
        stock.step()
    torch.testing.assert_close(harmless.detach().as_subclass(Tensor), param.detach(), **CLOSE[torch.float32])
    assert stock_steps == []


@each_case
def test_meta_parameters(case: Case, stock_steps: list) -> None:
    params = make_params(SHAPES, "meta")
    optimizer = case.cls(params, lr=0.1)
    for _ in range(2):
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer.step()
    assert optimizer.state[params[0]]["exp_avg"].is_meta
    assert len(stock_steps) == 2
    assert reasons(optimizer) == ["no kernels for meta devices"]


@each_case
def test_fake_tensors(case: Case) -> None:
    """Tools that trace a training step, or estimate its memory, step on tensors without memory."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        params = [Parameter(torch.randn(shape)) for shape in SHAPES]
        optimizer = case.cls(params, lr=0.1)
        for _ in range(2):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
    assert optimizer.state[params[0]]["exp_avg"].shape == SHAPES[0]


# triton that is missing or does not work


def cpu_bound_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted launches, treated as if a compiler and a GPU did them: their errors are handled."""
    namespace = SimpleNamespace(interpreted=lambda: False, give_up_on_triton=_backend.give_up_on_triton)
    monkeypatch.setattr(_step, "_backend", namespace)
    # to be put back when the test ends
    monkeypatch.setattr(_backend, "_broken", None)


def break_kernels(monkeypatch: pytest.MonkeyPatch, case: Case, error: Exception) -> None:
    def kernels(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(type(case.cls.rule), "launch", kernels)


@pytest.mark.parametrize("ours", [{}, {"max_grad_norm": 0.5}], ids=["plain", "clipped"])
@pytest.mark.parametrize("good_steps", [0, 2], ids=["at_once", "later"])
@each_case
def test_broken_triton(
    case: Case,
    good_steps: int,
    ours: dict,
    monkeypatch: pytest.MonkeyPatch,
    triton_backend: torch.device,
    stock_steps: list,
) -> None:
    cpu_bound_to_triton(monkeypatch)
    optimizer, stock, copies = twins(case, make_params(SHAPES, triton_backend), {"lr": 0.1}, **ours)

    def step_both(step: int) -> None:
        for each in (optimizer, stock):
            set_grads(params_of(each), step)
        if ours:
            nn.utils.clip_grad_norm_(copies, 0.5)
        optimizer.step()
        stock.step()

    for step in range(good_steps):
        step_both(step)
    assert stock_steps == []
    break_kernels(monkeypatch, case, ValueError("no such instruction"))
    # a kernel that was compiled before can only fail anew where another variant is needed
    optimizer._plans.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(good_steps, good_steps + 3):
            step_both(step)
        # others learn it too, silently
        other = case.cls(make_params(SHAPES, triton_backend))
        train([other], 1)
    (warning,) = [each for each in caught if issubclass(each.category, RuntimeWarning)]
    assert "ValueError: no such instruction" in str(warning.message)
    assert_same(optimizer, stock)
    assert len(stock_steps) == 4
    assert "no such instruction" in reasons(optimizer)[0]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), AssertionError("ours")], ids=["memory", "ours"])
def test_errors_that_are_not_tritons(
    error: Exception, monkeypatch: pytest.MonkeyPatch, triton_backend: torch.device
) -> None:
    """They come through, nothing has changed, and the next step is a whole one."""
    cpu_bound_to_triton(monkeypatch)
    case = CASES[0]
    ours, stock, _ = twins(case, make_params(SHAPES, triton_backend), {"lr": 0.1})
    train([ours, stock], 1)
    before = copy.deepcopy([params_of(ours), ours.state_dict()])
    set_grads(params_of(ours), 1)
    with monkeypatch.context() as patch:
        break_kernels(patch, case, error)
        ours._plans.clear()
        with pytest.raises(type(error)):
            ours.step()
    torch.testing.assert_close([params_of(ours), ours.state_dict()], before, rtol=0, atol=0)
    train([ours, stock], 2, first=1)
    assert_same(ours, stock)


@each_case
def test_triton_is_missing(
    case: Case, monkeypatch: pytest.MonkeyPatch, triton_backend: torch.device, stock_steps: list
) -> None:
    monkeypatch.setattr(_backend, "_triton_missing", lambda: "triton is not installed")
    ours, stock, _ = twins(case, make_params(SHAPES, triton_backend), {"lr": 0.1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train([ours, stock], 2)
    assert_same(ours, stock)
    assert len(stock_steps) == 2
    assert reasons(ours) == ["triton is not installed"]


@pytest.mark.skipif(INTERPRETED, reason="about the native kernels")
@each_case
def test_cpu_needs_no_triton(case: Case, monkeypatch: pytest.MonkeyPatch, stock_steps: list) -> None:
    monkeypatch.setattr(_backend, "_triton_missing", lambda: "triton is not installed")
    ours, stock, _ = twins(case, make_params(SHAPES), {"lr": 0.1}, max_grad_norm=1e9)
    train([ours, stock], 2)
    assert_same(ours, stock)
    assert stock_steps == []


def test_step_overridden_by_a_user(device: torch.device) -> None:
    """Torch runs the hooks of such a class twice, at each of the two steps; ours are no more and no fewer."""
    logs = []
    for base in (CASES[0].stock, CASES[0].cls):
        log: list[str] = []

        class Mine(base):  # type: ignore[misc, valid-type]
            def step(self, closure: Callable[[], Any] | None = None) -> Any:
                log.append("mine")  # noqa: B023
                return super().step(closure)

        base(make_params(SHAPES, device))
        mine = Mine(make_params(SHAPES, device), foreach=True)
        mine.register_step_pre_hook(lambda *_: log.append("hook"))  # noqa: B023
        train([mine], 1)
        logs.append(log)
    assert logs[0] == logs[1]
