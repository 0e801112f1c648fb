"""What does a step cost beside its arithmetic? Tensors of a few elements; on a GPU, the time until the call returns.

With ``--stub``, where there is no GPU, what the host pays for a step on one: see ``bench/stub.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench import stub
from bench.case import FUSED, NO_SYNC, OURS, Case, Target
from bench.contestants import Model, Run, optimx_step, torch_step
from bench.suite import SMALL, contests

OPERATOR = "torch's operator"
PLAIN = {FUSED: partial(torch_step, fused=True), OURS: optimx_step}


def operator_step(case: Case) -> Run:
    """What both sides call on a CPU, and nothing around it: the lists are made once, nothing is checked or counted."""
    model = Model(case)
    optimizer = torch.optim.AdamW(model.params, fused=True)
    model.backward()
    optimizer.step()
    states = list(optimizer.state.values())
    exp_avgs, exp_avg_sqs, counts = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
    grads: list[torch.Tensor] = []

    def prepare() -> None:
        model.backward()
        grads[:] = [p.grad for p in model.params]

    @torch.no_grad()
    def step() -> None:
        torch._fused_adamw_(
            model.params, grads, exp_avgs, exp_avg_sqs, [], counts,
            amsgrad=False, lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8, maximize=False,
        )  # fmt: skip

    return Run(prepare, step)


def host(count: int, contestants: dict[str, Callable[[Case], Run]]) -> Case:
    return Case(f"host-{count}x4", SMALL[:1] * count, contestants, FUSED, clock="host")


CASES = [
    *(host(count, {**PLAIN, OPERATOR: operator_step}) for count in (1, 100, 1000)),
    Case(
        "host-1000-tensors", [(64,)] * 1000, PLAIN, FUSED, device="cuda", clock="host",
        targets=(Target(OURS, "us_per_tensor", 0.5), NO_SYNC),
    ),
    *stub.CASES,
]  # fmt: skip


@contests(CASES)
def test_host(enter, case: Case, contestant: str) -> None:
    enter(case, contestant)
