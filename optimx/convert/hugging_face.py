"""Hugging Face's TrainingArguments."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from .source import Conversion, Source, assumptions, epochs, given, refused

__all__ = ["hugging_face"]

_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_torch_xla", "adamw_torch_npu_fused",
          "adamw_apex_fused")  # fmt: skip
_OPTIMIZERS: dict[str, dict[str, Any]] = {
    **{name: {"name": "adamw"} for name in _ADAMW},
    **{name: {"name": name} for name in ("sgd", "adagrad", "rmsprop")},
    "lion_32bit": {"name": "lion"},
    # what its trainer sets
    "adafactor": {"name": "adafactor", "variant": "hf", "scale_parameter": False},
}
#: What ``optim_args`` may say of an optimizer.
_OPTIM_ARGS = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
}
_SCHEDULES: dict[str, str] = {
    "linear": "linear", "cosine": "cosine", "cosine_with_restarts": "cosine_with_hard_restarts",
    "polynomial": "polynomial", "constant": "constant", "constant_with_warmup": "constant",
    "inverse_sqrt": "inverse_sqrt", "cosine_with_min_lr": "cosine", "cosine_warmup_with_min_lr": "cosine",
    "warmup_stable_decay": "wsd",
}  # fmt: skip
#: Those that follow a metric take their own arguments.
_BY_METRIC = {"reduce_lr_on_plateau": "ReduceLROnPlateau", "greedy": "GreedyLR"}
_SHAPES = {"linear": "linear", "cosine": "cosine", "1-sqrt": "1-sqrt"}


def hugging_face(source: Source) -> Conversion:
    name, optimizer = source.known("optim", "adamw_torch", _OPTIMIZERS)
    lr = source.number("learning_rate", 5e-5)
    optimizer = optimizer | {"lr": lr, "weight_decay": source.number("weight_decay", 0.0)}
    if optimizer["name"] in ("adamw", "lion"):
        optimizer["betas"] = [source.number("adam_beta1", 0.9), source.number("adam_beta2", 0.999)]
    if optimizer["name"] == "adamw":
        optimizer["eps"] = source.number("adam_epsilon", 1e-8)
    source.ignore("adam_beta1", "adam_beta2", "adam_epsilon")
    if source.take("adafactor"):
        raise refused("adafactor", "should be told as optim = 'adafactor'", True)
    optimizer |= _optim_args(name, source)
    clip = source.number("max_grad_norm", 1.0)
    if clip:
        optimizer["max_grad_norm"] = clip
    schedule, specific = _schedule(source, lr)
    notes = specific.left(re.compile("")) + assumptions("transformers", source, specific)
    if schedule.get("name") in _BY_METRIC.values():
        notes.append("the scheduler follows a metric: call its step(metric) after every evaluation, as Trainer does")
    if isinstance(schedule.get("total"), str):
        notes.append(
            "lengths are in epochs: give schedule.steps_per_epoch, the optimizer steps of one "
            "(batches / gradient_accumulation_steps, rounded up)"
        )
    return Conversion({"optimizer": optimizer, "schedule": schedule}, notes)


def _optim_args(name: str, source: Source) -> dict[str, Any]:
    """``"momentum=0.9,nesterov=true"`` as arguments, if the optimizer reads all of them."""
    text = source.values.get("optim_args")
    pairs = dict(pair.partition("=")[::2] for pair in text.replace(" ", "").split(",")) if text else {}
    if not pairs or not pairs.keys() <= set(_OPTIM_ARGS.get(name, ())):
        return {}
    source.ignore("optim_args")
    flags = ("nesterov", "centered")
    return {k: v.lower() in ("true", "1", "yes") if k in flags else float(v) for k, v in pairs.items()}


def _schedule(source: Source, lr: float) -> tuple[dict[str, Any], Source]:
    """The section, and what of ``lr_scheduler_kwargs`` has been read."""
    name, ours = source.known("lr_scheduler_type", "linear", _SCHEDULES | _BY_METRIC)
    specific = Source(_table(source.take("lr_scheduler_kwargs") or {}), "lr_scheduler_kwargs.")
    if name in _BY_METRIC:
        # its warmup and its length have no effect
        source.ignore("warmup_steps", "warmup_ratio", "max_steps", "num_train_epochs")
        specific.ignore(*specific.values)
        return {"name": ours, **specific.values}, specific
    steps = int(source.number("max_steps", -1))
    total: int | str = steps
    if steps > 0:
        source.ignore("num_train_epochs")
    else:
        total = epochs(source.number("num_train_epochs", 3.0))
    warmup = source.number("warmup_steps") or source.number("warmup_ratio") or 0
    source.ignore("warmup_ratio")
    if not {"warmup_steps", "warmup_ratio"} & source.values.keys() and name != "constant":
        source.assumed["warmup_steps"] = 0
    # a ratio is rounded up, here or by the convention
    if warmup >= 1:
        warmup = int(warmup)
    elif isinstance(total, int):
        warmup = math.ceil(total * warmup)
    schedule: dict[str, Any] = {"name": ours, "total": total, "convention": "hf"}
    if warmup and name != "constant":
        schedule["warmup"] = warmup
    _arguments(name, specific, schedule, lr)
    return {key: value for key, value in schedule.items() if value is not None}, specific


def _arguments(name: str, specific: Source, schedule: dict[str, Any], lr: float) -> None:
    """Adds to the section what ``lr_scheduler_kwargs`` say."""
    warmup = schedule.get("warmup")
    if name in ("cosine", "cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        schedule |= given(num_cycles=specific.number("num_cycles"))
    elif name == "cosine_with_restarts":
        schedule |= given(cycles=specific.number("num_cycles"))
    elif name == "polynomial":
        schedule |= {"power": specific.number("power", 1.0), "floor": specific.number("lr_end", 1e-7) / lr}
    elif name == "inverse_sqrt":
        schedule["timescale"] = specific.number("timescale", warmup or 10_000)
    elif name == "warmup_stable_decay":
        _wsd(specific, schedule)
    if name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        schedule["floor"] = _floor(specific, lr)
    if name == "cosine_warmup_with_min_lr":
        schedule["convention"] = "hf-cosine-warmup"
        start = specific.number("warmup_lr_rate")
        if start == 0:
            raise refused("lr_scheduler_kwargs.warmup_lr_rate", "should be > 0 or null", start)
        if start is not None and warmup:
            schedule["warmup"] = {"steps": warmup, "start": start}
    # of the total a warmup may be a fraction
    if name in ("constant", "constant_with_warmup") and not isinstance(warmup, float):
        schedule["total"] = None


def _floor(specific: Source, lr: float) -> float:
    rate, least = specific.number("min_lr_rate"), specific.number("min_lr")
    if (rate is None) == (least is None):
        raise refused("lr_scheduler_kwargs", "should have one of min_lr and min_lr_rate", dict(specific.values))
    return least / lr if rate is None else rate


def _wsd(specific: Source, schedule: dict[str, Any]) -> None:
    shape = specific.known("decay_type", "cosine", _SHAPES)[1]
    rise = specific.known("warmup_type", "linear", _SHAPES)[1]
    floor, waves = specific.number("min_lr_ratio", 0.0), specific.number("num_cycles")
    decay, stable = specific.number("num_decay_steps"), specific.number("num_stable_steps")
    if decay is None:
        raise refused("lr_scheduler_kwargs", "should have num_decay_steps", dict(specific.values))
    warmup = schedule.get("warmup")
    if warmup and (floor or rise != "linear"):
        schedule["warmup"] = {"steps": warmup, "shape": rise, "start": floor}
    if stable is None and waves is None:
        schedule |= {"decay": decay, "shape": shape, "floor": floor}
        return
    # a stable phase of its own length ends before the total, or a cosine elsewhere than on the floor
    names = {"linear": "linear", "cosine": "cosine", "1-sqrt": "one_minus_sqrt"}
    cosine = given(num_cycles=waves) if shape == "cosine" else {}
    phases = [{"name": "constant", **given(steps=stable)},
              {"name": names[shape], "steps": decay, "floor": floor, **cosine}]  # fmt: skip
    if stable is not None:
        phases.append({"name": "constant", "level": floor})
    schedule |= {"name": None, "phases": phases}
    total = schedule["total"]
    if stable is not None and isinstance(total, int) and (warmup or 0) + stable + decay >= total:
        # what is cut off is not needed, but for its length
        del phases[-1]
        schedule["total"] = int((warmup or 0) + stable + decay)


def _table(value: Any) -> Mapping[str, Any]:
    """They may be JSON in a string."""
    return json.loads(value) if isinstance(value, str) else value
