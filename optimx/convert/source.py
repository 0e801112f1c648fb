"""Another project's values, and what is made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Real
from typing import Any

from .._checks import nearest
from ..config.errors import ConfigError
from ..config.files import Tagged

__all__ = ["NOTHING", "Conversion", "Source", "assumptions", "epochs", "given", "refused"]

#: Values that say nothing.
NOTHING: tuple[Any, ...] = (None, False, 0, "", (), [], {})


@dataclass
class Conversion:
    """What :func:`convert` made.

    Attributes:
        config: A tree for :func:`optimx.build`.
        notes: What it does not say, says otherwise, or says although the source does not: defaults of the project.
    """

    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)


class Source:
    """Values of another project: which of them have been read, and which of its defaults stand in for others.

    Args:
        values: The values by name.
        path: The name of the table that they are in, with a dot after it (default: none).
    """

    def __init__(self, values: Any, path: str = "") -> None:
        if not isinstance(values, Mapping):
            raise refused(path.removesuffix(".") or "theirs", "should be a table", values)
        self.values = values
        self.path = path
        self.assumed: dict[str, Any] = {}
        self._read: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        """A value; the project's default where it is missing or null."""
        self._read.add(key)
        value = self.values.get(key)
        if value is not None:
            return value
        if key not in self.values and default is not None:
            self.assumed[self.path + key] = default
        return default

    def ignore(self, *keys: str) -> None:
        """Values that have no effect in the project either, beside the others."""
        self._read.update(keys)

    def number(self, key: str, default: float | None = None) -> Any:
        """A number, which YAML's writers may have left as a string."""
        value = self.take(key, default)
        if isinstance(value, str):
            with suppress(ValueError):
                value = float(value)
        if value is not None and (not isinstance(value, Real) or isinstance(value, bool)):
            raise refused(self.path + key, "should be a number", value)
        return value

    def numbers(self, key: str, default: Sequence[float] = ()) -> list[Any]:
        """A list of numbers."""
        value = self.take(key, list(default))
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, Real) for item in value):
            raise refused(self.path + key, "should be a list of numbers", value)
        return list(value)

    def known(self, key: str, default: str, names: Mapping[str, Any]) -> tuple[str, Any]:
        """A name and what it stands for."""
        name = self.take(key, default)
        # an enum, as an object or as YAML writes one
        name = getattr(name, "value", name)
        name = str(name[0] if isinstance(name, list) and len(name) == 1 else name)
        if name not in names:
            rule = f"should be one that has a counterpart here ({', '.join(names)})"
            raise refused(self.path + key, rule, name, nearest(name, names))
        return name, names[name]

    def left(self, about: Any) -> list[str]:
        """Notes of the values of that kind that say something and have not been read."""
        unread = {str(key): value for key, value in self.values.items() if key not in self._read}
        return [
            f"not converted: {self.path}{key} = {value!r}"
            for key, value in unread.items()
            if value not in NOTHING and about.match(key)
        ]


def assumptions(project: str, *sources: Source) -> list[str]:
    """The note of all defaults that stand in for what the sources do not give."""
    values = ", ".join(f"{key} = {value!r}" for source in sources for key, value in source.assumed.items())
    return [f"not given, so {project}'s default: {values}"] if values else []


def epochs(number: float, steps: int = 0) -> str:
    """``"2.5ep"``, or steps more or less than that: ``"30ep-1"``."""
    # no exponent, and all digits
    exact = format(Decimal(repr(number)), "f")
    exact = exact.rstrip("0").rstrip(".") if "." in exact else exact
    return f"{exact}ep{f'{steps:+d}' if steps else ''}"


def given(**values: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {key: value for key, value in values.items() if value is not None}


def refused(path: str, rule: str, value: Any, near: str | None = None) -> ConfigError:
    """What to raise for a value."""
    if isinstance(value, Tagged):
        rule, value = f"{rule}, not what YAML's tag {value.tag} makes,", value.value
    return ConfigError.of(path, rule, value, near)
