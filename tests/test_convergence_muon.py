"""How many steps Muon saves: both sides are trained alike, and the numbers are those of the curves."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

# `make gpu` uses the Python on PATH, which need not have what only this check wants
pytest.importorskip("matplotlib")

import optimx
from bench import convergence_text
from bench.convergence_chart import draw_muon
from bench.convergence_muon import ADAMW, BOTH, RATES, arguments_of, at_an_edge, main, steps_to
from bench.convergence_tasks import Recipe
from bench.convergence_text import LongerText
from bench.gpt import GPT, GPTConfig


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(
        LongerText, "model", lambda task: GPT(GPTConfig(context=task.context, layers=1, heads=1, width=16))
    )
    monkeypatch.setattr(LongerText, "recipe", Recipe(steps=200, max_grad_norm=1.0, warmup=20))
    monkeypatch.setattr(LongerText, "batch", 2)


def test_a_run_searches_trains_and_saves(small, tmp_path, capsys):
    status = main(["--quick", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "convergence_muon.json").read_text())
    assert results["run"]["command"] == "python -m bench.convergence_muon --quick"
    assert results["steps"] == [0, 10, 20]
    assert results["params"] == sum(p.numel() for p in LongerText.model(LongerText).parameters())
    assert [entry["optimizer"] for entry in results["optimizers"]] == [ADAMW, BOTH] == [*results["searched"]]
    for entry in results["optimizers"]:
        searched = results["searched"][entry["optimizer"]]
        assert [*searched] == [f"{lr:g}" for lr in RATES]
        assert entry["arguments"]["lr"] == float(min(searched, key=searched.__getitem__))
        assert [len(losses) for losses in entry["losses"]] == [3, 3]
        assert all(ms > 0 for ms in entry["ms"])
    alone, both = (entry["losses"] for entry in results["optimizers"])
    # the same weights to begin with, seed by seed
    assert [losses[0] for losses in alone] == [losses[0] for losses in both]
    assert alone[0][0] != alone[1][0]
    assert results["reached"] == [steps_to(a[-1], b) for a, b in zip(alone, both, strict=True)]
    edges = [name for name, searched in results["searched"].items() if at_an_edge(searched)]
    assert status == bool(edges)
    assert all(f"{name}: the best learning rate is at the edge" in capsys.readouterr().err for name in edges[:1])
    draw_muon(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_part_of_the_results_replaces_no_whole_ones(small, tmp_path, monkeypatch):
    monkeypatch.setattr(convergence_text, "RESULTS", tmp_path)
    main(["--quick"])
    assert not list(tmp_path.iterdir())


def groups_of(name: str) -> list[dict[str, Any]]:
    """Groups of parameters as the check trains them, without what only one of the two classes has."""
    model = GPT(GPTConfig(context=8, layers=2, width=16))
    optimizer, _ = optimx.build(model, {"optimizer": arguments_of(name, 0.01)})
    assert optimizer.max_grad_norm == LongerText.recipe.max_grad_norm
    return optimizer.param_groups


def test_both_sides_have_the_same_rate_decay_and_betas():
    alone, both = groups_of(ADAMW), groups_of(BOTH)
    assert {group["lr"] for group in [*alone, *both]} == {0.01}
    assert {tuple(group["betas"]) for group in [*alone, *both] if "betas" in group} == {(0.9, 0.95)}
    decays = [
        sorted((tuple(p.shape), group["weight_decay"]) for group in groups for p in group["params"])
        for groups in (alone, both)
    ]
    assert decays[0] == decays[1]
    hidden = [p for group in both if "betas" not in group for p in group["params"]]
    assert [tuple(p.shape) for p in hidden] == [(48, 16), (16, 16), (64, 16), (16, 64)] * 2


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([5.0, 3.0, 2.0, 1.0], 20), ([5.0, 2.0, 3.0], 10), ([5.0, 4.0, 2.1], None), ([5.0, float("nan")], None)],
    ids=["later", "first", "never", "nan"],
)
def test_steps_to_a_loss(losses, expected):
    assert steps_to(2.0, losses) == expected


@pytest.mark.parametrize(("best", "edge"), [(0, True), (1, False), (2, True)])
def test_the_edge_of_a_search(best, edge):
    assert at_an_edge({str(i): float(i != best) for i in range(3)}) == edge
