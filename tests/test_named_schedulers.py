"""The named schedulers: each in a training loop, against its formula; warmups around torch's; where torch's fail."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler as torchs

import optimx
from optimx.lr_scheduler import (
    REXLR,
    SGDR,
    WSDLR,
    Absolute,
    AdafactorSchedule,
    Cosine,
    Exponential,
    GreedyLR,
    Hold,
    InverseSqrtLR,
    InverseTimeLR,
    Linear,
    LinearCosineLR,
    NaturalExpLR,
    NoamLR,
    PiecewiseConstantLR,
    PlateauWithWarmup,
    Restarts,
    ScheduleLR,
    TanhLR,
    Warmup,
    WarmupConstantLR,
    WarmupCosineLR,
    WarmupExponentialLR,
    WarmupLinearLR,
    WarmupLR,
    WarmupMultiStepLR,
    WarmupPolynomialLR,
)
from tests.training import each_order, make_optimizer, save, train

C = math.sqrt(0.5)


def factors(scheduler: Any, steps: int) -> list[float]:
    """What the learning rates of an optimizer with lr 1 become."""
    return [row[-1] for row in train(scheduler.optimizer, scheduler, steps)]


def approx(numbers: list[float]) -> Any:
    return pytest.approx(numbers, rel=1e-9, abs=1e-9)


def sequential(optimizer: Any) -> Any:
    return torchs.SequentialLR(optimizer, [torchs.ConstantLR(optimizer, 0.5, 9), torchs.StepLR(optimizer, 2)], [2])


Make = Callable[[Any], Any]

#: A scheduler, and its first factors from the formulas.
NAMED: dict[str, tuple[Make, list[float]]] = {
    "WarmupCosineLR": (lambda o: WarmupCosineLR(o, 2, 5), [0.5, 1, (1 + C) / 2, 0.5, (1 - C) / 2, 0, 0]),
    "WarmupCosineLR-floor": (
        lambda o: WarmupCosineLR(o, 2, 5, 0.2),
        [0.5, 1, 0.2 + 0.4 * (1 + C), 0.6, 0.2 + 0.4 * (1 - C), 0.2, 0.2],
    ),
    "WarmupCosineLR-hf": (
        lambda o: WarmupCosineLR(o, 2, 6, convention="hf"),
        [0, 0.5, 1, (1 + C) / 2, 0.5, (1 - C) / 2, 0],
    ),
    "WarmupCosineLR-torchtitan": (
        lambda o: WarmupCosineLR(o, 2, 6, convention="torchtitan"),
        [0.5, 1, 1, (1 + C) / 2, 0.5, (1 - C) / 2, 0],
    ),
    "WarmupCosineLR-deepspeed": (
        lambda o: WarmupCosineLR(o, 2, 6, 1e-4, convention="deepspeed"),
        [0, 0.5, *(1e-4 + (1 - 1e-4) * x for x in ((1 + C) / 2, 0.5, (1 - C) / 2)), 1e-4, 1e-4],
    ),
    "WarmupCosineLR-timm": (
        lambda o: WarmupCosineLR(o, 2, 4, convention="timm"),
        [0, 0.5, 0.5, (1 - C) / 2, 0, 0, 0],
    ),
    "WarmupLinearLR": (lambda o: WarmupLinearLR(o, 2, 5), [0.5, 1, 0.75, 0.5, 0.25, 0, 0]),
    "WarmupLinearLR-hf": (lambda o: WarmupLinearLR(o, 2, 6, convention="hf"), [0, 0.5, 1, 0.75, 0.5, 0.25, 0]),
    "WarmupLinearLR-deepspeed": (
        lambda o: WarmupLinearLR(o, Warmup(4, "log"), 6, convention="deepspeed"),
        [0, 0.5, math.log(3) / math.log(4), 1, 1, 0.5, 0],
    ),
    "WarmupPolynomialLR": (
        lambda o: WarmupPolynomialLR(o, 2, 5, power=2.0),
        [0.5, 1, 0.5625, 0.25, 0.0625, 0, 0],
    ),
    "WarmupConstantLR": (lambda o: WarmupConstantLR(o, 4), [0.25, 0.5, 0.75, 1, 1, 1]),
    "WarmupExponentialLR": (lambda o: WarmupExponentialLR(o, 2, 0.5), [0.5, 1, 0.5, 0.25, 0.125]),
    "WarmupExponentialLR-staircase": (
        lambda o: WarmupExponentialLR(o, 2, 0.5, 2, staircase=True),
        [0.5, 1, 1, 1, 0.5, 0.5, 0.25],
    ),
    "WarmupMultiStepLR": (
        lambda o: WarmupMultiStepLR(o, [3, 5], warmup_factor=0.2, warmup_iters=4),
        [0.2, 0.4, 0.6, 0.08, 0.1, 0.01, 0.01],
    ),
    "WarmupMultiStepLR-constant": (
        lambda o: WarmupMultiStepLR(o, [3], 0.5, 0.2, 2, "constant"),
        [0.2, 0.2, 1, 0.5, 0.5],
    ),
    "InverseSqrtLR": (lambda o: InverseSqrtLR(o, 2), [0.5, 1, math.sqrt(2 / 3), C, math.sqrt(2 / 5)]),
    "InverseSqrtLR-hf": (
        lambda o: InverseSqrtLR(o, 2, convention="hf"),
        [0, 0.5, 1, math.sqrt(2 / 3), C, math.sqrt(2 / 5)],
    ),
    "InverseSqrtLR-timescale": (lambda o: InverseSqrtLR(o, 0, 1), [1, C, math.sqrt(1 / 3), 0.5]),
    "NoamLR": (
        lambda o: NoamLR(o, 2, d_model=4, scale=2.0),
        [0.5 * 2 * min(n**-0.5, n * 2**-1.5) for n in range(1, 6)],
    ),
    "WSDLR": (lambda o: WSDLR(o, 2, 2, 3), [0.5, 1, 1, 1, 0.5, 1 - C, 1 - math.sqrt(0.75), 0, 0]),
    "WSDLR-linear": (lambda o: WSDLR(o, 2, 1, 3, "linear", 0.2), [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2]),
    "WSDLR-hf": (
        lambda o: WSDLR(o, 2, 1, 2, "linear", 0.2, convention="hf"),
        [0.2, 0.6, 1, 1, 0.6, 0.2, 0.2],
    ),
    "WSDLR-torchtitan": (
        lambda o: WSDLR(o, 2, 1, 2, "linear", convention="torchtitan"),
        [0.5, 1, 1, 1, 0.5, 0, 0],
    ),
    "SGDR": (lambda o: SGDR(o, 2, 2), [1, 0.5, 1, (1 + C) / 2, 0.5, (1 - C) / 2, 1]),
    "SGDR-peak-decay": (
        lambda o: SGDR(o, 2, 1.5, peak_decay=0.5, cycles=2),
        [1, 0.5, 0.5, 0.375, 0.125, 0, 0, 0],
    ),
    "SGDR-warmup": (lambda o: SGDR(o, 2, warmup_steps=2), [0.5, 1, 0.75, 0.25, 1, 0.5, 1]),
    "SGDR-warmup-each": (
        lambda o: SGDR(o, 4, warmup_steps=2, warmup_each=True, peak_decay=0.5),
        [0.5, 1, 0.75, 0.25, 0.25, 0.5, 0.375, 0.125],
    ),
    "LinearCosineLR": (
        lambda o: LinearCosineLR(o, 4),
        [1.001, 0.75 * (1 + C) / 2 + 0.001, 0.251, 0.25 * (1 - C) / 2 + 0.001, 0.001, 0.001],
    ),
    "NaturalExpLR": (lambda o: NaturalExpLR(o, math.log(4), 2), [1, 0.5, 0.25, 0.125]),
    "InverseTimeLR": (lambda o: InverseTimeLR(o, 1.0, 2, True), [1, 1, 0.5, 0.5, 1 / 3]),
    "PiecewiseConstantLR": (lambda o: PiecewiseConstantLR(o, [2, 3], [1, 0.5, 0.1]), [1, 1, 0.5, 0.1, 0.1]),
    "PiecewiseConstantLR-tf": (
        lambda o: PiecewiseConstantLR(o, [2, 3], [1, 0.5, 0.1], convention="tf"),
        [1, 1, 1, 0.5, 0.1],
    ),
    "TanhLR": (lambda o: TanhLR(o, 4), [0.5 * (1 - math.tanh(x)) for x in (-7, -4.5, -2, 0.5)] + [0, 0]),
    "REXLR": (lambda o: REXLR(o, 4, 0.2), [1, 0.2 + 0.8 * 6 / 7, 0.2 + 0.8 * 2 / 3, 0.52, 0.2, 0.2]),
    "WarmupLR": (lambda o: WarmupLR(o, Linear(3), 2), [0.5, 1, 0.75, 0.5, 0.25, 0, 0]),
    "WarmupLR-torch": (
        lambda o: WarmupLR(o, torchs.ExponentialLR(o, 0.5), 2),
        [0.5, 1, 0.5, 0.25, 0.125],
    ),
    "WarmupLR-torch-hf": (
        lambda o: WarmupLR(o, torchs.ExponentialLR(o, 0.5), 2, convention="hf"),
        [0, 0.5, 1, 0.5, 0.25, 0.125],
    ),
    "WarmupLR-torch-product": (
        lambda o: WarmupLR(o, torchs.ExponentialLR(o, 0.5), 4, convention="product"),
        [0, 0.125, 0.125, 0.09375, 0.0625, 0.03125],
    ),
    "WarmupLR-torch-sequential": (
        lambda o: WarmupLR(o, sequential(o), 2),
        [0.25, 0.5, 0.5, 1, 1, 0.1, 0.1],
    ),
}
each_named = pytest.mark.parametrize(("make", "expected"), NAMED.values(), ids=NAMED)


def micro_steps(optimizer: Any, scheduler: Any, steps: int) -> list[list[float]]:
    """Gradients of four backward passes a step."""
    applied = []
    for micro in range(1, 4 * steps + 1):
        for group in optimizer.param_groups:
            for p in group["params"]:
                (p * torch.ones_like(p)).sum().backward()
        if micro % 4 == 0:
            applied.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return applied


def scaled_steps(optimizer: Any, scheduler: Any, steps: int) -> list[list[float]]:
    """Under a GradScaler that skips the first and the fourth step."""
    scaler = optimx.GradScaler("cpu", init_scale=4.0)
    applied = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if getattr(scheduler, "after", None) is not None:
            # torch's own schedulers warn of the skipped step
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        for step in range(steps):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.full_like(p, float("inf") if step in (0, 3) else 1.0)
            applied.append([group["lr"] for group in optimizer.param_groups])
            scaler.scale(torch.zeros(()))
            before = optimizer.param_groups[0]["params"][0].detach().clone()
            scaler.step(optimizer)
            scaler.update()
            # an lr of zero changes nothing either
            moved = not torch.equal(optimizer.param_groups[0]["params"][0], before)
            assert moved == (step not in (0, 3) and applied[-1][0] > 0)
            scheduler.step()
    return applied


each_loop = pytest.mark.parametrize("loop", [train, scaled_steps, micro_steps], ids=["plain", "scaler", "accumulation"])


@each_loop
@each_named
def test_numbers_in_training_and_two_groups_keep_their_ratio(make: Make, expected: list[float], loop: Any) -> None:
    optimizer = make_optimizer(cls=optimx.AdamW)
    rows = loop(optimizer, make(optimizer), len(expected))
    assert [high for _, high in rows] == approx(expected)
    assert [low for low, _ in rows] == approx([0.1 * factor for factor in expected])


def test_every_named_class_is_tried() -> None:
    named = {name for name in optimx.lr_scheduler.__all__ if name.endswith("LR") or name in ("SGDR",)}
    tried = {name.split("-")[0] for name in NAMED}
    assert named - set(torchs.__all__) - tried == {"GreedyLR", "ScheduleLR"}


@each_order
@each_named
def test_resume(make: Make, expected: list[float], order: Any) -> None:
    optimizer = make_optimizer()
    scheduler = make(optimizer)
    for done in range(len(expected) - 1):
        resumed = order(make, save(optimizer, scheduler))
        assert [high for _, high in train(*resumed, len(expected) - done)] == approx(expected[done:])
        train(optimizer, scheduler, 1)


@each_named
def test_deepcopy_and_pickle(make: Make, expected: list[float]) -> None:
    optimizer = make_optimizer()
    scheduler = make(optimizer)
    train(optimizer, scheduler, 3)
    for duplicate in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert factors(duplicate, len(expected) - 3) == approx(expected[3:])


@each_named
def test_tensor_lr(make: Make, expected: list[float]) -> None:
    lr = torch.tensor(1.0, dtype=torch.float64)
    optimizer = make_optimizer([lr])
    scheduler = make(optimizer)
    if isinstance(getattr(scheduler, "after", None), torchs.SequentialLR):
        of_float, of_tensor = (factors(sequential(make_optimizer([one])), 5) for one in (1.0, torch.tensor(1.0)))
        if of_tensor != pytest.approx(of_float):
            pytest.skip(f"torch {torch.__version__}: SequentialLR makes {of_tensor} of a tensor lr, of 1.0 {of_float}")
    assert factors(scheduler, len(expected)) == approx(expected)
    assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("eta_min", [0.0, 0.01])
@pytest.mark.parametrize("T_mult", [1, 2, 3])
@pytest.mark.parametrize("T_0", [1, 3, 10])
def test_sgdr_is_torchs_with_the_defaults(T_0: int, T_mult: int, eta_min: float) -> None:
    ours, stock = make_optimizer(), make_optimizer()
    a = SGDR(ours, T_0, T_mult, eta_min)
    b = torchs.CosineAnnealingWarmRestarts(stock, T_0, T_mult, eta_min)
    for row, wanted in zip(train(ours, a, 40), train(stock, b, 40), strict=True):
        assert row == approx(wanted)


def test_absolute_floor_and_warmup_start() -> None:
    optimizer = make_optimizer()
    scheduler = WarmupLinearLR(optimizer, Warmup(2, start=Absolute(0.05)), 4, Absolute(0.02))
    assert train(optimizer, scheduler, 5) == [
        pytest.approx(row)
        for row in (
            [0.05, 0.05],
            [0.1, 1],
            [0.02 + 0.16 / 3, 0.02 + 1.96 / 3],
            [0.02 + 0.08 / 3, 0.02 + 0.98 / 3],
            [0.02, 0.02],
        )
    ]


# a stable phase without a horizon


def open_ended(optimizer: Any) -> WSDLR:
    return WSDLR(optimizer, 2, None, 3, "linear")


@each_order
def test_stable_phase_without_a_horizon(order: Any) -> None:
    optimizer = make_optimizer()
    scheduler = open_ended(optimizer)
    assert factors(scheduler, 100) == approx([0.5] + [1] * 99)
    optimizer, scheduler = order(open_ended, save(optimizer, scheduler))
    scheduler.start_decay()
    assert factors(scheduler, 2) == approx([1, 0.75])
    optimizer, scheduler = order(open_ended, save(optimizer, scheduler))
    assert factors(scheduler, 4) == approx([0.5, 0.25, 0, 0])
    assert scheduler.preview(4, 100) == [approx([0.1 * f, f]) for f in (1, 0.75, 0.5, 0.25)]


def test_start_decay_errors() -> None:
    with pytest.raises(RuntimeError, match="stable_steps should be None"):
        WSDLR(make_optimizer(), 2, 4, 3).start_decay()
    with pytest.raises(RuntimeError, match="after the warmup but comes at step: 0"):
        open_ended(make_optimizer()).start_decay()
    decaying = open_ended(make_optimizer())
    decaying.step(10)
    decaying.start_decay()
    other = WSDLR(make_optimizer(), 3, None, 3, "linear")
    with pytest.raises(ValueError, match=r"phases\[0\].steps: 2 in the checkpoint, 3 here"):
        other.load_state_dict(decaying.state_dict())
    assert other.schedule.steps is None


# around torch's schedulers


def test_warmup_before_torchs_one_cycle() -> None:
    """It overwrites initial_lr, so that SequentialLR's warmup goes to a 25th of what was meant; here to its first."""
    optimizer = make_optimizer([1.0])
    scheduler = WarmupLR(optimizer, torchs.OneCycleLR(optimizer, 1.0, total_steps=10), 2)
    alone = make_optimizer([1.0])
    cycle = factors(torchs.OneCycleLR(alone, 1.0, total_steps=10), 8)
    assert factors(scheduler, 9) == approx([0.02, *cycle])


