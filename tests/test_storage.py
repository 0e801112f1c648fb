"""How parameters and states are kept: dtypes of states."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter

import optimx
from optimx._engine.recode import bring_to_formats, master_weights, set_master_weights
from optimx._engine.storage import named
from tests.cases import CASES, make_params, set_grads
from tests.conftest import INTERPRETED

if INTERPRETED:
    from optimx.triton_kernels.tensor_table import LaunchSize

    from optimx._engine.triton import elementwise

pytestmark = [pytest.mark.interpreted, pytest.mark.filterwarnings("ignore:.*stands still")]

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{case.name: (case.cls, {}) for case in CASES},
    "sgd": (optimx.SGD, {"momentum": 0.9}),
    # its own default of eps depends on the parameter's dtype
    "adafactor": (optimx.Adafactor, {"beta1": 0.9, "eps": (1e-10, 1e-3)}),
    # z begins as a parameter that is rounded: with lr=1 it ends where numbers cancel
    "schedule_free_sgd": (optimx.ScheduleFreeSGD, {"lr": 0.1}),
    "muon": (optimx.Muon, {"ns_dtype": torch.float32}),
}
SHAPES = [(3, 5), (40, 8), (3, 5)]
F32, BF16 = torch.float32, torch.bfloat16


def step(optimizer: torch.optim.Optimizer, number: int) -> None:
    set_grads([p for group in optimizer.param_groups for p in group["params"]], number)
    optimizer.step()


def states(optimizer: torch.optim.Optimizer, param: Parameter) -> dict[str, Tensor]:
    return {name: value for name, value in optimizer.state[param].items() if value.dim()}


@pytest.mark.parametrize("of_params", [F32, BF16], ids=["params32", "params16"])
@pytest.mark.parametrize("of_states", [F32, BF16], ids=["states32", "states16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dtypes_of_states(device: torch.device, name: str, of_params: Any, of_states: Any) -> None:
    """A step is one in float32, after which parameters and states are rounded once."""
    make, kwargs = OPTIMIZERS[name]
    params = make_params(SHAPES, device, of_params)
    twins = [Parameter(param.detach().to(F32, copy=True)) for param in params]
    optimizer, twin = make(params, state_dtype=of_states, **kwargs), make(twins, **kwargs)
    for number in range(3):
        step(optimizer, number)
        for param, other in zip(params, twins, strict=True):
            other.grad = param.grad.float()
        twin.step()
        for other in twins:
            other.data.copy_(other.detach().to(of_params))
            for value in states(twin, other).values():
                value.copy_(value.to(of_states))
    # sums may be in another order, and what is near the middle may be rounded to either side
    close = {"rtol": 1e-6, "atol": 1e-7} if of_params is of_states is F32 else {"rtol": 2**-6, "atol": 2e-3}
    for param, other in zip(params, twins, strict=True):
        torch.testing.assert_close(param.detach().float(), other.detach(), **close)
        assert {value.dtype for value in states(optimizer, param).values()} == {of_states}
        for key, value in states(optimizer, param).items():
            torch.testing.assert_close(value.float(), states(twin, other)[key], **close)
    assert not any(row.reason for row in optimx.explain(optimizer).rows)


@pytest.mark.parametrize("of_params", [F32, BF16], ids=["params32", "params16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_checkpoints_round_nothing(device: torch.device, name: str, of_params: Any) -> None:
    """Torch casts what it loads to the parameter's dtype."""
    make, kwargs = OPTIMIZERS[name]
    other = F32 if of_params is BF16 else BF16
    params = make_params(SHAPES, device, of_params)
    optimizer = make(params, state_dtype=other, **kwargs)
    step(optimizer, 0)
    saved = deepcopy(optimizer.state_dict())
    again = make(params, state_dtype=other, **kwargs)
    again.load_state_dict(saved)
    for param in params:
        for key, value in states(optimizer, param).items():
            assert value.dtype is other
            assert torch.equal(again.state[param][key], value), key
    step(again, 1)


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"param_rounding": "stochastical"}, "param_rounding should be one of .* did you mean 'stochastic'"),
        (
            {"state_dtype": "8bits"},
            "state_dtype should be one of 8bit, .*stochastic but .* did you mean '8bit'",
        ),
        ({"state_dtype": torch.int8}, "state_dtype should be one of torch.float32, .* but is: torch.int8"),
        ({"state_dtype": {"exp_avgs": BF16}}, "state_dtype should be one of exp_avg, exp_avg_sq but is: 'exp_avgs'"),
        ({"state_dtype": {"exp_avg": "8"}}, r"state_dtype\['exp_avg'\] should be one of 8bit, bfloat16"),
        ({"rounding_seed": -1}, r"rounding_seed should be a whole number in \[0, 2\*\*63\) but is: -1"),
        ({"rounding_seed": 1.5}, "rounding_seed should be a whole number"),
    ],
)
def test_errors(kwargs: dict[str, Any], told: str) -> None:
    params = make_params([(2, 3)])
    with pytest.raises(ValueError, match=told):
        optimx.AdamW(params, **kwargs)
    optimizer = optimx.AdamW(params)
    with pytest.raises(ValueError, match=told):
        optimizer.add_param_group({"params": make_params([(2, 3)]), **kwargs})
    assert len(optimizer.param_groups) == 1


