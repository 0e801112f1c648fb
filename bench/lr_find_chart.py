"""The picture of :mod:`bench.lr_find`: above the sweeps, below final losses, over the same learning rates."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.chart_style import CYCLE, INK, figure, save

#: Of the rules.
MARKERS = "osD^vP"


def draw(results: dict[str, Any], path: Path) -> None:
    """Write a PNG with a column for each entry; each rule has a point at what it suggests for the first seed.

    Args:
        results: What ``python -m bench.lr_find`` writes.
        path: Of the PNG.
    """
    entries = results["entries"]
    with figure(3.2 * len(entries), 5.2) as chart:
        axes = chart.subplots(2, len(entries), sharex="col", squeeze=False)
        for above, below, entry in zip(*axes, entries, strict=True):
            above.set_title(f"{entry['task']}, {entry['optimizer']}")
            sweeps(above, entry)
            losses(below, entry)
        axes[0][0].set_ylabel("loss of the sweep, smoothed")
        axes[1][0].set_ylabel("final loss on unseen data")
        handles = {label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        chart.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
        save(chart, path)


def sweeps(ax: Any, entry: dict[str, Any]) -> None:
    """The first seed's curve over those of the others, with a point for each rule."""
    for curve in entry["smoothed"][1:]:
        ax.plot(entry["lrs"][: len(curve)], curve, color=INK, alpha=0.5, linewidth=1)
    first = entry["smoothed"][0]
    # what explodes would flatten the rest
    low, top = min(map(min, entry["smoothed"])), 1.1 * first[0]
    ax.plot(entry["lrs"][: len(first)], first, color=INK, linewidth=2)
    for i, (rule, found) in enumerate(entry["rules"].items()):
        lr = found["lrs"][0]
        nearest = min(range(len(first)), key=lambda step: abs(math.log(entry["lrs"][step] / lr)))
        point(ax, i, rule, lr, min(first[nearest], top))
    ax.set(xscale="log", ylim=(low - 0.1 * (top - low), top + 0.05 * (top - low)))


def losses(ax: Any, entry: dict[str, Any]) -> None:
    """The grid's means, and what each rule's learning rate leads to."""
    means = [fmean(of_seeds) for of_seeds in entry["grid_losses"]]
    ax.plot(entry["grid"], means, color=INK, linewidth=2)
    top = 1.1 * max(entry["smoothed"][0][0], min(means))
    for i, (rule, found) in enumerate(entry["rules"].items()):
        point(ax, i, rule, found["lrs"][0], min(found["losses"][0], top))
    ax.set(xlabel="learning rate", ylim=(0.9 * min(means), 1.05 * top))


def point(ax: Any, i: int, rule: str, lr: float, value: float) -> None:
    ax.plot([lr], [value], MARKERS[i], color=[*CYCLE, INK][i], label=rule, markersize=6, zorder=3)
