"""What a step of Muon computes and moves, against formulas of five iterations."""

from __future__ import annotations

import pytest

from bench import shapes
from bench.muon_cost import FORMS, step_cost

GPT2 = [(768, 2304), (768, 768), (768, 3072), (3072, 768)] * 12
LLAMA_8B = shapes.llama_matrices(4096, 14_336, 1024) * 32


@pytest.mark.parametrize(
    ("matrices", "params", "teraflops"),
    [(GPT2, 84.9e6, (1.52, 1.09, 0.70)), (LLAMA_8B, 6.98e9, (666, 472, 322))],
    ids=["gpt2", "llama-3-8b"],
)
def test_models(matrices: list[tuple[int, int]], params: float, teraflops: tuple[float, ...]) -> None:
    costs = [step_cost(matrices, form) for form in FORMS]
    assert all(cost.params == pytest.approx(params, rel=1e-3) for cost in costs)
    assert all(cost.elementwise_bytes == 28 * cost.params for cost in costs)
    assert [cost.flops / 1e12 for cost in costs] == pytest.approx(teraflops, rel=7e-3)


@pytest.mark.parametrize("shape", [(512, 2048), (2048, 512)])
def test_formulas(shape: tuple[int, int]) -> None:
    m, n = 512, 2048
    standard, symmetric, gram = (step_cost([shape], form) for form in FORMS)
    assert standard.flops == 20 * m * m * n + 10 * m**3
    assert symmetric.flops == 15 * m * m * n + 5 * m**3
    assert gram.flops == 6 * m * m * n + 14 * m**3
    # a symmetric result is written as a whole
    assert standard.product_bytes == symmetric.product_bytes == 5 * (6 * m * n + 8 * m * m)
    assert gram.product_bytes == 2 * (6 * m * n + 41 * m * m)
    assert step_cost([shape], "gram", itemsize=4).product_bytes == 2 * gram.product_bytes


@pytest.mark.parametrize("iterations", range(8))
def test_iterations(iterations: int) -> None:
    """Alike on both forms where one is all that there is; on squares there is no Gram form."""
    plain, gram = (step_cost([(8, 16)], form, iterations) for form in ("symmetric", "gram"))
    assert (plain.flops == gram.flops) == (iterations in (0, 1))
    assert gram.flops <= plain.flops
    assert step_cost([(8, 8)], "gram", iterations) == step_cost([(8, 8)], "symmetric", iterations)


def test_unknown_form() -> None:
    with pytest.raises(ValueError, match="form should be one of standard, symmetric, gram but is: square"):
        step_cost([(8, 8)], "square")
