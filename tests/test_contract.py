"""What every torch optimizer promises to a training loop: each test does the same with ours and with stock.

Lion and LAMB, of which torch has no class, are held to the plain loops that they fall back to.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.cases import CASES, CLOSE, Case, assert_same, loop, make_leftovers, make_params, set_grads, train, twins
from tests.conftest import INTERPRETED

interpreted = pytest.mark.interpreted

SHAPES = [(5,), (3, 4)]

#: Rules that the engine treats differently: one count and an operator; none, and a first step of its own; several;
#: several on the device; launches of its own.
DIFFERENT = ("adamw", "sgd", "nadam", "asgd", "lamb")

each_case = pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=interpreted) for c in CASES])
#: For what is about Python more than about kernels: the interpreter, at milliseconds a program, takes fewer.
each_case_natively = pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[interpreted] if c.name in DIFFERENT else []) for c in CASES]
)
each_different_case = pytest.mark.parametrize("case", [c for c in CASES if c.name in DIFFERENT], ids=lambda c: c.name)


def builders(case: Case) -> tuple[Callable[..., Optimizer], Callable[..., Optimizer]]:
    """What makes ours, and what makes the optimizer it stands for: torch's class, or the loop of one of our own."""
    return case.cls, case.stock if case.is_torchs else partial(loop, case)


def usual(case: Case, **more: Any) -> dict[str, Any]:
    """Those of these arguments that the optimizer has; with a momentum, so that all of them have a state."""
    if case.name == "adafactor" and "eps" in more:
        more["eps"] = (more["eps"], 1e-3)
    return {name: value for name, value in {"lr": 0.1, "momentum": 0.9, **more}.items() if case.has(name)}


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def a_step(optimizer: Optimizer, step: int = 0) -> None:
    set_grads(params_of(optimizer), step)
    optimizer.step()


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
@each_case_natively
def test_step_hooks_run_once(case: Case, of_params: Callable, device: torch.device) -> None:
    """Also where the step goes on to torch's, as for complex parameters."""
    expected = ["global pre True True", "pre True True", "post True False", "global post True False"]
    # from the first stock instance on, torch's class has a step that runs hooks too
    for make in reversed(builders(case)):
        optimizer = make(of_params(*[case] * (of_params is make_leftovers), SHAPES, device), **usual(case))
        assert hooked_step(optimizer) == expected


@each_case_natively
def test_removed_hooks_do_not_run(case: Case, device: torch.device) -> None:
    optimizer = case.cls(make_params(SHAPES, device))
    assert hooked_step(optimizer)
    calls: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1)).remove()
    a_step(optimizer)
    assert calls == []


@each_case_natively
def test_pre_hook_may_change_the_arguments(case: Case, device: torch.device) -> None:
    for make in builders(case):
        optimizer = make(make_params(SHAPES, device))
        optimizer.register_step_pre_hook(lambda self, args, kwargs: ((self, lambda: 7.0), {}))
        assert optimizer.step() == 7.0


@each_case_natively
def test_pre_hook_may_change_gradients(case: Case, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case))
    for optimizer in (ours, stock):

        def halve(self: Optimizer, args: Any, kwargs: Any) -> None:
            for param in params_of(self):
                param.grad = param.grad / 2

        optimizer.register_step_pre_hook(halve)
    train([ours, stock], 2)
    assert_same(ours, stock)


@each_case_natively
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
@each_case_natively
def test_step_returns_what_the_closure_returned(case: Case, loss: Any, device: torch.device) -> None:
    optimizer = case.cls(make_params(SHAPES, device))
    set_grads(params_of(optimizer), 0)
    assert optimizer.step() is None
    assert optimizer.step(lambda: loss) is loss


@each_case_natively
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
@each_case
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


@each_case
def test_parameters_without_gradient_keep_their_count(case: Case, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params([*SHAPES, (2,)], device), usual(case))
    for step, skip in enumerate([(), (0,), (1, 2), (0, 1)]):
        train([ours, stock], 1, first=step, skip=skip)
    if case.cls.rule.counts:
        assert [ours.state[param]["step"].item() for param in params_of(ours)] == [2, 2, 3]
    assert_same(ours, stock)


