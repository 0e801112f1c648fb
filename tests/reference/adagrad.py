"""Adagrad, on lists of float64 numbers.

https://jmlr.org/papers/v12/duchi11a.html, figure 1 with diagonal matrices, without a regulariser or a constraint.
``eps`` is the paper's delta. torch adds:

- ``lr_decay``: the rate of step t is ``lr / (1 + (t - 1) * lr_decay)``.
- ``initial_accumulator_value``: what the sum of squares starts at; the paper's starts at 0.
- Weight decay as an L2 penalty: it goes into the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def adagrad(
    theta: Sequence[float],
    gradients: Sequence[Sequence[float]],
    *,
    lr: float = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
) -> list[float]:
    """Parameters after ``len(gradients)`` steps."""
    result = list(theta)
    for i in range(len(result)):
        total = initial_accumulator_value
        for t, gradient in enumerate(gradients, start=1):
            g = -gradient[i] if maximize else gradient[i]
            g += weight_decay * result[i]
            total += g * g
            result[i] -= lr / (1 + (t - 1) * lr_decay) * g / (math.sqrt(total) + eps)
    return result
