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
) -> Tensor:
    """The matrix after ``len(gradients)`` steps, whose sizes are ``lr * times``; None: torch's "original"."""
    rows, columns = theta.shape
    times = max(1.0, rows / columns) ** 0.5 if times is None else times
    result, average = theta.double(), torch.zeros(rows, columns, dtype=torch.float64)
    for gradient in gradients:
        g = gradient.double()
        average = momentum * average + (1 - momentum) * g
        update = (1 - momentum) * g + momentum * average if nesterov else average
        u, singular, vh = torch.linalg.svd(update, full_matrices=False)
        singular = polynomial(singular / (singular.norm() * safety), coefficients)
        result = result * (1 - lr * weight_decay) - lr * times * (u * singular) @ vh
    return result
