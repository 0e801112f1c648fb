"""Averages that a step moves: AveragedModel's, timm's and the papers' formulas, and contexts that leave no trace."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import optimx
from optimx._engine import backends
from optimx._engine.averages import AVERAGE, Average
from tests.cases import CASES, Case, make_params, set_grads
from tests.engine import KINDS, each_of, interpreted, params_of, usual

#: Schedule-free optimizers are averages themselves.
each_case = each_of([case for case in CASES if not case.name.startswith("schedule_free")], KINDS)


def averages_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [optimizer.state[param][AVERAGE] for param in params_of(optimizer)]


def step(optimizer: torch.optim.Optimizer, number: int) -> None:
    set_grads(params_of(optimizer), number)
    optimizer.step()


class Holder(nn.Module):
    def __init__(self, params: list[Parameter]) -> None:
        super().__init__()
        self.params = nn.ParameterList(params)


RULES: dict[str, tuple[Average, Callable[..., Any]]] = {
    "ema": (optimx.EMA(0.9), get_ema_multi_avg_fn(0.9)),
    "swa": (optimx.SWA(), get_swa_multi_avg_fn()),
}


@each_case
@pytest.mark.parametrize("name", RULES)
def test_is_torchs_averaged_model(case: Case, name: str) -> None:
    """And parameters and states are the same bits with and without."""
    rule, multi_avg_fn = RULES[name]
    ours, plain = case.cls(make_params(), **usual(case), average=rule), case.cls(make_params(), **usual(case))
    averaged = AveragedModel(Holder(params_of(plain)), multi_avg_fn=multi_avg_fn)
    for number in range(5):
        step(ours, number)
        step(plain, number)
        averaged.update_parameters(Holder(params_of(plain)))
    # of the kernels products and sums are fused, and SWA of torch divides
    exact = {"rtol": 0.0, "atol": 0.0} if name == "ema" and not backends.interpreted() else {"rtol": 1e-6, "atol": 1e-7}
    for a, b in zip(averages_of(ours), averaged.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), **exact)
    for a, b in zip(params_of(ours), params_of(plain), strict=True):
        assert torch.equal(a, b)
        assert all(torch.equal(ours.state[a][key], value) for key, value in plain.state[b].items())
    model = Holder(params_of(ours))
    saved = optimx.averages.state_dict(ours, model)
    fresh = AveragedModel(Holder(make_params(seed=1)), multi_avg_fn=multi_avg_fn)
    fresh.load_state_dict(saved)
    assert fresh.n_averaged == 5
    again = case.cls(make_params(), **usual(case), average=rule)
    optimx.averages.load_state_dict(again, Holder(params_of(again)), averaged.state_dict())
    for a, b in zip(averages_of(again), averaged.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0.0, atol=0.0)


def a_new_one(optimizer: torch.optim.Optimizer) -> None:
    state = optimizer.state[params_of(optimizer)[5]]
    state[AVERAGE] = state[AVERAGE].clone()


def loaded(optimizer: torch.optim.Optimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def other_strides(optimizer: torch.optim.Optimizer) -> None:
    state = optimizer.state[params_of(optimizer)[6]]
    state[AVERAGE] = state[AVERAGE].mT.clone().mT


VECTORS, MIXED = [(6,)] * 20, [(3, 4), (7,), (0,), ()] * 15


@pytest.mark.parametrize(
    ("change", "shapes"),
    [(a_new_one, VECTORS), (loaded, VECTORS), (a_new_one, MIXED), (loaded, MIXED), (other_strides, [(3, 2)] * 20)],
)
def test_many_small_tensors(shapes: list[tuple[int, ...]], change: Callable[[torch.optim.Optimizer], None]) -> None:
    """Whose averages lie together, or not any more."""
    optimizer = optimx.AdamW(make_params(shapes), average=optimx.EMA(0.8))
    averaged = AveragedModel(Holder(params_of(optimizer)), multi_avg_fn=get_ema_multi_avg_fn(0.8))
    for number in range(6):
        if number == 3:
            change(optimizer)
        step(optimizer, number)
        averaged.update_parameters(Holder(params_of(optimizer)))
    for a, b in zip(averages_of(optimizer), averaged.parameters(), strict=True):
        assert torch.equal(a, b)


def timm_decay(number: int, decay: float, gamma: float, power: float, least: float) -> float:
    """Of ``ModelEmaV3`` after so many updates."""
    t = max(0, number - 1)
    return 0.0 if t <= 0 else max(min(1.0 - (1.0 + t / gamma) ** -power, decay), least)


@pytest.mark.parametrize("power", [2 / 3, 3 / 4])
@pytest.mark.parametrize("least", [0.0, 0.5])
def test_warmup_is_timms(power: float, least: float) -> None:
    rule = optimx.EMA(0.99, warmup=power, gamma=2.0, min_decay=least)
    for n in range(1, 3000, 7):
        weight = rule.weight(torch.tensor(float(n), dtype=torch.float64))
        assert float(weight) == pytest.approx(1.0 - timm_decay(n + 1, 0.99, 2.0, power, least), rel=1e-12)


def test_power_profile() -> None:
    """On a ramp the average of t is (gamma + 1) / (gamma + 2) of it, and its width sigma."""
    for sigma, gamma in ((0.05, 16.97), (0.10, 6.94)):
        rule = optimx.PowerEMA(sigma=sigma)
        assert rule.gamma == pytest.approx(gamma, abs=5e-3)
        average = square = 0.0
        for n in range(20_000):
            weight = float(rule.weight(torch.tensor(float(n), dtype=torch.float64)))
            average += weight * (n + 1 - average)
            square += weight * ((n + 1) ** 2 - square)
        assert average == pytest.approx(20_000 * (gamma + 1) / (gamma + 2), rel=1e-3)
        assert (square - average**2) ** 0.5 / 20_000 == pytest.approx(sigma, rel=1e-2)


@interpreted
def test_16_bits_move() -> None:
    """In bfloat16 a decay of 0.999 would never move."""
    param = Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = optimx.SGD([param], lr=0.0, average=optimx.EMA(0.999))
    for number in range(60 if backends.interpreted() else 3000):
        param.grad = torch.zeros_like(param)
        if number:
            with torch.no_grad():
                param.fill_(2.0)
        optimizer.step()
    (average,) = averages_of(optimizer)
    assert average.dtype is torch.float32
    expected = 2.0 - 0.999**number
    torch.testing.assert_close(average, torch.full((8,), expected), rtol=1e-4, atol=0.0)


@interpreted
def test_every_and_start() -> None:
    """Of 3 steps in 10, the decay of what lies between counts."""
    ours = optimx.SGD(make_params(), lr=0.1, average=optimx.EMA(0.9, every=3, start=2))
    plain = optimx.SGD(make_params(), lr=0.1)
    expected: list[Tensor] = []
    for number in range(10):
        step(ours, number)
        step(plain, number)
        if number in (2, 5, 8):
            params = [param.detach().clone() for param in params_of(plain)]
            before = expected or params
            expected = [old.lerp(new, 1.0 - 0.9**3) for old, new in zip(before, params, strict=True)]
        else:
            assert number > 2 or AVERAGE not in ours.state[params_of(ours)[0]]
    for a, b in zip(averages_of(ours), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@each_case
def test_skipped_step_counts_nothing(case: Case) -> None:
    kwargs = {**usual(case), "skip_nonfinite": True, "average": optimx.EMA(0.9, warmup=1.0)}
    ours, plain = case.cls(make_params(), **kwargs), case.cls(make_params(), **kwargs)
    for number in range(4):
        step(ours, number)
        step(plain, number)
        before = [average.clone() for average in averages_of(ours)]
        set_grads(params_of(ours), 50)
        params_of(ours)[-1].grad.view(-1)[0] = float("nan")
        ours.step()
        assert all(map(torch.equal, averages_of(ours), before))
    assert ours.param_groups[0]["n_averaged"] == 4
    assert all(map(torch.equal, averages_of(ours), averages_of(plain)))


@interpreted
def test_missing_gradients() -> None:
    """What takes no step has an average all the same, once it took one."""
    ours, plain = (optimx.AdamW(make_params([(4,), (3, 3)]), average=rule) for rule in (optimx.EMA(0.5), None))
    expected: list[Tensor] = []
    for number in range(4):
        for optimizer in (ours, plain):
            set_grads(params_of(optimizer), number, skip=[1] if number in (1, 2) else ())
            optimizer.step()
        params = [param.detach().clone() for param in params_of(plain)]
        before = expected or params
        expected = [old.lerp(new, 0.5) for old, new in zip(before, params, strict=True)]
    for a, b in zip(averages_of(ours), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@interpreted
@pytest.mark.parametrize(
    "settings", [{}, {"param_rounding": "remainder16"}, {"param_rounding": "master"}, {"state_dtype": "8bit"}], ids=str
)
def test_context_leaves_no_trace(settings: dict[str, Any]) -> None:
    params = make_params([(64, 128), (5,)], dtype=torch.bfloat16)
    optimizer = optimx.AdamW(params, average=optimx.EMA(0.5), lr=1e-2, **settings)
    for number in range(3):
        step(optimizer, number)
    before = copy.deepcopy(optimizer.state_dict(compressed=True))
    values = [param.detach().clone() for param in params]
    for _ in range(10):
        with optimx.averaged(optimizer):
            for param in params:
                torch.testing.assert_close(param.float(), optimizer.state[param][AVERAGE], rtol=1e-2, atol=1e-2)
            assert not all(map(torch.equal, params, values))
            with pytest.raises(RuntimeError, match="while the parameters hold"):
                optimizer.step()
            with pytest.raises(RuntimeError, match="while the parameters hold"), optimizer.averaged():
                pass
    assert all(map(torch.equal, params, values))
    after = optimizer.state_dict(compressed=True)
    for key, state in before["state"].items():
        assert all(torch.equal(value, after["state"][key][name]) for name, value in state.items())
    step(optimizer, 3)


def test_context_ends_after_an_exception() -> None:
    optimizer = optimx.AdamW(make_params(), average=optimx.SWA())
    step(optimizer, 0)
    step(optimizer, 1)
    values = [param.detach().clone() for param in params_of(optimizer)]
    with pytest.raises(KeyError), optimx.averaged(optimizer):
        raise KeyError
    assert all(map(torch.equal, params_of(optimizer), values))
    step(optimizer, 2)


@interpreted
def test_checkpoint_goes_on() -> None:
    kwargs = {"average": optimx.EMA(0.9, warmup=0.7), "lr": 1e-2}
    first = optimx.AdamW(make_params(dtype=torch.bfloat16), **kwargs)
    for number in range(3):
        step(first, number)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    params = [Parameter(param.detach().clone()) for param in params_of(first)]
    second = optimx.AdamW(params, **kwargs)
    second.load_state_dict(torch.load(file, weights_only=True))
    others = [second, copy.deepcopy(first), pickle.loads(pickle.dumps(first))]
    step(first, 3)
    for optimizer in others:
        step(optimizer, 3)
        assert all(map(torch.equal, averages_of(optimizer), averages_of(first)))
        assert optimizer.param_groups[0]["n_averaged"] == 4
    stock = torch.optim.AdamW(make_params(dtype=torch.bfloat16))
    stock.load_state_dict(first.state_dict())
    step(stock, 4)


def test_composite_and_build() -> None:
    params = make_params([(8, 8), (8,)])
    rule = optimx.EMA(0.5)
    members = {"muon": optimx.Muon(params[:1], average=rule), "adamw": optimx.AdamW(params[1:], average=rule)}
    composite = optimx.Composite(members)
    for number in range(3):
        step(composite, number)
    values = [param.detach().clone() for param in params]
    with optimx.averaged(composite):
        assert not any(map(torch.equal, params, values))
    assert all(map(torch.equal, params, values))
    with pytest.raises(TypeError, match="should average, or be schedule-free"), optimx.averaged(optimx.SGD(params)):
        pass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


@pytest.mark.parametrize("make", [lambda x: x, lambda x: (x, 0), lambda x: [x, 1], lambda x: {"x": x}], ids=range(4))
def test_update_bn(make: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(5, 3) for _ in range(4)]
    ours, torchs = Net(), Net()
    ours.eval()
    optimx.averages.update_bn(map(make, batches), ours)
    torch.optim.swa_utils.update_bn(batches, torchs)
    for a, b in zip(ours.norm.buffers(), torchs.norm.buffers(), strict=True):
        assert torch.equal(a, b)
    assert not ours.norm.training
    assert ours.norm.momentum == 0.1


BAD = {
    "decay": lambda: optimx.EMA(decay=1.0),
    "warmup": lambda: optimx.EMA(warmup=0),
    "every": lambda: optimx.SWA(every=0),
    "start": lambda: optimx.SWA(start=-1),
    "sigma": lambda: optimx.PowerEMA(sigma=0.3),
    "average": lambda: optimx.ScheduleFreeSGD(make_params(), average=optimx.SWA()),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} should be"):
        BAD[name]()


def test_bad_types() -> None:
    with pytest.raises(TypeError, match="dtype should be a floating-point dtype"):
        optimx.EMA(dtype=torch.int8)
    with pytest.raises(TypeError, match="average should be an"):
        optimx.SGD(make_params(), average=0.99)
    with (
        pytest.raises(RuntimeError, match="average should be an"),
        optimx.SGD(make_params()).averaged(),
    ):
        pass


def test_memory_tells_of_averages() -> None:
    params = make_params([(64, 128)], dtype=torch.bfloat16)
    plain, averaging = (optimx.memory(optimx.AdamW(params, average=rule)) for rule in (None, optimx.EMA()))
    assert averaging.rows[0].states - plain.rows[0].states == 4 * 64 * 128
    assert averaging.traffic - plain.traffic == 8 * 64 * 128
    assert "average float32" in averaging.rows[0].kept
