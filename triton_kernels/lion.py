"""Lion.

Bytes a parameter, float32: param 4+4, grad 4, exp_avg 4+4 = 20; with cautious steps, which read grad and
exp_avg once more, 28.

A variant is (), or, if any flag is set, CAUTIOUS_DECAY, CAUTIOUS, CLIPPED, which is never set, and LAGGED (see
``flags.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import gradient_factor, lerp, save, sign
from .flags import agrees, cautious_decay, step_factor

RAW = ("lr", "beta1", "beta2", "weight_decay", "maximize")
HYPER = ("factor", "decay", "beta1_c", "beta2_c", "lr")
ADAPTED = ("lr",)


@triton.jit
def prepare(raw, scalars):
    lr, beta1, beta2, weight_decay, maximize = raw
    return (gradient_factor(maximize), 1.0 - lr * weight_decay, 1.0 - beta1, 1.0 - beta2, lr), scalars


@triton.jit
def update(p, g, states, hyper, VARIANT: tl.constexpr, out):
    """States: exp_avg."""
    CAUTIOUS_DECAY: tl.constexpr = VARIANT[0] if len(VARIANT) else False
    CAUTIOUS: tl.constexpr = VARIANT[1] if len(VARIANT) else False
    decay, beta1_c, beta2_c, lr = hyper
    save(out, 0, lerp(states[0], g, beta2_c))
    average = lerp(states[0], g, beta1_c)
    step = sign(average)
    if CAUTIOUS:
        step = step * agrees(average, g).to(step.dtype)
    if CAUTIOUS_DECAY:
        decay = cautious_decay(decay, step, p)
    return p * decay - lr * step


@triton.jit
def measure(p, g, states, hyper, VARIANT: tl.constexpr):
    """Which elements take a cautious step."""
    taken = agrees(lerp(states[0], g, hyper[1]), g).to(g.dtype)
    return taken, tl.zeros_like(g)


@triton.jit
def adapt(squares, numel, hyper, VARIANT: tl.constexpr):
    return step_factor(squares, numel, True, False)
