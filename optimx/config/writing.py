"""A config as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["to_toml"]


def to_toml(tree: Mapping[str, Any]) -> str:
    """A config as TOML: a ``[section]`` for each table, everything in it on lines of its own."""
    blocks = []
    for name, section in tree.items():
        # a value that is null has no place in TOML: what is not there is null
        lines = [f"{key} = {_toml(value)}" for key, value in section.items() if value is not None]
        blocks.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items() if item is not None) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)
