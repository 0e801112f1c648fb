"""Every format of a config, as one tree of plain dicts and lists."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._checks import nearest
from ..convert.projects import recognised
from ..registry import normalized
from .errors import ConfigError, join
from .files import Tagged, read_file
from .namespace import SECTIONS, drop_foreign, is_namespace, read_namespace
from .sections import RULE_NAMES, SearchRange

__all__ = ["load", "merge", "pairs_of", "parse_value"]

#: What tells a range from a table of keys.
_OF_A_RANGE = {field.name for field in dataclasses.fields(SearchRange)}
#: The table within the section ``optimizer`` that is of an optimizer too.
SECOND = "adamw"


def load(
    cfg: Any, overrides: Mapping[str, Any] | Sequence[str] = (), presets: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """The tree of a config. What it is made from is not changed and not shared, but for leaves.

    Args:
        cfg: A mapping, a dataclass, an :class:`argparse.Namespace`, an OmegaConf object, the path of a ``.toml``,
            ``.yaml``, ``.yml`` or ``.json`` file, or the name of a preset. What is read of a namespace,
            :func:`~optimx.config.namespace.read_namespace` says.
        overrides: ``{"optimizer.lr": 0.1}`` or ``["optimizer.lr=0.1"]``, set over it. In strings, values are JSON, and
            what is not JSON is a string.
        presets: Trees that a key ``preset`` can name, over which the config is laid.

    Raises:
        ConfigError: It cannot be read.
    """
    pairs = [*pairs_of(overrides)]
    paths = [str(path) for path, _ in pairs]
    try:
        if is_namespace(cfg):
            tree = _namespace(cfg, paths, presets or {})
        else:
            tree = _expand(_plain(_tree(cfg), "cfg"))
            _check_own(tree, cfg)
        for path, value in pairs:
            _set(tree, path, _plain(value, path))
    except RecursionError as error:
        raise ConfigError.of("cfg", "should not contain itself", cfg) from error
    tree = _over_preset(_expand(tree), presets or {})
    if is_namespace(cfg):
        drop_foreign(tree, cfg, paths)
    if isinstance(tree.get("search"), dict):
        tree["search"] = dict(_dotted(tree["search"], ""))
    return tree


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``base``, section by section and key by key, that of ``optimizer.adamw`` too.

    A section of another ``name`` (or of ``phases``) replaces the whole: the old one's arguments mean nothing to it.
    """
    merged: dict[str, Any] = {key: _plain(value, key) for key, value in base.items()}
    for section, new in over.items():
        old = merged.get(section)
        if isinstance(old, dict) and isinstance(new, Mapping):
            other = "phases" in new or not _same(new.get("name", old.get("name")), old.get("name"))
            new = dict(new) if other else _laid_over(old, new)
        merged[section] = new
    return merged


def _laid_over(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**old, **new}
    if isinstance(old.get(SECOND), Mapping) and isinstance(new.get(SECOND), Mapping):
        merged[SECOND] = {**old[SECOND], **new[SECOND]}
    return merged


def _same(name: Any, other: Any) -> bool:
    return normalized(name) == normalized(other) if isinstance(name, str) and isinstance(other, str) else name is other


