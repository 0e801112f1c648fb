"""Rprop, on lists of float64 numbers.

https://doi.org/10.1109/ICNN.1993.298623; torch's is the variant iRprop- of
https://doi.org/10.1016/S0925-2312(01)00700-7:

- Where the gradient's sign has changed, the step size shrinks and the parameter stays; the 1993 paper takes its last
  step back. Either way the next step neither grows nor shrinks the step size, because the stored gradient is 0.
- ``lr`` is the first step size (the papers' 0.1) and nothing else: a learning rate that changes later has no effect.
- Step sizes are clamped before each use, the first one included.
"""

from __future__ import annotations

from collections.abc import Sequence


def rprop(
    theta: Sequence[float],
    gradients: Sequence[Sequence[float]],
    *,
    lr: float = 1e-2,
    etas: tuple[float, float] = (0.5, 1.2),
    step_sizes: tuple[float, float] = (1e-6, 50),
    maximize: bool = False,
) -> list[float]:
    """Parameters after ``len(gradients)`` steps."""
    shrink, grow = etas
    smallest, largest = step_sizes
    result = list(theta)
    for i in range(len(result)):
        previous, step_size = 0.0, lr
        for gradient in gradients:
            g = -gradient[i] if maximize else gradient[i]
            if g * previous > 0:
                step_size *= grow
            elif g * previous < 0:
                step_size *= shrink
                g = 0.0
            step_size = min(max(step_size, smallest), largest)
            if g > 0:
                result[i] -= step_size
            elif g < 0:
                result[i] += step_size
            previous = g
    return result
