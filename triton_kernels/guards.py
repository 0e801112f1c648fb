"""What rules make of the gradient norm of a step, without the host: to skip it, and to what to clip it.

One program reads ``control``, as :func:`~.grad_norm.finish_` left it, and what the rules remember, and changes both.
``optimx._engine.guards`` tells what the rules are, and has them for a host.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .device import FACTOR, NORM, SKIP, Launcher, launch

#: How clipping finds its norm.
NO_CLIPPING, FIXED, PERCENTILE, Z_SCORE = (tl.constexpr(i) for i in range(4))

#: Places in ``counters``; the last norms follow.
STEPS, SKIPPED, CLIPPED, NONFINITE, IN_A_ROW, NORMS = (tl.constexpr(i) for i in range(6))
_RECENT = tl.constexpr(8)


@triton.jit
def _add(counters_ptr, place, value):
    tl.store(counters_ptr + place, tl.load(counters_ptr + place) + value)


@triton.jit
def _is_spike(
    memory_ptr, norm, from_norms, sigma, accept_after, least_spread, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Whether a finite norm is a spike, 1.0 or 0.0; the memory takes note."""
    n, place, in_a_row = tl.load(memory_ptr), tl.load(memory_ptr + 1), tl.load(memory_ptr + 2)
    offsets = tl.arange(0, BLOCK_SIZE)
    known = offsets < n
    logarithms = tl.load(memory_ptr + 3 + offsets, mask=offsets < WINDOW, other=0.0)
    mean = tl.sum(tl.where(known, logarithms, 0.0), axis=0) / tl.maximum(n, 1.0)
    away = tl.where(known, logarithms - mean, 0.0)
    spread = tl.sqrt(tl.sum(away * away, axis=0) / tl.maximum(n - 1.0, 1.0))
    logarithm = tl.log(tl.where(norm > 0.0, norm, 1.0))
    is_far = (n >= from_norms) & (logarithm - mean > sigma * tl.maximum(spread, least_spread))
    spike = (norm > 0.0) & is_far & (in_a_row < accept_after)
    # a new level: the window begins anew
    n = tl.where(is_far, 0.0, n)
    place = tl.where(is_far, 0.0, place)
    if spike:
        tl.store(memory_ptr + 2, in_a_row + 1.0)
    elif norm > 0.0:
        tl.store(memory_ptr + 3 + place.to(tl.int32), logarithm)
        tl.store(memory_ptr, tl.minimum(n + 1.0, WINDOW))
        tl.store(memory_ptr + 1, tl.where(place + 1.0 >= WINDOW, 0.0, place + 1.0))
        tl.store(memory_ptr + 2, 0.0)
    return tl.where(spike, 1.0, 0.0).to(tl.float64)


