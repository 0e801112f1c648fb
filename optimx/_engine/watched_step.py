"""What a watched step hands over: plain numbers, on the host."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["WatchedStep"]


@dataclass(frozen=True)
class WatchedStep:
    """What was measured in one step.

    Attributes:
        step: Which step, from 1.
        sums: By name of a sum one float per watched parameter, in the order of the watcher's parameters; nan where it
            was not measured (no gradient).
        totals: Floats of the whole step: ``"grad_norm"`` (before clipping, of all parameters), ``"clip_factor"`` (1.0:
            nothing clipped), ``"skipped"`` (0.0 or 1.0).
    """

    step: int
    sums: dict[str, list[float]]
    totals: dict[str, float]
