"""Configs of other projects as ours: timm's arguments, detectron2's SOLVER, Hugging Face's TrainingArguments."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .config.errors import ConfigError, Problem, nearest

__all__ = ["Conversion", "convert", "to_toml"]

_NOTHING: tuple[Any, ...] = (None, False, 0, "", (), [], {})


@dataclass
class Conversion:
    """What :func:`convert` made.

    Attributes:
        config: A tree for :func:`optimx.build`.
        notes: What it does not say, or says otherwise.
    """

    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def convert(theirs: Mapping[str, Any], project: str | None = None) -> Conversion:
    """A config of another project as one of ours.

    Args:
        theirs: Its values by name, as its own files have them.
        project: ``"timm"``, ``"detectron2"`` or ``"hf"`` (default: None, told by the names).

    Raises:
        ConfigError: The project is unknown, or there is no counterpart of its optimizer or schedule.
    """
    if project is None:
        project = next((name for name, (_, sign, _) in _PROJECTS.items() if sign & theirs.keys()), None)
    if project not in _PROJECTS:
        near = nearest(project, _PROJECTS) if project else None
        raise ConfigError([Problem("project", f"should be one of {', '.join(_PROJECTS)}", project, near)])
    function, _, about_training = _PROJECTS[project]
    source = _Source(theirs)
    try:
        conversion = function(source)
    except ConfigError:
        raise
    # theirs is anybody's: a number that is a string, a table that is a number
    except Exception as error:
        raise ConfigError(
            [Problem(project, f"cannot be converted ({type(error).__name__}: {error})", theirs)]
        ) from error
    for key in source.left(about_training):
        conversion.notes.append(f"not converted: {key} = {source.values[key]!r}")
    conversion.config = {name: section for name, section in conversion.config.items() if section}
    return conversion


class _Source:
    """Their values, and which of them have been read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self._read: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        """A value; the default where it is missing or null."""
        self._read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def left(self, about: re.Pattern[str]) -> list[str]:
        """Keys of that kind that say something and have not been read."""
        keys = (str(key) for key, value in self.values.items() if key not in self._read and value not in _NOTHING)
        return [key for key in keys if about.match(key)]

    def known(self, key: str, default: str, names: Mapping[str, Any]) -> tuple[str, Any]:
        """A name and what it stands for."""
        name = str(self.take(key, default))
        if name not in names:
            rule = f"should be one that has a counterpart here ({', '.join(names)})"
            raise ConfigError([Problem(key, rule, name, nearest(name, names))])
        return name, names[name]


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


# timm

_TIMM_OPTIMIZERS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in ("adam", "adamw", "nadam", "radam", "adamax", "adadelta", "adagrad", "lion")},
    "sgd": {"name": "sgd", "nesterov": True},
    "nesterov": {"name": "sgd", "nesterov": True},
    "momentum": {"name": "sgd"},
    "rmsprop": {"name": "rmsprop", "alpha": 0.9},
    "lamb": {"name": "lamb", "max_grad_norm": 1.0},
}
_TIMM_SCHEDULES = {
    "cosine": "cosine", "tanh": "tanh", "poly": "polynomial", "step": "exponential", "multistep": "multi_step",
    "constant": "constant", "wsd": "wsd", "none": None,
}  # fmt: skip


