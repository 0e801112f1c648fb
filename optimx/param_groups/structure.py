"""The repeated layers of a model, found in its structure alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from .names import Node
from .no_decay import is_norm

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)

#: Repeated classes that hold less of the repeated layers' elements are a side matter, such as a pyramid's few
#: downsampling layers in a list of their own.
LEAST_SHARE = 0.1

#: A place of its own between layer i and i + 1 that does not count as a layer; timm's ``MATCH_PREV_GROUP``.
JOINS_PREVIOUS = 99999.0
TOP = (float("inf"),)

Ordinal = tuple[float, ...]


def layer_ordinals(root: Node) -> dict[str, Ordinal]:
    """Each name's place: ``(0,)`` before the first repeated layer, ``(i,)`` in the i-th, ``TOP`` after the last.

    What lies between two repeated layers goes with the next one if it opens the part of the model that this one is the
    first of (a stage's downsampling before its blocks), else with the previous one. A norm layer that directly
    follows the last one is told apart from ``TOP``.
    """
    layers = set(repeated_layers(root))
    total = len({node.module for node in layers})
    ordinals: dict[str, Ordinal] = {}
    # a module that is there several times is one layer
    numbers: dict[nn.Module, int] = {}

    def visit(node: Node, opened: int, follows: bool) -> None:
        """``opened``: layers before the innermost part around it that has layers. ``follows``: that is its parent."""
        if node in layers:
            number = numbers.setdefault(node.module, len(numbers) + 1)
            ordinals.update((name, (float(number),)) for name in _names(node))
            return
        seen = len(numbers)
        has_layers = any(below in layers for below in node.walk())
        opened = seen if has_layers else opened
        if seen == 0:
            place: Ordinal = (0.0,)
        elif seen < total:
            place = (float(seen + 1 if seen == opened else seen),)
        elif follows and is_norm(node.module):
            place = (float(total), JOINS_PREVIOUS)
        else:
            place = TOP
        ordinals.update((node.name_of(name), place) for name in node.params)
        for child in node.children.values():
            visit(child, opened, has_layers)

    visit(root, 0, False)
    return ordinals


def repeated_layers(root: Node) -> list[Node]:
    """The layers in the order of their definition: what containers hold that is of a class they hold several times."""
    # the richest first: a block of a network repeats within itself, too
    stacks = _stacks(root, 3) or _stacks(root, 2)
    if not stacks:
        # an MLP is a stack of single layers
        return [layer for node in (root, *root.children.values()) for layer in _repeated(node, 1)]
    sizes: Counter[type] = Counter()
    for stack in stacks:
        for node in stack:
            sizes[type(node.module)] += sum(shape.numel() for shape in node.all_shapes())
    least = LEAST_SHARE * sizes.total()
    classes: set[type] = set()
    for stack in stacks:
        of_stack = {type(node.module) for node in stack}
        # one list may mix attention and other layers
        if any(sizes[cls] >= least for cls in of_stack):
            classes |= of_stack
    return list(_members(root, classes))


def _members(node: Node, classes: set[type]) -> Iterator[Node]:
    """The outermost children of containers that are of these classes, also where there is a single one."""
    for child in node.children.values():
        if _is_container(node) and type(child.module) in classes and child.all_shapes():
            yield child
        else:
            yield from _members(child, classes)


def _stacks(node: Node, modules: int) -> list[list[Node]]:
    inner = [stack for child in node.children.values() for stack in _stacks(child, modules)]
    stack = _repeated(node, modules)
    if not stack or (inner and _are_stages(stack, modules)):
        return inner
    return [stack]


def _are_stages(stack: list[Node], modules: int) -> bool:
    """Whether the layers are those further in: stages of a pyramid change the width, a mixture's experts do not."""
    if any(type(node.module) in CONTAINERS and _stacks(node, modules) for node in stack):
        return True
    shapes: dict[type, set[Any]] = {}
    for node in stack:
        for container in (node, *node.children.values()):
            if layers := _repeated(container, modules):
                shapes.setdefault(type(layers[-1].module), set()).add(tuple(layers[-1].all_shapes()))
    return any(len(kinds) > 1 for kinds in shapes.values())


def _repeated(node: Node, modules: int) -> list[Node]:
    """What a container holds of classes that it holds several times, in which so many modules have parameters.

    A sequence may begin with a stem and end with a head; all of a list are layers as soon as one repeats.
    """
    if not _is_container(node):
        return []
    children = [
        child for child in node.children.values() if sum(bool(below.params) for below in child.walk()) >= modules
    ]
    counts = Counter(type(child.module) for child in children)
    if max(counts.values(), default=0) < 2:
        return []
    return [child for child in children if counts[type(child.module)] > 1 or not isinstance(node.module, nn.Sequential)]


def _is_container(node: Node) -> bool:
    return isinstance(node.module, CONTAINERS)


def _names(node: Node) -> list[str]:
    return [below.name_of(name) for below in node.walk() for name in below.params]
