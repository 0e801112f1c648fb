"""Rules about gradient norms, as their papers and projects say them, on lists of numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator


def spikes(norms: Iterable[float], window: int, sigma: float, least: int, accept_after: int) -> Iterator[bool]:
    """Whether each norm is one. Logarithms within a hundredth count as equal."""
    known: list[float] = []
    in_a_row = 0
    for norm in norms:
        if not math.isfinite(norm):
            yield True
            continue
        if norm == 0.0:
            yield False
            continue
        far = False
        if len(known) >= least:
            spread = max(statistics.stdev(known), 0.01)
            far = math.log(norm) > statistics.fmean(known) + sigma * spread
        if far and in_a_row < accept_after:
            in_a_row += 1
            yield True
            continue
        if far:
            known = []
        in_a_row = 0
        known = [*known, math.log(norm)][-window:]
        yield False


def autoclip(norms: Iterable[float], percentile: float, window: int) -> Iterator[float]:
    """The norm to clip each to; infinite ones have none."""
    known: list[float] = []
    for norm in norms:
        if not math.isfinite(norm):
            yield math.inf
            continue
        known = [*known, norm][-window:]
        if percentile == 100.0 or len(known) == 1:
            yield max(known)
        else:
            # of 101 points 0 is the least and 100 the greatest
            yield statistics.quantiles(known, n=100, method="inclusive")[int(percentile) - 1]


def zclip(norms: Iterable[float], threshold: float, decay: float, warmup: int, max_norm: float) -> Iterator[float]:
    """The norm to clip each to; infinite ones have none."""
    first: list[float] = []
    mean = variance = 0.0
    for norm in norms:
        if not math.isfinite(norm):
            yield math.inf
            continue
        if len(first) < warmup:
            first.append(norm)
            mean, variance = statistics.fmean(first), statistics.pvariance(first)
            yield max_norm
            continue
        z = (norm - mean) / (math.sqrt(variance) + 1e-6)
        limit = max_norm
        if z > threshold:
            limit = min(limit, mean + threshold**2 / z * math.sqrt(variance))
        yield limit
        clipped = min(norm, limit)
        mean = decay * mean + (1 - decay) * clipped
        variance = decay * variance + (1 - decay) * (clipped - mean) ** 2