def _timm(source: _Source) -> Conversion:
    name, optimizer = source.known("opt", "sgd", _TIMM_OPTIMIZERS)
    betas = source.take("opt_betas")
    optimizer = optimizer | _given(
        lr=source.take("lr"), weight_decay=source.take("weight_decay"), eps=source.take("opt_eps"), betas=betas
    )
    momentum = source.take("momentum")
    if optimizer["name"] in ("sgd", "rmsprop") and momentum is not None:
        optimizer["momentum"] = momentum
    optimizer |= source.take("opt_args", {})
    notes, scaling = [], {}
    base, size, rule = (source.take(f"lr_base{end}") for end in ("", "_size", "_scale"))
    if "lr" not in optimizer and base is not None:
        batch = source.take("batch_size", 128) * source.take("grad_accum_steps", 1)
        optimizer["lr"] = base
        default = "sqrt" if re.search("ada|lamb", name) else "linear"
        scaling = {"batch": batch, "reference": size or 256, "rule": rule or default}
        notes.append(f"batch_scaling.batch is {batch}, that of one process: multiply it by their number")
    clip, mode = source.take("clip_grad"), source.take("clip_mode", "norm")
    if clip and mode == "norm":
        optimizer["max_grad_norm"] = clip
    elif clip:
        notes.append(f"not converted: clip_grad = {clip} by {mode}")
    groups = _given(layer_decay=source.take("layer_decay"), min_lr_scale=source.take("layer_decay_min_scale"))
    if "layer_decay" in groups:
        groups["layer_preset"] = "timm"
    else:
        groups = {}
    if source.take("filter_bias_and_bn", True) is False:
        groups["no_decay"] = []
    schedule = _timm_schedule(source, optimizer.get("lr"))
    if "layer_decay" in groups and {"floor", "warmup"} & schedule.keys():
        notes.append(
            "warmup_lr and min_lr are the same for all layers in timm; here they are ratios of each group's lr"
        )
    if schedule and not source.take("sched_on_updates"):
        notes.append(
            "timm changes the learning rate once an epoch without sched_on_updates; here it changes every step"
        )
    return Conversion({"optimizer": optimizer, "groups": groups, "schedule": schedule, "batch_scaling": scaling}, notes)


def _timm_schedule(source: _Source, lr: float | None) -> dict[str, Any]:
    name, ours = source.known("sched", "cosine", _TIMM_SCHEDULES)
    if ours is None:
        return {}
    epochs, warmup = source.take("epochs", 300), source.take("warmup_epochs", 5)
    prefix, start = source.take("warmup_prefix", False), source.take("warmup_lr", 1e-5)
    rate, floor = source.take("decay_rate", 0.1), source.take("min_lr", 0.0)
    schedule: dict[str, Any] = {"name": ours, "total": f"{epochs + warmup if prefix else epochs}ep"}
    schedule["convention"] = "timm-prefix" if prefix or name == "wsd" else "timm"
    if warmup:
        schedule["warmup"] = {"steps": f"{warmup}ep", **({"start": min(start / lr, 1.0)} if lr and start else {})}
    if name in ("cosine", "tanh", "poly", "wsd") and floor and lr:
        schedule["floor"] = min(floor / lr, 1.0)
    if name == "poly":
        schedule["power"] = rate
    elif name == "step":
        schedule |= {"gamma": rate, "decay_steps": f"{source.take('decay_epochs', 90)}ep", "staircase": True}
    elif name == "multistep":
        schedule |= {"milestones": [f"{m}ep" for m in source.take("decay_milestones", [90, 180, 270])], "gamma": rate}
    elif name == "wsd":
        decay = source.take("decay_epochs", 0.2)
        schedule["decay"] = decay * (1 - warmup / epochs) if decay < 1 else f"{decay}ep"
    if name in ("cosine", "poly"):
        k = source.take("lr_k_decay", 1.0)
        if k != 1.0 and name == "cosine":
            schedule["k"] = k
    # one cycle, which has no factor
    if source.take("lr_cycle_limit", 1) == 1:
        for key in ("lr_cycle_mul", "lr_cycle_decay"):
            source.take(key)
    for key in ("decay_epochs", "decay_milestones", "patience_epochs", "warmup_prefix"):
        source.take(key)
    return schedule


# detectron2


