"""Schedule-free SGD, on lists of float64 numbers: https://arxiv.org/abs/2405.15682, equations 6 to 8.

Written as in the paper, with all three sequences; the code of its authors, facebookresearch/schedule_free, differs:

- It keeps y and z, and x only implicitly.
- Iterates count in the average with the weight ``t**r * lr_max**weight_lr_power``, the paper's being the square of
  the learning rate; lr_max is the largest one so far, warmup included.
"""

from __future__ import annotations

from collections.abc import Sequence


def schedule_free_sgd(
    theta: Sequence[float],
    gradients: Sequence[Sequence[float]],
    *,
    lr: float = 1.0,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    maximize: bool = False,
    evaluated: bool = False,
) -> list[float]:
    """Parameters after ``len(gradients)`` steps: y, or x if ``evaluated``."""
    result = []
    for i, start in enumerate(theta):
        x = y = z = start
        total = lr_max = 0.0
        for t, gradient in enumerate(gradients, start=1):
            g = -gradient[i] if maximize else gradient[i]
            gamma = lr * min(1.0, t / warmup_steps) if warmup_steps else lr
            lr_max = max(lr_max, gamma)
            weight = t**r * lr_max**weight_lr_power
            total += weight
            z -= gamma * (g + weight_decay * y)
            x += weight / total * (z - x) if total else 0.0
            y = (1 - momentum) * z + momentum * x
        result.append(x if evaluated else y)
    return result
