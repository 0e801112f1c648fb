"""``optimx.explain``: what goes where and why, before the first step, without touching anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import optimx
from tests.cases import BY_NAME, CASES, Case, make_leftovers, make_params, set_grads, train
from tests.conftest import INTERPRETED
from tests.engine import each_case, interpreted, usual


def fast(device: torch.device) -> str:
    return "native" if device.type == "cpu" and not INTERPRETED else "triton"


@each_case
def test_all_groups_share_one_row(case: Case, device: torch.device) -> None:
    # a matrix is another kernel variant of Adafactor
    params = make_params([(5,), (12,) if case.name == "adafactor" else (3, 4), ()], device)
    optimizer = case.cls([{"params": params[:1]}, {"params": params[1:], **case.other}], **usual(case))
    explanation = optimx.explain(optimizer)
    (row,) = explanation.rows
    assert explanation.optimizer == case.cls.__name__
    assert (row.backend, row.tensors, row.elements, row.groups) == (fast(device), 3, 18, 2)
    assert torch.device(row.device).type == device.type
    assert row.dtypes == ("float32",) * (2 + len(case.state_names(**usual(case))))
    assert row.reason == ""


#: Arguments that make a kernel variant of their own.
STRUCTURES = [
    ("adam", {"amsgrad": True}),
    ("adamw", {"amsgrad": True}),
    ("sgd", {"momentum": 0.9}),
    ("rmsprop", {"momentum": 0.9}),
    ("rmsprop", {"centered": True}),
    ("rmsprop", {"centered": True, "momentum": 0.9}),
]


@interpreted
@pytest.mark.parametrize(("name", "kwargs"), STRUCTURES, ids=str)
def test_a_row_for_every_launch(name: str, kwargs: dict, device: torch.device) -> None:
    """Other dtypes, other kernel variants, and torch's own step with its reasons."""
    case = BY_NAME[name]
    params = [
        Parameter(torch.ones(8, device=device)),
        Parameter(torch.ones(8, device=device, dtype=torch.bfloat16)),
        Parameter(torch.ones(8, device=device, dtype=torch.complex64)),
        Parameter(torch.ones(16, device=device)[::2]),
        Parameter(torch.ones(9, device=device)[1:]),
    ]
    optimizer = case.cls([{"params": params}, {"params": make_params([(8,)], device), **kwargs}])
    explained = optimx.explain(optimizer).rows
    assert sum(row.tensors for row in explained) == 6
    rows = {(row.backend, row.dtypes, row.reason): row for row in explained}
    assert len(rows) == len(explained)
    backend = fast(device)
    assert rows["torch", ("complex64",), "parameter is complex64"].tensors == 1
    assert rows["torch", ("float32",), "parameter's memory has gaps or overlaps"].elements == 8
    plain, variant = (2 + len(case.state_names(**settings)) for settings in ({}, kwargs))
    assert plain < variant
    assert rows[backend, ("bfloat16",) * plain, ""].tensors == 1
    # misaligned or not
    assert rows[backend, ("float32",) * plain, ""].tensors == 2
    assert (backend, ("float32",) * variant, "") in rows


@interpreted
def test_sgds_first_step_is_a_launch_of_its_own(device: torch.device) -> None:
    """With dampening: a parameter whose gradient comes later joins the others from its second step on."""
    params = make_params([(5,), (3, 4)], device)
    optimizer = optimx.SGD(params, momentum=0.9, dampening=0.5)
    assert len(optimx.explain(optimizer).rows) == 1
    for step, launches in enumerate([2, 1]):
        set_grads(params, step, skip=[1 - step])
        optimizer.step()
        explained = optimx.explain(optimizer).rows
        assert [row.backend for row in explained] == [fast(device)] * launches


