"""What the kernels do not do exactly goes to torch's own step: never wrong, at worst stock."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

import optimx
from optimx._engine import backends
from optimx._engine.step import MultiTensorStep
from tests.cases import (
    BY_NAME,
    CASES,
    CLOSE,
    Case,
    assert_same,
    loop,
    make_leftovers,
    make_params,
    set_grads,
    train,
    twins,
)
from tests.conftest import INTERPRETED
from tests.engine import QUICK, builders, each, each_case, each_case_and_walk, interpreted, params_of, usual, with_flags

SHAPES = [(5,), (3, 4)]


def complex_params(device: torch.device) -> list[Parameter]:
    parts = (make_params(SHAPES, device, seed=seed) for seed in (1, 2))
    return [Parameter(torch.complex(*params)) for params in zip(*parts, strict=True)]


def set_complex_grads(params: Sequence[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype).to(param.device)


@pytest.fixture
def stock_steps(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The parameters of every call of torch's own step."""
    calls: list[list[Tensor]] = []

    def recorded(step: Callable[..., Any]) -> Callable[..., Any]:
        def stock_step(optimizer: Optimizer) -> None:
            calls.append(params_of(optimizer))
            step(optimizer)

        return stock_step

    for cls in {*MultiTensorStep.__subclasses__(), *(case.cls for case in CASES)}:
        monkeypatch.setattr(cls, "_stock_step", recorded(cls._stock_step))
    return calls


def reasons(optimizer: Optimizer) -> list[str]:
    return [row.reason for row in optimx.explain(optimizer).rows]


# who updates what


@each(with_flags({"foreach": True}, {"foreach": False}, {"fused": False}, {"differentiable": True}), QUICK)
def test_asked_for_torchs_implementation(
    case: Case, kwargs: dict[str, bool], stock_steps: list, device: torch.device
) -> None:
    ours, stock = (make(make_params(SHAPES, device), **usual(case, **kwargs)) for make in builders(case))
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


@each(with_flags({}, {"fused": True}), QUICK)
def test_defaults_never_reach_torchs_step(case: Case, kwargs: dict, stock_steps: list, device: torch.device) -> None:
    optimizer = case.cls(make_params(SHAPES, device), **usual(case, **kwargs))
    train([optimizer], 2)
    assert stock_steps == []
    # Adafactor's vectors and matrices are two kernel variants
    assert {*reasons(optimizer)} == {""}


@pytest.mark.parametrize("max_grad_norm", [None, 0.5], ids=["plain", "clipped"])
@each_case
def test_one_optimizer_of_both_kinds(
    case: Case, max_grad_norm: float | None, stock_steps: list, device: torch.device
) -> None:
    """Complex parameters go to torch's step, their neighbours in the same groups do not."""
    if not case.takes_complex:
        pytest.skip("complex parameters are refused (test_adafactor)")

    def groups(params: Sequence[Tensor]) -> list[dict[str, Any]]:
        return [{"params": params[:3]}, {"params": params[3:], **usual(case, lr=0.02, weight_decay=0.3)}]

    a, b = make_params(SHAPES, device)
    z, w = complex_params(device)
    ours, stock, copies = twins(case, [a, z, with_gaps(b), w], usual(case), groups, max_grad_norm=max_grad_norm)
    for step in range(4):
        for optimizer in (ours, stock):
            optimizer.zero_grad()
            set_complex_grads(params_of(optimizer), step)
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


@each(with_flags({"foreach": None}, {"foreach": True}), QUICK)
def test_kind_changes_between_steps(case: Case, kwargs: dict, device: torch.device) -> None:
    """A parameter moves between a bucket and torch's step, and back, with its state."""
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case))
    ours.param_groups[0].update(kwargs)
    train([ours, stock], 1)
    flags = [("foreach", True), ("foreach", None), ("fused", False), ("fused", None)]
    for step, (name, value) in enumerate(((name, value) for name, value in flags if case.has(name)), 1):
        ours.param_groups[0][name] = value
        train([ours, stock], 1, first=step)
    assert_same(ours, stock)


# what torch takes and kernels do not


