"""The charts of the report. A function a chart, which returns whether there was something to draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from bench import chart_style as style
from bench.case import COMPILED, COPY, DEFAULT, FOREACH, FUSED, OURS, STOCK
from bench.convergence_chart import draw as draw_convergence
from bench.convergence_chart import draw_muon
from bench.lr_find_chart import draw as draw_lr_find
from bench.lr_find_report import PICTURE as LR_FIND
from bench.muon_report import PICTURE
from bench.results import Row
from bench.saved import Results
from bench.scaling import fit
from bench.tables import millions
from optimx.measuring.packages import is_peer

OTHERS = "fastest other package"
COLORS = {
    DEFAULT: style.STOCK_DEFAULT,
    FOREACH: style.STOCK_FOREACH,
    FUSED: style.STOCK_FUSED,
    COMPILED: style.STOCK_COMPILED,
    OURS: style.OURS,
}
#: Ends of the names of cases that every optimizer has.
SHAPES = {
    "-4x4M": "4 tensors of 4M",
    "-vit-b16": "ViT-B/16, 152 tensors",
    "-1000x4": "1000 tensors of 4",
    "-llama-1b": "Llama 3.2 1B, 146 tensors",
}


def plain(value: float, position: Any = None) -> str:
    """Ticks as people write them: 0.5, 20, 10k, 100M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def bars(axes: Axes, labels: Sequence[str], series: dict[str, list[float]], ylabel: str) -> None:
    """Groups of bars on a logarithmic axis, standing on the line of 1."""
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        positions = [x + (i - (len(series) - 1) / 2) * width for x in range(len(labels))]
        # on a logarithmic axis a bar begins where it is told: at 1, upwards faster, downwards slower
        axes.bar(
            positions, [value - 1 for value in values], width * 0.9, bottom=1,
            color=COLORS.get(name, style.PEER), label=name, zorder=2,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(plain))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, position: ""))
    axes.set_yticks([y for y in (0.1, 0.2, 0.5, 1, 2, 5, 10) if within(y, series)])
    axes.axhline(1, color=style.INK, linewidth=1)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel(ylabel)
    axes.grid(axis="x", visible=False)


def within(y: float, series: dict[str, list[float]]) -> bool:
    values = [value for values in series.values() for value in values if not math.isnan(value)]
    return min(values) / 1.6 < y < max(values) * 1.6


def models(results: Results, path: Path) -> bool:
    cases = [rows for _, rows in results.cases("step", "step-") if rows[0].model]
    series: dict[str, list[float]] = {DEFAULT: [], FOREACH: [], COMPILED: [], OTHERS: [], OURS: []}
    for rows in cases:
        medians = {row.contestant: row.median_ms for row in rows if row.median_ms}
        medians[OTHERS] = min((ms for name, ms in medians.items() if is_peer(name)), default=math.nan)
        for name, values in series.items():
            values.append(medians.get(FUSED, math.nan) / medians.get(name, math.nan))
    series = {name: values for name, values in series.items() if not all(map(math.isnan, values))}
    if not series:
        return False
    with style.figure(9, 3.4) as figure:
        axes = figure.subplots()
        labels = [f"{rows[0].model}\n{rows[0].tensors} tensors\n{millions(rows[0].params)}" for rows in cases]
        bars(axes, labels, series, "speed, fused = 1")
        axes.tick_params(axis="x", labelsize=7)
        figure.legend(loc="outside upper center", ncols=len(series))
        style.save(figure, path)
    return True


def optimizers(results: Results, path: Path) -> bool:
    cases = {
        case.removesuffix("-float32").replace("step-", "adamw-"): rows
        for case, rows in [*results.cases("step"), *results.cases("adafactor")]
        if OURS in {row.contestant for row in rows}
    }
    endings = {ending: label for ending, label in SHAPES.items() if any(case.endswith(ending) for case in cases)}
    if not endings:
        return False
    (first, *_) = endings
    names = [case.removesuffix(first) for case in cases if case.endswith(first)]
    with style.figure(9, 3.2) as figure:
        axes = figure.subplots()
        width = 0.8 / len(endings)
        for i, (ending, color) in enumerate(zip(endings, style.CYCLE, strict=False)):
            values = [over_best(cases.get(name + ending, [])) for name in names]
            axes.bar(
                [x + (i - (len(endings) - 1) / 2) * width for x in range(len(names))],
                [value - 1 for value in values], width * 0.9, bottom=1, color=color, label=endings[ending], zorder=2,
            )  # fmt: skip
        axes.axhline(1, color=style.INK, linewidth=1)
        axes.set_xticks(range(len(names)), [name.replace("-", "\n") for name in names], fontsize=7.5)
        axes.set_ylabel("speed, fastest of torch's = 1")
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside upper center", ncols=3)
        style.save(figure, path)
    return True