def test_absolute_start_of_a_warmup_around_torchs() -> None:
    optimizer = make_optimizer()
    scheduler = WarmupLR(optimizer, torchs.ExponentialLR(optimizer, 0.5), Warmup(3, start=Absolute(0.02)))
    rows = train(optimizer, scheduler, 4)
    assert [low for low, _ in rows] == approx([0.02, 0.06, 0.1, 0.05])
    assert [high for _, high in rows] == approx([0.02, 0.51, 1, 0.5])


def test_warmup_of_another_scheduler() -> None:
    with pytest.raises(ValueError, match="around ExponentialLR but is of one around: StepLR"):
        optimizer = make_optimizer()
        state = WarmupLR(optimizer, torchs.StepLR(optimizer, 3), 2).state_dict()
        optimizer = make_optimizer()
        WarmupLR(optimizer, torchs.ExponentialLR(optimizer, 0.9), 2).load_state_dict(state)


def test_a_checkpoint_can_be_loaded_twice() -> None:
    """CyclicLR takes a key out of what it loads."""

    def make(optimizer: Any) -> WarmupLR:
        return WarmupLR(optimizer, torchs.CyclicLR(optimizer, 0.5, 1.0, 2, cycle_momentum=False), 2)

    optimizer = make_optimizer([1.0])
    scheduler = make(optimizer)
    whole = factors(scheduler, 3) + factors(scheduler, 4)
    assert whole == approx([0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.75])
    scheduler = make(make_optimizer([1.0]))
    factors(scheduler, 3)
    state = scheduler.state_dict()
    for _ in range(2):
        scheduler = make(make_optimizer([1.0]))
        scheduler.load_state_dict(state)
        assert factors(scheduler, 4) == approx(whole[3:])


