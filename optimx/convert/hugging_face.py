"""Hugging Face's TrainingArguments."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .source import Conversion, Source, given

__all__ = ["hugging_face"]

_OPTIMIZERS: dict[str, dict[str, Any]] = {
    **{name: {"name": "adamw"} for name in ("adamw_torch", "adamw_torch_fused", "adamw_hf")},
    **{name: {"name": name} for name in ("sgd", "adagrad", "rmsprop")},
    "lion_32bit": {"name": "lion"},
    # what its trainer sets
    "adafactor": {"name": "adafactor", "variant": "hf", "scale_parameter": False},
}
_SCHEDULES: dict[str, str] = {
    "linear": "linear", "cosine": "cosine", "cosine_with_restarts": "cosine_with_hard_restarts",
    "polynomial": "polynomial", "constant": "constant", "constant_with_warmup": "constant",
    "inverse_sqrt": "inverse_sqrt", "cosine_with_min_lr": "cosine", "warmup_stable_decay": "wsd",
}  # fmt: skip


def hugging_face(source: Source) -> Conversion:
    _, optimizer = source.known("optim", "adamw_torch", _OPTIMIZERS)
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
    name, ours = source.known("lr_scheduler_type", "linear", _SCHEDULES)
    warmup = source.take("warmup_steps", 0) or source.take("warmup_ratio", 0)
    source.take("warmup_ratio")
    schedule = {"name": ours, "total": total, "convention": "hf"}
    if warmup and name != "constant":
        schedule["warmup"] = int(warmup) if warmup >= 1 else warmup
    notes = _arguments(name, Source(_table(source.take("lr_scheduler_kwargs", {}))), schedule, lr)
    return Conversion({"optimizer": optimizer, "schedule": schedule}, notes)


def _arguments(name: str, more: Source, schedule: dict[str, Any], lr: float) -> list[str]:
    """``lr_scheduler_kwargs``; returns what of them is not converted."""
    if name in ("cosine", "cosine_with_min_lr"):
        schedule |= given(num_cycles=more.take("num_cycles"))
    elif name == "cosine_with_restarts":
        schedule |= given(cycles=more.take("num_cycles"))
    elif name == "polynomial":
        schedule |= {"power": more.take("power", 1.0), "floor": more.take("lr_end", 1e-7) / lr}
    elif name == "inverse_sqrt":
        warmup = schedule.get("warmup")
        default = warmup if isinstance(warmup, int) else None
        schedule |= given(timescale=more.take("timescale", default))
    elif name == "warmup_stable_decay":
        kinds = {"cosine": "cosine", "linear": "linear", "1-sqrt": "1-sqrt"}
        schedule |= {"decay": more.take("num_decay_steps"), "shape": more.known("decay_type", "cosine", kinds)[1]}
        schedule |= given(floor=more.take("min_lr_ratio"))
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
