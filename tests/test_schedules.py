"""Schedules as values: formulas, conventions, composition, serialisation, and what must hold for all of them."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import optimx
from optimx.lr_scheduler import (
    CONVENTIONS,
    REX,
    Absolute,
    Constant,
    Convention,
    Cooldown,
    Cosine,
    CosineWithHardRestarts,
    Cyclic,
    Exponential,
    Hold,
    InverseSqrt,
    InverseTime,
    Linear,
    LinearCosine,
    MultiStep,
    NaturalExponential,
    Noam,
    NormalizedExponential,
    OneCycle,
    OneMinusPower,
    OneMinusSqrt,
    Phases,
    Piecewise,
    Polynomial,
    Product,
    Restarts,
    Schedule,
    Staircase,
    Tanh,
    Warmup,
)

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
# a busy machine is slow now and then
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")
given = hypothesis.given


def values(schedule: Schedule, n: int) -> list[float]:
    return [schedule(step) for step in range(n)]


def approx(numbers: list[float], digits: int = 12) -> object:
    return pytest.approx(numbers, rel=0, abs=0.5 * 10**-digits)


# shapes: numbers worked out from the formulas at p = 0, 1/4, 1/2, 3/4, 1

C = math.sqrt(0.5)
SHAPES: dict[str, tuple[Schedule, list[float]]] = {
    "linear": (Linear(4), [1, 0.75, 0.5, 0.25, 0]),
    "linear-floor": (Linear(4, 0.2), [1, 0.8, 0.6, 0.4, 0.2]),
    "cosine": (Cosine(4), [1, (1 + C) / 2, 0.5, (1 - C) / 2, 0]),
    "cosine-floor": (Cosine(4, 0.5), [1, 0.5 + (1 + C) / 4, 0.75, 0.5 + (1 - C) / 4, 0.5]),
    "cosine-squared": (Cosine(4, power=2), [1, ((1 + C) / 2) ** 2, 0.25, ((1 - C) / 2) ** 2, 0]),
    "cosine-whole-wave": (Cosine(4, num_cycles=1), [1, 0.5, 0, 0.5, 1]),
    "cosine-k2": (Cosine(4, k=2), [1, 0.9903926402, 0.8535533906, 0.4024548390, 0]),
    "hard-restarts": (CosineWithHardRestarts(4, cycles=2), [1, 0.5, 1, 0.5, 0]),
    "polynomial": (Polynomial(4, power=2), [1, 0.5625, 0.25, 0.0625, 0]),
    "one-minus-square": (OneMinusPower(4), [1, 0.9375, 0.75, 0.4375, 0]),
    "one-minus-sqrt": (OneMinusSqrt(4), [1, 0.5, 1 - C, 1 - math.sqrt(0.75), 0]),
    "normalized-exponential": (NormalizedExponential(4, rate=0.0625), [1, 7 / 15, 0.2, 1 / 15, 0]),
    "tanh": (Tanh(4), [0.9999991685, 0.9998766054, 0.9820137900, 0.2689414214, 0]),
    "rex": (REX(4), [1, 6 / 7, 2 / 3, 0.4, 0]),
    "linear-cosine": (LinearCosine(4), [1.001, 0.75 * (1 + C) / 2 + 0.001, 0.251, 0.25 * (1 - C) / 2 + 0.001, 0.001]),
    "exponential": (Exponential(0.25, decay_steps=2), [1, 0.5, 0.25, 0.125, 0.0625]),
    "exponential-staircase": (Exponential(0.1, decay_steps=2, staircase=True), [1, 1, 0.1, 0.1, 0.01]),
    "exponential-floor": (Exponential(0.5, floor=0.2), [1, 0.5, 0.25, 0.2, 0.2]),
    "exponential-steps": (Exponential(0.5, steps=2), [1, 0.5, 0.25, 0.25, 0.25]),
    "natural-exponential": (NaturalExponential(math.log(4), decay_steps=2), [1, 0.5, 0.25, 0.125, 0.0625]),
    "inverse-time": (InverseTime(1.0, decay_steps=2), [1, 2 / 3, 0.5, 0.4, 1 / 3]),
    "inverse-time-staircase": (InverseTime(1.0, decay_steps=2, staircase=True), [1, 1, 0.5, 0.5, 1 / 3]),
    "inverse-sqrt": (InverseSqrt(1), [1, C, math.sqrt(1 / 3), 0.5, math.sqrt(0.2)]),
    "staircase": (Staircase(Linear(4), 2), [1, 1, 0.5, 0.5, 0]),
    "staircase-of-phases": (Staircase((Warmup(2) >> Linear(4)).with_convention("hf"), 3), [0, 0, 0, 0.75, 0.75]),
    "noam": (Noam(2), [0.5, 1, math.sqrt(2 / 3), C, math.sqrt(0.4)]),
    "noam-d-model": (Noam(2, d_model=4, scale=2), [1 / math.sqrt(8), C, math.sqrt(1 / 3), 0.5, math.sqrt(0.2)]),
    "constant": (Constant(0.3), [0.3] * 5),
    "hold": (Hold(2), [1] * 5),
    "multi-step": (MultiStep((1, 3)), [1, 0.1, 0.1, 0.01, 0.01]),
    "piecewise": (Piecewise((1, 3), (0.5, 1, 0.2)), [0.5, 1, 1, 0.2, 0.2]),
}


@pytest.mark.parametrize(("schedule", "expected"), SHAPES.values(), ids=SHAPES)
def test_shape(schedule: Schedule, expected: list[float]) -> None:
    assert values(schedule, 5) == approx(expected, 9)


# steps 0 .. 9, and 10 right after the last; N = 10, W = 2, a cosine to 0, as the projects have them
A = [0, 0.5, 1, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381, 0]
B = [0.5, 1, 1, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381, 0]
TABLE: dict[str, list[float]] = {
    # cos of k/9 of a half wave
    "every-step": [0.5, 1, 0.9698, 0.8830, 0.75, 0.5868, 0.4132, 0.25, 0.1170, 0.0302, 0],
    "hf": A,
    "megatron": A,
    "tf": A,
    "deepspeed": A,
    "timm-prefix": A,
    "torchtitan": B,
    "hf-cosine-warmup": [0.5, 1, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381, 0, 0],
    "deepspeed-cosine": [0, 0.5, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381, 0, 0],
    "beit": [0, 1, *B[2:]],
    "timm": [0, 0.5, 0.9045, 0.7939, 0.6545, 0.5, 0.3455, 0.2061, 0.0955, 0.0245, 0],
    # the ramp ends at the cosine of 2/10; the product has (1 + cos(pi/10)) / 4 at step 1
    "detectron2": [0, 0.4523, 0.9045, 0.7939, 0.6545, 0.5, 0.3455, 0.2061, 0.0955, 0.0245, 0],
    "product": [0, 0.4878, 0.9045, 0.7939, 0.6545, 0.5, 0.3455, 0.2061, 0.0955, 0.0245, 0],
}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_convention(convention: str) -> None:
    schedule = (Warmup(2) >> Cosine(8)).with_convention(convention)
    assert values(schedule, 11) == approx(TABLE[convention], 4)
    assert schedule(12) == schedule(1000) == schedule(10)


def cosine_to(low: float, p: float) -> float:
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * p))


# t: step, w: warmup steps, n: all steps, low: floor; from the projects' own definitions
PROJECTS: dict[str, tuple[str, Callable[[int, int, int, float], float]]] = {
    "hf": ("hf", lambda t, w, n, low: t / w if t < w else cosine_to(low, (t - w) / max(1, n - w))),
    # num_steps <= warmup_steps is the ramp
    "megatron": ("megatron", lambda t, w, n, low: t / w if w > 0 and t <= w else cosine_to(low, (t - w) / (n - w))),
    # CosineDecay(warmup_target=1, warmup_steps=w, decay_steps=n - w, alpha=low)
    "tf": ("tf", lambda t, w, n, low: t / w if t < w else cosine_to(low, min(t - w, n - w) / (n - w))),
    # n - w steps of decay after one virtual stable step
    "torchtitan": (
        "torchtitan",
        lambda t, w, n, low: (t + 1) / w if t < w else 1.0 if t < w + 1 else cosine_to(low, (t + 1 - w - 1) / (n - w)),
    ),
    "timm": ("timm", lambda t, w, n, low: t / w if t < w else cosine_to(low, t / n)),
    "timm-prefix": ("timm-prefix", lambda t, w, n, low: t / w if t < w else cosine_to(low, (t - w) / (n - w))),
    "deepspeed": (
        "deepspeed-cosine",
        lambda t, w, n, low: t / w if t < w else cosine_to(low, (t - w + 1) / (n - w)),
    ),
    # a line from 0 to what the scheduler has at w / n, then the scheduler
    "detectron2": (
        "detectron2",
        lambda t, w, n, low: t / w * cosine_to(low, w / n) if t < w else cosine_to(low, t / n),
    ),
    "detectron2-old": (
        "product",
        lambda t, w, n, low: min(1.0, t / max(w, 1)) * cosine_to(low, t / n) if w else cosine_to(low, t / n),
    ),
    "beit": (
        "beit",
        lambda t, w, n, low: t / max(1, w - 1) if t < w else cosine_to(low, (t - w) / (n - w)),
    ),
}


@pytest.mark.parametrize(("convention", "formula"), PROJECTS.values(), ids=PROJECTS)
@given(st.integers(0, 20), st.integers(1, 40), st.sampled_from([0.0, 0.1]))
def test_projects_numbers(
    convention: str, formula: Callable[[int, int, int, float], float], warmup: int, decay: int, low: float
) -> None:
    schedule = (Warmup(warmup) >> Cosine(decay, low)).with_convention(convention)
    total = warmup + decay
    assert values(schedule, total) == approx([formula(t, warmup, total, low) for t in range(total)])


@given(st.integers(2, 30), st.integers(1, 30))
def test_deepspeeds_logarithm_and_linear_decay(warmup: int, decay: int) -> None:
    schedule = (Warmup(warmup, "log") >> Linear(decay)).with_convention("deepspeed")
    rise = [math.log(t + 1) / math.log(warmup) for t in range(warmup)]
    fall = [(decay - t) / decay for t in range(decay + 1)]
    assert values(schedule, warmup + decay + 1) == approx(rise + fall)


def test_convention_with_its_floor_on_the_last_step() -> None:
    """And no rise after it, which Hugging Face's has."""
    schedule = (Warmup(2) >> Cosine(8, 0.1)).with_convention(Convention("one", "last", "last", "last"))
    expected = [0.5, 1, 0.9657, 0.8682, 0.7222, 0.55, 0.3778, 0.2318, 0.1343, 0.1, 0.1]
    assert values(schedule, 11) == approx(expected, 4)


