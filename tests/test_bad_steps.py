"""Steps that are not taken, and clipping to a norm that is found: beside loops on lists of numbers."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import optimx
from optimx._engine import backends
from optimx._engine.guards import COUNTERS, Rules
from tests.cases import CASES, Case, assert_same, make_params, set_grads
from tests.engine import QUICK, each_case_thinly, each_of, interpreted, params_of, usual
from tests.reference import guards as reference

NAN, INF = math.nan, math.inf

each_case = each_of(CASES, QUICK)


def norms(n: int = 400) -> list[float]:
    """Skewed ones, with spikes alone and together, NaN and infinity, zeros, and other levels."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, dtype=torch.float64, generator=generator).mul(0.4).exp().tolist()
    for i, level in enumerate([1.0] * 200 + [30.0] * 100 + [0.3] * 100):
        values[i] *= level
    for i, value in {0: NAN, 20: 0.0, 90: 500.0, 91: INF, 92: 900.0, 130: NAN, 150: 1e-6, 370: INF, 371: 1e4}.items():
        values[i] = value
    return values[:n]


def judged(
    rules: Rules, values: Iterable[float], state: dict[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """``control`` of each step, float64 ``[n, 3]``, and what is remembered."""
    found = []
    for norm in values:
        control = torch.tensor([norm, 1.0, 0.0], dtype=torch.float64)
        state = rules.brought_up(state, control.device)
        rules.judge(state, control)
        found.append(control)
    assert state is not None
    return torch.stack(found), state


def factors(limits: Iterable[float], values: Iterable[float]) -> Tensor:
    found = [1.0 if norm <= limit else limit / (norm + 1e-6) for limit, norm in zip(limits, values, strict=True)]
    return torch.tensor(found, dtype=torch.float64)


SPIKES = [
    pytest.param({}, id="default"),
    pytest.param({"window": 16, "sigma": 2.0, "least": 2, "accept_after": 2}, id="short"),
    pytest.param({"window": 5, "sigma": 1.0, "accept_after": 30}, id="patient"),
]


@interpreted
@pytest.mark.parametrize("settings", SPIKES)
def test_spikes(settings: dict[str, Any]) -> None:
    spikes = optimx.Spikes(**settings)
    values = norms()
    control, state = judged(Rules(None, True, False, spikes), values)
    expected = [*reference.spikes(values, spikes.window, spikes.sigma, spikes.from_norms, spikes.accept_after)]
    assert (control[:, 2] != 0).tolist() == expected
    assert not all(expected)
    assert any(expected[i] for i, norm in enumerate(values) if math.isfinite(norm))
    assert state["counters"][:2].tolist() == [len(values), sum(expected)]
    assert (control[:, 1] == 1.0).all()


@interpreted
@pytest.mark.parametrize("window", [1, 7, 1000])
@pytest.mark.parametrize("percentile", [10.0, 90.0, 100.0])
def test_autoclip(window: int, percentile: float) -> None:
    values = norms(6 if window == 1000 else 30) if backends.interpreted() else norms()
    control, state = judged(Rules(optimx.AutoClip(percentile, window), True, True, None), values)
    expected = factors(reference.autoclip(values, percentile, window), values)
    finite = torch.tensor(values, dtype=torch.float64).isfinite()
    torch.testing.assert_close(control[finite, 1], expected[finite], rtol=1e-12, atol=0.0)
    assert torch.equal(control[:, 2] == 0, finite)
    assert int(state["counters"][COUNTERS.index("clipped")]) == int((expected[finite] < 1.0).sum())
    assert int(state["counters"][COUNTERS.index("nonfinite")]) == int((~finite).sum())


@interpreted
@pytest.mark.parametrize("settings", [{}, {"threshold": 1.0, "decay": 0.5, "warmup": 3, "max_norm": None}], ids=str)
def test_zclip(settings: dict[str, Any]) -> None:
    rule = optimx.ZClip(**settings)
    values = norms()
    control, _ = judged(Rules(rule, True, True, None), values)
    expected = factors(reference.zclip(values, rule.threshold, rule.decay, rule.warmup, rule.most), values)
    finite = torch.tensor(values, dtype=torch.float64).isfinite()
    torch.testing.assert_close(control[finite, 1], expected[finite], rtol=1e-9, atol=0.0)
    assert (expected[finite] < 1.0).any()


@interpreted
def test_rules_together_and_resumed() -> None:
    """What was skipped is not clipped, nor seen by what clips; and a copy of what is remembered goes on alike."""
    rules = Rules(optimx.AutoClip(50.0, 20), True, True, optimx.Spikes(16, 3.0))
    values = norms(120)
    control, state = judged(rules, values)
    is_spike = [*reference.spikes(values, 16, 3.0, 8, 8)]
    taken = [norm for norm, skipped in zip(values, is_spike, strict=True) if not skipped]
    expected = factors(reference.autoclip(taken, 50.0, 20), taken)
    torch.testing.assert_close(control[control[:, 2] == 0, 1], expected, rtol=1e-12, atol=0.0)
    assert control[control[:, 2] != 0, 1].eq(1.0).all()
    _, half = judged(rules, values[:90])
    rest, again = judged(rules, values[90:], copy.deepcopy(half))
    torch.testing.assert_close(rest, control[90:], rtol=0.0, atol=0.0, equal_nan=True)
    torch.testing.assert_close(again, state, rtol=0.0, atol=0.0, equal_nan=True)


@interpreted
def test_other_window_begins_anew() -> None:
    _, state = judged(Rules(None, True, False, optimx.Spikes(8)), norms(20))
    rules = Rules(1.0, True, False, optimx.Spikes(9))
    brought = rules.brought_up(state, torch.device("cpu"))
    assert brought["counters"] is state["counters"]
    assert brought["spikes"].tolist() == [0.0] * 12


def pair(case: Case, **more: Any) -> tuple[optimx.MultiTensorStep, optimx.MultiTensorStep]:
    """The optimizer as it is, and one that skips."""
    kwargs = usual(case)
    return case.cls(make_params(), **kwargs), case.cls(make_params(), **kwargs, **{"skip_nonfinite": True, **more})


def plant(optimizer: torch.optim.Optimizer, position: int, value: float) -> None:
    grad = params_of(optimizer)[position].grad
    assert grad is not None
    grad.view(-1)[-1] = value


def contents(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in (*params_of(optimizer), *states)]


def equal(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b.to(a.device)) for a, b in zip(some, others, strict=False))


@each_case
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_skipped_step_changes_nothing(case: Case, value: float) -> None:
    """Wherever it is; and the next step is as if the batch had never been."""
    plain, skipping = pair(case)
    positions = [i for i, param in enumerate(params_of(plain)) if param.numel()]
    n_bad = 0
    for step in range(3):
        for position in {positions[-1], positions[step]}:
            set_grads(params_of(skipping), 100 + step)
            plant(skipping, position, value)
            before = contents(skipping)
            skipping.step()
            # a first step makes states
            assert equal(before, contents(skipping) if step else params_of(skipping))
            assert skipping.step_was_skipped
            n_bad += 1
        for optimizer in (plain, skipping):
            set_grads(params_of(optimizer), step)
            optimizer.step()
        assert not skipping.step_was_skipped
        assert_same(skipping, plain, {"rtol": 0.0, "atol": 0.0})
    assert skipping.counters["skipped"] == skipping.counters["nonfinite"] == n_bad
    assert skipping.counters["steps"] == 3 + n_bad
    assert skipping.counters["in_a_row"] == 0


@each_case_thinly
@pytest.mark.parametrize("max_grad_norm", [1.0, 1e6])
def test_clipping_is_the_same(case: Case, max_grad_norm: float) -> None:
    kwargs = usual(case)
    plain = case.cls(make_params(), **kwargs, max_grad_norm=max_grad_norm)
    skipping = case.cls(make_params(), **kwargs, max_grad_norm=max_grad_norm, skip_nonfinite=True)
    for step in range(3):
        for optimizer in (plain, skipping):
            set_grads(params_of(optimizer), step)
            optimizer.step()
        assert torch.equal(plain.grad_norm, skipping.grad_norm)
    assert equal(contents(plain), contents(skipping))
    assert skipping.counters["clipped"] == (3 if max_grad_norm == 1.0 else 0)


@interpreted
def test_found_norm_clips() -> None:
    """Like a number, that of the rule."""
    limits = [*reference.autoclip([1.0, 4.0, 2.0], 50.0, 10)]
    rule, number = (
        optimx.SGD([Parameter(torch.zeros(3))], lr=1.0, max_grad_norm=norm) for norm in (optimx.AutoClip(50.0), 1.0)
    )
    for norm, limit in zip([1.0, 4.0, 2.0], limits, strict=True):
        number.max_grad_norm = limit if norm > limit else None
        for optimizer in (rule, number):
            (param,) = params_of(optimizer)
            param.grad = torch.tensor([0.0, norm, 0.0])
            optimizer.step()
        assert equal(params_of(rule), params_of(number))
    assert rule.counters["clipped"] == 1


@interpreted
def test_spike_is_skipped() -> None:
    param = Parameter(torch.zeros(4))
    optimizer = optimx.AdamW([param], skip_spikes={"window": 8, "least": 4, "accept_after": 2}, max_grad_norm=1.0)
    skipped = []
    for norm in (1.0, 1.1, 0.9, 1.0, 1000.0, 1.0, NAN, 1000.0, 1000.0, 1000.0, 1000.0):
        param.grad = torch.tensor([norm, 0.0, 0.0, 0.0])
        before = contents(optimizer)
        optimizer.step()
        skipped.append(bool(optimizer.step_was_skipped))
        assert equal(before, contents(optimizer)) == skipped[-1]
    assert skipped == [False] * 4 + [True, False, True, True, True, False, False]
    assert optimizer.state[param]["step"] == 7


def a_model(n: int = 6) -> tuple[nn.Sequential, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(n)))
    return model, optimx.build(model, {"optimizer": {"name": "adamw", "skip_nonfinite": True}}).optimizer


