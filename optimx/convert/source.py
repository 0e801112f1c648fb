"""Another project's values, and what is made of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config.errors import ConfigError, Problem, nearest

__all__ = ["Conversion", "Source", "given"]

_NOTHING: tuple[Any, ...] = (None, False, 0, "", (), [], {})


@dataclass
class Conversion:
    """What :func:`convert` made.

    Attributes:
        config: A tree for :func:`optimx.build`.
        notes: What it does not say, or says otherwise.
    """

    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)


class Source:
    """Their values, and which of them have been read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self._read: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        """A value; the default where it is missing or null."""
        self._read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def left(self, about: re.Pattern[str]) -> list[str]:
        """Keys of that kind that say something and have not been read."""
        keys = (str(key) for key, value in self.values.items() if key not in self._read and value not in _NOTHING)
        return [key for key in keys if about.match(key)]

    def known(self, key: str, default: str, names: Mapping[str, Any]) -> tuple[str, Any]:
        """A name and what it stands for."""
        name = str(self.take(key, default))
        if name not in names:
            rule = f"should be one that has a counterpart here ({', '.join(names)})"
            raise ConfigError([Problem(key, rule, name, nearest(name, names))])
        return name, names[name]


def given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