def test_without_a_warmup() -> None:
    """The peak is applied all the same, except where a project counts the step before."""
    schedule = Warmup(0) >> Linear(4)
    for convention in ("every-step", "hf", "torchtitan", "timm"):
        assert values(schedule.with_convention(convention), 5) == approx([1, 0.75, 0.5, 0.25, 0])
    assert values(schedule.with_convention("deepspeed-cosine"), 5) == approx([0.75, 0.5, 0.25, 0, 0])


def test_every_step_with_a_stable_phase() -> None:
    schedule = Warmup(2) >> Hold(3) >> Linear(4, 0.2)
    assert values(schedule, 11) == approx([0.5, 1, 1, 1, 1, 0.84, 0.68, 0.52, 0.36, 0.2, 0.2])


def test_conventions_differ_by_the_phases_they_name() -> None:
    """Every field of a convention changes values."""
    base = Convention("zero", "after", "after")
    schedules = [
        base,
        Convention("one", "after", "after"),
        Convention("zero", "last", "after"),
        Convention("zero", "after", "last"),
        Convention("zero", "after", "start"),
        Convention("zero", "after", "after", "last"),
        Convention("zero", "after", "last", "last"),
        Convention("zero", "after", "start", target="peak"),
        Convention("zero", "after", "start", target="product"),
    ]
    curves = [tuple(values((Warmup(4) >> Cosine(6)).with_convention(convention), 11)) for convention in schedules]
    assert len(set(curves)) == len(curves)


