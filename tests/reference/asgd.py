"""Averaged SGD, on lists of float64 numbers.

The average: https://doi.org/10.1137/0330046. The schedules of the rate and of the average's weight:
https://arxiv.org/abs/1107.2490, as in Bottou's sgd-2.0 and Torch 7. torch differs:

- The schedules take effect one step later: step t uses ``eta = lr / (1 + lambd * lr * (t - 1)) ** alpha`` and
  ``mu = 1 / max(1, t - 1 - t0)``, so that the first rate is lr itself and averaging starts at step t0 + 3.
- ``lambd`` decays the parameters (decoupled) and the rate; ``weight_decay`` is an L2 penalty besides.
- Averages do not influence the parameters. Until mu falls below 1 they are the parameters.

torch keeps eta and mu in the default dtype, not in the parameters': even if those are float64, usually float32.
"""

from __future__ import annotations

from collections.abc import Sequence


def asgd(
    theta: Sequence[float],
    gradients: Sequence[Sequence[float]],
    *,
    lr: float = 1e-2,
    lambd: float = 1e-4,
    alpha: float = 0.75,
    t0: float = 1e6,
    weight_decay: float = 0.0,
    maximize: bool = False,
    averaged: bool = False,
) -> list[float]:
    """Parameters after ``len(gradients)`` steps; with ``averaged`` their average, torch's state ``ax``."""
    result = list(theta)
    averages = list(theta)
    for i in range(len(result)):
        for t, gradient in enumerate(gradients, start=1):
            g = -gradient[i] if maximize else gradient[i]
            g += weight_decay * result[i]
            eta = lr / (1 + lambd * lr * (t - 1)) ** alpha
            mu = 1 / max(1, t - 1 - t0)
            result[i] -= eta * (lambd * result[i] + g)
            averages[i] += mu * (result[i] - averages[i])
    return averages if averaged else result
