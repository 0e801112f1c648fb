"""What every torch optimizer promises to a training loop: each test does the same with ours and with stock.

Lion and LAMB, of which torch has no class, are held to the plain loops that they fall back to.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.cases import BY_NAME, CLOSE, Case, assert_same, make_leftovers, make_params, set_grads, train, twins
from tests.engine import a_step, builders, each_case, each_case_and_walk, interpreted, params_of, usual

SHAPES = [(5,), (3, 4)]


# hooks


def hooked_step(optimizer: Optimizer) -> list[str]:
    log: list[str] = []
    first = params_of(optimizer)[0]
    before = first.detach().clone()

    def note(name: str) -> Callable[..., None]:
        return lambda self, args, kwargs: log.append(f"{name} {self is optimizer} {torch.equal(first, before)}")

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
    ]
    try:
        a_step(optimizer)
    finally:
        for handle in handles:
            handle.remove()
    return log


@pytest.mark.parametrize("of_params", [make_params, make_leftovers], ids=["ours", "torchs"])
@each_case
def test_step_hooks_run_once(case: Case, of_params: Callable, device: torch.device) -> None:
    """Also where the step goes on to torch's, as for complex parameters."""
    expected = ["global pre True True", "pre True True", "post True False", "global post True False"]
    # from the first stock instance on, torch's class has a step that runs hooks too
    for make in reversed(builders(case)):
        optimizer = make(of_params(*[case] * (of_params is make_leftovers), SHAPES, device), **usual(case))
        assert hooked_step(optimizer) == expected


@each_case
def test_removed_hooks_do_not_run(case: Case, device: torch.device) -> None:
    optimizer = case.cls(make_params(SHAPES, device))
    assert hooked_step(optimizer)
    calls: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1)).remove()
    a_step(optimizer)
    assert calls == []


@each_case
def test_pre_hook_may_change_the_arguments(case: Case, device: torch.device) -> None:
    for make in builders(case):
        optimizer = make(make_params(SHAPES, device))
        optimizer.register_step_pre_hook(lambda self, args, kwargs: ((self, lambda: 7.0), {}))
        assert optimizer.step() == 7.0


@each_case
def test_pre_hook_may_change_gradients(case: Case, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case))
    for optimizer in (ours, stock):

        def halve(self: Optimizer, args: Any, kwargs: Any) -> None:
            for param in params_of(self):
                param.grad = param.grad / 2

        optimizer.register_step_pre_hook(halve)
    train([ours, stock], 2)
    assert_same(ours, stock)


@each_case
def test_state_dict_hooks(case: Case, device: torch.device) -> None:
    logs = []
    for make in builders(case):
        log: list[str] = []
        optimizer = make(make_params(SHAPES, device), **usual(case))
        a_step(optimizer)

        def after(self: Optimizer, state_dict: dict, log: list[str] = log) -> dict:
            log.append("state_dict post")
            return {**state_dict, "extra": 1}

        def before_load(self: Optimizer, state_dict: dict, log: list[str] = log) -> dict:
            log.append(f"load pre {state_dict.pop('extra')}")
            return state_dict

        optimizer.register_state_dict_pre_hook(lambda self, log=log: log.append("state_dict pre"))
        optimizer.register_state_dict_post_hook(after)
        optimizer.register_load_state_dict_pre_hook(before_load)
        optimizer.register_load_state_dict_post_hook(lambda self, log=log: log.append("load post"))
        optimizer.load_state_dict(optimizer.state_dict())
        logs.append(log)
    assert logs[0] == logs[1] == ["state_dict pre", "state_dict post", "load pre 1", "load post"]


# closures


@pytest.mark.parametrize("how", ["positional", "keyword"])
@each_case
def test_closure(case: Case, how: str, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case))
    losses = []
    for optimizer in (ours, stock):

        def closure(optimizer: Optimizer = optimizer) -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = torch.stack([param.square().sum() for param in params_of(optimizer)]).sum()
            loss.backward()
            return loss

        # the closure turns gradients on by itself
        with torch.no_grad():
            steps = [optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure) for _ in "123"]
            assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled()
        losses.append(torch.stack(steps))
    torch.testing.assert_close(*losses)
    assert losses[0][2] < losses[0][0]
    assert_same(ours, stock)


