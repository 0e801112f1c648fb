"""The picture of a watched run: a small GPT whose learning rate is too large for a while.

What the watcher gets is measured here by a plain loop over the parameters, around the step.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from matplotlib import rc_context
from torch import Tensor, nn

import optimx
from bench.chart_style import STYLE
from bench.corpus import Corpus
from bench.gpt import GPT, GPTConfig
from optimx._engine.measured import Measured

STEPS = 400
EVERY = 5
MODEL = GPTConfig(context=32, layers=4, heads=4, width=64)
#: Steps in which the learning rate is so many times larger, as if someone had mistyped it.
MISTAKE, FACTOR = range(200, 240), 30.0
MAX_GRAD_NORM = 1.0
LEARNING_RATE = optimx.lr_scheduler.Warmup(40) >> optimx.lr_scheduler.Cosine(STEPS - 40)


class Ruler:
    """Measures a step of an optimizer of which the first moments are called ``exp_avg``."""

    def __init__(self, optimizer: torch.optim.Optimizer, watcher: optimx.Watcher) -> None:
        self._optimizer = optimizer
        self._watcher = watcher

    def step(self, step: int) -> None:
        """Make the optimizer's step, and hand the watcher what it has been."""
        params = self._watcher.params
        if step % self._watcher.every:
            nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
            self._optimizer.step()
            return
        grads = [param.grad.double() for param in params]
        before = [param.detach().double() for param in params]
        moments = [self._moment(param) for param in params]
        norm = nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM).item()
        self._optimizer.step()
        after = [param.detach().double() for param in params]
        sums = {
            "grad_sq": [grad.square().sum().item() for grad in grads],
            "grad_max": [grad.abs().max().item() for grad in grads],
            "grad_zeros": [float((grad == 0).sum()) for grad in grads],
            "param_sq": [param.square().sum().item() for param in after],
            "update_sq": [(a - b).square().sum().item() for a, b in zip(after, before, strict=True)],
            "moment_sq": [moment.square().sum().item() for moment in moments],
            "grad_moment": [(grad * moment).sum().item() for grad, moment in zip(grads, moments, strict=True)],
        }
        factor = min(1.0, MAX_GRAD_NORM / (norm + 1e-6)) if math.isfinite(norm) else 1.0
        self._watcher.receive(Measured(step, sums, {"grad_norm": norm, "clip_factor": factor, "skipped": 0.0}))

    def _moment(self, param: Tensor) -> Tensor:
        state = self._optimizer.state[param]
        return state["exp_avg"].double() if state else torch.zeros_like(param, dtype=torch.float64)


def run() -> optimx.Watcher:
    """Train, and return the watcher of it."""
    torch.manual_seed(0)
    model = GPT(MODEL)
    optimizer = optimx.AdamW(model.named_parameters(), lr=1e-3, weight_decay=0.1)
    watcher = optimx.watch(optimizer, every=EVERY)
    ruler = Ruler(optimizer, watcher)
    for step, tokens in enumerate(Corpus().batches(STEPS, 8, MODEL.context + 1, seed=0), 1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * LEARNING_RATE(step) * (FACTOR if step in MISTAKE else 1.0)
        model.zero_grad()
        model.loss(tokens).backward()
        ruler.step(step)
    return watcher


def draw(path: Path) -> None:
    """Write a PNG: update ratios of all layers, gradient norms below."""
    watcher = run()
    with rc_context(STYLE):
        watcher.plot(path)