def test_float16_has_no_remainders() -> None:
    with pytest.raises(ValueError, match="param_rounding should be 'stochastic' or 'master' for float16 parameters"):
        optimx.AdamW(make_params([(2, 3)], dtype=torch.float16), param_rounding="remainder16")


@pytest.mark.parametrize(
    ("make", "kwargs", "warns"),
    [
        (optimx.AdamW, {"state_dtype": BF16}, True),
        (optimx.AdamW, {"state_dtype": {"exp_avg_sq": BF16}}, True),
        (optimx.AdamW, {"state_dtype": {"exp_avg": BF16}}, False),
        (optimx.AdamW, {"state_dtype": BF16, "betas": (0.9, 0.99)}, False),
        (optimx.AdamW, {}, False),
        (optimx.RMSprop, {"state_dtype": BF16, "alpha": 0.999}, True),
        (optimx.Lion, {"state_dtype": BF16}, False),
    ],
)
def test_averages_that_stand_still_are_told(make: Any, kwargs: dict[str, Any], warns: bool) -> None:
    """Numbers of the default change no sooner than by half of what tells two of them apart."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(make_params([(2, 3)]), **kwargs)
    assert ["0.1 % at most" in str(warning.message) for warning in caught] == [True] * warns


def test_a_group_without_parameters_may_have_settings() -> None:
    optimizer = optimx.AdamW([{"params": []}], state_dtype="8bit")
    optimizer.add_param_group({"params": make_params([(2, 3)])})
    assert optimizer.param_groups[1]["state_dtype"] == "8bit"


def test_settings_are_in_no_group_by_default() -> None:
    """Checkpoints are torch's."""
    optimizer = optimx.AdamW(make_params([(2, 3)]), state_dtype=None, param_rounding="nearest", rounding_seed=0)
    assert optimizer.defaults.keys() == torch.optim.AdamW(make_params([(2, 3)])).defaults.keys()
    optimizer = optimx.AdamW([{"params": make_params([(2, 3)]), "state_dtype": BF16}], betas=(0.9, 0.9))
    assert "state_dtype" not in optimizer.defaults
    step(optimizer, 0)
    assert {value.dtype for value in states(optimizer, optimizer.param_groups[0]["params"][0]).values()} == {BF16}


def test_a_changed_setting_converts(device: torch.device) -> None:
    params = make_params([(4, 5)], device)
    optimizer = optimx.AdamW(params)
    step(optimizer, 0)
    before = states(optimizer, params[0])["exp_avg"].clone()
    optimizer.param_groups[0]["state_dtype"] = {"exp_avg": BF16}
    set_grads(params, 1)
    optimizer.step()
    after = states(optimizer, params[0])
    assert (after["exp_avg"].dtype, after["exp_avg_sq"].dtype) == (BF16, F32)
    expected = torch.lerp(before.to(BF16).float(), params[0].grad, 0.1)
    torch.testing.assert_close(after["exp_avg"].float(), expected, rtol=2**-8, atol=0)