@each(
    with_flags({}, {"weight_decay": 0.1}, {"maximize": True}, {"amsgrad": True}, {"centered": True}, {"foreach": True}),
    QUICK,
)
def test_complex_parameters(case: Case, kwargs: dict, device: torch.device) -> None:
    if not case.takes_complex:
        pytest.skip("complex parameters are refused (test_adafactor)")
    params = complex_params(device)
    ours, stock = (make(copy.deepcopy(params), **usual(case, **kwargs)) for make in builders(case))
    for step in range(3):
        for optimizer in (ours, stock):
            set_complex_grads(params_of(optimizer), step)
            optimizer.step()
    for a, b in zip(params_of(ours), params_of(stock), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(ours.state.get(a, {}), stock.state.get(b, {}), rtol=0, atol=0)
    assert all("complex64" in reason or "foreach" in reason for reason in reasons(ours))


@each(with_flags({"fused": True}), QUICK)
def test_fused_with_complex_parameters_fails_as_in_stock(case: Case, kwargs: dict, device: torch.device) -> None:
    messages = []
    for make in builders(case):
        params = complex_params(device)
        before = [param.detach().clone() for param in params]
        optimizer = make(params, **kwargs)
        for param in params:
            param.grad = torch.ones_like(param)
        with pytest.raises(RuntimeError) as error:
            optimizer.step()
        messages.append(str(error.value))
        assert all(map(torch.equal, params, before))
    assert messages[0] == messages[1]


#: Torch's steps that take sparse gradients, with arguments.
SPARSE: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "dampening": 0.5, "maximize": True}),
    ("adagrad", {}),
    ("adagrad", {"lr_decay": 0.5, "initial_accumulator_value": 0.1, "maximize": True}),
]
takes_sparse = {name for name, _ in SPARSE}


def sparse_backward(embedding: nn.Embedding, step: int) -> None:
    """With an index that comes twice."""
    rows = torch.tensor([1, 1, 2, step % 4], device=embedding.weight.device)
    (embedding(rows) * torch.arange(1.0, 5.0, device=rows.device)[:, None]).sum().backward()


@interpreted
@pytest.mark.parametrize("max_grad_norm", [None, 0.5], ids=["plain", "clipped"])
@pytest.mark.parametrize(("name", "kwargs"), SPARSE, ids=str)
def test_sparse_gradients(
    name: str, kwargs: dict, max_grad_norm: float | None, stock_steps: list, device: torch.device
) -> None:
    """They go to torch's step, dense ones beside them do not."""
    case = BY_NAME[name]
    models, optimizers = [], []
    for make in (case.cls, case.stock):
        torch.manual_seed(0)
        embedding = nn.Embedding(4, 3, sparse=True).to(device)
        dense = make_params(SHAPES, device)
        ours = {"max_grad_norm": max_grad_norm} if make is case.cls else {}
        models.append((embedding, dense))
        optimizers.append(make([*dense, *embedding.parameters()], lr=0.1, **kwargs, **ours))
    for step in range(3):
        for (embedding, dense), optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            sparse_backward(embedding, step)
            set_grads(dense, step)
            if max_grad_norm is not None and optimizer is optimizers[1]:
                # torch's clip_grad_norm_ fails at sparse gradients
                embedding.weight.grad = embedding.weight.grad.coalesce()
                grads = [embedding.weight.grad.values(), *(param.grad for param in dense)]
                norm = torch.linalg.vector_norm(torch.stack([*map(torch.linalg.vector_norm, grads)]))
                for grad in grads:
                    grad.mul_((max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
            sparse = embedding.weight.grad
            optimizer.step()
            assert embedding.weight.grad is sparse
        if max_grad_norm is not None:
            torch.testing.assert_close(optimizers[0].grad_norm, norm)
    (embedding, _), (twin, _) = models
    if max_grad_norm is None:
        assert torch.equal(embedding.weight, twin.weight)
    for a, b in zip(*map(params_of, optimizers), strict=True):
        torch.testing.assert_close(a, b, **CLOSE[torch.float32])
        mine, theirs = (optimizer.state.get(p, {}) for optimizer, p in zip(optimizers, (a, b), strict=True))
        # a momentum of sparse gradients is sparse
        states = [{name: value.to_dense() for name, value in state.items()} for state in (mine, theirs)]
        torch.testing.assert_close(*states, **CLOSE[torch.float32])
    assert all(len(call) == 1 and call[0] is embedding.weight for call in stock_steps)
    assert len(stock_steps) == 3
    assert "gradient is sparse" in reasons(optimizers[0])


@pytest.mark.parametrize("max_grad_norm", [None, 0.5], ids=["plain", "clipped"])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "mixed"])
@each_case
def test_sparse_gradients_fail_as_in_stock(
    case: Case, alone: bool, max_grad_norm: float | None, device: torch.device
) -> None:
    # SGD and Adagrad take them, but not with a weight decay
    kwargs = usual(case, weight_decay=0.1 if case.name in takes_sparse else 0.0)
    errors = []
    for make in builders(case):
        dense = make_params([] if alone else SHAPES, device)
        embedding = nn.Embedding(4, 3, sparse=True).to(device)
        params = [*dense, *embedding.parameters()]
        optimizer = make(params, **kwargs)
        if isinstance(optimizer, case.cls):
            optimizer.max_grad_norm = max_grad_norm
        train([optimizer], 1)
        before = copy.deepcopy([params, optimizer.state_dict()])
        optimizer.zero_grad()
        sparse_backward(embedding, 0)
        set_grads(dense, 1)
        sparse = embedding.weight.grad
        with pytest.raises(Exception) as error:
            optimizer.step()
        errors.append((error.type, str(error.value)))
        assert embedding.weight.grad is sparse
        if isinstance(optimizer, case.cls):
            # stock has stepped the groups before it
            if case.name == "adagrad":
                # torch's counts before it raises
                before[1]["state"][len(dense)]["step"] += 1
            torch.testing.assert_close([params, optimizer.state_dict()], before, rtol=0, atol=0)
        # and on, as if nothing had been
        train([optimizer], 1, first=1)
    if case.is_torchs:
        assert errors[0] == errors[1]
    else:
        assert errors[0] == (RuntimeError, f"{case.cls.__name__} does not support sparse gradients")


