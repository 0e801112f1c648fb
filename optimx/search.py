"""The configs that the section ``search`` of a config stands for, each as overrides for :func:`optimx.build`.

The section has a list of values, or a range, for each key that is searched::

    [search]
    optimizer.lr = { low = 1e-5, high = 1e-2, log = true }
    optimizer.name = ["adamw", "lion"]

    for overrides in optimx.search.sample("train.toml", 20):
        optimizer, scheduler = optimx.build(model(), "train.toml", overrides)

What runs the trainings, and which of them go on, is another library's, or a loop (docs/search.md).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from ._checks import as_steps
from .config import Config
from .config.errors import MISSING, ConfigError, Problems
from .config.loading import load
from .config.values import read
from .presets import TREES
from .resolve import Dimension, resolve_search

__all__ = ["grid", "sample", "suggest"]

Overrides = Mapping[str, Any] | Sequence[str]


def grid(cfg: Any, points: int = 3, overrides: Overrides = ()) -> list[dict[str, Any]]:
    """Every combination of the choices, and of as many numbers of each range.

    Args:
        cfg: A config, in any form that :func:`optimx.build` takes.
        points: How many numbers of a range: its bounds and what lies at equal distances between them (of ``log``
            ranges, at equal factors); 1 is the middle alone (default: 3).
        overrides: Set over the config, for the check; they are not in what is returned.

    Returns:
        Overrides, the last key changing fastest.

    Raises:
        ConfigError: The config has no section ``search``, or something is wrong with it.
        TypeError: ``points`` is no whole number.
        ValueError: It is below 1.
    """
    points = as_steps("points", points, least=1)
    dimensions = _dimensions(cfg, overrides)
    keys = [dimension.key for dimension in dimensions]
    combinations = itertools.product(*(dimension.points(points) for dimension in dimensions))
    return [dict(zip(keys, values, strict=True)) for values in combinations]


def sample(cfg: Any, n: int, seed: int = 0, overrides: Overrides = ()) -> list[dict[str, Any]]:
    """Combinations at random, each key independent of the others.

    Of as many trainings, these have tried more values of each key than a grid has
    (https://jmlr.org/papers/v13/bergstra12a.html).

    Args:
        cfg: A config, in any form that :func:`optimx.build` takes.
        n: How many.
        seed: The same seed gives the same combinations; of more, the first ones are the same (default: 0).
        overrides: Set over the config, for the check; they are not in what is returned.

    Returns:
        Overrides.

    Raises:
        ConfigError: The config has no section ``search``, or something is wrong with it.
        TypeError: ``n`` or ``seed`` is no whole number.
        ValueError: One of them is below 0.
    """
    n, random = as_steps("n", n), Random(as_steps("seed", seed))
    dimensions = _dimensions(cfg, overrides)
    return [{dimension.key: dimension.draw(random) for dimension in dimensions} for _ in range(n)]


def suggest(trial: Any, cfg: Any, overrides: Overrides = ()) -> dict[str, Any]:
    """The combination that a trial of Optuna suggests; its parameters have the names of the keys.

    Args:
        trial: An ``optuna.Trial``, or what has its ``suggest_categorical``, ``suggest_int`` and ``suggest_float``. A
            choice that is no number, string, bool or None is suggested as its JSON, as Optuna stores no others.
        cfg: A config, in any form that :func:`optimx.build` takes.
        overrides: Set over the config, for the check; they are not in what is returned.

    Returns:
        Overrides.

    Raises:
        ConfigError: The config has no section ``search``, or something is wrong with it.
    """
    return {dimension.key: _suggested(trial, dimension) for dimension in _dimensions(cfg, overrides)}


def _suggested(trial: Any, dimension: Dimension) -> Any:
    key, low, high = dimension.key, dimension.low, dimension.high
    if dimension.choices:
        plain = (str, int, float, bool, type(None))
        labels = [each if isinstance(each, plain) else json.dumps(each, default=str) for each in dimension.choices]
        return dimension.choices[labels.index(trial.suggest_categorical(key, labels))]
    if dimension.whole:
        return trial.suggest_int(key, int(low), int(high), log=dimension.log)
    return trial.suggest_float(key, low, high, log=dimension.log)


def _dimensions(cfg: Any, overrides: Overrides) -> tuple[Dimension, ...]:
    problems = Problems()
    config: Config = read(Config, load(cfg, overrides, TREES), "", problems)
    problems.raise_if_any()
    if not config.search:
        raise ConfigError.of("search", "is missing: the keys that are searched, and what each may be", MISSING)
    return resolve_search(config.search, cfg, overrides)
