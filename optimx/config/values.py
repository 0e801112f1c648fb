"""Values against type annotations: fields of a section, arguments of an optimizer or of a scheduler."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .._checks import Condition, nearest
from .errors import MISSING, Problem, Problems, join

__all__ = ["Named", "check_arguments", "convert", "describe_type", "hints_of", "parameters_of", "read"]


@dataclass(frozen=True)
class Named:
    """On an annotation: the value may be a table, of the ``name`` of a dataclass and of fields of that dataclass.

    Attributes:
        classes: The dataclasses with their names.
    """

    classes: tuple[tuple[str, type], ...]

    def read(self, table: Mapping[str, Any], path: str, problems: Problems) -> Any:
        """The dataclass that a table tells of; what is wrong with the table is added to ``problems``."""
        classes, name = dict(self.classes), table.get("name", MISSING)
        where = join(path, "name")
        if name is MISSING:
            problems.add(where, "is missing", MISSING)
        elif name not in classes:
            near = nearest(name, classes) if isinstance(name, str) else None
            problems.add(where, f"should be one of {', '.join(map(repr, classes))}", name, near)
        else:
            return read(classes[name], {key: item for key, item in table.items() if key != "name"}, path, problems)
        return None


def convert(value: Any, hint: Any, path: str, problems: Problems) -> Any:
    """``value`` as the type annotation ``hint`` wants it: a list becomes a tuple, a mapping a dataclass, 1 may be 1.0.

    What does not fit is added to ``problems``. Annotations that say nothing checkable let everything pass.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        named = next((rule for rule in arguments[1:] if isinstance(rule, Named)), None)
        if named is not None and isinstance(value, Mapping):
            return named.read(value, path, problems)
        before = len(problems)
        converted = convert(value, arguments[0], path, problems)
        for rule in arguments[1:]:
            if len(problems) == before and isinstance(rule, Condition) and not rule.holds(converted):
                problems.add(path, rule.text, value)
        return converted
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, arguments, path, problems)
    if origin is typing.Literal:
        if not any(type(value) is type(name) and value == name for name in arguments):
            names = [name for name in arguments if isinstance(name, str)]
            near = nearest(value, names) if isinstance(value, str) else None
            problems.add(path, f"should be {describe_type(hint)}", value, near)
        return value
    if origin in (tuple, list, Sequence, Iterable):
        return _items(value, origin, arguments, path, problems)
    if origin in (dict, Mapping) and len(arguments) == 2 and isinstance(value, Mapping):
        return {key: convert(item, arguments[1], join(path, str(key)), problems) for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        return read(hint, value, path, problems)
    converted = _plain(value, hint if origin is None else origin)
    if converted is _WRONG:
        problems.append(_Mismatch(path, f"should be {describe_type(hint)}", value))
        return value
    return converted


def read(cls: Any, values: Mapping[str, Any], path: str, problems: Problems) -> Any:
    """A dataclass from a mapping. A field with problems keeps its default: what depends on the others is still checked.
    What the dataclass itself refuses is a problem, too.

    Keys that are no field go, unchecked, to the field ``args`` of a class that has one.

    Returns:
        None if a field without a default has problems, or the dataclass refuses the values.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    good: dict[str, Any] = {}
    more: dict[str, Any] = {}
    for key, value in values.items():
        if key in fields:
            own = Problems()
            converted = convert(value, hints[key], join(path, key), own)
            problems.extend(own)
            if not own or dataclasses.is_dataclass(converted):
                good[key] = converted
        elif "args" in fields:
            more[key] = value
        else:
            problems.unknown(path, path or "a config", key, value, fields)
    if more:
        for key in more.keys() & good.get("args", {}).keys():
            problems.add(join(path, key), "should be given once, here or under args,", more[key])
        good["args"] = {**good.get("args", {}), **more}
    required = [
        f for f in fields.values() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    for field in required:
        if field.name not in values:
            problems.add(join(path, field.name), "is missing", MISSING)
    if any(field.name not in good for field in required):
        return None
    try:
        return cls(**good)
    except (TypeError, ValueError) as error:
        problems.add(path, f"is refused: {error}", MISSING)
        return None


def parameters_of(function: Callable[..., Any], skip: int = 1) -> tuple[dict[str, inspect.Parameter], bool]:
    """The named parameters of a class or function after its first, and whether it takes any other name too."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[skip:]
    # some of Python's own do not tell
    except (ValueError, TypeError):
        return {}, True
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def check_arguments(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    path: str,
    problems: Problems,
    *,
    skip: int = 1,
    complete: bool = True,
) -> dict[str, Any]:
    """``arguments`` as the annotations of ``function`` want them; those with problems are left out.

    Args:
        function: Or class.
        arguments: By name.
        path: Of the table that they are in.
        problems: Gets unknown names, wrong types and what is missing.
        skip: So many arguments at the beginning are not the config's.
        complete: What has no default should be among them.
    """
    named, takes_any = parameters_of(function, skip)
    hints = hints_of(function)
    name = getattr(function, "__name__", str(function))
    converted: dict[str, Any] = {}
    for key, value in arguments.items():
        if key in named:
            own = Problems()
            fitting = convert(value, hints.get(key, Any), join(path, key), own)
            problems.extend(own)
            if not own:
                converted[key] = fitting
        elif takes_any:
            converted[key] = value
        else:
            problems.unknown(path, name, key, value, named)
    for key, parameter in named.items():
        if complete and parameter.default is parameter.empty and key not in arguments:
            problems.add(join(path, key), f"is missing: {name} has no default for it", MISSING)
    return converted


_WRONG = object()


class _Mismatch(Problem):
    """Not even of the type."""


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations, or none where they name what cannot be found: a plugin need not be typed."""
    function = function.__init__ if inspect.isclass(function) else function  # type: ignore[misc]
    # torch imports what its annotations name for type checkers only
    names = {**vars(collections.abc), **vars(typing), **getattr(function, "__globals__", {})}
    try:
        return typing.get_type_hints(function, localns=names, include_extras=True)
    except (NameError, AttributeError, TypeError):
        return {}


def _one_of(value: Any, options: Sequence[Any], path: str, problems: Problems) -> Any:
    if value is None and type(None) in options:
        return None
    attempts = []
    for option in sorted(options, key=lambda option: option is not type(value)):
        attempt = Problems()
        converted = convert(value, option, path, attempt)
        if not attempt:
            return converted
        attempts.append(attempt)
    section = [option for option in options if dataclasses.is_dataclass(option)]
    if section and isinstance(value, Mapping):
        return convert(value, section[0], path, problems)
    # of a list with a wrong item, say what is wrong with the item rather than that it is no number
    inside = [attempt for attempt in attempts if not (isinstance(attempt[0], _Mismatch) and attempt[0].path == path)]
    if inside:
        problems.extend(inside[0])
    else:
        problems.append(_Mismatch(path, f"should be {describe_type(typing.Union[tuple(options)])}", value))  # noqa: UP007
    return value


def _items(value: Any, origin: Any, arguments: Sequence[Any], path: str, problems: Problems) -> Any:
    if not isinstance(value, (list, tuple)):
        problems.append(_Mismatch(path, "should be a list", value))
        return value
    if origin is tuple and arguments[-1:] != (Ellipsis,):
        if arguments and len(value) != len(arguments):
            problems.add(path, f"should have {len(arguments)} values", value)
            return value
        hints = arguments or [Any] * len(value)
    else:
        hints = [arguments[0] if arguments else Any] * len(value)
    items = (convert(v, hint, f"{path}[{i}]", problems) for i, (v, hint) in enumerate(zip(value, hints, strict=True)))
    return tuple(items) if origin is not list else list(items)


def _plain(value: Any, hint: Any) -> Any:
    """Of a type that has no parts."""
    if hint in (Any, inspect.Parameter.empty) or isinstance(hint, (str, typing.TypeVar)):
        return value
    if hint in (None, type(None)):
        return None if value is None else _WRONG
    if hint is bool:
        return value if isinstance(value, bool) else _WRONG
    if hint in (int, float):
        number = isinstance(value, Real) and not isinstance(value, bool)
        # 1e6 is a float in every file format
        whole = isinstance(value, Integral) or (number and math.isfinite(value) and value == int(value))
        if not number or (hint is int and not whole):
            return _WRONG
        try:
            converted = hint(value)
        except OverflowError:
            return _WRONG
        # NaN is not itself; an int may be too large to ask math
        return converted if converted == converted else _WRONG
    if hint is torch.dtype and isinstance(value, str):
        found = getattr(torch, value.removeprefix("torch."), None)
        return found if isinstance(found, torch.dtype) else _WRONG
    if hint is Callable:
        return value if callable(value) else _WRONG
    if isinstance(hint, type):
        return value if isinstance(value, hint) else _WRONG
    return value


def describe_type(hint: Any) -> str:
    """A type annotation in words: ``"a number or a tensor"``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return "a table" if any(isinstance(rule, Named) for rule in arguments[1:]) else describe_type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(argument) for argument in arguments if argument is not type(None))
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if hint in (tuple, list) or origin in (tuple, list, Sequence, Iterable):
        return "a list"
    if hint is torch.dtype:
        return "a dtype ('bfloat16')"
    named = {float: "a number", int: "a whole number", bool: "true or false", str: "a string", type(None): "none",
             Tensor: "a tensor", dict: "a table", Any: "anything"}  # fmt: skip
    if hint in named:
        return named[hint]
    if dataclasses.is_dataclass(hint) or origin in (dict, Mapping):
        return "a table"
    if origin is Callable:
        return "a callable"
    return f"a {getattr(hint, '__name__', hint)}"