def _detectron2(source: _Source) -> Conversion:
    solver = _Source(source.take("SOLVER", {}))
    notes = (
        [f"{source.take('_BASE_')} is not read: what it sets is left at its default"] if source.take("_BASE_") else []
    )
    lr, decay = solver.take("BASE_LR", 1e-3), solver.take("WEIGHT_DECAY", 1e-4)
    optimizer = {
        "name": "sgd", "lr": lr, "momentum": solver.take("MOMENTUM", 0.9), "weight_decay": decay,
        "nesterov": solver.take("NESTEROV", False),
    }  # fmt: skip
    clip = _Source(solver.take("CLIP_GRADIENTS", {}))
    if clip.take("ENABLED", False):
        if clip.take("CLIP_TYPE", "value") == "full_model" and clip.take("NORM_TYPE", 2.0) == 2.0:
            optimizer["max_grad_norm"] = clip.take("CLIP_VALUE", 1.0)
        else:
            notes.append(
                f"not converted: SOLVER.CLIP_GRADIENTS = {dict(clip.values)!r}, only full_model by the 2-norm is"
            )
    norm, bias = solver.take("WEIGHT_DECAY_NORM", 0.0), solver.take("WEIGHT_DECAY_BIAS", decay)
    groups: dict[str, Any] = {}
    if norm == bias == decay:
        groups["no_decay"] = []
    elif norm or bias:
        notes.append(f"weight decay of norms ({norm}) and biases ({bias}): here neither decays")
    factor = solver.take("BIAS_LR_FACTOR", 1.0)
    if factor != 1.0:
        groups["rules"] = [{"match": "*.bias", "lr_mult": factor}]
    _, ours = solver.known(
        "LR_SCHEDULER_NAME", "WarmupMultiStepLR", {"WarmupMultiStepLR": "multi_step", "WarmupCosineLR": "cosine"}
    )
    total, warmup = solver.take("MAX_ITER", 40_000), solver.take("WARMUP_ITERS", 1000)
    rescaled = solver.take("RESCALE_INTERVAL", False)
    schedule = {"name": ours, "total": total, "convention": "hf" if rescaled else "detectron2"}
    steps, gamma, end = solver.take("STEPS", (30_000,)), solver.take("GAMMA", 0.1), solver.take("BASE_LR_END", 0.0)
    # a warmup begins at a ratio of the first value there, of the value that it ends with here
    meets = 1.0
    if ours == "multi_step":
        schedule |= {"milestones": [step for step in steps if step <= total], "gamma": gamma}
    else:
        schedule["floor"] = end / lr
        if not rescaled:
            meets = end / lr + (1 - end / lr) * 0.5 * (1 + math.cos(math.pi * warmup / total))
    shape, start = solver.take("WARMUP_METHOD", "linear"), solver.take("WARMUP_FACTOR", 1e-3)
    if warmup:
        schedule["warmup"] = {"steps": warmup, "shape": shape, "start": min(start / meets, 1.0)}
    notes += [f"not converted: SOLVER.{key} = {solver.values[key]!r}" for key in solver.left(_SOLVER)]
    return Conversion({"optimizer": optimizer, "groups": groups, "schedule": schedule}, notes)


#: Keys of SOLVER that are about something else stay where they are.
_SOLVER = re.compile(r"(?!IMS_PER_BATCH|CHECKPOINT_PERIOD|AMP|REFERENCE_WORLD_SIZE)")


# Hugging Face

_HF_OPTIMIZERS: dict[str, dict[str, Any]] = {
    **{name: {"name": "adamw"} for name in ("adamw_torch", "adamw_torch_fused", "adamw_hf")},
    **{name: {"name": name} for name in ("sgd", "adagrad", "rmsprop")},
    "lion_32bit": {"name": "lion"},
}
_HF_SCHEDULES: dict[str, str] = {
    "linear": "linear", "cosine": "cosine", "cosine_with_restarts": "cosine_with_hard_restarts",
    "polynomial": "polynomial", "constant": "constant", "constant_with_warmup": "constant",
    "inverse_sqrt": "inverse_sqrt", "cosine_with_min_lr": "cosine", "warmup_stable_decay": "wsd",
}  # fmt: skip