# warmups: W = 4 from a start factor, and from zero

RAMPS: dict[str, tuple[Warmup, str, list[float]]] = {
    "linear-one": (Warmup(4), "every-step", [0.25, 0.5, 0.75, 1]),
    "linear-zero": (Warmup(4), "hf", [0, 0.25, 0.5, 0.75]),
    "linear-start": (Warmup(4, start=0.1), "every-step", [0.1, 0.4, 0.7, 1]),
    "linear-start-hf": (Warmup(4, start=0.2), "hf", [0.2, 0.4, 0.6, 0.8]),
    "linear-absolute": (Warmup(4, start=Absolute(0.1)), "every-step", [0.1, 0.4, 0.7, 1]),
    "cosine": (Warmup(4, "cosine"), "hf", [0, (1 - C) / 2, 0.5, (1 + C) / 2]),
    "sqrt": (Warmup(4, "sqrt"), "every-step", [0.5, C, math.sqrt(0.75), 1]),
    "1-sqrt": (Warmup(4, "1-sqrt"), "hf", [0, 1 - math.sqrt(0.75), 1 - C, 0.5]),
    "exponential": (Warmup(4, "exponential", 0.001), "every-step", [0.001, 0.01, 0.1, 1]),
    "constant": (Warmup(4, "constant", 0.3), "every-step", [0.3] * 4),
    # ln(n) / ln(W), complete on the last step
    "log-deepspeed": (Warmup(4, "log"), "deepspeed", [0, 0.5, math.log(3) / math.log(4), 1]),
    "log": (Warmup(4, "log"), "every-step", [math.log(n) / math.log(5) for n in (2, 3, 4, 5)]),
    "one-step": (Warmup(1), "every-step", [1]),
    "one-step-start": (Warmup(1, start=0.3), "every-step", [0.3]),
    "none": (Warmup(0), "every-step", []),
}


