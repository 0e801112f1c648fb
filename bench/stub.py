"""The host's part of a step where there is no GPU: on the fake device and the stub driver of ``tests/fake_gpu``.

Plans, launches and Triton's launcher are those of a GPU; a real driver adds some microseconds a launch and a copy. Of
torch's fused step it is the Python part: the operators, which launch kernels, are left out, as kernels are.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import optimx
from bench.case import NO_SYNC, OURS, Case, Target
from bench.contestants import MAX_NORM, Model, Run, optimizer_of

TORCH_PART = "torch fused, Python"
INSIDE = f"{OURS} max_grad_norm"
MISSING = f"{OURS}, a tenth missing"
#: Microseconds a step, by number of tensors; with clipping, and with a tenth of the gradients missing, that much more.
TARGETS = {1: 25.0, 10: 30.0, 100: 60.0, 1000: 350.0}
CLIP, MISSING_FACTOR = 25.0, 1.5


class TwoGradients(Model):
    """Gradients are new tensors each step, and lie where those of the step before the last lay, as in training."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self._places = [self.grads, [grad.clone() for grad in self.grads]]

    def backward(self) -> None:
        self._places.reverse()
        for param, grad in zip(self.params, self._places[0], strict=True):
            param.grad = grad.detach()


class SomeGradients(TwoGradients):
    """A tenth of the gradients, another one each step, is missing: experts that got no token."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self._random = random.Random(0)

    def backward(self) -> None:
        super().backward()
        for param in self._random.sample(self.params, len(self.params) // 10):
            param.grad = None


def optimx_part(case: Case, *, model: Callable[[Case], Model] = TwoGradients, **options: Any) -> Run:
    made = model(case)
    optimizer = optimizer_of(case, optimx, made, **options)
    return Run(made.backward, optimizer.step, optimizer)


def torch_part(case: Case) -> Run:
    made = TwoGradients(case)
    optimizer = optimizer_of(case, torch.optim, made, fused=True)
    made.backward()
    optimizer.step()
    operators = torch._fused_adamw_, torch._foreach_add_

    def step() -> None:
        torch._fused_adamw_ = torch._foreach_add_ = _nothing
        try:
            optimizer.step()
        finally:
            torch._fused_adamw_, torch._foreach_add_ = operators

    return Run(made.backward, step, optimizer)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def host_part(count: int) -> Case:
    contestants: dict[str, Callable[[Case], Run]] = {
        TORCH_PART: torch_part,
        OURS: optimx_part,
        INSIDE: partial(optimx_part, max_grad_norm=MAX_NORM),
    }
    bound = TARGETS[count]
    targets = [
        Target(OURS, "us_per_tensor", bound / count),
        Target(INSIDE, "us_per_tensor", (bound + CLIP) / count),
        NO_SYNC,
    ]
    if count == max(TARGETS):
        contestants[MISSING] = partial(optimx_part, model=SomeGradients)
        targets.append(Target(MISSING, "speed", 1 / MISSING_FACTOR, OURS))
    return Case(
        f"host-stub-{count}", [(64,)] * count, contestants, TORCH_PART, device="cuda", clock="cpu", stub=True,
        targets=tuple(targets),
    )  # fmt: skip


CASES = [host_part(count) for count in TARGETS]
