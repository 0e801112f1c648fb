"""get_scheduler against Hugging Face's formulas, written here once more; and against the package where it is there."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from optimx.lr_scheduler import GreedyLR, ReduceLROnPlateau, get_scheduler
from tests.training import each_order, save, train

LR = 0.2


def make_optimizer(**_: Any) -> torch.optim.Optimizer:
    """The default learning rate, and a group with a tenth of it."""
    groups = [{"params": [Parameter(torch.zeros(1))]}, {"params": [Parameter(torch.zeros(1))], "lr": LR / 10}]
    return torch.optim.AdamW(groups, lr=LR)


def ramp(t: int, warmup: int) -> float:
    return t / max(1, warmup)


def progress(t: int, warmup: int, total: int) -> float:
    return (t - warmup) / max(1, total - warmup)


def wave(p: float, num_cycles: float = 0.5) -> float:
    return 0.5 * (1 + math.cos(2 * math.pi * num_cycles * p))


def linear(t: int, w: int, n: int) -> float:
    return ramp(t, w) if t < w else max(0.0, (n - t) / max(1, n - w))


def cosine(t: int, w: int, n: int, num_cycles: float = 0.5, floor: float = 0.0) -> float:
    return ramp(t, w) if t < w else floor + (1 - floor) * wave(progress(t, w, n), num_cycles)


def cosine_with_restarts(t: int, w: int, n: int, num_cycles: float = 1) -> float:
    if t < w:
        return ramp(t, w)
    p = progress(t, w, n)
    return 0.0 if p >= 1 else 0.5 * (1 + math.cos(math.pi * ((num_cycles * p) % 1.0)))


def polynomial(t: int, w: int, n: int, lr_end: float = 1e-7, power: float = 1.0) -> float:
    if t < w:
        return ramp(t, w)
    return lr_end / LR if t > n else ((LR - lr_end) * (1 - (t - w) / (n - w)) ** power + lr_end) / LR


def inverse_sqrt(t: int, w: int, n: int, timescale: int | None = None) -> float:
    if timescale is None:
        timescale = w or 10_000
    return ramp(t, w) if t < w else 1 / math.sqrt((t + timescale - w) / timescale)


def cosine_warmup_with_min_lr(t: int, w: int, n: int, floor: float, rate: float | None = None) -> float:
    if t < w:
        return (t + 1) / max(1, w) if rate is None else rate + (1 - rate) * t / max(1, w - 1)
    return floor + (1 - floor) * wave((t - w + 1) / max(1, n - w))


def wsd(
    t: int,
    w: int,
    n: int,
    decay: int,
    shape: str = "cosine",
    rise: str = "linear",
    low: float = 0.0,
    cycles: float = 0.5,
) -> float:
    stable = n - w - decay
    if t < w:
        x = ramp(t, w)
        x = {"linear": x, "cosine": 0.5 * (1 - math.cos(math.pi * x)), "1-sqrt": 1 - math.sqrt(1 - x)}[rise]
    elif t < w + stable:
        return 1.0
    elif t < n:
        p = (t - w - stable) / max(1, decay)
        x = {"linear": 1 - p, "cosine": wave(p, cycles), "1-sqrt": 1 - math.sqrt(p)}[shape]
    else:
        return low
    return low + (1 - low) * x


Formula = Callable[[int, int, int], float]

CASES: dict[str, tuple[str, dict[str, Any], Formula]] = {
    "linear": ("linear", {}, linear),
    "cosine": ("cosine", {}, cosine),
    "cosine-waves": ("cosine", {"num_cycles": 1.5}, lambda t, w, n: cosine(t, w, n, 1.5)),
    "restarts": ("cosine_with_restarts", {}, cosine_with_restarts),
    "restarts-part": ("cosine_with_restarts", {"num_cycles": 1.5}, lambda t, w, n: cosine_with_restarts(t, w, n, 1.5)),
    "restarts-3": ("cosine_with_restarts", {"num_cycles": 3}, lambda t, w, n: cosine_with_restarts(t, w, n, 3)),
    "polynomial": ("polynomial", {}, polynomial),
    "polynomial-2": (
        "polynomial",
        {"power": 2.0, "lr_end": 0.01},
        lambda t, w, n: polynomial(t, w, n, 0.01, 2.0),
    ),
    "constant": ("constant", {}, lambda t, w, n: 1.0),
    "constant-with-warmup": ("constant_with_warmup", {}, lambda t, w, n: ramp(t, w) if t < w else 1.0),
    "inverse-sqrt": ("inverse_sqrt", {}, inverse_sqrt),
    "inverse-sqrt-7": ("inverse_sqrt", {"timescale": 7}, lambda t, w, n: inverse_sqrt(t, w, n, 7)),
    "cosine-min-lr": (
        "cosine_with_min_lr",
        {"min_lr": 0.02},
        lambda t, w, n: cosine(t, w, n, floor=0.1),
    ),
    "cosine-min-lr-rate": (
        "cosine_with_min_lr",
        {"min_lr_rate": 0.3},
        lambda t, w, n: cosine(t, w, n, floor=0.3),
    ),
    "cosine-warmup-min-lr": (
        "cosine_warmup_with_min_lr",
        {"min_lr": 0.02},
        lambda t, w, n: cosine_warmup_with_min_lr(t, w, n, 0.1),
    ),
    "cosine-warmup-min-lr-rate": (
        "cosine_warmup_with_min_lr",
        {"min_lr_rate": 0.1, "warmup_lr_rate": 0.25},
        lambda t, w, n: cosine_warmup_with_min_lr(t, w, n, 0.1, 0.25),
    ),
    "wsd": ("warmup_stable_decay", {"num_decay_steps": 4}, lambda t, w, n: wsd(t, w, n, 4)),
    "wsd-sqrt": (
        "warmup_stable_decay",
        {"num_decay_steps": 3, "decay_type": "1-sqrt", "warmup_type": "1-sqrt", "min_lr_ratio": 0.2},
        lambda t, w, n: wsd(t, w, n, 3, "1-sqrt", "1-sqrt", 0.2),
    ),
    "wsd-linear": (
        "warmup_stable_decay",
        {"num_decay_steps": 5, "decay_type": "linear", "warmup_type": "cosine"},
        lambda t, w, n: wsd(t, w, n, 5, "linear", "cosine"),
    ),
    "wsd-waves": (
        "warmup_stable_decay",
        {"num_decay_steps": 5, "num_cycles": 1.0, "min_lr_ratio": 0.1},
        lambda t, w, n: wsd(t, w, n, 5, low=0.1, cycles=1.0),
    ),
}
each_case = pytest.mark.parametrize(("name", "options", "formula"), CASES.values(), ids=CASES)
#: Without a warmup, with one step, with several, in a length that restarts do not divide.
LENGTHS = [(0, 7), (1, 8), (2, 10), (5, 25)]
#: A warmup that is all of the training, or longer; so long that decays of a fixed length have begun; quotients.
ODD_LENGTHS = [(4, 4), (9, 4), (3, 5), (8.0, 20.0), (2.5, 20), (0.4, 12), (2.5, 12.25), (6.3, 7), (0.5, 7.5)]


@pytest.mark.parametrize(("warmup", "total"), LENGTHS)
@each_case
def test_numbers(name: str, options: dict[str, Any], formula: Formula, warmup: int, total: int) -> None:
    """Every applied step, and the end; where theirs rises again, ours stays."""
    optimizer = make_optimizer()
    scheduler = get_scheduler(name, optimizer, warmup, total, options)
    last = total if "warmup_with_min_lr" not in name else total - 1
    factors = [formula(t, warmup, total) for t in range(last + 1)]
    expected = [pytest.approx([LR * factor, LR / 10 * factor], abs=1e-12) for factor in factors]
    assert train(optimizer, scheduler, last + 1) == expected
    if name not in ("inverse_sqrt",):
        assert train(optimizer, scheduler, 3) == [expected[-1]] * 3


@pytest.mark.parametrize(("warmup", "total"), ODD_LENGTHS)
@each_case
def test_odd_lengths(name: str, options: dict[str, Any], formula: Formula, warmup: float, total: float) -> None:
    if "warmup_with_min_lr" in name and warmup % 1:
        pytest.skip("theirs rises above the peak")
    if name == "polynomial" and 0 < total - warmup < 1:
        pytest.skip("refused")
    optimizer = make_optimizer()
    scheduler = get_scheduler(name, optimizer, warmup, total, options)  # type: ignore[arg-type]
    steps = range(math.ceil(total))
    factors = [formula(t, warmup, total) for t in steps]  # type: ignore[arg-type]
    assert train(optimizer, scheduler, len(steps)) == [
        pytest.approx([LR * factor, LR / 10 * factor], abs=1e-12) for factor in factors
    ]
    # the checkpoint has plain values, fractional ones too
    json.dumps(scheduler.state_dict())
    again = get_scheduler(name, make_optimizer(), warmup, total, options)  # type: ignore[arg-type]
    again.load_state_dict(scheduler.state_dict())
    assert again.get_last_lr() == scheduler.get_last_lr()
    other = get_scheduler(name, make_optimizer(), 3, 33, options, on_mismatch="use_checkpoint")
    other.load_state_dict(scheduler.state_dict())
    assert other.get_last_lr() == scheduler.get_last_lr()


def test_every_name_is_tried() -> None:
    with pytest.raises(ValueError, match="name should be one of") as error:
        get_scheduler("", make_optimizer())
    names = str(error.value).removeprefix("name should be one of ").split(" but ")[0].split(", ")
    assert {*names} == {case[0] for case in CASES.values()} | {"reduce_lr_on_plateau", "greedy"}


@each_case
def test_against_transformers(name: str, options: dict[str, Any], formula: Formula) -> None:
    transformers = pytest.importorskip("transformers")
    assert {member.value for member in transformers.SchedulerType} == {case[0] for case in CASES.values()} | {
        "reduce_lr_on_plateau",
        "greedy",
    }
    for warmup, total in LENGTHS + ODD_LENGTHS:
        if ("warmup_with_min_lr" in name and warmup % 1) or (name == "polynomial" and 0 <= total - warmup < 1):
            continue
        ours, theirs = make_optimizer(), make_optimizer()
        a = get_scheduler(name, ours, warmup, total, options)
        b = transformers.get_scheduler(name, theirs, warmup, total, options)
        for row, wanted in zip(*(train(o, s, int(total)) for o, s in ((ours, a), (theirs, b))), strict=True):
            assert row == pytest.approx(wanted, abs=1e-12)


def test_greedy_against_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(0)
    metrics = (torch.rand(400, generator=generator) + torch.linspace(3, 0, 400).sin()).tolist()
    for options in ({}, {"smooth": True, "window_size": 5}, {"cooldown": 3, "warmup": 2, "reset_start": 3}):
        options = {"patience": 1, "factor": 0.7, "min_lr": 0.05, **options}
        ours, theirs = make_optimizer(), make_optimizer()
        a = get_scheduler("greedy", ours, scheduler_specific_kwargs=options)
        b = transformers.get_scheduler("greedy", theirs, scheduler_specific_kwargs=options)
        for metric in metrics:
            a.step(metric)  # type: ignore[arg-type]
            b.step(metric)
            assert a.get_last_lr() == pytest.approx(b.get_last_lr())


@each_order
@each_case
def test_resume(name: str, options: dict[str, Any], formula: Formula, order: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("tests.training.make_optimizer", make_optimizer)

    def make(optimizer: Any) -> Any:
        return get_scheduler(name, optimizer, 2, 10, options)

    optimizer = make_optimizer()
    scheduler = make(optimizer)
    train(optimizer, scheduler, 4)
    resumed = order(make, save(optimizer, scheduler))
    assert train(*resumed, 5) == [
        pytest.approx([LR * formula(t, 2, 10), LR / 10 * formula(t, 2, 10)], abs=1e-12) for t in range(4, 9)
    ]


def test_last_epoch() -> None:
    optimizer = make_optimizer()
    train(optimizer, get_scheduler("linear", optimizer, 2, 10), 5)
    scheduler = get_scheduler("linear", optimizer, 2, 10, {"last_epoch": 4})
    assert scheduler.get_last_lr()[0] == pytest.approx(LR * linear(5, 2, 10))


def test_another_horizon() -> None:
    state = get_scheduler("cosine", make_optimizer(), 2, 10).state_dict()
    with pytest.raises(ValueError, match="steps: 8 in the checkpoint, 18 here"):
        get_scheduler("cosine", make_optimizer(), 2, 20).load_state_dict(state)
    get_scheduler("cosine", make_optimizer(), 2, 20, on_mismatch="use_new").load_state_dict(state)


def test_by_metric() -> None:
    plateau = get_scheduler("reduce_lr_on_plateau", make_optimizer(), scheduler_specific_kwargs={"patience": 3})
    assert isinstance(plateau, ReduceLROnPlateau)
    assert plateau.patience == 3
    greedy = get_scheduler("greedy", make_optimizer(), 5, 10, {"factor": 0.5})
    assert isinstance(greedy, GreedyLR)
    assert greedy.factor == 0.5


def test_an_enum() -> None:
    kind = enum.Enum("SchedulerType", {"LINEAR": "linear"})
    optimizer = make_optimizer()
    assert train(optimizer, get_scheduler(kind.LINEAR, optimizer, 0, 2), 2)[1][0] == LR / 2


BAD: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "name": (("cosin", 1, 2), ValueError, "'cosin'; did you mean 'cosine'"),
    "no-warmup": (("linear", None, 2), ValueError, "num_warmup_steps should be given for 'linear' but is: None"),
    "no-training": (("linear", 1), ValueError, "num_training_steps should be given for 'linear' but is: None"),
    "negative": (("linear", -1, 3), ValueError, "num_warmup_steps should be >= 0 but is: -1"),
    "string": (("linear", "1", 3), TypeError, "num_warmup_steps should be a number but is: '1'"),
    "part-of-a-step": (("polynomial", 2, 2.5), ValueError, "should be <= 0 or >= 1 but is: 0.5"),
    "argument": (("cosine", 1, 3, {"num_cycle": 1}), ValueError, "'num_cycle'; did you mean 'num_cycles'"),
    "hidden-argument": (("cosine_with_min_lr", 1, 3, {"lr": 1}), ValueError, "but is: 'lr'"),
    "plateau-argument": (("reduce_lr_on_plateau", 1, 3, {"patienc": 1}), ValueError, "did you mean 'patience'"),
    "no-decay-steps": (("warmup_stable_decay", 1, 3), ValueError, "should have 'num_decay_steps'"),
    "no-stable-steps": (("warmup_stable_decay", 1, None, {"num_decay_steps": 3}), ValueError, "both are: None"),
    "negative-decay": (("warmup_stable_decay", 1, 3, {"num_decay_steps": -3}), ValueError, ">= 0 but is: -3"),
    "two-floors": (("cosine_with_min_lr", 1, 3, {"min_lr": 0, "min_lr_rate": 0}), ValueError, "one of min_lr and"),
    "no-floor": (("cosine_with_min_lr", 1, 3), ValueError, "one of min_lr and"),
    "floor": (("polynomial", 1, 3, {"lr_end": 0.5}), ValueError, r"lr_end should be in \[0, 0.2\).* but is: 0.5"),
    "decay-type": (
        ("warmup_stable_decay", 1, 9, {"num_decay_steps": 3, "decay_type": "cosin"}),
        ValueError,
        "'cosin'; did you mean 'cosine'",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    name, *rest = arguments
    with pytest.raises(error, match=message):
        get_scheduler(name, make_optimizer(), *rest)
