"""What the report and the documentation show of :mod:`bench.bad_steps`: final losses of each way and plan."""

from __future__ import annotations

import math
import textwrap
from statistics import fmean
from typing import Any

from bench.tables import markdown_table


def lines(results: dict[str, Any]) -> list[str]:
    """Words, a table, and what the optimizer told of a bad step."""
    entries = results["entries"]
    seeds, plans = len(entries[0]["losses"]), [*results["bad_steps"]]
    text = (
        f"A cell has the mean final loss on unseen text of {seeds} seeds, and their range. Skipped and clipped steps "
        f"are the first seed's, with {plans[-1]}."
    )
    cells = {(entry["way"], entry["plan"]): entry for entry in entries}
    table = [["", *plans, "skipped", "clipped"]]
    for way in dict.fromkeys(entry["way"] for entry in entries):
        counters = cells[way, plans[-1]]["counters"][0]
        counted = [str(counters[name]) if counters else "-" for name in ("skipped", "clipped")]
        table.append([way, *(cell(cells[way, plan]) for plan in plans), *counted])
    told = next((text for entry in entries for text in entry["last_bad"] if text is not None), None)
    report = ["", "What `optimx.last_bad` tells:", "", "```", *textwrap.wrap(told, 120), "```"] if told else []
    return [*textwrap.wrap(text, 120), "", f"`{results['run']['command']}`", "", *markdown_table(table), *report]


def cell(entry: dict[str, Any]) -> str:
    final = [losses[-1] for losses in entry["losses"]]
    if not all(map(math.isfinite, final)):
        return "NaN"
    return f"{fmean(final):.3f} ({min(final):.3f} to {max(final):.3f})"