@each_case
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
    case = next(case for case in CASES if case.name == "sgd")
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
@each_case_natively
def test_no_gradients_at_all(case: Case, ours: dict, device: torch.device) -> None:
    optimizer, stock, _ = twins(case, make_params(SHAPES, device), usual(case), **ours)
    before = [param.detach().clone() for param in params_of(optimizer)]
    optimizer.step()
    stock.step()
    assert all(map(torch.equal, params_of(optimizer), before))
    assert len(optimizer.state) == len(stock.state)
    assert optimizer.grad_norm is None or optimizer.grad_norm == 0.0


@pytest.mark.parametrize("shapes", [[(0,), (3, 0)], [()], [(), (0,), (2,)]], ids=str)
@each_case
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


@each_case_natively
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


@each_case_natively
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
@each_case_natively
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


@each_case_natively
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


@each_case
def test_backward_through_a_stepped_parameter_fails(case: Case, device: torch.device) -> None:
    """In-place changes behind autograd's back would give wrong gradients instead of torch's error."""
    for make in builders(case):
        loss = saved_then_stepped(make(make_params([(5,)], device), **usual(case)))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@each_case
def test_versions_count_steps(case: Case, device: torch.device) -> None:
    params = make_params(SHAPES, device)
    optimizer = case.cls(params, **usual(case))
    for step in range(3):
        set_grads(params, step, skip=[0] if step == 1 else [])
        before = [param._version for param in params]
        optimizer.step()
        bumped = [param._version > version for param, version in zip(params, before, strict=True)]
        assert bumped == [step != 1, True]


@each_case_natively
def test_requires_grad_toggled(case: Case, device: torch.device) -> None:
    """The step looks at gradients, not at ``requires_grad``."""
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case))
    for step in range(4):
        for optimizer in (ours, stock):
            params_of(optimizer)[0].requires_grad_(step % 2 == 0)
        train([ours, stock], 1, first=step, skip=[0] if step == 3 else [])
    assert_same(ours, stock)


# shapes and layouts


