"""Whether what is asked for can be made, and if not which part of it is to blame."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from ..config.errors import MISSING, ConfigError, Problem, Problems, join

__all__ = ["attempt", "refusal"]

T = TypeVar("T")


def attempt(make: Callable[..., T], arguments: Mapping[str, Any], path: str, required: Collection[str] = ()) -> T:
    """``make(**arguments)``, which makes something and changes nothing.

    Args:
        make: Of anybody's.
        arguments: Keys under ``path``.
        path: Of the table.
        required: Those that ``make`` cannot do without.

    Raises:
        ConfigError: It raises. Each argument that it refuses alone is told with its path; if there is none, the whole.
    """
    try:
        return make(**arguments)
    # whatever it is, what it says is what the user needs
    except Exception as error:
        whole = error
    problems = Problems()
    needed = {key: arguments[key] for key in required if key in arguments}
    try:
        make(**needed)
    except Exception as error:
        key, value = next(iter(needed.items())) if len(needed) == 1 else ("", MISSING)
        raise refusal(join(path, key) if key else path, value, error) from error
    for key, value in arguments.items():
        if key not in needed:
            try:
                make(**needed, **{key: value})
            except Exception as error:
                problems.extend(refusal(join(path, key), value, error).problems)
    problems.raise_if_any()
    raise refusal(path, MISSING, whole) from whole


def refusal(path: str, value: Any, error: Exception) -> ConfigError:
    """What somebody else's check has raised, with the path."""
    if isinstance(error, ConfigError):
        return error
    kind = "" if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__}: "
    return ConfigError([Problem(path, f"is refused: {kind}{error}", value)])
