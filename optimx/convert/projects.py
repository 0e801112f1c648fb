"""Whose config a table is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .detectron2 import detectron2
from .hugging_face import hugging_face
from .source import NOTHING, Conversion, Source
from .timm import timm

__all__ = ["PROJECTS", "Project", "look_alike", "recognised", "unknown_keys"]


@dataclass(frozen=True)
class Project:
    """A project whose configs can be converted.

    Attributes:
        convert: Converts the values.
        signs: Keys that its configs have and hardly anything else has: one of these sets, all of it.
        about: Matches the names of values that a training depends on.
        keys: Matches those of them that the project has.
    """

    convert: Callable[[Source], Conversion]
    signs: tuple[frozenset[str], ...]
    about: re.Pattern[str]
    keys: re.Pattern[str]


#: What a key is called that has to do with the optimizer or the schedule.
_TRAINING = re.compile(
    r"(.*_)?(lr|learning_rate|optim|optimizer|opt|sched|scheduler|schedule|warmup|momentum|weight_decay|cooldown)(_.*)?"
    r"|lr.*|(adam|decay|clip|layer_decay|patience|max_grad)_.*|(max|num)_(train_)?(epochs|steps)|num_train_.*"
)
PROJECTS: dict[str, Project] = {
    "detectron2": Project(detectron2, (frozenset({"SOLVER"}),), re.compile("(?!)"), re.compile("")),
    "hf": Project(
        hugging_face,
        tuple(
            frozenset(signs)
            for signs in (
                {"lr_scheduler_type"},
                {"num_train_epochs"},
                {"learning_rate", "max_steps"},
                {"learning_rate", "max_grad_norm"},
                {"learning_rate", "adam_epsilon"},
                {"learning_rate", "warmup_ratio"},
                {"learning_rate", "output_dir"},
                {"learning_rate", "per_device_train_batch_size"},
            )
        ),
        re.compile("optim|lr_|learning|adam_|weight_decay|warmup|max_grad"),
        re.compile(
            "optim|optim_args|optim_target_modules|learning_rate|lr_scheduler_(type|kwargs)|warmup_(steps|ratio)"
            "|adam_(beta1|beta2|epsilon)|weight_decay|max_grad_norm|num_train_epochs|max_steps|adafactor"
        ),
    ),
    "timm": Project(
        timm,
        (frozenset({"opt", "sched"}),),
        re.compile("opt|lr_|sched|decay_|warmup|cooldown|patience|clip_|layer_decay|momentum|weight_decay"),
        re.compile(
            "opt|opt_(eps|betas|args|foreach|kwargs)|lr|lr_(noise|noise_pct|noise_std|cycle_mul|cycle_decay|cycle_limit"
            "|k_decay|base|base_size|base_scale|decay_fn|stable_timescale)|sched|sched_on_updates|momentum|weight_decay"
            "|warmup_(lr|epochs|prefix)|min_lr|decay_(epochs|milestones|rate)|cooldown_epochs|patience_epochs"
            "|clip_(grad|mode)|layer_decay|layer_decay_(min_scale|no_opt_scale)|bn_momentum|no_resume_opt|model_ema.*"
        ),
    ),
}

#: Whose configs cannot be converted, by keys that they have. A dot leads into a table.
_OTHERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "Ultralytics'": (("lr0",), ("lrf",)),
    "mmengine's (mmdetection and others)": (("optim_wrapper",), ("param_scheduler",), ("optimizer", "lr_config")),
    "the Lightning CLI's": (("optimizer.class_path",), ("lr_scheduler.class_path",), ("seed_everything", "trainer")),
    "DeepSpeed's": (
        ("train_micro_batch_size_per_gpu",), ("zero_optimization",), ("optimizer.params",), ("scheduler.params",),
        ("train_batch_size", "gradient_clipping"),
    ),
    "fairseq's": (("optimization", "lr_scheduler"), ("optimization", "optimizer"), ("lr_scheduler._name",)),
    "Hydra's": (("_target_",), ("optimizer._target_",), ("optim._target_",), ("defaults", "hydra")),
    "torchtune's": (("optimizer._component_",), ("lr_scheduler._component_",)),
    "Megatron-LM's": (("lr_decay_style",), ("train_iters", "lr")),
    "a script's of diffusers or accelerate": (("lr_warmup_steps",), ("num_warmup_steps",), ("max_train_steps",)),
    "Axolotl's": (("base_model", "micro_batch_size"),),
    "Caffe2 Detectron's, fast-reid's or SlowFast's": (
        ("SOLVER.LR_POLICY",), ("SOLVER.MAX_EPOCH",), ("SOLVER.MAX_EPOCHS",), ("SOLVER.OPTIMIZING_METHOD",),
        ("SOLVER.OPTIMIZER_NAME",), ("SOLVER.OPT",), ("SOLVER.SCHED",),
    ),
    "maskrcnn-benchmark's": (("SOLVER", "MODEL.WEIGHT"),),
    "PaddlePaddle's": (("LearningRate",), ("OptimizerBuilder",), ("Optimizer.lr",)),
    "a trainer's state, not its arguments": (("log_history", "global_step"),),
}  # fmt: skip


def _has(values: Mapping[str, Any], path: str) -> bool:
    table, dot, key = path.partition(".")
    return _has(values[table], key) if dot and isinstance(values.get(table), Mapping) else path in values


def look_alike(values: Mapping[str, Any]) -> str | None:
    """Whose config it is that cannot be converted, if it is known."""
    for project, signs in _OTHERS.items():
        if any(all(_has(values, path) for path in sign) for sign in signs):
            return project
    return None


def recognised(values: Mapping[str, Any]) -> str | None:
    """The project of :data:`PROJECTS` that has keys like these."""
    if look_alike(values):
        return None
    keys = {key for key in values if isinstance(key, str)}
    for name, project in PROJECTS.items():
        if any(sign <= keys for sign in project.signs):
            return name
    return None


def unknown_keys(values: Mapping[str, Any], project: Project) -> list[str]:
    """What the training depends on by its name, though the project has no such key."""
    return [
        key
        for key in values
        if isinstance(key, str) and _TRAINING.fullmatch(key) and not project.keys.fullmatch(key)
        and values[key] not in NOTHING
    ]  # fmt: skip