def parse_value(text: str) -> Any:
    """``"1e-3"``, ``"true"``, ``"null"``, ``"[0.9, 0.95]"`` as JSON, anything else as the string it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _tree(cfg: Any) -> Any:
    if isinstance(cfg, str) and not Path(cfg).suffix and not os.path.exists(cfg):
        return {"preset": cfg}
    if isinstance(cfg, (str, os.PathLike)):
        return read_file(Path(cfg))
    if type(cfg).__module__.partition(".")[0] == "omegaconf":
        return _omegaconf(cfg)
    if isinstance(cfg, Mapping) or (dataclasses.is_dataclass(cfg) and not isinstance(cfg, type)):
        return cfg
    raise ConfigError.of("cfg", "should be a table, a Config, a namespace, a path or the name of a preset", cfg)


def _check_own(tree: Any, cfg: Any) -> None:
    """ConfigError for a config of another project that can be converted."""
    project = recognised(tree) if not {*SECTIONS} & tree.keys() else None
    if project is not None:
        what = os.fspath(cfg) if isinstance(cfg, (str, os.PathLike)) else "FILE"
        rule = f"should be a config of optimx, but its keys are {project}'s (`optimx convert {what}` makes one of it)"
        raise ConfigError.of("cfg", rule, cfg)


def _plain(value: Any, path: str) -> Any:
    """New dicts and lists all the way down; other values as they are. None as an attribute means not given.

    Rules, which nobody can change, are values.
    """
    if type(value) in RULE_NAMES:
        return value
    if not isinstance(value, Tagged) and dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = types.SimpleNamespace(**{field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if is_namespace(value):
        value = {name: field for name, field in vars(value).items() if field is not None}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError.of(path, "should have strings as keys", key)
        return {str(key): _plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Tagged):
        raise ConfigError.of(path, f"should be YAML without the tag {value.tag}", value.value)
    return value


def _expand(tree: dict[str, Any]) -> dict[str, Any]:
    """``{"optimizer": "adamw"}`` is short for its name."""
    for section in ("optimizer", "schedule"):
        if isinstance(tree.get(section), str) or callable(tree.get(section)):
            tree[section] = {"name": tree[section]}
    return tree


def _namespace(namespace: Any, overridden: Collection[str], presets: Collection[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in read_namespace(namespace, overridden, presets):
        value = _plain(value, path)
        if path in SECTIONS:
            tree[path] = {**tree.get(path, {}), **value}
        else:
            _set(tree, path, value)
    return tree


def _omegaconf(cfg: Any) -> Any:
    from omegaconf import OmegaConf, SCMode
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True, structured_config_mode=SCMode.DICT)
    except OmegaConfBaseException as error:
        raise ConfigError.of("cfg", f"should resolve ({error})", cfg) from error


def pairs_of(overrides: Mapping[str, Any] | Sequence[str]) -> Iterable[tuple[str, Any]]:
    """Paths and values of overrides."""
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    if isinstance(overrides, str) or not isinstance(overrides, Sequence):
        raise ConfigError.of("overrides", 'should be {"optimizer.lr": 0.1} or ["optimizer.lr=0.1"]', overrides)
    for override in overrides:
        if not isinstance(override, str) or "=" not in override:
            raise ConfigError.of("overrides", 'should be like "optimizer.lr=0.1"', override)
        path, _, text = override.partition("=")
        yield path.strip(), parse_value(text.strip())


def _set(tree: dict[str, Any], path: Any, value: Any) -> None:
    """``tree["groups"]["rules"][0]["lr"] = value`` for ``"groups.rules[0].lr"``; tables on the way are made."""
    keys = re.sub(r"\[(\d+)\]", r".\1", path).split(".") if isinstance(path, str) else []
    if not keys or not all(keys):
        raise ConfigError.of("overrides", 'should have paths like "optimizer.lr" or "groups.rules[0].lr"', path)
    at: Any = tree
    for i, key in enumerate(keys):
        last = i == len(keys) - 1
        if isinstance(at, list):
            if not key.isdigit() or int(key) >= len(at):
                raise ConfigError.of(path, f"should count from 0 to {len(at) - 1} at {key!r}", value)
            if last:
                at[int(key)] = value
            at = at[int(key)]
        elif isinstance(at, dict):
            if last:
                at[key] = value
            elif at.get(key) is None:
                at[key] = {}
            at = at[key]
        else:
            raise ConfigError.of(path, f"should lead to a table, but there is {at!r} before {key!r},", value)


def _dotted(table: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """Tables of tables, which TOML makes of ``optimizer.lr`` without quotes, as paths; ranges stay tables."""
    for key, value in table.items():
        if isinstance(value, dict) and value and not value.keys() & _OF_A_RANGE:
            yield from _dotted(value, join(path, key))
        else:
            yield join(path, key), value


def _over_preset(tree: dict[str, Any], presets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    name = tree.pop("preset", None)
    if name is None:
        return tree
    if not isinstance(name, str) or name not in presets:
        near = nearest(name, presets) if isinstance(name, str) else None
        raise ConfigError.of("preset", f"should be one of {', '.join(sorted(presets))}", name, near)
    return merge(presets[name], tree)
