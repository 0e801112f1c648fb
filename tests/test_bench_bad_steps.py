"""``python -m bench.bad_steps``: what bad batches do, and that a run leaves results behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bad_steps, bad_steps_report, report
from bench.bad_steps import MODEL, MULTIPLIED, NAN, NOISE, WAYS, bad_loss, main, train
from bench.gpt import GPT

BY_NAME = {way.name: way for way in WAYS}
CPU = torch.device("cpu")


def test_kinds_of_bad_batches() -> None:
    model = GPT(MODEL)
    tokens = torch.full((2, 9), 7)
    good, large, noise, nan = (bad_loss(model, tokens, kind).item() for kind in (None, MULTIPLIED, NOISE, NAN))
    assert large == pytest.approx(1000.0 * good)
    assert noise != good == nan
    bad_loss(model, tokens, NAN).backward()
    bad = [name for name, param in model.named_parameters() if not param.grad.isfinite().all()]
    assert bad[-1] == "blocks.1.mlp.project.bias"
    model.zero_grad()
    # what spoilt the gradient is gone
    bad_loss(model, tokens, None).backward()
    assert all(param.grad.isfinite().all() for param in model.parameters())


def test_rules_skip_what_is_planted() -> None:
    plan = {5: NAN, 8: NAN}
    stock = train(BY_NAME["torch"], plan, 0, 10, CPU)
    ours = train(BY_NAME["`skip_nonfinite`"], plan, 0, 10, CPU)
    assert math.isnan(stock.losses[-1])
    assert stock.counters == {}
    assert ours.losses[-1] < ours.losses[0] == stock.losses[0]
    assert ours.counters["skipped"] == 2
    assert ours.last_bad.startswith("step 8: infinite or NaN first in the gradient of 'blocks.1.mlp.project.bias'")


def test_a_run_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_steps, "WAYS", [BY_NAME["`max_grad_norm=1`"]])
    monkeypatch.setattr(bad_steps, "PLANS", {"bad": {3: NAN}})
    monkeypatch.setattr(bad_steps, "STEPS", 100)
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "bad_steps.json").read_text())
    assert results["bad_steps"] == {"bad": {"3": NAN}}
    (entry,) = results["entries"]
    assert (entry["way"], entry["plan"]) == ("`max_grad_norm=1`", "bad")
    assert [len(losses) for losses in entry["losses"]] == [2, 2]
    assert all(math.isnan(losses[-1]) for losses in entry["losses"])


def results() -> dict[str, Any]:
    """What ``python -m bench.bad_steps`` leaves behind: a way that ends in NaN, and one that skips."""
    head = {"run": {"command": "python -m bench.bad_steps"}, "bad_steps": {"none": {}, "bad": {"3": NAN}}}
    stock = {"way": WAYS[0].name, "counters": [{}, {}], "last_bad": [None, None]}
    ours = {"way": WAYS[4].name, "counters": [{"skipped": 3, "clipped": 7}] * 2, "last_bad": ["step 3: bad"] * 2}
    good, bad = [[3.0, 2.0], [3.0, 2.5]], [[3.0, math.nan], [3.0, math.nan]]
    entries = [{**stock, "plan": "none", "losses": good}, {**stock, "plan": "bad", "losses": bad}]
    entries += [{**ours, "plan": plan, "losses": good} for plan in ("none", "bad")]
    return {**head, "entries": entries}


def test_table() -> None:
    text = "\n".join(bad_steps_report.lines(results()))
    assert "| torch | 2.250 (2.000 to 2.500) | NaN | - | - |" in text
    assert "`max_grad_norm=1` | 2.250 (2.000 to 2.500) | 2.250 (2.000 to 2.500) | 3 | 7 |" in text
    assert "```\nstep 3: bad\n```" in text


def test_report_has_it(tmp_path: Path) -> None:
    block = "<!-- bench some bad-steps -->\n<!-- bench end -->\n"
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "bad_steps.json").write_text(json.dumps(results()))
    head = {"machine_info": {"device": "some"}, "run": {}, "benchmarks": [], "left_out": [], "targets": []}
    (folder / "step.json").write_text(json.dumps(head))
    page = tmp_path / "page.md"
    page.write_text(block)
    assert "| torch | 2.250" in report.with_blocks(page, tmp_path)
    assert "## Bad batches" in report.report(report.load(folder), [])
