"""``scheduler.step()`` beside torch's LambdaLR: ``python -m pytest bench/test_schedulers.py --benchmark-only``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

from optimx.lr_scheduler import WarmupCosineLR

WARMUP, TOTAL = 500, 10_000


def cosine(step: int) -> float:
    """As training scripts write it by hand."""
    if step < WARMUP:
        return step / WARMUP
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - WARMUP) / (TOTAL - WARMUP))))


CONTESTANTS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR-cosine": lambda optimizer: LambdaLR(optimizer, cosine),
    "LambdaLR-constant": lambda optimizer: LambdaLR(optimizer, lambda step: 1.0),
    "WarmupCosineLR": lambda optimizer: WarmupCosineLR(optimizer, WARMUP, TOTAL),
}


@pytest.mark.parametrize("groups", [1, 26])
@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_scheduler_step(benchmark: Any, contestant: str, groups: int) -> None:
    benchmark.group = f"scheduler.step(), {groups} groups"
    params = [{"params": [Parameter(torch.zeros(1))], "lr": 1e-3 * 0.9**i} for i in range(groups)]
    optimizer = torch.optim.AdamW(params)
    scheduler = CONTESTANTS[contestant](optimizer)
    optimizer.step()
    benchmark.pedantic(scheduler.step, rounds=400, iterations=20, warmup_rounds=20)