@pytest.mark.parametrize("loss", [None, 3, {"loss": 1.0}], ids=["none", "int", "dict"])
@each_case
def test_step_returns_what_the_closure_returned(case: Case, loss: Any, device: torch.device) -> None:
    optimizer = case.cls(make_params(SHAPES, device))
    set_grads(params_of(optimizer), 0)
    assert optimizer.step() is None
    assert optimizer.step(lambda: loss) is loss


@each_case
def test_failing_closure_changes_nothing(case: Case, device: torch.device) -> None:
    params = make_params(SHAPES, device)
    optimizer = case.cls(params, **usual(case))
    set_grads(params, 0)
    before = copy.deepcopy([params, optimizer.state_dict()])
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    torch.testing.assert_close([params, optimizer.state_dict()], before, rtol=0, atol=0)


# gradients


@pytest.mark.parametrize("set_to_none", [True, False])
@each_case_and_walk
def test_zero_grad_and_accumulation(case: Case, set_to_none: bool, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case))
    for optimizer in (ours, stock):
        for step in range(2):
            for micro_batch in range(2):
                for i, param in enumerate(params_of(optimizer)):
                    (param * (i + step + micro_batch)).sin().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        grads = [param.grad for param in params_of(optimizer)]
        assert all(grad is None if set_to_none else not grad.any() for grad in grads)
        # zeroed gradients still decay the averages, missing ones do not
        optimizer.step()
    assert_same(ours, stock)


@each_case_and_walk
def test_parameters_without_gradient_keep_their_count(case: Case, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params([*SHAPES, (2,)], device), usual(case))
    for step, skip in enumerate([(), (0,), (1, 2), (0, 1)]):
        train([ours, stock], 1, first=step, skip=skip)
    if case.cls.rule.scalars:
        assert [ours.state[param]["step"].item() for param in params_of(ours)] == [2, 2, 3]
    assert_same(ours, stock)


@each_case_and_walk
def test_first_gradient_late(case: Case, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case))
    train([ours, stock], 2, skip=[1])
    assert len(ours.state) == len(stock.state)
    train([ours, stock], 2, first=2)
    assert_same(ours, stock)


FIRST_STEPS = [
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.9, "dampening": 1.0, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True},
]


@interpreted
@pytest.mark.parametrize("ours", [{}, {"max_grad_norm": 0.5}], ids=["plain", "clipped"])
@pytest.mark.parametrize("kwargs", FIRST_STEPS, ids=str)
def test_sgd_first_steps_at_different_times(kwargs: dict, ours: dict, device: torch.device) -> None:
    """A parameter's first step is not dampened, whenever it comes; and its buffer is not there before."""
    case = BY_NAME["sgd"]
    shapes = [*SHAPES, (2,), (0,), ()]
    optimizer, stock, copies = twins(case, make_params(shapes, device), {"lr": 0.1, **kwargs}, **ours)
    for step, skip in enumerate([(1, 2, 4), (0, 2), (1, 4), (), (3,)]):
        set_grads(params_of(optimizer), step, skip=skip)
        set_grads(copies, step, skip=skip)
        if ours:
            nn.utils.clip_grad_norm_([p for p in copies if p.grad is not None], 0.5)
        optimizer.step()
        stock.step()
        assert len(optimizer.state) == len(stock.state)
        assert_same(optimizer, stock)