@each_case
def test_agrees_with_the_step(case: Case, device: torch.device) -> None:
    """Before the first step it tells what the step will do."""
    params = [*make_params([(5,), (3, 4)], device), *make_params([(6,)], device, torch.float64)]
    params += make_leftovers(case, [(3,)], device)
    optimizer = case.cls(params, **usual(case))
    before = optimx.explain(optimizer)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    (plan,) = optimizer._engine.plans
    assert [(row.backend, row.tensors) for row in before.rows if not row.reason] == [
        (bucket.key.backend, len(bucket.positions)) for bucket in plan.buckets
    ]
    assert [row.tensors for row in before.rows if row.reason] == [len(plan.leftovers)]
    assert optimx.explain(optimizer) == before


@each_case
def test_changes_nothing(case: Case, device: torch.device) -> None:
    params = make_params([(5,), (3, 4)], device)
    optimizer = case.cls(params, **usual(case))
    keys = [*optimizer.state]
    optimx.explain(optimizer)
    assert [*optimizer.state] == keys
    assert optimizer._engine.plans == []
    set_grads(params, 0, skip=[1])
    optimizer.step()
    states = [
        (param, dict(state), [value._version for value in state.values()]) for param, state in optimizer.state.items()
    ]
    plans = list(optimizer._engine.plans)
    optimx.explain(optimizer)
    assert [*optimizer.state] == [param for param, _, _ in states]
    for param, state, versions in states:
        assert optimizer.state[param].keys() == state.keys()
        assert all(optimizer.state[param][name] is value for name, value in state.items())
        assert [value._version for value in state.values()] == versions
    assert optimizer._engine.plans == plans
    assert params[1].grad is None


def _state(new: Callable[[Tensor], Any]) -> Callable[[dict, dict], None]:
    """Replace the first state of the parameter's shape."""

    def replace(group: dict, state: dict) -> None:
        name = next(name for name, value in state.items() if value.dim())
        state[name] = new(state[name])

    return replace


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda group, state: group.update(foreach=True), "asked for: foreach=True"),
        (lambda group, state: group.update(foreach=False), "asked for: foreach=False"),
        (lambda group, state: group.update(fused=False), "asked for: fused=False"),
        (lambda group, state: group.update(differentiable=True), "asked for: differentiable=True"),
        (_state(lambda value: torch.ones(2)), "a state differs from the parameter"),
        (_state(lambda value: 3.0), "a state is not a plain floating-point tensor"),
        (_state(lambda value: value.double()), "float64 gradient or state"),
    ],
    ids=["foreach", "no_foreach", "not_fused", "differentiable", "shape", "type", "dtype"],
)
@each_case
def test_reasons(case: Case, edit: Callable[[dict, dict], None], reason: str, device: torch.device) -> None:
    (param,) = params = make_params([(5,)], device)
    optimizer = case.cls(params, **usual(case))
    train([optimizer], 1)
    edit(optimizer.param_groups[0], optimizer.state[param])
    (row,) = optimx.explain(optimizer).rows
    assert row.backend == "torch"
    assert reason in row.reason


@interpreted
@pytest.mark.parametrize(
    ("name", "count"), [(case.name, count) for case in CASES for count in case.cls.rule.scalars[1:]], ids=str
)
def test_scalar_states_of_two_dtypes(name: str, count: str, device: torch.device) -> None:
    case = BY_NAME[name]
    (param,) = params = make_params([(5,)], device)
    optimizer = case.cls(params)
    train([optimizer], 1)
    state = optimizer.state[param]
    state[count] = state[count].double()
    (row,) = optimx.explain(optimizer).rows
    assert row.backend == "torch"
    assert " and ".join(case.cls.rule.scalars) in row.reason
    assert "float64" in row.reason


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_capturable_on_a_cpu(case: Case) -> None:
    """Torch's classes that know the word refuse; to the others it is ours, and says nothing about a CPU."""
    optimizer = case.cls(make_params([(5,)]), capturable=True)
    (row,) = optimx.explain(optimizer).rows
    refused = "capturable" in optimizer.defaults
    assert refused == (case.is_torchs and case.has("capturable"))
    assert (row.backend, row.reason) == (
        ("torch", "capturable=True on a CPU") if refused else (fast(torch.device("cpu")), "")
    )