def test_warmup_changed_on_resume() -> None:
    optimizer = make_optimizer()
    saved = save(optimizer, WarmupLR(optimizer, torchs.ExponentialLR(optimizer, 0.5), 2))
    optimizer = make_optimizer()
    scheduler = WarmupLR(optimizer, torchs.ExponentialLR(optimizer, 0.5), 4)
    with pytest.raises(ValueError, match=r"phases\[0\].steps: 2 in the checkpoint, 4 here"):
        scheduler.load_state_dict(saved["scheduler"])
    scheduler = WarmupLR(optimizer, scheduler.after, 4, on_mismatch="use_new")
    scheduler.load_state_dict(saved["scheduler"])
    assert factors(scheduler, 4) == approx([0.25, 0.5, 0.75, 1])


# a plateau


def plateau(optimizer: Any, **options: Any) -> PlateauWithWarmup:
    return PlateauWithWarmup(optimizer, 3, patience=0, factor=0.5, **options)


def fed(scheduler: PlateauWithWarmup, metrics: list[float | None]) -> list[float]:
    applied = []
    for metric in metrics:
        applied.append(scheduler.optimizer.param_groups[-1]["lr"])
        scheduler.step(metric)
    return applied


@pytest.mark.parametrize(
    ("during", "expected"),
    [
        (False, [1 / 3, 2 / 3, 1, 1, 1, 0.5, 0.25, 0.25]),
        (True, [1 / 3, 2 / 3, 0.5, 0.25, 0.125, 1 / 16, 1 / 32, 1 / 32]),
    ],
    ids=["after", "inside"],
)
def test_plateau(during: bool, expected: list[float]) -> None:
    scheduler = plateau(make_optimizer(cls=optimx.AdamW), during_warmup=during)
    assert fed(scheduler, [1, 1, 1, 1, 1, 1, 0.5, 0.4]) == approx(expected)
    low, high = scheduler.get_last_lr()
    assert low == pytest.approx(high / 10)


