"""detectron2's SOLVER."""

from __future__ import annotations

import ast
import math
import re
from typing import Any

from .source import Conversion, Source, assumptions, refused

__all__ = ["detectron2"]

_OPTIMIZERS = {
    "SGD": {"name": "sgd"},
    # of projects that are built on it
    "ADAMW": {"name": "adamw"},
}
_SCHEDULES = {
    "WarmupMultiStepLR": "multi_step",
    "WarmupStepWithFixedGammaLR": "multi_step",
    "WarmupCosineLR": "cosine",
    "WarmupPolyLR": "polynomial",
}
#: Keys of SOLVER that are about something else stay where they are.
_SOLVER = re.compile(r"(?!IMS_PER_BATCH|CHECKPOINT_PERIOD|AMP|REFERENCE_WORLD_SIZE)")
#: By so much its schedules are ahead of the progress, a number from 0 to 1.
_EPSILON = 1e-6


def detectron2(source: Source) -> Conversion:
    solver = Source(_read(source.take("SOLVER", {})), "SOLVER.")
    notes = []
    base = source.take("_BASE_")
    if base:
        notes.append(f"_BASE_ = {base!r} is not read: what it sets is at detectron2's default here")
    name, optimizer = solver.known("OPTIMIZER", "SGD", _OPTIMIZERS)
    # not a key of its own
    solver.assumed.pop("SOLVER.OPTIMIZER", None)
    lr, decay = solver.number("BASE_LR", 1e-3), solver.number("WEIGHT_DECAY", 1e-4)
    optimizer = optimizer | {"lr": lr, "weight_decay": decay}
    if name == "SGD":
        optimizer |= {"momentum": solver.number("MOMENTUM", 0.9), "nesterov": solver.take("NESTEROV", False)}
    clip = Source(solver.take("CLIP_GRADIENTS") or {}, "SOLVER.CLIP_GRADIENTS.")
    if clip.take("ENABLED", False):
        if clip.take("CLIP_TYPE", "value") == "full_model" and clip.take("NORM_TYPE", 2.0) == 2.0:
            optimizer["max_grad_norm"] = clip.number("CLIP_VALUE", 1.0)
        else:
            notes.append(
                f"not converted: SOLVER.CLIP_GRADIENTS = {dict(clip.values)!r}, only full_model by the 2-norm is"
            )
    groups = _groups(solver, decay, notes)
    schedule = _schedule(solver, lr, notes)
    notes += solver.left(_SOLVER) + assumptions("detectron2", solver, clip)
    return Conversion({"optimizer": optimizer, "groups": groups, "schedule": schedule}, notes)


def _read(solver: Any) -> Any:
    """detectron2 reads strings as Python: ``"(60000, 80000)"`` is a tuple in its files."""
    if isinstance(solver, dict):
        return {key: _read(value) for key, value in solver.items()}
    if isinstance(solver, str):
        try:
            return ast.literal_eval(solver)
        except (ValueError, SyntaxError):
            pass
    return solver


def _groups(solver: Source, decay: float, notes: list[str]) -> dict[str, Any]:
    norm = solver.number("WEIGHT_DECAY_NORM", 0.0)
    bias = solver.number("WEIGHT_DECAY_BIAS", decay)
    groups: dict[str, Any] = {}
    if norm == bias == decay:
        groups["no_decay"] = []
    elif norm or bias:
        notes.append(f"weight decay of norms ({norm}) and biases ({bias}): here neither decays")
    rules = [
        {"match": match, "lr_mult": factor}
        for match, factor in {
            "*backbone*": solver.number("BACKBONE_MULTIPLIER"),
            "*.bias": solver.number("BIAS_LR_FACTOR", 1.0),
        }.items()
        if factor not in (None, 1.0)
    ]
    return groups | ({"rules": rules} if rules else {})


def _schedule(solver: Source, lr: float, notes: list[str]) -> dict[str, Any]:
    name, ours = solver.known("LR_SCHEDULER_NAME", "WarmupMultiStepLR", _SCHEDULES)
    total = int(solver.number("MAX_ITER", 40_000))
    warmup = min(int(solver.number("WARMUP_ITERS", 1000)), total)
    rescaled = bool(solver.take("RESCALE_INTERVAL", False)) and ours != "polynomial"
    convention = "hf" if rescaled else "product" if ours == "polynomial" else "detectron2"
    schedule = {"name": ours, "total": total, "convention": convention}
    span = total - warmup if rescaled else total
    # a warmup begins at a ratio of the first value there, of the value that it ends with here
    meets = 1.0
    if ours == "multi_step":
        gamma = solver.number("GAMMA", 0.1)
        ends = [math.ceil((point - _EPSILON) * span - 1e-9) for point in _points(name, solver, total, notes)]
        schedule |= {"milestones": ends, "gamma": gamma}
        meets = 1.0 if rescaled else gamma ** sum(end <= warmup for end in ends)
    elif ours == "cosine":
        floor = solver.number("BASE_LR_END", 0.0) / lr
        schedule["floor"] = floor
        if not rescaled:
            meets = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * warmup / total))
    else:
        schedule["power"] = solver.number("POLY_LR_POWER", 0.9)
    shape, start = solver.take("WARMUP_METHOD", "linear"), solver.number("WARMUP_FACTOR", 1e-3)
    if warmup:
        start /= meets
        if start > 1:
            rule = f"should be <= {meets:g}, the ratio of BASE_LR with which the warmup ends,"
            raise refused("SOLVER.WARMUP_FACTOR", rule, start * meets)
        schedule["warmup"] = {"steps": warmup, "shape": shape, "start": start}
    return schedule


def _points(name: str, solver: Source, total: int, notes: list[str]) -> list[float]:
    """Where on the way from 0 to 1 the learning rate is multiplied by gamma."""
    if name == "WarmupStepWithFixedGammaLR":
        decays = int(solver.number("NUM_DECAYS", 3))
        return [k / (decays + 1) for k in range(1, decays + 1)]
    steps = solver.numbers("STEPS", (30_000,))
    late = [step for step in steps if step > total]
    if late:
        notes.append(f"not converted: SOLVER.STEPS {late}, which are after MAX_ITER = {total}")
    return [step / total for step in steps if step <= total]
