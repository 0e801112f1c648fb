"""Adamax.

Bytes a parameter, float32: param 4+4, grad 4, exp_avg 4+4, exp_inf 4+4 = 28.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import bias_correction, divide, gradient_factor, lerp, maximum, save, with_l2

RAW = ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize")
HYPER = ("factor", "l2", "beta1_c", "beta2", "eps", "step_size")


@triton.jit
def prepare(raw, scalars):
    lr, beta1, beta2, eps, weight_decay, maximize = raw
    step = scalars[0] + 1.0
    row = (gradient_factor(maximize), weight_decay, 1.0 - beta1, beta2, eps, lr / bias_correction(beta1, step))
    return row, (step,)


@triton.jit
def update(p, g, states, hyper, VARIANT: tl.constexpr, out):
    """States: exp_avg, exp_inf."""
    l2, beta1_c, beta2, eps, step_size = hyper
    g = with_l2(g, p, l2)
    exp_avg = lerp(states[0], g, beta1_c)
    exp_inf = maximum(beta2 * states[1], tl.abs(g) + eps)
    save(out, 0, exp_avg)
    save(out, 1, exp_inf)
    return p - divide(step_size * exp_avg, exp_inf)
