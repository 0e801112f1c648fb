"""The picture of a watched run: a small GPT whose learning rate is too large for a while."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib import rc_context

import optimx
from bench.chart_style import STYLE
from bench.corpus import Corpus
from bench.gpt import GPT, GPTConfig

STEPS = 400
EVERY = 5
MODEL = GPTConfig(context=32, layers=4, heads=4, width=64)
#: Steps in which the learning rate is so many times larger, as if someone had mistyped it.
MISTAKE, FACTOR = range(200, 240), 30.0
MAX_GRAD_NORM = 1.0
LEARNING_RATE = optimx.lr_scheduler.Warmup(40) >> optimx.lr_scheduler.Cosine(STEPS - 40)


def run() -> optimx.Watcher:
    """Train, and return the watcher of it."""
    torch.manual_seed(0)
    model = GPT(MODEL)
    optimizer = optimx.AdamW(model.named_parameters(), lr=1e-3, weight_decay=0.1, max_grad_norm=MAX_GRAD_NORM)
    watcher = optimx.watch(optimizer, every=EVERY)
    for step, tokens in enumerate(Corpus().batches(STEPS, 8, MODEL.context + 1, seed=0), 1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * LEARNING_RATE(step) * (FACTOR if step in MISTAKE else 1.0)
        model.zero_grad()
        model.loss(tokens).backward()
        optimizer.step()
    watcher.flush()
    return watcher


def draw(path: Path) -> None:
    """Write a PNG: update ratios of all layers, gradient norms below."""
    watcher = run()
    with rc_context(STYLE):
        watcher.plot(path)