@pytest.mark.parametrize(("warmup", "convention", "expected"), RAMPS.values(), ids=RAMPS)
def test_warmup(warmup: Warmup, convention: str, expected: list[float]) -> None:
    schedule = Phases((warmup, Constant()), convention)
    assert values(schedule, len(expected)) == approx(expected)
    assert schedule(len(expected)) == 1


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(
    "after",
    [
        (Cosine(0),),
        (Linear(0, 0.2),),
        (Hold(0), OneMinusSqrt(0)),
        (Cooldown(0),),
        (Cosine(0) * Linear(0),),
        (Phases((Hold(0), Linear(0))),),
    ],
    ids=["cosine", "floor", "stable", "cooldown", "product", "nested"],
)
def test_warmup_before_phases_of_no_steps_rises_to_the_peak(convention: str, after: tuple[Schedule, ...]) -> None:
    """As long as the training; not to the end of a decay that has none of it, which would be zero on every step."""
    rise = [values(Phases((Warmup(4), phase), convention), 4) for phase in (Phases(after, convention), Constant())]
    if convention == "product":
        # the decay's clock runs from the start of the training
        assert values(Phases((Warmup(4), Linear(0)), convention), 4) == approx([0, 0.1875, 0.25, 0.1875])
    else:
        assert rise[0] == approx(rise[1])
        assert max(rise[0]) >= 0.75
        assert values(Phases((Warmup(4), *after), convention), 4) == approx(rise[1])


def test_a_phase_of_no_steps_is_passed_over() -> None:
    schedule = Warmup(2) >> Cosine(0) >> Piecewise((1,), (0.4, 0.1))
    assert values(schedule, 4) == approx([0.2, 0.4, 0.4, 0.1])
    assert values(Restarts((Warmup(4) >> Cosine(4)).resized(4)), 6) == approx([0.25, 0.5, 0.75, 1, 0.25, 0.5])


def test_warmup_rises_to_what_follows() -> None:
    assert values(Warmup(2) >> Piecewise((2,), (0.4, 0.1)), 6) == approx([0.2, 0.4, 0.4, 0.4, 0.1, 0.1])


def test_warmup_before_restarts_and_inverse_sqrt() -> None:
    """The peak is applied once, and cycles begin where they would."""
    restarts = Warmup(2) >> Restarts(Linear(2))
    assert values(restarts, 8) == approx([0.5, 1, 2 / 3, 1 / 3, 1, 0.5, 1, 0.5])
    assert values(Warmup(2) >> InverseSqrt(1), 5) == approx([0.5, 1, C, math.sqrt(1 / 3), 0.5])


# phases


def test_cooldown_and_hold_begin_with_the_value_reached() -> None:
    half = InverseSqrt(1, steps=3)
    assert values(half >> Hold(2), 7) == approx([1, C, math.sqrt(1 / 3), 0.5, 0.5, 0.5, 0.5])
    cooled = (half >> Cooldown(2)).with_convention("hf")
    assert values(cooled, 7) == approx([1, C, math.sqrt(1 / 3), 0.5, 0.25, 0, 0])
    # with every step its own value: from the last one applied, in three steps
    last = math.sqrt(1 / 3)
    assert values(half >> Cooldown(2, floor=0.3), 6)[2:] == approx(
        [last, last - (last - 0.3) / 3, 0.3 + (last - 0.3) / 3, 0.3]
    )


def test_a_cooldown_below_its_floor_stays() -> None:
    assert values(Linear(2, 0.1) >> Hold(1) >> Cooldown(2, floor=0.5), 7)[2:] == approx([0.1] * 5)


def test_phases_are_taken_apart() -> None:
    a, b, c = Warmup(1), Hold(2), Linear(3)
    assert (a >> b) >> c == a >> (b >> c) == Phases((a, b, c))
    assert ((a >> b).with_convention("hf") >> c).convention == "hf"
    with pytest.raises(ValueError, match="one convention"):
        (a >> b).with_convention("hf") >> (b >> c)


def test_length_of_phases() -> None:
    assert (Warmup(1) >> Hold(2) >> Linear(3)).steps == 6
    assert (Warmup(1) >> Hold()).steps is None


@pytest.mark.parametrize("number", [4.0, np.int64(4), np.float32(4), torch.tensor(4), torch.tensor(4.0)], ids=repr)
def test_whole_numbers_of_any_type_are_steps(number: Any) -> None:
    """Quotients and products of lengths are floats, and numpy's or torch's numbers no ints."""
    for make in (
        Cosine,
        Warmup,
        Hold,
        Cooldown,
        OneCycle,
        Noam,
        Cyclic,
        lambda n: Constant(steps=n),
        lambda n: MultiStep((n,)),
        lambda n: Restarts(Cosine(n), cycles=n),
        lambda n: Restarts(Cosine(4), lengths=(n, 9)),
    ):
        assert make(number) == make(4)
        assert json.dumps(make(number).to_dict()) == json.dumps(make(4).to_dict())
    assert json.loads(json.dumps(Cosine(4, np.float32(0.5)).to_dict()))["floor"] == 0.5


