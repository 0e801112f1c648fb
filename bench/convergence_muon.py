"""How many steps does Muon save where it trains the hidden matrices? ``python -m bench.convergence_muon``.

A GPT reads Python's source, as in the text task of ``bench.convergence`` but larger: once with AdamW alone and once
with Muon and AdamW, which ``optimx.build`` makes of the model. Both have the same schedule, clipping, weight decay and
betas, and the same search for the learning rate, on a seed of its own. Losses are of text that training does not see.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bench.convergence import SEEDS
from bench.convergence_tasks import Recipe, Text
from bench.convergence_text import EVERY, Check, Curve, LongerText, device_of, length, rounded, train

CHECK = Check("convergence_muon", "Loss curves of Muon and AdamW together beside AdamW alone.")
#: Learning rates of the search, for both alike.
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
#: Seed of the search, which is none of those that are reported.
SEARCH_SEED = SEEDS

ADAMW, BOTH = "AdamW", "Muon + AdamW"
SHARED: dict[str, Any] = {"weight_decay": 0.1, "max_grad_norm": LongerText.recipe.max_grad_norm}
BETAS: dict[str, Any] = {"betas": [0.9, 0.95]}


def arguments_of(name: str, lr: float) -> dict[str, Any]:
    """The config's section ``optimizer``: both optimizers have one learning rate, as match_rms_adamw allows."""
    if name == ADAMW:
        return {"name": "adamw", "lr": lr, **SHARED, **BETAS}
    adamw = {"lr": lr, "weight_decay": SHARED["weight_decay"], **BETAS}
    return {"name": "muon", "lr": lr, "adjust_lr_fn": "match_rms_adamw", **SHARED, "adamw": adamw}


def steps_to(goal: float, losses: Sequence[float]) -> int | None:
    """The first measured step at which a curve is at the goal or below it; None if it is nowhere."""
    return next((EVERY * i for i, value in enumerate(losses) if value <= goal), None)


def search(task: Text, recipe: Recipe, name: str) -> dict[str, float]:
    """Final loss of each learning rate of the search."""
    return {f"{lr:g}": train(task, recipe, arguments_of(name, lr), SEARCH_SEED).losses[-1] for lr in RATES}


def contest(task: Text, recipe: Recipe, seeds: int) -> dict[str, Any]:
    """Search and train: what the results have beside machine and circumstances."""
    searched = {name: search(task, recipe, name) for name in (ADAMW, BOTH)}
    rates = {name: min(found, key=found.__getitem__) for name, found in searched.items()}
    for name, found in searched.items():
        print(f"{name:<13} {', '.join(f'{lr}: {value:.4f}' for lr, value in found.items())}", flush=True)
    curves: dict[str, list[Curve]] = {ADAMW: [], BOTH: []}
    reached = []
    for seed in range(seeds):
        for name, runs in curves.items():
            runs.append(train(task, recipe, arguments_of(name, float(rates[name])), seed))
        adamw, both = (runs[-1] for runs in curves.values())
        reached.append(steps_to(adamw.losses[-1], both.losses))
        print(f"seed {seed}: {adamw.losses[-1]:.4f}, {both.losses[-1]:.4f}, there at step {reached[-1]}", flush=True)
    return {
        "task": task.title,
        "params": sum(p.numel() for p in task.model().parameters()),
        "recipe": asdict(recipe),
        "steps": list(range(0, recipe.steps + 1, EVERY)),
        "searched": searched,
        "optimizers": [
            {
                "optimizer": name,
                "arguments": arguments_of(name, float(rates[name])),
                "losses": [rounded(curve.losses) for curve in runs],
                "ms": [float(f"{curve.ms:.4g}") for curve in runs],
            }
            for name, runs in curves.items()
        ],
        "reached": reached,
    }


def at_an_edge(searched: dict[str, float]) -> bool:
    """Whether the best learning rate is the first or the last, so that a better one may lie outside."""
    best = min(searched, key=searched.__getitem__)
    return best in (next(iter(searched)), next(reversed(searched)))


def main(arguments: list[str] | None = None) -> int:
    options = CHECK.parse(arguments)
    results = CHECK.head(options)
    task = LongerText(device_of(options))
    results |= contest(task, *length(task.recipe, SEEDS, options))
    CHECK.save(results, options)
    narrow = [name for name, found in results["searched"].items() if at_an_edge(found)]
    for name in narrow:
        print(f"{name}: the best learning rate is at the edge of the search", file=sys.stderr)
    return int(bool(narrow))


if __name__ == "__main__":
    sys.exit(main())
