"""What is wrong with a config, all of it at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

from .._checks import nearest, told

__all__ = ["MISSING", "ConfigError", "Problem", "Problems", "join"]


class _Missing(Enum):
    """Stays itself in a pickle."""

    MISSING = "missing"


#: The value of what is not there.
MISSING = _Missing.MISSING


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        path: Where: ``"groups.rules[0].lr_mult"``.
        rule: What it should be: ``"should be > 0"``, or what is wrong with it: ``"is no key of ..."``.
        value: What it is, or :data:`MISSING`.
        nearest: The valid name that is most like it, if it is a name.
    """

    path: str
    rule: str
    value: Any
    nearest: str | None = None

    def __str__(self) -> str:
        if self.value is MISSING:
            return f"{self.path} {self.rule}"
        return told(self.path, self.rule, self.value, self.nearest)


class ConfigError(ValueError):
    """A config that nothing can be built from. Its text has a line for every problem.

    Attributes:
        problems: The :class:`Problem` of every line.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems]
        super().__init__(lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems:", *lines]))

    @classmethod
    def of(cls, path: str, rule: str, value: Any, nearest: str | None = None) -> ConfigError:
        """One of a single :class:`Problem`."""
        return cls([Problem(path, rule, value, nearest)])

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


class Problems(list[Problem]):
    """Collects them."""

    def add(self, path: str, rule: str, value: Any, nearest: str | None = None) -> None:
        self.append(Problem(path, rule, value, nearest))

    def unknown(self, path: str, of: str, key: str, value: Any, known: Iterable[str]) -> None:
        """``key`` under ``path`` is none of the ``known`` keys of ``of``."""
        known = sorted(known)
        keys = f" ({', '.join(known)})" if known else ""
        self.add(join(path, key), f"is no key of {of}{keys}", value, nearest(key, known))

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Add those of a :class:`ConfigError` that is raised within, and go on after it."""
        try:
            yield
        except ConfigError as error:
            self.extend(error.problems)

    def raise_if_any(self) -> None:
        if self:
            raise ConfigError(self)


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
