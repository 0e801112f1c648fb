"""Adamax, on lists of float64 numbers.

https://arxiv.org/abs/1412.6980, algorithm 2. torch differs:

- ``eps``, which the paper does not have, is added to the absolute gradient inside the maximum, so it decays with it.
- Weight decay, which the paper does not have, is an L2 penalty: it goes through both averages.
"""

from __future__ import annotations

from collections.abc import Sequence


def adamax(
    theta: Sequence[float],
    gradients: Sequence[Sequence[float]],
    *,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> list[float]:
    """Parameters after ``len(gradients)`` steps."""
    beta1, beta2 = betas
    result = list(theta)
    for i in range(len(result)):
        m = u = 0.0
        for t, gradient in enumerate(gradients, start=1):
            g = -gradient[i] if maximize else gradient[i]
            g += weight_decay * result[i]
            m = beta1 * m + (1 - beta1) * g
            u = max(beta2 * u, abs(g) + eps)
            result[i] -= lr / (1 - beta1**t) * m / u
    return result