def strided(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The values of ``tensor`` in memory that runs through the dimensions in ``order``."""
    return tensor.permute(order).contiguous().permute([order.index(i) for i in range(len(order))])


def misaligned(tensor: Tensor) -> Tensor:
    return torch.cat([tensor.new_full((1,), 9.0), tensor.flatten()])[1:].view(tensor.shape)


def with_gaps(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.full_like(tensor, 9.0)], -1)[..., 0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    "transposed": lambda tensor: strided(tensor, (3, 2, 1, 0)),
    "permuted": lambda tensor: strided(tensor, (1, 3, 0, 2)),
    "misaligned": misaligned,
    "gaps": with_gaps,
    "padded_rows": lambda tensor: torch.cat([tensor, torch.full_like(tensor, 9.0)], -1)[..., : tensor.shape[-1]],
}


@pytest.mark.parametrize("of_param", LAYOUTS)
@each_case
def test_layouts(case: Case, of_param: str, device: torch.device) -> None:
    """Parameters of one layout, one for each layout of gradients."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(2, 3, 2, 1, generator=generator).to(device) for _ in range(4)]
    of_grads = {**LAYOUTS, "expanded": lambda grad: grad[:1, :1, :1].expand(grad.shape)}
    params = [Parameter(LAYOUTS[of_param](values[0].clone())) for _ in of_grads]
    twins = [Parameter(values[0].clone()) for _ in of_grads]
    storages = [p.detach().as_strided((p.untyped_storage().nbytes() // 4,), (1,), 0) for p in params]
    foreign = [storage == 9.0 for storage in storages]
    ours, stock = case.cls(params, **usual(case)), loop(case, twins, **usual(case))
    for grad in values[1:]:
        for param, twin, of_grad in zip(params, twins, of_grads.values(), strict=True):
            param.grad = of_grad(grad)
            twin.grad = param.grad.contiguous()
        ours.step()
        stock.step()
    assert_same(ours, stock)
    # what lies between and before the elements belongs to others
    for storage, others in zip(storages, foreign, strict=True):
        assert torch.equal(storage[others], torch.full_like(storage[others], 9.0))
    if of_param not in ("gaps", "padded_rows"):
        for param in params:
            factored = ("row_var", "col_var")
            states = [s for name, s in ours.state[param].items() if s.dim() and name not in factored]
            assert all(state.stride() == param.stride() for state in states)


@each_case_natively
def test_strides_of_single_elements_mean_nothing(case: Case, device: torch.device) -> None:
    param = Parameter(torch.arange(5.0, device=device).as_strided((1, 5, 1), (1, 1, 77)))
    ours, stock, _ = twins(case, [param], usual(case))
    for step in range(2):
        train([ours, stock], 1, first=step)
        param.grad = torch.ones(1, 5, 1, device=device)
        stock.param_groups[0]["params"][0].grad = torch.ones(1, 5, 1, device=device)
        ours.step()
        stock.step()
    assert_same(ours, stock)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@each_case_natively
def test_duplicate_parameters(case: Case, device: torch.device) -> None:
    """Torch warns, and steps such a parameter twice."""
    a, b = make_params(SHAPES, device)
    c, d = make_params(SHAPES, device)
    ours, stock = case.cls([a, b, a], **usual(case)), loop(case, [c, d, c], **usual(case))
    train([ours, stock], 2)
    assert_same(ours, stock)


# groups and hyperparameters


@each_case_natively
def test_hundreds_of_groups(case: Case, device: torch.device) -> None:
    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        settings = [usual(case, lr=0.1 / (i + 1), weight_decay=i / 500) for i, _ in enumerate(params)]
        return [{"params": [param], **setting} for param, setting in zip(params, settings, strict=True)]

    # the interpreter takes 5 ms a parameter and step
    ours, stock, _ = twins(case, make_params([(2,)] * (50 if INTERPRETED else 465), device), {}, groups)
    train([ours, stock], 2)
    assert_same(ours, stock)


@each_case_natively
def test_parameters_in_the_second_group_only(case: Case, device: torch.device) -> None:
    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": [], "lr": 9.0}, {"params": params, **usual(case)}]

    ours, stock, _ = twins(case, make_params(SHAPES, device), {}, groups)
    train([ours, stock], 2)
    assert_same(ours, stock)


@each_case_natively
def test_group_added_midway(case: Case, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case))
    train([ours, stock], 2)
    for optimizer in (ours, stock):
        optimizer.add_param_group({"params": make_params([(7,), ()], device, seed=1), **case.other})
    train([ours, stock], 2, first=2)
    assert_same(ours, stock)


@each_case
def test_maximize_of_a_group_flipped(case: Case, device: torch.device) -> None:
    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": params[:1]}, {"params": params[1:], "maximize": True}]

    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case, weight_decay=0.1), groups)
    train([ours, stock], 2)
    for group in (*ours.param_groups, *stock.param_groups):
        group["maximize"] = not group["maximize"]
    train([ours, stock], 2, first=2)
    assert_same(ours, stock)


@each_case_natively
def test_named_parameters(case: Case, device: torch.device) -> None:
    dicts = []
    for make in builders(case):
        torch.manual_seed(0)
        model = nn.Linear(3, 2).to(device)
        optimizer = make(model.named_parameters(), lr=0.1)
        a_step(optimizer)
        assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
        dicts.append(optimizer.state_dict())
    assert dicts[0]["param_groups"] == dicts[1]["param_groups"]


SCHEDULERS: dict[str, Callable[..., lr_scheduler.LRScheduler]] = {
    "step": lambda opt, **_: lr_scheduler.StepLR(opt, 1, gamma=0.5),
    "one_cycle": lambda opt, **kwargs: lr_scheduler.OneCycleLR(opt, max_lr=[0.1, 0.2], total_steps=6, **kwargs),
    "cosine": lambda opt, **_: lr_scheduler.CosineAnnealingLR(opt, T_max=3),
    "lambda": lambda opt, **_: lr_scheduler.LambdaLR(opt, [lambda step: 1.0 / (1 + step), lambda step: 0.5**step]),
    "cyclic": lambda opt, **kwargs: lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=2, **kwargs),
    "warmup": lambda opt, **_: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.5)], [2]
    ),
}


@pytest.mark.parametrize("lr", [0.1, "tensor"], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
@each_case_natively
def test_schedulers(case: Case, name: str, lr: float | str, device: torch.device) -> None:
    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": params[:1]}, {"params": params[1:], **usual(case, lr=initial(), weight_decay=0.1)}]

    def initial() -> float | Tensor:
        return torch.tensor(0.1) if lr == "tensor" else lr

    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case, lr=initial()), groups)
    # momentum, or the first of the betas, runs against the lr
    cycle = case.has("momentum") or case.has("betas")
    with warnings.catch_warnings():
        # "lr_scheduler.step() before optimizer.step()": schedulers watch the step they wrapped
        warnings.simplefilter("error", UserWarning)
        schedulers = [SCHEDULERS[name](optimizer, cycle_momentum=cycle) for optimizer in (ours, stock)]
        for step in range(4):
            train([ours, stock], 1, first=step)
            for scheduler in schedulers:
                scheduler.step()
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()
    # a tensor lr is a float32 in stock's arithmetic too, but it rounds each product
    assert_same(ours, stock, {"rtol": 1e-5, "atol": 1e-6} if lr == "tensor" else None)


