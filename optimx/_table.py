"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence


def aligned(table: Sequence[Sequence[str]], numbers: Container[int]) -> Iterator[str]:
    """The lines of a table, the first row of which is its head; the columns ``numbers`` are set to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        columns = enumerate(zip(cells, widths, strict=True))
        yield "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width) for column, (cell, width) in columns
        ).rstrip()
