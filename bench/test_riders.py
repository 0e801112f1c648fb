"""What does it cost that statistics, rules about bad steps, and averages ride along with a step? Ten steps a call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import optimx
from bench.case import OURS, Case, Target
from bench.contestants import MAX_NORM, Model, Run, optimizer_of
from bench.suite import LARGE, SMALL, contests

STEPS, DECAY = 10, 0.999
NORMS, TWO = ("grad_norm", "param_norm"), ("grad_norm", "update_ratio")
CLIPPED, SKIPPING = "max_grad_norm", "skip_nonfinite"
WATCHED, RATIO, ALL = "watch, norms", "watch, ratio", "watch, all"
EMA, EVERY, TORCHS = "EMA", "EMA, every=10", "AveragedModel"


def ten_steps(case: Case, after: Callable[[Model, Any], Callable[[], object]] | None = None, **options: Any) -> Run:
    """Ten steps, with something after each."""
    model = Model(case)
    optimizer = optimizer_of(case, optimx, model, **options)
    also = None if after is None else after(model, optimizer)

    def steps() -> None:
        for _ in range(STEPS):
            optimizer.step()
            if also is not None:
                also()

    return Run(model.backward, steps, optimizer)


def watched(case: Case, stats: tuple[str, ...]) -> Run:
    run = ten_steps(case)
    assert run.optimizer is not None
    optimx.watch(run.optimizer, every=STEPS, stats=stats)
    return run


def torchs_average(model: Model, optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    holder = nn.Module()
    holder.params = nn.ParameterList(model.params)
    averaged = AveragedModel(holder, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    return partial(averaged.update_parameters, holder)


CONTESTANTS = {
    OURS: ten_steps,
    WATCHED: partial(watched, stats=NORMS),
    RATIO: partial(watched, stats=TWO),
    ALL: partial(watched, stats=(*optimx.watching.STATISTICS,)),
    CLIPPED: partial(ten_steps, max_grad_norm=MAX_NORM),
    SKIPPING: partial(ten_steps, max_grad_norm=MAX_NORM, skip_nonfinite=True, skip_spikes=True),
    EMA: partial(ten_steps, average=optimx.EMA(DECAY)),
    EVERY: partial(ten_steps, average=optimx.EMA(DECAY, every=STEPS)),
    TORCHS: partial(ten_steps, after=torchs_average),
}
riders = partial(
    Case, contestants=CONTESTANTS, baseline=OURS, targets=(Target(WATCHED, "speed", 1 / 1.05, OURS),),
)  # fmt: skip
SHAPES = {"4x4M": LARGE, "1000x4": SMALL, "1000x64": [(64,)] * 1000, "64x256x256": [(256, 256)] * 64}
CASES = [
    *(riders(f"riders-{name}", shapes) for name, shapes in SHAPES.items()),
    riders("riders-4x4M-sgd", LARGE, optimizer="SGD", kwargs={"momentum": 0.9}),
    riders("riders-llama-1b-layer", [(2048, 2048)] * 16, device="cuda", clock="device"),
]


@contests(CASES)
def test_riders(enter, case: Case, contestant: str) -> None:
    enter(case, contestant)
