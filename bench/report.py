"""A page and charts from saved results: ``python -m bench.report [FOLDER ...] [--readme README.md]``.

Reads the JSON in each folder (default: every folder in bench/results) and writes ``report.md`` and PNG charts beside
it. With ``--readme``, what stands in that file between ``<!-- bench FOLDER -->`` and ``<!-- bench end -->`` is written
anew from the folder's results.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.case import COPY, FUSED, OURS, STOCK
from bench.results import Row, Verdict
from bench.saved import Question, Results, load
from bench.scaling import fit
from bench.tables import markdown_table, number, results_table

#: Charts of a page, in order, and what they show.
TITLES = {
    "models.png": "AdamW on the shapes of real models: speed over torch's fused step",
    "optimizers.png": "Every optimizer: speed over the fastest of torch's implementations",
    "roofline.png": "Bandwidth: what each step achieves of a plain copy's",
    "groups.png": "Cost against the number of parameter groups: 465 tensors, a learning rate a group",
    "scaling.png": "Cost against the number of parameters (8 tensors) and of tensors (64 elements each)",
}
HERE = Path(__file__).parent
RESULTS = HERE / "results"
BLOCK = re.compile(r"(<!-- bench (?!end)(\S+) -->\n).*?(<!-- bench end -->)", re.DOTALL)

LEGEND = """\
ratio: the baseline's median over this one's, so above 1.00x is faster; the baseline is the one with 1.00x. p20 and p80:
percentiles over the timed calls. B/param: bytes of memory traffic a parameter that the algorithm must cause; GB/s:
those over the time; of copy: that bandwidth over a plain copy's in the same rounds. peak: the most a step has allocated
at once beyond what was there before it; of params: that over the bytes of the parameters. state B/param: memory of the
optimizer's state. kernels and syncs are counted on a GPU alone. A dash: not installed, or does not run here.
Contestants take turns in one process, with a new gradient tensor for every parameter before every call.\
"""


def report(results: Results, charts: Sequence[str]) -> str:
    """The page; ``charts`` are the files drawn for it."""
    machine = results.machine
    lines = [f"# Benchmarks: {machine['device']}", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += [
        "",
        "Models are sized down where their name has a factor: every dimension of 64 or more is divided by it, and the",
        "number of tensors stays.",
        "",
        LEGEND,
        "",
    ]
    tables = {"models.png": models_table(results), "scaling.png": laws_table(results)}
    for name, title in TITLES.items():
        # without matplotlib there is a table and no chart; a head alone is no table
        chart, table = name in charts, tables.get(name, [])
        if chart or len(table) > 1:
            lines += [f"## {title}", ""]
            lines += [f"![{title}]({name})", ""] if chart else []
            lines += [*markdown_table(table), ""] if len(table) > 1 else []
    if results.convergence:
        lines += ["## Convergence", "", *convergence_lines(results.convergence), ""]
        lines += ["![Loss curves, stock and optimx](convergence.png)", ""] if "convergence.png" in charts else []
    lines += ["## Targets", "", targets_line(results.verdicts), "", *markdown_table(targets_table(results)), ""]
    for question in results.questions.values():
        lines += question_lines(question)
    return "\n".join(lines).rstrip() + "\n"


def models_table(results: Results) -> list[list[str]]:
    """AdamW's cases in a line each: milliseconds of torch's implementations and of ours."""
    cases = [
        (case, rows) for case, rows in results.cases("step", "step-") if any(row.contestant == OURS for row in rows)
    ]
    stock = [name for name in STOCK if any(row.contestant == name for _, rows in cases for row in rows)]
    table = [["AdamW, ms a step", "tensors", "parameters", *stock, OURS, f"over {FUSED}"]]
    for case, rows in cases:
        by_name = {row.contestant: row for row in rows}
        ours = by_name[OURS]
        cells = [ms(by_name.get(name)) for name in [*stock, OURS]]
        shapes = ours.model or case.removeprefix("step-").replace("-", ", ")
        table.append([shapes, str(ours.tensors), millions(ours.params), *cells, times(ours.ratio)])
    return table


def millions(params: int) -> str:
    return f"{params / 1e6:.3g}M"


def ms(row: Row | None) -> str:
    return "-" if row is None or row.median_ms is None else number(row.median_ms)


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def laws_table(results: Results) -> list[list[str]]:
    """What the time of AdamW's step is made of, fitted to both sweeps."""
    rows = [row for _, rows in results.cases("scaling") for row in rows if row.contestant != COPY and row.median_ms]
    table = [["AdamW", "fixed", "a tensor", "bytes", "typical error of the law"]]
    for name in [name for name in (*STOCK, OURS) if any(row.contestant == name for row in rows)]:
        law = fit([row for row in rows if row.contestant == name])
        costs = [f"{law.fixed_us:.3g} µs", f"{law.per_tensor_us:.3g} µs", f"{law.gb_per_s:.3g} GB/s"]
        table.append([name, *costs, f"{law.error:.0%}"])
    return table