FORMATS = {
    "stochastic": {"param_rounding": "stochastic", "state_dtype": "stochastic"},
    "remainder8": {"param_rounding": "remainder8", "state_dtype": F32},
    "remainder16": {"param_rounding": "remainder16", "state_dtype": F32},
    "master": {"param_rounding": "master", "state_dtype": F32},
    "8bit": {"param_rounding": "stochastic", "state_dtype": "8bit"},
}


def bring(optimizer: Any) -> None:
    """What the next step does first."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            bring_to_formats(optimizer, param, param, group, optimizer.state[param])


#: Interpreted, one of each walk, and one that counts no steps.
NAMES = ["adamw", "sgd", "lamb", "adafactor", "muon"] if INTERPRETED else [*OPTIMIZERS]
LARGE = [(40, 128), (64, 2, 64), (3, 5), (5000,)]


@pytest.fixture(autouse=True)
def tiles(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a tensor, and several groups a chunk."""
    if INTERPRETED:
        monkeypatch.setattr(elementwise, "launch_size", LaunchSize(chunk_size=512, block_size=512))


def large(name: str) -> list[tuple[int, ...]]:
    """Of these, what an optimizer takes; interpreted, without many matrices, each of which takes a program."""
    few = name == "muon" or (INTERPRETED and name == "adafactor")
    return [shape for shape in LARGE if not few or len(shape) == 2]


def test_codes_and_back(device: torch.device) -> None:
    """Checkpoints have float32 averages; codes come and go with the setting."""
    params = make_params(LARGE, device)
    optimizer = optimx.AdamW(params)
    step(optimizer, 0)
    exact = [{name: value.clone() for name, value in states(optimizer, param).items()} for param in params]
    optimizer.param_groups[0]["state_dtype"] = "8bit"
    bring(optimizer)
    for param in params[:2]:
        kinds = {name: (value.dtype, value.shape) for name, value in states(optimizer, param).items()}
        scales = torch.Size([len(param), param[0].numel() // 128])
        assert kinds == {
            "exp_avg_codes": (torch.int8, param.shape), "exp_avg_scales": (F32, scales),
            "exp_avg_sq_codes": (torch.uint8, param.shape), "exp_avg_sq_scales": (F32, scales),
        }  # fmt: skip
    for param in params[2:]:
        assert {value.dtype for value in states(optimizer, param).values()} == {F32}
    plain, compressed = optimizer.state_dict(), optimizer.state_dict(compressed=True)
    for i, averages in enumerate(exact):
        assert plain["state"][i].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in averages.items():
            largest = float(value.abs().max())
            torch.testing.assert_close(plain["state"][i][name], value, rtol=0.05, atol=0.01 * largest)
    assert compressed["state"][0]["exp_avg_codes"].dtype is torch.int8
    again = optimx.AdamW(params, state_dtype="8bit")
    again.load_state_dict(deepcopy(compressed))
    other = optimx.AdamW(params, state_dtype="8bit")
    other.load_state_dict(deepcopy(plain))
    for optimizer_with in (again, other):
        bring(optimizer_with)
        for name, value in states(optimizer, params[0]).items():
            torch.testing.assert_close(optimizer_with.state[params[0]][name], value, rtol=0, atol=1e-7)
    stock = torch.optim.AdamW(params)
    stock.load_state_dict(deepcopy(plain))
    del optimizer.param_groups[0]["state_dtype"]
    bring(optimizer)
    for i, param in enumerate(params):
        assert optimizer.state[param].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert torch.equal(optimizer.state[param]["exp_avg"], plain["state"][i]["exp_avg"])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "remainder8", "remainder16", "master"])
