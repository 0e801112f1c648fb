"""Whether suggested learning rates are good: both sides are trained alike, and the check can fail."""

from __future__ import annotations

import json
import math

import pytest
import torch

# `make gpu` uses the Python on PATH, which need not have what only this check wants
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from bench import convergence_text, lr_find
from bench.convergence import Curves, ours, train
from bench.convergence_tasks import TASKS, Recipe, accuracy, arguments_of, loss
from bench.lr_find import compare, final_loss, main, sweep
from bench.lr_find_report import ratio

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(lr_find, "GRID", [1e-3, 0.3, 1e4])
    monkeypatch.setattr(lr_find, "Text", TASKS["digits"])


def test_a_run_sweeps_trains_and_saves(small, tmp_path):
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "lr_find.json").read_text())
    assert results["run"]["command"] == "python -m bench.lr_find --quick"
    assert [entry["optimizer"] for entry in results["entries"]] == ["AdamW", "SGD"] * 2
    for entry in results["entries"]:
        assert [len(losses) for losses in entry["grid_losses"]] == [2, 2, 2]
        assert entry["grid"][entry["best"]] == 0.3
        assert [*map(len, entry["smoothed"])] == [*map(len, entry["sweeps"])]
        assert entry["sweeps"][0] != entry["sweeps"][1]
        assert {"valley", "steep"} <= entry["rules"].keys()


def test_a_best_rate_at_the_edge_fails(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lr_find, "GRID", [1e-6, 1e-5])
    monkeypatch.setattr(lr_find, "OPTIMIZERS", ("SGD",))
    assert main(["--quick", "--out", str(tmp_path)]) == 1
    assert "digits, SGD: the best rate is at the edge of the grid" in capsys.readouterr().err


def test_a_part_of_the_results_replaces_no_whole_ones(small, tmp_path, monkeypatch):
    monkeypatch.setattr(convergence_text, "RESULTS", tmp_path)
    monkeypatch.setattr(lr_find, "OPTIMIZERS", ("SGD",))
    main(["--quick"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", TASKS)
def test_it_trains_as_the_convergence_check_does(name, monkeypatch):
    """The model at the end is the same."""
    task, recipe = TASKS[name](CPU), Recipe(steps=20, max_grad_norm=TASKS[name].recipe.max_grad_norm, warmup=4)
    curves, scores = Curves(), []

    def noting(model, batch):
        if batch is task.unseen:
            scores.append(accuracy(model, batch))
        return loss(model, batch)

    train(task, "AdamW", 3, recipe, ours, curves)
    monkeypatch.setattr(lr_find, "loss", noting)
    final_loss(task, "AdamW", recipe, arguments_of("AdamW", task)["lr"], 3)
    assert scores == curves.scores


def test_sweeps_differ_by_seed_and_repeat():
    task = TASKS["digits"](CPU)
    first, again, other = (sweep(task, "SGD", task.recipe, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_a_training_that_diverges_is_infinitely_bad():
    task = TASKS["digits"](CPU)
    assert final_loss(task, "SGD", Recipe(steps=20), 1e6, 0) == math.inf
    entry = compare(task, "SGD", Recipe(steps=4), 1)
    entry["rules"] = {"bad": {"lrs": [1e6], "losses": [math.inf]}}
    assert ratio(entry, "bad") == math.inf
