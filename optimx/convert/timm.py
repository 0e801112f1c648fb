"""timm's training arguments, as its scripts write them to args.yaml."""

from __future__ import annotations

import re
from typing import Any

from .source import Conversion, Source, given

__all__ = ["timm"]

_OPTIMIZERS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in ("adam", "adamw", "nadam", "radam", "adamax", "adadelta", "adagrad", "lion")},
    "sgd": {"name": "sgd", "nesterov": True},
    "nesterov": {"name": "sgd", "nesterov": True},
    "momentum": {"name": "sgd"},
    "rmsprop": {"name": "rmsprop", "alpha": 0.9},
    "lamb": {"name": "lamb", "max_grad_norm": 1.0},
}
_SCHEDULES = {
    "cosine": "cosine", "tanh": "tanh", "poly": "polynomial", "step": "exponential", "multistep": "multi_step",
    "constant": "constant", "wsd": "wsd", "none": None,
}  # fmt: skip


def timm(source: Source) -> Conversion:
    name, optimizer = source.known("opt", "sgd", _OPTIMIZERS)
    betas = source.take("opt_betas")
    optimizer = optimizer | given(
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
    groups = given(layer_decay=source.take("layer_decay"), min_lr_scale=source.take("layer_decay_min_scale"))
    if "layer_decay" in groups:
        groups["layer_preset"] = "timm"
    else:
        groups = {}
    if source.take("filter_bias_and_bn", True) is False:
        groups["no_decay"] = []
    schedule = _schedule(source, optimizer.get("lr"))
    if "layer_decay" in groups and {"floor", "warmup"} & schedule.keys():
        notes.append(
            "warmup_lr and min_lr are the same for all layers in timm; here they are ratios of each group's lr"
        )
    if schedule and not source.take("sched_on_updates"):
        notes.append(
            "timm changes the learning rate once an epoch without sched_on_updates; here it changes every step"
        )
    return Conversion({"optimizer": optimizer, "groups": groups, "schedule": schedule, "batch_scaling": scaling}, notes)


def _schedule(source: Source, lr: float | None) -> dict[str, Any]:
    name, ours = source.known("sched", "cosine", _SCHEDULES)
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
