"""What schedule-free optimizers share: how far a step moves y and z, and how much the new z counts in the average."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _power(base, exponent):
    """``base ** exponent`` of float64 blocks, both >= 0; 1 where both are 0."""
    return tl.where(exponent == 0.0, 1.0, tl.exp(exponent * tl.log(base)))


@triton.jit
def averaging(lr, beta, warmup_steps, r, weight_lr_power, scalars):
    """One step of the counts: step, weight_sum, lr_max.

    Returns:
        The learning rate after warmup, the share of z in x, how far y moves along a step, and the counts.
    """
    step = scalars[0] + 1.0
    lr = tl.where(step < warmup_steps, lr * step / tl.where(warmup_steps > 0.0, warmup_steps, 1.0), lr)
    lr_max = tl.where(lr > scalars[2], lr, scalars[2])
    weight = _power(step, r) * _power(lr_max, weight_lr_power)
    weight_sum = scalars[1] + weight
    share = tl.where(weight_sum > 0.0, weight / tl.where(weight_sum > 0.0, weight_sum, 1.0), 0.0)
    return (lr, share, lr * (1.0 - beta * (1.0 - share))), (step, weight_sum, lr_max)
