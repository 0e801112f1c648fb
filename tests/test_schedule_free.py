"""Schedule-free optimizers: the three sequences, and how parameters are switched between training and evaluation."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import optimx
from tests.cases import BY_NAME, Case, Variant, make_params, set_grads, train
from tests.conftest import INTERPRETED
from tests.engine import each, params_of
from tests.test_reference import make_problem

CASES = [BY_NAME[name] for name in ("schedule_free_adamw", "schedule_free_sgd")]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
#: Beyond a batch and a chunk, and with whole groups of 8-bit codes.
SHAPES = [(), (5,), (129,), (32, 128)]
BF16 = torch.bfloat16
#: How a parameter of 16 bits and its states may be kept.
KEPT: dict[str, dict[str, Any]] = {
    "nearest": {},
    "float32_states": {"state_dtype": torch.float32},
    "stochastic": {"param_rounding": "stochastic", "state_dtype": "stochastic"},
    "remainder8": {"param_rounding": "remainder8", "state_dtype": "8bit"},
    "remainder16": {"param_rounding": "remainder16", "state_dtype": torch.float32},
    "master": {"param_rounding": "master", "state_dtype": torch.float32},
}
pytestmark = pytest.mark.filterwarnings("ignore:.*stands still")


def beta_of(optimizer: Any) -> float:
    return optimizer.rule.beta(optimizer.param_groups[0])


def trained(case: Case, device: torch.device, steps: int = 5, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    optimizer = case.cls(make_params(SHAPES, device, dtype), lr=0.1, **kwargs)
    train([optimizer], steps)
    return optimizer


def bits(optimizer: Any) -> list[Tensor]:
    """Copies of all that is trained: parameters and states."""
    states = (state[name] for state in optimizer.state.values() for name in sorted(state))
    return [tensor.detach().clone() for tensor in (*params_of(optimizer), *states)]


def assert_bits(optimizer: Any, expected: list[Tensor]) -> None:
    found = bits(optimizer)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file)


# numbers


@pytest.fixture
def default_float64() -> Iterator[None]:
    """Counts are float32 else, and their sum rounds once a step."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


VARIANTS = [Variant(case, name, kwargs) for case in CASES for name, kwargs in case.variants.items()]


