"""How many steps does Muon save where it trains the hidden matrices? ``python -m bench.convergence_muon``.

A GPT reads Python's source, as in the text task of ``bench.convergence`` but larger: once with AdamW alone and once
with Muon and AdamW, which ``optimx.build`` makes of the model. Both have the same schedule, clipping, weight decay and
betas, and the same search for the learning rate, on a seed of its own. Losses are of text that training does not see.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import optimx
from bench.convergence import FLOOR, RESULTS, SEEDS
from bench.convergence_tasks import Recipe, Text, loss
from bench.gpt import GPT, GPTConfig
from bench.provenance import circumstances, machine, machine_folder

#: Learning rates of the search, for both alike.
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
#: Seed of the search, which is none of those that are reported.
SEARCH_SEED = SEEDS
#: Training steps from one measurement to the next.
EVERY = 10

ADAMW, BOTH = "AdamW", "Muon + AdamW"
SHARED: dict[str, Any] = {"weight_decay": 0.1, "max_grad_norm": 1.0}
BETAS: dict[str, Any] = {"betas": [0.9, 0.95]}


class LongerText(Text):
    """The text task for a larger GPT."""

    title = "Python's source, GPT, clipped, warmup and cosine"
    recipe = Recipe(steps=300, max_grad_norm=SHARED["max_grad_norm"], warmup=30)
    context, batch = 64, 16

    def model(self) -> nn.Module:
        return GPT(GPTConfig(context=self.context, width=96))


def arguments_of(name: str, lr: float) -> dict[str, Any]:
    """The config's section ``optimizer``: both optimizers have one learning rate, as match_rms_adamw allows."""
    if name == ADAMW:
        return {"name": "adamw", "lr": lr, **SHARED, **BETAS}
    adamw = {"lr": lr, "weight_decay": SHARED["weight_decay"], **BETAS}
    return {"name": "muon", "lr": lr, "adjust_lr_fn": "match_rms_adamw", **SHARED, "adamw": adamw}


@dataclass
class Curve:
    """A run: losses at the measured steps, and the median of what a training step took in milliseconds."""

    losses: list[float]
    ms: float


def train(task: Text, recipe: Recipe, name: str, lr: float, seed: int) -> Curve:
    """One run."""
    torch.manual_seed(seed)
    model = task.model().to(task.device)
    schedule = {"name": "cosine", "total": recipe.steps, "warmup": recipe.warmup, "floor": FLOOR}
    optimizer, scheduler = optimx.build(model, {"optimizer": arguments_of(name, lr), "schedule": schedule})

    def measure() -> float:
        with torch.no_grad():
            return loss(model, task.unseen).item()

    losses, times = [measure()], []
    for done, batch in enumerate(task.batches(recipe.steps, seed), 1):
        start = time.perf_counter()
        model.zero_grad()
        # the item waits for a GPU, which then has the step of before behind it
        value = loss(model, batch)
        value.backward()
        value.item()
        optimizer.step()
        scheduler.step()
        times.append(time.perf_counter() - start)
        if done % EVERY == 0:
            losses.append(measure())
    return Curve(losses, 1e3 * median(times))


def steps_to(goal: float, losses: Sequence[float]) -> int | None:
    """The first measured step at which a curve is at the goal or below it; None if it is nowhere."""
    return next((EVERY * i for i, value in enumerate(losses) if value <= goal), None)


def search(task: Text, recipe: Recipe, name: str) -> dict[str, float]:
    """Final loss of each learning rate of the search."""
    return {f"{lr:g}": train(task, recipe, name, lr, SEARCH_SEED).losses[-1] for lr in RATES}


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
            runs.append(train(task, recipe, name, float(rates[name]), seed))
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
                "losses": [[float(f"{x:.6g}") for x in curve.losses] for curve in runs],
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


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.convergence_muon",
        description="Loss curves of Muon and AdamW together beside AdamW alone.",
    )
    parser.add_argument("--gpu", action="store_true", help="on the GPU instead of the CPU")
    out = f"folder of the results (default: one for the machine in {RESULTS}; with --quick nothing is saved)"
    parser.add_argument("--out", type=Path, help=out)
    parser.add_argument("--quick", action="store_true", help="two seeds, a tenth of the steps")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    words = ["python -m bench.convergence_muon", *["--gpu"] * options.gpu, *["--quick"] * options.quick]
    results = {"machine_info": machine(options.gpu), "run": circumstances(" ".join(words))}
    task = LongerText(torch.device("cuda" if options.gpu else "cpu"))
    recipe, seeds = task.recipe, SEEDS
    if options.quick:
        recipe, seeds = replace(recipe, steps=recipe.steps // 10, warmup=recipe.warmup // 10), 2
    results |= contest(task, recipe, seeds)
    folder = options.out or (None if options.quick else RESULTS / machine_folder(options.gpu))
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "convergence_muon.json").write_text(json.dumps(results) + "\n")
    narrow = [name for name, found in results["searched"].items() if at_an_edge(found)]
    for name in narrow:
        print(f"{name}: the best learning rate is at the edge of the search", file=sys.stderr)
    return int(bool(narrow))


if __name__ == "__main__":
    sys.exit(main())