def test_master_weights(device: torch.device, rounding: str) -> None:
    params = [*make_params(LARGE, device, BF16), *make_params([(3, 2)], device)]
    optimizer = optimx.AdamW(params, param_rounding=rounding)
    exact = [
        torch.randn(param.shape, generator=torch.Generator().manual_seed(i)).to(device)
        for i, param in enumerate(params)
    ]
    set_master_weights(optimizer, exact)
    for param, weight, value in zip(params, master_weights(optimizer), exact, strict=True):
        assert weight.dtype is F32
        close = {"nearest": 2**-8, "stochastic": 2**-8, "remainder8": 2**-16}.get(rounding, 0.0)
        torch.testing.assert_close(weight, value, rtol=close if param.dtype is BF16 else 0.0, atol=0)
        torch.testing.assert_close(param.detach().float(), value, rtol=2**-8 if param.dtype is BF16 else 0.0, atol=0)
    # a remainder becomes a longer one, or a copy, of the same values
    if rounding.startswith("remainder"):
        weights = master_weights(optimizer)
        for other in ("remainder16", "master"):
            optimizer.param_groups[0]["param_rounding"] = other
            bring(optimizer)
            assert all(map(torch.equal, master_weights(optimizer), weights))
    with pytest.raises(ValueError, match="tensors should be 5, one a parameter, but are: 1"):
        set_master_weights(optimizer, exact[:1])
    with pytest.raises(ValueError, match=r"tensors\[0\] should have shape \[40, 128\] but has: \[3, 2\]"):
        set_master_weights(optimizer, exact[::-1])


@pytest.mark.parametrize("rounding", ["remainder16", "master"])
@pytest.mark.parametrize("name", NAMES)
def test_training_is_that_of_float32(device: torch.device, name: str, rounding: str) -> None:
    """Bit by bit, with gradients of 16 bits."""
    make, kwargs = OPTIMIZERS[name]
    params = make_params(large(name), device, BF16)
    twins = [Parameter(param.detach().float()) for param in params]
    optimizer, twin = make(params, **FORMATS[rounding], **kwargs), make(twins, **kwargs)
    for number in range(4 if INTERPRETED else 20):
        set_grads(params, number)
        for param, other in zip(params, twins, strict=True):
            other.grad = param.grad.float()
        optimizer.step()
        twin.step()
    for weight, other in zip(master_weights(optimizer), twins, strict=True):
        torch.testing.assert_close(weight, other.detach(), rtol=1e-6 if name in ("adafactor", "lamb") else 0, atol=0)