def test_plateau_by_epochs_with_a_warmup_by_steps() -> None:
    scheduler = plateau(make_optimizer())
    assert fed(scheduler, [None] * 4) == approx([1 / 3, 2 / 3, 1, 1])
    scheduler.report(1.0)
    assert fed(scheduler, [None] * 2) == approx([1, 1])
    scheduler.report(1.0)
    assert scheduler.last_epoch == 6
    assert fed(scheduler, [None] * 2) == approx([0.5, 0.5])


@each_order
@pytest.mark.parametrize("during", [False, True], ids=["after", "inside"])
def test_plateau_resumes(during: bool, order: Any) -> None:
    def make(optimizer: Any) -> PlateauWithWarmup:
        return plateau(optimizer, during_warmup=during)

    metrics: list[float | None] = [1, 1, 1, 1, 0.5, 0.5, 0.6, 0.4]
    whole = fed(make(make_optimizer()), metrics)
    for done in range(len(metrics)):
        scheduler = make(make_optimizer())
        fed(scheduler, metrics[:done])
        _, resumed = order(make, save(scheduler.optimizer, scheduler))
        assert fed(resumed, metrics[done:]) == approx(whole[done:])


class Following:
    """A scheduler that a loop steps as one without a metric."""

    def __init__(self, scheduler: Any, metrics: list[float]) -> None:
        self.scheduler, self.metrics = scheduler, iter(metrics)

    def step(self) -> None:
        self.scheduler.step(next(self.metrics))


def greedy(optimizer: Any, **options: Any) -> GreedyLR:
    low, high = ([bound * group["lr"] for group in optimizer.param_groups] for bound in (0.2, 2.0))
    return GreedyLR(optimizer, factor=0.5, patience=1, min_lr=low, max_lr=high, **options)


#: What follows a metric, the metrics, and the factors that steps are taken with.
FOLLOWERS: dict[str, tuple[Callable[..., Any], list[float], list[float]]] = {
    "plateau": (plateau, [1] * 6 + [0.5, 0.4], [1 / 3, 2 / 3, 1, 1, 1, 0.5, 0.25, 0.25]),
    "plateau-inside": (
        lambda o: plateau(o, during_warmup=True),
        [1] * 6 + [0.5, 0.4],
        [1 / 3, 2 / 3, 0.5, 0.25, 0.125, 1 / 16, 1 / 32, 1 / 32],
    ),
    "greedy": (greedy, [4, 3, 2, 2, 2, 2, 2, 2], [1, 1, 2, 2, 2, 1, 1, 0.5]),
    # means of two: inf, inf, 3.5, 2.5, 2, 2, ...
    "greedy-smooth": (
        lambda o: greedy(o, smooth=True, window_size=2),
        [math.inf, 4, 3, 2, 2, 2, 2, 2],
        [1, 1, 0.5, 0.5, 1, 1, 1, 0.5],
    ),
}


@each_loop
@pytest.mark.parametrize(("make", "metrics", "expected"), FOLLOWERS.values(), ids=FOLLOWERS)
def test_metrics_in_training(make: Any, metrics: list[float], expected: list[float], loop: Any) -> None:
    """One metric a step of the optimizer, skipped or not, and no warning of skipped ones."""
    optimizer = make_optimizer(cls=optimx.AdamW)
    rows = loop(optimizer, Following(make(optimizer), metrics), len(expected))
    assert [high for _, high in rows] == approx(expected)
    assert [low for low, _ in rows] == approx([0.1 * factor for factor in expected])


@pytest.mark.parametrize("make", [plateau, greedy])
def test_resume_between_skipped_steps_and_metrics(make: Any) -> None:
    """Optimizer, scaler and scheduler go on from a checkpoint as they would have without."""
    metrics = [1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]

    def run(steps: range, state: dict[str, Any] | None) -> tuple[dict[str, Any], list[Any]]:
        optimizer = make_optimizer(cls=optimx.AdamW)
        scheduler, scaler = make(optimizer), optimx.GradScaler("cpu", init_scale=4.0)
        parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if state is not None:
            for p, saved in zip(params, state["params"], strict=True):
                p.data.copy_(saved)
            for name, part in parts.items():
                part.load_state_dict(state[name])
        for step in steps:
            for p in params:
                p.grad = torch.full_like(p, float("inf") if step in (0, 3, 4) else 1.0 + step)
            scaler.scale(torch.zeros(()))
            scaler.step(optimizer)
            scaler.update()
            scheduler.step(metrics[step])
        numbers = [scheduler.get_last_lr(), scaler.get_scale(), [p.tolist() for p in params]]
        saved = {name: part.state_dict() for name, part in parts.items()}
        return pickle.loads(pickle.dumps({**saved, "params": [p.detach() for p in params]})), numbers

    _, whole = run(range(8), None)
    for done in range(1, 8):
        assert run(range(done, 8), run(range(done), None)[0])[1] == whole


