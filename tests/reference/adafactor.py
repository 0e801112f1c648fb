"""Adafactor, on a list of float64 numbers that is one tensor.

https://arxiv.org/abs/1804.04235, algorithms 4 (matrices) and 5 (vectors), as transformers has them
(``variant="hf"``), and as torch does. Both take means of rows and columns where the paper takes sums: it is the same.
A tensor of more than two dimensions is a batch of matrices; lengths of its steps are those of the whole tensor.

- transformers: eps1 is added to the squared gradients, as in the paper. Decoupled weight decay, times the step size.
- torch: eps1 bounds the mean of the row averages, and its square the estimate. Weight decay times lr.
- ``relative_step``: the step size is ``1 / sqrt(t)``, ``lr`` at most, and with ``warmup_init`` ``1e-6 * t`` at most.
- ``beta1``: the step is an average of the updates (section 7 of the paper).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

EPS = 2.0**-52


def adafactor(
    theta: Sequence[float],
    gradients: Sequence[Sequence[float]],
    *,
    shape: Sequence[int] | None = None,
    lr: float = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
    variant: str = "torch",
    beta1: float | None = None,
    scale_parameter: bool = True,
    relative_step: bool = True,
    warmup_init: bool = False,
) -> list[float]:
    """Parameters after ``len(gradients)`` steps; ``theta`` is a vector unless ``shape`` says otherwise."""
    p = list(theta)
    n = len(p)
    is_matrix = shape is not None and len(shape) > 1
    n_rows, n_columns = (shape[-2], shape[-1]) if shape is not None and is_matrix else (1, n)
    n_matrices = n // (n_rows * n_columns)
    hf = variant == "hf"
    eps1 = eps[0] if eps[0] is not None else (1e-30 if hf else EPS)
    eps2 = eps[1]
    rows = [0.0] * (n_matrices * n_rows)
    columns = [0.0] * (n_matrices * n_columns)
    full = [0.0] * n
    moment = [0.0] * n
    for t, gradient in enumerate(gradients, start=1):
        omega = t**beta2_decay
        g = [-x for x in gradient] if maximize else list(gradient)
        rho = lr
        if relative_step:
            rho = min(lr, 1 / math.sqrt(t))
            if warmup_init:
                rho = min(rho, 1e-6 * t)
        alpha = rho * (max(eps2, math.hypot(*p) / math.sqrt(n)) if scale_parameter else 1.0)
        squares = [x * x + (eps1 if hf else 0.0) for x in g]
        estimate = []
        if is_matrix:
            for k in range(n_matrices):
                of_matrix = squares[k * n_rows * n_columns : (k + 1) * n_rows * n_columns]
                for i in range(n_rows):
                    mean = sum(of_matrix[i * n_columns : (i + 1) * n_columns]) / n_columns
                    rows[k * n_rows + i] += omega * (mean - rows[k * n_rows + i])
                for j in range(n_columns):
                    mean = sum(of_matrix[j::n_columns]) / n_rows
                    columns[k * n_columns + j] += omega * (mean - columns[k * n_columns + j])
                total = sum(rows[k * n_rows : (k + 1) * n_rows]) / n_rows
                total = total if hf else max(total, eps1)
                estimate += [
                    rows[k * n_rows + i] * columns[k * n_columns + j] / total
                    for i in range(n_rows)
                    for j in range(n_columns)
                ]
        else:
            full = [v + omega * (x - v) for v, x in zip(full, squares, strict=True)]
            estimate = full
        update = [
            x / math.sqrt(v if hf else max(v, eps1 * eps1)) if v or not hf else 0.0
            for x, v in zip(g, estimate, strict=True)
        ]
        length = math.hypot(*update) / math.sqrt(n)
        update = [alpha * x / max(1.0, length / d) for x in update]
        if beta1 is not None:
            moment = [beta1 * m + (1 - beta1) * x for m, x in zip(moment, update, strict=True)]
            update = moment
        decay = 1 - weight_decay * (alpha if hf else lr)
        p = [decay * x - u for x, u in zip(p, update, strict=True)]
    return p
