"""The pictures of ``bench.convergence``, a panel an optimizer and rows of panels a task, and of its Muon check."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median
from typing import Any

from bench.chart_style import INK, OURS, STOCK_DEFAULT, figure, save
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


def draw_muon(results: dict[str, Any], path: Path) -> None:
    """Write a PNG: the median of the seeds, the range between them, and where AdamW's final loss is reached.

    Args:
        results: What ``python -m bench.convergence_muon`` writes.
        path: Of the PNG.
    """
    steps = results["steps"]
    with figure(7, 3.6) as chart:
        axes = chart.subplots()
        for entry, color in zip(results["optimizers"], (STOCK_DEFAULT, OURS), strict=True):
            seeds = list(zip(*entry["losses"], strict=True))
            axes.fill_between(steps, list(map(min, seeds)), list(map(max, seeds)), color=color, alpha=0.25, lw=0)
            label = f"{entry['optimizer']}: median and range of {len(entry['losses'])} seeds"
            axes.plot(steps, list(map(median, seeds)), color=color, label=label)
        alone, _ = results["optimizers"]
        goal = median(losses[-1] for losses in alone["losses"])
        axes.axhline(goal, color=INK, linewidth=1, linestyle=(0, (3, 2)), label="AdamW's final loss")
        if None not in results["reached"]:
            axes.axvline(median(results["reached"]), color=INK, linewidth=1, linestyle=(0, (1, 2)))
        axes.set(xlabel="training step", ylabel="loss on unseen text, nats a byte", xlim=(0, steps[-1]))
        # what is before the end of warmup is many times as high
        warm = next(i for i, step in enumerate(steps) if step >= results["recipe"]["warmup"])
        axes.set_ylim(top=max(losses[warm] for entry in results["optimizers"] for losses in entry["losses"]))
        axes.legend()
        save(chart, path)
