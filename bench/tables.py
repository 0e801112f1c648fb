"""Results as text for a terminal of 80 columns, and as Markdown."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.case import OURS
from bench.results import Row, Verdict
from optimx.measuring.packages import NOT_MEASURED

WIDTH, NAME_WIDTH = 80, 23


def number(value: float) -> str:
    """Three digits that say something, whatever the size."""
    return f"{value:.3g}" if value < 1e3 else f"{value:.0f}"


def size(count: float) -> str:
    """Bytes, in the unit that leaves few digits."""
    power = 0 if count < 1 else min(int(math.log10(count) / 3), 3)
    return f"{count / 1e3**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"


def percent(fraction: float) -> str:
    return f"{fraction:.1%}"


def millions(params: int) -> str:
    return f"{params / 1e6:.3g}M"


def ms(row: Row | None) -> str:
    return "-" if row is None or row.median_ms is None else number(row.median_ms)


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


# column of Row -> header and format
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "median_ms": ("median", number),
    "p20_ms": ("p20", number),
    "p80_ms": ("p80", number),
    "ratio": ("ratio", times),
    "bytes_per_param": ("B/param", number),
    "gb_per_s": ("GB/s", lambda speed: f"{speed:.0f}"),
    "copy_fraction": ("of copy", percent),
    "peak_bytes": ("peak", size),
    "peak_fraction": ("of params", percent),
    "state_per_param": ("state B/param", number),
    "kept_per_param": ("kept B/param", number),
    "kept_expected": ("expected", number),
    "launches": ("kernels", str),
    "syncs": ("syncs", str),
    "us_per_tensor": ("us/tensor", lambda us: f"{us:.3f}"),
    "rounds": ("rounds", str),
    "note": ("note", str),
}
TEXT_COLUMNS = {
    "median_ms": 8, "p20_ms": 8, "p80_ms": 8, "ratio": 7, "copy_fraction": 8, "peak_bytes": 8, "launches": 8
}  # fmt: skip


def cell(row: Row, column: str) -> str:
    value = getattr(row, column)
    return "" if value is None else COLUMNS[column][1](value)


def text_header() -> str:
    names = "".join(f"{COLUMNS[column][0]:>{width}}" for column, width in TEXT_COLUMNS.items())
    return " " * (2 + NAME_WIDTH) + names


def text_case(rows: Iterable[Row], verdicts: Iterable[Verdict]) -> str:
    """A case as a block of lines: its contestants, then its targets."""
    rows = list(rows)
    lines = [f"{rows[0].case} ({rows[0].optimizer}, {rows[0].clock} time, ratio to {rows[0].baseline})"[:WIDTH]]
    for row in rows:
        if row.rounds:
            cells = "".join(f"{cell(row, column):>{width}}" for column, width in TEXT_COLUMNS.items())
            lines.append(f"  {row.contestant:<{NAME_WIDTH}}{cells}".rstrip())
        if row.note is not None:
            lines += textwrap.wrap(row.note, WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 4)
        if row.error is not None:
            lines.append(f"  {row.contestant:<{NAME_WIDTH}}  error: {row.error}"[:WIDTH])
        if row.missing is not None:
            start = f"  {row.contestant:<{NAME_WIDTH}}  -  "
            lines += textwrap.wrap(row.missing, WIDTH, initial_indent=start, subsequent_indent=" " * len(start))
    for verdict in verdicts:
        measured = "" if verdict.measured is None else f" ({number(verdict.measured)})"
        lines.append(f"  [{verdict.holds}] {verdict.contestant}: {verdict.target}{measured}")
    return "\n".join(lines)


def results_table(rows: Sequence[Row]) -> list[list[str]]:
    """Headings, then a line a row; columns that none of the rows has are left out."""
    shown = [column for column in COLUMNS if any(getattr(row, column) is not None for row in rows)]
    table = [["case", "contestant", *(COLUMNS[column][0] for column in shown)]]
    for row in rows:
        cells = [cell(row, column) for column in shown]
        if row.error is not None:
            cells[0] = f"{cells[0]} error: {row.error}".strip()
        elif row.missing is not None:
            cells = ["-"] * len(cells)
            if row.missing.startswith(NOT_MEASURED):
                cells[0] = row.missing
        table.append([row.case, row.contestant, *cells])
    return table


def contest_table(
    title: str, cases: Iterable[tuple[str, Sequence[Row]]], others: dict[str, str], prefix: str = "step-"
) -> list[list[str]]:
    """Cases in a line each: milliseconds of the others, by the names of their columns, and of ours, and our ratio.

    Cases without ours are left out. ``prefix``: of the names of cases.
    """
    table = [[title, "tensors", "params", *others.values(), OURS, "ratio"]]
    for case, rows in cases:
        by_name = {row.contestant: row for row in rows}
        if OURS in by_name:
            ours = by_name[OURS]
            cells = [ms(by_name.get(name)) for name in [*others, OURS]]
            shapes = ours.model or case.removeprefix(prefix).replace("-", ", ")
            table.append([shapes, str(ours.tensors), millions(ours.params), *cells, times(ours.ratio)])
    return table


def markdown_table(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in table]
    return [lines[0], "|---" * len(table[0]) + "|", *lines[1:]]
