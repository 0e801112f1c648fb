"""Schedule-free SGD: gradients at y, which is the parameter, steps of z, and an average x between them.

Bytes a parameter, float32: param 4+4, grad 4, z 4+4 = 20.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import gradient_factor, lerp, save, with_l2
from .schedule_free import averaging

RAW = ("lr", "momentum", "weight_decay", "warmup_steps", "r", "weight_lr_power", "maximize")
HYPER = ("factor", "weight_decay", "lr", "share", "y_size")


@triton.jit
def prepare(raw, scalars):
    """Counts: step, weight_sum, lr_max."""
    lr, momentum, weight_decay, warmup_steps, r, weight_lr_power, maximize = raw
    sizes, counts = averaging(lr, momentum, warmup_steps, r, weight_lr_power, scalars)
    return (gradient_factor(maximize), weight_decay, sizes[0], sizes[1], sizes[2]), counts


@triton.jit
def update(p, g, states, hyper, VARIANT: tl.constexpr, out):
    """States: z."""
    weight_decay, lr, share, y_size = hyper
    g = with_l2(g, p, weight_decay)
    save(out, 0, states[0] - lr * g)
    return lerp(p, states[0], share) - y_size * g
