"""LAMB: Adam whose step in each tensor is as long as the tensor, times lr, by the walk of :mod:`.measured`.

Bytes a parameter, float32: param, grad, exp_avg and exp_avg_sq 4 each = 16 for the norms, then param 4+4, grad 4,
exp_avg 4+4, exp_avg_sq 4+4 = 28: 44 in all.

A variant is (), or, if any flag is set, CAUTIOUS_DECAY and flags that are never set (see ``flags.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import bias_correction, divide, divide_by, gradient_factor, lerp, save, sqrt
from .flags import moves_away

RAW = (
    "lr", "beta1", "beta2", "eps", "weight_decay", "bias_correction", "max_trust_ratio", "always_adapt", "maximize",
)  # fmt: skip
#: ``size`` is lr, and becomes lr times the trust ratio; the largest such ratio is 0 where a tensor is not adapted.
HYPER = (
    "factor", "beta1_c", "beta2", "beta2_c", "bias1", "bias2_sqrt", "eps", "weight_decay", "size", "largest",
)  # fmt: skip
ADAPTED = ("size",)


@triton.jit
def prepare(raw, scalars):
    lr, beta1, beta2, eps, weight_decay, corrected, largest, always_adapt, maximize = raw
    step = scalars[0] + 1.0
    row = (
        gradient_factor(maximize),
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        bias_correction(tl.where(corrected != 0, beta1, 0.0), step),
        tl.sqrt(bias_correction(tl.where(corrected != 0, beta2, 0.0), step)),
        eps,
        weight_decay,
        lr,
        tl.where((weight_decay != 0) | (always_adapt != 0), largest, 0.0),
    )
    return row, (step,)


@triton.jit
def _averages(g, states, hyper):
    beta1_c, beta2, beta2_c = hyper[:3]
    return lerp(states[0], g, beta1_c), beta2 * states[1] + beta2_c * g * g


@triton.jit
def _adam_step(p, m, v, hyper, VARIANT: tl.constexpr):
    """A step before it gets its length."""
    CAUTIOUS_DECAY: tl.constexpr = VARIANT[0] if len(VARIANT) else False
    bias1, bias2_sqrt, eps, weight_decay = hyper[3:7]
    step = divide(m, bias1 * (divide_by(sqrt(v), bias2_sqrt) + eps))
    if CAUTIOUS_DECAY:
        p = tl.where(moves_away(step, p), 0.0, p)
    return tl.where(weight_decay != 0, step + weight_decay * p, step)


@triton.jit
def update(p, g, states, hyper, VARIANT: tl.constexpr, out):
    """States: exp_avg, exp_avg_sq."""
    m, v = _averages(g, states, hyper)
    save(out, 0, m)
    save(out, 1, v)
    return p - hyper[7] * _adam_step(p, m, v, hyper, VARIANT)


@triton.jit
def measure(p, g, states, hyper, VARIANT: tl.constexpr):
    """A parameter and its step."""
    m, v = _averages(g, states, hyper)
    return p, _adam_step(p, m, v, hyper, VARIANT)


@triton.jit
def adapt(squares, numel, hyper, VARIANT: tl.constexpr):
    """The trust ratio; 1 where a tensor is not adapted."""
    largest = hyper[8]
    param_norm, step_norm = tl.sqrt(squares[0]), tl.sqrt(squares[1])
    # a norm of 0 tells nothing; comparisons keep NaN, so that it reaches the parameters, as everywhere
    ratio = tl.where((param_norm == 0) | (step_norm == 0), 1.0, param_norm / step_norm)
    ratio = tl.where(ratio > largest, largest, ratio)
    return tl.where(largest == 0, 1.0, ratio)
