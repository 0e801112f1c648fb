"""Pictures of schedules and sweeps; needs matplotlib, and imports it when it draws."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

__all__ = ["plot_groups", "plot_sweep"]

#: Lines that colors of their own tell apart; more have shades from first to last.
_COLORS = 10
#: Entries of the legend in a column.
_ROWS = 30


def plot_groups(
    path: str | os.PathLike[str], values: Sequence[Sequence[float]], groups: Sequence[Mapping[str, Any]], field: str
) -> None:
    """Draw a line for each group; groups that share theirs share its label.

    Args:
        path: The image file, of the format that its suffix says (without one: PNG). It is written as it is called.
        values: For each step a list of each group's value.
        groups: Parameter groups of the optimizer, which name the lines.
        field: What is drawn.

    Raises:
        ValueError: There is no step to draw, or no image has such a suffix.
    """
    if not values:
        raise ValueError("n should be >= 1, the steps to draw, but is: 0")
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    lines: dict[tuple[float, ...], list[int]] = {}
    for i, line in enumerate(zip(*values, strict=True)):
        lines.setdefault(line, []).append(i)
    columns = -(-len(lines) // _ROWS)
    height = max(4.0, 1.0 + 0.19 * min(len(lines), _ROWS)) if len(lines) > 1 else 4.0
    figure = Figure(figsize=(8 + 2 * columns if len(lines) > 1 else 8, height), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=field)
    shades = colormaps["viridis"]
    for i, (line, members) in enumerate(lines.items()):
        color = f"C{i}" if len(lines) <= _COLORS else shades(i / len(lines))
        # a single step is a point
        axes.plot(line, label=_label(groups, members), color=color, marker="o" if len(line) == 1 else None)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        figure.legend(loc="outside right upper", ncols=columns, fontsize="small", frameon=False)
    _save(figure, path)


def plot_sweep(
    where: Any,
    lrs: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    suggestions: Mapping[str, float | None],
) -> None:
    """Draw losses over learning rates, and where each rule suggests to be.

    Args:
        where: Axes of matplotlib, or the path of an image file as for :func:`plot_groups`.
        lrs, losses, smoothed: Of each step.
        suggestions: Learning rates by the name of the rule; None is left out.

    Raises:
        ValueError: There is no step to draw, or no image has such a suffix.
    """
    if not lrs:
        raise ValueError("lrs should be one or more, the steps to draw, but are: []")
    if isinstance(where, (str, os.PathLike)):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        plot_sweep(figure.add_subplot(), lrs, losses, smoothed, suggestions)
        _save(figure, where)
        return
    where.plot(lrs, losses, color="C0", alpha=0.35, label="loss")
    where.plot(lrs, smoothed, color="C0", label="smoothed")
    points: dict[float, list[str]] = {}
    for name, lr in suggestions.items():
        if lr is not None:
            points.setdefault(lr, []).append(name)
    for i, lr in enumerate(sorted(points)):
        # a tenth of the minimum may be no step
        nearest = min(range(len(lrs)), key=lambda step: abs(math.log(lrs[step] / lr)))
        label = f"{', '.join(points[lr])}: {lr:.2g}"
        where.plot([lr], [smoothed[nearest]], "o", color=f"C{i + 1}", markersize=7, label=label)
    # a loss that explodes would flatten all the rest
    low, first = min(*losses, *smoothed), max(smoothed[: smoothed.index(min(smoothed)) + 1])
    if low < first:
        where.set_ylim(low - 0.1 * (first - low), first + 0.5 * (first - low))
    where.set(xscale="log", xlabel="learning rate", ylabel="loss")
    where.grid(alpha=0.3)
    where.legend(fontsize="small", frameon=False)


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    figure.savefig(path, format=Path(path).suffix[1:].lower() or "png", dpi=120)


def _label(groups: Sequence[Mapping[str, Any]], members: Sequence[int]) -> str:
    """The groups by their names, or what the names of their parameters have in common, or their numbers."""
    named = [str(groups[i]["name"]) for i in members if "name" in groups[i]]
    if len(named) == len(members):
        return _some(named)
    names = [name for i in members for name in groups[i].get("param_names", ())]
    if not names or not all("param_names" in groups[i] for i in members):
        return _some([f"group {i}" for i in members])
    parts = zip(*(name.split(".") for name in names), strict=False)
    common = [part[0] for part in takewhile(lambda part: len(set(part)) == 1, parts)]
    if common:
        return ".".join(common)
    return _some(list(dict.fromkeys(name.partition(".")[0] for name in names)))


def _some(names: Sequence[str]) -> str:
    few = names[:3]
    return ", ".join(few) + (f" and {len(names) - len(few)} more" if len(names) > len(few) else "")
