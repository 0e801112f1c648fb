"""What bad batches do to a training, and what rules do about them: ``python -m bench.bad_steps``.

A small GPT trains with AdamW, and some of its batches are bad: a loss multiplied by a thousand, tokens that are noise,
a gradient that becomes NaN on its way back. What counts is the final loss on text that training has not seen.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

import optimx
from bench.convergence_text import QUICK_SEEDS, Check, device_of, rounded
from bench.corpus import Corpus
from bench.gpt import GPT, GPTConfig

CHECK = Check("bad_steps", "Final losses of a training some of whose batches are bad.")
SEEDS = 3
STEPS = 400
#: Training steps from one measurement to the next.
EVERY = 10
BATCH = 8
MODEL = GPTConfig(context=32, layers=4, heads=4, width=64)
LR, WARMUP = 1e-3, 40
MAX_GRAD_NORM = 1.0

#: Kinds of bad batches.
MULTIPLIED, NOISE, NAN = "loss x 1000", "noise", "NaN"
FACTOR = 1000.0
SPIKES = {**dict.fromkeys((120, 200, 280), MULTIPLIED), **dict.fromkeys((160, 161, 240, 241), NOISE)}
#: Bad batches of each training, by the number of their step; 1 is the first.
PLANS: dict[str, dict[int, str]] = {
    "no bad batch": {},
    "spikes": SPIKES,
    "spikes and NaN": {**SPIKES, **dict.fromkeys((140, 220, 300), NAN)},
}


@dataclass(frozen=True)
class Way:
    """How steps are taken.

    Attributes:
        name: For tables.
        rules: Arguments of optimx's AdamW; None: the optimizer is torch's.
        clips: ``clip_grad_norm_`` is called before each step.
    """

    name: str
    rules: dict[str, Any] | None = None
    clips: bool = False

    def optimizer(self, model: nn.Module) -> Optimizer:
        if self.rules is None:
            return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1)
        return optimx.AdamW(model.named_parameters(), lr=LR, weight_decay=0.1, **self.rules)


WAYS = [
    Way("torch"),
    Way("torch, `clip_grad_norm_` to 1", clips=True),
    Way("`max_grad_norm=1`", {"max_grad_norm": MAX_GRAD_NORM}),
    Way("`skip_nonfinite`", {"skip_nonfinite": True}),
    Way("`skip_nonfinite`, `max_grad_norm=1`", {"skip_nonfinite": True, "max_grad_norm": MAX_GRAD_NORM}),
    Way("`skip_nonfinite`, `AutoClip()`", {"skip_nonfinite": True, "max_grad_norm": optimx.AutoClip()}),
    Way("`skip_nonfinite`, `ZClip()`", {"skip_nonfinite": True, "max_grad_norm": optimx.ZClip()}),
    Way("`skip_nonfinite`, `Spikes()`", {"skip_nonfinite": True, "skip_spikes": optimx.Spikes()}),
    Way(
        "`skip_nonfinite`, `Spikes()`, `max_grad_norm=1`",
        {"skip_nonfinite": True, "skip_spikes": optimx.Spikes(), "max_grad_norm": MAX_GRAD_NORM},
    ),
]


@dataclass
class Training:
    """What became of a training.

    Attributes:
        losses: On unseen text, before the first step and after every :data:`EVERY` steps.
        counters: Of the optimizer, where it counts.
        last_bad: What the optimizer tells of its last step with infinite or NaN gradients.
    """

    losses: list[float] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    last_bad: str | None = None


def bad_loss(model: GPT, tokens: Tensor, kind: str | None) -> Tensor:
    """The loss of a batch that is bad in this way, if in any."""
    if kind == NOISE:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(MODEL.vocab_size, tokens.shape, generator=generator)
        return model.loss(noise.to(tokens.device))
    if kind == NAN:
        spoil = model.blocks[1].register_forward_hook(lambda _module, _inputs, out: _with_nan_gradient(out))
        loss = model.loss(tokens)
        spoil.remove()
        return loss
    return model.loss(tokens) * (FACTOR if kind == MULTIPLIED else 1.0)


def _with_nan_gradient(out: Tensor) -> Tensor:
    out.register_hook(lambda grad: grad * math.nan)
    return out


def train(way: Way, plan: dict[int, str], seed: int, steps: int, device: torch.device) -> Training:
    """Train from a seed with the bad batches of a plan."""
    torch.manual_seed(seed)
    model = GPT(MODEL).to(device)
    optimizer = way.optimizer(model)
    warmup = min(WARMUP, steps // 10)
    schedule = optimx.lr_scheduler.Warmup(warmup) >> optimx.lr_scheduler.Cosine(steps - warmup)
    scheduler = optimx.lr_scheduler.ScheduleLR(optimizer, schedule)
    corpus = Corpus()
    unseen = torch.cat([*corpus.validation_batches(BATCH, MODEL.context + 1, count=8)]).to(device)
    training = Training([_measured(model, unseen)])
    for step, tokens in enumerate(corpus.batches(steps, BATCH, MODEL.context + 1, seed), 1):
        model.zero_grad()
        bad_loss(model, tokens.to(device), plan.get(step)).backward()
        if way.clips:
            clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        scheduler.step()
        if step % EVERY == 0:
            training.losses.append(_measured(model, unseen))
    if isinstance(optimizer, optimx.AdamW):
        training.counters = {name: int(count) for name, count in optimizer.counters.items()}
        bad = optimx.last_bad(optimizer)
        training.last_bad = None if bad is None else str(bad)
    return training


@torch.no_grad()
def _measured(model: GPT, tokens: Tensor) -> float:
    return model.loss(tokens).item()


def compare(seeds: int, steps: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """An entry of the results for each way and plan."""
    for way in WAYS:
        for name, plan in PLANS.items():
            trainings = [train(way, plan, seed, steps, device) for seed in range(seeds)]
            yield {
                "way": way.name,
                "plan": name,
                "losses": [rounded(training.losses) for training in trainings],
                "counters": [training.counters for training in trainings],
                "last_bad": [training.last_bad for training in trainings],
            }


def main(arguments: list[str] | None = None) -> int:
    options = CHECK.parse(arguments)
    results = CHECK.head(options)
    results["bad_steps"] = {name: {str(step): kind for step, kind in plan.items()} for name, plan in PLANS.items()}
    results["entries"] = []
    seeds, steps = (QUICK_SEEDS, STEPS // 10) if options.quick else (SEEDS, STEPS)
    for entry in compare(seeds, steps, device_of(options)):
        results["entries"].append(entry)
        final = [losses[-1] for losses in entry["losses"]]
        print(f"{entry['way']}, {entry['plan']}: {fmean(final):.4f}, {entry['counters'][0]}", flush=True)
    CHECK.save(results, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
