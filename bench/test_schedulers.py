"""What does ``scheduler.step()`` cost, beside torch's LambdaLR?"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from bench.case import Case, Target
from bench.contestants import Run
from bench.suite import contests
from optimx.lr_scheduler import WarmupCosineLR

# longer than any measurement: past the end there is less to do
WARMUP, TOTAL = 500, 100_000
REPEAT = 100
BY_HAND, CONSTANT, OURS = "LambdaLR, cosine", "LambdaLR, constant", "WarmupCosineLR"


def cosine(step: int) -> float:
    """As training scripts write it by hand."""
    if step < WARMUP:
        return step / WARMUP
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - WARMUP) / (TOTAL - WARMUP))))


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    BY_HAND: lambda optimizer: LambdaLR(optimizer, cosine),
    CONSTANT: lambda optimizer: LambdaLR(optimizer, lambda step: 1.0),
    OURS: lambda optimizer: WarmupCosineLR(optimizer, WARMUP, TOTAL),
}


def scheduler_step(case: Case, *, name: str) -> Run:
    """REPEAT calls, each for one group a tensor."""
    params = [{"params": [Parameter(torch.zeros(shape))], "lr": 1e-3 * 0.9**i} for i, shape in enumerate(case.shapes)]
    optimizer = torch.optim.AdamW(params)
    scheduler = SCHEDULERS[name](optimizer)
    optimizer.step()

    def step() -> None:
        for _ in range(REPEAT):
            scheduler.step()

    return Run(lambda: None, step)


CASES = [
    Case(
        f"scheduler-{groups}-groups",
        [(1,)] * groups,
        {name: partial(scheduler_step, name=name) for name in SCHEDULERS},
        BY_HAND,
        groups=groups,
        repeat=REPEAT,
        targets=(Target(OURS, "speed", 1.0, BY_HAND),) if groups > 1 else (),
    )
    for groups in (1, 26)
]


@contests(CASES)
def test_scheduler(enter, case: Case, contestant: str) -> None:
    enter(case, contestant)
