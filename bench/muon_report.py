"""What the report and the documentation show of Muon: what it costs, and how many steps it saves."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from statistics import median
from typing import Any

from bench.case import COPY, DEFAULT, OURS
from bench.results import Row
from bench.saved import Results
from bench.tables import contest_table, markdown_table, number

#: How the names of cases without products begin.
ELEMENTWISE = "muon-elementwise-"
PICTURE = "convergence_muon.png"


def cost_lines(results: Results) -> list[str]:
    """Two tables: whole steps beside those of torch and of other packages; steps without products beside AdamW's."""
    elementwise = results.cases("muon", ELEMENTWISE)
    whole = [case for case in results.cases("muon", "muon-") if case not in elementwise]
    tables = (
        contest_table("Muon, ms", whole, columns(whole), "muon-"),
        contest_table("without products, ms", elementwise, columns(elementwise), ELEMENTWISE),
    )
    text = (
        f"Milliseconds of a step on float32 matrices. The ratio is torch over {OURS}, so above 1.00x {OURS} is faster. "
        "Without iterations, and so without products, a step is momentum, norm and update; the ratio is AdamW over it:"
    )
    first, second = map(markdown_table, tables)
    return [*first, "", *textwrap.wrap(text, 120), "", *second]


def columns(cases: Sequence[tuple[str, list[Row]]]) -> dict[str, str]:
    """Contestants beside ours, and what to call them."""
    names = dict.fromkeys(row.contestant for _, rows in cases for row in rows)
    return {name: "torch" if name == DEFAULT else name for name in names if name not in (COPY, OURS)}


def convergence_lines(check: dict[str, Any]) -> list[str]:
    """What ``python -m bench.convergence_muon`` found, in words and in a table."""
    first, *_ = check["searched"].values()
    text = (
        f"A GPT of {check['params']:,} parameters reads Python's source for {check['recipe']['steps']} steps, from "
        f"{len(check['reached'])} seeds. With Muon for the hidden matrices and AdamW for the rest it is at AdamW's "
        f"final loss after {spread(check['reached'])} steps. Both have the same batches, schedule, clipping, weight "
        f"decay and betas, one learning rate for all parameters, and the same search for it: of {', '.join(first)} "
        "it is the one with the lowest final loss on another seed. Losses are of unseen text, in nats a byte; numbers "
        "are medians, with the range of the seeds."
    )
    table = [["optimizer", "lr", "final loss", "ms a training step"]]
    for entry in check["optimizers"]:
        finals = [losses[-1] for losses in entry["losses"]]
        lr = f"{entry['arguments']['lr']:g}"
        table.append([entry["optimizer"], lr, spread(finals), number(median(entry["ms"]))])
    return [*textwrap.wrap(text, 120), "", f"`{check['run']['command']}`", "", *markdown_table(table)]


def spread(values: Sequence[float | None]) -> str:
    """Median and range; None is more than any number."""
    ordered = sorted(math.inf if value is None else value for value in values)
    middle, low, high = (f"{value:.4g}" for value in (median(ordered), ordered[0], ordered[-1]))
    return f"{middle} ({low} to {high})"


def picture(folder: str = "") -> str:
    """The chart of the convergence check, with words for who does not see it."""
    return f"![Loss curves of AdamW, and of Muon and AdamW together, which are there earlier]({folder}{PICTURE})"
