"""NAdam, with weight decay in the gradient or decoupled from it.

Bytes a parameter, float32: param 4+4, grad 4, exp_avg 4+4, exp_avg_sq 4+4 = 28. Cautious steps
read grad and exp_avg once more, 8 bytes, and a clipped update grad and exp_avg_sq; with weight decay in the gradient
also param.

A variant is (), or, if any flag is set, CAUTIOUS_DECAY, CAUTIOUS, CLIPPED, LAGGED (see ``flags.py``) and HAS_L2: weight
decay may be in the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import bias_correction, divide, gradient_factor, lerp, save, sqrt, with_l2
from .flags import agrees, cautious_decay, step_factor

RAW = ("lr", "beta1", "beta2", "eps", "weight_decay", "momentum_decay", "maximize", "decoupled")
HYPER = ("factor", "decay", "l2", "beta1_c", "beta2", "beta2_c", "bias2", "grad_size", "avg_size", "eps")
ADAPTED = ("grad_size", "avg_size")

LOG_096 = tl.constexpr(-0.040821994520255166)


@triton.jit
def _momentum(beta1, exponent):
    return beta1 * (1.0 - 0.5 * tl.exp(exponent * LOG_096))


@triton.jit
def prepare(raw, scalars):
    """Counts: step, mu_product."""
    lr, beta1, beta2, eps, weight_decay, momentum_decay, maximize, decoupled = raw
    step = scalars[0] + 1.0
    mu = _momentum(beta1, step * momentum_decay)
    mu_next = _momentum(beta1, (step + 1.0) * momentum_decay)
    mu_product = scalars[1] * mu
    row = (
        gradient_factor(maximize),
        tl.where(decoupled != 0, 1.0 - lr * weight_decay, 1.0),
        tl.where(decoupled != 0, 0.0, weight_decay),
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        bias_correction(beta2, step),
        lr * (1.0 - mu) / (1.0 - mu_product),
        lr * mu_next / (1.0 - mu_product * mu_next),
        eps,
    )
    return row, (step, mu_product)


@triton.jit
def update(p, g, states, hyper, VARIANT: tl.constexpr, out):
    """States: exp_avg, exp_avg_sq."""
    CAUTIOUS_DECAY: tl.constexpr = VARIANT[0] if len(VARIANT) else False
    CAUTIOUS: tl.constexpr = VARIANT[1] if len(VARIANT) else False
    decay, l2, beta1_c, beta2, beta2_c, bias2, grad_size, avg_size, eps = hyper
    g = with_l2(g, p, l2)
    m = lerp(states[0], g, beta1_c)
    v = beta2 * states[1] + beta2_c * g * g
    save(out, 0, m)
    save(out, 1, v)
    average = grad_size * g + avg_size * m
    step = divide(average, sqrt(divide(v, bias2)) + eps)
    if CAUTIOUS:
        step = step * agrees(average, g).to(step.dtype)
    if CAUTIOUS_DECAY:
        decay = cautious_decay(decay, step, p)
    return p * decay - step


@triton.jit
def measure(p, g, states, hyper, VARIANT: tl.constexpr):
    """Which elements take a cautious step, and the gradient divided by the root of its average square."""
    _, l2, beta1_c, beta2, beta2_c, bias2, grad_size, avg_size, eps = hyper
    if VARIANT[4]:
        g = with_l2(g, p, l2)
    taken, size = tl.zeros_like(g), tl.zeros_like(g)
    if VARIANT[1]:
        taken = agrees(grad_size * g + avg_size * lerp(states[0], g, beta1_c), g).to(g.dtype)
    if VARIANT[2]:
        size = divide(g, sqrt(divide(beta2 * states[1] + beta2_c * g * g, bias2)) + eps)
    return taken, size


@triton.jit
def adapt(squares, numel, hyper, VARIANT: tl.constexpr):
    return step_factor(squares, numel, VARIANT[1], VARIANT[2])
