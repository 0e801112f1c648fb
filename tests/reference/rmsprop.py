"""RMSprop, on lists of float64 numbers.

Plain: https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf, slide 29. Centered and with momentum:
https://arxiv.org/abs/1308.0850, equations 38 to 45. torch differs:

- ``eps`` is added to the root; the paper adds it to the variance, under the root.
- The learning rate scales the momentum when it is applied; the paper's momentum accumulates updates that contain it.
- Weight decay is an L2 penalty: it goes through both averages.

Under constant gradients the centered variance goes to 0, and rounding can make it negative: torch's step is then nan,
and here ``math.sqrt`` raises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def rmsprop(
    theta: Sequence[float],
    gradients: Sequence[Sequence[float]],
    *,
    lr: float = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
) -> list[float]:
    """Parameters after ``len(gradients)`` steps."""
    result = list(theta)
    for i in range(len(result)):
        square = mean = velocity = 0.0
        for gradient in gradients:
            g = -gradient[i] if maximize else gradient[i]
            g += weight_decay * result[i]
            square = alpha * square + (1 - alpha) * g * g
            mean = alpha * mean + (1 - alpha) * g
            variance = square - mean * mean if centered else square
            velocity = momentum * velocity + g / (math.sqrt(variance) + eps)
            result[i] -= lr * velocity
    return result