def _hf(source: _Source) -> Conversion:
    _, optimizer = source.known("optim", "adamw_torch", _HF_OPTIMIZERS)
    lr = source.take("learning_rate", 5e-5)
    optimizer = optimizer | {"lr": lr, "weight_decay": source.take("weight_decay", 0.0)}
    betas = [source.take("adam_beta1", 0.9), source.take("adam_beta2", 0.999)]
    eps = source.take("adam_epsilon", 1e-8)
    if optimizer["name"] in ("adamw", "lion"):
        optimizer["betas"] = betas
    if optimizer["name"] == "adamw":
        optimizer["eps"] = eps
    clip = source.take("max_grad_norm", 1.0)
    if clip:
        optimizer["max_grad_norm"] = clip
    steps, epochs = source.take("max_steps", -1), source.take("num_train_epochs", 3.0)
    total = steps if steps > 0 else f"{epochs:g}ep"
    name, ours = source.known("lr_scheduler_type", "linear", _HF_SCHEDULES)
    warmup = source.take("warmup_steps", 0) or source.take("warmup_ratio", 0)
    source.take("warmup_ratio")
    schedule = {"name": ours, "total": total, "convention": "hf"}
    if warmup and name != "constant":
        schedule["warmup"] = int(warmup) if warmup >= 1 else warmup
    notes = _hf_arguments(name, _Source(_table(source.take("lr_scheduler_kwargs", {}))), schedule, lr)
    return Conversion({"optimizer": optimizer, "schedule": schedule}, notes)


def _hf_arguments(name: str, more: _Source, schedule: dict[str, Any], lr: float) -> list[str]:
    """``lr_scheduler_kwargs``; returns what of them is not converted."""
    if name in ("cosine", "cosine_with_min_lr"):
        schedule |= _given(num_cycles=more.take("num_cycles"))
    elif name == "cosine_with_restarts":
        schedule |= _given(cycles=more.take("num_cycles"))
    elif name == "polynomial":
        schedule |= {"power": more.take("power", 1.0), "floor": more.take("lr_end", 1e-7) / lr}
    elif name == "inverse_sqrt":
        warmup = schedule.get("warmup")
        default = warmup if isinstance(warmup, int) else None
        schedule |= _given(timescale=more.take("timescale", default))
    elif name == "warmup_stable_decay":
        kinds = {"cosine": "cosine", "linear": "linear", "1-sqrt": "1-sqrt"}
        schedule |= {"decay": more.take("num_decay_steps"), "shape": more.known("decay_type", "cosine", kinds)[1]}
        schedule |= _given(floor=more.take("min_lr_ratio"))
    if name == "cosine_with_min_lr":
        rate, least = more.take("min_lr_rate"), more.take("min_lr")
        schedule["floor"] = rate if rate is not None else least / lr if least is not None else None
    if name in ("constant", "constant_with_warmup"):
        # of which a warmup may be a fraction
        if not isinstance(schedule.get("warmup"), float):
            del schedule["total"]
    for key in [key for key, value in schedule.items() if value is None]:
        del schedule[key]
    return [f"not converted: lr_scheduler_kwargs.{key} = {more.values[key]!r}" for key in more.left(re.compile(""))]


def _table(value: Any) -> Mapping[str, Any]:
    """They may be JSON in a string."""
    return json.loads(value) if isinstance(value, str) else value


_PROJECTS: dict[str, tuple[Callable[[_Source], Conversion], set[str], re.Pattern[str]]] = {
    "detectron2": (_detectron2, {"SOLVER"}, re.compile("(?!)")),
    "hf": (
        _hf,
        {"learning_rate", "lr_scheduler_type", "num_train_epochs", "adam_beta1"},
        re.compile("optim|lr_|learning|adam_|weight_decay|warmup|max_grad"),
    ),
    "timm": (
        _timm,
        {"opt", "sched", "warmup_epochs"},
        re.compile("opt|lr_|sched|decay_|warmup|cooldown|patience|clip_|layer_decay|momentum|weight_decay"),
    ),
}


def to_toml(tree: Mapping[str, Any]) -> str:
    """A config as TOML: a ``[section]`` for each table, everything in it on lines of its own."""
    blocks = []
    for name, section in tree.items():
        # a value that is null has no place in TOML: what is not there is null
        lines = [f"{key} = {_toml(value)}" for key, value in section.items() if value is not None]
        blocks.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items() if item is not None) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)
