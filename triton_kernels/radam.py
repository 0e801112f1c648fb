"""RAdam, with weight decay in the gradient or decoupled from it.

Bytes a parameter, float32: param 4+4, grad 4, exp_avg 4+4, exp_avg_sq 4+4 = 28.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import bias_correction, divide, gradient_factor, lerp, save, sqrt, with_l2

RAW = ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize", "decoupled")
#: ``rectification`` is 0 while the variance cannot be told yet; then the step is one of momentum alone.
HYPER = ("factor", "decay", "l2", "beta1_c", "beta2", "beta2_c", "step_size", "rectification", "eps")


@triton.jit
def prepare(raw, scalars):
    lr, beta1, beta2, eps, weight_decay, maximize, decoupled = raw
    step = scalars[0] + 1.0
    bias2 = bias_correction(beta2, step)
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_inf - 2.0 * step * (1.0 - bias2) / bias2
    known = rho > 5.0
    # where it is not known, a number whose root exists
    rho = tl.where(known, rho, 6.0)
    long = tl.where(known, rho_inf, 6.0)
    rectification = tl.sqrt((rho - 4.0) * (rho - 2.0) * long / ((long - 4.0) * (long - 2.0) * rho))
    row = (
        gradient_factor(maximize),
        tl.where(decoupled != 0, 1.0 - lr * weight_decay, 1.0),
        tl.where(decoupled != 0, 0.0, weight_decay),
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        lr / bias_correction(beta1, step),
        tl.where(known, rectification * tl.sqrt(bias2), 0.0),
        eps,
    )
    return row, (step,)


@triton.jit
def update(p, g, states, hyper, VARIANT: tl.constexpr, out):
    """States: exp_avg, exp_avg_sq."""
    decay, l2, beta1_c, beta2, beta2_c, step_size, rectification, eps = hyper
    g = with_l2(g, p, l2)
    m = lerp(states[0], g, beta1_c)
    v = beta2 * states[1] + beta2_c * g * g
    save(out, 0, m)
    save(out, 1, v)
    size = tl.where(rectification > 0, divide(rectification, sqrt(v) + eps), 1.0)
    return p * decay - step_size * m * size
