"""The picture of :mod:`bench.bad_steps`: loss curves of one seed, with the bad steps marked below."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from bench.bad_steps import EVERY, MULTIPLIED, NAN, NOISE, STEPS, WAYS
from bench.chart_style import CYCLE, INK, figure, save
from bench.convergence import RESULTS

#: Of which results the documentation has the picture.
MEASURED = RESULTS / "cpu-amd-epyc-2-threads" / "bad_steps.json"
#: Names of the ways that are drawn, with colors: their curves differ.
DRAWN = {WAYS[number].name: color for number, color in zip((0, 1, 3, 7, 4), CYCLE, strict=True)}
MARKERS = {MULTIPLIED: "^", NOISE: "s", NAN: "x"}


def draw(path: Path) -> None:
    """Write a PNG of the saved results: a panel for each plan that has bad batches, the first seed in each."""
    results = json.loads(MEASURED.read_text())
    plans = {name: plan for name, plan in results["bad_steps"].items() if plan}
    with figure(9, 3.8) as chart:
        axes = chart.subplots(1, len(plans), sharey=True)
        for ax, (name, plan) in zip(axes, plans.items(), strict=True):
            ax.set(title=name, xlabel="training step", xlim=(0, STEPS + 5), ylim=(2.3, 4.0))
            for entry in results["entries"]:
                if entry["plan"] == name and entry["way"] in DRAWN:
                    curve(ax, entry["losses"][0], entry["way"], DRAWN[entry["way"]])
            for kind in dict.fromkeys(plan.values()):
                steps = [int(step) for step, planted in plan.items() if planted == kind]
                ax.plot(steps, [2.36] * len(steps), MARKERS[kind], color=INK, markersize=5, label=f"batch: {kind}")
        axes[0].set_ylabel("loss on unseen text")
        handles = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        chart.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
        save(chart, path)


def curve(ax: Any, losses: list[float], name: str, color: str) -> None:
    """A way's losses, with a cross where they end in NaN."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    steps = [EVERY * i for i in range(len(finite))]
    ax.plot(steps, finite, color=color, label=name.replace("`", ""))
    if len(finite) < len(losses):
        ax.plot(steps[-1:], finite[-1:], "X", color=color, markersize=8)
