"""What the report and the documentation show of :mod:`bench.lr_find`: each rule beside the best of a grid."""

from __future__ import annotations

import textwrap
from math import inf
from statistics import fmean
from typing import Any

from bench.tables import markdown_table

PICTURE = "lr_find.png"


def picture(folder: str = "") -> str:
    """The picture in Markdown."""
    return f"![Sweeps, and final losses over the learning rate]({folder}{PICTURE})"


def lines(results: dict[str, Any]) -> list[str]:
    """Words and a table."""
    entries = results["entries"]
    seeds = len(entries[0]["sweeps"])
    text = (
        f"Two models train with two optimizers from {seeds} seeds: at each of {len(entries[0]['grid'])} learning rates "
        f"from {entries[0]['grid'][0]:g} to {entries[0]['grid'][-1]:g}, and at each that a sweep of the same weights "
        "over other batches suggests. A cell has the mean final loss on unseen data over that of the grid's best "
        "learning rate, and the range of what the seeds suggest."
    )
    table = [["", *(f"{entry['task']}, {entry['optimizer']}" for entry in entries)]]
    table.append(["best of the grid", *map(best, entries)])
    rules = dict.fromkeys(rule for entry in entries for rule in entry["rules"])
    table += [[f"`{rule}`", *(cell(entry, rule) for entry in entries)] for rule in rules]
    return [*textwrap.wrap(text, 120), "", f"`{results['run']['command']}`", "", *markdown_table(table)]


def best(entry: dict[str, Any]) -> str:
    """Its loss and its learning rate."""
    return f"{best_loss(entry):.4f} at {entry['grid'][entry['best']]:g}"


def best_loss(entry: dict[str, Any]) -> float:
    """The mean over the seeds."""
    return fmean(entry["grid_losses"][entry["best"]])


def ratio(entry: dict[str, Any], rule: str) -> float:
    """The mean final loss at what a rule suggests, over the grid's best; infinite where a training diverges."""
    losses = entry["rules"][rule]["losses"]
    return inf if inf in losses else fmean(losses) / best_loss(entry)


def cell(entry: dict[str, Any], rule: str) -> str:
    if rule not in entry["rules"]:
        return "-"
    lrs = entry["rules"][rule]["lrs"]
    found = ratio(entry, rule)
    return f"{'diverges' if found == inf else f'{found:.2f}x'} at {min(lrs):.2g} to {max(lrs):.2g}"
