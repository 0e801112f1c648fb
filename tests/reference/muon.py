"""Muon, on float64 matrices.

https://kellerjordan.github.io/posts/muon, with torch's names: momentum is an average, and weight decay is decoupled.
Nothing is rounded, so an implementation in 16 bits is near to it, and no nearer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def polynomial(singular: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """What iterations make of singular values."""
    for a, b, c in coefficients:
        singular = a * singular + b * singular**3 + c * singular**5
    return singular


def muon(
    theta: Tensor,
    gradients: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    coefficients: Sequence[tuple[float, float, float]] = ((3.4445, -4.7750, 2.0315),) * 5,
    safety: float = 1.0,
    times: float | None = None,
    beta2: float | None = None,
    cautious: bool = False,
) -> Tensor:
    """The matrix after ``len(gradients)`` steps, whose sizes are ``lr * times``; None: torch's "original".

    With ``beta2`` rows are normalized as in NorMuon (https://arxiv.org/abs/2510.05491); ``cautious`` weights decay only
    where the step does not move them away from zero.
    """
    rows, columns = theta.shape
    row_average = torch.zeros(rows, 1, dtype=torch.float64)
    times = max(1.0, rows / columns) ** 0.5 if times is None else times
    result, average = theta.double(), torch.zeros(rows, columns, dtype=torch.float64)
    for gradient in gradients:
        g = gradient.double()
        average = momentum * average + (1 - momentum) * g
        update = (1 - momentum) * g + momentum * average if nesterov else average
        u, singular, vh = torch.linalg.svd(update, full_matrices=False)
        singular = polynomial(singular / (singular.norm() * safety), coefficients)
        step = (u * singular) @ vh
        if beta2 is not None:
            row_average = beta2 * row_average + (1 - beta2) * (step**2).mean(1, keepdim=True)
            normalized = step / (row_average.sqrt() + 1e-8)
            step = normalized * step.norm() / normalized.norm()
        decays = (result * step >= 0) if cautious else torch.ones_like(result)
        result = result - lr * weight_decay * decays * result - lr * times * step
    return result