@pytest.mark.parametrize("kept", ["remainder8", "8bit"] if INTERPRETED else FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_loaded_goes_on(device: torch.device, name: str, kept: str) -> None:
    """Bit by bit, also the random ones; in another order of parameters with other random bits for nobody."""
    make, kwargs = OPTIMIZERS[name]
    kwargs = {**kwargs, **FORMATS[kept], "rounding_seed": 7}
    params, again = make_params(large(name), device, BF16), make_params(large(name), device, BF16)
    optimizer, other = make(params, **kwargs), make(again, **kwargs)
    for number in range(4):
        if number == 2:
            saved = deepcopy(other.state_dict(compressed=True))
            other = make(again, **kwargs)
            other.load_state_dict(saved)
        step(optimizer, number)
        step(other, number)
    for param, loaded in zip(params, again, strict=True):
        assert torch.equal(param, loaded)
        for key, value in states(optimizer, param).items():
            assert torch.equal(value, other.state[loaded][key]), key


def test_seeds_and_copies() -> None:
    def trained(**kwargs: Any) -> Tensor:
        params = make_params(LARGE, dtype=BF16)
        optimizer = optimx.SGD(params, lr=1e-3, param_rounding="stochastic", **kwargs)
        for number in range(3):
            step(optimizer, number)
            optimizer = deepcopy(optimizer) if number == 1 else optimizer
            params = optimizer.param_groups[0]["params"]
        assert optimizer.param_groups[0]["rounding_step"] == 3
        return params[0].detach()

    assert torch.equal(trained(), trained())
    assert not torch.equal(trained(), trained(rounding_seed=1))


@pytest.mark.parametrize("kept", ["stochastic", "8bit"])
def test_counts_on_a_device_round_alike(device: torch.device, kept: str) -> None:
    """With ``fused=True`` a kernel counts, and the next one has its bits from there."""
    trained = []
    for fused in (None, True):
        params = make_params(LARGE, device, BF16)
        optimizer = optimx.AdamW(params, lr=1e-2, fused=fused, **FORMATS[kept])
        for number in range(3):
            step(optimizer, number)
        trained.append(torch.cat([param.detach().flatten() for param in params]))
    # step sizes are worked out in another place, and may be rounded otherwise
    assert (trained[0] == trained[1]).double().mean() > 0.999


def test_what_cannot_be_kept_is_refused(device: torch.device) -> None:
    params = make_params(LARGE, device, BF16)
    for kwargs in ({"foreach": True}, {"differentiable": True}):
        optimizer = optimx.AdamW(params, param_rounding="remainder16", **kwargs)
        set_grads(params, 0)
        before = [param.detach().clone() for param in params]
        with pytest.raises(RuntimeError, match="parameter 0 of all, in group 0, should be kept as param_rounding and"):
            optimizer.step()
        assert all(map(torch.equal, params, before))


def test_a_refused_step_rounds_nothing(device: torch.device) -> None:
    """What is there is brought to a format only where it can be kept like that."""
    params = make_params(LARGE[:1], device)
    optimizer = optimx.AdamW(params)
    step(optimizer, 0)
    before = {name: value.clone() for name, value in states(optimizer, params[0]).items()}
    optimizer.param_groups[0].update(state_dtype="8bit", foreach=True)
    set_grads(params, 1)
    with pytest.raises(RuntimeError, match="left to torch's own step"):
        optimizer.step()
    after = states(optimizer, params[0])
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_first_steps_are_known_by_codes() -> None:
    """With dampening the first step of SGD differs from the others."""
    kwargs = {"momentum": 0.9, "dampening": 0.5, "lr": 0.1}
    params, twins = make_params(LARGE[:1]), make_params(LARGE[:1])
    optimizer, twin = optimx.SGD(params, state_dtype="8bit", **kwargs), optimx.SGD(twins, **kwargs)
    for number in range(5):
        step(optimizer, number)
        step(twin, number)
    # half a code of the momentum's largest, five times
    torch.testing.assert_close(params[0], twins[0], rtol=0, atol=0.02)


def test_a_first_step_that_is_skipped_keeps_exact_weights() -> None:
    params = make_params(LARGE[:1], dtype=BF16)
    optimizer = optimx.SGD(params, momentum=0.9, dampening=0.5, param_rounding="remainder16", fused=True)
    exact = torch.randn(LARGE[0], generator=torch.Generator().manual_seed(0))
    set_master_weights(optimizer, [exact])
    params[0].grad = torch.full_like(params[0], torch.inf)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    assert torch.equal(master_weights(optimizer)[0], exact)


def test_a_loop_keeps_dtypes(device: torch.device) -> None:
    """Adafactor's own takes matrices whose rows and columns have gaps."""
    params = [Parameter(torch.randn(4, 3, 2, device=device).permute(2, 0, 1))]
    optimizer = optimx.Adafactor(params, beta1=0.9, state_dtype=BF16)
    step(optimizer, 0)
    assert optimx.explain(optimizer).rows[0].reason
    assert {value.dtype for value in states(optimizer, params[0]).values()} == {BF16}
    with pytest.raises(RuntimeError, match="left to torch's own step"):
        step(optimx.Adafactor(params, beta1=0.9, state_dtype="stochastic"), 0)


def test_clipping_and_amp() -> None:
    """A skipped step changes no byte; a clipped one is that of scaled gradients."""
    params = make_params(LARGE, dtype=BF16)
    optimizer = optimx.AdamW(params, **FORMATS["8bit"], fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number in range(3):
        set_grads(params, number, 4.0)
        if number == 1:
            params[1].grad[0, 0] = torch.inf
        before = [param.detach().clone() for param in params], deepcopy(optimizer.state_dict(compressed=True))
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
        same = all(map(torch.equal, params, before[0]))
        assert same is (number == 1)
        if same:
            after = optimizer.state_dict(compressed=True)
            torch.testing.assert_close(after["state"], before[1]["state"], rtol=0, atol=0)
    twins = [Parameter(param.detach().clone()) for param in params]
    clipped = optimx.SGD(params, lr=0.1, param_rounding="remainder16", max_grad_norm=1.0)
    scaled = optimx.SGD(twins, lr=0.1, param_rounding="remainder16")
    set_grads(params, 5)
    clipped.step()
    for param, twin in zip(params, twins, strict=True):
        twin.grad = param.grad / clipped.grad_norm.to(BF16)
    scaled.step()
    for mine, theirs in zip(master_weights(clipped), master_weights(scaled), strict=True):
        # scaled gradients are rounded to bfloat16, those of a step are not
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "kept", "moved"),
    [
        ({}, 6, 14),
        ({"param_rounding": "master", "state_dtype": F32}, 14, 28),
        ({"param_rounding": "remainder16", "state_dtype": F32}, 12, 26),
        ({"param_rounding": "remainder8", "state_dtype": BF16}, 7, 16),
        ({"param_rounding": "stochastic", "state_dtype": "8bit"}, 4 + 1 / 16, 10 + 1 / 8),
    ],
)
def test_memory(kwargs: dict[str, Any], kept: float, moved: float) -> None:
    """Bytes a parameter, as counted by hand; and as a step leaves them."""
    params = make_params([(64, 128)], dtype=BF16)
    optimizer = optimx.AdamW(params, **kwargs)
    (row,) = optimx.memory(optimizer).rows
    assert ((row.params + row.states) / row.elements, row.traffic / row.elements) == (kept, moved)
    assert row.total == row.params + row.grads + row.states
    if not INTERPRETED:
        step(optimizer, 0)
        assert sum(value.nbytes for value in states(optimizer, params[0]).values()) == row.states


