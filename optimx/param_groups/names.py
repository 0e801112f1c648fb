"""What a model's parameters are called, whatever it is wrapped in, and which of them a pattern matches."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from .. import _compat
from .._checks import check_instance, close_to, told

PatternLike = str | re.Pattern[str]

#: Under these names data parallelism, ``torch.compile``, FSDP, activation checkpointing and Lightning Fabric keep what
#: they wrap.
WRAPPED = {
    "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_original_module",
}  # fmt: skip


@dataclass(eq=False)
class Node:
    """A module of the model with the wrappers around it left out, and its own parameters.

    Attributes:
        shapes: Of the whole parameters, also where FSDP left this process a flat shard.
    """

    path: str
    module: nn.Module
    params: dict[str, nn.Parameter]
    shapes: dict[str, torch.Size]
    children: dict[str, Node] = field(default_factory=dict)

    def walk(self) -> Iterator[Node]:
        """This node and all below it, in the order of their definition."""
        yield self
        for child in self.children.values():
            yield from child.walk()

    def all_shapes(self) -> list[torch.Size]:
        return [shape for node in self.walk() for shape in node.shapes.values()]

    def name_of(self, parameter: str) -> str:
        return f"{self.path}.{parameter}" if self.path else parameter

    def relative(self, name: str) -> str | None:
        """A parameter's name as seen from this module, None if it is not below it."""
        if not self.path:
            return name
        return name.removeprefix(self.path + ".") if name.startswith(self.path + ".") else None


def module_tree(model: nn.Module) -> Node:
    """The model's modules without wrappers.

    A child of one of the wrappers' names is taken for wrapped if it is all that its parent has, perhaps several times.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: A parameter holds the flattened parameters of FSDP, or has no shape yet.
    """
    check_instance("model", model, nn.Module, "a torch.nn.Module")
    nodes: dict[str, Node] = {}
    unsharded = _compat.unsharded_shapes(model)
    for path, module in model.named_modules(remove_duplicate=False):
        params = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        for name, param in params.items():
            _check(f"{path}.{name}" if path else name, param)
        shapes = {name: unsharded.get(param, param.shape) for name, param in params.items()}
        nodes[path] = Node(path, module, params, shapes)
        if path:
            parent, _, name = path.rpartition(".")
            nodes[parent].children[name] = nodes[path]
    return _unwrap(nodes[""], "")


def _check(name: str, param: nn.Parameter) -> None:
    if _compat.is_flat_parameter(param):
        raise ValueError(
            f"{name} holds many parameters that FSDP has flattened, so names and shapes are lost: "
            "pass use_orig_params=True to FullyShardedDataParallel, or use fully_shard"
        )
    if torch.nn.parameter.is_lazy(param):
        raise ValueError(f"{name} has no shape yet: run the model once before its parameters are grouped")


def _unwrap(node: Node, path: str) -> Node:
    node = _wrapped(node)
    node.path = path
    node.children = {name: _unwrap(child, f"{path}.{name}" if path else name) for name, child in node.children.items()}
    return node


def _wrapped(node: Node) -> Node:
    """What a node is a wrapper of, itself if it is none."""
    if node.params or not node.children or not node.children.keys() <= WRAPPED:
        return node
    first, *others = map(_wrapped, node.children.values())
    return first if all(other.module is first.module for other in others) else node


def without_wrappers(name: str) -> str:
    """A name as ``model.named_parameters()`` has it, without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED) or name


@dataclass(frozen=True, eq=False)
class NamedParameter:
    """A parameter, all of its names (several where it is tied), the modules that own it, and its whole shape."""

    param: nn.Parameter
    names: tuple[str, ...]
    owners: tuple[nn.Module, ...]
    shape: torch.Size

    @property
    def name(self) -> str:
        return self.names[0]


def named_parameters(root: Node) -> list[NamedParameter]:
    """Every parameter once, in the order of its first name."""
    found: dict[nn.Parameter, list[tuple[str, nn.Module, torch.Size]]] = {}
    for node in root.walk():
        for name, param in node.params.items():
            found.setdefault(param, []).append((node.name_of(name), node.module, node.shapes[name]))
    params = []
    for param, places in found.items():
        names, owners, shapes = zip(*places, strict=True)
        params.append(NamedParameter(param, names, owners, shapes[0]))
    return params


def compile_pattern(pattern: PatternLike, what: str) -> Callable[[str], re.Match[str] | None]:
    """A glob for a whole name, or a regular expression (compiled, or after ``re:``) searched for in it.

    Args:
        pattern: Such as ``"blocks.*.bias"``, ``r"re:blocks\\.[0-3]\\."``.
        what: The argument it came from, for errors.

    Raises:
        TypeError: It is neither a string nor a compiled regular expression.
        ValueError: It is empty, or no regular expression.
    """
    if isinstance(pattern, re.Pattern):
        return pattern.search
    if not isinstance(pattern, str):
        raise TypeError(f"{what} should be a glob or a regular expression but is: {pattern!r}")
    if not pattern or pattern == "re:":
        raise ValueError(f"{what} should not be empty")
    if not pattern.startswith("re:"):
        return re.compile(fnmatch.translate(pattern)).match
    try:
        return re.compile(pattern[len("re:") :]).search
    except re.error as error:
        raise ValueError(f"{what} should be a regular expression after 're:' but is: {pattern!r} ({error})") from error


def select(pattern: PatternLike, params: Sequence[NamedParameter], what: str) -> list[NamedParameter]:
    """The parameters one of whose names matches.

    Raises:
        ValueError: None does; names the nearest ones.
    """
    match = compile_pattern(pattern, what)
    found = [param for param in params if any(match(name) for name in param.names)]
    if not found:
        raise ValueError(no_match(pattern, (name for param in params for name in param.names), what))
    return found


def no_match(pattern: PatternLike, names: Iterable[str], what: str) -> str:
    """The message for a pattern that matches no parameter."""
    text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    known = list(names)
    prefixes = {name[:i] + ".*" for name in known for i, letter in enumerate(name) if letter == "."}
    letters = re.sub(r"[\\^$()\[\]+?]", "", text.removeprefix("re:"))
    return told(what, "should fit a parameter", text, *close_to(letters, [*known, *sorted(prefixes)], 3, 0.5))
