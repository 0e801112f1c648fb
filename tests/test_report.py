"""The page made from saved results: its numbers are those of the JSON, and so are those of other pages' blocks."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

# `make gpu` uses the Python on PATH, which need not have what only the report wants
pytest.importorskip("matplotlib")

from bench import ranks, report
from bench.case import COMPILED, COPY, DEFAULT, FOREACH, FUSED, OURS
from bench.charts import DRAWN_BY, over_best
from bench.results import Row, Verdict
from bench.scaling import ADAMW_BYTES, Law, fit
from bench.test_compiled import ADAMW, COMPILED_OURS

TIMES = {DEFAULT: 4.0, FOREACH: 3.0, FUSED: 2.0, OURS: 1.0}


def row(case: str, contestant: str, median: float | None, optimizer: str = "AdamW", **changes) -> Row:
    settings = {"model": "", "params": 1000, "tensors": 10, "groups": 1, "dtype": "float32", "rounds": 40, **changes}
    if median is not None:
        settings |= {"median_ms": median, "p20_ms": 0.9 * median, "p80_ms": 1.1 * median}
    return Row(case, optimizer, contestant, "wall", FUSED, **settings)


def rows_of(case: str, scale: float = 1.0, **changes) -> list[Row]:
    return [
        row(case, name, scale * median, ratio=2.0 / median, copy_fraction=0.25 / median, **changes)
        for name, median in TIMES.items()
    ]


def muon_check() -> dict:
    """What ``python -m bench.convergence_muon`` leaves behind: of three seeds, one that did not get there."""
    optimizers = [
        {"optimizer": "AdamW", "arguments": {"lr": 0.002}, "losses": [[5.0, 3.0, 2.0]] * 3, "ms": [10.0, 11.0, 12.0]},
        {
            "optimizer": "Muon + AdamW", "arguments": {"lr": 0.016}, "ms": [15.0, 14.0, 16.0],
            "losses": [[5.0, 2.0, 1.5], [5.0, 1.9, 1.25], [5.0, 2.5, 2.25]],
        },
    ]  # fmt: skip
    return {
        "run": {"command": "python -m bench.convergence_muon"}, "params": 12345, "recipe": {"steps": 20, "warmup": 5},
        "steps": [0, 10, 20], "searched": {"AdamW": {"0.001": 2.5, "0.002": 2.0}}, "optimizers": optimizers,
        "reached": [10, 10, None],
    }  # fmt: skip


def storage_check() -> dict:
    """What ``python -m bench.convergence_storage`` leaves behind."""
    arguments = {"lr": 6e-4, "weight_decay": 0.1, "betas": [0.9, 0.999]}
    kept = [
        ("float32", "float32", 0.0, "within", "within"),
        ("nearest", "float32", 0.25, "within", "above"),
        ("stochastic", "8bit", -0.0625, "below", "below"),
    ]
    schemes = [
        {
            "params": params, "states": states, "arguments": arguments, "seen": [2.0, 2.125],
            "losses": [[5.0, 2.0 + gap], [5.0, 2.125 + gap]], "verdict": {"seen": seen, "unseen": unseen},
        }
        for params, states, gap, seen, unseen in kept
    ]  # fmt: skip
    command = "python -m bench.convergence_storage"
    return {"run": {"command": command}, "params": 12345, "recipe": {"steps": 20}, "steps": [0, 20], "schemes": schemes}


def lr_find_check() -> dict:
    """What ``python -m bench.lr_find`` leaves behind: a rule that is good, one that diverges, one that is not there."""
    entry = {
        "task": "digits", "optimizer": "SGD", "lrs": [1e-3, 1e-2, 1e-1], "best": 1, "grid": [0.01, 0.1],
        "sweeps": [[2.0, 1.5, 1.0], [2.0, 1.5]], "smoothed": [[2.0, 1.75, 1.5], [2.0, 1.75]],
        "grid_losses": [[2.0, 1.0], [0.5, 1.5]],
        "rules": {
            "valley": {"lrs": [0.01, 0.05], "losses": [1.0, 1.5]},
            "steep": {"lrs": [0.1, 0.2], "losses": [1.0, float("inf")]},
        },
    }  # fmt: skip
    other = {**entry, "optimizer": "AdamW", "rules": {"valley": entry["rules"]["valley"]}}
    return {"run": {"command": "python -m bench.lr_find"}, "entries": [entry, other]}


def save(folder: Path, question: str, rows: list[Row], verdicts: list[Verdict] = ()) -> None:
    """What ``python -m bench`` leaves behind."""
    measured = [asdict(row) for row in rows if row.median_ms is not None]
    saved = {
        "machine_info": {"device": "CPU, 2 threads", "torch": "2.13.0"},
        "run": {"commit": "abc", "load": "0.5 before the first case", "command": f"python -m bench {question}"},
        "benchmarks": [{"name": row["contestant"], "extra_info": row, "stats": {}} for row in measured],
        "left_out": [asdict(row) for row in rows if row.median_ms is None],
        "targets": [asdict(verdict) for verdict in verdicts],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{question}.json").write_text(json.dumps(saved))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "results" / "some-machine"
    step = [
        *rows_of("step-4x4M-float32"),
        *rows_of("step-vit-b16", model="vit-b16 / 4", tensors=152),
        row("step-vit-b16", "apex", None, missing="apex | not installed"),
        row("step-vit-b16", COMPILED, None, missing="not measured (201 tensors)"),
        *rows_of("lion-4x4M", optimizer="Lion"),
    ]
    verdicts = [
        Verdict("step-4x4M-float32", OURS, "speed >= 5x torch fused", 2.0, "no"),
        Verdict("step-4x4M-float32", OURS, "speed >= 1x torch fused", 2.0, "yes"),
    ]
    save(folder, "step", step, verdicts)
    save(folder, "groups", [row for count in (1, 8) for row in rows_of(f"groups-{count}", groups=count)])
    sweeps = [row for size in (4, 6) for row in rows_of(f"params-1e{size}", 10**size, params=10**size)]
    sweeps += [row for count in (1, 100) for row in rows_of(f"tensors-{count}", count, tensors=count)]
    save(folder, "scaling", sweeps)
    return folder


def test_the_page_has_every_row_and_every_target(folder):
    assert report.main([str(folder)]) == 0
    page = (folder / "report.md").read_text()
    for case in ("step-4x4M-float32", "lion-4x4M", "groups-8", "params-1e6"):
        assert f"| {case} | {OURS} |" in page
    assert "| vit-b16 / 4 | 152 | 0.001M | 4 | 3 | 2 | - | 1 | 2.00x |" in page
    assert "| step-4x4M-float32 | optimx | speed >= 5x torch fused | 2 | **no** | `python -m bench step` |" in page
    assert "1 of 2 targets are met and 1 are missed" in page
    assert "| step-vit-b16 | apex | - |" in page
    assert "| step-vit-b16 | torch.compile foreach | not measured (201 tensors) | - |" in page
    assert "Do not run here" not in page
    for lines in page.split("\n\n"):
        if lines.startswith("|"):
            assert len({line.replace(r"\|", "").count("|") for line in lines.splitlines()}) == 1
    assert set(DRAWN_BY) == set(report.TITLES)
    for name in DRAWN_BY:
        assert f"]({name})" in page
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_bytes_that_were_counted_right_are_no_targets_met(folder):
    counts = [
        Verdict("kept-adamw", name, "kept_error <= 0.02", 0.0, holds) for name, holds in (("a", "yes"), ("b", "no"))
    ]
    save(folder, "memory", kept_rows(), counts)
    assert report.main([str(folder)]) == 0
    page = (folder / "report.md").read_text()
    assert "1 of 2 targets are met and 1 are missed. The project set the targets itself. 1 of 2 counts of bytes" in page
    assert "| kept-adamw | b | kept_error <= 0.02 | 0 | **no** |" in page


def test_charts_without_rows_are_left_out(folder):
    (folder / "scaling.json").unlink()
    (folder / "groups.json").unlink()
    assert report.main([str(folder)]) == 0
    page = (folder / "report.md").read_text()
    assert "models.png" in page
    assert "scaling.png" not in page
    assert "groups.png" not in page


def test_without_matplotlib_the_tables_stay(folder, monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    assert report.main([str(folder)]) == 0
    page = (folder / "report.md").read_text()
    assert "| vit-b16 / 4 | 152 |" in page
    assert "typical error of the law" in page
    assert ".png" not in page
    assert not list(folder.glob("*.png"))


@pytest.mark.parametrize("question", ["step", "groups", "scaling"])
def test_one_question_is_enough(folder, question):
    for path in folder.glob("*.json"):
        if path.stem != question:
            path.unlink()
    assert report.main([str(folder)]) == 0
    page = (folder / "report.md").read_text()
    assert f"## {question.capitalize()}" in page
    assert ("| ratio |\n" in page) == (question == "step")
    assert ("typical error" in page) == (question == "scaling")


def test_a_baseline_that_failed_has_no_bars(folder):
    rows = [row for row in rows_of("step-vit-b16", model="vit-b16 / 4") if row.contestant != FUSED]
    rows += rows_of("step-lora", model="lora / 8")
    save(folder, "step", [*rows, row("step-vit-b16", FUSED, None, error="OutOfMemoryError")])
    assert report.main([str(folder)]) == 0
    assert "models.png" in (folder / "report.md").read_text()


def block(part: str) -> str:
    return f"before\n<!-- bench some-machine {part} -->\nold numbers\n<!-- bench end -->\nafter\n"


#: What a block of each part has.
BLOCKS = {
    "models": [
        "| vit-b16 / 4 | 152 | 0.001M | 4 | 3 | 2 | - | 1 | 2.00x |\n\nMilliseconds of a step",
        "](results/some-machine/models.png)\n",
        "[report](results/some-machine/report.md).\n\n<!-- bench end -->",
    ],
    "optimizers": ["-->\n\n![Every optimizer"],
    "missed": [
        "1 of 2 targets are met and 1 are missed",
        "| step-4x4M-float32 | optimx | speed >= 5x torch fused | 2 |\n\n<!-- bench end -->",
    ],
    "host": ["| 1 tensor | 20 | 30 | - |\n| 8 tensors | 40 | 50 | 60 |\n"],
    "host-summary": [
        '"torch fused" / with optimx: 20 / 30 µs for 1 tensor, 40 / 50 µs for 8 tensors.\n',
    ],
    "sharded": ["| 723 clip 4096 ranks | 20 | 4 |\n"],
    "muon": [
        "| Muon, ms | tensors | params | torch | timm | optimx | ratio |\n",
        "| 256x16x16 | 256 | 0.001M | 34 | 36 | 2 | 17.00x |\n\nMilliseconds of a step",
        "| without products, ms | tensors | params | optimx AdamW | optimx | ratio |\n",
        "| gpt2 / 4 | 48 | 0.001M | 3 | 4 | 0.75x |\n",
        "[report](results/some-machine/report.md).\n",
    ],
    "muon-steps": [
        "A GPT of 12,345 parameters reads Python's source for 20 steps, from 3 seeds.",
        "loss after 10 (10 to inf) steps.",
        "of 0.001, 0.002 it is",
        "| AdamW | 0.002 | 2 (2 to 2) | 11 |\n| Muon + AdamW | 0.016 | 1.5 (1.25 to 2.25) | 15 |\n",
        "](results/some-machine/convergence_muon.png)\n",
    ],
    "storage": [
        "A GPT of 12,345 parameters reads Python's source for 20 steps of AdamW, from 2 seeds, with `lr` 0.0006,",
        "| float32 | float32 | 2.0625 (2.0000 to 2.1250) | 2.0625 (2.0000 to 2.1250) |  | yes |\n",
        "2.3125 (2.2500 to 2.3750) | +0.2500 | **no, above** (unseen); yes (seen) |\n| stochastic | 8bit |",
        "| -0.0625 | no, below |\n",
    ],
    "lr-find": [
        "![Sweeps, and final losses over the learning rate](results/some-machine/lr_find.png)\n",
        "from 2 seeds: at each of 2 learning rates from 0.01 to 0.1,",
        "|  | digits, SGD | digits, AdamW |\n",
        "| best of the grid | 1.0000 at 0.1 | 1.0000 at 0.1 |\n",
        "| `valley` | 1.25x at 0.01 to 0.05 | 1.25x at 0.01 to 0.05 |\n",
        "| `steep` | diverges at 0.1 to 0.2 | - |\n",
    ],
    "kept": [
        "The 3 are within 3.0% of these.",
        "| parameters | kept | AdamW | Lion |\n",
        "| bfloat16 | optimx | 6 (6) | - (4) |\n| bfloat16 | remainder8, 8bit | 5.21 (5.06) |  |\n",
        "| remainder8, 8bit | 5.21 | 8 | 0.50x |\n| torchao stochastic | 6 | 2 | 2.00x |\n",
        "flashoptim 24, 8bit; flashoptim 24: NotImplementedError: no GPU.\n",
    ],
    "kept-packages": [
        "| flashoptim 24, 8bit: int8 correction; codes with a float16 scale for 32 | 5.125 | computed |\n"
        "| optimx: remainder8, 8bit | 5.214 | measured |\n",
        "| torchao stochastic | 6 | measured |\n",
    ],
    # 2 log2(8) hops of 5 µs and 20 µs; 70e9 / 64 parameters of 32 bytes at 3e12 bytes a second
    "ranks": ["| 64 | 4.0 | 0.05 | 11.67 |\n"],
}


def kept_rows() -> list[Row]:
    """Schemes of two optimizers, one of which takes more than it should, and peers, some of which do not run."""
    adamw, settings = "kept-adamw-bfloat16-x", {"dtype": "bfloat16", "model": "x / 4"}
    raised = {"missing": "NotImplementedError: no GPU.", **settings}
    return [
        row(adamw, OURS, 4.0, ratio=1.0, state_bytes=4000, kept_expected=6, **settings),
        row(adamw, "remainder8, 8bit", 8.0, ratio=0.5, state_bytes=3214, kept_expected=5.0625, **settings),
        row(adamw, "torchao stochastic", 2.0, ratio=2.0, state_bytes=4000, **settings),
        row(adamw, "flashoptim 24, 8bit", None, **raised), row(adamw, "flashoptim 24", None, **raised),
        row("kept-lion-bfloat16-x", OURS, None, "Lion", kept_expected=4, error="RuntimeError: no", **settings),
        row("kept-lion-float32-x", OURS, 2.0, "Lion", state_bytes=4000, kept_expected=8, model="x / 4"),
    ]  # fmt: skip


def test_blocks_have_the_numbers_of_the_folder_they_name(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", folder.parent)
    columns = zip((FUSED, OURS, f"{OURS} max_grad_norm"), ((0.02, 0.04), (0.03, 0.05), (None, 0.06)), strict=True)
    medians = [(name, *pair) for name, pair in columns]
    host = [row("host-stub-1", name, first, tensors=1) for name, first, _ in medians]
    save(folder, "host", [*host, *(row("host-stub-8", name, second, tensors=8) for name, _, second in medians)])
    save(folder, "dtensor", [row(ranks.CASE, name, ms) for name, ms in ((FUSED, 20.0), (OURS, 4.0))])
    whole = [(DEFAULT, 34.0, 1.0), ("timm", 36.0, 34 / 36), (OURS, 2.0, 17.0)]
    parts = [("optimx AdamW", 3.0, 1.0), (OURS, 4.0, 0.75), (COPY, 2.0, None)]
    muon = [row("muon-256x16x16", name, ms, "Muon", tensors=256, ratio=ratio) for name, ms, ratio in whole]
    settings = {"optimizer": "Muon", "tensors": 48, "model": "gpt2 / 4"}
    muon += [row("muon-elementwise-gpt2", name, ms, ratio=ratio, **settings) for name, ms, ratio in parts]
    save(folder, "muon", muon)
    save(folder, "memory", kept_rows())
    (folder / "convergence_muon.json").write_text(json.dumps(muon_check()))
    (folder / "convergence_storage.json").write_text(json.dumps(storage_check()))
    (folder / "lr_find.json").write_text(json.dumps(lr_find_check()))
    readmes = {part: tmp_path / f"{part}.md" for part in BLOCKS}
    for part, readme in readmes.items():
        readme.write_text(block(part))
    assert report.main([str(folder), "--readme", *map(str, readmes.values())]) == 0
    texts = {part: readme.read_text() for part, readme in readmes.items()}
    for part, text in texts.items():
        assert text.startswith(f"before\n<!-- bench some-machine {part} -->\n")
        assert text.endswith("\n<!-- bench end -->\nafter\n")
        assert [expected for expected in BLOCKS[part] if expected not in text] == []
        assert "old numbers" not in text
        assert "speed >= 1x" not in text, "only what is missed"
    # again, and nothing changes
    assert report.main([str(folder), "--readme", *map(str, readmes.values())]) == 0
    assert {part: readme.read_text() for part, readme in readmes.items()} == texts


def test_blocks_of_several_pages_are_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", folder.parent)
    pages = [tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"]
    pages[1].parent.mkdir()
    for page in pages:
        page.write_text(block("models"))
    assert report.main([str(folder), "--readme", *map(str, pages)]) == 0
    assert "](results/some-machine/report.md)" in pages[0].read_text()
    assert "](../results/some-machine/report.md)" in pages[1].read_text()


def test_the_page_has_muons_curves_where_they_were_measured(folder):
    assert report.main([str(folder)]) == 0
    assert "convergence_muon" not in (folder / "report.md").read_text()
    (folder / "convergence_muon.json").write_text(json.dumps(muon_check()))
    assert report.main([str(folder)]) == 0
    page = (folder / "report.md").read_text()
    assert "## Muon and AdamW beside AdamW alone\n" in page
    assert "](convergence_muon.png)" in page
    assert (folder / "convergence_muon.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_has_losses_by_storage_where_they_were_measured(folder):
    assert report.main([str(folder)]) == 0
    assert "are kept" not in (folder / "report.md").read_text()
    (folder / "convergence_storage.json").write_text(json.dumps(storage_check()))
    assert report.main([str(folder)]) == 0
    page = (folder / "report.md").read_text()
    assert "## AdamW by how parameters and states are kept\n" in page
    assert "`python -m bench.convergence_storage`" in page


def test_the_page_has_what_sweeps_suggest_where_they_were_measured(folder):
    assert report.main([str(folder)]) == 0
    assert "sweep" not in (folder / "report.md").read_text()
    (folder / "lr_find.json").write_text(json.dumps(lr_find_check()))
    assert report.main([str(folder)]) == 0
    page = (folder / "report.md").read_text()
    assert "## Learning rates that a sweep suggests\n" in page
    assert "](lr_find.png)" in page
    assert (folder / "lr_find.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_has_the_tables_of_all_questions(folder):
    """Of DTensors and of what rides along with a step, where they were measured."""
    assert report.main([str(folder)]) == 0
    page = (folder / "report.md").read_text()
    for title in ("Sharded parameters", "What rides along", "Muon beside", "What parameters and states"):
        assert title not in page
    save(folder, "dtensor", [row("dtensor-300-clip-8-ranks", name, 2.0) for name in (FUSED, OURS, "optimx, plain")])
    save(folder, "riders", [row("riders-4x4M", OURS, 3.0), row("riders-4x4M", "EMA", 4.5), row("riders-x", OURS, 6.0)])
    assert report.main([str(folder)]) == 0
    page = (folder / "report.md").read_text()
    assert "| 300 clip 8 ranks | 2 | 2 | 2 |" in page
    assert "| ten steps | ms | EMA |" in page
    assert "| 4x4M | 3 | 1.50x |\n| x | 6 | - |" in page


def test_compiled_formulas_have_a_table(folder):
    times = {FOREACH: 9.0, COMPILED: 4.0, OURS: 5.0, COMPILED_OURS: 2.0, ADAMW: 2.8}
    rows = [row("compiled-lion-4x4M", name, median, optimizer="Lion") for name, median in times.items()]
    rows += [row("compiled-lamb-vit-b16", COMPILED_OURS, 3.0, optimizer="LAMB", model="vit-b16 / 4")]
    save(folder, "compiled", rows)
    table = report.compiled_table(report.load(folder))
    assert table[1:] == [
        ["Lion, 4x4M", "9", "4", "5", "2", "2.00x", "1.00"],
        ["LAMB, vit-b16 / 4", "-", "-", "-", "3", "-", "-"],
    ]


def test_everybody_has_a_law_who_has_times(folder):
    results = report.load(folder)
    rows = results.questions["scaling"].rows
    rows += [row("params-1e4", "timm", 8.0, params=10**4, tensors=count) for count in (1, 10, 100, 1000)]
    rows += [row("params-1e4", COMPILED, 8.0), row("params-1e4", COPY, 1.0)]
    names = [line[0] for line in report.laws_table(results)[1:]]
    assert names == [*TIMES, "timm"]


def test_pages_show_what_a_command_prints(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", folder.parent)
    output = "AdamW, float32\n\nstep  ms\noptimx  2\n\n3 tensors.\n"
    entries = [{"command": f"optimx bench {name}", "output": output} for name in ("a.py:model", "b.py:model")]
    (folder / "step_costs.json").write_text(json.dumps({"entries": entries}))
    pages = [tmp_path / "whole.md", tmp_path / "tables.md"]
    for page, part in zip(pages, ("step-costs", "step-cost-tables"), strict=True):
        page.write_text(block(part))
    assert report.main([str(folder), "--readme", *map(str, pages)]) == 0
    whole, tables = (page.read_text() for page in pages)
    assert (
        "```text\n$ optimx bench a.py:model\nAdamW, float32\n\nstep  ms\noptimx  2\n\n3 tensors.\n\n$ optimx" in whole
    )
    assert "optimx  2\n\n$ optimx bench b.py:model\n" in tables
    assert "3 tensors" not in tables
    assert "## `optimx bench` on the examples\n" in (folder / "report.md").read_text()


@pytest.mark.parametrize("part", ["modles", ""])
def test_a_block_of_an_unknown_part_is_an_error(folder, tmp_path, monkeypatch, capsys, part):
    monkeypatch.setattr(report, "RESULTS", folder.parent)
    page = tmp_path / "README.md"
    page.write_text(block(part))
    assert report.main([str(folder), "--readme", str(page)]) == 2
    assert f"should name one of {', '.join(report.PARTS)}, but names: '{part}'" in (capsys.readouterr().err)
    assert page.read_text() == block(part)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/benchmarks.md",
        "docs/bench.md",
        "docs/sharding.md",
        "docs/optimizers/muon.md",
        "docs/storage.md",
        "docs/lr_find.md",
        "docs/bad_steps.md",
        "docs/averages.md",
        "docs/watching.md",
        "docs/compiled_formulas.md",
    ],
)
def test_the_projects_pages_are_up_to_date(page):
    path = report.HERE.parent / page
    assert report.BLOCK.search(path.read_text())
    assert report.with_blocks(path, report.RESULTS) == path.read_text(), "run `make report`"


def test_a_folder_without_results_is_an_error(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "has no results" in capsys.readouterr().err


def test_a_known_law_is_found():
    law = Law(fixed_us=50.0, per_tensor_us=2.0, gb_per_s=20.0, error=0.0)
    points = [(8, 10**exponent) for exponent in range(4, 9)] + [
        (10**exponent, 64 * 10**exponent) for exponent in range(5)
    ]
    found = fit([row("x", OURS, law(tensors, params), tensors=tensors, params=params) for tensors, params in points])
    assert (found.fixed_us, found.per_tensor_us, found.gb_per_s) == pytest.approx((50.0, 2.0, 20.0))
    assert found.error < 1e-9
    assert law(0, 10**9) == pytest.approx(0.05 + ADAMW_BYTES * 1e9 / 20e9 * 1e3)


def test_the_fastest_stock_is_not_one_that_is_wrong():
    rows = rows_of("x")
    assert over_best(rows) == 2.0
    rows[2].note = "wrong"
    assert over_best(rows) == 3.0
    assert math.isnan(over_best([row for row in rows if row.contestant != OURS]))
    assert math.isnan(over_best([row("x", COPY, 1.0)]))
