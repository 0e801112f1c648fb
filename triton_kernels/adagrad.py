"""Adagrad.

Bytes a parameter, float32: param 4+4, grad 4, sum 4+4 = 20.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import divide, gradient_factor, save, sqrt, with_l2

RAW = ("lr", "lr_decay", "weight_decay", "eps", "maximize")
HYPER = ("factor", "l2", "step_size", "eps")


@triton.jit
def prepare(raw, scalars):
    lr, lr_decay, weight_decay, eps, maximize = raw
    row = (gradient_factor(maximize), weight_decay, lr / (1.0 + scalars[0] * lr_decay), eps)
    return row, (scalars[0] + 1.0,)


@triton.jit
def update(p, g, states, hyper, VARIANT: tl.constexpr, out):
    """States: sum."""
    l2, step_size, eps = hyper
    g = with_l2(g, p, l2)
    total = states[0] + g * g
    save(out, 0, total)
    return p - divide(step_size * g, sqrt(total) + eps)
