"""Averages of parameters that a step moves: what the newest parameters count in them.

Weights are computed by torch's operators on 0-d tensors, where the count is: nobody waits for a device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import Condition, above, as_steps, check_instance, check_number, told, within

#: The state of a parameter that is its average.
AVERAGE = "average"


@dataclass(frozen=True, kw_only=True)
class Average:
    """A rule of averaging. The average begins as a copy of the parameters at the first step that counts.

    Args:
        every: Average after every so many steps (default: 1).
        start: Steps before the first that counts (default: 0).
        dtype: Of the averages (default: None: float32 for parameters of 16 bits, in which an average of many steps
            would stand still; else the parameter's).

    Raises:
        ValueError: An argument is out of range.
        TypeError: ``dtype`` is no floating-point dtype.
    """

    every: int = 1
    start: int = 0
    dtype: torch.dtype | None = None

    conditions: ClassVar[dict[str, Condition]] = {}

    def __post_init__(self) -> None:
        as_steps("every", self.every, least=1)
        as_steps("start", self.start)
        if self.dtype is not None:
            check_instance("dtype", self.dtype, torch.dtype, "a torch.dtype")
            if not self.dtype.is_floating_point:
                raise TypeError(told("dtype", "should be a floating-point dtype", self.dtype))
        for name, condition in self.conditions.items():
            value = getattr(self, name)
            if value is not None:
                check_number(name, value, condition)

    def weight(self, n: Tensor) -> Tensor:
        """What the parameters count, after ``n`` averaged ones before, a float64 scalar > 0: in ``[0, 1]``."""
        raise NotImplementedError

    def dtype_of(self, param: Tensor) -> torch.dtype:
        """The dtype of a parameter's average."""
        if self.dtype is not None and not param.is_complex():
            return self.dtype
        return torch.float32 if param.dtype in (torch.float16, torch.bfloat16) else param.dtype

    def is_due(self, step: int) -> bool:
        """Whether step ``step``, 1 for the first, is averaged."""
        return step > self.start and (step - self.start - 1) % self.every == 0


@dataclass(frozen=True)
class EMA(Average):
    """An exponential moving average of the parameters: ``average=optimx.EMA(0.9999, dtype=torch.float32)``.

    With ``every=k`` the decay is ``decay**k``: what a step counts does not depend on ``every``. With ``warmup`` the
    decay of the ``t``-th average after the first is ``1 - (1 + t / gamma)**-warmup``, at most ``decay``: timm's and
    diffusers' rule.

    Args:
        decay: In [0, 1) (default: 0.999). For a half-life of ``h`` steps ``2 ** (-1 / h)``.
        warmup: Exponent of the warmup: 2/3 reaches 0.999 after 31,600 averages and 0.9999 after a million; 3/4 after
            10,000 and 215,000 (default: None, no warmup).
        gamma: Scale of the warmup (default: 1).
        min_decay: Least decay in the warmup, in [0, 1) (default: 0).
    """

    decay: float = 0.999
    warmup: float | None = None
    gamma: float = 1.0
    min_decay: float = 0.0

    conditions = {
        "decay": within("[0, 1)"), "warmup": above(0), "gamma": above(0), "min_decay": within("[0, 1)"),
    }  # fmt: skip

    def weight(self, n: Tensor) -> Tensor:
        last = 1.0 - self.decay**self.every
        if self.warmup is None:
            return torch.full_like(n, last)
        return (1.0 + n / self.gamma).pow(-self.warmup).clamp(last, max(last, 1.0 - self.min_decay))


@dataclass(frozen=True)
class SWA(Average):
    """Stochastic weight averaging, the mean of the parameters (arXiv:1803.05407): ``average=optimx.SWA(start=900)``."""

    def weight(self, n: Tensor) -> Tensor:
        return 1.0 / (n + 1.0)


@dataclass(frozen=True)
class PowerEMA(Average):
    """An average whose profile is a power of time (arXiv:2312.02696): the longer the training, the longer it is.

    The ``t``-th parameters count ``1 - (1 - 1 / t)**(gamma + 1)``.

    Args:
        sigma: Relative width of the profile, in (0, 0.28) (default: 0.05; the paper keeps 0.05 and 0.10).
    """

    sigma: float = 0.05

    conditions = {"sigma": within("(0, 0.28)")}

    @property
    def gamma(self) -> float:
        """The power of which the profile has the width: ``sigma**2 = (gamma + 1) / ((gamma + 2)**2 * (gamma + 3))``."""
        low, high = 0.0, 1e9
        for _ in range(200):
            middle = (low + high) / 2.0
            width = math.sqrt((middle + 1.0) / ((middle + 2.0) ** 2 * (middle + 3.0)))
            low, high = (middle, high) if width > self.sigma else (low, middle)
        return low

    def weight(self, n: Tensor) -> Tensor:
        return 1.0 - (1.0 - 1.0 / (n + 1.0)).pow(self.gamma + 1.0)


def checked(average: Any) -> Average | None:
    """What is given as ``average``.

    Raises:
        TypeError: It is none.
    """
    if average is not None:
        check_instance("average", average, Average, "an optimx.EMA, SWA or PowerEMA")
    return average
