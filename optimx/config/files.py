"""TOML, YAML and JSON files, as they are: nothing in them is run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError

__all__ = ["Tagged", "read_file"]


@dataclass(frozen=True)
class Tagged:
    """What a YAML file has under a tag that nothing but its own project can make something of.

    Attributes:
        tag: Such as ``"!!python/object/apply:eval"``.
        value: The text, list or table under it.
    """

    tag: str
    value: Any


def read_file(path: Path) -> dict[str, Any] | Tagged:
    """The table in a TOML, YAML or JSON file. No key is there twice; 1e-3 is a number in YAML too.

    What has a tag that is not YAML's own is a :class:`Tagged`, the whole table too: nothing of it is run.

    Raises:
        ConfigError: It cannot be read, has another suffix or form, or is no table.
    """
    readers: dict[str, Callable[[str], Any]] = {".toml": _toml, ".yaml": _yaml, ".yml": _yaml, ".json": _json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError.of("cfg", f"should end with {', '.join(readers)} or be the name of a preset", str(path))
    try:
        tree = reader(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError.of("cfg", f"should be a file that can be read ({error.strerror})", str(path)) from error
    except ImportError as error:
        message = f"should not need {error.name}, which is not installed (pip install 'torch-optimx[config]'),"
        raise ConfigError.of("cfg", message, str(path)) from error
    # the parsers' own errors, and text that is not UTF-8
    except ValueError as error:
        raise ConfigError.of(
            "cfg", f"should be {path.suffix[1:].upper()} ({' '.join(str(error).split())})", str(path)
        ) from error
    # YAML's nothing
    tree = {} if tree is None else tree
    if not isinstance(tree, (dict, Tagged)):
        raise ConfigError.of(str(path), "should be a table", tree)
    return tree


def _toml(text: str) -> Any:
    try:
        import tomllib
    except ModuleNotFoundError:
        import tomli as tomllib  # python 3.10

    return tomllib.loads(text)


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_without_duplicates)


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.2's numbers (in 1.1, 1e-3 is a string), no key twice, and tags of any project."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            self.flatten_mapping(node)
            pairs = [(self.construct_object(k, deep=True), self.construct_object(v, deep=True)) for k, v in node.value]
            return _without_duplicates(pairs)

        def construct_tagged(self, node: Any) -> Any:
            if isinstance(node, yaml.ScalarNode):
                value = self.construct_scalar(node)
            else:
                mapping = isinstance(node, yaml.MappingNode)
                value = self.construct_mapping(node) if mapping else self.construct_sequence(node, deep=True)
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            return value if tag == "!!python/tuple" else Tagged(tag, value)

    number = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    Loader.add_constructor(None, Loader.construct_tagged)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _without_duplicates(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    table: dict[Any, Any] = {}
    for key, value in pairs:
        # such as a list, or a table
        if not isinstance(key, Hashable):
            raise ValueError(f"keys should be strings but one is: {key!r}")
        if key in table:
            raise ValueError(f"the key {key!r} is there twice")
        table[key] = value
    return table