@pytest.mark.parametrize("ours", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clipped"])
@each_case
def test_no_gradients_at_all(case: Case, ours: dict, device: torch.device) -> None:
    optimizer, stock, _ = twins(case, make_params(SHAPES, device), usual(case), **ours)
    before = [param.detach().clone() for param in params_of(optimizer)]
    optimizer.step()
    stock.step()
    assert all(map(torch.equal, params_of(optimizer), before))
    assert len(optimizer.state) == len(stock.state)
    assert optimizer.grad_norm is None or optimizer.grad_norm == 0.0


@pytest.mark.parametrize("shapes", [[(0,), (3, 0)], [()], [(), (0,), (2,)]], ids=str)
@each_case_and_walk
def test_empty_and_scalar_parameters(case: Case, shapes: list[tuple[int, ...]], device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(shapes, device), usual(case, weight_decay=0.1))
    train([ours, stock], 2)
    assert_same(ours, stock)


@each_case
def test_gradients_are_left_alone(case: Case, device: torch.device) -> None:
    params = make_params([*SHAPES, ()], device)
    optimizer = case.cls(params, **usual(case, weight_decay=0.1, maximize=True), max_grad_norm=0.1)
    for step in range(2):
        set_grads(params, step)
        grads = [param.grad for param in params]
        values = [grad.clone() for grad in grads]
        versions = [grad._version for grad in grads]
        optimizer.step()
        assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
        assert all(map(torch.equal, grads, values))
        assert versions == [grad._version for grad in grads]


@each_case
def test_gradients_with_a_graph(case: Case, device: torch.device) -> None:
    """``backward(create_graph=True)`` leaves gradients that require gradients."""
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case))
    for optimizer in (ours, stock):
        params = params_of(optimizer)
        for create_graph in (True, False, True):
            optimizer.zero_grad()
            losses = torch.stack([param.pow(3).sum() for param in params])
            grads = torch.autograd.grad(losses.sum(), params, create_graph=create_graph)
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            optimizer.step()
        assert not any(value.requires_grad for state in optimizer.state.values() for value in state.values())
    assert_same(ours, stock)


@each_case
def test_one_tensor_is_the_gradient_of_all(case: Case, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params([(5,), (5,)], device), usual(case))
    for optimizer in (ours, stock):
        for step in range(3):
            set_grads(params_of(optimizer), step)
            if step != 1:
                params_of(optimizer)[1].grad = params_of(optimizer)[0].grad
            optimizer.step()
    assert_same(ours, stock)


@pytest.mark.parametrize("shape", [(1,), (4,)], ids=str)
@each_case
def test_negative_view_as_gradient(case: Case, shape: tuple[int, ...], device: torch.device) -> None:
    """The imaginary part of a conjugate is a view whose memory holds the values with the other sign."""
    ours, stock, _ = twins(case, make_params([shape], device), usual(case))
    for optimizer in (ours, stock):
        (param,) = params_of(optimizer)
        for step in range(2):
            set_grads([param], step)
            if step == 1:
                param.grad = torch.complex(param.grad, -param.grad).conj().imag
                assert param.grad.is_neg()
            optimizer.step()
    assert_same(ours, stock)


@each_case
def test_step_inside_backward(case: Case, device: torch.device) -> None:
    """One optimizer a parameter, stepped as soon as its gradient is there."""
    models = []
    for make in builders(case):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(device)
        optimizers = {param: make([param], **usual(case)) for param in model.parameters()}

        def step(param: Tensor, optimizers: dict[Tensor, Optimizer] = optimizers) -> None:
            optimizers[param].step()
            optimizers[param].zero_grad()

        for param in model.parameters():
            param.register_post_accumulate_grad_hook(step)
        for i in range(2):
            model(torch.full((2, 4), 0.5 + i, device=device)).square().sum().backward()
        assert all(param.grad is None for param in model.parameters())
        models.append(model)
    for ours, stock in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, stock, **CLOSE[torch.float32])


# autograd


def saved_then_stepped(optimizer: Optimizer) -> Tensor:
    (param,) = params_of(optimizer)
    # keeps the parameter for its backward
    loss = param.square().sum()
    a_step(optimizer)
    return loss


@each_case_and_walk
def test_backward_through_a_stepped_parameter_fails(case: Case, device: torch.device) -> None:
    """In-place changes behind autograd's back would give wrong gradients instead of torch's error."""
    for make in builders(case):
        loss = saved_then_stepped(make(make_params([(5,)], device), **usual(case)))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@each_case_and_walk
