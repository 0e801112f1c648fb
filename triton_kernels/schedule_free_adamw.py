"""Schedule-free AdamW: gradients at y, which is the parameter, Adam's steps of z, and an average x between them.

Bytes a parameter, float32: param 4+4, grad 4, z 4+4, exp_avg_sq 4+4 = 28.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import bias_correction, divide, gradient_factor, lerp, save, sqrt, with_l2
from .schedule_free import averaging

RAW = ("lr", "beta1", "beta2", "eps", "weight_decay", "warmup_steps", "r", "weight_lr_power", "maximize")
HYPER = ("factor", "weight_decay", "beta2", "beta2_c", "bias2", "eps", "lr", "share", "y_size")


@triton.jit
def prepare(raw, scalars):
    """Counts: step, weight_sum, lr_max."""
    lr, beta1, beta2, eps, weight_decay, warmup_steps, r, weight_lr_power, maximize = raw
    sizes, counts = averaging(lr, beta1, warmup_steps, r, weight_lr_power, scalars)
    row = (
        gradient_factor(maximize),
        weight_decay,
        beta2,
        1.0 - beta2,
        bias_correction(beta2, counts[0]),
        eps,
        sizes[0],
        sizes[1],
        sizes[2],
    )
    return row, counts


@triton.jit
def update(p, g, states, hyper, VARIANT: tl.constexpr, out):
    """States: z, exp_avg_sq."""
    weight_decay, beta2, beta2_c, bias2, eps, lr, share, y_size = hyper
    v = beta2 * states[1] + beta2_c * g * g
    save(out, 1, v)
    step = with_l2(divide(g, sqrt(divide(v, bias2)) + eps), p, weight_decay)
    save(out, 0, states[0] - lr * step)
    return lerp(p, states[0], share) - y_size * step