@each_case_natively
def test_plateau_scheduler_and_swa(case: Case, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case))
    plateaus = [lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0) for optimizer in (ours, stock)]
    swas = [torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2) for optimizer in (ours, stock)]
    for step in range(3):
        train([ours, stock], 1, first=step)
        for plateau, swa in zip(plateaus, swas, strict=True):
            plateau.step(1.0)
            swa.step()
    assert_same(ours, stock)


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0d", "1d"])
@each_case
def test_tensor_lr_changed_in_place(case: Case, shape: tuple[int, ...], device: torch.device) -> None:
    kwargs = usual(case, lr=torch.full(shape, 0.1), weight_decay=0.1)
    ours, stock, _ = twins(case, make_params(SHAPES, device), kwargs)
    for step, lr in enumerate([0.1, 0.02, 0.3]):
        for optimizer in (ours, stock):
            optimizer.param_groups[0]["lr"].fill_(lr)
        train([ours, stock], 1, first=step)
    assert_same(ours, stock, {"rtol": 1e-5, "atol": 1e-6})
    assert ours.param_groups[0]["lr"].shape == shape


def _numpy(name: str, value: float) -> Any:
    return getattr(pytest.importorskip("numpy"), name)(value)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: {"lr": 1, "weight_decay": 0, "eps": 1, "momentum": 1}, id="int"),
        pytest.param(lambda: {"lr": True}, id="bool"),
        pytest.param(lambda: {"lr": _numpy("float64", 0.1), "eps": _numpy("float64", 1e-3)}, id="numpy_float64"),
        pytest.param(lambda: {"lr": _numpy("float32", 0.1), "eps": _numpy("float32", 1e-3)}, id="numpy_float32"),
        pytest.param(lambda: {"betas": (_numpy("float64", 0.5), _numpy("float64", 0.9))}, id="numpy_betas"),
        pytest.param(lambda: {"betas": [0.5, 0.9], "etas": [0.4, 1.5], "step_sizes": [0.01, 1]}, id="lists"),
        pytest.param(lambda: {"lr": float("nan")}, id="nan"),
    ],
)
@each_case_natively
def test_types_of_hyperparameters(case: Case, make: Callable[[], dict[str, Any]], device: torch.device) -> None:
    kwargs = usual(case, **make())
    ours, stock = outcomes(case, lambda make: make(make_params(SHAPES, device), **kwargs))
    if isinstance(stock, tuple):
        assert ours == stock
        return
    train([ours, stock], 2)
    close = CLOSE[torch.float32]
    for a, b in zip(params_of(ours), params_of(stock), strict=True):
        torch.testing.assert_close(a, b, **close, equal_nan=True)


@each_case_natively
def test_int_hyperparameters_written_into_groups(case: Case, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params(SHAPES, device), {})
    for optimizer in (ours, stock):
        optimizer.param_groups[0].update(usual(case, lr=1, betas=(0, 0), weight_decay=1, eps=1, momentum=1))
    train([ours, stock], 2)
    assert_same(ours, stock)


# errors


def outcomes(case: Case, build: Callable[[Callable[..., Optimizer]], Optimizer]) -> list[Any]:
    """What happens with ours and with stock: the optimizer, or ``(type, message)`` of the error."""
    results: list[Any] = []
    for make in builders(case):
        try:
            results.append(build(make))
        except Exception as error:
            results.append((type(error), str(error)))
    return results


BAD: list[dict[str, Any]] = [
    {"lr": -1},
    {"lr": -1e-9},
    {"lr": torch.tensor(-1.0)},
    {"lr": torch.tensor([0.1, 0.2])},
    {"lr": torch.tensor(0.1), "foreach": True},
    {"lr": "0.1"},
    {"lr": None},
    {"eps": -1e-8},
    {"betas": (1.0, 0.999)},
    {"betas": (0.9, 1.0)},
    {"betas": (-0.1, 0.9)},
    {"betas": (0.9,)},
    {"betas": (0, 0.9)},
    {"betas": (0.9, torch.tensor(0.9))},
    {"betas": (torch.tensor([0.9, 0.9]), torch.tensor(0.9))},
    {"betas": (torch.tensor(0.9), torch.tensor(0.9)), "foreach": True},
    {"weight_decay": -0.1},
    {"momentum": -0.1},
    {"momentum": "0.9"},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.5},
    {"alpha": -0.1},
    {"rho": -0.1},
    {"rho": 1.1},
    {"lr_decay": -0.1},
    {"initial_accumulator_value": -0.1},
    {"momentum_decay": -0.1},
    {"etas": (0.0, 1.2)},
    {"etas": (0.5, 1.0)},
    {"etas": (0.5,)},
    {"fused": True, "differentiable": True},
    {"fused": True, "foreach": True},
]


