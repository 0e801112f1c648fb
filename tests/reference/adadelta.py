"""Adadelta, on lists of float64 numbers.

https://arxiv.org/abs/1212.5701, algorithm 1, which has neither a learning rate nor weight decay. torch adds both:

- ``lr`` scales what is applied, not what is averaged: the updates' average does not depend on it.
- Weight decay is an L2 penalty: it goes through both averages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def adadelta(
    theta: Sequence[float],
    gradients: Sequence[Sequence[float]],
    *,
    lr: float = 1.0,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> list[float]:
    """Parameters after ``len(gradients)`` steps."""
    result = list(theta)
    for i in range(len(result)):
        square = update_square = 0.0
        for gradient in gradients:
            g = -gradient[i] if maximize else gradient[i]
            g += weight_decay * result[i]
            square = rho * square + (1 - rho) * g * g
            update = math.sqrt(update_square + eps) / math.sqrt(square + eps) * g
            update_square = rho * update_square + (1 - rho) * update * update
            result[i] -= lr * update
    return result