@interpreted
def test_names_the_first_bad_parameter() -> None:
    """Backward goes from the last to the first, and NaN spreads on its way."""
    model, optimizer = a_model()
    for step in range(12):
        out = torch.ones(2, 4)
        for i, layer in enumerate(model):
            out = layer(out)
            if step == 10 and i == 3:
                # between layers 3 and 4 the gradient becomes NaN
                out.register_hook(lambda grad: grad * NAN)
        optimizer.zero_grad()
        out.square().sum().backward()
        assert (optimx.last_bad(optimizer) is None) == (step <= 10)
        optimizer.step()
    bad = optimx.last_bad(optimizer)
    assert bad is not None
    assert bad.step == 11
    assert bad.first in ("3.weight", "3.bias")
    assert len(bad.names) == 8
    assert bad.n_params == 12
    assert len(bad.norms) > 3
    assert all(map(math.isfinite, bad.norms))
    assert "first in the gradient of '3." in str(bad)


@interpreted
def test_all_bad_is_the_loss() -> None:
    model, optimizer = a_model()
    model(torch.full((1, 4), NAN)).square().sum().backward()
    optimizer.step()
    bad = optimx.last_bad(optimizer)
    assert bad is not None
    assert bad.first is None
    assert "loss or the forward pass" in str(bad)
    assert bad.norms == ()


