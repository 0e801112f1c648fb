"""Adam and AdamW.

Bytes a parameter, float32: param 4+4, grad 4, exp_avg 4+4, exp_avg_sq 4+4 = 28 (amsgrad: 36). Cautious steps read grad
and exp_avg once more, 8 bytes, and a clipped update also exp_avg_sq; with weight decay in the gradient also param.

A variant is AMSGRAD and, if any flag is set, CAUTIOUS_DECAY, CAUTIOUS, CLIPPED, LAGGED (see ``flags.py``) and HAS_L2:
weight decay may be in the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import bias_correction, divide, divide_by, gradient_factor, lerp, maximum, save, sqrt, with_l2
from .flags import agrees, cautious_decay, step_factor

RAW = ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize", "decoupled")
#: 1 - beta has a column of its own: 1 - float32(0.999) is wrong by 1e-5.
HYPER = ("factor", "decay", "l2", "beta1_c", "beta2", "beta2_c", "bias2_sqrt", "step_size", "eps")
ADAPTED = ("step_size",)


@triton.jit
def prepare(raw, scalars):
    lr, beta1, beta2, eps, weight_decay, maximize, decoupled = raw
    step = scalars[0] + 1.0
    row = (
        gradient_factor(maximize),
        tl.where(decoupled != 0, 1.0 - lr * weight_decay, 1.0),
        tl.where(decoupled != 0, 0.0, weight_decay),
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        tl.sqrt(bias_correction(beta2, step)),
        lr / bias_correction(beta1, step),
        eps,
    )
    return row, (step,)


@triton.jit
def update(p, g, states, hyper, VARIANT: tl.constexpr, out):
    """States: exp_avg, exp_avg_sq and, with AMSGRAD, max_exp_avg_sq."""
    AMSGRAD: tl.constexpr = VARIANT[0]
    CAUTIOUS_DECAY: tl.constexpr = VARIANT[1] if len(VARIANT) > 1 else False
    CAUTIOUS: tl.constexpr = VARIANT[2] if len(VARIANT) > 1 else False
    decay, l2, beta1_c, beta2, beta2_c, bias2_sqrt, step_size, eps = hyper
    g = with_l2(g, p, l2)
    m = lerp(states[0], g, beta1_c)
    v = beta2 * states[1] + beta2_c * g * g
    save(out, 0, m)
    save(out, 1, v)
    if AMSGRAD:
        v = maximum(states[2], v)
        save(out, 2, v)
    step = divide(step_size * m, divide_by(sqrt(v), bias2_sqrt) + eps)
    if CAUTIOUS:
        step = step * agrees(m, g).to(step.dtype)
    if CAUTIOUS_DECAY:
        decay = cautious_decay(decay, step, p)
    return p * decay - step


@triton.jit
def measure(p, g, states, hyper, VARIANT: tl.constexpr):
    """Which elements take a cautious step, and the gradient divided by the root of its average square."""
    _, l2, beta1_c, beta2, beta2_c, bias2_sqrt, _, eps = hyper
    if VARIANT[5]:
        g = with_l2(g, p, l2)
    taken, size = tl.zeros_like(g), tl.zeros_like(g)
    if VARIANT[2]:
        taken = agrees(lerp(states[0], g, beta1_c), g).to(g.dtype)
    if VARIANT[3]:
        v = beta2 * states[1] + beta2_c * g * g
        if VARIANT[0]:
            v = maximum(states[2], v)
        size = divide(g, divide_by(sqrt(v), bias2_sqrt) + eps)
    return taken, size


@triton.jit
def adapt(squares, numel, hyper, VARIANT: tl.constexpr):
    return step_factor(squares, numel, VARIANT[2], VARIANT[3])
