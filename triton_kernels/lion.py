"""Lion.

Bytes a parameter, float32: param 4+4, grad 4, exp_avg 4+4 = 20.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import cautious_decay, gradient_factor, lerp, save, sign

RAW = ("lr", "beta1", "beta2", "weight_decay", "maximize")
HYPER = ("factor", "decay", "beta1_c", "beta2_c", "lr")


@triton.jit
def prepare(raw, scalars):
    lr, beta1, beta2, weight_decay, maximize = raw
    return (gradient_factor(maximize), 1.0 - lr * weight_decay, 1.0 - beta1, 1.0 - beta2, lr), scalars


@triton.jit
def update(p, g, states, hyper, VARIANT: tl.constexpr, out):
    """States: exp_avg. The variant are flags, if any is set."""
    CAUTIOUS_DECAY: tl.constexpr = VARIANT[0] if len(VARIANT) else False
    decay, beta1_c, beta2_c, lr = hyper
    save(out, 0, lerp(states[0], g, beta2_c))
    step = sign(lerp(states[0], g, beta1_c))
    if CAUTIOUS_DECAY:
        decay = cautious_decay(decay, step, p)
    return p * decay - lr * step