def test_versions_count_steps(case: Case, device: torch.device) -> None:
    params = make_params(SHAPES, device)
    optimizer = case.cls(params, **usual(case))
    for step in range(3):
        set_grads(params, step, skip=[0] if step == 1 else [])
        before = [param._version for param in params]
        optimizer.step()
        bumped = [param._version > version for param, version in zip(params, before, strict=True)]
        assert bumped == [step != 1, True]


@each_case
def test_requires_grad_toggled(case: Case, device: torch.device) -> None:
    """The step looks at gradients, not at ``requires_grad``."""
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case))
    for step in range(4):
        for optimizer in (ours, stock):
            params_of(optimizer)[0].requires_grad_(step % 2 == 0)
        train([ours, stock], 1, first=step, skip=[0] if step == 3 else [])
    assert_same(ours, stock)


# the surroundings


@each_case
def test_repeatable(case: Case, device: torch.device) -> None:
    runs = []
    for _ in range(2):
        params = make_params([*SHAPES, (130,)], device)
        optimizer = case.cls(params, **usual(case, weight_decay=0.1), max_grad_norm=0.5)
        train([optimizer], 3)
        runs.append([*params, *(value for state in optimizer.state.values() for value in state.values())])
    assert all(map(torch.equal, *runs))


@each_case
def test_another_thread(case: Case, device: torch.device) -> None:
    """Gradient mode is a thread's own."""
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case))
    errors: list[Exception] = []

    def work() -> None:
        try:
            train([ours, stock], 2)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
    train([ours, stock], 1, first=2)
    assert_same(ours, stock)


@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 0.5}], ids=["plain", "clipped"])
@each_case
def test_default_device_is_another(case: Case, kwargs: dict, device: torch.device) -> None:
    """``torch.set_default_device`` is about the user's tensors, not about ours."""
    ours, stock, copies = twins(case, make_params(SHAPES, device), usual(case))
    ours.max_grad_norm = kwargs.get("max_grad_norm")
    for step in range(3):
        for optimizer in (ours, stock):
            set_grads(params_of(optimizer), step, skip=[0] if step == 1 else [])
            if optimizer is stock and kwargs:
                nn.utils.clip_grad_norm_(copies, 0.5)
            # before torch 2.13 stock's own step fails there
            with torch.device("meta") if optimizer is ours else nullcontext():
                optimizer.step()
    assert_same(ours, stock)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@each_case
def test_default_dtype_is_another(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case))
    torch.set_default_dtype(dtype)
    try:
        for step in range(2):
            for optimizer in (ours, stock):
                for param in params_of(optimizer):
                    param.grad = torch.full_like(param, 1.0 + step)
                optimizer.step()
        # stock rounds ASGD's eta to the default dtype
        rounded = case.name == "asgd" and dtype is torch.bfloat16
        assert_same(ours, stock, {"rtol": 2**-8, "atol": 2**-8 * 0.1} if rounded else None)
        for a, b in zip(params_of(ours), params_of(stock), strict=True):
            assert all(value.dtype is stock.state[b][name].dtype for name, value in ours.state[a].items())
    finally:
        torch.set_default_dtype(torch.float32)


@each_case
def test_profiler_name(case: Case, device: torch.device) -> None:
    optimizer = case.cls(make_params(SHAPES, device))
    set_grads(params_of(optimizer), 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.name for event in profile.events() if event.name.startswith("Optimizer.")]
    assert names == [
        f"Optimizer.step#{case.cls.__name__}.step",
        f"Optimizer.zero_grad#{case.cls.__name__}.zero_grad",
    ]


@each_case
def test_subclass_of_a_user(case: Case, device: torch.device) -> None:
    class Mine(case.cls):  # type: ignore[misc, name-defined]
        def __init__(self, params: Any, layer: int, **kwargs: Any) -> None:
            super().__init__(params, **kwargs)
            for group in self.param_groups:
                group["layer"] = layer

        def step(self, closure: Any = None) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            return super().step(closure)

    params = make_params(SHAPES, device)
    _, stock, _ = twins(case, params, usual(case))
    mine = Mine(params, layer=3, **usual(case))
    train([mine, stock], 2)
    assert_same(mine, stock)
    assert mine.calls == 2
    assert repr(mine).startswith("Mine (\nParameter Group 0")
