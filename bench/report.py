"""A page and charts from saved results: ``python -m bench.report [FOLDER ...] [--readme FILE ...]``.

Reads the JSON in each folder (default: every folder in bench/results) and writes ``report.md`` and PNG charts beside
it. With ``--readme``, what stands in those files between ``<!-- bench FOLDER PART -->`` and ``<!-- bench end -->`` is
written anew from the folder's results; :data:`PARTS` has the parts.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import bad_steps_report, lr_find_report, memory_report, muon_report, ranks, step_costs, storage_report
from bench.case import COMPILED, COPY, DEFAULT, FOREACH, FUSED, KEPT_ERROR, OURS, STOCK
from bench.results import Verdict
from bench.saved import Question, Results, load
from bench.scaling import fit
from bench.tables import contest_table, markdown_table, ms, number, results_table
from bench.test_compiled import ADAMW, COMPILED_OURS, FLOORS
from optimx.measuring.packages import NOT_MEASURED
from optimx.measuring.stock import MOST_COMPILED

#: Charts of a page, in order, and what they show.
TITLES = {
    "models.png": "AdamW on the shapes of real models: speed over torch's fused step",
    "optimizers.png": "Every optimizer: speed over the fastest of torch's implementations",
    "roofline.png": "Bandwidth: what each step achieves of a plain copy's",
    "groups.png": "Cost against the number of parameter groups: 465 tensors, a learning rate a group",
    "scaling.png": "Cost against the number of parameters (8 tensors) and of tensors (64 elements each)",
}
#: Heads of the columns of stock.
SHORT = {DEFAULT: "default", FOREACH: "foreach", FUSED: "fused", COMPILED: "compiled"}
MODELS_COLUMNS = (
    "Milliseconds of a step: default, foreach and fused are torch.optim's implementations, compiled is foreach's under "
    f"torch.compile, which is not measured for more than {MOST_COMPILED} tensors. The ratio is {FUSED} over "
    f"{OURS}, so above 1.00x {OURS} is faster."
)
#: Times that tell three costs apart.
LAW_TIMES = 4
RIDERS_COLUMNS = textwrap.wrap(
    "ms: ten steps of AdamW (SGD with momentum where the row says so) without anything, on 2 threads; the others are "
    "times that, lower is better. One of the ten is watched: its `grad_norm` and `param_norm`, `grad_norm` and "
    "`update_ratio`, or every statistic. AveragedModel is torch's EMA, after each step. `python -m bench riders`.",
    120,
)
COMPILED_COLUMNS = textwrap.wrap(
    "Milliseconds of a step: torch's foreach, the same under torch.compile, optimx without and with compiled formulas. "
    "Above 1.00x optimx is faster than compiled foreach. The floor is what the bytes of the update take where torch's "
    "fused AdamW moves its 28 a parameter. `python -m bench compiled`.",
    120,
)
HERE = Path(__file__).parent
RESULTS = HERE / "results"
BLOCK = re.compile(r"(<!-- bench (?!end)(\S+) ?(\S*) -->\n).*?(<!-- bench end -->)", re.DOTALL)

LEGEND = """\
ratio: the baseline's median over this one's, so above 1.00x is faster; the baseline is the one with 1.00x. p20 and p80:
percentiles over the timed calls. B/param: bytes of memory traffic a parameter that the algorithm must cause; GB/s:
those over the time; of copy: that bandwidth over a plain copy's in the same rounds. peak: the most a step has allocated
at once beyond what was there before it; of params: that over the bytes of the parameters. state B/param: memory of the
optimizer's state; kept B/param: of parameters and state, beside what was counted by hand. kernels and syncs are counted
on a GPU alone. A dash: not installed, or does not run here.
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
    tables = {"models.png": models_lines(results), "scaling.png": markdown_rows(laws_table(results))}
    for name, title in TITLES.items():
        # without matplotlib there is a table and no chart
        chart, table = name in charts, tables.get(name, [])
        if chart or table:
            lines += [f"## {title}", ""]
            lines += [f"![{title}]({name})", ""] if chart else []
            lines += [*table, ""] if table else []
    if results.convergence:
        lines += ["## Convergence", "", *convergence_lines(results.convergence), ""]
        lines += ["![Loss curves, stock and optimx](convergence.png)", ""] if "convergence.png" in charts else []
    if results.convergence_muon:
        muon = muon_report.convergence_lines(results.convergence_muon)
        lines += ["## Muon and AdamW beside AdamW alone", "", *muon, ""]
        lines += [muon_report.picture(), ""] if muon_report.PICTURE in charts else []
    if results.convergence_storage:
        storage = storage_report.convergence_lines(results.convergence_storage)
        lines += ["## AdamW by how parameters and states are kept", "", *storage, ""]
    if results.lr_find:
        lines += ["## Learning rates that a sweep suggests", "", *lr_find_report.lines(results.lr_find), ""]
        lines += [lr_find_report.picture(), ""] if lr_find_report.PICTURE in charts else []
    if results.bad_steps:
        lines += ["## Bad batches", "", *bad_steps_report.lines(results.bad_steps), ""]
    if results.step_costs:
        lines += ["## `optimx bench` on the examples", "", *step_costs.lines(results.step_costs), ""]
    for title, section in {
        "Muon beside its products": muon_report.cost_lines(results) if results.cases("muon") else [],
        "What parameters and states are kept in": memory_report.kept_lines(results),
        "Sharded parameters: the host's time": markdown_rows(sharded_table(results)),
        "What rides along with a step": markdown_rows(riders_table(results)),
        "Compiled formulas": markdown_rows(compiled_table(results)),
    }.items():
        lines += [f"## {title}", "", *section, ""] if section else []
    lines += ["## Targets", "", targets_line(results.verdicts), "", *markdown_table(targets_table(results)), ""]
    for question in results.questions.values():
        lines += question_lines(question)
    return "\n".join(lines).rstrip() + "\n"


