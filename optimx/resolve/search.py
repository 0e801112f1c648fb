"""Section ``search``: every value that it names is tried out on the rest of the config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from torch import nn

from .._checks import above
from ..config import Config, GroupsConfig, SearchRange
from ..config.errors import Problem, Problems, join
from ..config.loading import load, pairs_of
from ..config.values import read
from ..presets import TREES
from .whole import resolve

__all__ = ["Dimension", "resolve_search"]


@dataclass(frozen=True)
class Dimension:
    """What one key may be: any of the choices, or where there are none, a number of a range.

    Attributes:
        key: The path, ``"optimizer.lr"``.
        choices: Values.
        low, high: Bounds, which are in the range.
        log: Whether factors count, not differences.
        whole: Whether only whole numbers are in it.
    """

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    whole: bool = False

    def points(self, number: int) -> list[Any]:
        """All choices, or so many numbers at equal distances, both bounds among them; of one, the middle."""
        if self.choices:
            return [*self.choices]
        fractions = [i / (number - 1) for i in range(number)] if number > 1 else [0.5]
        numbers = [self._between(self.low, self.high, fraction) for fraction in fractions]
        # there may be fewer whole ones
        return [*dict.fromkeys(map(round, numbers))] if self.whole else numbers

    def draw(self, random: Random) -> Any:
        """One of them, each as likely as another."""
        fraction = random.random()
        if self.choices:
            return self.choices[int(fraction * len(self.choices))]
        if not self.whole:
            return self._between(self.low, self.high, fraction)
        # the bounds would be drawn half as often as others
        number = round(self._between(self.low - 0.5, self.high + 0.5, fraction))
        return min(max(number, int(self.low)), int(self.high))

    def _between(self, low: float, high: float, fraction: float) -> float:
        # exact at both ends
        if self.log:
            return low ** (1 - fraction) * high**fraction
        return low * (1 - fraction) + high * fraction


def resolve_search(
    section: Mapping[str, SearchRange | Sequence[Any]],
    cfg: Any,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    model: nn.Module | None = None,
) -> tuple[Dimension, ...]:
    """What each key may be.

    Args:
        section: Of the right types.
        cfg: All of the config, as it was given.
        overrides: Set over it.
        model: Whose parameters (default: None, the section ``groups`` is checked for its types alone).

    Raises:
        ConfigError: Everything that is wrong with the section: a range without numbers in it, or a value that makes
            the config wrong where the config itself is not.
    """
    trial = _Trial(cfg, dict(pairs_of(overrides)), model)
    problems, dimensions = Problems(), []
    for key, values in section.items():
        with problems.collected():
            dimensions.append(_dimension(key, values, trial))
    problems.raise_if_any()
    return tuple(dimensions)


class _Trial:
    """What is wrong with the config once a key has a value.

    Args:
        cfg: The config.
        overrides: Set over it.
        model: Whose parameters; None if there is none.
    """

    def __init__(self, cfg: Any, overrides: dict[str, Any], model: nn.Module | None) -> None:
        self.cfg = cfg
        self.overrides = overrides
        self.model = model
        self.known = {(problem.path, problem.rule) for problem in self._all({})}

    def problems(self, key: str, value: Any) -> Problems:
        """New ones, with the path of the key in the section."""
        path, problems = join("search", key), Problems()
        for problem in self._all({key: value}):
            if problem.path == key:
                problems.append(replace(problem, path=path))
            elif (problem.path, problem.rule) not in self.known:
                problems.add(path, f"is refused: {problem}", value)
        return problems

    def _all(self, more: dict[str, Any]) -> Problems:
        problems = Problems()
        with problems.collected():
            config: Config = read(Config, load(self.cfg, {**self.overrides, **more}, TREES), "", problems)
            model = self.model
            if model is None:
                model, config = nn.Linear(1, 1, bias=False), replace(config, groups=GroupsConfig())
            resolve(config, model, [problem.path for problem in problems])
        return problems


def _dimension(key: str, values: SearchRange | Sequence[Any], trial: _Trial) -> Dimension:
    if isinstance(values, SearchRange):
        return _range(key, values, trial)
    return _choices(key, values, trial)


def _choices(key: str, values: Sequence[Any], trial: _Trial) -> Dimension:
    problems = Problems()
    if not values:
        problems.add(join("search", key), "should have one value or more", [*values])
    for value in values:
        problems.extend(problem for problem in trial.problems(key, value) if problem not in problems)
    problems.raise_if_any()
    return Dimension(key, tuple(values))


def _range(key: str, bounds: SearchRange, trial: _Trial) -> Dimension:
    low, high = bounds.low, bounds.high
    problems, path = Problems(), join("search", key)
    problems.extend(_empty(bounds, path))
    if not problems:
        problems.extend(trial.problems(key, low) or trial.problems(key, high))
    problems.raise_if_any()
    # what takes no fraction takes whole numbers
    fraction = low * 0.618 + high * 0.382
    refused = trial.problems(key, int(fraction) + 0.5 if fraction == int(fraction) else fraction)
    whole = bool(refused) and low == int(low) and high == int(high)
    if not whole:
        refused.raise_if_any()
    return Dimension(key, (), low, high, bounds.log, whole)


def _empty(bounds: SearchRange, path: str) -> Iterator[Problem]:
    if not bounds.high > bounds.low:
        yield Problem(join(path, "high"), above(bounds.low).text, bounds.high)
    if bounds.log and not bounds.low > 0:
        yield Problem(join(path, "low"), f"{above(0).text} with log,", bounds.low)
