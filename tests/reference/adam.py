"""Adam and AdamW written from the papers, on lists of float64 numbers.

Adam: https://arxiv.org/abs/1412.6980, algorithm 1. AMSGrad: https://openreview.net/forum?id=ryQu7f-RZ, algorithm 2
(with bias correction, as torch has it). AdamW: https://arxiv.org/abs/1711.05101, algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def adam(
    theta: Sequence[float],
    gradients: Sequence[Sequence[float]],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> list[float]:
    """Parameters after ``len(gradients)`` steps."""
    beta1, beta2 = betas
    result = list(theta)
    for i in range(len(result)):
        m = v = v_max = 0.0
        for t, gradient in enumerate(gradients, start=1):
            g = -gradient[i] if maximize else gradient[i]
            if decoupled_weight_decay:
                result[i] -= lr * weight_decay * result[i]
            else:
                g += weight_decay * result[i]
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            v_max = max(v_max, v)
            m_hat = m / (1 - beta1**t)
            v_hat = (v_max if amsgrad else v) / (1 - beta2**t)
            result[i] -= lr * m_hat / (math.sqrt(v_hat) + eps)
    return result
