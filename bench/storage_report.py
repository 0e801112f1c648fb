"""What the report and the documentation show of how numbers are kept: final losses beside those of float32."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from bench.tables import markdown_table

#: The worst one first.
VERDICTS = {"above": "**no, above**", "below": "no, below", "within": "yes"}


def convergence_lines(check: dict[str, Any]) -> list[str]:
    """What ``python -m bench.convergence_storage`` found, in words and in a table."""
    float32, *_ = schemes = check["schemes"]
    arguments = float32["arguments"]
    text = (
        f"A GPT of {check['params']:,} parameters reads Python's source for {check['recipe']['steps']} steps of AdamW, "
        f"from {len(float32['seen'])} seeds, with `lr` {arguments['lr']:g}, `betas` {arguments['betas']}, "
        f"`weight_decay` {arguments['weight_decay']:g}, warmup and a cosine to a tenth. All begin with the "
        "same weights and compute in float32 on what the parameters hold: only what is kept differs, and gradients of "
        "bfloat16 parameters, which are bfloat16. `nearest` parameters and `bfloat16` states are rounded to the "
        "nearest. Losses are final ones, in nats a byte: means, and the range of the seeds. *Apart* is the mean "
        "difference from float32 of the same seed, on unseen text. *Within* says whether both means are in the range "
        "of float32's seeds: then what is kept matters less than the seed."
    )
    table = [["parameters", "states", "loss on seen text", "on unseen text", "apart", "within"]]
    for entry in schemes:
        finals, others = ([losses[-1] for losses in one["losses"]] for one in (entry, float32))
        gap = fmean(a - b for a, b in zip(finals, others, strict=True))
        # no negative zero
        apart = "" if entry is float32 else f"{round(gap, 4) + 0.0:+.4f}"
        kept = [entry["params"], entry["states"]]
        table.append([*kept, spread(entry["seen"]), spread(finals), apart, verdict(entry["verdict"])])
    return [*textwrap.wrap(text, 120), "", f"`{check['run']['command']}`", "", *markdown_table(table)]


def spread(values: Sequence[float]) -> str:
    """Mean and range."""
    mean, low, high = (f"{value:.4f}" for value in (fmean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})"


def verdict(of: dict[str, str]) -> str:
    """Both verdicts in one cell, and of which text where they are two; the worse one first."""
    if len({*of.values()}) == 1:
        return VERDICTS[of["seen"]]
    return "; ".join(f"{VERDICTS[found]} ({text})" for found in VERDICTS for text in of if of[text] == found)
