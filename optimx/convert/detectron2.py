"""detectron2's SOLVER."""

from __future__ import annotations

import math
import re
from typing import Any

from .source import Conversion, Source

__all__ = ["detectron2"]


def detectron2(source: Source) -> Conversion:
    solver = Source(source.take("SOLVER", {}))
    notes = (
        [f"{source.take('_BASE_')} is not read: what it sets is left at its default"] if source.take("_BASE_") else []
    )
    lr, decay = solver.take("BASE_LR", 1e-3), solver.take("WEIGHT_DECAY", 1e-4)
    optimizer = {
        "name": "sgd", "lr": lr, "momentum": solver.take("MOMENTUM", 0.9), "weight_decay": decay,
        "nesterov": solver.take("NESTEROV", False),
    }  # fmt: skip
    clip = Source(solver.take("CLIP_GRADIENTS", {}))
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
