"""What a step costs, as it is told."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median, quantiles
from typing import Any

from .._table import aligned, plural, size

__all__ = ["SMALL", "StepCost", "StepCostRow", "StepCostTorchRow", "row_of"]

#: Tensors of so many elements or fewer cost by their number, not by their bytes.
SMALL = 1 << 12
#: Characters of a line.
_WIDTH = 80


@dataclass(frozen=True)
class StepCostRow:
    """How one contestant takes the step.

    Attributes:
        name: ``"torch fused"``, ``"optimx"``, or that of a package.
        ms, p20_ms, p80_ms: Milliseconds of a step: median and percentiles. None: it does not run, see ``note``.
        ratio: The baseline's median over this one's, so above 1 is faster.
        peak: Bytes that a step allocates at most beside parameters, gradients and states; None if not measured.
        calls: How many were timed.
        note: Why there are no times, or what it does without; else empty.
    """

    name: str
    ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    ratio: float | None = None
    peak: int | None = None
    calls: int = 0
    note: str = ""


@dataclass(frozen=True)
class StepCostTorchRow:
    """Parameters that torch's own step updates.

    Attributes:
        reason: Why.
        tensors, elements: How many.
        names: Of the parameters, in the model.
    """

    reason: str
    tensors: int
    elements: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class StepCost:
    """What :func:`step_cost` found; prints as a table with its circumstances below it.

    Attributes:
        optimizer: Its class; of a composite, those of its members.
        device: That is measured, with the number of threads of a CPU.
        dtypes: Of the parameters.
        max_grad_norm: What the gradients are clipped to, in words; None if they are not. Stock then calls
            ``clip_grad_norm_`` before its step.
        tensors, elements: How many are trained, and in how many parameter ``groups``.
        small_tensors, small_elements: How many of these are in tensors of at most 4096 elements.
        moved: Bytes that the step must read and write.
        memory_gb_per_s: What ``x += y`` reads and writes of large tensors, in the same rounds.
        baseline: The contestant that ratios are to.
        rows: A row a contestant, ours after stock's.
        torch_steps: Which parameters go to torch's own step within ours, and why.
    """

    optimizer: str
    device: str
    dtypes: tuple[str, ...]
    max_grad_norm: str | None
    tensors: int
    elements: int
    groups: int
    small_tensors: int
    small_elements: int
    moved: int
    memory_gb_per_s: float | None
    baseline: str
    rows: tuple[StepCostRow, ...]
    torch_steps: tuple[StepCostTorchRow, ...] = field(default=())

    @property
    def floor_ms(self) -> float | None:
        """Milliseconds in which a plain sum would move the bytes that the step must move."""
        return None if self.memory_gb_per_s is None else self.moved / self.memory_gb_per_s / 1e6

    @property
    def table(self) -> list[tuple[str, ...]]:
        """The contestants that run, as texts, after a row with the names of the columns."""
        rows: list[tuple[str, ...]] = [("step", "ms", "p20", "p80", "ratio", "peak")]
        for row in self.rows:
            if row.ms is not None:
                times = (_number(row.ms), _number(row.p20_ms), _number(row.p80_ms))
                ratio = "-" if row.ratio is None else f"{row.ratio:.2f}x"
                rows.append((row.name, *times, ratio, "-" if row.peak is None else size(row.peak)))
        return rows

    @property
    def summary(self) -> str:
        """What was measured."""
        clipped = "" if self.max_grad_norm is None else f", clipped to {self.max_grad_norm}"
        return f"{self.optimizer}{clipped}, {' and '.join(self.dtypes)}, on {self.device}"

    @property
    def notes(self) -> list[str]:
        """The model, the floor, who does not run or does less, and what torch's own step updates."""
        small = f"{self.small_tensors:,} of the tensors have at most {SMALL:,} elements"
        small += f", {_percent(self.small_elements, self.elements)} of all"
        notes = [
            f"{self.tensors:,} tensors with {self.elements:,} parameters in {plural(self.groups, 'group')}; {small}.",
            f"A step must move {size(self.moved)}" + (
                "." if self.floor_ms is None
                else f"; x += y moves {self.memory_gb_per_s:.3g} GB/s, at which that takes {_number(self.floor_ms)} ms."
            ),
        ]  # fmt: skip
        names: dict[str, list[str]] = {}
        for row in self.rows:
            if row.note:
                names.setdefault(row.note, []).append(row.name)
        notes += [f"{', '.join(those)}: {note.rstrip('.')}." for note, those in names.items()]
        notes += [
            f"torch's own step updates {plural(row.tensors, 'tensor')} ({row.elements:,} parameters) because "
            f"{row.reason}: {', '.join(row.names[:3])}{', ...' if len(row.names) > 3 else ''}."
            for row in self.torch_steps
        ]
        calls = [row.calls for row in self.rows if row.calls]
        fewest, most = min(calls), max(calls)
        how = f"{fewest} calls" if fewest == most else f"{fewest} to {most} calls"
        return [*notes, f"Medians of {how}, taken in turns; ratio: {self.baseline} over it, above 1.00x is faster."]

    def lines(self, width: int | None = _WIDTH) -> list[str]:
        """Table and notes, in lines of ``width`` characters, or as long as they have to be."""
        notes = self.notes if width is None else [line for note in self.notes for line in textwrap.wrap(note, width)]
        return [self.summary, "", *aligned(self.table, range(1, 6)), "", *notes]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, texts, lists and dicts."""
        return {**asdict(self), "floor_ms": self.floor_ms}


def row_of(
    name: str, seconds: Sequence[float] | None, baseline: Sequence[float] | None, peak: int | None, note: str
) -> StepCostRow:
    """A row from the seconds of its calls and of the baseline's."""
    if not seconds:
        return StepCostRow(name, note=note)
    deciles = quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else [*seconds] * 9
    times = 1e3 * median(seconds), 1e3 * deciles[1], 1e3 * deciles[7]
    ratio = 1e3 * median(baseline) / times[0] if baseline else None
    return StepCostRow(name, *times, ratio, peak, len(seconds), note)


def _number(value: float | None) -> str:
    """Three digits that say something, whatever the size."""
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 1e3 else f"{value:,.0f}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.2g} %"
