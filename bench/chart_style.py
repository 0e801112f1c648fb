"""The look that the project's charts share: one PNG that reads well on a white page and on a dark one.

    with figure(8, 3) as chart:
        axes = chart.subplots()
        axes.plot(times, color=OURS, label="optimx")
        save(chart, path)

The background is transparent, and every color is so far from both ends of the grey scale that it keeps a contrast of 3
(:data:`INK`, which text is in, 3.5) with white and with the dark pages of GitHub and of the documentation. The five
series stay apart with protanopia and deuteranopia too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cycler import cycler
from matplotlib import rc_context
from matplotlib.figure import Figure

#: Pages that a chart may stand on: a white one, GitHub's dark one, the documentation's.
PAGES = ("#ffffff", "#0d1117", "#1e2129")
#: Text, axes, ticks, reference lines.
INK = "#808a94"

OURS = "#f4621a"
STOCK_DEFAULT = "#2f66f0"
STOCK_FOREACH = "#0aa67a"
STOCK_FUSED = "#a8459a"
STOCK_COMPILED = "#b8860b"
PEER = "#a286ce"
#: Series without a meaning of their own, in this order.
CYCLE = (STOCK_DEFAULT, OURS, STOCK_FOREACH, STOCK_FUSED, PEER)

STYLE: dict[str, Any] = {
    # of all fonts matplotlib brings this one along, so the same data is the same file everywhere
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.facecolor": "none",
    "axes.prop_cycle": cycler(color=CYCLE),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@contextmanager
def figure(width: float, height: float, **options: Any) -> Iterator[Figure]:
    """An empty figure, in inches; what is drawn on it in the ``with`` block has the style, and nothing else has.

    Args:
        width: Inches; 110 pixels each.
        height: Inches.
        options: More keywords for :class:`matplotlib.figure.Figure`.
    """
    with rc_context(STYLE):
        yield Figure(figsize=(width, height), **{"layout": "constrained", **options})


def save(figure: Figure, path: Path) -> None:
    """Write a PNG with a transparent background; equal charts are equal files. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # ticks are made when they are first drawn
    with rc_context(STYLE):
        # no version or date within
        figure.savefig(path, dpi=110, metadata={"Software": None})