#: Settings, shapes, and what is told of states that are float32.
FLOAT32 = {
    "small": (
        "AdamW",
        {},
        [(64, 128), (9,), (8, 16)],
        "exp_avg, exp_avg_sq of 2 tensors: float32, because they have fewer",
    ),
    "rows": (
        "AdamW",
        {},
        [(64, 129)],
        "exp_avg, exp_avg_sq of 1 tensor: float32, because the length of their rows (for",
    ),
    "maximum": (
        "AdamW",
        {"amsgrad": True},
        [(64, 128)],
        "max_exp_avg_sq of 1 tensor: float32, because sums and maxima are",
    ),
    "averages": (
        "Adafactor",
        {"beta1": 0.9},
        [(128, 128)],
        "row_var, col_var of 1 tensor: float32, because averages over rows",
    ),
    "one": (
        "AdamW",
        {"state_dtype": {"exp_avg": "8bit"}},
        [(9,)],
        "exp_avg of 1 tensor: float32, because they have fewer",
    ),
}


@pytest.mark.parametrize("name", FLOAT32)
def test_why_states_stay_float32(name: str) -> None:
    """As it is, and once for all parameters alike."""
    cls, settings, shapes, told = FLOAT32[name]
    found = optimx.memory(getattr(optimx, cls)(make_params(shapes, dtype=BF16), **{"state_dtype": "8bit", **settings}))
    (note,) = found.notes[:-2]
    assert note.startswith(told)
    assert note in str(found)


def test_nothing_stays_float32_that_was_to_be() -> None:
    for settings in ({}, {"state_dtype": torch.float32}, {"state_dtype": "stochastic"}, {"state_dtype": "8bit"}):
        found = optimx.memory(optimx.AdamW(make_params([(64, 128)], dtype=BF16), param_rounding="master", **settings))
        assert not any(row.float32 for row in found.rows)


def test_memory_of_a_config() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 8))
    found = optimx.memory(model, {"optimizer": {"name": "adamw", "state_dtype": "8bit"}})
    assert [row.elements for row in found.rows] == [64 * 128, 64 + 8 * 64 + 8]
    assert found.total == sum(row.total for row in found.rows)
    assert "exp_avg_codes int8" in str(found)
    with pytest.raises(TypeError, match="memory should be given a model and a config, or an optimizer alone"):
        optimx.memory(model)