def test_torchs_schedulers_go_forwards_only() -> None:
    optimizer = make_optimizer([1.0])
    scheduler = WarmupLR(optimizer, torchs.ExponentialLR(optimizer, 0.5), 3)
    optimizer.step()
    scheduler.step(5)
    assert scheduler.get_last_lr() == approx([0.125])
    with pytest.raises(ValueError, match=r"epoch should be >= 5, as ExponentialLR does not go back, but is: 4"):
        scheduler.step(4)
    with pytest.raises(TypeError, match="which ExponentialLR is not"):
        scheduler.preview(3)


# what torch gets wrong, and what to write instead


def test_nested_sequences() -> None:
    """SequentialLR with one inside: NotImplementedError at its milestone."""
    optimizer = make_optimizer([1.0])
    inner = torchs.SequentialLR(
        optimizer, [torchs.ConstantLR(optimizer, 1.0), torchs.ExponentialLR(optimizer, 0.5)], [2]
    )
    outer = torchs.SequentialLR(optimizer, [torchs.LinearLR(optimizer, 0.5, total_iters=2), inner], [2])
    with pytest.raises(NotImplementedError):
        train(optimizer, outer, 4)
    scheduler = ScheduleLR(make_optimizer([1.0]), Warmup(2) >> (Hold(2) >> Exponential(0.5)))
    assert factors(scheduler, 7) == approx([0.5, 1, 1, 1, 0.5, 0.25, 0.125])


def test_exponential_after_a_warmup_reaches_the_peak() -> None:
    """SequentialLR goes on from where the warmup was: MultiplicativeLR never has the peak."""
    optimizer = make_optimizer([1.0])
    members = [torchs.LinearLR(optimizer, 0.1, total_iters=3), torchs.MultiplicativeLR(optimizer, lambda step: 0.9)]
    assert max(factors(torchs.SequentialLR(optimizer, members, [3]), 6)) < 0.75
    optimizer = make_optimizer([1.0])
    assert factors(WarmupLR(optimizer, torchs.MultiplicativeLR(optimizer, lambda step: 0.9), 3), 5) == approx(
        [1 / 3, 2 / 3, 1, 0.9, 0.81]
    )


