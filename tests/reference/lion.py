"""Lion, on lists of float64 numbers.

https://arxiv.org/abs/2302.06675, algorithm 2: ``weight_decay`` is decoupled, the paper's lambda. sign(0) is 0.
"""

from __future__ import annotations

from collections.abc import Sequence


def lion(
    theta: Sequence[float],
    gradients: Sequence[Sequence[float]],
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    maximize: bool = False,
    cautious_weight_decay: bool = False,
) -> list[float]:
    """Parameters after ``len(gradients)`` steps."""
    beta1, beta2 = betas
    result = list(theta)
    for i in range(len(result)):
        m = 0.0
        for gradient in gradients:
            g = -gradient[i] if maximize else gradient[i]
            # the update reads the previous average, so the momentum moves last
            c = beta1 * m + (1 - beta1) * g
            sign = (c > 0) - (c < 0)
            decays = sign * result[i] >= 0 or not cautious_weight_decay
            result[i] -= lr * (sign + weight_decay * result[i] * decays)
            m = beta2 * m + (1 - beta2) * g
    return result
