"""What measures for a watcher: the engine of an optimizer, or those of a composite's members."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Protocol

from torch.optim import Optimizer

from .._engine.recorder import Recorder
from .._engine.step import MultiTensorStep
from .._engine.watched_step import WatchedStep
from ..composite import Composite

__all__ = ["Source", "source_of"]

Receive = Callable[[WatchedStep], None]


class Source(Protocol):
    """What measures for a watcher."""

    def flush(self) -> None:
        """Wait for what was measured and not received yet, and hand it out."""

    def close(self) -> None:
        """Measure no more."""


class OfOptimizer:
    """Measures the steps of an optimizer.

    Raises:
        RuntimeError: Somebody else watches it.
    """

    def __init__(self, optimizer: MultiTensorStep, every: int, sums: Collection[str], receive: Receive) -> None:
        if optimizer._recorder is not None:
            raise RuntimeError(
                f"{type(optimizer).__name__} should be watched by one watcher but has one; close() it first"
            )
        self._optimizer = optimizer
        self._recorder = optimizer._recorder = Recorder(every, [*sums], receive)

    def flush(self) -> None:
        self._recorder.flush()

    def close(self) -> None:
        self._optimizer._recorder = None


class OfComposite:
    """Measures the steps of a composite: those of all members together.

    Raises:
        TypeError: A member is not optimx's.
    """

    def __init__(self, composite: Composite, every: int, sums: Collection[str], receive: Receive) -> None:
        self._receive = receive
        self._shares_norm = composite.needs_norm
        self._places = _places(composite)
        self._found: dict[int, dict[str, WatchedStep]] = {}
        for name, member in composite.optimizers.items():
            _check(f"optimizers[{name!r}]", member)
        self._sources = {
            name: OfOptimizer(member, every, sums, partial(self._take, name))
            for name, member in composite.optimizers.items() if isinstance(member, MultiTensorStep)
        }  # fmt: skip

    def flush(self) -> None:
        for source in self._sources.values():
            source.flush()

    def close(self) -> None:
        for source in self._sources.values():
            source.close()

    def _take(self, name: str, measured: WatchedStep) -> None:
        """Take what a member has measured; hand it out when all of them have."""
        found = self._found.setdefault(measured.step, {})
        found[name] = measured
        if found.keys() == self._sources.keys():
            self._receive(self._together(self._found.pop(measured.step)))

    def _together(self, found: dict[str, WatchedStep]) -> WatchedStep:
        first = next(iter(found.values()))
        sums = {key: [found[name].sums[key][i] for name, i in self._places] for key in first.sums}
        of_each = {key: [measured.totals[key] for measured in found.values()] for key in first.totals}
        norms = of_each["grad_norm"]
        # a member that is told the norm is told that of all
        norm = norms[0] if self._shares_norm else math.hypot(*norms)
        totals = {
            "grad_norm": norm, "clip_factor": min(of_each["clip_factor"]), "skipped": max(of_each["skipped"]),
        }  # fmt: skip
        return WatchedStep(first.step, sums, totals)


def source_of(optimizer: Optimizer, every: int, sums: Collection[str], receive: Receive) -> Source:
    """What measures an optimizer's steps from now on.

    Raises:
        TypeError: It is not optimx's.
        RuntimeError: Somebody else watches it.
    """
    if isinstance(optimizer, Composite):
        return OfComposite(optimizer, every, sums, receive)
    return OfOptimizer(_check("optimizer", optimizer), every, sums, receive)


def _check(what: str, optimizer: Optimizer) -> MultiTensorStep:
    if not isinstance(optimizer, MultiTensorStep):
        raise TypeError(f"{what} should be an optimizer of optimx but is: {type(optimizer).__name__}")
    return optimizer


def _places(composite: Composite) -> list[tuple[str, int]]:
    """Of each parameter, in the order of the composite's groups, the member and the place among its parameters."""
    places = {
        param: (name, i)
        for name, member in composite.optimizers.items()
        for i, param in enumerate(param for group in member.param_groups for param in group["params"])
    }
    return [places[param] for group in composite.param_groups for param in group["params"]]