def test_warmup_times_restarts() -> None:
    """ChainedScheduler loses the warmup one way round, and rises to 3.9 the other."""
    optimizer = make_optimizer([1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        members: list[Any] = [torchs.CosineAnnealingWarmRestarts(optimizer, 4), torchs.LinearLR(optimizer, 0.1)]
        assert max(factors(torchs.ChainedScheduler(members), 3)) > 2
    product = Warmup(4) * Restarts(Cosine(4))
    assert factors(ScheduleLR(make_optimizer([1.0]), product), 6) == approx(
        [0.25, 0.5 * (1 + C) / 2, 0.75 * 0.5, (1 - C) / 2, 1, (1 + C) / 2]
    )


def test_no_steps_are_no_warmup() -> None:
    """LinearLR(total_iters=0) stays at its start factor for ever."""
    assert factors(torchs.LinearLR(make_optimizer([1.0]), 0.5, total_iters=0), 3) == [0.5, 0.5, 0.5]
    assert factors(WarmupConstantLR(make_optimizer([1.0]), 0), 3) == [1, 1, 1]
    assert factors(WarmupCosineLR(make_optimizer([1.0]), 0, 0, 0.5), 2) == [0.5, 0.5]


#: A warmup that is all of the training.
NO_DECAY: dict[str, Make] = {
    "WarmupCosineLR": lambda o: WarmupCosineLR(o, 4, 4),
    "WarmupCosineLR-floor": lambda o: WarmupCosineLR(o, 4, 4, 0.1),
    "WarmupLinearLR": lambda o: WarmupLinearLR(o, 4.0, 4.0),  # type: ignore[arg-type]
    "WarmupPolynomialLR": lambda o: WarmupPolynomialLR(o, Warmup(4), 4),
    "WSDLR": lambda o: WSDLR(o, 4, 0, 0),
    "SGDR": lambda o: SGDR(o, 4, warmup_steps=4, warmup_each=True),
    "WarmupLR": lambda o: WarmupLR(o, Linear(0), 4),
}


@pytest.mark.parametrize("make", NO_DECAY.values(), ids=NO_DECAY)
def test_warmup_as_long_as_the_training(make: Make) -> None:
    assert factors(make(make_optimizer([1.0])), 4) == approx([0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize("number", [4.0, torch.tensor(4.0)], ids=["float", "tensor"])
def test_whole_numbers_of_any_type_are_steps(number: Any) -> None:
    for make in (
        lambda o, n: WarmupCosineLR(o, n, 2 * n),
        lambda o, n: WSDLR(o, n, n, n),
        lambda o, n: SGDR(o, n, warmup_steps=n, cycles=n),
        lambda o, n: NoamLR(o, n),
        lambda o, n: WarmupMultiStepLR(o, [n], warmup_iters=n),
        lambda o, n: PiecewiseConstantLR(o, [n], [1, 0.5]),
        lambda o, n: TanhLR(o, n),
        lambda o, n: PlateauWithWarmup(o, n, patience=2),
        lambda o, n: ScheduleLR(o, Cosine(9), last_epoch=n),
    ):
        assert make(make_optimizer([1.0]), number).state_dict() == make(make_optimizer([1.0]), 4).state_dict()


@pytest.mark.parametrize("T_mult", [1, 2])
def test_between_two_steps(T_mult: int) -> None:
    """Epochs and parts of them, as the documentation of CosineAnnealingWarmRestarts has it; and steps after them."""
    ours, stock = make_optimizer(), make_optimizer()
    a, b = SGDR(ours, 3, T_mult), torchs.CosineAnnealingWarmRestarts(stock, 3, T_mult)
    for epoch in [epoch + i / 4 for epoch in range(10) for i in range(4)] + [2.5]:
        a.step(epoch)
        b.step(epoch)
        assert a.get_last_lr() == approx(b.get_last_lr())
    resumed = SGDR(make_optimizer(), 3, T_mult)
    resumed.load_state_dict(save(ours, a)["scheduler"])
    assert resumed.get_last_lr() == resumed.get_lr() == a.get_last_lr()
    for _ in range(4):
        a.step()
        b.step()
        assert a.get_last_lr() == approx(b.get_last_lr())


def test_stable_phase_that_ends_between_two_steps() -> None:
    scheduler = open_ended(make_optimizer([1.0]))
    scheduler.step(4.5)
    scheduler.start_decay()
    scheduler.step()
    # the decay began at step 5, in four parts
    assert scheduler.get_last_lr()[0] == pytest.approx(1 - 1.5 / 4)


def test_added_group() -> None:
    """LambdaLR and CosineAnnealingWarmRestarts fail with the next step, or leave the new group out."""
    for make in (lambda o: torchs.LambdaLR(o, lambda step: 1.0), lambda o: torchs.CosineAnnealingWarmRestarts(o, 4)):
        optimizer = make_optimizer([1.0])
        scheduler = make(optimizer)
        optimizer.step()
        optimizer.add_param_group({"params": [Parameter(torch.zeros(1))], "lr": 0.5})
        with contextlib.suppress(ValueError):
            scheduler.step()
        assert optimizer.param_groups[1]["lr"] == 0.5
        assert "initial_lr" not in optimizer.param_groups[1]
    optimizer = make_optimizer([1.0])
    scheduler = SGDR(optimizer, 4)
    optimizer.add_param_group({"params": [Parameter(torch.zeros(1))], "lr": 0.5})
    scheduler.step()
    assert train(optimizer, scheduler, 1) == [approx([(1 + C) / 2, (1 + C) / 4])]


def add_group(optimizer: Any, lr: float) -> None:
    optimizer.add_param_group({"params": [Parameter(torch.zeros(1))], "lr": lr})


def test_group_added_to_greedy() -> None:
    scheduler = GreedyLR(make_optimizer([0.5]), factor=0.5, patience=0, min_lr=0.1, max_lr=0.6, reset_start=1)
    numbers = []
    for step, metric in enumerate([1.0, 1, 1, 0, -1, 1, 1, 1]):
        if step == 1:
            add_group(scheduler.optimizer, 0.3)
        scheduler.step(metric)
        numbers.append(tuple(scheduler.get_last_lr()))
    # begins anew with its own learning rate, when both are at the bound
    assert numbers == [
        (0.6,),
        (0.3, 0.15),
        (0.15, 0.1),
        (0.3, 0.2),
        (0.6, 0.4),
        (0.3, 0.2),
        (0.15, 0.1),
        (0.5, 0.3),
    ]
    state = save(scheduler.optimizer, scheduler)["scheduler"]
    later = GreedyLR(make_optimizer([0.5, 0.3, 0.9]), factor=0.5, patience=0)
    later.load_state_dict(state)
    later.step(-9.0)
    assert later.get_last_lr() == approx([0.6, 0.6, 0.9])
    fewer = GreedyLR(make_optimizer([0.5]))
    with pytest.raises(ValueError, match="param_groups should be 2, as in the checkpoint, but are: 1"):
        fewer.load_state_dict(state)
    assert fewer.factor == 0.95


def test_group_added_to_greedy_with_bounds_of_each() -> None:
    scheduler = GreedyLR(make_optimizer([0.5]), factor=0.5, patience=0, min_lr=[0.1])
    add_group(scheduler.optimizer, 0.3)
    with pytest.raises(
        ValueError, match=r"min_lr should be one, or one for each of the 2 param_groups, but are: \[0.1\]"
    ):
        scheduler.step(1.0)
    scheduler.min_lrs.append(0.25)
    for _ in range(3):
        scheduler.step(1.0)
    assert scheduler.get_last_lr() == [0.25, 0.25]
    scheduler.optimizer.param_groups.pop()
    with pytest.raises(ValueError, match="param_groups should be 2, or more, but are: 1"):
        scheduler.step(1.0)


def test_group_added_to_a_warmup_around_torchs() -> None:
    scheduler = PlateauWithWarmup(make_optimizer([1.0]), 4, patience=0)
    add_group(scheduler.optimizer, 0.5)
    lrs = []
    for metric in (None, None, None, None, 1.0, 1.0):
        scheduler.step(metric)
        lrs.append(scheduler.get_last_lr()[1])
    assert lrs == approx([0.25, 0.375, 0.5, 0.5, 0.5, 0.05])
    scheduler.optimizer.param_groups.pop(0)
    with pytest.raises(ValueError, match="param_groups should be 2, or more, but are: 1"):
        scheduler.step()
    optimizer = make_optimizer([1.0])
    around = WarmupLR(optimizer, torchs.LambdaLR(optimizer, lambda step: 1.0), 1)
    add_group(optimizer, 0.5)
    with pytest.raises(RuntimeError, match=r"param_groups should be 1, as torch's LambdaLR takes up none .* are: 2"):
        around.step()


def test_added_group_of_greedy() -> None:
    optimizer = make_optimizer([0.5])
    scheduler = GreedyLR(optimizer, factor=0.5, patience=1, min_lr=0.1)
    scheduler.step(1.0)
    optimizer.add_param_group({"params": [Parameter(torch.zeros(1))], "lr": 0.25})
    # worse, and worse again
    rates = []
    for metric in range(2, 8):
        scheduler.step(metric)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates == [[0.5, 0.25], [0.25, 0.125], [0.25, 0.125], [0.125, 0.1], [0.125, 0.1], [0.1, 0.1]]
    bounded = GreedyLR(optimizer, min_lr=[0.1, 0.2])
    optimizer.add_param_group({"params": [Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError, match="min_lr should be one, or one for each of the 3 param_groups"):
        bounded.step(1.0)


def test_stale_initial_lr() -> None:
    """A second CosineAnnealingLR, made after the first one ended, stays at zero for a whole period."""
    optimizer = make_optimizer([1.0])
    train(optimizer, torchs.CosineAnnealingLR(optimizer, 4), 4)
    assert max(factors(torchs.CosineAnnealingLR(optimizer, 4), 3)) < 1e-12
    assert factors(ScheduleLR(optimizer, Cosine(4)), 3) == approx([1, (1 + C) / 2, 0.5])


def test_milestones_out_of_order() -> None:
    """SequentialLR takes them, and steps wrongly."""
    optimizer = make_optimizer([1.0])
    torchs.SequentialLR(optimizer, [torchs.ConstantLR(optimizer) for _ in range(3)], [5, 3])
    with pytest.raises(ValueError, match=r"increasing but is: \[5, 3\]"):
        WarmupMultiStepLR(make_optimizer(), [5, 3])


def test_a_restart_that_torch_misses() -> None:
    """step(1210) with T_0=10, T_mult=3: a logarithm rounded down, the learning rate is 0 instead of the peak."""
    optimizer = make_optimizer([1.0])
    stock = torchs.CosineAnnealingWarmRestarts(optimizer, 10, 3)
    stock.step(1210)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)
    scheduler = SGDR(optimizer, 10, 3)
    scheduler.step(1210)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_plateau_beside_a_warmup() -> None:
    """Stepped side by side, LinearLR and ReduceLROnPlateau scale each other's values: the peak is never reached."""
    optimizer = make_optimizer([1.0])
    linear, stock = torchs.LinearLR(optimizer, 0.1, total_iters=5), torchs.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(8):
        optimizer.step()
        linear.step()
        stock.step(1.0)
    assert optimizer.param_groups[0]["lr"] < 1e-4
    scheduler = PlateauWithWarmup(make_optimizer([1.0]), 5, patience=0)
    assert fed(scheduler, [1.0] * 8) == approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 0.1])


# greedy


def greedy_numbers(metrics: list[float], **options: Any) -> list[float]:
    scheduler = GreedyLR(make_optimizer([0.5]), factor=0.5, patience=1, min_lr=0.1, **options)
    numbers = []
    for metric in metrics:
        scheduler.step(metric)
        numbers.append(scheduler.get_last_lr()[0])
    return numbers


@pytest.mark.parametrize(
    ("metrics", "options", "expected"),
    [
        # two better ones in a row raise, two others lower
        ([4, 3, 2, 2, 2, 2, 2], {}, [0.5, 1, 1, 1, 0.5, 0.5, 0.25]),
        ([1, 2, 3, 3, 3], {"mode": "max"}, [0.5, 1, 1, 1, 0.5]),
        ([4, 3, 2, 2, 2, 2, 2, 2], {"warmup": 2}, [0.5, 1, 1, 1, 1, 1, 0.5, 0.5]),
        ([1] * 9, {"cooldown": 1}, [0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125, 0.125, 0.1]),
        ([8, 7.9, 7.8, 1], {"threshold": 0.1, "threshold_mode": "rel"}, [0.5, 0.5, 0.25, 0.25]),
        # Hugging Face's share of a metric below zero: slightly worse is better
        ([-8, -7.9, -7.8, -7.7], {"threshold": 0.1, "threshold_mode": "rel"}, [0.5, 1, 1, 1]),
        ([4, 2, 3, 4, 4], {"smooth": True, "window_size": 2}, [0.5, 1, 1, 1, 0.5]),
        ([1] * 13, {"reset_start": 2}, [0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.1, 0.1, 0.5, 0.5, 0.5, 0.25, 0.25]),
        # at the bound twice, but raised between
        (
            [9] * 7 + [8, 7] + [9] * 4,
            {"reset_start": 2},
            [0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.1, 0.1, 0.2, 0.2, 0.1, 0.1, 0.5],
        ),
    ],
    ids=["min", "max", "warmup", "cooldown", "relative", "below-zero", "smooth", "reset", "reset-anew"],
)
def test_greedy(metrics: list[float], options: dict[str, Any], expected: list[float]) -> None:
    assert greedy_numbers(metrics, **options) == approx(expected)


@pytest.mark.parametrize("smooth", [False, True])
def test_nan_that_greedy_ignores(smooth: bool) -> None:
    metrics, options = [4.0, 3, 2, 2, 2, 2, 2], {"smooth": smooth, "window_size": 2}
    plain = greedy_numbers(metrics, **options)
    with_nan = [*metrics[:2], math.nan, math.nan, *metrics[2:]]
    ignored = greedy_numbers(with_nan, **options, ignore_nan=True)
    assert [*ignored[:2], *ignored[4:]] == plain
    assert greedy_numbers(with_nan, **options) != ignored
    counted = GreedyLR(make_optimizer(), ignore_nan=True)
    counted.step(math.nan)
    assert counted.last_epoch == 1


@pytest.mark.parametrize("nan", [math.nan, torch.tensor(math.nan)])
def test_nan_that_a_plateau_ignores(nan: Any) -> None:
    """Torch's class takes it for a metric that is not better; so does ours unless it is told not to."""
    stock = torchs.ReduceLROnPlateau(make_optimizer([1.0]), patience=1)
    kept, stocks = (PlateauWithWarmup(make_optimizer([1.0]), 0, patience=1, ignore_nan=i) for i in (True, False))
    for metric in (1.0, nan, nan):
        stock.step(metric)
        for scheduler in (kept, stocks):
            scheduler.step(metric)
    assert kept.get_last_lr() == [1.0]
    assert stocks.get_last_lr() == stock.get_last_lr() == approx([0.1])
    kept.step(2.0)
    kept.step(2.0)
    assert kept.get_last_lr() == approx([0.1])


def test_greedy_with_an_epoch_and_told_of(capsys: Any) -> None:
    scheduler = GreedyLR(make_optimizer([0.5]), factor=0.5, patience=0, verbose=True)
    scheduler.step(1.0, 7)
    scheduler.step(1.0)
    assert scheduler.last_epoch == 8
    assert capsys.readouterr().out.splitlines() == [
        "Epoch 7: learning rate of group 0 from 5.0000e-01 to 1.0000e+00.",
        "Epoch 8: learning rate of group 0 from 1.0000e+00 to 5.0000e-01.",
    ]


def test_base_lrs_of_those_that_work_out_learning_rates_otherwise() -> None:
    scheduler = GreedyLR(make_optimizer([0.5]), factor=0.5, patience=0, min_lr=0.5, reset_start=1)
    scheduler.base_lrs = [0.8]
    for metric in (1.0, 1):
        scheduler.step(metric)
    assert scheduler.get_last_lr() == [0.8]
    scheduler.base_lrs[0] = 0.7
    assert scheduler.initial_lrs == [0.7]
    optimizer = make_optimizer([1.0])
    adafactor = optimx.Adafactor([Parameter(torch.zeros(2))])
    for refusing in (
        WarmupLR(optimizer, torchs.StepLR(optimizer, 3), 2),
        PlateauWithWarmup(make_optimizer([1.0]), 2),
        AdafactorSchedule(adafactor),
    ):
        before = [*refusing.base_lrs]
        with pytest.raises(TypeError, match="base_lrs should not be set"):
            refusing.base_lrs = [0.5]
        with pytest.raises(TypeError, match="base_lrs should not be set"):
            refusing.base_lrs[0] = 0.5
        assert refusing.base_lrs == before


def test_warmups_of_two_kinds() -> None:
    """What is around a torch scheduler is a class of its own: the other one knows nothing of it."""
    around = WarmupLR(optimizer := make_optimizer([1.0]), after=torchs.ExponentialLR(optimizer, 0.5), warmup_steps=2)
    plain = WarmupLR(make_optimizer([1.0]), Linear(3), 2)
    assert isinstance(around, WarmupLR)
    assert type(around) is not type(plain) is WarmupLR
    assert plain.after is None
    assert plain.warmup_steps == around.warmup_steps == 2
    assert type(copy.deepcopy(around)) is type(pickle.loads(pickle.dumps(around))) is type(around)

    class Mine(WarmupLR):
        pass

    with pytest.raises(TypeError, match=r"^after should be a Schedule but is: ExponentialLR$"):
        Mine(optimizer, torchs.ExponentialLR(optimizer, 0.5), 2)


def test_greedy_resumes() -> None:
    metrics = [4, 3, 2, 2, 2, 2, 2, 5, 4, 3, 2, 1]
    whole = greedy_numbers([*map(float, metrics)])
    for done in range(len(metrics)):
        first = GreedyLR(make_optimizer([0.5]), factor=0.5, patience=1, min_lr=0.1)
        for metric in metrics[:done]:
            first.step(metric)
        state = pickle.loads(pickle.dumps(first.state_dict()))
        again = GreedyLR(make_optimizer([0.5]), factor=0.5, patience=1, min_lr=0.1)
        again.load_state_dict(state)
        assert again.get_last_lr() == first.get_last_lr() == [again.optimizer.param_groups[0]["lr"]]
        for metric in metrics[done:]:
            again.step(metric)
        assert again.get_last_lr() == [whole[-1]]


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "warmup-longer": (lambda: WarmupCosineLR(make_optimizer(), 11, 10), ValueError, "<= total_steps, 10, but is: 11"),
    "negative-warmup": (
        lambda: WSDLR(make_optimizer(), -1, 2, 3),
        ValueError,
        "warmup_steps should be >= 0 but is: -1",
    ),
    "negative-total": (lambda: WarmupLinearLR(make_optimizer(), 0, -1), ValueError, "total_steps should be >= 0"),
    "ratio": (lambda: WarmupLinearLR(make_optimizer(), 0.1, 9), TypeError, "warmup_steps should be a whole number"),  # type: ignore
    "float-total": (lambda: WarmupLinearLR(make_optimizer(), 0, 2.5), TypeError, "total_steps should be a whole"),  # type: ignore
    "floor": (
        lambda: WarmupLinearLR(make_optimizer(), 1, 3, 1.2),
        ValueError,
        "min_lr_ratio should be in .* but is: 1.2",
    ),
    "stable": (lambda: WSDLR(make_optimizer(), 1, -2, 3), ValueError, "stable_steps should be >= 0 but is: -2"),
    "decay-steps": (lambda: WSDLR(make_optimizer(), 1, 2, -3), ValueError, "decay_steps should be >= 0 but is: -3"),
    "rex-floor": (lambda: REXLR(make_optimizer(), 9, -1), ValueError, "min_lr_ratio should be in .* but is: -1"),
    "tanh-steps": (lambda: TanhLR(make_optimizer(), -9), ValueError, "total_steps should be >= 0 but is: -9"),
    "warmup-factor": (
        lambda: WarmupMultiStepLR(make_optimizer(), [3], warmup_factor=2),
        ValueError,
        "warmup_factor should be in .* but is: 2",
    ),
    "decay": (lambda: WSDLR(make_optimizer(), 1, 2, 3, "1-sqr"), ValueError, "'1-sqr'; did you mean '1-sqrt'"),
    "convention": (
        lambda: WarmupLinearLR(make_optimizer(), 1, 3, convention="titan"),
        ValueError,
        "'titan'; did you mean 'torchtitan'",
    ),
    "eta-min": (lambda: SGDR(make_optimizer(), 3, eta_min=0.5), ValueError, "should be <= 0.1, the lr of .* is: 0.5"),
    "T_0": (lambda: SGDR(make_optimizer(), 0), ValueError, "T_0 should be >= 1 but is: 0"),
    "T_mult": (lambda: SGDR(make_optimizer(), 3, -1), ValueError, "T_mult should be > 0 but is: -1"),
    "plateau": (
        lambda: WarmupLR((o := make_optimizer()), torchs.ReduceLROnPlateau(o), 3),
        ValueError,
        "for ReduceLROnPlateau write PlateauWithWarmup",
    ),
    "another-optimizer": (
        lambda: WarmupLR(make_optimizer(), torchs.StepLR(make_optimizer(), 3), 3),
        ValueError,
        "a scheduler of this optimizer",
    ),
    "between-steps-of-torchs": (
        lambda: WarmupLR((o := make_optimizer()), torchs.StepLR(o, 3), 3).step(1.5),
        TypeError,
        "epoch should be a whole number but is: 1.5",
    ),
    "no-scheduler": (lambda: WarmupLR(make_optimizer(), 3, 3), TypeError, "after should be .* but is: int"),  # type: ignore
    "ahead": (
        lambda: WarmupLR((o := make_optimizer()), torchs.StepLR(o, 3), 3, convention="timm"),
        ValueError,
        "but is: timm",
    ),
    "base-lrs": (
        lambda: WarmupLR((o := make_optimizer()), torchs.StepLR(o, 3), 3, base_lrs=1),
        TypeError,
        "base_lrs should be given to the torch scheduler",
    ),
    "greedy-factor": (lambda: GreedyLR(make_optimizer(), factor=1.0), ValueError, r"factor should be in \(0, 1\)"),
    "greedy-mode": (lambda: GreedyLR(make_optimizer(), "mim"), ValueError, "'mim'; did you mean 'min'"),  # type: ignore
    "greedy-after": (
        lambda: WarmupLR((o := make_optimizer()), GreedyLR(o), 3),
        ValueError,
        "needs no metric .* but is: GreedyLR",
    ),
    "greedy-bounds": (lambda: GreedyLR(make_optimizer(), min_lr=[0.1]), ValueError, "each of the 2 param_groups"),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
