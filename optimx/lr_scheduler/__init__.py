"""Learning-rate schedulers: every name of :mod:`torch.optim.lr_scheduler`, and ours next to them.

Torch's names are torch's objects. Schedules (:class:`Cosine`, :class:`Warmup`, ...) are values, functions of the step;
:class:`ScheduleLR` applies one to an optimizer; the named classes (:class:`WarmupCosineLR`, ...) are short forms.
"""

import typing as _typing

from torch.optim import lr_scheduler as _torch
from torch.optim.lr_scheduler import *  # noqa: F403

from .adafactor_schedule import AdafactorSchedule
from .conventions import CONVENTIONS, Convention
from .endless import Constant, Exponential, InverseSqrt, InverseTime, MultiStep, NaturalExponential, Noam, Piecewise
from .greedy import GreedyLR
from .hugging_face import get_scheduler
from .named_decays import REXLR, InverseTimeLR, LinearCosineLR, NaturalExpLR, PiecewiseConstantLR, TanhLR
from .named_warmups import (
    SGDR,
    InverseSqrtLR,
    NoamLR,
    WarmupConstantLR,
    WarmupCosineLR,
    WarmupExponentialLR,
    WarmupLinearLR,
    WarmupMultiStepLR,
    WarmupPolynomialLR,
)
from .phases import Cooldown, Hold, Phases, Product, Warmup
from .restarts import Cyclic, OneCycle, Restarts
from .schedule import Absolute, Schedule
from .schedule_lr import ScheduleLR
from .shapes import (
    REX,
    Cosine,
    CosineWithHardRestarts,
    Linear,
    LinearCosine,
    NormalizedExponential,
    OneMinusPower,
    OneMinusSqrt,
    Polynomial,
    Tanh,
)
from .staircase import Staircase
from .warmup_lr import PlateauWithWarmup, WarmupLR
from .weight_decay import corrected_decay, independent_decay
from .wsd_lr import WSDLR

if not _typing.TYPE_CHECKING:

    def __getattr__(name):
        """Names that torch's module has but does not export, and other projects import: ``_LRScheduler``."""
        if name.startswith("__") or not hasattr(_torch, name):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(_torch, name)


__all__ = sorted(
    {
        *_torch.__all__,
        "Absolute",
        "AdafactorSchedule",
        "CONVENTIONS",
        "Constant",
        "Convention",
        "Cooldown",
        "Cosine",
        "CosineWithHardRestarts",
        "Cyclic",
        "Exponential",
        "GreedyLR",
        "Hold",
        "InverseSqrt",
        "InverseSqrtLR",
        "InverseTime",
        "InverseTimeLR",
        "Linear",
        "LinearCosine",
        "LinearCosineLR",
        "MultiStep",
        "NaturalExpLR",
        "NaturalExponential",
        "Noam",
        "NoamLR",
        "NormalizedExponential",
        "OneCycle",
        "OneMinusPower",
        "OneMinusSqrt",
        "Phases",
        "Piecewise",
        "PiecewiseConstantLR",
        "PlateauWithWarmup",
        "Polynomial",
        "Product",
        "REX",
        "REXLR",
        "Restarts",
        "SGDR",
        "Schedule",
        "ScheduleLR",
        "Staircase",
        "Tanh",
        "TanhLR",
        "WSDLR",
        "Warmup",
        "WarmupConstantLR",
        "WarmupCosineLR",
        "WarmupExponentialLR",
        "WarmupLR",
        "WarmupLinearLR",
        "WarmupMultiStepLR",
        "WarmupPolynomialLR",
        "corrected_decay",
        "get_scheduler",
        "independent_decay",
    }
)
