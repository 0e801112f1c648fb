"""The layer of each parameter, from 0 at the input, for learning rates that decay towards it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .._checks import one_of
from .names import NamedParameter, Node, PatternLike, compile_pattern, module_tree, named_parameters, no_match
from .rules import as_patterns
from .structure import JOINS_PREVIOUS, TOP, Ordinal, layer_ordinals

#: How the published recipes number what follows the last of L layers: whether a final norm goes with that layer, and
#: how many numbers are left out below the head.
PRESETS = {"beit": (False, 0), "mae": (False, 0), "timm": (True, 0), "electra": (False, 1)}

#: What a model may say of its layers: timm's protocol, and that of OpenMMLab.
PROTOCOLS = ("group_matcher", "get_layer_depth")

#: Where an entry's parameters are, what matches their names, and what is added to the place.
Spec = tuple[Ordinal, Callable[[str], re.Match[str] | None], Ordinal]

Layers = Callable[[str], int] | Sequence[PatternLike | Sequence[PatternLike]] | Mapping[str, Any]


def layer_ids(model: nn.Module, layers: Layers | None = None, layer_preset: str = "beit") -> dict[str, int]:
    """The layer of each parameter by name: 0 for the stem, then the repeated layers, then the head.

    Frozen parameters are numbered too, so freezing does not change the others' layers. A tied parameter is in the
    lowest of its layers.

    Args:
        model: Any module; wrappers around it or within it do not matter.
        layers: As in :func:`~optimx.param_groups.param_groups`.
        layer_preset: As there.

    Raises:
        ValueError: There would be a single layer, or ``layers`` or ``layer_preset`` makes no sense.
    """
    one_of("layer_preset", layer_preset, PRESETS)
    root = module_tree(model)
    return {param.name: layer for param, layer in number(root, named_parameters(root), layers, layer_preset).items()}


def number(
    root: Node, params: Sequence[NamedParameter], layers: Layers | None, preset: str
) -> dict[NamedParameter, int]:
    """The layer of each parameter, for arguments of :func:`layer_ids`."""
    names = [name for param in params for name in param.names]
    of_name = _of_names(root, names, layers, preset)
    ids = {param: min(of_name[name] for name in param.names) for param in params}
    if len(set(ids.values())) < 2:
        found = "by what was given as layers" if layers is not None else "by the model's protocol or structure"
        raise ValueError(
            f"layer_decay needs several layers but all parameters are in one, {found}: give layers=, a function from a "
            "parameter's name to its layer or a list of patterns from the input to the output"
        )
    return ids


def _of_names(root: Node, names: Sequence[str], layers: Layers | None, preset: str) -> dict[str, int]:
    if layers is None:
        return _from_model(root, names, preset)
    if isinstance(layers, Mapping):
        return _number(_match(_matcher_specs(layers), names), preset)
    if callable(layers):
        return {name: _checked_layer(layers(name), f"layers({name!r})") for name in names}
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise TypeError(f"layers should be a function, a list of patterns or a group_matcher's dict but is: {layers!r}")
    specs: list[Spec] = []
    for i, entry in enumerate(layers):
        for pattern in as_patterns(entry):
            match = compile_pattern(pattern, f"layers[{i}]")
            if not any(map(match, names)):
                raise ValueError(no_match(pattern, names, f"layers[{i}]"))
            specs.append(((float(i),), match, ()))
    return _number(_match(specs, names), preset)


def _from_model(root: Node, names: Sequence[str], preset: str) -> dict[str, int]:
    """What the model, or the one part of it that says so, tells of its layers; else what its structure shows."""
    nodes = _with_protocol(root)
    if not nodes:
        return _number(_as_preset(layer_ordinals(root), preset), preset)
    if len(nodes) > 1:
        paths = ", ".join(node.path for node in nodes)
        raise ValueError(f"layers should be given: several parts of the model number layers of their own: {paths}")
    (node,) = nodes
    within = {name: below for name in names if (below := node.relative(name)) is not None}
    module: Any = node.module
    if callable(getattr(module, "group_matcher", None)):
        matcher = module.group_matcher(coarse=False)
        if callable(matcher):
            ordinals = {below: _as_ordinal(matcher(below)) for below in within.values()}
        else:
            ordinals = _match(_matcher_specs(matcher), within.values())
        # what the part of the model does not know of is built upon it
        places = {name: ordinals[within[name]] if name in within else TOP for name in names}
        return _number(_as_preset(places, preset), preset)
    depths = {name: module.get_layer_depth(below) for name, below in within.items()}
    top = max((total for _, total in depths.values()), default=1) - 1
    return {
        name: _checked_layer(depths[name][0], f"get_layer_depth({within[name]!r})") if name in within else top
        for name in names
    }


def _as_preset(ordinals: dict[str, Ordinal], preset: str) -> dict[str, Ordinal]:
    """BEiT counts the position bias that all blocks share to the head."""
    if preset not in ("beit", "mae"):
        return ordinals
    return {name: TOP if ".rel_pos_bias." in f".{name}" else place for name, place in ordinals.items()}


def _with_protocol(node: Node) -> list[Node]:
    """The outermost modules that have one of the protocols."""
    if any(callable(getattr(node.module, name, None)) for name in PROTOCOLS):
        return [node]
    return [found for child in node.children.values() for found in _with_protocol(child)]


def _as_ordinal(place: Any) -> Ordinal:
    return tuple(map(float, place if isinstance(place, Iterable) else (place,)))


def _matcher_specs(matcher: Mapping[str, Any]) -> list[Spec]:
    """The entries of a group_matcher's dict."""
    specs: list[Spec] = []
    for i, entry in enumerate(matcher.values()):
        if entry is not None:
            for pattern, suffix in [(entry, None)] if isinstance(entry, str) else entry:
                specs.append(((float(i),), re.compile(pattern).match, tuple(map(float, suffix or ()))))
    return specs


def _match(specs: Sequence[Spec], names: Iterable[str]) -> dict[str, Ordinal]:
    """The place of each name: that of the first pattern it matches, then the numbers which the pattern captures."""
    ordinals: dict[str, Ordinal] = {}
    for name in names:
        ordinals[name] = TOP
        for prefix, match, suffix in specs:
            if found := match(name):
                captured = [group for group in found.groups() if group is not None]
                if not all(map(str.isdecimal, captured)):
                    raise ValueError(f"{found.re.pattern!r} should capture numbers but captures {captured} of {name!r}")
                ordinals[name] = (*prefix, *map(float, captured), *suffix)
                break
    return ordinals


def _number(ordinals: Mapping[str, Ordinal], preset: str) -> dict[str, int]:
    """Places to numbers without gaps, but for what the preset leaves out below the head."""
    norm_joins, gap = PRESETS[preset]
    places = sorted(set(ordinals.values()) - {TOP})
    last = max((i for i, place in enumerate(places) if place[-1] != JOINS_PREVIOUS), default=-1)
    ids: dict[Ordinal, int] = {}
    layer = -1
    for i, place in enumerate(places):
        if place[-1] != JOINS_PREVIOUS or layer < 0:
            layer += 1
        ids[place] = layer
        if i > last and not norm_joins:
            ids[place] = layer + 1 + gap
    ids[TOP] = layer + 1 + gap
    return {name: ids[place] for name, place in ordinals.items()}


def _checked_layer(layer: Any, what: str) -> int:
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise ValueError(f"{what} should be an int >= 0 but is: {layer!r}")
    return layer
