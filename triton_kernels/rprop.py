"""Rprop.

Bytes a parameter, float32: param 4+4, grad 4, prev 4+4, step_size 4+4 = 28.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import gradient_factor, save, sign

RAW = ("eta_minus", "eta_plus", "smallest", "largest", "maximize")
HYPER = ("factor", "eta_minus", "eta_plus", "smallest", "largest")


@triton.jit
def prepare(raw, scalars):
    eta_minus, eta_plus, smallest, largest, maximize = raw
    return (gradient_factor(maximize), eta_minus, eta_plus, smallest, largest), (scalars[0] + 1.0,)


@triton.jit
def update(p, g, states, hyper, VARIANT: tl.constexpr, out):
    """States: prev, step_size."""
    eta_minus, eta_plus, smallest, largest = hyper
    # above or below 0, or NaN, which is neither
    agreement = g * states[0]
    factor = tl.where(agreement > 0, eta_plus, tl.where(agreement < 0, eta_minus, 1.0))
    step_size = states[1] * factor
    step_size = tl.where(step_size < smallest, smallest, tl.where(step_size > largest, largest, step_size))
    g = tl.where(agreement < 0, 0.0, g)
    save(out, 0, g)
    save(out, 1, step_size)
    return p - sign(g) * step_size
