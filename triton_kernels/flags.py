"""What flags of groups change in updates: https://arxiv.org/abs/2411.16085 (cautious steps), 2510.12402 (cautious
weight decay) and 2304.13013 (StableAdamW).

An algorithm with flags has them in its variant: CAUTIOUS_DECAY, CAUTIOUS, CLIPPED, and LAGGED: cautious steps are
divided by what the step before has found (see :mod:`.lagged`), which is no business of ``update``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def moves_away(step, p):
    """Whether a step, which is subtracted, moves a weight away from zero: signs tell, as products may underflow."""
    return tl.where(p < 0, -step, step) < 0


@triton.jit
def cautious_decay(decay, step, p):
    """``decay`` where a step does not move a weight away from zero; elsewhere 1."""
    return tl.where(moves_away(step, p), 1.0, decay)


@triton.jit
def agrees(step, g):
    """Whether a step goes against the gradient: both are not zero, and their signs are the same."""
    return (tl.where(g < 0, -step, step) > 0) & (g != 0)


@triton.jit
def divisor(mean):
    """What cautious steps are divided by: their share of the tensor, at least 1e-3."""
    return tl.maximum(mean, 1e-3)


@triton.jit
def step_factor(squares, numel, CAUTIOUS: tl.constexpr, CLIPPED: tl.constexpr):
    """What the step of a tensor is multiplied by.

    Args:
        squares: float64: how many elements take a cautious step, and the squared length of the gradient divided by the
            root of its average square.
        numel: float64: elements of the tensor.
        CAUTIOUS: What the others lack is given to those elements.
        CLIPPED: The gradient's size is at most that of its averages.
    """
    numel = tl.maximum(numel, 1.0)
    factor = tl.full((), 1.0, tl.float64)
    if CAUTIOUS:
        factor = 1.0 / divisor(squares[0] / numel)
    if CLIPPED:
        rms = tl.sqrt(squares[1] / numel)
        # NaN stays
        factor = factor / tl.where(rms < 1.0, 1.0, rms)
    return factor
