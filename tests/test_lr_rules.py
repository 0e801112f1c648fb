"""What rules suggest for curves whose steepest place is known, beside the libraries' own words."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from statistics import median

import numpy
import pytest

from optimx import lr_rules
from optimx.lr_rules import RULES, diverges_at, smoothed

#: Of fastai's sweep.
LRS = [1e-7 * 1e8 ** (step / 99) for step in range(100)]
#: Where the curve below is the steepest over log lr.
STEEPEST = 3.2e-3


def curve(noise: float = 0.0, seed: int = 0) -> list[float]:
    """A fall from 2.3 to 0.3, half of it within a decade of :data:`STEEPEST`, and an explosion above 1."""
    generator = random.Random(seed)
    values = []
    for lr in LRS:
        x = math.log10(lr / STEEPEST)
        values.append(0.3 + 2.0 / (1.0 + math.exp(4.0 * x)) + 0.5 * lr**2 + noise * generator.gauss(0.0, 1.0))
    return values


def fastai(lrs: list[float], losses: list[float]) -> tuple[list[float], list[float]]:
    return lrs[10:-5], smoothed(losses)[10:-5]


def valley(lrs: list[float], losses: list[float]) -> float:
    """As fastai's callback/schedule.py has it."""
    lrs, losses = fastai(lrs, losses)
    n = len(losses)
    max_start, max_end = 0, 0
    lds = [1] * n
    for i in range(1, n):
        for j in range(i):
            if losses[i] < losses[j] and lds[i] < lds[j] + 1:
                lds[i] = lds[j] + 1
            if lds[max_end] < lds[i]:
                max_end = i
                max_start = max_end - lds[max_end]
    sections = (max_end - max_start) / 3
    return lrs[max_start + int(sections) + int(sections / 2)]


def slide(lrs: list[float], losses: list[float]) -> float:
    lrs, losses = fastai(lrs, losses)
    slopes = numpy.gradient(losses)
    r_idx, l_idx = -1, -16
    found = lrs[l_idx]
    while l_idx >= -len(losses) and abs(slopes[r_idx] - slopes[l_idx]) > 0.005:
        found = lrs[l_idx]
        r_idx -= 1
        l_idx -= 1
    return found


def minimum(lrs: list[float], losses: list[float]) -> float:
    lrs, losses = fastai(lrs, losses)
    return lrs[int(numpy.argmin(losses))] / 10


def steep(lrs: list[float], losses: list[float]) -> float:
    lrs, losses = fastai(lrs, losses)
    return lrs[int((numpy.diff(losses) / numpy.diff(numpy.log(lrs))).argmin())]


def lr_finder(lrs: list[float], losses: list[float]) -> float:
    history: list[float] = []
    for loss in losses:
        history.append(0.05 * loss + 0.95 * history[-1] if history else loss)
    return lrs[10:-5][int(numpy.gradient(history[10:-5]).argmin())]


def lightning(lrs: list[float], losses: list[float]) -> float:
    average, history = 0.0, []
    for global_step, loss in enumerate(losses, 1):
        average = 0.98 * average + 0.02 * loss
        history.append(average / (1 - 0.98 ** (global_step + 1)))
    return lrs[10:-1][int(numpy.gradient(history[10:-1], lrs[10:-1]).argmin())]


THEIRS: dict[str, Callable[[list[float], list[float]], float]] = {
    rule.__name__: rule for rule in (valley, slide, minimum, steep, lr_finder, lightning)
}


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("name", RULES)
def test_suggestions_are_the_libraries(name: str, noise: float) -> None:
    for seed in range(5):
        losses = curve(noise, seed)
        assert RULES[name].suggest(LRS, losses, 100) == THEIRS[name](LRS, losses)


def test_lightnings_own(tmp_path: object) -> None:
    # torchvision, which it imports, has to import first
    import tests.models  # noqa: F401

    finder = pytest.importorskip("lightning.pytorch.tuner.lr_finder")
    theirs = finder._LRFinder("exponential", 1e-7, 10.0, 100)
    for seed in range(3):
        losses = curve(0.05, seed)
        averages = [s * (1 - 0.98**n) / (1 - 0.98 ** (n + 1)) for n, s in enumerate(smoothed(losses), 1)]
        theirs.results = {"lr": LRS, "loss": averages}
        assert lr_rules.lightning(LRS, losses) == theirs.suggestion()


def test_a_known_curve() -> None:
    """Averages lag behind, so the steepest place is found some steps too late, or early by who divides by the rate."""
    found = {name: rule.suggest(LRS, curve(), 100) / STEEPEST for name, rule in RULES.items()}
    assert found["lightning"] < 1 < found["slide"] < found["steep"] == found["lr_finder"] < 4
    assert 1 < found["minimum"] / 10 < 10
    assert found["valley"] < 1


def test_noise_moves_lightnings_the_most() -> None:
    found = {
        name: [rule.suggest(LRS, curve(0.05, seed), 100) / STEEPEST for seed in range(50)]
        for name, rule in RULES.items()
    }
    spread = {name: max(ratios) / min(ratios) for name, ratios in found.items()}
    assert max(spread, key=spread.__getitem__) == "lightning"
    assert median(found["lightning"]) < 0.2
    assert 1 < median(found["valley"]) < median(found["steep"]) < 4


@pytest.mark.parametrize("name", RULES)
def test_short_curves(name: str) -> None:
    """Of any length: a suggestion, which is one of the rates (or a tenth), or none."""
    for length in range(101):
        lr = RULES[name].suggest(LRS[:length], curve()[:length], 100)
        assert (lr is None) or any(lr in (each, each / 10) for each in LRS[:length])
    assert RULES[name].suggest(LRS[:15], curve()[:15], 100) is None or name == "lightning"


@pytest.mark.parametrize("name", RULES)
def test_what_comes_after_nan_is_left_out(name: str) -> None:
    cut = [loss if step < 80 else math.nan for step, loss in enumerate(curve())]
    lr = RULES[name].suggest(LRS, cut, 100)
    assert lr is not None
    assert lr <= LRS[79]


def test_smoothing_is_of_a_constant_that_constant() -> None:
    assert smoothed([2.0] * 50) == pytest.approx([2.0] * 50, rel=1e-12)
    assert smoothed([1.0, 3.0], beta=0.5) == pytest.approx([1.0, 7 / 3])
    assert smoothed([]) == []


@pytest.mark.parametrize(
    ("losses", "stop", "expected"),
    [
        ([1.0, 0.9, 0.8], 4.0, None),
        ([1.0, math.nan, 0.8], 4.0, 1),
        ([1.0, -math.inf], 4.0, 1),
        ([1.0, 3.0, 11.0, 11.0], 4.0, 2),
        ([1.0, 3.0, 11.0, 11.0], math.inf, None),
        # four times -1 would be below it
        ([-1.0, -0.9, -0.8, 1.0], 4.0, None),
        ([-1.0, 9.0], 4.0, 1),
        ([0.0, 0.0, 0.1], 4.0, 2),
        ([], 4.0, None),
    ],
)
def test_divergence(losses: list[float], stop: float, expected: int | None) -> None:
    assert diverges_at(losses, stop) == expected
