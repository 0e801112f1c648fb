"""The watcher: takes what was measured, hands out rows."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .._checks import as_steps, check_instance, one_of, told
from .._engine.watched_step import WatchedStep
from ..param_groups.names import PatternLike
from . import _plot
from .history import History
from .parts import layer_of, names_of, parts_of, selected
from .rules import Rules
from .source import source_of
from .statistics import DEFAULTS, NEEDS, STATISTICS

__all__ = ["Sink", "Watcher", "watch"]

Sink = Callable[[int, dict[str, float]], Any]

#: Keys that every row has, of the whole step.
TOTALS = ("grad_norm", "clip_factor", "skipped")


class Watcher:
    """Statistics of an optimizer's parameters, layers and groups; :func:`optimx.watch` makes it.

    Use it in a ``with`` statement, or call :meth:`close` at the end.

    Attributes:
        params: The watched parameters, in the order of the groups. Those of groups that join later are not watched.
        names: What they are called.
        every: Every how many steps there is a row.
        stats: Names of the statistics.
        sums: Names of the sums that these need.
        keys: All that a row can have.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        every: int = 10,
        stats: Iterable[str] = DEFAULTS,
        pattern: PatternLike | Sequence[PatternLike] | None = None,
        sinks: Iterable[Sink] = (),
        *,
        model: nn.Module | None = None,
        layers: Callable[[str], str | int] = layer_of,
        warn: bool = False,
        warmup_steps: int = 100,
        history: int = 1000,
    ) -> None:
        check_instance("optimizer", optimizer, Optimizer, "a torch.optim.Optimizer")
        self.every = as_steps("every", every, 1)
        self.stats = _checked_stats(stats)
        self.sums = frozenset(name for stat in self.stats for name in NEEDS[stat])
        self._sinks = _checked_sinks(sinks)
        self.params = [param for group in optimizer.param_groups for param in group["params"]]
        self.names = names_of(optimizer, model)
        parts = parts_of(optimizer, self.names, layers)
        numbers = selected(parts, pattern)
        kept = [parts[number] for number in numbers]
        self._layers = [part.name for part in sorted(kept, key=lambda part: part.members[0]) if part.is_layer]
        self._parameters = [part.name for part in kept if part.is_parameter]
        # of the whole step the engine knows the norm, also of what it did not measure here
        self._kept = {
            stat: [number for number in numbers if parts[number].key(stat) not in TOTALS] for stat in self.stats
        }
        self.keys = (*TOTALS, *(parts[i].key(stat) for stat, of_stat in self._kept.items() for i in of_stat))
        pairs = [(i, number) for number, part in enumerate(parts) for i in part.members]
        self._param, self._part = torch.tensor(pairs, dtype=torch.int64, device="cpu").reshape(-1, 2).unbind(1)
        self._elements = _float64([param.numel() for param in self.params])
        self._rules = Rules(optimizer, self.params, kept, as_steps("warmup_steps", warmup_steps)) if warn else None
        if warn and not {"grad_norm", "update_ratio"} & {*self.stats}:
            raise ValueError(told("stats", "should have 'grad_norm' or 'update_ratio' for warn=True", self.stats))
        self._history = History(self.keys, as_steps("history", history, 2))
        self._source = source_of(optimizer, self.every, self.sums, self.receive)
        self._closed = False
        #: By sink where it failed first, how often, and the first error.
        self._failures: dict[int, tuple[str, int, Exception]] = {}

    def receive(self, measured: WatchedStep) -> None:
        """Make a row of what was measured and hand it out. No sink's error leaves it: see :meth:`flush`."""
        values = self._values(measured)
        self._history.add(measured.step, values)
        broken = not math.isfinite(measured.totals["grad_norm"])
        row = dict(zip(self.keys, values, strict=True))
        # a sum is quickly looked at
        if not broken and math.isnan(sum(values)):
            row = {key: value for key, value in row.items() if not math.isnan(value)}
        if self._rules is not None:
            self._rules.read(measured.step, row)
        for i, sink in enumerate(self._sinks):
            self._attempt(i, f"at step {measured.step}", partial(sink, measured.step, dict(row)))

    def _values(self, measured: WatchedStep) -> list[float]:
        """A number for each key; nan where there was nothing to measure."""
        values = [float(measured.totals[name]) for name in TOTALS]
        broken = not math.isfinite(measured.totals["grad_norm"])
        # of groups that have joined there may be more
        sums = {name: _float64(measured.sums[name][: len(self.params)]) for name in self.sums}
        for stat in self.stats:
            of_parts = STATISTICS[stat].of_parts(sums, self._elements, self._param, self._part, broken)
            values += of_parts[self._kept[stat]].tolist()
        return values

    def flush(self) -> None:
        """Wait for rows that are still on their way, and hand them out.

        Raises:
            RuntimeError: A sink has raised since the last call; the first such error is its cause.
        """
        self._source.flush()
        self._raise_failures()

    def close(self) -> None:
        """Flush, watch no more, and close the sinks that have a ``close``. A second call does nothing.

        Raises:
            RuntimeError: As :meth:`flush`.
        """
        if self._closed:
            return
        self._closed = True
        self._source.flush()
        self._source.close()
        for i, sink in enumerate(self._sinks):
            if callable(close := getattr(sink, "close", None)):
                self._attempt(i, "when it was closed", close)
        self._raise_failures()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # an error of the block is not to be hidden; of a sink's there was a warning
        with suppress(RuntimeError) if error is not None else nullcontext():
            self.close()

    def frame(self) -> dict[str, list[float]]:
        """The rows so far as columns: ``"step"`` and every key, nan where a row has none.

        ``pandas.DataFrame(watcher.frame())`` is a table of them. Of a run with more rows than ``history`` these are
        every second, fourth, ... row.
        """
        return self._history.columns()

    def plot(self, path: str | os.PathLike[str], stat: str = "update_ratio") -> None:
        """Draw a statistic of every layer over the steps, and the gradient norm (needs matplotlib).

        Steps whose gradients were clipped, and those that were skipped, have marks. If the pattern leaves no layer, the
        parameters are drawn.

        Args:
            path: The image file; its suffix is the format (without one: PNG).
            stat: Which of ``stats`` (default: ``"update_ratio"``).

        Raises:
            ValueError: ``stat`` is not watched, or there is no row yet.
        """
        one_of("stat", stat, self.stats)
        _plot.plot(path, self.frame(), stat, self._layers or self._parameters, STATISTICS[stat])

    def _attempt(self, i: int, where: str, call: Callable[[], Any]) -> None:
        """Call a sink; of its first error warn, and keep it."""
        try:
            call()
        except Exception as error:
            first, times, cause = self._failures.get(i, (where, 0, error))
            self._failures[i] = first, times + 1, cause
            if not times:
                message = f"{_name(self._sinks[i])} failed {where}, training goes on: {error!r}"
                warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _raise_failures(self) -> None:
        failures, self._failures = self._failures, {}
        if failures:
            texts = [
                f"{_name(self._sinks[i])} failed {where}: {error!r} (failures: {times})"
                for i, (where, times, error) in failures.items()
            ]
            raise RuntimeError("; ".join(texts)) from next(iter(failures.values()))[-1]


