"""The programs in ``examples`` run, and find what is better than what they began with."""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn")


def test_successive_halving(capsys: pytest.CaptureFixture[str]) -> None:
    from examples import successive_halving

    loss, best = successive_halving.main(4, factor=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" best")[0] for line in lines] == [
        "4 trainings after 1 epochs:",
        "2 trainings after 2 epochs:",
        "1 trainings after 9 epochs:",
    ]
    assert loss < 0.3
    assert str(best) in lines[-1]


def test_optuna(capsys: pytest.CaptureFixture[str]) -> None:
    optuna = pytest.importorskip("optuna")
    from examples import optuna_search

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna_search.main(8)
    states = [trial.state for trial in study.trials]
    assert states.count(optuna.trial.TrialState.PRUNED) >= 1
    assert states.count(optuna.trial.TrialState.COMPLETE) >= 4
    assert study.best_value < 0.3
    assert {*study.best_params} == {"optimizer.lr", "optimizer.weight_decay", "optimizer.name", "schedule.warmup"}
    assert capsys.readouterr().out.startswith("8 trials, ")
