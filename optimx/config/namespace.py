"""What is read of a program's arguments, an :class:`argparse.Namespace`; all else in it is the program's own."""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Collection, Iterator, Mapping
from numbers import Real
from typing import Any

from .._checks import nearest
from ..registry import OPTIMIZERS
from .errors import ConfigError
from .sections import OptimizerConfig
from .values import parameters_of

__all__ = ["NAMES", "SCHEDULE_NAMES", "SECTIONS", "drop_foreign", "is_namespace", "read_namespace"]

#: Sections of a config, which an attribute may be as a whole (a table) or in part (``optimizer.lr``).
SECTIONS = ("optimizer", "groups", "schedule", "batch_scaling")
#: Where the values of other attributes go.
NAMES = {
    "optimizer": "optimizer.name", "lr": "optimizer.lr", "weight_decay": "optimizer.weight_decay",
    "betas": "optimizer.betas", "momentum": "optimizer.momentum", "max_grad_norm": "optimizer.max_grad_norm",
    "layer_decay": "groups.layer_decay",
}  # fmt: skip
#: Many programs call other things so: these are read only where something else speaks of a schedule of ours.
SCHEDULE_NAMES = {
    "schedule": "schedule.name", "total": "schedule.total", "warmup": "schedule.warmup", "floor": "schedule.floor",
    "steps_per_epoch": "schedule.steps_per_epoch",
}  # fmt: skip
#: Shorter names are a letter away from too many words.
LEAST_LENGTH = 8


def is_namespace(value: Any) -> bool:
    """Whether it is what argparse returns, or alike."""
    return isinstance(value, (argparse.Namespace, types.SimpleNamespace))


def read_namespace(namespace: Any, overridden: Collection[str], presets: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Paths of a config and their values, the more explicit ones later.

    Args:
        namespace: The program's arguments; None is one that is not given.
        overridden: Paths that are set over them later.
        presets: Names of presets.

    Raises:
        ConfigError: An attribute is one of ours, but misspelled.
    """
    given = _given(namespace)
    preset = given.get("preset")
    # a typing error in the name of a preset is to be told
    known_preset = isinstance(preset, str) and nearest(preset, presets, 0.8) is not None
    if known_preset:
        yield "preset", preset
    scheduled = ("total" in given and _is_name(given.get("schedule"))) or known_preset
    scheduled |= any(path.split(".")[0] == "schedule" for path in (*overridden, *given) if path != "schedule")
    for name, path in {**NAMES, **(SCHEDULE_NAMES if scheduled else {})}.items():
        value = _without_list(given.get(name))
        if value is not None and (_is_name(value) if name in SECTIONS else _is_on(name, value)):
            yield path, value
    yield from ((name, given[name]) for name in SECTIONS if _is_table(given.get(name)))
    for name, value in given.items():
        section, dot, _ = name.partition(".")
        if dot and section in SECTIONS:
            yield name, value
        elif near := _misspelled(section, SECTIONS if dot else NAMES):
            raise ConfigError.of(name, "is no attribute that a config has", value, near)


def drop_foreign(tree: dict[str, Any], namespace: Any, overridden: Collection[str]) -> None:
    """Take out what programs have for another of their optimizers: Adam has no momentum, Rprop no weight decay."""
    given, section = _given(namespace), tree.get("optimizer")
    if "optimizer" in overridden or _is_table(given.get("optimizer")) or not isinstance(section, dict):
        return
    for name in ("betas", "momentum", "weight_decay"):
        assumed = name in given and not {f"optimizer.{name}"} & {*overridden, *given}
        # a weight decay of nothing is none
        if assumed and name in section and (name != "weight_decay" or section[name] == 0):
            if not _takes(section.get("name", OptimizerConfig.name), name):
                del section[name]


def _given(namespace: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(namespace).items() if value is not None}


def _takes(optimizer: Any, argument: str) -> bool:
    try:
        factory = OPTIMIZERS.get(optimizer) if isinstance(optimizer, str) else optimizer
    # who reads the name next will say so
    except ConfigError:
        return True
    return argument in parameters_of(factory)[0]


def _is_name(value: Any) -> bool:
    return isinstance(value, str) or callable(value)


def _is_table(value: Any) -> bool:
    is_dataclass = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return isinstance(value, Mapping) or is_dataclass or is_namespace(value)


def _is_on(name: str, value: Any) -> bool:
    """Whether it says something: not a flag of the program's, nor a number by which programs mean "not at all"."""
    if isinstance(value, bool):
        return False
    off = isinstance(value, Real) and (value <= 0 or (name == "layer_decay" and value == 1))
    return not (off and name in ("max_grad_norm", "layer_decay"))


def _without_list(value: Any) -> Any:
    """A list of one number, as ``nargs="+"`` makes, is that number."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Real) else value


def _misspelled(name: str, known: Collection[str]) -> str | None:
    """The one of which this has a letter less, or two letters the other way round; another word is the program's."""
    for word in known:
        less = {word[:i] + word[i + 1 :] for i in range(1, len(word) - 1)}
        swapped = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
        if len(word) >= LEAST_LENGTH and name != word and name in less | swapped:
            return word
    return None
