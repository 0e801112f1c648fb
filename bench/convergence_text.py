"""What the checks share in which a GPT reads Python's source: task, a run of it, command line, and where results go."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import optimx
from bench.convergence import FLOOR, RESULTS
from bench.convergence_tasks import Recipe, Text, loss
from bench.gpt import GPT, GPTConfig
from bench.provenance import circumstances, machine, machine_folder

#: Training steps from one measurement to the next.
EVERY = 10
#: Seeds of a quick run.
QUICK_SEEDS = 2


class LongerText(Text):
    """The text task for a larger GPT."""

    title = "Python's source, GPT, clipped, warmup and cosine"
    recipe = Recipe(steps=300, max_grad_norm=1.0, warmup=30)
    context, batch = 64, 16

    def model(self) -> nn.Module:
        return GPT(GPTConfig(context=self.context, width=96))


@dataclass
class Curve:
    """A run.

    Args:
        losses: Of unseen text, at the measured steps.
        seen: Final loss of text that training may have seen.
        ms: The median of what a training step took, in milliseconds.
    """

    losses: list[float]
    seen: float
    ms: float


def train(task: Text, recipe: Recipe, section: dict[str, Any], seed: int, every: int = EVERY) -> Curve:
    """One run with the optimizer that ``optimx.build`` makes of a config's section, measured every so many steps."""
    torch.manual_seed(seed)
    model = task.model().to(task.device)
    schedule = {"name": "cosine", "total": recipe.steps, "warmup": recipe.warmup, "floor": FLOOR}
    optimizer, scheduler = optimx.build(model, {"optimizer": section, "schedule": schedule})

    @torch.no_grad()
    def measure(batch: tuple[torch.Tensor, torch.Tensor]) -> float:
        return loss(model, batch).item()

    losses, times = [measure(task.unseen)], []
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
        if done % every == 0:
            losses.append(measure(task.unseen))
    return Curve(losses, measure(task.seen), 1e3 * median(times))


def rounded(losses: list[float]) -> list[float]:
    """Losses as they are saved: six digits are what float32 has."""
    return [float(f"{value:.6g}") for value in losses]


@dataclass(frozen=True)
class Check:
    """A check's command: its options, and the file that it leaves.

    Args:
        name: Of its module and of its results.
        description: For ``--help``.
    """

    name: str
    description: str

    def parse(self, arguments: list[str] | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(prog=f"python -m bench.{self.name}", description=self.description)
        parser.add_argument("--gpu", action="store_true", help="on the GPU instead of the CPU")
        out = f"folder of the results (default: one for the machine in {RESULTS}; with --quick nothing is saved)"
        parser.add_argument("--out", type=Path, help=out)
        quick = f"{QUICK_SEEDS} seeds, a tenth of the steps"
        parser.add_argument("--quick", action="store_true", help=quick)
        return parser.parse_args(arguments)

    def head(self, options: argparse.Namespace) -> dict[str, Any]:
        """What results begin with. To be asked before the first measurement."""
        words = [f"python -m bench.{self.name}", *["--gpu"] * options.gpu, *["--quick"] * options.quick]
        return {"machine_info": machine(options.gpu), "run": circumstances(" ".join(words))}

    def save(self, results: dict[str, Any], options: argparse.Namespace) -> None:
        """Write them, but for those of a quick run that names no folder."""
        folder = options.out or (None if options.quick else RESULTS / machine_folder(options.gpu))
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{self.name}.json").write_text(json.dumps(results) + "\n")


def device_of(options: argparse.Namespace) -> torch.device:
    return torch.device("cuda" if options.gpu else "cpu")


def length(recipe: Recipe, seeds: int, options: argparse.Namespace) -> tuple[Recipe, int]:
    """The recipe and the number of seeds, or what is left of them in a quick run."""
    if not options.quick:
        return recipe, seeds
    return replace(recipe, steps=recipe.steps // 10, warmup=recipe.warmup // 10), QUICK_SEEDS
