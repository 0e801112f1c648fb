"""SGD with momentum, on lists of float64 numbers.

Momentum and Nesterov's momentum: https://proceedings.mlr.press/v28/sutskever13.html, equations 1 to 4. torch differs:

- The learning rate scales the velocity when it is applied (the paper adds ``lr * g`` to it), so that a new learning
  rate acts on all of the past at once.
- The first velocity is the gradient itself, without dampening; the paper has none (``dampening=0``).
- Nesterov's gradient is taken where the parameters are, and the update looks one velocity ahead instead.
- Weight decay is an L2 penalty: it goes through the momentum.
"""

from __future__ import annotations

from collections.abc import Sequence


def sgd(
    theta: Sequence[float],
    gradients: Sequence[Sequence[float]],
    *,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> list[float]:
    """Parameters after ``len(gradients)`` steps."""
    result = list(theta)
    for i in range(len(result)):
        velocity = 0.0
        for t, gradient in enumerate(gradients, start=1):
            g = -gradient[i] if maximize else gradient[i]
            g += weight_decay * result[i]
            velocity = g if t == 1 else momentum * velocity + (1 - dampening) * g
            if momentum == 0:
                # without momentum nothing is dampened either
                update = g
            elif nesterov:
                update = g + momentum * velocity
            else:
                update = velocity
            result[i] -= lr * update
    return result
