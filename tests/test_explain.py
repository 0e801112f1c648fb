"""``optimx.explain``: what goes where and why, before the first step, without touching anything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import optimx
from tests.cases import CASES, Case, make_params, set_grads, train
from tests.conftest import INTERPRETED

pytestmark = pytest.mark.interpreted

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def fast(device: torch.device) -> str:
    return "native" if device.type == "cpu" and not INTERPRETED else "triton"


def test_all_groups_share_one_row(device: torch.device) -> None:
    params = make_params([(5,), (3, 4), ()], device)
    optimizer = optimx.AdamW([{"params": params[:1]}, {"params": params[1:], "lr": 0.5, "weight_decay": 0.0}])
    explanation = optimx.explain(optimizer)
    (row,) = explanation.rows
    assert explanation.optimizer == "AdamW"
    assert (row.backend, row.tensors, row.elements, row.groups) == (fast(device), 3, 18, 2)
    assert torch.device(row.device).type == device.type
    assert row.dtypes == ("float32",) * 4
    assert row.reason == ""


def test_a_row_for_every_launch(device: torch.device) -> None:
    """Other dtypes, other kernel variants, and torch's own step with its reasons."""
    params = [
        Parameter(torch.ones(8, device=device)),
        Parameter(torch.ones(8, device=device, dtype=torch.bfloat16)),
        Parameter(torch.ones(8, device=device, dtype=torch.complex64)),
        Parameter(torch.ones(16, device=device)[::2]),
        Parameter(torch.ones(9, device=device)[1:]),
    ]
    optimizer = optimx.Adam([{"params": params}, {"params": make_params([(8,)], device), "amsgrad": True}])
    explained = optimx.explain(optimizer).rows
    assert sum(row.tensors for row in explained) == 6
    # misaligned tensors are another launch of the kernels, with the same words
    rows = {(row.backend, row.dtypes, row.reason): row for row in explained}
    backend = fast(device)
    assert rows["torch", ("complex64",), "parameter is complex64"].tensors == 1
    assert rows["torch", ("float32",), "parameter's memory has gaps or overlaps"].elements == 8
    assert rows[backend, ("bfloat16",) * 4, ""].tensors == 1
    assert (backend, ("float32",) * 5, "") in rows
    assert (backend, ("float32",) * 4, "") in rows


@each_case
def test_agrees_with_the_step(case: Case, device: torch.device) -> None:
    """Before the first step it tells what the step will do."""
    params = [*make_params([(5,), (3, 4)], device), *make_params([(6,)], device, torch.float64)]
    params.append(Parameter(torch.ones(3, dtype=torch.complex64, device=device)))
    optimizer = case.cls(params)
    before = optimx.explain(optimizer)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    (plan,) = optimizer._plans
    assert [(row.backend, row.tensors) for row in before.rows if not row.reason] == [
        (bucket.key.backend, len(bucket.params)) for bucket in plan.buckets
    ]
    assert [row.tensors for row in before.rows if row.reason] == [len(plan.leftovers)]
    assert optimx.explain(optimizer) == before


@each_case
def test_changes_nothing(case: Case, device: torch.device) -> None:
    params = make_params([(5,), (3, 4)], device)
    optimizer = case.cls(params)
    optimx.explain(optimizer)
    assert len(optimizer.state) == 0
    assert optimizer._plans == []
    set_grads(params, 0, skip=[1])
    optimizer.step()
    keys = [*optimizer.state]
    versions = [value._version for value in optimizer.state[params[0]].values()]
    plans = list(optimizer._plans)
    optimx.explain(optimizer)
    assert [*optimizer.state] == keys
    assert [value._version for value in optimizer.state[params[0]].values()] == versions
    assert optimizer._plans == plans
    assert params[1].grad is None


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda group, state: group.update(foreach=True), "asked for: foreach=True"),
        (lambda group, state: group.update(foreach=False), "asked for: foreach=False"),
        (lambda group, state: group.update(fused=False), "asked for: fused=False"),
        (lambda group, state: state.update(exp_avg=torch.ones(2)), "a state differs from the parameter"),
        (lambda group, state: state.update(exp_avg=3.0), "a state is not a plain floating-point tensor"),
        (lambda group, state: state.update(exp_avg=state["exp_avg"].double()), "float64 gradient or state"),
    ],
    ids=["foreach", "no_foreach", "not_fused", "shape", "type", "dtype"],
)
def test_reasons(edit, reason: str, device: torch.device) -> None:
    (param,) = params = make_params([(5,)], device)
    optimizer = CASES[0].cls(params)
    train([optimizer], 1)
    edit(optimizer.param_groups[0], optimizer.state[param])
    (row,) = optimx.explain(optimizer).rows
    assert row.backend == "torch"
    assert reason in row.reason


def test_capturable_on_a_cpu_is_torchs() -> None:
    (row,) = optimx.explain(optimx.AdamW(make_params([(5,)]), capturable=True)).rows
    assert (row.backend, row.reason) == ("torch", "capturable=True on a CPU")


def test_sparse_gradient(device: torch.device) -> None:
    (param,) = params = make_params([(5, 2)], device)
    param.grad = torch.ones(5, 2, device=device).to_sparse(1)
    (row,) = optimx.explain(optimx.AdamW(params)).rows
    assert (row.backend, row.reason) == ("torch", "gradient is sparse")


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adagrad"])
def test_stock_optimizers(name: str, device: torch.device) -> None:
    optimizer = getattr(torch.optim, name)(make_params([(5,), (3, 4)], device), lr=0.1)
    explanation = optimx.explain(optimizer)
    (row,) = explanation.rows
    assert (row.backend, row.tensors, row.elements) == ("torch", 2, 17)
    assert row.reason == f"{name} is not an optimx optimizer"
    assert row.reason in str(explanation)


def many_kinds(device: torch.device) -> list[Tensor]:
    params = make_params([(50, 70), (9,)], device)
    half = make_params([(50, 70), (9,)], device, torch.bfloat16)
    return [*params, *half, Parameter(torch.ones(3, dtype=torch.complex64, device=device))]


@pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "stepped"])
@each_case
def test_prints_a_table(case: Case, stepped: bool, device: torch.device) -> None:
    params = many_kinds(device)
    optimizer = case.cls(params)
    if stepped:
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    lines = str(optimx.explain(optimizer)).splitlines()
    assert all(len(line) <= 80 and line == line.rstrip() for line in lines)
    assert lines[0] == case.cls.__name__
    assert lines[1].split() == ["backend", "tensors", "elements", "groups", "device", "dtypes"]
    assert lines[2].split()[:4] == [fast(device), "2", "3,509", "1"]
    assert lines[-1] == "  because: parameter is complex64"
    # numbers end in one column
    ends = [line.index(word) + len(word) for line, word in zip(lines[1:3], ("elements", "3,509"), strict=True)]
    assert ends[0] == ends[1]


def test_mixed_dtypes_fit_too(device: torch.device) -> None:
    (param,) = params = make_params([(300,)], device, torch.bfloat16)
    optimizer = optimx.AdamW(params)
    optimizer.state[param].update({name: torch.zeros(300, device=device) for name in ("exp_avg", "exp_avg_sq")})
    text = str(optimx.explain(optimizer))
    assert "bfloat16" in text
    assert "state float32" in text
    assert max(map(len, text.splitlines())) <= 80