#: Torch's loops that take no tensor lr with a gradient.
LR_IS_A_NUMBER = ("rmsprop", "adagrad", "adadelta", "adamax")


@each(with_flags({"differentiable": True}), QUICK)
def test_gradients_flow_through_a_differentiable_step(case: Case, kwargs: dict, device: torch.device) -> None:
    results = []
    if case.name == "sgd":
        # what torch takes on a GPU otherwise needs an lr that is a number
        kwargs = {**kwargs, "foreach": False}
    for make in builders(case):
        lr = torch.tensor(0.1, device=device, requires_grad=True)
        (leaf,) = make_params([(5,)], device)
        param = leaf.clone()
        # as torch's own tests do: a parameter that is no leaf, with a gradient that has a history
        param.grad = leaf.square() + 1
        param.retain_grad()
        optimizer = make([param], **usual(case, **kwargs))
        if case.name not in LR_IS_A_NUMBER:
            optimizer.param_groups[0]["lr"] = lr
        # as after some steps; NAdam's and ASGD's other scalars are numbers below 1
        optimizer.state[param].update(
            {name: torch.tensor(2.0 if name == "step" else 0.5) for name in case.cls.rule.scalars}
        )
        state = torch.rand(5, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        for name in case.state_names(**usual(case)):
            optimizer.state[param][name] = state.square() + 0.1
        optimizer.step()
        param.sum().backward()
        results.append([param.detach(), leaf.grad, state.grad, lr.grad])
        assert all(tensor.abs().sum() > 0 for tensor in results[-1][:2])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@each(with_flags({"capturable": True}, {"capturable": True, "fused": True}), QUICK)
def test_capturable_on_a_cpu(case: Case, kwargs: dict) -> None:
    """Torch's loops refuse it, its fused step does not."""
    outcomes: list[Any] = []
    for make in builders(case):
        optimizer = make(make_params(SHAPES), **usual(case, **kwargs))
        set_grads(params_of(optimizer), 0)
        try:
            optimizer.step()
            outcomes.append([param.detach() for param in params_of(optimizer)])
        except Exception as error:
            outcomes.append((type(error), str(error)))
    if case.is_torchs and "fused" not in kwargs:
        assert outcomes[0] == outcomes[1]
        assert outcomes[0][0] is AssertionError
    else:
        torch.testing.assert_close(*outcomes, **CLOSE[torch.float32])


@interpreted
@pytest.mark.parametrize(
    "case", [c for c in CASES if not (c.is_torchs and c.has("capturable"))], ids=lambda case: case.name
)
def test_capturable_where_torch_has_none(case: Case, stock_steps: list, device: torch.device) -> None:
    """It is for CUDA graphs, and changes nothing elsewhere; the groups do not tell."""
    ours, stock, _ = twins(case, make_params(SHAPES, device), usual(case), capturable=True)
    train([ours, stock], 3)
    assert_same(ours, stock)
    assert ours.capturable
    assert "capturable" not in ours.param_groups[0]
    assert stock_steps == []


@pytest.mark.parametrize("max_grad_norm", [None, 0.5], ids=["plain", "clipped"])
@each_case
def test_tensor_subclasses(case: Case, max_grad_norm: float | None, stock_steps: list) -> None:
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    ours, stock, copies = twins(case, make_params(SHAPES), usual(case))
    first, second = params_of(ours)
    wrapped = Parameter(two_tensor(second.detach().clone(), second.detach().clone()))
    ours = case.cls([first, wrapped], **usual(case), max_grad_norm=max_grad_norm)
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


@each_case
def test_harmless_subclasses_stay_with_the_kernels(case: Case, stock_steps: list, device: torch.device) -> None:
    (param,) = make_params([(5,)], device)
    harmless = Parameter(param.detach().clone().as_subclass(_Renamed))
    ours = case.cls([harmless], **usual(case))
    stock = loop(case, [param], **usual(case))
    for step in range(2):
        set_grads([param], step)
        harmless.grad = param.grad.clone()
        ours.step()
        stock.step()
    torch.testing.assert_close(harmless.detach().as_subclass(Tensor), param.detach(), **CLOSE[torch.float32])
    assert stock_steps == []


def step_twice(optimizer: Optimizer) -> list[dict[str, Any]] | tuple[type, str]:
    """The states after it, or the error."""
    try:
        for _ in range(2):
            for param in params_of(optimizer):
                param.grad = torch.ones_like(param)
            optimizer.step()
    except Exception as error:
        return type(error), str(error)
    return [
        {name: (value.shape, value.dtype, value.device) for name, value in optimizer.state.get(param, {}).items()}
        for param in params_of(optimizer)
    ]


@each_case
def test_meta_parameters(case: Case, stock_steps: list) -> None:
    ours, stock = (make(make_params(SHAPES, "meta"), **usual(case)) for make in builders(case))
    assert step_twice(ours) == step_twice(stock)
    assert stock_steps
    assert reasons(ours) == ["no kernels for meta devices"]


@each_case
def test_fake_tensors(case: Case) -> None:
    """Tools that trace a training step, or estimate its memory, step on tensors without memory."""
    from torch._subclasses import FakeTensorMode

    states = []
    for make in builders(case):
        with FakeTensorMode():
            optimizer = make([Parameter(torch.randn(shape)) for shape in SHAPES], **usual(case))
            states.append(step_twice(optimizer))
    assert states[0] == states[1]


@pytest.mark.parametrize("name", ["lion", "lamb"])
def test_lr_of_one_element_in_a_loop_of_our_own(name: str, device: torch.device) -> None:
    """On the CPU, of one dimension: operators take it for a number on any device, and scalars keep their shape."""
    case = BY_NAME[name]
    results = []
    for lr in (0.1, torch.tensor([0.1])):
        params = [*make_leftovers(case, [(3,), ()], device), *make_params([(3,), ()], device)]
        optimizer = loop(case, params, lr=lr, weight_decay=0.1)
        train([optimizer], 2)
        results.append([p.detach() for p in params])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@each(with_flags({}), QUICK)
def test_a_copy_falls_back_too(case: Case, kwargs: dict, copied: Callable[[Any], Any], device: torch.device) -> None:
    """Torch's Adafactor asks its groups for a capturable that they do not have, once it is a copy."""
    optimizer = case.cls(make_params(SHAPES, device), **usual(case))
    group = optimizer.param_groups[0]
    if case.is_torchs:
        group["foreach"] = False
    optimizer = copied(optimizer)
    train([optimizer], 2)
    assert all(param.isfinite().all() for param in params_of(optimizer))


# triton that is missing or does not work


def break_kernels(
    monkeypatch: pytest.MonkeyPatch, case: Case, error: Exception, dtype: torch.dtype | None = None
) -> None:
    """Let the update of parameters of ``dtype`` (default: of all) fail to compile."""
    from optimx._engine.triton import BUCKETS

    bucket = BUCKETS[case.cls.rule.walk]
    launch = bucket._launch_update

    def launch_update(self: Any, control: Tensor | None, warmup: bool) -> Any:
        if dtype in (None, self.key.dtypes[0]):
            raise error
        return launch(self, control, warmup)

    monkeypatch.setattr(bucket, "_launch_update", launch_update)


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
    monkeypatch.setattr(backends, "strict", False)
    optimizer, stock, copies = twins(case, make_params(SHAPES, triton_backend), usual(case), **ours)

    def step_both(step: int) -> None:
        for one in (optimizer, stock):
            set_grads(params_of(one), step)
        if ours:
            nn.utils.clip_grad_norm_(copies, 0.5)
        optimizer.step()
        stock.step()

    for step in range(good_steps):
        step_both(step)
    assert stock_steps == []
    break_kernels(monkeypatch, case, ValueError("no such instruction"))
    # a kernel that was compiled before can only fail anew where another variant is needed
    optimizer._engine.plans.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(good_steps, good_steps + 3):
            step_both(step)
        # others of the same kernels learn it too, silently
        other = case.cls(make_params(SHAPES, triton_backend), **usual(case))
        train([other], 1)
    (warning,) = [each for each in caught if issubclass(each.category, RuntimeWarning)]
    assert "ValueError: no such instruction" in str(warning.message)
    assert_same(optimizer, stock)
    assert len(stock_steps) == 4
    assert "no such instruction" in reasons(optimizer)[0]


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(torch.OutOfMemoryError("no memory"), id="memory"),
        pytest.param(AssertionError("ours"), id="ours"),
        pytest.param(torch.AcceleratorError("CUDA error: an illegal memory access"), id="device"),
        pytest.param(RuntimeError("called a synchronizing CUDA operation"), id="wait"),
    ],
)
@each_case
def test_errors_that_are_not_tritons(
    case: Case, error: Exception, monkeypatch: pytest.MonkeyPatch, triton_backend: torch.device
) -> None:
    """They come through, nothing has changed, and the next step is a whole one."""
    monkeypatch.setattr(backends, "strict", False)
    ours, stock, _ = twins(case, make_params(SHAPES, triton_backend), usual(case))
    train([ours, stock], 1)
    before = copy.deepcopy([params_of(ours), ours.state_dict()])
    set_grads(params_of(ours), 1)
    with monkeypatch.context() as patch:
        break_kernels(patch, case, error)
        ours._engine.plans.clear()
        with pytest.raises(type(error)):
            ours.step()
    torch.testing.assert_close([params_of(ours), ours.state_dict()], before, rtol=0, atol=0)
    train([ours, stock], 2, first=1)
    assert_same(ours, stock)


