"""What the report and the documentation show of storage: bytes a parameter and times of steps, by what is kept how."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from bench.results import Row
from bench.saved import Results
from bench.tables import markdown_table, number, times
from optimx.measuring.packages import is_peer

#: How the names of cases begin, and of which case steps are shown.
KEPT = "kept-"
ADAMW = "kept-adamw-bfloat16"
#: Bytes a bfloat16 parameter of AdamW that were computed, from what the package's source allocates.
COMPUTED = {
    "flashoptim 24, 8bit": ("int8 correction; codes with a float16 scale for 32", 2 + 1 + 2 * (1 + 2 / 32)),
    "flashoptim 32, 8bit": ("int16 correction; codes with a float16 scale for 32", 2 + 2 + 2 * (1 + 2 / 32)),
    "flashoptim 24": ("int8 correction; bfloat16 states", 2 + 1 + 2 * 2),
    "flashoptim 32": ("int16 correction; bfloat16 states", 2 + 2 + 2 * 2),
    "Transformer Engine": ("float32 copy and states", 2 + 4 + 2 * 4),
    "Transformer Engine, rest": ("int16 remainder, float32 states", 2 + 2 + 2 * 4),
    "Transformer Engine, 16": ("int16 remainder, bfloat16 states", 2 + 2 + 2 * 2),
}


def kept_lines(results: Results) -> list[str]:
    """Bytes a parameter of each scheme, and whether they are those that were counted by hand; steps of AdamW's."""
    cases = results.cases("memory", KEPT)
    rows = [row for _, of_case in cases for row in of_case]
    if not rows:
        return []
    errors = [row.kept_error for row in rows if row.kept_error is not None]
    text = (
        f"Measured bytes a parameter of parameters and states, on the matrices and vectors of {rows[0].model}; in "
        f"brackets, those counted by hand. The {len(errors)} are within {max(errors):.1%} of these. The first word is "
        "how bfloat16 parameters are kept, the second how states are; `optimx` keeps all as torch does."
    )
    question = results.questions["memory"]
    steps = next(of_case for case, of_case in cases if case.startswith(ADAMW))
    text_of_steps = (
        f"AdamW's step on {steps[0].params / 1e6:.2g}M bfloat16 parameters of the same shapes, and other packages', "
        f"on a {results.machine['device']}: medians of one run, in which all took turns (`{question.run['command']}`, "
        f"load {question.run['load']}). The ratio is {steps[0].baseline} over it, so above 1.00x is faster."
    )
    lines = [*wrapped(text), "", *markdown_table(bytes_table(rows)), "", *wrapped(text_of_steps), ""]
    return [*lines, *markdown_table(steps_table(steps)), "", *wrapped(left_out_text(steps))]


def bytes_table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each scheme, a column for each optimizer."""
    optimizers = list(dict.fromkeys(row.optimizer for row in rows))
    found = {(row.dtype, row.contestant, row.optimizer): row for row in rows if row.kept_expected is not None}
    table = [["parameters", "kept", *optimizers]]
    for dtype, name in dict.fromkeys(key[:2] for key in found):
        of_scheme = [found.get((dtype, name, optimizer)) for optimizer in optimizers]
        table.append([dtype, name, *map(both, of_scheme)])
    return table


def both(row: Row | None) -> str:
    """Bytes that were measured, and those that were expected."""
    if row is None:
        return ""
    return f"{'-' if row.kept_per_param is None else number(row.kept_per_param)} ({number(row.kept_expected)})"


def steps_table(rows: Sequence[Row]) -> list[list[str]]:
    """Those that run, the bytes a parameter that they keep, and their steps."""
    table = [["AdamW, bfloat16", "bytes a parameter", "ms", "ratio"]]
    for row in rows:
        if row.median_ms is not None:
            table.append([row.contestant, number(kept_of(row)), number(row.median_ms), times(row.ratio)])
    return table


def kept_of(row: Row) -> float:
    """Bytes a parameter that were measured, of parameters and states."""
    return (row.param_bytes + (row.state_bytes or 0)) / row.params


def left_out_text(rows: Sequence[Row]) -> str:
    """Who does not run here, by what is raised."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        reason = row.missing or row.error
        if reason is not None:
            reasons.setdefault(reason, {})[row.contestant] = None
    return " ".join(
        f"{'; '.join(names)}: {reason}{'' if reason.endswith(('.', '!')) else '.'}" for reason, names in reasons.items()
    )


def packages_lines(results: Results) -> list[str]:
    """Bytes a parameter of other packages' AdamW beside ours: measured where they run here, else computed."""
    steps = [row for _, rows in results.cases("memory", ADAMW) for row in rows if row.median_ms is not None]
    table = [["AdamW, bfloat16 parameters", "bytes a parameter", "from"]]
    found = [(kept_of(row), row.contestant if is_peer(row.contestant) else ours(row), "measured") for row in steps]
    found += [(size, f"{name}: {what}", "computed") for name, (what, size) in COMPUTED.items()]
    for size, name, source in sorted(found):
        table.append([name, f"{size:.4g}", source])
    return markdown_table(table) if steps else []


def ours(row: Row) -> str:
    """Whose a contestant's row is, where its name has but how things are kept."""
    return row.contestant if row.contestant.startswith(("torch", "optimx")) else f"optimx: {row.contestant}"


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 120)
