"""What :mod:`bench.convergence` trains: two small models on data that is on the machine already, and how."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optimx
from bench.corpus import Corpus
from bench.gpt import GPT, GPTConfig

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a task is trained, beside the optimizer's own arguments.

    Args:
        steps: Length of a run.
        max_grad_norm: Clip to this norm, stock before the step and ours inside (default: no clipping).
        warmup: Steps of linear warmup, a cosine to a tenth after them (default: 0, a constant learning rate).
    """

    steps: int
    max_grad_norm: float | None = None
    warmup: int = 0


class Task(Protocol):
    """Data and a model for it. ``seen`` is what the curves are measured on, ``unseen`` what the score is."""

    name: str
    title: str
    recipe: Recipe
    seen: Batch
    unseen: Batch

    def model(self) -> nn.Module:
        """A fresh model, weights from torch's global generator, whose output is logits."""

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        """Yield random batches; one seed, one order."""

    def whole(self, steps: int) -> Iterator[Batch]:
        """Yield all of ``seen`` again and again, for optimizers that need the same gradient of the same weights."""
        return repeat(self.seen, steps)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy in nats."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def accuracy(model: nn.Module, batch: Batch) -> float:
    """Share of right first guesses."""
    inputs, targets = batch
    return (model(inputs).argmax(-1) == targets).float().mean().item()


class Digits(Task):
    """Scikit-learn's handwritten digits, 8 x 8 pixels: an MLP at a constant learning rate."""

    name = "digits"
    title = "digits, MLP, constant lr"
    recipe = Recipe(steps=200)

    def __init__(self, device: torch.device) -> None:
        # here, so that the other task needs torch alone
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        inputs = torch.tensor(images / 16, dtype=torch.float32, device=device)
        targets = torch.tensor(labels, dtype=torch.int64, device=device)
        self.seen = inputs[:1440], targets[:1440]
        self.unseen = inputs[1440:], targets[1440:]

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        inputs, targets = self.seen
        for _ in range(steps):
            some = torch.randint(len(inputs), (64,), generator=generator).to(inputs.device)
            yield inputs[some], targets[some]


class Text(Task):
    """Python's source code, byte by byte: a GPT with clipping, warmup and a cosine, as people train it."""

    name = "text"
    title = "Python's source, GPT, clipped, warmup and cosine"
    recipe = Recipe(steps=160, max_grad_norm=1.0, warmup=16)
    context, batch = 32, 8

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.corpus = Corpus()
        self.seen = self.pairs(next(self.corpus.batches(1, 64, self.context + 1, seed=-1)))
        self.unseen = self.pairs(next(self.corpus.validation_batches(64, self.context + 1, count=1)))

    def pairs(self, tokens: Tensor) -> Batch:
        return tokens[:, :-1].to(self.device), tokens[:, 1:].to(self.device)

    def model(self) -> nn.Module:
        return GPT(GPTConfig(context=self.context, layers=2, heads=2, width=32))

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        yield from map(self.pairs, self.corpus.batches(steps, self.batch, self.context + 1, seed))


TASKS = {task.name: task for task in (Digits, Text)}

#: Optimizers that somebody has tried learning rates for: arguments in both tasks, then the rates for digits and text.
SETTINGS: dict[str, tuple[dict[str, Any], float, float]] = {
    "AdamW": ({"weight_decay": 0.1}, 3e-3, 3e-3),
    "Adam": ({}, 3e-3, 3e-3),
    "SGD": ({"momentum": 0.9}, 0.05, 0.1),
    "RMSprop": ({}, 1e-3, 1e-3),
    "Adagrad": ({}, 0.03, 0.01),
    "Adadelta": ({}, 1.0, 1.5),
    "Adafactor": ({}, 0.03, 0.1),
    "Adamax": ({}, 5e-3, 0.01),
    "NAdam": ({}, 3e-3, 3e-3),
    "RAdam": ({}, 0.01, 0.03),
    # steps at most this long, or it learns the digits by heart and there is no loss left to compare
    "Rprop": ({"step_sizes": (1e-6, 1e-3)}, 1e-3, 1e-3),
    "ASGD": ({}, 0.3, 0.5),
    "Lion": ({"weight_decay": 0.1}, 1.5e-3, 1e-3),
    "LAMB": ({"weight_decay": 0.01}, 0.02, 0.03),
    "ScheduleFreeAdamW": ({"weight_decay": 0.1}, 5e-3, 5e-3),
    "ScheduleFreeSGD": ({}, 1.0, 1.0),
}

#: Others get this multiple of their default learning rate: with it both tasks train with every optimizer above but SGD,
#: in one run each, where the default alone is too small for Lion, LAMB, RAdam and ASGD, and three times it for three.
LR_FACTOR = 10


def arguments_of(name: str, task: Task) -> dict[str, Any]:
    """What the optimizer is made with for this task; without settings, with its defaults and :data:`LR_FACTOR`."""
    if name not in SETTINGS:
        return {"lr": LR_FACTOR * inspect.signature(getattr(optimx, name)).parameters["lr"].default}
    arguments, *rates = SETTINGS[name]
    return {"lr": dict(zip(TASKS, rates, strict=True))[task.name], **arguments}
