"""RMSprop, centered and with momentum.

Bytes a parameter, float32: param 4+4, grad 4, square_avg 4+4 = 20; 8 more with momentum_buffer, 8 with grad_avg.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import divide, gradient_factor, lerp, save, sqrt, with_l2

RAW = ("lr", "alpha", "eps", "weight_decay", "momentum", "maximize")
HYPER = ("factor", "l2", "alpha", "alpha_c", "eps", "momentum", "lr")


@triton.jit
def prepare(raw, scalars):
    lr, alpha, eps, weight_decay, momentum, maximize = raw
    row = (gradient_factor(maximize), weight_decay, alpha, 1.0 - alpha, eps, momentum, lr)
    return row, (scalars[0] + 1.0,)


@triton.jit
def update(p, g, states, hyper, VARIANT: tl.constexpr, out):
    """States: square_avg, then momentum_buffer with MOMENTUM, grad_avg with CENTERED."""
    MOMENTUM: tl.constexpr = VARIANT[0]
    CENTERED: tl.constexpr = VARIANT[1]
    l2, alpha, alpha_c, eps, momentum, lr = hyper
    g = with_l2(g, p, l2)
    square_avg = alpha * states[0] + alpha_c * g * g
    save(out, 0, square_avg)
    if CENTERED:
        grad_avg = lerp(states[len(states) - 1], g, alpha_c)
        save(out, len(states) - 1, grad_avg)
        step = divide(g, sqrt(square_avg - grad_avg * grad_avg) + eps)
    else:
        step = divide(g, sqrt(square_avg) + eps)
    if MOMENTUM:
        step = momentum * states[1] + step
        save(out, 1, step)
    return p - lr * step