def test_fractional_lengths() -> None:
    """Decays and warmups are curves: T_max=2.5 is in order for torch's, too."""
    assert values(Linear(2.5), 4) == approx([1, 0.6, 0.2, 0])  # type: ignore[arg-type]
    schedule = Phases((Warmup(2.5), Linear(2.5)), "hf")  # type: ignore[arg-type]
    assert values(schedule, 6) == approx([0, 0.4, 0.8, 0.8, 0.4, 0])
    assert schedule.steps == 5
    assert Schedule.from_dict(schedule.to_dict()) == schedule


def test_product() -> None:
    """A warmup times a decay, each on its own clock: what ChainedScheduler is meant for."""
    schedule = (Warmup(4) >> Hold()) * Exponential(0.9)
    assert values(schedule, 6) == approx([0.25, 0.45, 0.75 * 0.81, 0.729, 0.6561, 0.59049])
    assert (Linear(4) * Linear(6)).steps == 6
    assert (Linear(4) * Hold()).steps is None


@dataclasses.dataclass(frozen=True)
class Stairs(Schedule):
    """A schedule as a user writes one."""

    steps: int

    def at(self, step: float, peak: float, base: float, lead: int = 0, tail: int = 0) -> float:
        return peak * (1 - int(step) // 2 * 2 / self.steps) if step < self.steps else 0.0


def test_a_schedule_of_ones_own() -> None:
    schedule = Warmup(2) >> Stairs(4)
    assert values(schedule, 8) == approx([0.5, 1, 1, 1, 0.5, 0.5, 0, 0])
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


# cycles


def test_restarts_of_sgdr() -> None:
    cosine = [1, 0.75, 0.25]
    longer = [(1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)]
    assert values(Restarts(Cosine(3), mult=2), 9) == approx(cosine + longer)
    halved = Restarts(Cosine(3), peak_decay=0.5, cycles=2)
    assert values(halved, 9) == approx([*cosine, 0.5, 0.375, 0.125, 0, 0, 0])
    assert halved.steps == 6


def test_restarts_end_where_the_last_cycle_does() -> None:
    schedule = Restarts(Linear(2, 0.4), peak_decay=0.1, cycles=3)
    # the peaks 0.1 and 0.01 would be below the floor
    assert values(schedule, 8) == approx([1, 0.7, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4])


def test_restarts_by_lengths_and_shrinking() -> None:
    assert values(Restarts(Linear(2), lengths=(1, 2, 4)), 9) == approx([1, 1, 0.5, 1, 0.75, 0.5, 0.25, 0, 0])
    assert values(Restarts(Linear(4), mult=0.5), 9) == approx([1, 0.75, 0.5, 0.25, 1, 0.5, 1, 1, 1])
    # cycles of one step each are not counted one by one
    assert Restarts(Linear(4), mult=0.5)(10**15) == 1
    assert Restarts(Linear(4))(10**15 + 2) == 0.5
    assert values(Restarts(Linear(2), mult=1.5), 10) == approx(
        [1, 0.5, 1, 2 / 3, 1 / 3, 1, 0.75, 0.5, 0.25, 1]
    )  # lengths 2, 3, 4 (4.5 rounds to even), 7


def test_warmup_in_each_cycle() -> None:
    schedule = Restarts(Warmup(2) >> Linear(2), mult=2)
    assert values(schedule, 5) == approx([0.5, 1, 2 / 3, 1 / 3, 0.5])
    assert values(schedule, 12)[4:] == approx([0.5, 1] + [1 - k / 7 for k in range(1, 7)])


@pytest.mark.parametrize("mult", [2, 3, 10])
@pytest.mark.parametrize("first", [1, 7, 10, 100])
def test_no_cycle_is_missed_by_rounding(mult: int, first: int) -> None:
    """A logarithm finds the cycle before at some of these, where the peak then is a zero."""
    schedule = Restarts(Cosine(first), mult=mult)
    begin = 0
    for i in range(9):
        assert schedule(begin) == 1
        if first * mult**i > 1:
            assert schedule(begin + first * mult**i - 1) < 1
        begin += first * mult**i


@pytest.mark.parametrize("three_phase", [False, True], ids=["two", "three"])
@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize(("steps", "pct_start"), [(20, 0.3), (11, 0.4), (100, 0.25)])
def test_one_cycle_has_torchs_numbers(steps: int, pct_start: float, anneal: str, three_phase: bool) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=steps, pct_start=pct_start, anneal_strategy=anneal, three_phase=three_phase
    )
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torchs.step() if len(expected) < steps else None
    schedule = OneCycle(steps, pct_start=pct_start, anneal_strategy=anneal, three_phase=three_phase)
    assert values(schedule, steps) == approx(expected)
    # torch's goes up again
    assert schedule(steps) == schedule(steps - 1)


