"""The rows of a whole run, in memory that does not grow."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

__all__ = ["History"]


class History:
    """Rows at equal distances, from the first to about the last.

    When there are too many, every second one goes, and from then on every second one is kept.

    Args:
        keys: What each row has a number of.
        most: How many rows are kept.
    """

    def __init__(self, keys: Sequence[str], most: int) -> None:
        self._keys = [*keys]
        self._most = most
        self._stride = 1
        self._seen = 0
        self._rows: list[tuple[int, array[float]]] = []

    def add(self, step: int, values: Sequence[float]) -> None:
        """Keep a row, if it is one of those."""
        if self._seen % self._stride == 0:
            self._rows.append((step, array("d", values)))
            if len(self._rows) > self._most:
                self._rows = self._rows[::2]
                self._stride *= 2
        self._seen += 1

    def columns(self) -> dict[str, list[float]]:
        """``"step"`` and each key, with a list each."""
        columns: dict[str, list[float]] = {"step": [step for step, _ in self._rows]}
        for i, key in enumerate(self._keys):
            columns[key] = [values[i] for _, values in self._rows]
        return columns
