"""What the watched parameters are called, and what they are parts of: layers, groups, and the whole."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, count

from torch import nn
from torch.optim import Optimizer

from .._checks import told
from ..param_groups.names import (
    PatternLike,
    compile_pattern,
    module_tree,
    named_parameters,
    no_match,
    without_wrappers,
)
from ..param_groups.rules import as_patterns

__all__ = ["Part", "layer_of", "names_of", "parts_of", "selected"]

#: A name's path as far as the first number in it: ``blocks.3`` of ``blocks.3.attn.qkv.weight``.
_TO_FIRST_NUMBER = re.compile(r"(?:[^.]+\.)*?\d+(?=\.|$)")


@dataclass(frozen=True)
class Part:
    """Parameters that have statistics together.

    Attributes:
        name: Of the parameter or layer, ``"group/0"``, or empty for the whole.
        members: Which of the watched parameters.
        is_layer, is_parameter: What it is; a layer of one parameter of the same name is both.
    """

    name: str
    members: tuple[int, ...]
    is_layer: bool = False
    is_parameter: bool = False

    def key(self, stat: str) -> str:
        """What a row calls a statistic of it."""
        return f"{stat}/{self.name}" if self.name else stat


def names_of(optimizer: Optimizer, model: nn.Module | None = None) -> list[str]:
    """Each parameter's name, in the order of the groups: the group's, else the model's, else ``param0``.

    Raises:
        ValueError: Two parameters share a name.
    """
    of_model = {} if model is None else {found.param: found.name for found in named_parameters(module_tree(model))}
    names: list[str] = []
    for group in optimizer.param_groups:
        for name in group.get("param_names") or [of_model.get(param) for param in group["params"]]:
            names.append(f"param{len(names)}" if name is None else without_wrappers(name))
    if twice := sorted(name for name, times in Counter(names).items() if times > 1):
        raise ValueError(f"parameters should have names of their own but share: {', '.join(twice)}")
    return names


def layer_of(name: str) -> str:
    """The layer of a parameter by its name: the path as far as a number, else the module that owns it."""
    found = _TO_FIRST_NUMBER.match(name)
    return found[0] if found else name.rpartition(".")[0] or name


def parts_of(optimizer: Optimizer, names: Sequence[str], layers: Callable[[str], str | int]) -> list[Part]:
    """The whole, the groups, the layers in the order of their first parameters, and the parameters.

    Raises:
        ValueError: A layer is called as a parameter is, and has other members.
    """
    numbers = {name: i for i, name in enumerate(names)}
    of_layer: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        layer = layers(name)
        if not isinstance(layer, (str, int)):
            raise TypeError(told(f"layers({name!r})", "should be a name or a number", layer))
        of_layer.setdefault(layer if isinstance(layer, str) else f"layer{layer}", []).append(i)
    for layer, members in of_layer.items():
        if layer in numbers and members != [numbers[layer]]:
            raise ValueError(f"a layer should not be called as a parameter is, but layers= has both: {layer!r}")
    parts = [Part("", tuple(range(len(names)))), *_groups(optimizer)]
    parts += [Part(layer, tuple(members), is_layer=True) for layer, members in of_layer.items() if layer not in numbers]
    return parts + [Part(name, (i,), name in of_layer, is_parameter=True) for i, name in enumerate(names)]


def _groups(optimizer: Optimizer) -> list[Part]:
    """The groups by their names if all have one of their own, else by number."""
    groups = optimizer.param_groups
    named = [str(group["name"]) for group in groups if "name" in group]
    labels = named if len({*named}) == len(groups) else map(str, range(len(groups)))
    numbers = count()
    members = [tuple(next(numbers) for _ in group["params"]) for group in groups]
    return [Part(f"group/{label}", which) for label, which in zip(labels, members, strict=True) if which]


def selected(parts: Sequence[Part], pattern: PatternLike | Sequence[PatternLike] | None) -> list[int]:
    """The numbers of the parts that a row tells of: the whole, the groups, and what any pattern fits.

    Raises:
        ValueError: A pattern fits nothing; names the nearest ones.
    """
    if pattern is None:
        return [*range(len(parts))]
    named = [part.name for part in parts if part.is_layer or part.is_parameter]
    found: list[set[str]] = []
    for each in as_patterns(pattern):
        match = compile_pattern(each, "pattern")
        found.append({name for name in named if match(name)})
        if not found[-1]:
            raise ValueError(no_match(each, named, "pattern"))
    fitting = {*chain.from_iterable(found)}
    return [i for i, part in enumerate(parts) if not (part.is_layer or part.is_parameter) or part.name in fitting]
