"""The documentation's pictures: `make plots`, or `python -m bench.plots [FILE ...]`.

Here is that of every schedule as a small multiple.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from bench import bad_steps_chart, singular_values, watching
from bench.chart_style import OURS, figure, save
from optimx.lr_scheduler import (
    REX,
    Constant,
    Cooldown,
    Cosine,
    CosineWithHardRestarts,
    Cyclic,
    Exponential,
    Hold,
    InverseSqrt,
    InverseTime,
    Linear,
    LinearCosine,
    MultiStep,
    NaturalExponential,
    Noam,
    NormalizedExponential,
    OneCycle,
    OneMinusPower,
    OneMinusSqrt,
    Piecewise,
    Polynomial,
    Restarts,
    Schedule,
    Staircase,
    Tanh,
    Warmup,
)

STEPS = 200
COLUMNS = 6

GALLERY: dict[str, list[tuple[str, Schedule]]] = {
    "Shapes (200 steps)": [
        ("Linear", Linear(200)),
        ("Cosine, floor=0.1", Cosine(200, 0.1)),
        ("Cosine, k=2", Cosine(200, k=2.0)),
        ("Polynomial, power=2", Polynomial(200, power=2.0)),
        ("OneMinusSqrt", OneMinusSqrt(200)),
        ("OneMinusPower", OneMinusPower(200)),
        ("NormalizedExponential", NormalizedExponential(200)),
        ("Tanh", Tanh(200)),
        ("REX", REX(200)),
        ("LinearCosine, num_cycles=3", LinearCosine(200, num_cycles=3)),
        ("Cosine, num_cycles=2.5", Cosine(200, num_cycles=2.5)),
        ("CosineWithHardRestarts", CosineWithHardRestarts(200, cycles=3)),
    ],
    "Without a horizon, and cycles": [
        ("Exponential(0.98)", Exponential(0.98)),
        ("Staircase(Exponential(0.98), 20)", Staircase(Exponential(0.98), 20)),
        ("NaturalExponential(0.02)", NaturalExponential(0.02)),
        ("InverseTime(0.05)", InverseTime(0.05)),
        ("InverseSqrt(20)", InverseSqrt(20)),
        ("Noam(40)", Noam(40)),
        ("Constant(0.5)", Constant(level=0.5)),
        ("MultiStep((80, 140), 0.3)", MultiStep((80, 140), 0.3)),
        ("Piecewise((60, 120), ...)", Piecewise((60, 120), (0.3, 1.0, 0.1))),
        ("Cyclic(30)", Cyclic(30)),
        ('Cyclic(30), "triangular2"', Cyclic(30, mode="triangular2")),
        ("OneCycle(200)", OneCycle(200)),
    ],
    "Warmup(80, ...) >> Cosine(120), and other conventions": [
        *(
            (f'"{shape}"' + (f", start={start}" if start else ""), Warmup(80, shape, start) >> Cosine(120))
            for shape, start in [
                ("linear", 0.0),
                ("cosine", 0.0),
                ("sqrt", 0.0),
                ("1-sqrt", 0.0),
                ("log", 0.0),
                ("exponential", 0.01),
                ("constant", 0.3),
            ]
        ),
        *(
            (f'convention="{name}"', (Warmup(80) >> Cosine(120)).with_convention(name))
            for name in ("hf", "torchtitan", "timm", "detectron2", "product")
        ),
    ],
    "Composed": [
        ("Warmup>>Hold>>OneMinusSqrt", Warmup(30) >> Hold(110) >> OneMinusSqrt(60)),
        ("Warmup>>InverseSqrt>>Cooldown", Warmup(30) >> InverseSqrt(30, steps=120) >> Cooldown(50)),
        ("Warmup>>Restarts, mult=2", Warmup(20) >> Restarts(Cosine(25), mult=2)),
        ("Restarts, peak_decay=0.7", Restarts(Cosine(50), peak_decay=0.7)),
        ("Restarts(Warmup>>Linear)", Restarts(Warmup(10) >> Linear(40))),
        ("Warmup * Exponential", Warmup(60) * Exponential(0.985)),
    ],
}


def draw(path: Path) -> None:
    """Draw the gallery: one row of axes for every six schedules, all with the same scales."""
    heights = [-(-len(group) // COLUMNS) for group in GALLERY.values()]
    steps = range(STEPS + 20)
    with figure(2.2 * COLUMNS, 1.55 * sum(heights) + 0.45 * len(heights)) as chart:
        parts = chart.subfigures(len(heights), 1, height_ratios=[h + 0.3 for h in heights])
        for part, (title, group), height in zip(parts, GALLERY.items(), heights, strict=True):
            part.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
            axes = part.subplots(height, COLUMNS, sharex=True, sharey=True, squeeze=False)
            for ax, (name, schedule) in zip(axes.flat, group, strict=True):
                ax.plot(steps, [schedule(step) for step in steps], color=OURS)
                ax.set_title(name, fontsize=8, family="monospace")
                ax.set(ylim=(-0.05, 1.1), xticks=(0, 100, 200), yticks=(0, 0.5, 1))
                ax.tick_params(labelsize=7)
        save(chart, path)


#: Where the documentation has its pictures, and who draws them.
PICTURES: dict[str, Callable[[Path], None]] = {
    "docs/schedules.png": draw,
    "docs/optimizers/singular_values.png": singular_values.draw,
    "docs/watching.png": watching.draw,
    "docs/bad_steps.png": bad_steps_chart.draw,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        PICTURES[name](Path(name))
        print(name)
