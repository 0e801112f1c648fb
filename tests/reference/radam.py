"""RAdam, on lists of float64 numbers.

https://arxiv.org/abs/1908.03265, algorithm 2. torch differs:

- The adaptive rate is used where rho_t > 5; the paper's threshold is 4.
- ``eps``, which the paper does not have, is added to the root of v *before* its bias is corrected: in early steps it
  counts for more than Adam's.
- Weight decay, which the paper does not have, is an L2 penalty; with ``decoupled_weight_decay`` it scales the
  parameters by ``1 - lr * weight_decay`` first (https://arxiv.org/abs/1711.05101).
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def radam(
    theta: Sequence[float],
    gradients: Sequence[Sequence[float]],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> list[float]:
    """Parameters after ``len(gradients)`` steps."""
    beta1, beta2 = betas
    rho_inf = 2 / (1 - beta2) - 1
    result = list(theta)
    for i in range(len(result)):
        m = v = 0.0
        for t, gradient in enumerate(gradients, start=1):
            g = -gradient[i] if maximize else gradient[i]
            if decoupled_weight_decay:
                result[i] -= lr * weight_decay * result[i]
            else:
                g += weight_decay * result[i]
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            update = m / (1 - beta1**t)
            rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
            if rho > 5:
                adaptive = math.sqrt(1 - beta2**t) / (math.sqrt(v) + eps)
                rectification = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
                update *= adaptive * rectification
            result[i] -= lr * update
    return result