@each_case
def test_sparse_gradient(case: Case, device: torch.device) -> None:
    (param,) = params = make_params([(5, 2)], device)
    param.grad = torch.ones(5, 2, device=device).to_sparse(1)
    (row,) = optimx.explain(case.cls(params)).rows
    assert (row.backend, row.reason) == ("torch", "gradient is sparse")


@interpreted
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adagrad", "Adafactor"])
def test_stock_optimizers(name: str, device: torch.device) -> None:
    optimizer = getattr(torch.optim, name)(make_params([(5,), (3, 4)], device), lr=0.1)
    explanation = optimx.explain(optimizer)
    (row,) = explanation.rows
    assert (row.backend, row.tensors, row.elements) == ("torch", 2, 17)
    assert row.reason == f"{name} is not an optimx optimizer"
    assert row.reason in str(explanation)


def many_kinds(case: Case, device: torch.device) -> list[Tensor]:
    params = make_params([(1400,), (9,)], device)
    half = make_params([(1400,), (9,)], device, torch.bfloat16)
    return [*params, *half, *make_leftovers(case, [(3,)], device)]


@pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "stepped"])
@each_case
def test_prints_a_table(case: Case, stepped: bool, device: torch.device) -> None:
    params = many_kinds(case, device)
    optimizer = case.cls(params, **usual(case))
    if stepped:
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    lines = str(optimx.explain(optimizer)).splitlines()
    assert all(len(line) <= 80 and line == line.rstrip() for line in lines)
    assert lines[0] == case.cls.__name__
    assert lines[1].split() == ["backend", "tensors", "elements", "groups", "device", "dtypes"]
    assert lines[2].split()[:4] == [fast(device), "2", "1,409", "1"]
    reason = "parameter is complex64" if case.takes_complex else "parameter's memory has gaps or overlaps"
    assert f"  because: {reason}" in lines
    assert lines[-1].startswith("scratch memory of a step: ")
    # numbers end in one column
    ends = [line.index(word) + len(word) for line, word in zip(lines[1:3], ("elements", "1,409"), strict=True)]
    assert ends[0] == ends[1]


@each_case
def test_mixed_dtypes_fit_too(case: Case, device: torch.device) -> None:
    (param,) = params = make_params([(300,)], device, torch.bfloat16)
    optimizer = case.cls(params, **usual(case))
    names = case.state_names(**usual(case))
    optimizer.state[param].update({name: torch.zeros(300, device=device) for name in names})
    text = str(optimx.explain(optimizer))
    assert "bfloat16" in text
    assert "state float32" in text
    assert max(map(len, text.splitlines())) <= 80


@interpreted
def test_tells_what_memory_is_taken(device: torch.device) -> None:
    """As :func:`optimx.memory` does, in lines that fit; of torch's classes nothing."""
    params = make_params([(64, 128), (5,)], device, torch.bfloat16)
    optimizer = optimx.AdamW(params, state_dtype="stochastic")
    found = optimx.explain(optimizer)
    assert found.memory == optimx.memory(optimizer)
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 80
    start = lines.index("bytes a parameter")
    assert lines[start + 1].split()[:6] == ["optimizer", "elements", "param", "grad", "state", "scratch"]
    assert ["AdamW", "8,197", "2", "2", "4"] in [line.split()[:5] for line in lines[start:]]
    assert optimx.explain(torch.optim.AdamW(params)).memory is None


@interpreted
def test_each_member_of_a_composite_has_its_own_memory(device: torch.device) -> None:
    a, b, c = (make_params([(64, 128)], device) for _ in range(3))
    members = {"first": optimx.AdamW(a), "second": optimx.Lion(b), "third": torch.optim.SGD(c)}
    found = optimx.explain(optimx.Composite(members))
    assert found.memory is None
    assert [None if each.memory is None else each.memory.total for each in found.members] == [
        optimx.memory(members["first"]).total, optimx.memory(members["second"]).total, None,
    ]  # fmt: skip
    assert str(found).count("bytes a parameter") == 2
