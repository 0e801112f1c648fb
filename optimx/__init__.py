"""optimx: a drop-in plugin for :mod:`torch.optim`.

``import optimx as optim`` has every public name of :mod:`torch.optim`: optimx's own class where there is one, torch's
object elsewhere. Importing it loads neither triton nor CUDA.
"""

from torch import optim as _torch
from torch.optim import *  # noqa: F403

# `from . import` would find torch's modules of these names here, and look no further
del lr_scheduler, swa_utils  # type: ignore[name-defined]  # noqa: F821

from . import _torch_names, averages, lr_scheduler, param_groups, search, sinks, swa_utils  # type: ignore[no-redef]
from ._engine.averages import EMA, SWA, PowerEMA
from ._engine.bad_gradients import BadStep
from ._engine.cpu.compiled import compile_formulas
from ._engine.guards import AutoClip, Spikes, ZClip
from ._engine.recode import master_weights, set_master_weights
from ._engine.rule import StateKind, UpdateRule
from ._engine.step import MultiTensorStep
from ._loop import FormulaLoop
from .adadelta import Adadelta
from .adafactor import Adafactor
from .adagrad import Adagrad
from .adam import Adam
from .adamax import Adamax
from .adamw import AdamW
from .asgd import ASGD
from .averages import averaged
from .bad_steps import last_bad
from .build import Build, build
from .clip_grad import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from .composite import Composite
from .config import Config, ConfigError
from .early_stop import EarlyStop
from .explain import explain
from .grad_scaler import GradScaler
from .lamb import LAMB
from .lion import Lion
from .lr_finder import LRCurve, lr_find
from .measuring import StepCost, step_cost
from .memory import memory
from .muon import Muon
from .nadam import NAdam
from .noise_scale import GradientNoise, NoiseScale, noise_scale
from .offload import offload_states
from .radam import RAdam
from .registry import list_optimizers, list_schedulers, register_optimizer, register_scheduler
from .release import Release, release_gradients
from .rmsprop import RMSprop
from .rprop import Rprop
from .schedule_free_adamw import ScheduleFreeAdamW
from .schedule_free_sgd import ScheduleFreeSGD
from .sgd import SGD
from .watching import Watcher, watch

_torch_names.stand_in(__name__)

__version__ = "0.1.0"

__all__ = sorted(
    {
        *_torch.__all__,
        "AutoClip",
        "BadStep",
        "Build",
        "Composite",
        "Config",
        "ConfigError",
        "EMA",
        "EarlyStop",
        "FormulaLoop",
        "GradScaler",
        "GradientNoise",
        "LAMB",
        "LRCurve",
        "Lion",
        "MultiTensorStep",
        "NoiseScale",
        "PowerEMA",
        "Release",
        "SWA",
        "Spikes",
        "StateKind",
        "StepCost",
        "UpdateRule",
        "Watcher",
        "ZClip",
        "ScheduleFreeAdamW",
        "ScheduleFreeSGD",
        "averaged",
        "averages",
        "build",
        "clip_grad_norm_",
        "clip_grad_value_",
        "clip_grads_with_norm_",
        "compile_formulas",
        "explain",
        "get_total_norm",
        "last_bad",
        "list_optimizers",
        "list_schedulers",
        "lr_find",
        "lr_scheduler",
        "master_weights",
        "memory",
        "noise_scale",
        "offload_states",
        "register_optimizer",
        "register_scheduler",
        "release_gradients",
        "param_groups",
        "search",
        "set_master_weights",
        "sinks",
        "step_cost",
        "swa_utils",
        "watch",
    }
)
