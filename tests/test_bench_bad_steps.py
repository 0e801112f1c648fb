"""``python -m bench.bad_steps``: what bad batches do, and that a run leaves results behind."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from bench import bad_steps
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
