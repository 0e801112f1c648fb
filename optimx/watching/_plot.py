"""The picture of a watched run; needs matplotlib, and imports it when it draws."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from .statistics import Statistic

__all__ = ["plot"]

#: Names beside the map; of more rows only every second, third, ... one has its name there.
_LABELS = 40


def plot(
    path: str | os.PathLike[str],
    frame: Mapping[str, Sequence[float]],
    stat: str,
    names: Sequence[str],
    statistic: Statistic,
) -> None:
    """Draw a statistic as a map of names and steps, and below it the gradient norm with marks.

    Args:
        path: The image file, of the format that its suffix says (without one: PNG). It is written as it is called.
        frame: Columns of the rows.
        stat: What the map shows.
        names: Its lines, from above.
        statistic: How that is drawn.

    Raises:
        ValueError: There is no row to draw, or no image has such a suffix.
    """
    steps = frame["step"]
    if not steps:
        raise ValueError("there should be a row to draw but is none: the watcher has received nothing yet")
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    height = 1.2 + 0.17 * min(len(names), _LABELS)
    figure = Figure(figsize=(9, height + 2.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(height, 2.2))

    lines = [[_scaled(value, statistic.log) for value in frame[f"{stat}/{name}"]] for name in names]
    known = [value for line in lines for value in line if math.isfinite(value)] or [0.0]
    low, high = statistic.limits or (min(known), max(known))
    # zero and infinity have the colors of the ends, and only nan has none
    lines = [[value if math.isnan(value) else min(max(value, low), high) for value in line] for line in lines]
    colors = colormaps["coolwarm" if statistic.limits else "viridis"].with_extremes(bad="0.6")
    edges = [*range(len(names) + 1)]
    drawn = above.pcolormesh(_edges(steps), edges, lines, cmap=colors, vmin=low, vmax=high, rasterized=True)
    every = -(-len(names) // _LABELS)
    above.set_yticks([i + 0.5 for i in range(0, len(names), every)], names[::every], fontsize="small")
    above.invert_yaxis()
    above.grid(False)
    figure.colorbar(drawn, ax=above, label=f"log10 {stat}" if statistic.log else stat)

    norms = frame["grad_norm"]
    below.plot(steps, norms, label="gradient norm before clipping", marker="o" if len(steps) == 1 else None)
    clipped = [i for i, factor in enumerate(frame["clip_factor"]) if factor < 1]
    skipped = [i for i, marked in enumerate(frame["skipped"]) if marked]
    below.plot([steps[i] for i in clipped], [norms[i] for i in clipped], "v", color="C1", markersize=4, label="clipped")
    for i in skipped:
        below.axvline(steps[i], color="C3", linewidth=1, label="skipped" if i == skipped[0] else None)
    if any(norm > 0 for norm in norms if math.isfinite(norm)):
        below.set_yscale("log")
    below.set(xlabel="step", ylabel="grad_norm")
    below.grid(alpha=0.3)
    below.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, fontsize="small", frameon=False, ncols=3)
    figure.savefig(path, format=Path(path).suffix[1:].lower() or "png", dpi=120)


def _scaled(value: float, log: bool) -> float:
    """What the map shows."""
    if not log:
        return value
    return math.log10(value) if value else -math.inf


def _edges(steps: Sequence[float]) -> list[float]:
    """Where a row's column begins and ends: halfway to its neighbours."""
    middles = [(a + b) / 2 for a, b in pairwise(steps)]
    first = steps[0] - (middles[0] - steps[0] if middles else 0.5)
    last = steps[-1] + (steps[-1] - middles[-1] if middles else 0.5)
    return [first, *middles, last]