def watch(
    optimizer: Optimizer,
    every: int = 10,
    stats: Iterable[str] = DEFAULTS,
    pattern: PatternLike | Sequence[PatternLike] | None = None,
    sinks: Iterable[Sink] = (),
    *,
    model: nn.Module | None = None,
    layers: Callable[[str], str | int] = layer_of,
    warn: bool = False,
    warmup_steps: int = 100,
    history: int = 1000,
) -> Watcher:
    """Watch an optimizer: norms of gradients, parameters and updates, by parameter, layer and group.

    A row has a key for each statistic of each part: ``"grad_norm/blocks.0.attn.qkv.weight"``,
    ``"grad_norm/blocks.0"``, ``"grad_norm/group/0"``, and ``"grad_norm"`` for the whole; also ``"clip_factor"``, which
    gradients were multiplied by, and ``"skipped"``. Norms are of unscaled gradients before clipping. A key is left out
    where there was nothing to measure (no gradient); nan says that gradients were not finite.

    Rows may come some steps late, with the number of *their* step. Of an optimizer's ranks each has its own watcher,
    and usually one of them sinks.

    Args:
        optimizer: Whose parameters are watched.
        every: Every how many steps (default: 10).
        stats: Of ``grad_norm``, ``max_grad`` (the largest magnitude), ``grad_zeros`` (which fraction is zero),
            ``param_norm``, ``update_norm``, ``update_ratio`` (update_norm / param_norm), ``moment_norm`` (of the first
            moment) and ``cosine`` (of first moment and gradient); updates are those that were stored. Default: the
            first, fourth, sixth and second of these.
        pattern: Which parameters and layers have keys: globs or regular expressions for their names, as in
            :class:`~optimx.param_groups.Rule` (default: None, all).
        sinks: Called with a step and its row, in this order: such as those of ``optimx.sinks``. An error of theirs
            is a warning, and stops neither training nor later rows; ``flush`` and ``close`` raise it.
        model: Names parameters of groups that have no ``param_names`` (default: None, ``param0`` and so on).
        layers: The layer of a parameter by its name, a name or a number, such as
            ``optimx.param_groups.layer_ids(model).__getitem__`` (default: the name as far as its first number, else
            without its last part).
        warn: Warn, once each, of matrices whose update ratio is far from 1e-3 and of layers whose gradient vanishes
            (default: False).
        warmup_steps: Ratios of these steps are not judged (default: 100).
        history: How many rows ``frame`` and ``plot`` have at most (default: 1000); of a longer run every second,
            fourth, ... row.

    Returns:
        A :class:`Watcher`, whose :meth:`~Watcher.close` ends it.

    Raises:
        ValueError: A statistic, a pattern or a number makes no sense.
        TypeError: An argument has another type, or the optimizer, or a member of a composite, is not optimx's.
        RuntimeError: Another watcher watches it.
    """
    return Watcher(
        optimizer, every, stats, pattern, sinks,
        model=model, layers=layers, warn=warn, warmup_steps=warmup_steps, history=history,
    )  # fmt: skip


def _float64(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _checked_stats(stats: Iterable[str]) -> tuple[str, ...]:
    if isinstance(stats, str) or not isinstance(stats, Iterable):
        raise TypeError(told("stats", "should be a list of names", stats))
    found = tuple(dict.fromkeys(one_of("stats", stat, STATISTICS) for stat in stats))
    if not found:
        raise ValueError("stats should not be empty")
    return found


def _checked_sinks(sinks: Iterable[Sink]) -> list[Sink]:
    if callable(sinks) or isinstance(sinks, (str, Mapping)) or not isinstance(sinks, Iterable):
        raise TypeError(told("sinks", "should be a list of functions", sinks))
    found = [*sinks]
    for i, sink in enumerate(found):
        if not callable(sink):
            raise TypeError(told(f"sinks[{i}]", "should be a function", sink))
    return found


def _name(sink: Any) -> str:
    return f"sink {getattr(sink, '__qualname__', type(sink).__name__)}"