def markdown_rows(table: list[list[str]]) -> list[str]:
    """A table in Markdown, or nothing where there is only its head."""
    return markdown_table(table) if len(table) > 1 else []


def models_lines(results: Results) -> list[str]:
    """The table of AdamW's cases and what its columns are."""
    rows = markdown_rows(models_table(results))
    return [*rows, "", *textwrap.wrap(MODELS_COLUMNS, 120)] if rows else []


def models_table(results: Results) -> list[list[str]]:
    """AdamW's cases in a line each: milliseconds of torch's implementations and of ours."""
    cases = results.cases("step", "step-")
    stock = [name for name in STOCK if any(row.contestant == name for _, rows in cases for row in rows)]
    return contest_table("AdamW, ms", cases, {name: SHORT.get(name, name) for name in stock})


def host_table(results: Results) -> list[list[str]]:
    """What AdamW's step costs the host on the stub driver, in microseconds: a line for each number of tensors."""
    cases = results.cases("host", "host-stub-")
    names = list(dict.fromkeys(row.contestant for _, rows in cases for row in rows))
    table = [["AdamW, µs of the host", *names]]
    for _, rows in cases:
        medians = {row.contestant: row.median_ms for row in rows}
        cells = ("-" if (median := medians.get(name)) is None else number(1000 * median) for name in names)
        count = rows[0].tensors
        table.append([f"{count} tensor{'s' if count > 1 else ''}", *cells])
    return table


def sharded_table(results: Results) -> list[list[str]]:
    """What AdamW's step costs the host where parameters are DTensors, beside plain ones, in milliseconds."""
    return medians_table("AdamW, ms of the host", "dtensor", results)


def riders_table(results: Results) -> list[list[str]]:
    """What ten steps take with statistics, rules and averages riding along: milliseconds without, and times that."""
    cases = results.cases("riders")
    names = list(dict.fromkeys(row.contestant for _, rows in cases for row in rows if row.contestant != OURS))
    table = [["ten steps", "ms", *names]]
    for case, rows in cases:
        medians = {row.contestant: row.median_ms for row in rows if row.median_ms}
        if OURS in medians:
            plain = medians[OURS]
            cells = [f"{medians[name] / plain:.2f}x" if name in medians else "-" for name in names]
            table.append([case.removeprefix("riders-").replace("-", " "), number(plain), *cells])
    return table