@triton.jit
def _percentile(memory_ptr, norm, percentile, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The percentile of norms, with this one; the memory takes note."""
    n, place = tl.load(memory_ptr), tl.load(memory_ptr + 1)
    n = tl.minimum(n + 1.0, WINDOW)
    offsets = tl.arange(0, BLOCK_SIZE)
    norms = tl.load(memory_ptr + 2 + offsets, mask=offsets < WINDOW, other=0.0)
    norms = tl.where(offsets == place.to(tl.int32), norm, norms)
    ordered = tl.sort(tl.where(offsets < n, norms, float("inf")))
    at = percentile / 100.0 * (n - 1.0)
    low = at.to(tl.int32)
    high = tl.minimum(low + 1, n.to(tl.int32) - 1)
    below = tl.sum(tl.where(offsets == low, ordered, 0.0), axis=0)
    above = tl.sum(tl.where(offsets == high, ordered, 0.0), axis=0)
    tl.store(memory_ptr + 2 + place.to(tl.int32), norm)
    tl.store(memory_ptr, n)
    tl.store(memory_ptr + 1, tl.where(place + 1.0 >= WINDOW, 0.0, place + 1.0))
    return below + (at - low) * (above - below)


@triton.jit
def _z_limit(memory_ptr, norm, threshold, decay, warmup, most):
    """The norm to clip to by the z-score; the memory takes note."""
    n, mean, variance = tl.load(memory_ptr), tl.load(memory_ptr + 1), tl.load(memory_ptr + 2)
    limit = most
    if n < warmup:
        n += 1.0
        away = norm - mean
        mean += away / n
        variance += (away * (norm - mean) - variance) / n
        tl.store(memory_ptr, n)
    else:
        spread = tl.sqrt(variance)
        z = (norm - mean) / (spread + 1e-6)
        if z > threshold:
            limit = tl.minimum(mean + threshold * threshold / z * spread, most)
        clipped = tl.minimum(norm, limit)
        mean = decay * mean + (1.0 - decay) * clipped
        variance = decay * variance + (1.0 - decay) * (clipped - mean) * (clipped - mean)
    tl.store(memory_ptr + 1, mean)
    tl.store(memory_ptr + 2, variance)
    return limit


@triton.jit
def _judge_kernel(
    control_ptr,  # float64 [3]: NORM, FACTOR without clipping, SKIP; the last two are changed
    counters_ptr,  # float64 [13], changed
    spikes_ptr,  # float64 [3 + WINDOW]: how many logarithms, where the next one goes, spikes in a row; logarithms
    clipping_ptr,  # float64: what the kind of clipping remembers
    from_norms: tl.float64,
    sigma: tl.float64,
    accept_after: tl.float64,
    least_spread: tl.float64,
    clip_a: tl.float64,  # the norm (FIXED), the percentile, or the threshold of the z-score
    clip_b: tl.float64,  # decay of mean and variance
    clip_c: tl.float64,  # steps of which the first ones are
    clip_d: tl.float64,  # the norm that is never exceeded
    SKIPS_NONFINITE: tl.constexpr,
    SPIKES: tl.constexpr,  # window; 0: none are looked for
    SPIKES_BLOCK: tl.constexpr,
    CLIPPING: tl.constexpr,
    CLAMP: tl.constexpr,
    CLIP_WINDOW: tl.constexpr,
    CLIP_BLOCK: tl.constexpr,
):
    norm, skip = tl.load(control_ptr + NORM), tl.load(control_ptr + SKIP)
    bad = (skip != 0.0) | (norm != norm) | (norm == float("inf"))
    if bad:
        if SKIPS_NONFINITE:
            skip = 1.0 + skip * 0.0
    elif SPIKES:
        skip = _is_spike(spikes_ptr, norm, from_norms, sigma, accept_after, least_spread, SPIKES, SPIKES_BLOCK)
    skipped = skip != 0.0
    ratio = tl.full((), 1.0, tl.float64)
    clipped = tl.full((), 0.0, tl.float64)
    if CLIPPING:
        if skip == 0.0:
            limit = clip_a
            if CLIPPING != FIXED:
                limit = clip_a * 0.0 + float("inf")
                if bad == 0:
                    if CLIPPING == PERCENTILE:
                        limit = _percentile(clipping_ptr, norm, clip_a, CLIP_WINDOW, CLIP_BLOCK)
                    else:
                        limit = _z_limit(clipping_ptr, norm, clip_a, clip_b, clip_c, clip_d)
            ratio = limit / (norm + 1e-6)
            clipped = tl.where(norm > limit, 1.0, 0.0).to(tl.float64)
            if CLAMP:
                # what is found may be the very norm, and 1e-6 then not little; else as torch.clamp: NaN stays NaN
                if CLIPPING == FIXED:
                    ratio = tl.where(ratio > 1.0, 1.0, ratio)
                else:
                    ratio = tl.where(norm <= limit, 1.0, ratio)
    tl.store(control_ptr + FACTOR, tl.load(control_ptr + FACTOR) * ratio)
    tl.store(control_ptr + SKIP, skip)
    steps = tl.load(counters_ptr + STEPS)
    tl.store(counters_ptr + NORMS + steps.to(tl.int32) % _RECENT, norm)
    tl.store(counters_ptr + STEPS, steps + 1.0)
    _add(counters_ptr, SKIPPED, tl.where(skipped, 1.0, 0.0))
    _add(counters_ptr, CLIPPED, clipped)
    _add(counters_ptr, NONFINITE, tl.where(bad, 1.0, 0.0))
    in_a_row = tl.load(counters_ptr + IN_A_ROW)
    tl.store(counters_ptr + IN_A_ROW, tl.where(skipped, in_a_row + 1.0, 0.0))


class Clip(NamedTuple):
    """How clipping finds its norm.

    Attributes:
        kind: ``NO_CLIPPING``, ``FIXED``, ``PERCENTILE`` or ``Z_SCORE``.
        numbers: Arguments of the kernel, ``clip_a`` to ``clip_d``.
        window: Norms that a percentile is of.
        clamp: Leave shorter gradients as they are.
    """

    kind: int
    numbers: tuple[float, ...]
    window: int = 1
    clamp: bool = True


class Spike(NamedTuple):
    """What a spike is.

    Attributes:
        window: Norms that are remembered; 0: nothing is a spike.
        numbers: Arguments of the kernel, ``from_norms`` to ``least_spread``.
    """

    window: int
    numbers: tuple[float, ...]


def judge_(
    control: Tensor,
    counters: Tensor,
    spikes: Tensor | None,
    clipping: Tensor | None,
    *,
    spike: Spike,
    clip: Clip,
    skips_nonfinite: bool,
    warmup: bool = False,
) -> None:
    """Apply the rules to a step.

    Args:
        control: float64 ``[3]`` from :func:`~.grad_norm.finish_`, whose factor clips nothing; changed.
        counters: float64 ``[13]``, changed.
        spikes: What is remembered to know spikes, changed.
        clipping: What is remembered to clip, changed.
        spike: What a spike is.
        clip: How clipping finds its norm.
        skips_nonfinite: Skip steps with infinite or NaN gradients.
        warmup: Compile, launch nothing.
    """
    launch(
        _judge_launcher(skips_nonfinite, spike.window, clip.kind, clip.clamp, clip.window), 1, control, counters,
        counters if spikes is None else spikes, counters if clipping is None else clipping,
        *map(float, (*spike.numbers, *clip.numbers)), warmup=warmup,
    )  # fmt: skip


@cache
def _judge_launcher(skips_nonfinite: bool, spikes: int, kind: int, clamp: bool, window: int) -> Any:
    return Launcher(
        _judge_kernel, SKIPS_NONFINITE=skips_nonfinite, SPIKES=spikes,
        SPIKES_BLOCK=triton.next_power_of_2(max(spikes, 1)), CLIPPING=kind, CLAMP=clamp, CLIP_WINDOW=window,
        CLIP_BLOCK=triton.next_power_of_2(window), num_warps=8,
    )  # fmt: skip
