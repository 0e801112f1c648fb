"""Learning-rate schedulers: every name of :mod:`torch.optim.lr_scheduler`, and ours next to them.

Torch's names are torch's objects. Schedules (:class:`Cosine`, :class:`Warmup`, ...) are values, functions of the step;
:class:`ScheduleLR` applies one to an optimizer; the named classes (:class:`WarmupCosineLR`, ...) are short forms.
"""

from torch.optim import lr_scheduler as _torch
from torch.optim.lr_scheduler import *  # noqa: F403

from ._schedule import Absolute, Schedule
from .phases import CONVENTIONS, Convention, Cooldown, Hold, Phases, Product, Warmup
from .restarts import Cyclic, OneCycle, Restarts
from .schedule_lr import ScheduleLR
from .schedules import (
    REX,
    Constant,
    Cosine,
    CosineWithHardRestarts,
    Exponential,
    InverseSqrt,
    InverseTime,
    Linear,
    LinearCosine,
    MultiStep,
    NaturalExponential,
    Noam,
    NormalizedExponential,
    OneMinusPower,
    OneMinusSqrt,
    Piecewise,
    Polynomial,
    Tanh,
)

__all__ = sorted(
    {
        *_torch.__all__,
        "CONVENTIONS",
        "REX",
        "Absolute",
        "Constant",
        "Convention",
        "Cooldown",
        "Cosine",
        "CosineWithHardRestarts",
        "Cyclic",
        "Exponential",
        "Hold",
        "InverseSqrt",
        "InverseTime",
        "Linear",
        "LinearCosine",
        "MultiStep",
        "NaturalExponential",
        "Noam",
        "NormalizedExponential",
        "OneCycle",
        "OneMinusPower",
        "OneMinusSqrt",
        "Phases",
        "Piecewise",
        "Polynomial",
        "Product",
        "Restarts",
        "Schedule",
        "ScheduleLR",
        "Tanh",
        "Warmup",
    }
)