def compiled_table(results: Results) -> list[list[str]]:
    """Steps with compiled formulas beside others', in milliseconds, and how far they are from memory's speed."""
    table = [["ms", "foreach", "compiled foreach", OURS, COMPILED_OURS, "of compiled foreach", "times the floor"]]
    for case, rows in results.cases("compiled"):
        by_name = {row.contestant: row for row in rows}
        medians = {name: row.median_ms for name, row in by_name.items() if row.median_ms}
        if COMPILED_OURS not in medians:
            continue
        compiled = by_name[COMPILED_OURS]
        shapes = compiled.model or case.rpartition("-")[2]
        ratio = medians[COMPILED] / medians[COMPILED_OURS] if COMPILED in medians else None
        floor = medians[ADAMW] * FLOORS[compiled.optimizer][0] / 28.0 if ADAMW in medians else None
        over = "-" if floor is None else f"{medians[COMPILED_OURS] / floor:.2f}"
        names = (FOREACH, COMPILED, OURS, COMPILED_OURS)
        cells = [ms(by_name.get(name)) for name in names]
        table.append([f"{compiled.optimizer}, {shapes}", *cells, "-" if ratio is None else f"{ratio:.2f}x", over])
    return table


def medians_table(title: str, question: str, results: Results) -> list[list[str]]:
    """The medians of a question: a line a case, a column a contestant."""
    cases = results.cases(question)
    names = list(dict.fromkeys(row.contestant for _, rows in cases for row in rows))
    table = [[title, *names]]
    for case, rows in cases:
        by_name = {row.contestant: row for row in rows}
        shown = case.removeprefix(f"{question}-").replace("-", " ")
        table.append([shown, *(ms(by_name.get(name)) for name in names)])
    return table


def laws_table(results: Results) -> list[list[str]]:
    """What the time of AdamW's step is made of, fitted to both sweeps, for everybody who has as many times as costs."""
    rows = [row for _, rows in results.cases("scaling") for row in rows if row.contestant != COPY and row.median_ms]
    table = [["AdamW", "fixed", "a tensor", "bytes", "typical error of the law"]]
    for name in dict.fromkeys(row.contestant for row in rows):
        mine = [row for row in rows if row.contestant == name]
        if len(mine) < LAW_TIMES:
            continue
        law = fit(mine)
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
    """How many targets are met. Bytes that are as they were counted by hand are checks, and make no number better."""
    counts = [verdict for verdict in verdicts if verdict.target.startswith(KEPT_ERROR)]
    targets = [verdict for verdict in verdicts if verdict not in counts]
    held, missed = (sum(verdict.holds == answer for verdict in targets) for answer in ("yes", "no"))
    line = f"{held} of {len(targets)} targets are met and {missed} are missed. The project set the targets itself."
    right = sum(verdict.holds == "yes" for verdict in counts)
    return f"{line} {right} of {len(counts)} counts of bytes are right." if counts else line


def targets_table(results: Results, only_missed: bool = False) -> list[list[str]]:
    table = [["case", "contestant", "target", "measured", "met", "command"]]
    for question in results.questions.values():
        for verdict in question.verdicts:
            if only_missed and verdict.holds != "no":
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
    # who is not measured is told so in the table
    raised = [
        row for row in question.rows
        if row.missing and not (row.missing.endswith("not installed") or row.missing.startswith(NOT_MEASURED))
    ]  # fmt: skip
    if raised:
        yield from textwrap.wrap(f"Do not run here: {memory_report.left_out_text(raised)}", 120)
        yield ""


def asked(question: str) -> str:
    """The question, which is how its file begins."""
    text = ast.get_docstring(ast.parse((HERE / f"test_{question}.py").read_text())) or ""
    return text.replace("\n", " ").replace("  ", "\n\n")


def models_part(results: Results, folder: str) -> list[str]:
    return [
        *models_lines(results),
        *chart_part("models.png")(results, folder),
        "",
        f"All rows are in the [report]({folder}/report.md).",
    ]


def chart_part(name: str) -> Callable[[Results, str], list[str]]:
    """A part that is one chart and its caption, or nothing where the chart was not drawn."""

    def part(results: Results, folder: str) -> list[str]:
        drawn = (results.folder / name).exists()
        return ["", f"![{TITLES[name]}]({folder}/{name})", "", f"{TITLES[name]}."] if drawn else []

    return part


def missed_part(results: Results, folder: str) -> list[str]:
    missed = [row[:4] for row in targets_table(results, only_missed=True)]
    return [targets_line(results.verdicts), "", *markdown_rows(missed)]


def host_part(results: Results, folder: str) -> list[str]:
    return [*markdown_table(host_table(results)), "", f"All rows are in the [report]({folder}/report.md)."]


