"""Tables in plain text, and what stands in them."""

from __future__ import annotations

import textwrap
from collections.abc import Container, Iterator, Sequence

#: The last column is wrapped where it keeps at least so many characters, else it has lines of its own.
_LEAST = 24


def aligned(table: Sequence[Sequence[str]], numbers: Container[int], width: int | None = None) -> Iterator[str]:
    """The lines of a table, the first row of which is its head; the columns ``numbers`` are set to the right.

    Args:
        table: Rows of texts.
        numbers: Columns, which are never wrapped.
        width: Of the terminal. What the columns of text at the end have too much for it is wrapped, or goes to lines of
            its own below the row (default: None, lines are as long as they have to be).
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    kept = len(widths)
    while width is not None and kept > 1 and kept - 1 not in numbers and _total(widths[:kept]) > width:
        kept -= 1
        if width - _total(widths[:kept]) - 2 >= _LEAST:
            break
    for cells in table:
        line = "  ".join(
            cell.rjust(size) if column in numbers else cell.ljust(size)
            for column, (cell, size) in enumerate(zip(cells[:kept], widths, strict=False))
        )
        # what is empty or a dash says nothing without its column
        rest = "  ".join(cell for cell in cells[kept:] if cell.strip("-"))
        if width is None or not rest:
            yield line.rstrip()
            continue
        space = width - len(line) - 2
        beside = space >= _LEAST and max(map(len, rest.split())) <= space
        indent = " " * (len(line) + 2 if beside else 4)
        first = f"{line}  " if beside else indent
        if not beside:
            yield line.rstrip()
        # names stay whole: they are copied
        yield from textwrap.wrap(
            rest, width, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
        )


def plural(n: int, what: str) -> str:
    """``"1 tensor"``, ``"2 tensors"``."""
    return f"{n:,} {what}{'s' if n != 1 else ''}"


def size(n_bytes: float) -> str:
    """Bytes in the unit that leaves few digits."""
    for unit in ("B", "KB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.3g} GB"


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)