def convergence_lines(convergence: dict[str, Any]) -> list[str]:
    """How training ended with either side, over the seeds."""
    table = [["task", "optimizer", "stock is", "loss, stock", "loss, optimx", "apart", "standard error", "verdict"]]
    for entry in convergence["runs"]:
        losses = [number(entry["stock"]), number(entry["ours"])]
        apart = [f"{entry['gap']:.1e}", f"{entry['standard_error']:.1e}"]
        table.append([entry["task"], entry["optimizer"], entry["baseline"], *losses, *apart, entry["verdict"]])
    seeds = convergence["runs"][0]["seeds"]
    return [
        f"Training from {seeds} seeds with the same batches on both sides: mean final losses in nats, and how far",
        "they are apart, which must be within the standard error between seeds; and nowhere may the curves be further",
        "apart than one standard deviation.",
        f"`{convergence['run']['command']}`",
        "",
        *markdown_table(table),
    ]


def targets_line(verdicts: Sequence[Verdict]) -> str:
    held, missed = (sum(verdict.holds == answer for verdict in verdicts) for answer in ("yes", "no"))
    return f"Of {len(verdicts)} targets {held} are met and {missed} missed; a target is what the project set itself."


def targets_table(results: Results, only_missed: bool = False) -> list[list[str]]:
    table = [["case", "contestant", "target", "measured", "met", "command"]]
    for question in results.questions.values():
        for verdict in question.verdicts:
            if only_missed and verdict.holds == "yes":
                continue
            measured = "" if verdict.measured is None else number(verdict.measured)
            holds = "**no**" if verdict.holds == "no" else verdict.holds
            table.append(
                [verdict.case, verdict.contestant, verdict.target, measured, holds, f"`{question.run['command']}`"]
            )
    return table


def question_lines(question: Question) -> Iterator[str]:
    """A section: the question as its file asks it, how it was run, a table an optimizer."""
    yield f"## {question.name.capitalize()}"
    yield ""
    yield asked(question.name)
    yield ""
    yield "; ".join(f"{name}: {f'`{value}`' if name == 'command' else value}" for name, value in question.run.items())
    yield ""
    for optimizer in dict.fromkeys(row.optimizer for row in question.rows):
        rows = [row for row in question.rows if row.optimizer == optimizer]
        yield f"### {question.name}: {optimizer}"
        yield ""
        yield from markdown_table(results_table(rows))
        yield ""


def asked(question: str) -> str:
    """The question, which is how its file begins."""
    text = ast.get_docstring(ast.parse((HERE / f"test_{question}.py").read_text())) or ""
    return text.replace("\n", " ").replace("  ", "\n\n")


def readme_block(results: Results) -> str:
    """What the README shows of a folder."""
    folder = f"bench/results/{results.folder.name}"
    lines = markdown_table(models_table(results))
    for name in ("models.png", "optimizers.png"):
        if (results.folder / name).exists():
            lines += ["", f"![{TITLES[name]}]({folder}/{name})", "", f"{TITLES[name]}."]
    lines += ["", f"{targets_line(results.verdicts)} All rows: [report]({folder}/report.md)."]
    missed = [row[:4] for row in targets_table(results, only_missed=True)]
    if len(missed) > 1:
        lines += ["", "Missed:", "", *markdown_table(missed)]
    return "\n".join(lines) + "\n"


def write_readme(path: Path, folders: Path) -> None:
    """Write the blocks of a README anew.

    Raises:
        FileNotFoundError: A block names a folder without results.
    """

    def replace(match: re.Match[str]) -> str:
        return match[1] + readme_block(load(folders / match[2])) + match[3]

    path.write_text(BLOCK.sub(replace, path.read_text()))


def write(folder: Path) -> None:
    """Write the page and the charts of a folder."""
    results = load(folder)
    drawn: list[str] = []
    if importlib.util.find_spec("matplotlib"):
        # here, since the page needs none of it
        from bench.charts import draw

        drawn = draw(results)
    (folder / "report.md").write_text(report(results, drawn))
    print(f"{folder / 'report.md'}, {len(drawn)} charts; {targets_line(results.verdicts)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="A page and charts from saved results.")
    parser.add_argument("folders", nargs="*", type=Path, help="folders of results (default: all in bench/results)")
    parser.add_argument("--readme", type=Path, help="file in which to write blocks of results anew")
    options = parser.parse_args(arguments)
    folders = options.folders or sorted(path for path in RESULTS.iterdir() if path.is_dir())
    try:
        for folder in folders:
            write(folder)
        if options.readme:
            write_readme(options.readme, RESULTS)
    except FileNotFoundError as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
