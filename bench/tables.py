"""Results as text for a terminal of 80 columns, and as Markdown."""

import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from bench.results import Row, Verdict

WIDTH, NAME_WIDTH = 80, 24


def number(value: float) -> str:
    """Four digits, whatever the size."""
    return f"{value:.4g}" if value < 1e3 else f"{value:.0f}"


# column of Row -> header and format; the text table has no room for the last ones
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "median_ms": ("median ms", number),
    "p20_ms": ("p20", number),
    "p80_ms": ("p80", number),
    "ratio": ("ratio", lambda ratio: f"{ratio:.2f}x"),
    "gb_per_s": ("GB/s", lambda speed: f"{speed:.0f}"),
    "launches": ("kernels", str),
    "syncs": ("syncs", str),
    "bytes_per_param": ("B/param", number),
    "copy_fraction": ("of copy", lambda fraction: f"{fraction:.1%}"),
    "us_per_tensor": ("us/tensor", lambda us: f"{us:.3f}"),
    "rounds": ("rounds", str),
    "note": ("note", str),
}
TEXT_COLUMNS = dict(zip(list(COLUMNS)[:7], (10, 8, 8, 8, 6, 8, 6), strict=True))


def cell(row: Row, column: str) -> str:
    value = getattr(row, column)
    return "" if value is None else COLUMNS[column][1](value)


def text_header() -> str:
    names = "".join(f"{COLUMNS[column][0]:>{width}}" for column, width in TEXT_COLUMNS.items())
    return " " * (2 + NAME_WIDTH) + names


def text_case(rows: Iterable[Row], verdicts: Iterable[Verdict]) -> str:
    """A case as a block of lines: its contestants, then its targets."""
    rows = list(rows)
    lines = [f"{rows[0].case} ({rows[0].clock} time, ratio to {rows[0].baseline})"]
    for row in rows:
        if row.rounds:
            cells = "".join(f"{cell(row, column):>{width}}" for column, width in TEXT_COLUMNS.items())
            lines.append(f"  {row.contestant:<{NAME_WIDTH}}{cells}".rstrip())
        if row.note is not None:
            lines += textwrap.wrap(row.note, WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 4)
        if row.error is not None:
            lines.append(f"  {row.contestant:<{NAME_WIDTH}}  error: {row.error}"[:WIDTH])
    for verdict in verdicts:
        measured = "" if verdict.measured is None else f" ({number(verdict.measured)})"
        lines.append(f"  [{verdict.holds}] {verdict.contestant}: {verdict.target}{measured}")
    return "\n".join(lines)


def markdown(provenance: dict[str, str], rows: Iterable[Row], verdicts: Iterable[Verdict]) -> str:
    """The whole report: how it came about, results with a section an optimizer, targets."""
    rows = list(rows)
    sections = []
    for optimizer in dict.fromkeys(row.optimizer for row in rows):
        results = results_table([row for row in rows if row.optimizer == optimizer])
        sections += [f"## {optimizer}", "", *markdown_table(results), ""]
    targets = [["case", "contestant", "target", "measured", "holds"]]
    for v in verdicts:
        targets.append([v.case, v.contestant, v.target, "" if v.measured is None else number(v.measured), v.holds])
    return "\n".join(
        [
            "# Optimizer steps against torch.optim",
            "",
            *(f"- {name}: {value}" for name, value in provenance.items()),
            "",
            "ratio: the baseline's median over this one's, so above 1.00x is faster. Medians, with the 20th and 80th",
            "percentile, over interleaved rounds in one process.",
            "",
            *sections,
            "## Targets",
            "",
            *markdown_table(targets),
            "",
        ]
    )


def results_table(rows: list[Row]) -> list[list[str]]:
    """Headings, then a line a row; columns that none of the rows has are left out."""
    shown = [column for column in COLUMNS if any(getattr(row, column) is not None for row in rows)]
    table = [["case", "contestant", "clock", "ratio to", *(COLUMNS[column][0] for column in shown)]]
    for row in rows:
        cells = [cell(row, column) for column in shown]
        if row.error is not None:
            cells[0] = f"{cells[0]} error: {row.error}".strip().replace("|", r"\|")
        table.append([row.case, row.contestant, row.clock, row.baseline, *cells])
    return table


def markdown_table(table: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    return [lines[0], "|---" * len(table[0]) + "|", *lines[1:]]