def over_best(rows: Sequence[Row]) -> float:
    """Our speed over that of the fastest stock implementation; whose numbers are wrong does not count."""
    stock = [row.median_ms for row in rows if row.contestant in STOCK and row.median_ms and row.note is None]
    ours = [row.median_ms for row in rows if row.contestant == OURS and row.median_ms]
    return min(stock) / ours[0] if stock and ours else math.nan


def roofline(results: Results, path: Path) -> bool:
    rows = [row for row in results.rows if row.copy_fraction and row.contestant in COLORS and "4x4M" in row.case]
    rows = rows or [row for row in results.rows if row.copy_fraction and row.contestant in COLORS and row.params > 1e8]
    cases = list(dict.fromkeys(row.case for row in rows))
    if not cases:
        return False
    with style.figure(9, 0.26 * len(cases) + 1.0) as figure:
        axes = figure.subplots()
        for name, color in COLORS.items():
            mine = [row for row in rows if row.contestant == name]
            if not mine:
                continue
            axes.plot(
                [row.copy_fraction for row in mine], [cases.index(row.case) for row in mine],
                "o", color=color, label=name, markersize=9 if name == OURS else 6, zorder=4 if name == OURS else 3,
                linestyle="none", fillstyle="none" if name == OURS else "full", markeredgewidth=2,
            )  # fmt: skip
        axes.axvline(1, color=style.INK, linewidth=1.4)
        axes.set_yticks(range(len(cases)), cases, fontsize=8)
        axes.set_xlim(0, max(1.1, 1.05 * max(row.copy_fraction for row in rows)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:.0%}"))
        axes.set_xlabel("bytes the algorithm must move / time, of a plain copy's bytes / time in the same rounds")
        axes.invert_yaxis()
        figure.legend(loc="outside upper center", ncols=4)
        style.save(figure, path)
    return True


def lines(axes: Axes, rows: Sequence[Row], x: Callable[[Row], float]) -> None:
    """A line a contestant, with the range from p20 to p80, both axes logarithmic."""
    for name, color in COLORS.items():
        mine = sorted((row for row in rows if row.contestant == name and row.median_ms), key=x)
        if mine:
            places = [x(row) for row in mine]
            axes.plot(places, [row.median_ms for row in mine], "o-", color=color, label=name, markersize=4)
            axes.fill_between(
                places, [row.p20_ms for row in mine], [row.p80_ms for row in mine], color=color, alpha=0.15, linewidth=0
            )
    axes.set(xscale="log", yscale="log", ylabel="ms a step")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(plain))


def sweep(results: Results, question: str, start: str) -> list[Row]:
    return [row for _, rows in results.cases(question, start) for row in rows if row.contestant != COPY]


def groups(results: Results, path: Path) -> bool:
    rows = [row for row in sweep(results, "groups", "groups-") if row.case.removesuffix("-gpu")[7:].isdigit()]
    return curves(path, [("parameter groups", rows, lambda row: row.groups)])


def scaling(results: Results, path: Path) -> bool:
    return curves(
        path,
        [
            ("parameters", sweep(results, "scaling", "params-"), lambda row: row.params),
            ("tensors", sweep(results, "scaling", "tensors-"), lambda row: row.tensors),
        ],
        laws=True,
    )


def curves(path: Path, panels: list[tuple[str, list[Row], Callable[[Row], float]]], laws: bool = False) -> bool:
    """Panels of lines side by side; with ``laws`` the fitted ones are dotted over them."""
    if not all(rows for _, rows, _ in panels):
        return False
    everything = [row for _, rows, _ in panels for row in rows]
    with style.figure(4.5 * len(panels) if len(panels) > 1 else 6, 3.4) as figure:
        for axes, (label, rows, x) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            lines(axes, rows, x)
            axes.set_xlabel(label)
            for name, color in COLORS.items() if laws else ():
                mine = sorted((row for row in rows if row.contestant == name and row.median_ms), key=x)
                if mine:
                    law = fit([row for row in everything if row.contestant == name and row.median_ms])
                    axes.plot(
                        [x(row) for row in mine], [law(row.tensors, row.params) for row in mine],
                        ":", color=color, linewidth=1.2,
                    )  # fmt: skip
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=4)
        style.save(figure, path)
    return True


#: Files and who draws them.
DRAWN_BY: dict[str, Callable[[Results, Path], bool]] = {
    "models.png": models,
    "optimizers.png": optimizers,
    "roofline.png": roofline,
    "groups.png": groups,
    "scaling.png": scaling,
}


def draw(results: Results) -> list[str]:
    """Draw everything there are results for, into their folder; returns the names of the files."""
    drawn = [name for name, draw_chart in DRAWN_BY.items() if draw_chart(results, results.folder / name)]
    if results.convergence:
        draw_convergence(results.convergence, results.folder / "convergence.png")
        drawn.append("convergence.png")
    if results.convergence_muon:
        draw_muon(results.convergence_muon, results.folder / PICTURE)
        drawn.append(PICTURE)
    if results.lr_find:
        draw_lr_find(results.lr_find, results.folder / LR_FIND)
        drawn.append(LR_FIND)
    return drawn
