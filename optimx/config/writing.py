"""A config as a file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date, datetime, time
from typing import Any

from .errors import ConfigError, join

__all__ = ["to_toml"]

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def to_toml(tree: Mapping[str, Any]) -> str:
    """A config as TOML: a ``[section]`` for each table, everything in it on lines of its own.

    A value that is None has no place in TOML: it is left out, as what is not there is None.

    Raises:
        ConfigError: A key is no string, a list has a None, or a value is of a type that TOML does not have.
    """
    sections = {key: value for key, value in tree.items() if isinstance(value, Mapping)}
    # a key below a section's head would be the section's
    blocks = [_lines({key: value for key, value in tree.items() if key not in sections}, "")]
    blocks += [[f"[{_key(name, '')}]", *_lines(section, str(name))] for name, section in sections.items()]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _lines(table: Mapping[Any, Any], path: str) -> list[str]:
    return [
        f"{_key(key, path)} = {_value(value, join(path, str(key)))}"
        for key, value in table.items()
        if value is not None
    ]


def _key(key: Any, path: str) -> str:
    if not isinstance(key, str):
        raise ConfigError.of(path or "cfg", "should have strings as keys", key)
    return key if _BARE_KEY.fullmatch(key) else _string(key, path)


def _value(value: Any, path: str) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(_lines(value, path)) + " }" if value else "{}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item, f"{path}[{i}]") for i, item in enumerate(value)) + "]"
    if isinstance(value, str):
        return _string(value, path)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        # inf and nan are called so in TOML too
        return repr(value)
    if isinstance(value, (date, datetime)) or (isinstance(value, time) and value.tzinfo is None):
        return value.isoformat()
    raise ConfigError.of(path, "should be of a type that TOML has", value)


def _string(text: str, path: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError.of(path, "should be text that UTF-8 has", text) from error
    # JSON lets this one stand as it is
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
