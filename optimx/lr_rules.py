"""Learning rates that a range test suggests, by the rules of fastai, pytorch-lr-finder and Lightning.

Every rule is a pure function of two lists, learning rates and losses as they were measured. It smooths and cuts them
as its library does, and gives the number that the library gives. They disagree, by hundreds of times where losses are
noisy: look at all of them, and at the curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RULES", "Rule", "diverges_at", "lightning", "lr_finder", "minimum", "slide", "smoothed", "steep", "valley"]

#: How much of the average before a new loss leaves, in fastai and Lightning.
BETA = 0.98


def smoothed(losses: Sequence[float], beta: float = BETA) -> list[float]:
    """Exponential moving average without the bias towards its beginning, as fastai draws it.

    Args:
        losses: Of the steps.
        beta: What is left of the average before, in [0, 1).
    """
    average, values = 0.0, []
    for step, loss in enumerate(losses, 1):
        average = beta * average + (1 - beta) * loss
        values.append(average / (1 - beta**step))
    return values


def diverges_at(losses: Sequence[float], stop: float) -> int | None:
    """The first step whose loss is not finite, or is so high that the smoothed one is above ``stop`` times its best.

    With a best that is negative, ``stop - 1`` times its size above it, as with a positive one.

    Args:
        losses: Of the steps.
        stop: > 1; infinity is never reached.
    """
    best = math.inf
    for step, (loss, smooth) in enumerate(zip(losses, smoothed(losses), strict=True)):
        if not math.isfinite(loss):
            return step
        best = min(best, smooth)
        if smooth > best + (stop - 1) * abs(best):
            return step
    return None


def valley(lrs: Sequence[float], losses: Sequence[float], steps: int | None = None) -> float | None:
    """About half of the way down the longest falling subsequence of the smoothed losses: fastai's default.

    Args:
        lrs, losses: Of the steps.
        steps: Those that the sweep was to have, of which a tenth is dropped (default: None, as many as there are).

    Returns:
        A learning rate; None if there are too few steps. So does every rule.
    """
    lrs, falling = _as_fastai(lrs, losses, steps)
    if not falling:
        return None
    lengths: list[int] = []
    for i, loss in enumerate(falling):
        lengths.append(1 + max((lengths[j] for j in range(i) if falling[j] > loss), default=0))
    longest = max(lengths)
    start = lengths.index(longest) - longest
    return lrs[max(start + longest // 3 + longest // 6, 0)]


def slide(lrs: Sequence[float], losses: Sequence[float], steps: int | None = None) -> float | None:
    """Where the slope of the smoothed losses is that of 15 steps later, seen from the end (fastai).

    Args: As for :func:`valley`.
    """
    lrs, values = _as_fastai(lrs, losses, steps)
    if len(values) <= _SLIDE:
        return None
    slopes = torch.gradient(_vector(values))[0].tolist()
    right = len(slopes) - 1
    found = lrs[right - _SLIDE]
    while right >= _SLIDE and abs(slopes[right] - slopes[right - _SLIDE]) > _ALIKE:
        found = lrs[right - _SLIDE]
        right -= 1
    return found


#: Steps between the two slopes that fastai compares, and how far apart they are where it stops.
_SLIDE, _ALIKE = 15, 0.005


def minimum(lrs: Sequence[float], losses: Sequence[float], steps: int | None = None) -> float | None:
    """A tenth of where the smoothed loss is the least (fastai).

    Args: As for :func:`valley`.
    """
    lrs, values = _as_fastai(lrs, losses, steps)
    return lrs[values.index(min(values))] / 10 if values else None


def steep(lrs: Sequence[float], losses: Sequence[float], steps: int | None = None) -> float | None:
    """Where the smoothed loss falls the fastest over the *logarithm* of the learning rate (fastai).

    Args: As for :func:`valley`.
    """
    lrs, values = _as_fastai(lrs, losses, steps)
    if len(values) < 2:
        return None
    return lrs[int((_vector(values).diff() / _vector(lrs).log().diff()).argmin())]


def lr_finder(lrs: Sequence[float], losses: Sequence[float], steps: int | None = None) -> float | None:
    """Where the loss, hardly smoothed, falls the fastest from step to step (pytorch-lr-finder).

    Args: As for :func:`valley`, but 10 steps are dropped, and the last 5.
    """
    averages: list[float] = []
    for loss in losses:
        averages.append(0.05 * loss + 0.95 * averages[-1] if averages else loss)
    lrs, values = _cut(lrs, averages, 10, 5)
    if len(values) < 2:
        return None
    return lrs[int(torch.gradient(_vector(values))[0].argmin())]


def lightning(lrs: Sequence[float], losses: Sequence[float], steps: int | None = None) -> float | None:
    """Where the smoothed loss falls the fastest over the learning rate *itself*, so at a small one (Lightning).

    Lightning divides the average by too much, so that its curve rises to the loss from half of it.

    Args: As for :func:`valley`, but 10 steps are dropped, and the last one.
    """
    averages = [smooth * (1 - BETA**step) / (1 - BETA ** (step + 1)) for step, smooth in enumerate(smoothed(losses), 1)]
    lrs, values = _cut(lrs, averages, 10, 1)
    if len(values) < 2:
        return None
    return lrs[int(torch.gradient(_vector(values), spacing=(_vector(lrs),))[0].argmin())]


class Rule(NamedTuple):
    """A rule.

    Attributes:
        suggest: Learning rate from learning rates, losses, and the steps that the sweep was to have.
        meaning: What it looks for.
    """

    suggest: Callable[[Sequence[float], Sequence[float], int | None], float | None]
    meaning: str


#: By name.
RULES = {
    "valley": Rule(valley, "half of the way down the longest fall (fastai)"),
    "slide": Rule(slide, "the last slope that differs from that of 15 steps later (fastai)"),
    "minimum": Rule(minimum, "a tenth of where the loss is the least (fastai)"),
    "steep": Rule(steep, "the fastest fall over log lr (fastai)"),
    "lr_finder": Rule(lr_finder, "the fastest fall from step to step (pytorch-lr-finder)"),
    "lightning": Rule(lightning, "the fastest fall over lr (Lightning)"),
}


def _as_fastai(lrs: Sequence[float], losses: Sequence[float], steps: int | None) -> tuple[list[float], list[float]]:
    return _cut(lrs, smoothed(losses), (len(lrs) if steps is None else steps) // 10, 5)


def _cut(lrs: Sequence[float], losses: Sequence[float], first: int, last: int) -> tuple[list[float], list[float]]:
    """Without the first steps and the last ones, and up to the first loss that is not finite."""
    kept = [*zip(lrs, losses, strict=True)][first:-last]
    end = next((i for i, (_, loss) in enumerate(kept) if not math.isfinite(loss)), len(kept))
    return [lr for lr, _ in kept[:end]], [loss for _, loss in kept[:end]]


def _vector(values: Sequence[float]) -> Tensor:
    # wherever torch.set_default_device sends what nobody places
    return torch.tensor(values, dtype=torch.float64, device="cpu")