def host_summary_part(results: Results, folder: str) -> list[str]:
    """The first two columns of the table in a sentence: torch's part of the step, and ours."""
    (_, theirs, ours, *_), *rows = host_table(results)
    pairs = ", ".join(f"{row[1]} / {row[2]} µs for {row[0]}" for row in rows)
    return textwrap.wrap(f'An AdamW step costs the host, with "{theirs}" / with {ours}: {pairs}.', 120)


def sharded_part(results: Results, folder: str) -> list[str]:
    return [*markdown_table(sharded_table(results)), "", f"All rows are in the [report]({folder}/report.md)."]


def ranks_part(results: Results, folder: str) -> list[str]:
    return markdown_table(ranks.table(ranks.step_of(results)))


def muon_part(results: Results, folder: str) -> list[str]:
    return [*muon_report.cost_lines(results), "", f"All rows are in the [report]({folder}/report.md)."]


def muon_steps_part(results: Results, folder: str) -> list[str]:
    lines = muon_report.convergence_lines(results.convergence_muon) if results.convergence_muon else []
    drawn = (results.folder / muon_report.PICTURE).exists()
    return [*lines, "", muon_report.picture(f"{folder}/")] if drawn else lines


def storage_part(results: Results, folder: str) -> list[str]:
    check = results.convergence_storage
    return storage_report.convergence_lines(check) if check else []


def lr_find_part(results: Results, folder: str) -> list[str]:
    lines = lr_find_report.lines(results.lr_find) if results.lr_find else []
    drawn = (results.folder / lr_find_report.PICTURE).exists()
    return [lr_find_report.picture(f"{folder}/"), "", *lines] if drawn else lines


def bad_steps_part(results: Results, folder: str) -> list[str]:
    return bad_steps_report.lines(results.bad_steps) if results.bad_steps else []


def step_costs_part(results: Results, folder: str) -> list[str]:
    return step_costs.lines(results.step_costs) if results.step_costs else []


def step_cost_tables_part(results: Results, folder: str) -> list[str]:
    return step_costs.lines(results.step_costs, notes=False) if results.step_costs else []


def riders_part(results: Results, folder: str) -> list[str]:
    return [*markdown_rows(riders_table(results)), "", *RIDERS_COLUMNS]


def compiled_part(results: Results, folder: str) -> list[str]:
    return [*markdown_rows(compiled_table(results)), "", *COMPILED_COLUMNS]


def kept_part(results: Results, folder: str) -> list[str]:
    return [*memory_report.kept_lines(results), "", f"All rows are in the [report]({folder}/report.md)."]


def packages_part(results: Results, folder: str) -> list[str]:
    return memory_report.packages_lines(results)


#: What a block of a page can show of a folder. Each gets the results and the folder's path relative to the page.
PARTS: dict[str, Callable[[Results, str], list[str]]] = {
    "models": models_part,
    "optimizers": chart_part("optimizers.png"),
    "missed": missed_part,
    "host": host_part,
    "host-summary": host_summary_part,
    "sharded": sharded_part,
    "ranks": ranks_part,
    "muon": muon_part,
    "muon-steps": muon_steps_part,
    "storage": storage_part,
    "lr-find": lr_find_part,
    "bad-steps": bad_steps_part,
    "step-costs": step_costs_part,
    "step-cost-tables": step_cost_tables_part,
    "riders": riders_part,
    "compiled": compiled_part,
    "kept": kept_part,
    "kept-packages": packages_part,
}


def with_blocks(page: Path, folders: Path) -> str:
    """The text of a page with its blocks written anew.

    Raises:
        FileNotFoundError: A block names a folder without results.
        ValueError: A block names no part.
    """

    def replace(match: re.Match[str]) -> str:
        start, folder, part, end = match.groups()
        if part not in PARTS:
            raise ValueError(f"a block in {page} should name one of {', '.join(PARTS)}, but names: '{part}'")
        results = load(folders / folder)
        where = Path(os.path.relpath(results.folder, page.parent)).as_posix()
        return start + "\n" + "\n".join(PARTS[part](results, where)).strip() + "\n\n" + end

    return BLOCK.sub(replace, page.read_text())


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
    parser.add_argument("--readme", nargs="+", type=Path, default=[], help="pages whose blocks to write anew")
    options = parser.parse_args(arguments)
    folders = options.folders or sorted(path for path in RESULTS.iterdir() if path.is_dir())
    try:
        for folder in folders:
            write(folder)
        for page in options.readme:
            page.write_text(with_blocks(page, RESULTS))
    except (FileNotFoundError, ValueError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