def _bad() -> list:
    return [
        pytest.param(case, kwargs, id=f"{case.name}-{kwargs}")
        for case in CASES
        for kwargs in BAD
        if case.is_torchs and all(map(case.has, kwargs))
        # transformers' relative step sizes
        if not (case.name == "adafactor" and kwargs == {"lr": None})
    ]


@pytest.mark.parametrize(("case", "kwargs"), _bad())
def test_bad_hyperparameters(case: Case, kwargs: dict[str, Any]) -> None:
    """What torch's class refuses, ours refuses in the same words; what it takes, ours takes."""
    ours, stock = outcomes(case, lambda make: make(make_params(SHAPES), **kwargs))
    if isinstance(stock, tuple):
        assert ours == stock
    else:
        assert not isinstance(ours, tuple)


def test_bad_hyperparameters_are_bad() -> None:
    """Each entry of the table is refused by one of torch's classes at least."""
    for kwargs in BAD:
        cases = [case for case in CASES if case.is_torchs and all(map(case.has, kwargs))]
        results = [outcomes(case, lambda make, kwargs=kwargs: make(make_params(SHAPES), **kwargs)) for case in cases]
        assert any(isinstance(stock, tuple) for _, stock in results), kwargs


@each_case_natively
def test_unknown_argument(case: Case) -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        case.cls(make_params(SHAPES), no_such_argument=1)


#: For optimizers of our own: what is refused, and the rule in the message.
BAD_OF_OURS: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1}, "lr should be >= 0 but is: -1"),
    ({"lr": float("nan")}, "lr should be >= 0 but is: nan"),
    ({"lr": torch.tensor(-1.0)}, f"lr should be >= 0 but is: {torch.tensor(-1.0)}"),
    ({"lr": torch.tensor([0.1, 0.2])}, "lr should have one element but has: 2"),
    ({"eps": -1e-8}, "eps should be >= 0 but is: -1e-08"),
    ({"weight_decay": -0.1}, "weight_decay should be >= 0 but is: -0.1"),
    ({"betas": (1.0, 0.9)}, "betas[0] should be in [0, 1) but is: 1.0"),
    ({"betas": (0.9, -0.1)}, "betas[1] should be in [0, 1) but is: -0.1"),
    ({"betas": (0.9, float("nan"))}, "betas[1] should be in [0, 1) but is: nan"),
    ({"betas": (0.9,)}, "betas should be two numbers but is: (0.9,)"),
    ({"max_trust_ratio": 0.0}, "max_trust_ratio should be > 0 but is: 0.0"),
    ({"max_trust_ratio": float("nan")}, "max_trust_ratio should be > 0 but is: nan"),
    (
        {"normalize_grads": True, "max_grad_norm": 1.0},
        "max_grad_norm should be None with normalize_grads=True but is: 1.0",
    ),
]


@pytest.mark.parametrize(
    ("case", "kwargs", "message"),
    [
        pytest.param(case, kwargs, message, id=f"{case.name}-{kwargs}")
        for case in CASES
        for kwargs, message in BAD_OF_OURS
        if not case.is_torchs and all(map(case.has, kwargs))
    ],
)
def test_bad_hyperparameters_of_our_own(case: Case, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        case.cls(make_params(SHAPES), **kwargs)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(list, id="no_params"),
        pytest.param(lambda: torch.ones(3), id="a_tensor"),
        pytest.param(lambda: ["text"], id="not_tensors"),
        pytest.param(lambda: [Parameter(torch.ones(3)) * 2], id="not_a_leaf"),
        pytest.param(lambda: [{"lr": 0.1}], id="group_without_params"),
        pytest.param(lambda: [{"params": {Parameter(torch.ones(3))}}], id="a_set"),
        pytest.param(lambda: [("a", Parameter(torch.ones(3))), Parameter(torch.ones(3))], id="some_named"),
        pytest.param(lambda: [{"params": make_params([(1,)])}, make_params([(1,)])[0]], id="group_and_param"),
        pytest.param(lambda: [{"params": [p]} for p in make_params([(1,)]) * 2], id="param_in_two_groups"),
    ],
)
@each_case_natively
def test_bad_params(case: Case, make: Callable[[], Any]) -> None:
    # one value for both, as messages may show it
    params = make()
    ours, stock = outcomes(case, lambda make: make(params))
    assert isinstance(stock, tuple)
    assert ours == stock


