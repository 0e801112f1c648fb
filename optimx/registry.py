"""Names of optimizers and schedulers: torch's, ours, registered ones, those of installed plugins, any importable class.

A name is looked up without regard to case, ``-`` and ``_``: ``"adamw"``, ``"AdamW"`` and ``"adam_w"`` are one.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from importlib import metadata
from typing import Any, TypeVar

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ._checks import nearest
from .config.errors import ConfigError, Problem

__all__ = ["OPTIMIZERS", "SCHEDULERS", "Registry", "list_optimizers", "list_schedulers", "matches", "normalized",
           "register_optimizer", "register_scheduler"]  # fmt: skip

Factory = TypeVar("Factory", bound=Callable[..., Any])


class Registry:
    """Names of one kind of thing.

    Args:
        kind: What messages call it.
        entry_points: The group of entry points under which installed packages offer more.
        built_in: Gives the names and things of optimx itself; called at the first look-up, so that a module that
            registers something may be one that they import.
    """

    def __init__(self, kind: str, entry_points: str, built_in: Callable[[], Iterable[tuple[str, Any]]]) -> None:
        self.kind = kind
        self._entry_points = entry_points
        self._built_in = built_in
        self._names: dict[str, str] = {}
        self._things: dict[str, Any] = {}
        self._complete = False

    def register(self, name: str, *aliases: str) -> Callable[[Factory], Factory]:
        """Decorator that gives a class or function a name, and more names that mean the same.

        Raises:
            TypeError: A name is no string, or what is decorated cannot be called.
            ValueError: A name is empty, has a ``:``, or is another thing's.
        """
        for each in (name, *aliases):
            if not isinstance(each, str):
                raise TypeError(f"a name of {self.kind} should be a string but is: {each!r}")
            if not normalized(each) or ":" in each:
                raise ValueError(f"a name of {self.kind} should have a letter and no ':' but is: {each!r}")

        def decorate(thing: Factory) -> Factory:
            if not callable(thing):
                raise TypeError(f"{self.kind} {name!r} should be a class or function but is: {thing!r}")
            self._complete_names()
            for each in (name, *aliases):
                taken = self._things.get(normalized(each))
                if taken is not None and not _same(taken, thing):
                    raise ValueError(f"{self.kind} {each!r} should be a new name but is: {taken!r}")
            for each in (name, *aliases):
                self._add(each, thing)
            return thing

        return decorate

    def __contains__(self, name: str) -> bool:
        self._complete_names()
        return normalized(name) in self._things

    def names(self, pattern: str = "*") -> list[str]:
        """All names, or those that match a glob such as ``"adam*"``, sorted."""
        self._complete_names()
        return sorted(name for name in self._names.values() if matches(name, pattern))

    def place(self, name: str) -> str:
        """Where the thing of a name is, as ``"package.module:Class"``; imports nothing."""
        thing = self._things[normalized(name)]
        return thing.value if isinstance(thing, metadata.EntryPoint) else f"{thing.__module__}:{thing.__qualname__}"

    def get(self, name: str, path: str = "") -> Any:
        """What is registered under ``name``, or the ``Class`` of ``"package.module:Class"``.

        Args:
            name: Of the thing.
            path: Of the name, for the message, where it comes from a config.

        Raises:
            ConfigError: No such name (with the nearest one), or nothing of that name can be imported.
        """
        path = path or self.kind
        if ":" in name:
            return self._imported(name, path)
        self._complete_names()
        thing = self._things.get(normalized(name))
        if thing is None:
            near = nearest(normalized(name), self._names)
            rule = f"should be a name of optimx.list_{self.kind}s()"
            raise ConfigError([Problem(path, rule, name, near and self._names[near])])
        return self._imported(thing.value, path) if isinstance(thing, metadata.EntryPoint) else thing

    def _imported(self, name: str, path: str) -> Any:
        module, _, attribute = name.partition(":")
        rule = "should be 'package.module:Class' of a class or function"
        try:
            thing: Any = importlib.import_module(module)
            for part in attribute.split("."):
                thing = getattr(thing, part)
        # it is not there, has no such name, or fails in a way of its own
        except Exception as error:
            raise ConfigError([Problem(path, f"{rule} ({type(error).__name__}: {error})", name)]) from error
        if not callable(thing):
            raise ConfigError([Problem(path, rule, name)])
        return thing

    def _complete_names(self) -> None:
        if self._complete:
            return
        # before it is: what gets imported may register
        self._complete = True
        for name, thing in self._built_in():
            self._add(name, thing)
        for entry_point in metadata.entry_points(group=self._entry_points):
            # a plugin cannot replace what others mean by a name; "its.module:Class" still reaches it
            if normalized(entry_point.name) not in self._things:
                self._add(entry_point.name, entry_point)

    def _add(self, name: str, thing: Any) -> None:
        self._names[normalized(name)] = name
        self._things[normalized(name)] = thing


def matches(name: str, pattern: str) -> bool:
    """Whether a name matches a glob, without regard to case."""
    return fnmatch(name.lower(), pattern.lower())


def normalized(name: str) -> str:
    """Without what does not count."""
    return name.lower().replace("-", "").replace("_", "")


def _same(one: Any, other: Any) -> bool:
    """Of one place in the source: a module that is reloaded registers its class again."""
    if isinstance(one, metadata.EntryPoint):
        return one.value == f"{getattr(other, '__module__', '')}:{getattr(other, '__qualname__', '')}"
    where = [(getattr(t, "__module__", None), getattr(t, "__qualname__", None)) for t in (one, other)]
    return one is other or where[0] == where[1]


def _optimizers() -> Iterable[tuple[str, Any]]:
    package = importlib.import_module(__package__)
    # what makes no optimizer of parameters alone
    bases = Optimizer, package.MultiTensorStep, package.FormulaLoop, package.Composite
    for name in package.__all__:
        thing = getattr(package, name)
        if inspect.isclass(thing) and issubclass(thing, Optimizer) and thing not in bases:
            # ours have the names of their files: ScheduleFreeAdamW is schedule_free_adamw
            package_name, _, module = thing.__module__.rpartition(".")
            yield (module if package_name == __package__ else name.lower()), thing


def _schedulers() -> Iterable[tuple[str, Any]]:
    package = importlib.import_module(f"{__package__}.lr_scheduler")
    for name in package.__all__:
        thing = getattr(package, name)
        if inspect.isclass(thing) and issubclass(thing, LRScheduler) and thing is not LRScheduler:
            yield name, thing
        elif inspect.isclass(thing) and issubclass(thing, package.Schedule) and thing is not package.Schedule:
            # OneMinusSqrt is one_minus_sqrt
            yield re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(), thing
    yield from (("1-sqrt", package.OneMinusSqrt), ("1-square", package.OneMinusPower))
    # found there by name, as an installed package's would be: nothing here imports what uses it
    for name, function in (("wsd", "wsd"), ("warmup_stable_decay", "wsd"), ("inverse_sqrt", "inverse_sqrt")):
        yield name, metadata.EntryPoint(name, f"{__package__}.resolve.schedule:{function}", "optimx.schedulers")


OPTIMIZERS = Registry("optimizer", "optimx.optimizers", _optimizers)
SCHEDULERS = Registry("scheduler", "optimx.schedulers", _schedulers)


def register_optimizer(name: str, *aliases: str) -> Callable[[Factory], Factory]:
    """Decorator: an optimizer class, or a function ``(params, **arguments) -> Optimizer``, gets a name for configs.

    A package offers its own without being imported through the entry points ``optimx.optimizers``.

    Args:
        name: Such as ``"my_adam"``; case, ``-`` and ``_`` do not count.
        aliases: Other names for the same.

    Raises:
        TypeError: A name is no string, or what is decorated cannot be called.
        ValueError: A name is taken, is empty or has a ``:``.
    """
    return OPTIMIZERS.register(name, *aliases)


def register_scheduler(name: str, *aliases: str) -> Callable[[Factory], Factory]:
    """Decorator: a scheduler gets a name for configs. Entry points ``optimx.schedulers``; else as for optimizers.

    It is an :class:`~torch.optim.lr_scheduler.LRScheduler` class, a function ``(optimizer, ...)`` that returns one, a
    :class:`~optimx.lr_scheduler.Schedule` class, or a function of other arguments that returns a schedule.
    """
    return SCHEDULERS.register(name, *aliases)


def list_optimizers(pattern: str = "*") -> list[str]:
    """Names of optimizers that configs can use, sorted; ``list_optimizers("adam*")`` those that match."""
    return OPTIMIZERS.names(pattern)


def list_schedulers(pattern: str = "*") -> list[str]:
    """Names of schedules and schedulers that configs can use, sorted; ``list_schedulers("*cos*")`` those that match."""
    return SCHEDULERS.names(pattern)