@each_case
def test_one_broken_kernel_leaves_the_others(
    case: Case, monkeypatch: pytest.MonkeyPatch, triton_backend: torch.device, stock_steps: list
) -> None:
    """float32 parameters have kernels of their own, which do not compile; float64 ones stay on Triton."""
    monkeypatch.setattr(backends, "strict", False)
    break_kernels(monkeypatch, case, ValueError("no such instruction"), torch.float32)
    params = [*make_params(SHAPES, triton_backend), *make_params(SHAPES, triton_backend, torch.float64)]
    ours, stock, _ = twins(case, params, usual(case))
    told = rf"2 tensors of {case.cls.__name__} \(float32 on {triton_backend}"
    with pytest.warns(RuntimeWarning, match=told) as caught:
        train([ours, stock], 3)
    assert len(caught) == 1
    # NAdam's float64 step has the exact product of its momenta
    assert_same(ours, stock, CLOSE[torch.float32])
    assert [[p.dtype for p in call] for call in stock_steps] == [[torch.float32] * 2] * 3
    rows = optimx.explain(ours).rows
    assert {(row.backend, *row.dtypes[:1], "no such instruction" in row.reason) for row in rows} == {
        ("torch", "float32", True),
        ("triton", "float64", False),
    }


@each_case
def test_triton_is_missing(
    case: Case, monkeypatch: pytest.MonkeyPatch, triton_backend: torch.device, stock_steps: list
) -> None:
    monkeypatch.setattr(backends, "_triton_missing", lambda: "triton is not installed")
    ours, stock, _ = twins(case, make_params(SHAPES, triton_backend), usual(case))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train([ours, stock], 2)
    assert_same(ours, stock)
    assert len(stock_steps) == 2
    assert reasons(ours) == ["triton is not installed"]


