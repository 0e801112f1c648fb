"""Where the rows of :func:`optimx.watch` go.

A sink is any ``callable(step, row)`` with a dict of floats by key. These are the usual ones; each is a few lines around
what the user has, and closes nothing that it did not open.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._checks import as_steps

__all__ = ["CSV", "RichTable", "TensorBoard", "WandB"]

#: What a row has of the whole step; the other keys without a slash are a statistic's name.
_MARKS = ("clip_factor", "skipped")

#: Characters of a name that a table shows however narrow it is.
_LEAST = 8


class TensorBoard:
    """A scalar for each key.

    Args:
        writer: A :class:`torch.utils.tensorboard.SummaryWriter`, or what else has its ``add_scalar``.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def __call__(self, step: int, row: Mapping[str, float]) -> None:
        for key, value in row.items():
            self._writer.add_scalar(key, value, step)


class WandB:
    """A call of ``log`` for each row.

    W&B drops what comes with a step below one that it has seen, and rows come late. So where the training loop logs to
    the run, too, give ``step_metric``: rows then have an axis of their own.

    Args:
        run: What ``wandb.init`` returns, or what else has its ``log`` (and ``define_metric``).
        step_metric: Log each row's step under this name, and define it as the axis of the row's keys (default: None,
            ``run.log(row, step=step)``).
    """

    def __init__(self, run: Any, step_metric: str | None = None) -> None:
        self._run = run
        self._step_metric = step_metric
        self._defined: set[str] = set()

    def __call__(self, step: int, row: Mapping[str, float]) -> None:
        if self._step_metric is None:
            self._run.log(dict(row), step=step)
            return
        for key in row:
            stat, slash, _ = key.partition("/")
            metric = f"{stat}/*" if slash else stat
            if metric not in self._defined:
                self._run.define_metric(metric, step_metric=self._step_metric)
                self._defined.add(metric)
        self._run.log({**row, self._step_metric: step})


class CSV:
    """A file with a line ``step,key,value`` for each key of each row; a table of a million columns is none.

    The file is complete after each row, and a run that goes on adds to it. Of pandas' ``frame`` of it
    ``frame.pivot(index="step", columns="key", values="value")`` is the wide table.

    Args:
        path: The file; what it has is kept.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._write([] if self._path.exists() and self._path.stat().st_size else [("step", "key", "value")])

    def __call__(self, step: int, row: Mapping[str, float]) -> None:
        self._write((step, key, value) for key, value in row.items())

    def _write(self, lines: Any) -> None:
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerows(lines)


class RichTable:
    """A table in the terminal that each row replaces: a line for the whole, each group, layer and parameter.

    Needs rich.

    Args:
        live: The :class:`rich.live.Live` to draw in, which stays open (default: None, one of its own, which
            the watcher's ``close`` leaves in the terminal as it is).
        rows: Lines that it has at most, the first ones (default: 20). A watcher's ``pattern`` chooses others.
    """

    def __init__(self, live: Any = None, rows: int = 20) -> None:
        self._rows = as_steps("rows", rows, 1)
        self._is_own = live is None
        if live is None:
            from rich.live import Live

            live = Live(auto_refresh=False)
        self._live = live

    def __call__(self, step: int, row: Mapping[str, float]) -> None:
        if self._is_own:
            # a second call does nothing
            self._live.start()
        self._live.update(_table(step, row, self._rows, self._live.console.width), refresh=True)

    def close(self) -> None:
        """Leave the table as it is."""
        if self._is_own:
            self._live.stop()


def _table(step: int, row: Mapping[str, float], rows: int, width: int) -> Any:
    """A ``rich`` table of a row, no wider than the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    lines: dict[str, dict[str, float]] = {}
    for key, value in row.items():
        if key not in _MARKS:
            stat, _, name = key.partition("/")
            lines.setdefault(name, {})[stat] = value
    stats = list(dict.fromkeys(stat for line in lines.values() for stat in line))
    title = f"step {step}" + ("  skipped" if row["skipped"] else "")
    if row["clip_factor"] < 1:
        title += f"  clip_factor {_number(row['clip_factor'])}"
    left_out = f"and {len(lines) - rows} more" if len(lines) > rows else None
    shown = list(lines.items())[:rows]
    numbers = {stat: [_number(line.get(stat)) for _, line in shown] for stat in stats}
    # two spaces before each column of numbers
    space = width - sum(2 + max(map(len, (*stat.split("_"), *cells))) for stat, cells in numbers.items())
    names = [_shortened(name or "all", max(space, _LEAST)) for name, _ in shown]
    table = Table(title=title, caption=left_out, title_justify="left", caption_justify="left", box=SIMPLE_HEAD,
                  show_edge=False, pad_edge=False, collapse_padding=True)  # fmt: skip
    table.add_column("", no_wrap=True)
    for stat in stats:
        table.add_column(stat.replace("_", "\n"), justify="right", no_wrap=True)
    for cells in zip(names, *numbers.values(), strict=True):
        table.add_row(*map(escape, cells))
    return table


def _number(value: float | None) -> str:
    """Two digits, in as few characters as they take: ``1.2e-3``; a dash where there is nothing."""
    if value is None:
        return "-"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}" if exponent else digits


def _shortened(name: str, width: int) -> str:
    """The end of a name, which tells more than its beginning."""
    return name if len(name) <= width else "…" + name[1 - width :]
