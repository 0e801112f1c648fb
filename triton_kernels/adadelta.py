"""Adadelta.

Bytes a parameter, float32: param 4+4, grad 4, square_avg 4+4, acc_delta 4+4 = 28.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import divide, gradient_factor, save, sqrt, with_l2

RAW = ("lr", "rho", "eps", "weight_decay", "maximize")
HYPER = ("factor", "l2", "rho", "rho_c", "eps", "lr")


@triton.jit
def prepare(raw, scalars):
    lr, rho, eps, weight_decay, maximize = raw
    row = (gradient_factor(maximize), weight_decay, rho, 1.0 - rho, eps, lr)
    return row, (scalars[0] + 1.0,)


@triton.jit
def update(p, g, states, hyper, VARIANT: tl.constexpr, out):
    """States: square_avg, acc_delta."""
    l2, rho, rho_c, eps, lr = hyper
    g = with_l2(g, p, l2)
    square_avg = rho * states[0] + rho_c * g * g
    save(out, 0, square_avg)
    delta = divide(sqrt(states[1] + eps), sqrt(square_avg + eps)) * g
    save(out, 1, rho * states[1] + rho_c * delta * delta)
    return p - lr * delta
