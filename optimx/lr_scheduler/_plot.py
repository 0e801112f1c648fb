"""Pictures of schedules; the only file that needs matplotlib, and imports it when it draws."""

from __future__ import annotations

import os
from collections.abc import Sequence


def plot_groups(
    path: str | os.PathLike[str], values: Sequence[Sequence[float]], names: Sequence[str], field: str
) -> None:
    """Draw a line for each group; groups that share theirs share its label.

    Args:
        path: The image file.
        values: For each step a list of each group's value.
        names: Of the groups.
        field: What is drawn.
    """
    from matplotlib.figure import Figure

    lines: dict[tuple[float, ...], list[str]] = {}
    for name, line in zip(names, zip(*values, strict=True), strict=True):
        lines.setdefault(line, []).append(name)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=field)
    for line, members in lines.items():
        axes.plot(line, label=members[0] if len(members) == 1 else f"{members[0]} and {len(members) - 1} more")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if 1 < len(lines) <= 10:
        axes.legend()
    figure.savefig(path, dpi=120)
