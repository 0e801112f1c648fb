"""optimx: a drop-in plugin for :mod:`torch.optim`.

``import optimx as optim`` has every public name of :mod:`torch.optim`: optimx's own class where there is one, torch's
object elsewhere. Importing it loads neither triton nor CUDA.
"""

from torch import optim as _torch
from torch.optim import *  # noqa: F403

# `from . import` would find torch's modules of these names here, and look no further
del lr_scheduler, swa_utils  # type: ignore[name-defined]  # noqa: F821

from . import _torch_names, lr_scheduler, param_groups, swa_utils  # type: ignore[no-redef]
from ._engine.recode import master_weights, set_master_weights
from ._engine.rule import StateKind, UpdateRule
from ._engine.step import MultiTensorStep
from ._loop import FormulaLoop
from ._schedule_free import averaged
from .adadelta import Adadelta
from .adafactor import Adafactor
from .adagrad import Adagrad
from .adam import Adam
from .adamax import Adamax
from .adamw import AdamW
from .asgd import ASGD
from .build import Build, build
from .clip_grad import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from .composite import Composite
from .config import Config, ConfigError
from .explain import explain
from .grad_scaler import GradScaler
from .lamb import LAMB
from .lion import Lion
from .memory import memory
from .muon import Muon
from .nadam import NAdam
from .radam import RAdam
from .registry import list_optimizers, list_schedulers, register_optimizer, register_scheduler
from .rmsprop import RMSprop
from .rprop import Rprop
from .schedule_free_adamw import ScheduleFreeAdamW
from .schedule_free_sgd import ScheduleFreeSGD
from .sgd import SGD

_torch_names.stand_in(__name__)

__version__ = "0.1.0"

__all__ = sorted(
    {
        *_torch.__all__,
        "Build",
        "Composite",
        "Config",
        "ConfigError",
        "FormulaLoop",
        "GradScaler",
        "LAMB",
        "Lion",
        "MultiTensorStep",
        "ScheduleFreeAdamW",
        "ScheduleFreeSGD",
        "StateKind",
        "UpdateRule",
        "averaged",
        "build",
        "clip_grad_norm_",
        "clip_grad_value_",
        "clip_grads_with_norm_",
        "explain",
        "get_total_norm",
        "list_optimizers",
        "list_schedulers",
        "lr_scheduler",
        "master_weights",
        "memory",
        "register_optimizer",
        "register_scheduler",
        "param_groups",
        "set_master_weights",
        "swa_utils",
    }
)
