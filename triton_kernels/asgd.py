"""ASGD: averaged SGD.

Bytes a parameter, float32: param 4+4, grad 4, ax 4+4 = 20.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import gradient_factor, save, with_l2

RAW = ("lr", "lambd", "alpha", "t0", "weight_decay", "maximize")
HYPER = ("factor", "l2", "decay", "eta", "mu")


@triton.jit
def prepare(raw, scalars):
    """Counts: step, eta, mu. This step uses the last one's eta and mu."""
    lr, lambd, alpha, t0, weight_decay, maximize = raw
    eta, mu = scalars[1], scalars[2]
    step = scalars[0] + 1.0
    row = (gradient_factor(maximize), weight_decay, 1.0 - lambd * eta, eta, mu)
    next_eta = lr / tl.exp(alpha * tl.log(1.0 + lambd * lr * step))
    next_mu = 1.0 / tl.where(step - t0 > 1.0, step - t0, 1.0)
    return row, (step, next_eta, next_mu)


@triton.jit
def update(p, g, states, hyper, VARIANT: tl.constexpr, out):
    """States: ax."""
    l2, decay, eta, mu = hyper
    g = with_l2(g, p, l2)
    p = p * decay - eta * g
    save(out, 0, tl.where(mu == 1.0, p, states[0] + (p - states[0]) * mu))
    return p