@pytest.mark.parametrize("kept", FORMATS)
def test_a_checkpoint_without_settings_leaves_them(device: torch.device, kept: str) -> None:
    """Torch's says nothing of how things are kept; one that does is believed."""
    params = make_params(LARGE[:1], device, BF16)
    stock = torch.optim.AdamW(params)
    step(stock, 0)
    optimizer = optimx.AdamW([{"params": params, **FORMATS[kept]}])
    optimizer.load_state_dict(deepcopy(stock.state_dict()))
    assert FORMATS[kept].items() <= optimizer.param_groups[0].items()
    fresh = optimx.AdamW(params, **FORMATS[kept])
    step(fresh, 0)
    step(optimizer, 1)
    kinds = [{name: value.dtype for name, value in states(o, params[0]).items()} for o in (optimizer, fresh)]
    assert kinds[0] == kinds[1]
    other = optimx.AdamW(params, param_rounding="remainder8")
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    assert {name: named(value) for name, value in FORMATS[kept].items()}.items() <= other.param_groups[0].items()
    assert {"param_rounding", "state_dtype"} & other.param_groups[0].keys() == FORMATS[kept].keys()


@pytest.mark.parametrize("rounding", ["remainder8", "remainder16", "master"])
def test_what_torch_has_trained_goes_on(rounding: str) -> None:
    """Torch rounds the companions that it loads, and trains the parameters without them: they are out of date then."""
    params = make_params(LARGE[:1], dtype=BF16)
    optimizer = optimx.AdamW(params, param_rounding=rounding)
    step(optimizer, 0)
    stock = torch.optim.AdamW(params, lr=0.1)
    stock.load_state_dict(deepcopy(optimizer.state_dict()))
    step(stock, 1)
    again = optimx.AdamW(params, lr=0.0, param_rounding=rounding)
    again.load_state_dict(deepcopy(stock.state_dict()))
    again.param_groups[0]["lr"] = 0.0
    visible = params[0].detach().clone()
    assert torch.equal(master_weights(again)[0], visible.float())
    step(again, 2)
    assert torch.equal(params[0], visible)
    assert torch.equal(master_weights(again)[0], visible.float())


@pytest.mark.parametrize("rounding", ["remainder8", "remainder16", "master"])
def test_parameters_of_another_dtype_have_no_companions(rounding: str) -> None:
    """As ``module.float()`` leaves them."""
    params = make_params(LARGE[:1], dtype=BF16)
    optimizer = optimx.AdamW(params, param_rounding=rounding, state_dtype=F32)
    step(optimizer, 0)
    params[0].data = params[0].data.float()
    params[0].grad = None
    twins = [Parameter(params[0].detach().clone())]
    twin = optimx.AdamW(twins)
    twin.load_state_dict(deepcopy(optimizer.state_dict()))
    step(optimizer, 1)
    step(twin, 1)
    assert states(optimizer, params[0]).keys() == {"exp_avg", "exp_avg_sq"}
    assert torch.equal(params[0], twins[0])
    assert torch.equal(master_weights(optimizer)[0], params[0])


