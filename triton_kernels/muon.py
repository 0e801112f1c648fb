"""Muon: momentum before the iterations that orthogonalize it, and the step after them. Products are
:mod:`.newton_schulz`'s or torch's.

Both are updates of :mod:`.update`, and each byte is moved once: in float32 with iterations in bfloat16, grad 4,
momentum_buffer 4+4, matrix 2; then matrix 2, param 4+4: 24 a parameter, and 6 for the norm and the division by it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .device import as_stored, save
from .flags import cautious_decay

RAW = ("lr", "weight_decay", "momentum", "nesterov", "eps", "beta2")
#: ``mix`` is how much of the average there is in what is orthogonalized, beside the gradient.
HYPER = ("factor", "eps", "momentum_c", "mix", "decay", "lr", "beta2_c")


@triton.jit
def prepare(raw, scalars):
    lr, weight_decay, momentum, nesterov, eps, beta2 = raw
    mix = tl.where(nesterov != 0, momentum, 1.0)
    factor = tl.full(lr.shape, 1.0, tl.float64)
    return (factor, eps, 1.0 - momentum, mix, 1.0 - lr * weight_decay, lr, 1.0 - beta2), scalars


@triton.jit
def _lerp(a, b, weight):
    """As torch: exact at both ends."""
    return tl.where(weight < 0.5, a + weight * (b - a), b - (b - a) * (1.0 - weight))


@triton.jit
def average(p, g, states, hyper, VARIANT: tl.constexpr, out):
    """States: momentum_buffer. In place of a parameter, what is to be orthogonalized is written."""
    momentum_c, mix = hyper[1:3]
    moved = _lerp(states[0], g, momentum_c)
    save(out, 0, moved)
    # torch goes on with what is stored
    return _lerp(g, as_stored(out, 0, moved), mix)


@triton.jit
def take(p, g, states, hyper, VARIANT: tl.constexpr, out):
    """The step, an orthogonal matrix, in place of a gradient. Variant: weights decay only where it lets them."""
    decay, lr = hyper[3:5]
    if VARIANT[0]:
        decay = cautious_decay(decay, g, p)
    return p * decay - lr * g


@triton.jit
def average_rows(p, g, states, hyper, VARIANT: tl.constexpr, out):
    """Averages of rows' mean squares, which stand in place of a gradient; a copy is written in place of a parameter.

    States: second_momentum_buffer.
    """
    moved = _lerp(states[0], g, hyper[5])
    save(out, 0, moved)
    # what is stored is what the host goes on with
    return as_stored(out, 0, moved)


class Pass(NamedTuple):
    """What :func:`~.update.update_` takes for an algorithm."""

    update: Any
    HYPER: tuple[str, ...] = HYPER


AVERAGE, TAKE, AVERAGE_ROWS = Pass(average), Pass(take), Pass(average_rows)
