"""The convergence check: it agrees with what is right, and it can fail."""

import functools
import json

import pytest
import torch

# `make gpu` uses the Python on PATH, which need not have what only this check wants
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from bench import convergence
from bench.catalogue import of_all_shapes, stock_of
from bench.convergence import Curves, factor, judge, main
from bench.convergence_chart import draw
from bench.convergence_tasks import SETTINGS, TASKS, Recipe, arguments_of
from optimx.lr_scheduler import Cosine, Warmup
from tests.cases import CASES

NAN = float("nan")


@pytest.fixture(autouse=True)
def _one_thread():
    # threads that wait for a core taken by another test worker cost seconds, on models this small
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(tmp_path, which):
    """Exit status and results."""
    status = main(["--quick", "--filter", which, "--out", str(tmp_path)])
    return status, json.loads((tmp_path / "convergence.json").read_text())


def test_every_optimizer_takes_part():
    names = {case.cls.__name__ for case in CASES}
    assert {*of_all_shapes()} == names
    assert SETTINGS.keys() <= names
    for name in names:
        for task in TASKS.values():
            _, make = stock_of(name)
            make([torch.nn.Parameter(torch.ones(2))], **arguments_of(name, task))


@pytest.mark.parametrize(
    ("which", "names"),
    [
        pytest.param("digits-ra", ["RAdam"], id="plain"),
        pytest.param("digits-l", ["LAMB", "Lion"], id="peers"),
        pytest.param("digits-rp", ["Rprop"], id="full-batch"),
        pytest.param("text-sgd", ["SGD"], id="clipped-and-scheduled"),
    ],
)
def test_the_right_optimizer_agrees(tmp_path, which, names):
    status, results = run(tmp_path, which)
    assert status == 0
    assert [(entry["optimizer"], entry["verdict"]) for entry in results["runs"]] == [(name, "AGREE") for name in names]
    for entry in results["runs"]:
        assert entry["steps"][-1] == entry["recipe"]["steps"]
        for side in ("stock", "ours"):
            assert [len(losses) for losses in entry["losses"][side]] == [len(entry["steps"])] * entry["seeds"]
        assert entry["same_seed"] < 1e-4 < entry["standard_error"], "the seeds differ, the sides do not"
    draw(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("which", "mistake"),
    [
        pytest.param("digits-sgd", lambda options: {**options, "lr": 3 * options["lr"]}, id="lr"),
        pytest.param("digits-sgd", lambda options: {**options, "momentum": 0.8}, id="momentum"),
        pytest.param("text-sgd", lambda options: {**options, "max_grad_norm": None}, id="not-clipped"),
    ],
)
def test_a_wrong_optimizer_disagrees(tmp_path, capsys, monkeypatch, which, mistake):
    sgd = convergence.optimx.SGD

    @functools.wraps(sgd, updated=())
    def wrong(params, **options):
        return sgd(params, **mistake(options))

    monkeypatch.setattr(convergence.optimx, "SGD", wrong)
    status, results = run(tmp_path, which)
    assert status == 1
    assert results["runs"][0]["verdict"] == "DISAGREE"
    assert "DISAGREE; the " in capsys.readouterr().out


def test_a_missing_schedule_disagrees(tmp_path, monkeypatch):
    class Constant:
        def __init__(self, *args):
            pass

        def step(self):
            pass

    monkeypatch.setattr(convergence.optimx.lr_scheduler, "WarmupCosineLR", Constant)
    assert run(tmp_path, "text-sgd")[0] == 1


def test_a_part_of_the_results_replaces_no_whole_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(convergence, "RESULTS", tmp_path)
    assert main(["--quick", "--filter", "digits-ra"]) == 0
    assert not list(tmp_path.iterdir())


def test_a_name_that_nothing_has_is_an_error(capsys):
    assert main(["--filter", "sdg"]) == 2
    assert "no task and optimizer have 'sdg' in their name" in capsys.readouterr().err


def test_stocks_schedule_is_the_same_function():
    recipe = Recipe(steps=50, warmup=8)
    ours = Warmup(8) >> Cosine(42, convergence.FLOOR)
    assert [factor(recipe, step) for step in range(55)] == pytest.approx([ours(step) for step in range(55)])
    assert {factor(Recipe(steps=50), step) for step in range(55)} == {1.0}


STOCK = [[2.0 - 0.01 * step, 2.1 - 0.01 * step, 2.2 - 0.01 * step] for step in range(100)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({}, [], id="equal"),
        # of three seeds 0.1 apart the standard error is 0.058
        pytest.param({99: 0.05}, [], id="within-the-error"),
        pytest.param({99: 0.07}, ["final losses"], id="beyond-the-error"),
        pytest.param({50: -0.09}, [], id="within-the-spread"),
        pytest.param({50: -0.11}, ["mean curves"], id="beyond-the-spread"),
        pytest.param({50: NAN}, ["mean curves"], id="nan"),
        pytest.param({99: NAN}, ["final losses", "mean curves"], id="nan-end"),
        pytest.param({0: 0.5, 99: -0.5}, ["final losses", "mean curves"], id="both"),
    ],
)
def test_judgement(change, words):
    moved = [[loss + change.get(step, 0.0) for loss in losses] for step, losses in enumerate(STOCK)]
    failures = judge(*(Curves([list(curve) for curve in zip(*rows, strict=True)]) for rows in (STOCK, moved))).failures
    assert len(failures) == len(words)
    assert all(word in failure for word, failure in zip(words, failures, strict=True))


def test_a_flat_curve_says_nothing():
    flat = Curves([[2.0, 1.9], [2.1, 2.0]])
    assert judge(flat, flat).failures == ["stock does not learn: its loss goes from 2.050 to 1.950"]
