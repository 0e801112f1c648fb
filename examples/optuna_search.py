"""Optuna suggests what digits.toml searches, and ends trials that are worse than the median of the others.

    python -m examples.optuna_search [TRIALS]

Where several ranks train a model, the first asks Optuna and sends the others the overrides and whether to prune.
"""

from __future__ import annotations

import sys

import optuna

import optimx
from examples.digits import CONFIG, EPOCHS, Training


def objective(trial: optuna.Trial) -> float:
    training = Training(optimx.search.suggest(trial, CONFIG))
    for epoch in range(EPOCHS):
        loss = training.epoch()
        trial.report(loss, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return loss


def main(trials: int = 20) -> optuna.Study:
    sampler = optuna.samplers.TPESampler(seed=0)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1)
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    study.optimize(objective, trials)
    pruned = len(study.get_trials(states=(optuna.trial.TrialState.PRUNED,)))
    print(f"{trials} trials, {pruned} of them pruned; best loss {study.best_value:.4f} with {study.best_params}")
    return study


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