@pytest.mark.parametrize("value", [0.0, -1.0, 0, float("nan")])
@each_case_natively
def test_bad_max_grad_norm(case: Case, value: float) -> None:
    with pytest.raises(ValueError, match=f"^max_grad_norm should be > 0 but is: {value}$"):
        case.cls(make_params(SHAPES), max_grad_norm=value)


def _error_inputs() -> list:
    try:
        from torch.testing._internal.common_optimizers import optim_db
    except ImportError:  # it needs expecttest and numpy; the other tests need neither
        return []
    known = {case.stock: case for case in CASES}
    return [
        pytest.param(known[info.optim_cls], info, i, id=f"{known[info.optim_cls].name}-{i}")
        for info in optim_db
        if info.optim_cls in known
        for i, _ in enumerate(info.optim_error_inputs_func(device="cpu", dtype=torch.float32))
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("case", "info", "index"), _error_inputs())
def test_torchs_own_errors(case: Case, info: Any, index: int) -> None:
    def build(make: Callable[..., Optimizer]) -> Optimizer:
        error_input = info.optim_error_inputs_func(device="cpu", dtype=torch.float32)[index].optimizer_error_input
        optimizer = make(error_input.params, **error_input.kwargs)
        optimizer.step()
        return optimizer

    ours, stock = outcomes(case, build)
    error = info.optim_error_inputs_func(device="cpu", dtype=torch.float32)[index]
    if isinstance(stock, tuple):
        assert ours == stock
        assert stock[0] is error.error_type
    else:
        # torch's own test of it looks for a warning
        assert not isinstance(ours, tuple)


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


@each_case_natively
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
@each_case_natively
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
@each_case_natively
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


@each_case_natively
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


@each_case_natively
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


@pytest.fixture
def fresh_dynamo():
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("case", "lr"),
    [
        pytest.param(case, lr, id=f"{case.name}-{lr}")
        for case in CASES
        for lr in (0.1, "tensor")
        if lr == 0.1 or case.name in DIFFERENT
    ],
)
def test_compiled_step(case: Case, lr: float | str, device: torch.device) -> None:
    optimizers = [
        make(make_params(SHAPES, device), **usual(case, lr=torch.tensor(0.1) if lr == "tensor" else lr))
        for make in builders(case)
    ]
    steps = [torch.compile(optimizer.step, backend="eager") for optimizer in optimizers]
    for step in range(3):
        for optimizer, run in zip(optimizers, steps, strict=True):
            set_grads(params_of(optimizer), step)
            run()
    assert_same(*optimizers)
    # and on without the compiler
    train(optimizers, 2, first=3)
    assert_same(*optimizers, {"rtol": 1e-5, "atol": 1e-6} if lr == "tensor" else None)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("max_grad_norm", [None, 0.5], ids=["plain", "clipped"])
@each_different_case
def test_compiled_training_step(case: Case, max_grad_norm: float | None, device: torch.device) -> None:
    make_ours, make_stock = builders(case)
    ours = make_ours(make_params(SHAPES, device), **usual(case), max_grad_norm=max_grad_norm)
    stock = make_stock(make_params(SHAPES, device), **usual(case))

    def train_step(optimizer: Optimizer) -> Tensor:
        loss = torch.stack([(param - 1).square().sum() for param in params_of(optimizer)]).sum()
        loss.backward()
        if optimizer is stock and max_grad_norm is not None:
            nn.utils.clip_grad_norm_(params_of(optimizer), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    compiled = torch.compile(train_step, backend="eager", fullgraph=False)
    for _ in range(3):
        # the step that clips is not compiled; what is computes bias corrections in float32, in stock too
        of_stock = compiled(stock) if max_grad_norm is None else train_step(stock)
        torch.testing.assert_close(compiled(ours), of_stock)
    assert_same(ours, stock)
