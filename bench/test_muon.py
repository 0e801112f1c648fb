"""What does Muon cost, where torch orthogonalizes one matrix after the other?

Gradients are fresh in every call. Products are in bfloat16 on both sides, on what the processor has for it.
"""

from __future__ import annotations

from functools import partial

import torch

import optimx
from bench import shapes
from bench.case import DEFAULT, OURS, Case, at_least
from bench.contestants import plain_step
from bench.suite import contests

#: Matrices of blocks alone, without embeddings and heads.
VIT, GPT2 = (
    [shape for shape in shapes.sized_down(model, 4) if len(shape) == 2 and max(shape) % min(shape) == 0]
    for model in (shapes.vit(), shapes.gpt2())
)


def muon(name: str, matrices: list[tuple[int, ...]], bound: float, device: str = "cpu") -> Case:
    contestants = {DEFAULT: partial(plain_step, module=torch.optim), OURS: partial(plain_step, module=optimx)}
    target = at_least(bound, against=DEFAULT)
    return Case(name, matrices, contestants, DEFAULT, device=device, optimizer="Muon", targets=(target,))


def cases(device: str, prefix: str = "muon") -> list[Case]:
    return [
        muon(f"{prefix}-256x16x16", [(16, 16)] * 256, 20, device),
        muon(f"{prefix}-64x64x64", [(64, 64)] * 64, 6, device),
        muon(f"{prefix}-vit-b16", VIT, 4, device),
        muon(f"{prefix}-gpt2", GPT2, 1.5, device),
    ]


CASES = [*cases("cpu"), *cases("cuda", "gpu-muon")]


@contests(CASES)
def test_muon(enter, case: Case, contestant: str) -> None:
    enter(case, contestant)
