"""Lion, on lists of float64 numbers.

https://arxiv.org/abs/2302.06675, algorithm 2: ``weight_decay`` is decoupled, the paper's lambda. sign(0) is 0. With
``cautious="last_mean"`` the share of the step before divides, which is kept in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float


def lion(
    theta: Sequence[float],
    gradients: Sequence[Sequence[float]],
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    maximize: bool = False,
    cautious: bool | str = False,
    cautious_weight_decay: bool = False,
) -> list[float]:
    """Parameters after ``len(gradients)`` steps."""
    beta1, beta2 = betas
    result, m = list(theta), [0.0] * len(theta)
    last = 1.0
    for gradient in gradients:
        steps = []
        for i, g in enumerate(gradient):
            g = -g if maximize else g
            # the update reads the previous average, so the momentum moves last
            c = beta1 * m[i] + (1 - beta1) * g
            sign = (c > 0) - (c < 0)
            steps.append(sign if sign * g > 0 or not cautious else 0)
            m[i] = beta2 * m[i] + (1 - beta2) * g
        share = sum(map(abs, steps)) / len(steps) if cautious else 1.0
        if cautious == "last_mean":
            share, last = last, c_float(share).value or last
        for i, step in enumerate(steps):
            decays = step * result[i] >= 0 or not cautious_weight_decay
            result[i] -= lr * (step / max(share, 1e-3) + weight_decay * result[i] * decays)
    return result