@interpreted
def test_too_many_skips_raise() -> None:
    model, optimizer = a_model()
    optimizer.max_skips = 3
    before = contents(optimizer)
    for step in range(8):
        model(torch.full((1, 4), NAN)).square().sum().backward()
        if step in (3, 6):
            with pytest.raises(RuntimeError, match=r"max_skips=3 but are: 3; step .: infinite or NaN in all 12"):
                optimizer.step()
        optimizer.step()
    assert equal(before, params_of(optimizer))


@interpreted
def test_state_is_saved() -> None:
    kwargs = {"skip_spikes": optimx.Spikes(16), "max_grad_norm": optimx.ZClip(warmup=3), "skip_nonfinite": True}
    first = optimx.AdamW(make_params(), **kwargs)
    for step in range(5):
        set_grads(params_of(first), step)
        first.step()
    saved = first.state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    second = optimx.AdamW(make_params(seed=1), **kwargs)
    second.load_state_dict(torch.load(file, weights_only=True))
    others = [second, copy.deepcopy(first), pickle.loads(pickle.dumps(first))]
    for optimizer in others:
        assert optimizer.skip_spikes == first.skip_spikes
        assert optimizer.max_grad_norm == first.max_grad_norm
        assert all(torch.equal(optimizer.guard_state[name], first.guard_state[name]) for name in first.guard_state)
    set_grads(params_of(first), 5)
    first.step()
    assert others[0].guard_state["counters"][0] == saved["guard_state"]["counters"][0] == 5
    # stock passes over what it does not know
    stock = torch.optim.AdamW(make_params())
    stock.load_state_dict(saved)
    assert stock.state_dict().keys() == {"state", "param_groups"}
    plain = optimx.AdamW(make_params())
    assert plain.state_dict().keys() == {"state", "param_groups"}


def test_leftovers_are_skipped() -> None:
    """What torch's own step updates."""
    params = make_params(dtype=torch.complex64)
    optimizer = optimx.AdamW(params, skip_nonfinite=True)
    set_grads(params, 0)
    optimizer.step()
    before = contents(optimizer)
    set_grads(params, 1)
    plant(optimizer, -1, NAN)
    optimizer.step()
    assert equal(before, contents(optimizer))
    assert optimx.last_bad(optimizer).names == (f"parameter {len(params) - 1} of group 0",)


def test_compiled_step_skips() -> None:
    params = make_params()
    optimizer = optimx.AdamW(params, skip_nonfinite=True)
    step = torch.compile(optimizer.step, backend="eager")
    set_grads(params, 0)
    plant(optimizer, -1, INF)
    before = contents(optimizer)
    step()
    assert equal(before, params)


BAD = {
    "window": lambda: optimx.Spikes(window=1),
    "least": lambda: optimx.Spikes(window=8, least=9),
    "sigma": lambda: optimx.Spikes(sigma=0),
    "accept_after": lambda: optimx.Spikes(accept_after=0),
    "percentile": lambda: optimx.AutoClip(0),
    "threshold": lambda: optimx.ZClip(threshold=-1),
    "decay": lambda: optimx.ZClip(decay=1),
    "warmup": lambda: optimx.ZClip(warmup=0),
    "max_norm": lambda: optimx.ZClip(max_norm=0),
    "max_skips": lambda: optimx.AdamW(make_params(), max_skips=3),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} should be"):
        BAD[name]()


@pytest.mark.parametrize("value", ["yes", 3, optimx.AutoClip()], ids=str)
def test_bad_spikes(value: Any) -> None:
    with pytest.raises(TypeError, match="skip_spikes should be an"):
        optimx.AdamW(make_params(), skip_spikes=value)


def test_groups_have_no_rules() -> None:
    with pytest.raises(ValueError, match="skip_nonfinite should be an argument of the optimizer"):
        optimx.AdamW([{"params": make_params(), "skip_nonfinite": True}])
