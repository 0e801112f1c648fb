"""The picture of ``bench.convergence``: a panel an optimizer, rows of panels a task."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from bench.chart_style import OURS, STOCK_DEFAULT, figure, save
from bench.convergence_tasks import TASKS

COLUMNS = 7


def draw(results: dict[str, Any], path: Path) -> None:
    """Write a PNG: the band between stock's lowest and highest seed, its mean, and our mean dashed on top of it.

    Args:
        results: What ``python -m bench.convergence`` writes.
        path: Of the PNG.
    """
    tasks: dict[str, list[dict[str, Any]]] = {}
    for entry in results["runs"]:
        tasks.setdefault(entry["task"], []).append(entry)
    heights = [-(-len(entries) // COLUMNS) for entries in tasks.values()]
    with figure(1.9 * COLUMNS, 1.5 * sum(heights) + 0.5 * len(heights)) as chart:
        parts = chart.subfigures(len(tasks), 1, height_ratios=[height + 0.3 for height in heights], squeeze=False)
        for part, (task, entries), height in zip(parts.flat, tasks.items(), heights, strict=True):
            part.suptitle(TASKS[task].title, x=0.01, ha="left", fontsize=12, fontweight="bold")
            axes = part.subplots(height, COLUMNS, sharex=True, sharey=True, squeeze=False)
            for ax, entry in zip(axes.flat, entries, strict=False):
                panel(ax, entry)
            for ax in axes.flat[len(entries) :]:
                ax.set_axis_off()
            part.supxlabel("step", fontsize=9)
            part.supylabel("training loss", fontsize=9)
        parts.flat[0].legend(*axes.flat[0].get_legend_handles_labels(), loc="upper right", ncols=3)
        save(chart, path)


def panel(ax: Any, entry: dict[str, Any]) -> None:
    """One optimizer's curves on one task."""
    steps, seeds = entry["steps"], list(zip(*entry["losses"]["stock"], strict=True))
    band = f"stock, {entry['seeds']} seeds"
    ax.fill_between(
        steps, list(map(min, seeds)), list(map(max, seeds)), color=STOCK_DEFAULT, alpha=0.3, lw=0, label=band
    )
    ax.plot(steps, list(map(fmean, seeds)), color=STOCK_DEFAULT, linewidth=3.5, alpha=0.7, label="their mean")
    means = list(map(fmean, zip(*entry["losses"]["ours"], strict=True)))
    ax.plot(steps, means, color=OURS, linewidth=1.6, linestyle=(0, (3, 2)), label="optimx, mean")
    ax.set_title(entry["optimizer"] + (f": {entry['verdict']}" if entry["failures"] else ""))
    ax.tick_params(labelsize=7)