def test_one_cycle_where_torchs_divides_by_zero() -> None:
    assert values(OneCycle(10, pct_start=0.1), 10)[0] == 1
    assert values(OneCycle(10, pct_start=0.0), 10)[0] == 1


@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
def test_cyclic_has_torchs_numbers(mode: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    torchs = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 1.0, 4, 3, mode, gamma=0.95, cycle_momentum=False)
    expected = []
    for _ in range(30):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torchs.step()
    assert values(Cyclic(4, 3, mode=mode, gamma=0.95 if mode == "exp_range" else 1.0), 30) == approx(expected)


# floors


def test_absolute_floor_of_each_group() -> None:
    schedule = Warmup(2) >> Linear(4, Absolute(0.1))
    assert [schedule.value(step, 0.5) for step in range(7)] == approx([0.25, 0.5, 0.42, 0.34, 0.26, 0.18, 0.1])
    assert schedule.value(6, 0.1) == schedule.value(100, 5.0) == 0.1


# properties

ratio = st.floats(0, 1)
steps = st.integers(0, 60)
decays = st.one_of(
    *(
        st.builds(cls, steps, ratio)
        for cls in (
            Linear,
            Cosine,
            OneMinusSqrt,
            OneMinusPower,
            REX,
            NormalizedExponential,
            Tanh,
            CosineWithHardRestarts,
        )
    ),
    st.builds(Polynomial, steps, ratio, power=st.floats(0.1, 5)),
    st.builds(Cosine, steps, ratio, power=st.floats(0.1, 3), k=st.floats(0.3, 3)),
    st.builds(Exponential, st.floats(0.5, 1), floor=ratio, steps=steps),
    st.builds(InverseSqrt, st.floats(0.5, 100), floor=ratio, steps=steps),
    st.builds(InverseTime, st.floats(0, 3), floor=ratio, steps=steps),
)
warmups = st.builds(Warmup, steps, st.sampled_from(["linear", "cosine", "sqrt", "1-sqrt", "log"]), ratio)
conventions = st.sampled_from(sorted(CONVENTIONS))
composites = st.one_of(
    decays,
    st.builds(lambda w, d, c: Phases((w, d), c), warmups, decays, conventions),
    st.builds(lambda w, h, d, c: Phases((w, Hold(h), d), c), warmups, steps, decays, conventions),
    st.builds(
        lambda w, n, mult, peak, count: w >> Restarts(Cosine(n), mult=mult, peak_decay=peak, cycles=count),
        warmups,
        st.integers(1, 30),
        st.floats(0.4, 3),
        st.floats(0.1, 1),
        st.integers(1, 5),
    ),
    st.builds(lambda d, s, n: d >> Cooldown(n, s), decays, st.sampled_from(["linear", "cosine", "1-sqrt"]), steps),
)


@given(composites)
def test_plain_dicts_go_both_ways(schedule: Schedule) -> None:
    assert Schedule.from_dict(schedule.to_dict()) == schedule
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert hash(Schedule.from_dict(schedule.to_dict())) == hash(schedule)


@pytest.mark.parametrize("schedule", [row[0] for row in SHAPES.values()], ids=SHAPES)
def test_every_shape_as_a_plain_dict(schedule: Schedule) -> None:
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


@given(composites, st.lists(st.integers(0, 300), min_size=1, max_size=20))
def test_pure(schedule: Schedule, order: list[int]) -> None:
    """Asked in any order, and by a copy, each step has its one value."""
    forwards = {step: schedule(step) for step in sorted(order)}
    copy = Schedule.from_dict(schedule.to_dict())
    assert [copy(step) for step in order] == [forwards[step] for step in order]


@given(composites, st.integers(0, 1000))
def test_clamped_at_both_ends(schedule: Schedule, more: int) -> None:
    assert schedule(-more) == schedule(0)
    assert schedule.steps is not None
    assert schedule(schedule.steps + more) == schedule(schedule.steps)


@hypothesis.example(Phases((Warmup(1), Hold(0), Cosine(1, k=0.5)), "product"), 0)
@given(composites, st.integers(0, 400))
def test_between_zero_and_the_peak(schedule: Schedule, step: int) -> None:
    assert 0 <= schedule(step) <= 1 + 1e-12


