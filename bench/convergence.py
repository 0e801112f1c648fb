"""Does training with optimx get where training with torch.optim gets? ``python -m bench.convergence``.

Every optimizer trains two small models (``bench.convergence_tasks``) from five seeds, once from torch.optim and once
from optimx: same initial weights, same batches. Where torch has no such class, stock is what
:func:`bench.catalogue.stock_of` says. What must hold is in :func:`judge`; the exit status is 1 where it does not.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

import optimx
from bench.catalogue import of_all_shapes, stock_of
from bench.convergence_tasks import TASKS, Recipe, Task, accuracy, arguments_of, loss
from bench.provenance import circumstances, machine, machine_folder

SEEDS = 5
RESULTS = Path("bench/results")
#: Points of a curve, after the one before training.
POINTS = 20
FLOOR = 0.1
#: A curve that ends above this part of where it began says nothing about an optimizer.
LEARNED = 0.7

OPTIMIZERS = of_all_shapes()

#: Takes a step with the gradients that are there: clips, updates, moves the schedule on.
Step = Callable[[], None]
Side = Callable[[str, list[torch.nn.Parameter], dict[str, Any], Recipe], Step]


def ours(name: str, params: list[torch.nn.Parameter], arguments: dict[str, Any], recipe: Recipe) -> Step:
    """Optimx's optimizer, which clips inside the step, and optimx's schedule."""
    optimizer = getattr(optimx, name)(params, **arguments, max_grad_norm=recipe.max_grad_norm)
    if not recipe.warmup:
        return optimizer.step
    scheduler = optimx.lr_scheduler.WarmupCosineLR(optimizer, recipe.warmup, recipe.steps, FLOOR)

    def step() -> None:
        optimizer.step()
        scheduler.step()

    return step


def stock(name: str, params: list[torch.nn.Parameter], arguments: dict[str, Any], recipe: Recipe) -> Step:
    """Stock's class as it is by default, torch's clipping before the step, and the schedule by its formula."""
    _, make = stock_of(name)
    optimizer = make(params, **arguments)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(factor, recipe))

    def step() -> None:
        if recipe.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, recipe.max_grad_norm)
        optimizer.step()
        scheduler.step()

    return step


def factor(recipe: Recipe, step: int) -> float:
    """What multiplies the learning rate at this step: up a line to 1 at the last step of warmup, down half a cosine."""
    if not recipe.warmup:
        return 1.0
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = min((step - recipe.warmup + 1) / (recipe.steps - recipe.warmup + 1), 1.0)
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2


@dataclass
class Curves:
    """One side's runs: losses at the measured steps, one list a seed, and the share of right guesses on unseen data."""

    losses: list[list[float]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def steps(self) -> Iterable[tuple[float, ...]]:
        """All seeds' losses, step by step."""
        return zip(*self.losses, strict=True)


def train(task: Task, name: str, seed: int, recipe: Recipe, side: Side, curves: Curves) -> None:
    """One run, added to ``curves``."""
    torch.manual_seed(seed)
    model = task.model().to(task.seen[0].device)
    step = side(name, list(model.parameters()), arguments_of(name, task), recipe)

    def measure() -> float:
        with torch.no_grad():
            return loss(model, task.seen).item()

    # Rprop compares the signs of two gradients, which must not differ because their batches do
    batches = task.whole(recipe.steps) if name == "Rprop" else task.batches(recipe.steps, seed)
    losses = [measure()]
    for done, batch in enumerate(batches, 1):
        model.zero_grad()
        loss(model, batch).backward()
        step()
        if done % (recipe.steps // POINTS) == 0:
            losses.append(measure())
    curves.losses.append(losses)
    with torch.no_grad():
        curves.scores.append(accuracy(model, task.unseen))


@dataclass(frozen=True)
class Judgement:
    """What :func:`judge` found; losses in nats, of means over the seeds.

    Args:
        first: Loss before training.
        stock: Stock's final loss.
        ours: Our final loss.
        gap: Difference of the two.
        standard_error: Of stock's mean final loss.
        curve_gap: The largest difference of the mean curves, in standard deviations between stock's seeds at that step.
        same_seed: The largest relative difference of two runs from one seed, anywhere on their curves.
        failures: What does not hold, in words; empty where the curves agree.
    """

    first: float
    stock: float
    ours: float
    gap: float
    standard_error: float
    curve_gap: float
    same_seed: float
    failures: list[str]


def judge(stock: Curves, ours: Curves) -> Judgement:
    """Compare the curves of two optimizers from the same seeds.

    Both do the same maths with roundings in another order, and training amplifies roundings, so their losses are not
    equal. But whoever changes the optimizer must not see more than whoever changes the seed: the final losses differ by
    no more than the standard error of stock's mean, and nowhere do the mean curves differ by more than one standard
    deviation of stock's seeds. And something must have been learned.

    For AdamW one task or both find a learning rate that is 3 % off, no weight decay, a beta1 of 0.85 for 0.9, a beta2
    of 0.99 for 0.999, a warmup that is a step short and gradients that are not clipped. They do not find an eps of 1e-5
    for 1e-8: equal steps are for other tests to show.
    """
    steps = list(zip(stock.steps(), ours.steps(), strict=True))
    gaps = [abs(fmean(theirs) - fmean(mine)) / stdev(theirs) for theirs, mine in steps]
    same = [abs(b / a - 1) for theirs, mine in steps for a, b in zip(theirs, mine, strict=True)]
    # torch's max, since Python's may drop a NaN
    curve_gap, same_seed = (torch.tensor(values, dtype=torch.float64).max().item() for values in (gaps, same))

    (first, _), *_, (last, our_last) = steps
    start, end, our_end = fmean(first), fmean(last), fmean(our_last)
    gap, error = abs(our_end - end), stdev(last) / math.sqrt(len(last))
    # `not <=` rather than `>`, which a NaN would pass
    failures = []
    if not end <= LEARNED * start:
        failures.append(f"stock does not learn: its loss goes from {start:.3f} to {end:.3f}")
    if not gap <= error:
        failures.append(f"the final losses are {gap:.1e} apart, the standard error is {error:.1e}")
    if not curve_gap <= 1:
        failures.append(f"the mean curves are {curve_gap:.1f} standard deviations of the seeds apart")
    return Judgement(start, end, our_end, gap, error, curve_gap, same_seed, failures)


def compare(task: Task, name: str, recipe: Recipe, seeds: int) -> dict[str, Any]:
    """Train one optimizer on one task on both sides: an entry of the results."""
    sides = {"stock": Curves(), "ours": Curves()}
    for seed in range(seeds):
        train(task, name, seed, recipe, stock, sides["stock"])
        train(task, name, seed, recipe, ours, sides["ours"])
    judgement = judge(**sides)
    return {
        "task": task.name,
        "optimizer": name,
        "baseline": stock_of(name)[0],
        "arguments": arguments_of(name, task),
        "recipe": asdict(recipe),
        "seeds": seeds,
        "verdict": "DISAGREE" if judgement.failures else "AGREE",
        **asdict(judgement),
        "scores": {side: curves.scores for side, curves in sides.items()},
        "steps": list(range(0, recipe.steps + 1, recipe.steps // POINTS)),
        # six digits are what float32 has
        "losses": {side: [[float(f"{x:.6g}") for x in c] for c in curves.losses] for side, curves in sides.items()},
    }


HEADER = (
    f"{'task':<7} {'optimizer':<17} {'first':>6} {'stock':>8} {'ours':>8} {'gap':>8} {'std err':>8} "
    f"{'curves':>8} {'1 seed':>8} {'unseen':>13}"
)


def line(entry: dict[str, Any]) -> str:
    """A row of the table."""
    scores = "/".join(f"{fmean(entry['scores'][side]):.2%}" for side in ("stock", "ours"))
    return (
        f"{entry['task']:<7} {entry['optimizer']:<17} {entry['first']:>6.3f} {entry['stock']:>8.5f} "
        f"{entry['ours']:>8.5f} {entry['gap']:>8.1e} {entry['standard_error']:>8.1e} {entry['curve_gap']:>8.1e} "
        f"{entry['same_seed']:>8.1e} {scores:>13}  " + "; ".join([entry["verdict"], *entry["failures"]])
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.convergence",
        description="Loss curves of optimx's optimizers beside those of torch.optim.",
    )
    parser.add_argument("--gpu", action="store_true", help="on the GPU instead of the CPU")
    out = (
        f"folder of the results (default: one for the machine in {RESULTS}; with --quick or --filter nothing is saved)"
    )
    parser.add_argument("--out", type=Path, help=out)
    parser.add_argument("--quick", action="store_true", help="two seeds, half of the steps")
    parser.add_argument("--filter", default="", metavar="SUBSTR", help="only TASK-OPTIMIZER that contain this")
    return parser.parse_args(arguments)


def command(options: argparse.Namespace) -> str:
    words = ["python -m bench.convergence"]
    words += ["--gpu"] * options.gpu + ["--quick"] * options.quick
    words += [f"--filter {options.filter}"] if options.filter else []
    return " ".join(words)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    chosen = [(task, name) for task in TASKS for name in OPTIMIZERS if options.filter in f"{task}-{name}".lower()]
    if not chosen:
        print(f"bench.convergence: no task and optimizer have {options.filter!r} in their name", file=sys.stderr)
        return 2
    results: dict[str, Any] = {"machine_info": machine(options.gpu), "run": circumstances(command(options)), "runs": []}
    device = torch.device("cuda" if options.gpu else "cpu")
    tasks = {name: TASKS[name](device) for name in dict.fromkeys(task for task, _ in chosen)}
    print(HEADER)
    for task, name in chosen:
        recipe, seeds = tasks[task].recipe, SEEDS
        if options.quick:
            recipe, seeds = replace(recipe, steps=recipe.steps // 2, warmup=recipe.warmup // 2), 2
        results["runs"].append(compare(tasks[task], name, recipe, seeds))
        print(line(results["runs"][-1]), flush=True)
    whole = not (options.quick or options.filter)
    folder = options.out or (RESULTS / machine_folder(options.gpu) if whole else None)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "convergence.json").write_text(json.dumps(results) + "\n")
    agree = sum(entry["verdict"] == "AGREE" for entry in results["runs"])
    print(f"\n{agree} of {len(results['runs'])} agree")
    return int(agree < len(results["runs"]))


if __name__ == "__main__":
    sys.exit(main())
