"""NAdam, on lists of float64 numbers.

https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ, algorithm 2. torch differs:

- The momentum schedule is fixed, ``mu_t = beta1 * (1 - 0.96 ** (t * momentum_decay) / 2)``: the one that the paper's
  experiments use, with beta1 = 0.99 and momentum_decay = 1 / 250.
- The schedule weights the two parts of the update; the average m uses the constant beta1, the paper's mu_t.
- Weight decay, which the paper does not have, is an L2 penalty; with ``decoupled_weight_decay`` it scales the
  parameters by ``1 - lr * weight_decay`` first (https://arxiv.org/abs/1711.05101).

torch keeps the product of mu in the default dtype, not in the parameters': even if those are float64, usually float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def nadam(
    theta: Sequence[float],
    gradients: Sequence[Sequence[float]],
    *,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> list[float]:
    """Parameters after ``len(gradients)`` steps."""
    beta1, beta2 = betas

    def mu(t: int) -> float:
        return beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))

    result = list(theta)
    for i in range(len(result)):
        m = v = 0.0
        mu_product = 1.0
        for t, gradient in enumerate(gradients, start=1):
            g = -gradient[i] if maximize else gradient[i]
            if decoupled_weight_decay:
                result[i] -= lr * weight_decay * result[i]
            else:
                g += weight_decay * result[i]
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            mu_product *= mu(t)
            from_gradient = (1 - mu(t)) * g / (1 - mu_product)
            from_average = mu(t + 1) * m / (1 - mu_product * mu(t + 1))
            v_hat = v / (1 - beta2**t)
            result[i] -= lr * (from_gradient + from_average) / (math.sqrt(v_hat) + eps)
    return result