@pytest.mark.parametrize("before", ["remainder8", "remainder16", "master"])
@pytest.mark.parametrize("after", ["nearest", "remainder8", "remainder16", "master"])
def test_weights_are_set_by_the_setting_of_now(before: str, after: str) -> None:
    params = make_params(LARGE[:1], dtype=BF16)
    optimizer = optimx.AdamW(params, param_rounding=before)
    step(optimizer, 0)
    optimizer.param_groups[0]["param_rounding"] = after
    exact = torch.randn(LARGE[0], generator=torch.Generator().manual_seed(0))
    set_master_weights(optimizer, [exact])
    close = {"nearest": 2**-8, "remainder8": 2**-16}.get(after, 0.0)
    torch.testing.assert_close(master_weights(optimizer)[0], exact, rtol=close, atol=0)
    bring(optimizer)
    torch.testing.assert_close(master_weights(optimizer)[0], exact, rtol=close, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kept", FORMATS)
def test_compiled_steps_keep_formats(device: torch.device, kept: str) -> None:
    """The stock formulas, which ``torch.compile`` is given otherwise, do not know them."""
    torch._dynamo.reset()
    params, twins = make_params(LARGE[:2], device, BF16), make_params(LARGE[:2], device, BF16)
    optimizer, twin = optimx.AdamW(params, **FORMATS[kept]), optimx.AdamW(twins, **FORMATS[kept])
    compiled = torch.compile(optimizer.step, backend="eager")
    for number in range(2):
        set_grads(params, number)
        compiled()
        step(twin, number)
    assert all(map(torch.equal, params, twins))
    for param, other in zip(params, twins, strict=True):
        torch.testing.assert_close(states(optimizer, param), states(twin, other), rtol=0, atol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize("kept", FORMATS)
def test_distributed_checkpoints(kept: str) -> None:
    """DCP makes states by a step, reads into them, and sets them again; in flattened ones it does not find codes."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    models = [torch.nn.Linear(128, 40, dtype=BF16) for _ in range(2)]
    first, second = (optimx.AdamW(model.parameters(), **FORMATS[kept]) for model in models)
    for number in range(2):
        step(first, number)
    with torch.no_grad():
        for param, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            other.copy_(param)
    saved, place = (deepcopy(get_optimizer_state_dict(m, o)) for m, o in zip(models, (first, second), strict=True))
    for name, state in place["state"].items():
        for key, value in state.items():
            value.copy_(saved["state"][name][key])
    set_optimizer_state_dict(models[1], second, place)
    weights = master_weights(second)
    assert all(map(torch.equal, master_weights(first), weights))
    plain = [o.state_dict()["state"] for o in (first, second)]
    # what is encoded again, of the same scales
    torch.testing.assert_close(plain[0], plain[1], rtol=1e-6, atol=1e-7)
    flattened = get_optimizer_state_dict(models[0], first, options=options)
    step(second, 2)
    weights, before = master_weights(second), deepcopy(second.state_dict(compressed=True)["state"])
    if kept != "8bit":
        set_optimizer_state_dict(models[1], second, flattened, options=options)
        return
    with pytest.raises(ValueError, match=r"\['exp_avg_codes'\] should be a tensor \(flatten_optimizer_state_dict=True"):
        set_optimizer_state_dict(models[1], second, flattened, options=options)
    assert all(map(torch.equal, master_weights(second), weights))
    torch.testing.assert_close(second.state_dict(compressed=True)["state"], before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        (BF16, "bfloat16"),
        ("8bit", "8bit"),
        ({"exp_avg": BF16, "exp_avg_sq": "stochastic"}, {"exp_avg": "bfloat16", "exp_avg_sq": "stochastic"}),
    ],
)
def test_checkpoints_name_dtypes(asked: Any, written: Any) -> None:
    """DCP gathers numbers, texts and containers of them."""
    optimizer = optimx.AdamW(make_params([(2, 3)]), state_dtype=asked)
    assert optimizer.state_dict()["param_groups"][0]["state_dtype"] == written
    assert optimizer.param_groups[0]["state_dtype"] == asked


def test_checkpoints_have_remainders_that_ranks_send() -> None:
    """Neither NCCL nor Gloo sends 16-bit integers, which full state dicts of DCP need."""
    params = make_params(LARGE[:1], dtype=BF16)
    optimizer = optimx.AdamW(params, **FORMATS["remainder16"])
    step(optimizer, 0)
    saved, compressed = (deepcopy(optimizer.state_dict(compressed=c)["state"][0]) for c in (False, True))
    assert saved["param_remainder"].dtype is torch.int32
    assert compressed["param_remainder"].dtype is torch.int16
    again = optimx.AdamW(params, **FORMATS["remainder16"])
    again.load_state_dict(deepcopy(optimizer.state_dict()))
    assert torch.equal(again.state[params[0]]["param_remainder"], compressed["param_remainder"])
    assert again.state[params[0]]["param_remainder"].dtype is torch.int16


def test_no_states_have_no_dtypes() -> None:
    with pytest.raises(ValueError, match="state_dtype should name no state where there is none but is: 'momentum_buf"):
        optimx.SGD(make_params([(2, 3)]), state_dtype={"momentum_buffer": BF16})
