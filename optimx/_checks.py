"""What an argument should be, in one wording: ``gamma should be in (0, 1] but is: 2``, ``...; did you mean 'cosine'?``.

The lowest room of the house: it imports nothing of optimx.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from numbers import Real
from typing import Any

from torch import Tensor

__all__ = ["FINITE", "Condition", "above", "as_number", "as_steps", "at_least", "check_instance", "check_number",
           "close_to", "nearest", "one_of", "told", "within"]  # fmt: skip

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


def told(what: str, rule: str, value: Any, *near: str | None) -> str:
    """The message about a value.

    Args:
        what: Its name or path.
        rule: What it should be, ``"should be > 0"``, or what is wrong with it, ``"is no key of ..."``.
        value: What it is.
        near: Valid choices that are like it, if there are any.
    """
    shown = _repr.repr(value.item() if isinstance(value, Tensor) and value.dim() == 0 else value)
    text = f"{rule} but is: {shown}" if rule.startswith("should") else f"(value: {shown}) {rule}"
    choices = " or ".join(repr(choice) for choice in near if choice is not None)
    return f"{what} {text}" + (f"; did you mean {choices}?" if choices else "")


def close_to(name: Any, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """Those of ``known`` that are most like ``name`` (``cutoff``: from 0, anything, to 1, the same)."""
    return get_close_matches(str(name), list(known), most, cutoff)


def nearest(name: Any, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of ``known`` that is most like ``name``, if one is."""
    return next(iter(close_to(name, known, 1, cutoff)), None)


def one_of(what: str, name: Any, names: Iterable[str]) -> str:
    """The name; ValueError with the nearest one if it is none of them."""
    known = sorted(names)
    if name not in known:
        raise ValueError(told(what, f"should be one of {', '.join(known)}", name, nearest(name, known)))
    return name


@dataclass(frozen=True)
class Condition:
    """A condition on a value of the right type, also for ``Annotated[float, Condition(...)]``.

    Attributes:
        text: ``"should be > 0"``.
        holds: Whether it does.
    """

    text: str
    holds: Callable[[Any], bool]

    def check(self, what: str, value: Any) -> None:
        """ValueError unless it holds."""
        if not self.holds(value):
            raise ValueError(told(what, self.text, value))


# a scheduler checks on every step: made once
@lru_cache(typed=True)
def at_least(minimum: float) -> Condition:
    """>= ``minimum``, perhaps infinite, but not NaN."""
    return Condition(f"should be >= {minimum}", lambda value: bool(value >= minimum))


@lru_cache(typed=True)
def above(bound: float) -> Condition:
    """> ``bound``, perhaps infinite, but not NaN."""
    return Condition(f"should be > {bound}", lambda value: bool(value > bound))


@lru_cache
def within(interval: str) -> Condition:
    """In an interval as it is written: ``"(0, 1]"`` is above 0 and at most 1."""
    low, high = map(float, interval[1:-1].split(","))
    from_low = operator.gt if interval.startswith("(") else operator.ge
    to_high = operator.lt if interval.endswith(")") else operator.le
    return Condition(f"should be in {interval}", lambda value: bool(from_low(value, low) and to_high(value, high)))


#: What a learning rate or a weight decay is.
FINITE = Condition("should be >= 0 and finite", lambda value: bool(0 <= value < math.inf))


def check_number(what: str, value: Any, condition: Condition = FINITE, *, tensor: bool = False) -> None:
    """TypeError unless it is a number, ValueError unless the condition holds.

    A tensor of one element will do if ``tensor`` is set. Nothing is asked of its value: it may be another device's.
    """
    if tensor and isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{what} should have one element but has: {value.numel()}")
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(told(what, "should be a number", value))
    condition.check(what, value)


def as_number(what: str, value: Any) -> int | float:
    """A finite number, of any type: an int if it is whole, as a quotient or ``1e4`` may be; TypeError for others."""
    try:
        return operator.index(value)
    except TypeError:
        pass
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    # a tensor of several numbers
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise TypeError(told(what, "should be a number", value))
    return int(number) if number.is_integer() else number


def as_steps(what: str, value: Any, least: int = 0) -> int:
    """A number of steps as an int; ValueError below ``least``, TypeError if it is no whole number."""
    steps = as_number(what, value)
    if isinstance(steps, float):
        raise TypeError(told(what, "should be a whole number", value))
    at_least(least).check(what, steps)
    return steps


def check_instance(what: str, value: Any, cls: type, name: str) -> None:
    """TypeError unless it is an instance of the class, which messages call ``name``."""
    if not isinstance(value, cls):
        raise TypeError(f"{what} should be {name} but is: {type(value).__name__}")
