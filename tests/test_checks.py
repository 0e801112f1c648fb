"""What an argument should be is asked in one place, and told in one wording."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import torch
from torch import nn

import optimx
from optimx._checks import FINITE, Condition, above, at_least, check_number, told, within
from optimx.convert import convert
from optimx.lr_scheduler import Exponential, Linear, Phases, Restarts, Schedule
from optimx.param_groups import Rule, param_groups

PACKAGE = Path(optimx.__file__).parent

MISSPELLED: dict[str, Callable[[], object]] = {
    "convention": lambda: Phases((Linear(3),), "torchtitn"),
    "field": lambda: Schedule.from_dict({"type": "Linear", "step": 3}),
    "config": lambda: optimx.build(nn.Linear(2, 2), {"optimizer": {"name": "adamw", "bets": (0.9, 0.9)}}),
    "name": lambda: optimx.build(nn.Linear(2, 2), {"optimizer": "adamww"}),
    "rule": lambda: Rule("*", lr_mul=2),
    "pattern": lambda: param_groups(nn.Linear(2, 2), freeze="wieght"),
    "preset": lambda: param_groups(nn.Linear(2, 2), layer_preset="biet"),
    "variant": lambda: optimx.Adafactor(nn.Linear(2, 2).parameters(), variant="hff"),  # type: ignore[arg-type]
    "project": lambda: convert({"opt": "sgd", "sched": "step"}, "tim"),
}


@pytest.mark.parametrize("make", MISSPELLED.values(), ids=MISSPELLED)
def test_what_was_meant_is_told_in_one_wording(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"; did you mean '[^']+'( or '[^']+')*\?$"):
        make()


def test_one_file_looks_for_what_was_meant() -> None:
    assert [path.name for path in PACKAGE.rglob("*.py") if "difflib" in path.read_text()] == ["_checks.py"]


@pytest.mark.parametrize(
    ("condition", "good", "bad"),
    [
        (at_least(0), (0, math.inf), (-1e-9, math.nan)),
        (above(0), (1e-9, math.inf), (0, math.nan)),
        (FINITE, (0, 1e9), (-1, math.inf, math.nan)),
        (within("(0, 1]"), (1e-9, 1), (0, 1.1, math.nan)),
        (within("[0, 1)"), (0, 0.9), (-0.1, 1, math.nan)),
    ],
    ids=lambda value: value.text if isinstance(value, Condition) else "",
)
def test_conditions(condition: Condition, good: tuple[float, ...], bad: tuple[float, ...]) -> None:
    for value in good:
        condition.check("x", value)
        condition.check("x", torch.tensor(value, dtype=torch.float64))
    for value in bad:
        with pytest.raises(ValueError, match=re.escape(f"x {condition.text} but is: {value}")):
            condition.check("x", value)


@dataclass(frozen=True)
class Halves(Schedule):
    """A schedule of somebody else, in a few lines."""

    steps: int
    rate: Annotated[float, above(0)] = 1.0

    def at(self, step: float, peak: float, base: float, lead: int = 0, tail: int = 0) -> float:
        return peak * 0.5 ** (self.rate * step)


def test_a_schedule_is_checked_by_its_annotations() -> None:
    with pytest.raises(ValueError, match=r"^rate should be > 0 but is: -1$"):
        Halves(3, -1)
    # and resized by its steps, so that it can be repeated
    assert [Restarts(Halves(2))(step) for step in range(4)] == [1.0, 0.5, 1.0, 0.5]


def test_numbers() -> None:
    check_number("lr", torch.tensor([-1.0]), tensor=True)
    for value in ("0.1", True, None, torch.tensor(0.1)):
        with pytest.raises(TypeError, match=r"^lr should be a number but is: "):
            check_number("lr", value)
    with pytest.raises(ValueError, match=r"^lr should have one element but has: 2$"):
        check_number("lr", torch.zeros(2), tensor=True)


def test_messages_are_short_and_show_a_tensors_value() -> None:
    assert told("lr", "should be > 0", torch.tensor(-1.0)) == "lr should be > 0 but is: -1.0"
    assert told("a.b", "is no key of a", 3, "c", None) == "a.b (value: 3) is no key of a; did you mean 'c'?"
    assert len(told("x", "should be > 0", "long " * 100)) < 120
    with pytest.raises(ValueError, match=r"^gamma should be in \(0, 1\] but is: 2.0$"):
        Exponential(2.0)
