"""timm's training arguments, as its scripts write them to args.yaml."""

from __future__ import annotations

import math
import re
from typing import Any

from .source import Conversion, Source, assumptions, epochs, given, refused

__all__ = ["timm"]

_OPTIMIZERS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in ("adam", "adamw", "nadam", "radam", "adamax", "adadelta", "adagrad", "lion")},
    "sgd": {"name": "sgd", "nesterov": True},
    "nesterov": {"name": "sgd", "nesterov": True},
    "momentum": {"name": "sgd"},
    "rmsprop": {"name": "rmsprop", "alpha": 0.9},
    "radamw": {"name": "radam", "decoupled_weight_decay": True},
    "lamb": {"name": "lamb", "max_grad_norm": 1.0},
}
_WITH_MOMENTUM = ("sgd", "rmsprop")
_SCHEDULES = {
    "cosine": "cosine", "tanh": "tanh", "poly": "polynomial", "step": "exponential", "multistep": "multi_step",
    "constant": "constant", "wsd": "wsd", "rsqrt": "product", "none": None,
}  # fmt: skip
_CYCLIC = ("cosine", "tanh", "poly")
#: Of the decay phase of "wsd" and "rsqrt".
_SHAPES = {"linear": "linear", "1-sqrt": "1-sqrt", "power": "1-sqrt", "cosine": "cosine", "exp": "exponential"}
#: Arguments of schedules; each reads some of them.
_OF_SCHEDULES = (
    "epochs", "warmup_epochs", "warmup_lr", "warmup_prefix", "min_lr", "decay_rate", "decay_epochs", "decay_milestones",
    "patience_epochs", "lr_cycle_mul", "lr_cycle_decay", "lr_cycle_limit", "lr_k_decay", "lr_decay_fn",
    "lr_stable_timescale", "cooldown_epochs", "sched_on_updates", "lr_noise_pct", "lr_noise_std",
)  # fmt: skip


def timm(source: Source) -> Conversion:
    name, optimizer = source.known("opt", "sgd", _OPTIMIZERS)
    notes: list[str] = []
    lr, base, scaling = _learning_rate(source, name, notes)
    optimizer = optimizer | {"lr": base, "weight_decay": source.number("weight_decay", 2e-5)}
    optimizer |= given(eps=source.number("opt_eps"), betas=source.take("opt_betas"))
    if optimizer["name"] in _WITH_MOMENTUM:
        optimizer["momentum"] = source.number("momentum", 0.9)
    source.ignore("momentum")
    optimizer |= source.take("opt_args") or {}
    clip, mode = source.number("clip_grad"), source.take("clip_mode") or "norm"
    if clip and mode == "norm":
        # LAMB clips by itself, too
        optimizer["max_grad_norm"] = min(clip, optimizer.get("max_grad_norm", clip))
    elif clip:
        notes.append(f"not converted: clip_grad = {clip} by {mode}")
    groups = given(layer_decay=source.number("layer_decay"))
    if groups:
        groups |= {"layer_preset": "timm", **given(min_lr_scale=source.number("layer_decay_min_scale"))}
    if source.take("filter_bias_and_bn") is False:
        groups["no_decay"] = []
    source.ignore("layer_decay_min_scale")
    # of one group, a learning rate is itself; in others timm scales it with the group's
    absolute = bool(scaling) and "layer_decay" not in groups
    if scaling and not absolute:
        notes.append(f"warmup_lr and min_lr became ratios of {lr:g}, the lr of that batch")
    schedule = _Schedule(source, lr, absolute, notes).section()
    notes += assumptions("timm", source)
    if any(isinstance(schedule.get(key), str) for key in ("total", "interval")):
        notes.append("lengths are in epochs: give schedule.steps_per_epoch, the optimizer steps of one")
    config = {"optimizer": optimizer, "groups": groups, "schedule": schedule, "batch_scaling": scaling}
    return Conversion(config, notes)


