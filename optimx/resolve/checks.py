"""Whether what is asked for can be made, and if not which part of it is to blame."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from ..config.errors import MISSING, ConfigError, Problems, join

__all__ = ["attempt"]

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
    needed = {key: arguments[key] for key in required if key in arguments}
    try:
        return make(**arguments)
    # whatever it is, what it says is what the user needs
    except Exception as error:
        whole = error
    if (alone := _error_of(make, needed)) is not None:
        key, value = next(iter(needed.items())) if len(needed) == 1 else ("", MISSING)
        raise _refusal(join(path, key) if key else path, value, alone) from alone
    problems = Problems()
    for key, value in arguments.items():
        if key not in needed and (alone := _error_of(make, {**needed, key: value})) is not None:
            problems.extend(_refusal(join(path, key), value, alone).problems)
    problems.raise_if_any()
    raise _refusal(path, MISSING, whole) from whole


def _error_of(make: Callable[..., Any], arguments: Mapping[str, Any]) -> Exception | None:
    try:
        make(**arguments)
    except Exception as error:
        return error
    return None


def _refusal(path: str, value: Any, error: Exception) -> ConfigError:
    """What somebody else's check has raised, with the path."""
    if isinstance(error, ConfigError):
        return error
    kind = "" if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__}: "
    return ConfigError.of(path, f"is refused: {kind}{error}", value)