@given(decays, st.integers(0, 100))
def test_between_floor_and_peak_and_never_rising(schedule: Schedule, step: int) -> None:
    """(Restarts at least end no higher than they began.)"""
    now, then = schedule(step), schedule(step + 1)
    assert schedule.floor - 1e-12 <= now <= 1 + 1e-12  # type: ignore[attr-defined]
    if not isinstance(schedule, CosineWithHardRestarts):
        assert then <= now + 1e-12


@given(warmups.filter(lambda warmup: warmup.steps > 1), decays.filter(lambda decay: decay.steps > 0))
def test_warmup_meets_what_follows_without_a_jump(warmup: Warmup, decay: Schedule) -> None:
    """Where the ramp ends, on the last warmup step or just before the step after it, is the value that follows."""
    for convention in ("every-step", "torchtitan"):
        assert Phases((warmup, decay), convention)(warmup.steps - 1) == pytest.approx(decay(0))
    for convention in ("hf", "detectron2"):
        schedule = Phases((warmup, decay), convention)
        # a square root is steep at its end
        assert schedule(warmup.steps - 1e-9) == pytest.approx(schedule(warmup.steps), abs=1e-4)


@given(st.integers(0, 30), st.integers(1, 100), ratio)
def test_every_step_trains(warmup: int, decay: int, floor: float) -> None:
    """No applied step has learning rate zero, the peak is applied once, the end comes right after the last step."""
    schedule = Warmup(warmup) >> Cosine(decay, floor)
    applied = values(schedule, warmup + decay)
    assert min(applied) > 0
    assert max(applied) == 1
    if floor < 0.9:
        assert applied.count(1.0) == 1
    assert schedule(warmup + decay) == pytest.approx(floor)
    assert applied.index(1.0) == max(warmup - 1, 0)