@pytest.mark.skipif(INTERPRETED, reason="about the native kernels")
@each_case_and_walk
def test_cpu_needs_no_triton(case: Case, monkeypatch: pytest.MonkeyPatch, stock_steps: list) -> None:
    monkeypatch.setattr(backends, "_triton_missing", lambda: "triton is not installed")
    ours, stock, _ = twins(case, make_params(SHAPES), usual(case), max_grad_norm=1e9)
    train([ours, stock], 2)
    assert_same(ours, stock)
    assert stock_steps == []


@each(with_flags({"foreach": True}), QUICK)
def test_step_overridden_by_a_user(case: Case, kwargs: dict, device: torch.device) -> None:
    """Torch runs the hooks of such a class twice, at each of the two steps; ours are no more and no fewer."""
    logs = []
    for base in (case.stock, case.cls):
        log: list[str] = []

        class Mine(base):  # type: ignore[misc, valid-type]
            def step(self, closure: Callable[[], Any] | None = None) -> Any:
                log.append("mine")  # noqa: B023
                return super().step(closure)

        base(make_params(SHAPES, device))
        mine = Mine(make_params(SHAPES, device), **kwargs)
        mine.register_step_pre_hook(lambda *_: log.append("hook"))  # noqa: B023
        train([mine], 1)
        logs.append(log)
    assert logs[0] == logs[1]
