"""Are the learning rates that ``optimx.lr_find`` suggests good ones? ``python -m bench.lr_find``.

The two models of ``bench.convergence`` train with AdamW and with SGD, from several seeds: at every learning rate of a
grid, and at each that a rule suggests after a sweep with the same weights and other batches. What counts is the final
loss on data that training has not seen, beside the grid's best.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import optimx
from bench.convergence import FLOOR
from bench.convergence_tasks import SETTINGS, Digits, Recipe, Task, Text, loss
from bench.convergence_text import Check, device_of, length, rounded
from optimx import LRCurve

CHECK = Check("lr_find", "Final losses at suggested learning rates, beside those of a grid.")
SEEDS = 3
OPTIMIZERS = ("AdamW", "SGD")
#: Four learning rates a decade.
GRID = [float(f"{10 ** (quarter / 4):.3g}") for quarter in range(-16, 3)]
#: Of the batches of a sweep, which are not those of the training.
SWEEP_SEED = 1000


def start(task: Task, name: str, recipe: Recipe, lr: float, seed: int) -> tuple[nn.Module, Optimizer]:
    """A fresh model and its optimizer."""
    torch.manual_seed(seed)
    model = task.model().to(task.seen[0].device)
    arguments, *_ = SETTINGS[name]
    made = getattr(optimx, name)(model.parameters(), lr=lr, **arguments, max_grad_norm=recipe.max_grad_norm)
    return model, made


def sweep(task: Task, name: str, recipe: Recipe, seed: int) -> LRCurve:
    """The finder as it is by default."""
    model, optimizer = start(task, name, recipe, 1e-3, seed)
    batches = task.batches(sys.maxsize, SWEEP_SEED + seed)
    return optimx.lr_find(model, optimizer, lambda: loss(model, next(batches)))


def final_loss(task: Task, name: str, recipe: Recipe, lr: float, seed: int) -> float:
    """Of unseen data, after a training whose greatest learning rate is this one; infinite where it is not a number."""
    model, optimizer = start(task, name, recipe, lr, seed)
    scheduler = None
    if recipe.warmup:
        scheduler = optimx.lr_scheduler.WarmupCosineLR(optimizer, recipe.warmup, recipe.steps, FLOOR)
    for batch in task.batches(recipe.steps, seed):
        model.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    with torch.no_grad():
        value = loss(model, task.unseen).item()
    return value if math.isfinite(value) else math.inf


def compare(task: Task, name: str, recipe: Recipe, seeds: int) -> dict[str, Any]:
    """An entry of the results, by seed: sweeps, losses of the grid, what every rule suggests and where that ends."""
    curves = [sweep(task, name, recipe, seed) for seed in range(seeds)]
    grid = [[final_loss(task, name, recipe, lr, seed) for seed in range(seeds)] for lr in GRID]
    rules = {}
    for rule in curves[0].suggestions:
        lrs = [curve.suggestions[rule] for curve in curves]
        if None not in lrs:
            ends = [final_loss(task, name, recipe, lr, seed) for seed, lr in enumerate(lrs)]
            rules[rule] = {"lrs": rounded(lrs), "losses": rounded(ends)}
    longest = max(curves, key=lambda curve: len(curve.lrs))
    best = min(range(len(GRID)), key=lambda i: fmean(grid[i]))
    return {
        "task": task.name,
        "title": task.title,
        "optimizer": name,
        "recipe": asdict(recipe),
        "lrs": rounded(longest.lrs),
        "sweeps": [rounded(curve.losses) for curve in curves],
        "smoothed": [rounded(curve.smoothed) for curve in curves],
        "stopped": [curve.stopped for curve in curves],
        "grid": GRID,
        "grid_losses": [rounded(losses) for losses in grid],
        "best": best,
        "rules": rules,
    }


def main(arguments: list[str] | None = None) -> int:
    options = CHECK.parse(arguments)
    results = CHECK.head(options)
    results["entries"] = []
    for task in (kind(device_of(options)) for kind in (Digits, Text)):
        for name in OPTIMIZERS:
            entry = compare(task, name, *length(task.recipe, SEEDS, options))
            results["entries"].append(entry)
            best = fmean(entry["grid_losses"][entry["best"]])
            print(f"{task.name}, {name}: the grid's best is {best:.4f} at {GRID[entry['best']]:g}")
            for rule, found in entry["rules"].items():
                mean = fmean(found["losses"])
                lrs = ", ".join(f"{lr:.2g}" for lr in found["lrs"])
                print(f"  {rule:<10} {mean:.4f} ({mean / best:.2f}x) at {lrs}", flush=True)
    CHECK.save(results, options)
    edges = [entry for entry in results["entries"] if entry["best"] in (0, len(GRID) - 1)]
    for entry in edges:
        print(f"{entry['task']}, {entry['optimizer']}: the best rate is at the edge of the grid", file=sys.stderr)
    return int(bool(edges))


if __name__ == "__main__":
    sys.exit(main())