@each([variant for variant in VARIANTS if variant.is_formula], ())
@pytest.mark.usefixtures("default_float64")
@pytest.mark.skipif(INTERPRETED, reason="counts on a device are float32")
def test_all_three_sequences(case: Case, kwargs: dict[str, Any]) -> None:
    theta, gradients = make_problem()
    param = Parameter(torch.tensor(theta))
    optimizer: Any = case.cls([param], **kwargs)
    for gradient in gradients:
        param.grad = torch.tensor(gradient)
        optimizer.step()
    y = torch.tensor(case.reference(theta, gradients, **kwargs))
    x = torch.tensor(case.reference(theta, gradients, **kwargs, evaluated=True))
    beta, close = beta_of(optimizer), {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(param.detach(), y, **close)
    torch.testing.assert_close(optimizer.state[param]["z"], (y - beta * x) / (1 - beta), rtol=1e-10, atol=1e-11)
    with optimizer.averaged():
        torch.testing.assert_close(param.detach(), x, **close)
    assert (x - y).abs().max() > 1e-4


@each_case
def test_x_is_the_weighted_mean_of_z(case: Case) -> None:
    """By the weights themselves, warmup included; a learning rate of 0 counts nothing."""
    (param,) = make_params([(7,)])
    optimizer: Any = case.cls([param], lr=0.1, warmup_steps=3, r=1.0)
    weights, zs = [], []
    for step, lr in enumerate([0.0, 0.1, 0.2, 0.1], 1):
        optimizer.param_groups[0]["lr"] = lr
        set_grads([param], step)
        optimizer.step()
        largest = max([0.0, 0.1 * 2 / 3, 0.2, 0.2][:step])
        weights.append(step * largest**2)
        zs.append(optimizer.state[param]["z"].clone())
    expected = sum(w * z for w, z in zip(weights, zs, strict=True)) / sum(weights)
    with optimizer.averaged():
        torch.testing.assert_close(param.detach(), expected, rtol=1e-5, atol=1e-6)


@each_case
def test_converges_without_a_schedule(case: Case) -> None:
    """On a noisy quadratic the average comes nearer than what is trained, and nearer the longer that is."""
    generator = torch.Generator().manual_seed(0)
    target = torch.linspace(-1, 1, 50)
    param = Parameter(torch.zeros(50))
    # momentum=0.9 of SGD: ten times its learning rate
    optimizer: Any = case.cls([param], lr=0.02 if case.name.endswith("adamw") else 0.5, warmup_steps=20)
    errors = {}
    for step in range(1, 1001):
        param.grad = param.detach() - target + torch.randn(50, generator=generator)
        optimizer.step()
        if step in (100, 1000):
            with optimizer.averaged():
                errors[step] = float((param.detach() - target).square().mean())
    assert errors[1000] < 0.5 * errors[100]
    assert errors[1000] < 0.5 * float((optimizer.state[param]["z"] - target).square().mean())
    assert errors[1000] < 0.02


# switching


@pytest.mark.interpreted
@pytest.mark.parametrize("settings", KEPT.values(), ids=KEPT)
@each_case
def test_evaluation_changes_no_bit(case: Case, settings: dict[str, Any], device: torch.device) -> None:
    """Of parameters and states, however they are kept; a run without evaluations is the same one."""
    watched, alone = (trained(case, device, 2, BF16, **settings) for _ in range(2))
    for step in range(2, 5):
        before = bits(watched)
        for _ in range(2 if INTERPRETED else 10):
            with watched.averaged():
                assert not torch.equal(params_of(watched)[-1], before[len(SHAPES) - 1])
        assert_bits(watched, before)
        train([watched, alone], 1, first=step)
        assert_bits(watched, bits(alone))


@pytest.mark.parametrize("settings", KEPT.values(), ids=KEPT)
@each_case
def test_master_weights_are_averages_too(case: Case, settings: dict[str, Any], device: torch.device) -> None:
    optimizer = trained(case, device, 3, BF16, **settings)
    ys = optimx.master_weights(optimizer)
    beta = beta_of(optimizer)
    with optimizer.averaged():
        xs = optimx.master_weights(optimizer)
        for param, x, y in zip(params_of(optimizer), xs, ys, strict=True):
            expected = y.lerp(optimizer.state[param]["z"].float(), 1 - 1 / beta)
            # the remainder of 8 bits has 16 bits of a number, and no remainder 8
            exact = settings.get("param_rounding") in ("master", "remainder16")
            rtol = 1e-6 if exact else 2**-16 if settings.get("param_rounding") == "remainder8" else 2**-8
            torch.testing.assert_close(x, expected, rtol=rtol, atol=1e-7)
            torch.testing.assert_close(param.float(), x, rtol=2**-8, atol=1e-7)
    assert all(map(torch.equal, optimx.master_weights(optimizer), ys))


@each_case
def test_switches_are_idempotent_and_in_place(case: Case, device: torch.device) -> None:
    optimizer = trained(case, device)
    params = params_of(optimizer)
    where, before, plan = [p.data_ptr() for p in params], bits(optimizer), optimizer._engine.plans[0]
    versions = [p._version for p in params]
    optimizer.train()
    assert_bits(optimizer, before)
    assert [p._version for p in params] == versions
    optimizer.eval()
    once = [p.detach().clone() for p in params]
    assert all(p._version > version for p, version in zip(params, versions, strict=True))
    optimizer.eval()
    assert all(map(torch.equal, params, once))
    with optimizer.averaged():
        pass
    # what began in evaluation ends there
    assert all(map(torch.equal, params, once))
    versions = [p._version for p in params]
    optimizer.train()
    assert all(p._version > version for p, version in zip(params, versions, strict=True))
    assert_bits(optimizer, before)
    assert [p.data_ptr() for p in params] == where
    train([optimizer], 1, first=5)
    assert optimizer._engine.plans[0] is plan


@each_case
def test_autograd_notices(case: Case, device: torch.device) -> None:
    optimizer = trained(case, device)
    param = params_of(optimizer)[1]
    loss = param.square().sum()
    optimizer.eval()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_case
def test_no_step_in_evaluation(case: Case, device: torch.device) -> None:
    optimizer = trained(case, device)
    called: list[int] = []
    with optimizer.averaged():
        before = bits(optimizer)
        set_grads(params_of(optimizer), 9)
        with pytest.raises(RuntimeError, match=r"step\(\) should be called in training but is called in evaluation"):
            optimizer.step(lambda: called.append(1))
        assert_bits(optimizer, before)
    assert not called
    optimizer.step()


@each_case
def test_an_error_in_the_context_brings_the_parameters_back(case: Case, device: torch.device) -> None:
    optimizer = trained(case, device)
    before = bits(optimizer)
    with pytest.raises(ZeroDivisionError), optimizer.averaged():
        1 / 0  # noqa: B018
    assert_bits(optimizer, before)


@each_case
def test_inference_mode(case: Case, device: torch.device) -> None:
    """Also around the context; training goes on outside of it."""
    optimizer, alone = trained(case, device), trained(case, device)
    with torch.inference_mode(), optimizer.averaged():
        sum(param.sum() for param in params_of(optimizer))
    with torch.inference_mode():
        optimizer.eval()
    optimizer.train()
    assert not any(param.is_inference() for param in params_of(optimizer))
    train([optimizer, alone], 2, first=5)
    assert_bits(optimizer, bits(alone))


@each_case
def test_before_the_first_step(case: Case, device: torch.device) -> None:
    """All three are the same, also of a parameter without a gradient."""
    params = make_params([(5,), (6,)], device)
    optimizer: Any = case.cls(params)
    before = bits(optimizer)
    with optimizer.averaged():
        assert_bits(optimizer, before)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    with optimizer.averaged():
        assert torch.equal(params[1], before[1])
        assert params[1] not in optimizer.state


@each_case
def test_groups_that_join(case: Case, device: torch.device) -> None:
    """They begin as the others are."""
    optimizer = trained(case, device)
    (param,) = make_params([(3,)], device, seed=1)
    before = param.detach().clone()
    optimizer.eval()
    optimizer.add_param_group({"params": [param], "lr": 0.2})
    assert [group["train_mode"] for group in optimizer.param_groups] == [False, False]
    optimizer.train()
    assert torch.equal(param, before)
    train([optimizer], 1)
    assert not torch.equal(param, before)


def test_groups_have_betas_of_their_own(device: torch.device) -> None:
    params = make_params([(5,), (5,)], device)
    groups = [{"params": [params[0]], "momentum": 0.5}, {"params": [params[1]], "momentum": 0.9}]
    optimizer: Any = optimx.ScheduleFreeSGD(groups, lr=1)
    train([optimizer], 3)
    ys = [param.detach().clone() for param in params]
    with optimizer.averaged():
        for param, y, beta in zip(params, ys, (0.5, 0.9), strict=True):
            torch.testing.assert_close((1 - beta) * optimizer.state[param]["z"] + beta * param.detach(), y)


# checkpoints


def pair(case: Case, device: torch.device, **kwargs: Any) -> tuple[nn.ParameterList, Any]:
    model = nn.ParameterList(make_params(SHAPES, device, BF16))
    return model, case.cls(model.parameters(), lr=0.1, **kwargs)


@pytest.mark.parametrize("settings", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("saved_in", ["training", "evaluation"])
@pytest.mark.parametrize("loaded_in", ["training", "evaluation"])
@each_case
def test_checkpoints_of_both_modes(
    case: Case, settings: dict[str, Any], saved_in: str, loaded_in: str, device: torch.device
) -> None:
    model, optimizer = pair(case, device, **settings)
    train([optimizer], 3)
    expected = bits(optimizer)
    if saved_in == "evaluation":
        optimizer.eval()
    seen = [param.detach().clone() for param in model.parameters()]
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict(compressed=True)})
    assert [group["train_mode"] for group in saved["optimizer"]["param_groups"]] == [saved_in == "training"]
    optimizer.train()

    other, resumed = pair(case, device, **settings)
    train([resumed], 1, first=7)
    if loaded_in == "evaluation":
        resumed.eval()
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert all(map(torch.equal, other.parameters(), seen))
    with resumed.averaged(), optimizer.averaged():
        assert all(map(torch.equal, other.parameters(), model.parameters()))
    resumed.train()
    assert_bits(resumed, expected)
    train([optimizer, resumed], 2, first=3)
    assert_bits(resumed, bits(optimizer))