def _learning_rate(source: Source, name: str, notes: list[str]) -> tuple[float, float, dict[str, Any]]:
    """The learning rate, the one that the batch size scales, and how."""
    lr = source.number("lr")
    if lr is not None:
        source.ignore("lr_base", "lr_base_size", "lr_base_scale")
        return lr, lr, {}
    base, size = source.number("lr_base", 0.1), int(source.number("lr_base_size", 256))
    batch = int(source.number("batch_size", 128) * source.number("grad_accum_steps", 1))
    rule = source.take("lr_base_scale") or ("sqrt" if re.search("ada|lamb", name) else "linear")
    notes.append(f"batch_scaling.batch is {batch}, that of one process: multiply it by their number")
    ratio = batch / size
    scaled = base * (ratio**0.5 if rule == "sqrt" else ratio)
    return scaled, base, {"batch": batch, "reference": size, "rule": rule}


class _Schedule:
    """The section ``schedule``."""

    def __init__(self, source: Source, lr: float, absolute: bool, notes: list[str]) -> None:
        self.source, self.lr, self.absolute, self.notes = source, lr, absolute, notes
        self.name, self.ours = source.known("sched", "cosine", _SCHEDULES)
        if self.ours is not None:
            # the defaults of create_scheduler: scripts have their own, which they write to the file
            self.epochs, self.warmup = source.number("epochs", 100), source.number("warmup_epochs", 5)
            self.prefix = bool(source.take("warmup_prefix", False)) or self.name in ("wsd", "rsqrt")
            self.by_epoch = not source.take("sched_on_updates", False)

    def section(self) -> dict[str, Any]:
        source = self.source
        if self.ours is None:
            source.ignore(*_OF_SCHEDULES)
            return {}
        after = self.epochs + (self.warmup if source.take("warmup_prefix") else 0)
        schedule: dict[str, Any] = {"name": self.ours, "total": epochs(after)}
        schedule["convention"] = "timm-prefix" if self.prefix else "timm"
        meets = 1.0
        if self.name in _CYCLIC:
            meets = self._cycles(schedule)
        elif self.name == "step":
            self._steps(schedule)
        elif self.name == "multistep":
            # timm is early: on the last epoch or update before the milestone
            gamma, at = source.number("decay_rate", 0.1), source.numbers("decay_milestones", (30, 60))
            early = [epochs(m - 1) if self.by_epoch else epochs(m, -1) for m in at]
            schedule |= {"milestones": early, "gamma": gamma}
        elif self.name in ("wsd", "rsqrt"):
            self._stable(schedule, after - self.warmup)
        if self.warmup:
            schedule["warmup"] = {"steps": epochs(self.warmup), **self._start(meets)}
        if self.by_epoch:
            schedule["interval"] = "1ep"
        source.ignore(*_OF_SCHEDULES)
        return schedule

    def _level(self, key: str, default: float) -> Any:
        """A learning rate as a ratio, or as it is where the ratio depends on the number of processes."""
        value = self.source.number(key, default)
        if value > self.lr and not self.absolute:
            raise refused(key, f"should be <= lr, which is {self.lr:g},", value)
        return {"value": value} if self.absolute else value / self.lr if self.lr else 0.0

    def _floor(self) -> dict[str, Any]:
        value = self.source.number("min_lr", 0.0)
        return {"floor": self._level("min_lr", 0.0)} if value else {}

    def _start(self, meets: float) -> dict[str, Any]:
        if not self.source.number("warmup_lr", 1e-5):
            return {}
        start = self._level("warmup_lr", 1e-5)
        if self.absolute:
            return {"start": start}
        if start > meets:
            rule = f"should be <= {self.lr * meets:g}, which the warmup rises to,"
            raise refused("warmup_lr", rule, self.source.number("warmup_lr"))
        return {"start": start / meets}

    def _cycles(self, schedule: dict[str, Any]) -> float:
        """Cosine and its like, once or several times; returns the ratio of lr that the warmup rises to."""
        source = self.source
        shape: dict[str, Any] = {"name": self.ours, **self._floor()}
        k = source.number("lr_k_decay") or 1.0
        meets = 1.0
        if self.name == "poly":
            power = source.number("decay_rate", 0.1)
            if k == 1.0:
                shape["power"] = power
            elif power == 1.0:
                shape |= {"name": "one_minus_power", "power": k}
            else:
                raise refused("lr_k_decay", "should be 1 with sched = 'poly', unless decay_rate is 1,", k)
        elif self.name == "cosine" and k != 1.0:
            shape["k"] = k
        elif self.name == "tanh" and not self.prefix:
            # of this one alone a warmup rises to where the decay is, not to the peak
            schedule["convention"] = "detectron2"
            p, floor = self.warmup / self.epochs, shape.get("floor", 0.0)
            if self.absolute:
                raise refused("sched", "should be another than 'tanh' without lr, or with warmup_prefix,", self.name)
            meets = floor + (1 - floor) * 0.5 * (1 - math.tanh(-7 * (1 - p) + 3 * p))
        limit = int(source.number("lr_cycle_limit") or 1)
        if limit == 1:
            schedule |= shape
        else:
            mul, decay = source.number("lr_cycle_mul", 1.0), source.number("lr_cycle_decay", 0.1)
            lengths = [self.epochs * mul**i for i in range(limit)]
            schedule["total"] = epochs(sum(lengths) + (self.warmup if self.prefix else 0))
            if any(length % 1 for length in lengths):
                self.notes.append(f"lr_cycle_mul = {mul} makes cycles of parts of epochs: here they have whole steps")
            # what the warmup takes of the first cycle is before it
            lengths[0] -= 0 if self.prefix else self.warmup
            texts = [epochs(length) for length in lengths]
            schedule |= {"name": "restarts", "cycle": {**shape, "steps": texts[0]}, "lengths": texts}
            schedule["peak_decay"] = decay
        cooldown = source.number("cooldown_epochs") or 0
        if cooldown:
            self.notes.append(
                f"cooldown_epochs = {cooldown}: training goes on for so many epochs after total, at min_lr"
            )
        return meets

    def _decay_epochs(self, null: float) -> Any:
        """Without it timm has 30, but something else for a null."""
        key = "decay_epochs"
        return null if self.source.values.get(key, 30) is None else self.source.number(key, 30)

    def _steps(self, schedule: dict[str, Any]) -> None:
        rate, length = self.source.number("decay_rate", 0.1), self._decay_epochs(90)
        if length % 1 == 0:
            schedule |= {"gamma": rate, "decay_steps": epochs(length), "staircase": True}
            return
        # parts of epochs, so the epochs or steps on which one ends
        before = self.warmup if self.prefix else 0
        schedule |= {"name": "multi_step", "gamma": rate, "convention": "timm"}
        if not self.by_epoch:
            ends = [length * i for i in range(1, int(self.epochs // length) + 1)]
        elif length > 1:
            ends = [e for e in range(1, int(self.epochs) + 1) if e // length > (e - 1) // length]
        else:
            raise refused("decay_epochs", "should be > 1 without sched_on_updates", length)
        schedule["milestones"] = [epochs(before + end) for end in ends]

    def _stable(self, schedule: dict[str, Any], length: float) -> None:
        """A stable phase, or an inverse square root, and a decay: ``length`` epochs together."""
        source = self.source
        decay = self._decay_epochs(0.2)
        decay = decay * length if 0 < decay < 1 else decay
        decay = round(decay) if self.by_epoch else decay
        if not 0 < decay <= length:
            raise refused("decay_epochs", f"should be > 0 and <= {length:g}, the epochs without the warmup,", decay)
        usual = "linear" if self.name == "rsqrt" else "1-sqrt"
        shape = source.known("lr_decay_fn", usual, _SHAPES)[1]
        if self.name == "wsd":
            schedule |= {"decay": epochs(decay), "shape": shape, **self._floor()}
            return
        scale = source.number("lr_stable_timescale") or self.warmup
        root = {"name": "inverse_sqrt", "timescale": epochs(scale), **self._floor()}
        phases = [
            {"name": "hold", "steps": epochs(length - decay)},
            {"name": "cooldown", "steps": epochs(decay), "shape": shape, **self._floor()},
        ]
        schedule["factors"] = [root, {"name": "phases", "phases": phases, "convention": "timm-prefix"}]
