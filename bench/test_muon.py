"""What does Muon cost, where torch orthogonalizes one matrix after the other?

Products are in bfloat16 on all sides, on what the processor has for it. The "elementwise" cases have no iterations, so
no products: their step is held against AdamW's on the same matrices.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import optimx
from bench import shapes
from bench.case import COPY, DEFAULT, OURS, Case, at_least
from bench.catalogue import cost_of
from bench.contestants import device_copy, plain_step
from bench.suite import LARGE, contests, steps

ADAMW = "optimx AdamW"
#: By how much a CPU has the models sized down.
FACTOR = 4
#: Matrices of a model's blocks, and how many times as fast as torch's a step should be.
MODELS: dict[str, tuple[list[shapes.Shape], float]] = {
    "vit-126": (shapes.vit_matrices(), 4),
    "vit-b16": (shapes.repeated_matrices(shapes.vit()), 4),
    "gpt2-124m": (shapes.repeated_matrices(shapes.gpt2()), 1.5),
}


def whole(name: str, matrices: list[shapes.Shape], bound: float, **settings: Any) -> Case:
    targets = (at_least(bound, against=DEFAULT),)
    return Case(name, matrices, steps("Muon"), DEFAULT, optimizer="Muon", targets=targets, **settings)


def elementwise(name: str, matrices: list[shapes.Shape], **settings: Any) -> Case:
    """Momentum, norm and update, which should take at most 1.2 times as long as AdamW."""
    step = partial(plain_step, module=optimx)
    contestants = {ADAMW: partial(step, optimizer="AdamW"), OURS: partial(step, coefficients=()), COPY: device_copy}
    traffic = {ADAMW: cost_of("AdamW", {}).moved, OURS: cost_of("Muon", {}).moved}
    targets = (at_least(round(1 / 1.2, 3), against=ADAMW),)
    return Case(name, matrices, contestants, ADAMW, optimizer="Muon", traffic=traffic, targets=targets, **settings)


def cases(device: str, prefix: str = "") -> list[Case]:
    factor = FACTOR if device == "cpu" else 1
    found = [
        whole(f"{prefix}muon-256x16x16", [(16, 16)] * 256, 20, device=device),
        whole(f"{prefix}muon-64x64x64", [(64, 64)] * 64, 6, device=device),
    ]
    for model, (matrices, bound) in MODELS.items():
        label = model if factor == 1 else f"{model} / {factor}"
        sized = shapes.sized_down(matrices, factor)
        found.append(whole(f"{prefix}muon-{model}", sized, bound, device=device, model=label))
        if model == "gpt2-124m":
            found.append(elementwise(f"{prefix}muon-elementwise-{model}", sized, device=device, model=label))
    return [*found, elementwise(f"{prefix}muon-elementwise-4x4M", LARGE, device=device)]


CASES = [*cases("cpu"), *cases("cuda", "gpu-")]


@contests(CASES)
def test_muon(enter, case: Case, contestant: str) -> None:
    enter(case, contestant)