def test_gallery_has_every_schedule(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.plots import GALLERY, draw

    shown = json.dumps([schedule.to_dict() for group in GALLERY.values() for _, schedule in group])
    classes = {name for name in optimx.lr_scheduler.__all__ if isinstance(getattr(optimx.lr_scheduler, name), type)}
    schedules = {name for name in classes if issubclass(getattr(optimx.lr_scheduler, name), Schedule)} - {"Schedule"}
    assert {name for name in schedules if f'"type": "{name}"' not in shown} == set()
    draw(tmp_path / "gallery.png")
    assert (tmp_path / "gallery.png").stat().st_size > 100_000


@pytest.mark.parametrize(
    ("case", "general", "given"),
    [
        (OneMinusSqrt(7, 0.1), OneMinusPower(7, 0.1, power=0.5), {"steps", "floor"}),
        (NaturalExponential(0.3, decay_steps=2), Exponential(math.exp(-0.3), decay_steps=2), {"rate", "decay_steps"}),
        (Hold(5), Constant(steps=5), {"steps"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_cases_of_other_shapes(case: Schedule, general: Schedule, given: set[str]) -> None:
    """They have the other's numbers, but a name of their own, and no more arguments than it needs."""
    assert isinstance(case, type(general))
    assert case != general
    assert values(case, 10) == pytest.approx(values(general, 10), rel=1e-14)
    fixed = {field.name for field in dataclasses.fields(case) if not field.init}
    assert fixed
    assert given <= case.to_dict().keys()
    assert not fixed & case.to_dict().keys()
    assert not any(f"{name}=" in repr(case) for name in fixed)
    assert Schedule.from_dict(case.to_dict()) == pickle.loads(pickle.dumps(case)) == case
    with pytest.raises(TypeError, match="unexpected keyword"):
        type(case)(**dict.fromkeys(given | fixed, 1))


# bad input

BAD: dict[str, tuple[Callable[[], object], str]] = {
    "negative-steps": (lambda: Cosine(-1), "steps should be >= 0 but is: -1"),
    "ratio": (lambda: Warmup(0.1), r"steps should be 0 or >= 1 .* but is: 0.1"),  # type: ignore
    "part-of-a-step": (lambda: Cosine(0.5), r"steps should be 0 or >= 1 .* but is: 0.5"),  # type: ignore
    "no-interval": (lambda: Staircase(Cosine(3), 0), "every should be >= 1 but is: 0"),
    "negative-warmup": (lambda: Warmup(-3), "steps should be >= 0 but is: -3"),
    "floor-above-peak": (lambda: Linear(3, 1.5), "floor should be in .* but is: 1.5"),
    "negative-floor": (lambda: Exponential(0.9, floor=-0.1), "floor should be in .* but is: -0.1"),
    "start-above-peak": (lambda: Warmup(3, start=2), "start should be in .* but is: 2"),
    "negative-absolute": (lambda: Absolute(-1), "value should be >= 0 but is: -1"),
    "unknown-warmup": (lambda: Warmup(3, "cosin"), "'cosin'; did you mean 'cosine'"),
    "exponential-from-zero": (lambda: Warmup(3, "exponential"), "start of .* should be > 0 but is: 0"),
    "unknown-cooldown": (lambda: Cooldown(3, "1-sqr"), "'1-sqr'; did you mean '1-sqrt'"),
    "unknown-convention": (lambda: Phases((Hold(),), "torchtitn"), "'torchtitn'; did you mean 'torchtitan'"),
    "bad-convention": (lambda: Convention("two"), "warmup_from should be one of one, zero but is: 'two'"),  # type: ignore
    "unsorted-milestones": (lambda: MultiStep((5, 3)), r"increasing but is: \[5, 3\]"),
    "equal-milestones": (lambda: Piecewise((3, 3), (1, 1, 1)), r"increasing but is: \[3, 3\]"),
    "levels": (lambda: Piecewise((3,), (1,)), r"levels should be 2, .* but is: \[1\]"),
    "negative-level": (lambda: Piecewise((3,), (1, -1)), r"levels\[1\] should be >= 0 but is: -1"),
    "gamma": (lambda: Exponential(1.5), r"gamma should be in \(0, 1\] but is: 1.5"),
    "power": (lambda: Polynomial(3, power=0), "power should be > 0 but is: 0"),
    "rate": (lambda: NormalizedExponential(3, rate=1), r"rate should be in \(0, 1\) but is: 1"),
    "tanh": (lambda: Tanh(3, lower=4), "upper should be > 4 but is: 3"),
    "timescale": (lambda: InverseSqrt(0), "timescale should be > 0 but is: 0"),
    "noam": (lambda: Noam(0), "warmup_steps should be >= 1 but is: 0"),
    "nothing-after-endless": (lambda: Hold() >> Cosine(3), r"phases\[0\] should have a length"),
    "no-phases": (lambda: Phases(()), "one or more schedules"),
    "no-cycles": (lambda: Restarts(Cosine(3), cycles=0), "cycles should be >= 1 but is: 0"),
    "empty-cycle": (lambda: Restarts(Cosine(0)), "steps of the first cycle should be >= 1 but is: 0"),
    "mult": (lambda: Restarts(Cosine(3), mult=0), "mult should be > 0 but is: 0"),
    "peak-decay": (lambda: Restarts(Cosine(3), peak_decay=2), r"peak_decay should be in \(0, 1\] but is: 2"),
    "lengths-and-cycles": (lambda: Restarts(Cosine(3), lengths=(3,), cycles=2), "lengths should come without"),
    "short-cycle": (lambda: Restarts(Warmup(3) >> Cosine(3), mult=0.5), "should be >= 0 but is: -2"),
    "pct-start": (lambda: OneCycle(10, pct_start=1.5), r"pct_start should be in \[0, 1.0\] but is: 1.5"),
    "pct-start-three": (lambda: OneCycle(10, pct_start=0.6, three_phase=True), r"pct_start should be in \[0, 0.5\]"),
    "cyclic-mode": (lambda: Cyclic(3, mode="triangle"), "'triangle'; did you mean 'triangular'"),  # type: ignore
    "unknown-type": (lambda: Schedule.from_dict({"type": "Cosin", "steps": 3}), "'Cosin'; did you mean 'Cosine'"),
    "unknown-field": (lambda: Schedule.from_dict({"type": "Cosine", "step": 3}), "'step'; did you mean 'steps'"),
    "missing-field": (lambda: Schedule.from_dict({"type": "Cosine"}), "'steps'"),
    "no-type": (lambda: Schedule.from_dict({"steps": 3}), "type should be one of .* but is: None"),
    "no-schedule": (lambda: Schedule.from_dict({"type": "Absolute", "value": 3}), "a schedule should have a 'type'"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_values(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine("3"), "steps should be a number but is: '3'"),
        (lambda: Cosine(math.nan), "steps should be a number but is: nan"),
        (lambda: Linear(torch.ones(2)), "steps should be a number but is: tensor"),
        (lambda: Hold(3.5), "steps should be a whole number but is: 3.5"),
        (lambda: Restarts(Cosine(3.5)), "steps of the first cycle should be a whole number but is: 3.5"),
        (lambda: MultiStep((1.5,)), r"milestones\[0\] should be a whole number but is: 1.5"),
        (lambda: Phases((3,)), r"phases\[0\] should be a Schedule but is: 3"),
        (lambda: Product((Hold(), None)), r"factors\[1\] should be a Schedule but is: None"),
        (lambda: Restarts(Hold()), "cycle should be a schedule that has a length"),
        (lambda: Restarts(Restarts(Cosine(3), cycles=2)), "should have a length of its own"),
    ],
    ids=[
        "string",
        "nan",
        "several",
        "steps",
        "cycle",
        "milestones",
        "phases",
        "factors",
        "endless-cycle",
        "nested-cycles",
    ],
)
def test_bad_types(make: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()
