"""SGD, with momentum.

Bytes a parameter, float32: param 4+4, grad 4 = 12; with momentum_buffer 4+4 = 20.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import gradient_factor, save, with_l2

#: ``first`` is 1 in a tensor's first step with momentum: its buffer becomes the gradient, without dampening.
RAW = ("lr", "momentum", "dampening", "weight_decay", "maximize", "first")
HYPER = ("factor", "l2", "keep", "take", "momentum", "lr")


@triton.jit
def prepare(raw, scalars):
    lr, momentum, dampening, weight_decay, maximize, first = raw
    row = (
        gradient_factor(maximize),
        weight_decay,
        tl.where(first != 0, 0.0, momentum),
        tl.where(first != 0, 1.0, 1.0 - dampening),
        momentum,
        lr,
    )
    return row, scalars


@triton.jit
def update(p, g, states, hyper, VARIANT: tl.constexpr, out):
    """States: momentum_buffer with MOMENTUM."""
    MOMENTUM: tl.constexpr = VARIANT[0]
    NESTEROV: tl.constexpr = VARIANT[1]
    l2, keep, take, momentum, lr = hyper
    g = with_l2(g, p, l2)
    if MOMENTUM:
        buffer = keep * states[0] + take * g
        save(out, 0, buffer)
        if NESTEROV:
            g += momentum * buffer
        else:
            g = buffer
    return p - lr * g