@each_case
def test_a_checkpoint_that_has_lost_y(case: Case, device: torch.device) -> None:
    """DCP loads what a new optimizer has, and no more."""
    optimizer = trained(case, device)
    expected = [param.detach().clone() for param in params_of(optimizer)]
    optimizer.eval()
    for state in optimizer.state.values():
        del state["y"]
    optimizer.train()
    for param, y in zip(params_of(optimizer), expected, strict=True):
        torch.testing.assert_close(param.detach(), y, rtol=1e-6, atol=1e-6)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda it: pickle.loads(pickle.dumps(it)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@each_case
def test_copies_in_evaluation(case: Case, copied: Callable[[Any], Any], device: torch.device) -> None:
    optimizer = trained(case, device)
    expected = bits(optimizer)
    with optimizer.averaged():
        twin = copied(optimizer)
        with pytest.raises(RuntimeError, match="in evaluation"):
            twin.step()
    twin.train()
    assert_bits(twin, expected)


# others


class Wrapper:
    """One that hands on what it knows, and no more."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()


@each_case
def test_found_in_wrappers(case: Case, device: torch.device) -> None:
    optimizer = trained(case, device)
    before = bits(optimizer)
    for wrapped in (optimizer, Wrapper(optimizer), SimpleNamespace(optimizer=Wrapper(optimizer))):
        with optimx.averaged(wrapped):
            assert not torch.equal(params_of(optimizer)[0], before[0])
            with pytest.raises(RuntimeError, match="in evaluation"):
                wrapped.optimizer.step() if wrapped is not optimizer else optimizer.step()
        assert_bits(optimizer, before)


@pytest.mark.parametrize("make", [lambda params: optimx.AdamW(params), lambda params: Wrapper(optimx.AdamW(params))])
def test_nothing_schedule_free(make: Callable[[Any], Any]) -> None:
    optimizer = make(make_params([(3,)]))
    with (
        pytest.raises(TypeError, match=r"^optimizer should be schedule-free, .* but is: (AdamW|Wrapper)$"),
        optimx.averaged(optimizer),
    ):
        pass


@each_case
def test_in_a_composite(case: Case, device: torch.device) -> None:
    first, second = make_params([(5,), (6,)], device)
    composite = optimx.Composite({"sgd": optimx.SGD([first], lr=0.1), "free": case.cls([second], lr=0.1)})
    train([composite], 3)
    before = bits(composite)
    with optimx.averaged(composite):
        assert torch.equal(first, before[0])
        assert not torch.equal(second, before[1])
        set_grads([first, second], 3)
        with pytest.raises(RuntimeError, match="in evaluation"):
            composite.step()
        # no member before the one that refuses
        assert torch.equal(first, before[0])
    assert_bits(composite, before)
    composite.eval()
    assert not torch.equal(second, before[1])
    composite.train()
    assert_bits(composite, before)


@pytest.mark.parametrize("name", ["schedule_free_adamw", "ScheduleFreeSGD", "schedule-free-sgd"])
def test_build(name: str) -> None:
    model = nn.Linear(4, 2)
    build = optimx.build(model, {"optimizer": {"name": name, "warmup_steps": 10}})
    assert isinstance(build.optimizer, tuple(case.cls for case in CASES))
    assert build.optimizer.param_groups[0]["warmup_steps"] == 10
    assert {"schedule_free_adamw", "schedule_free_sgd"} <= {*optimx.list_optimizers("schedule*")}


def test_batch_norm_of_the_averages() -> None:
    """As the documentation has it: statistics of what is evaluated."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer: Any = optimx.ScheduleFreeAdamW(model.parameters(), lr=0.1)
    data = torch.randn(64, 4) + 3
    for _ in range(20):
        model(data).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with optimizer.averaged():
        optimx.swa_utils.update_bn([data], model)
        torch.testing.assert_close(model[1].running_mean, model[0](data).mean(0).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        (optimx.ScheduleFreeAdamW, {"betas": (0.0, 0.9)}, r"betas\[0\] should be in \(0, 1\) but is: 0.0"),
        (optimx.ScheduleFreeAdamW, {"betas": (0.9, 1.0)}, r"betas\[1\] should be in \[0, 1\) but is: 1.0"),
        (optimx.ScheduleFreeAdamW, {"lr": -1.0}, "lr should be >= 0 but is: -1.0"),
        (optimx.ScheduleFreeSGD, {"momentum": 0.0}, r"momentum should be in \(0, 1\) but is: 0.0"),
        (optimx.ScheduleFreeSGD, {"momentum": 1.0}, r"momentum should be in \(0, 1\) but is: 1.0"),
        (optimx.ScheduleFreeSGD, {"warmup_steps": -1}, "warmup_steps should be >= 0 but is: -1"),
        (optimx.ScheduleFreeSGD, {"warmup_steps": 0.5}, "warmup_steps should be a whole number but is: 0.5"),
        (optimx.ScheduleFreeSGD, {"r": -1.0}, "r should be >= 0 and finite but is: -1.0"),
        (optimx.ScheduleFreeSGD, {"weight_lr_power": float("nan")}, "weight_lr_power should be >= 0 and finite"),
    ],
)
def test_errors(cls: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        cls(make_params([(3,)]), **kwargs)
