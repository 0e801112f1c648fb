"""What is measured of a watched step, by name, and what the step hands over: plain numbers, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Sums over gradients, and over what the update reads and writes; of these the last are of a first moment.
OF_GRADS = ("grad_sq", "grad_max", "grad_zeros")
OF_UPDATES = ("param_sq", "update_sq", "moment_sq", "grad_moment")
OF_MOMENTS = OF_UPDATES[2:]
#: States that are a first moment.
MOMENTS = ("exp_avg", "momentum_buffer")


def moment_in(state_names: Sequence[str]) -> int | None:
    """Which of the states is a first moment; None if none is."""
    return next((i for i, name in enumerate(state_names) if name in MOMENTS), None)


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
