"""Converted configs have the learning rates of the libraries themselves, on every step."""

from __future__ import annotations

import itertools
import math
import sys
from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import nn

import optimx
from optimx.config.writing import to_toml
from optimx.convert import convert
from tests.models import vit

# python 3.10 has none of its own
tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")


def built(theirs: dict[str, Any], per_epoch: int, model: nn.Module | None = None, **over: Any) -> Any:
    """Through a file and back."""
    tree = tomllib.loads(to_toml(convert(theirs).config))
    over = {key.replace("__", "."): value for key, value in over.items()}
    return optimx.build(model or nn.Linear(2, 2), tree, {"schedule.steps_per_epoch": per_epoch, **over})


def check(build: Any, expected: list[float]) -> None:
    found = [step[0] for step in build.scheduler.preview(len(expected))]
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-15), step


# transformers

WSD = {"lr_scheduler_type": "warmup_stable_decay"}
MIN_LR = {"lr_scheduler_type": "cosine_with_min_lr"}
MIN_LR_WARMUP = {"lr_scheduler_type": "cosine_warmup_with_min_lr"}
HF: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {"lr_scheduler_type": "cosine"},
    "cosine_waves": {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 1.5}},
    "restarts": {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 3}},
    "polynomial": {"lr_scheduler_type": "polynomial"},
    "polynomial_to": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 1e-6}},
    "constant": {"lr_scheduler_type": "constant"},
    "constant_warmup": {"lr_scheduler_type": "constant_with_warmup"},
    "inverse_sqrt": {"lr_scheduler_type": "inverse_sqrt"},
    "inverse_sqrt_of": {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 37}},
    "min_lr": {**MIN_LR, "lr_scheduler_kwargs": {"min_lr": 1e-5}},
    "min_lr_rate": {**MIN_LR, "lr_scheduler_kwargs": {"min_lr_rate": 0.2, "num_cycles": 1.0}},
    "warmup_min_lr": {**MIN_LR_WARMUP, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    "warmup_min_lr_rate": {**MIN_LR_WARMUP, "lr_scheduler_kwargs": {"min_lr": 1e-5, "warmup_lr_rate": 0.3}},
    "wsd": {**WSD, "lr_scheduler_kwargs": {"num_decay_steps": 20}},
    "wsd_floor": {**WSD, "lr_scheduler_kwargs": {"num_decay_steps": 20, "min_lr_ratio": 0.1}},
    "wsd_shapes": {**WSD, "lr_scheduler_kwargs": {"num_decay_steps": 20, "min_lr_ratio": 0.1, "warmup_type": "cosine",
                                                  "decay_type": "1-sqrt"}},
    "wsd_waves": {**WSD, "lr_scheduler_kwargs": {"num_decay_steps": 20, "num_cycles": 1.0}},
    "wsd_short": {**WSD, "lr_scheduler_kwargs": {"num_decay_steps": 20, "num_stable_steps": 30, "min_lr_ratio": 0.1}},
    "json": {**MIN_LR, "lr_scheduler_kwargs": '{"min_lr_rate": 0.2}'},
}  # fmt: skip
LENGTHS: dict[str, dict[str, Any]] = {
    "steps": {"max_steps": 105, "warmup_steps": 11},
    "ratio": {"max_steps": 105, "warmup_ratio": 0.07},
    # 100 * 0.07 is more than 7 for a computer
    "ratio_rounding": {"max_steps": 100, "warmup_ratio": 0.07},
    "no_warmup": {"max_steps": 100},
    "epochs": {"num_train_epochs": 2.5, "warmup_steps": 10},
    "epochs_ratio": {"num_train_epochs": 7 / 3, "warmup_ratio": 0.1},
}


@pytest.mark.filterwarnings("ignore:Both num_training_steps")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", HF)
def test_transformers(name: str, length: str) -> None:
    """As its Trainer does: lengths are rounded up."""
    transformers = pytest.importorskip("transformers")
    theirs = {"output_dir": "x", "learning_rate": 1e-4, **HF[name], **LENGTHS[length]}
    per_epoch = 43
    total = theirs.get("max_steps") or math.ceil(theirs["num_train_epochs"] * per_epoch)
    warmup = theirs.get("warmup_steps") or math.ceil(total * theirs.get("warmup_ratio", 0))
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1e-4)
    specific = theirs.get("lr_scheduler_kwargs")
    specific = {"min_lr_rate": 0.2} if isinstance(specific, str) else specific
    scheduler = transformers.get_scheduler(
        theirs.get("lr_scheduler_type", "linear"), optimizer, warmup, total, specific
    )
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    check(built(theirs, per_epoch), expected)


def test_transformers_own_arguments() -> None:
    """What ``TrainingArguments.to_dict`` has is known by its keys, and says all."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments("x", report_to=[], use_cpu=True, max_steps=101, warmup_steps=0.1)
    conversion = convert(arguments.to_dict())
    assert arguments.get_warmup_steps(101) == conversion.config["schedule"]["warmup"]
    assert conversion.notes == []


# timm

PER_EPOCH = 11
TIMM: dict[str, dict[str, Any]] = {
    "cosine": {},
    "floor": {"min_lr": 1e-5},
    "k_decay": {"lr_k_decay": 2.0},
    "tanh": {"sched": "tanh", "min_lr": 1e-5},
    "poly": {"sched": "poly", "decay_rate": 2.0, "min_lr": 1e-5},
    "poly_k": {"sched": "poly", "decay_rate": 1.0, "lr_k_decay": 2.0},
    "step": {"sched": "step", "decay_epochs": 4, "decay_rate": 0.5},
    "step_part": {"sched": "step", "decay_epochs": 2.4, "decay_rate": 0.97},
    "step_part_early": {"sched": "step", "decay_epochs": 1.25, "decay_rate": 0.97},
    "multistep": {"sched": "multistep", "decay_milestones": [5, 9, 13], "decay_rate": 0.5},
    "constant": {"sched": "constant"},
    "wsd": {"sched": "wsd", "decay_epochs": 0.25, "min_lr": 1e-5},
    "wsd_cosine": {"sched": "wsd", "decay_epochs": 4, "lr_decay_fn": "cosine"},
    "wsd_exp": {"sched": "wsd", "decay_epochs": None, "lr_decay_fn": "exp"},
    "rsqrt": {"sched": "rsqrt", "decay_epochs": 0.25, "min_lr": 1e-5, "lr_stable_timescale": 7},
    "cycles": {"lr_cycle_limit": 3, "lr_cycle_mul": 2.0, "lr_cycle_decay": 0.5, "min_lr": 1e-5, "epochs": 6},
    "equal_cycles": {"lr_cycle_limit": 2, "lr_cycle_mul": 1.0, "lr_cycle_decay": 0.1, "epochs": 6},
    "tanh_cycles": {"sched": "tanh", "lr_cycle_limit": 2, "lr_cycle_mul": 2.0, "lr_cycle_decay": 0.5, "epochs": 6},
    "cooldown": {"cooldown_epochs": 3, "min_lr": 1e-5},
    "no_warmup": {"warmup_epochs": 0},
    "warmup_from_0": {"warmup_lr": 0.0},
}
BASE: dict[str, Any] = {
    "opt": "adamw",
    "lr": 5e-4,
    "sched": "cosine",
    "epochs": 16,
    "warmup_epochs": 3,
    "warmup_lr": 1e-6,
}


def timms(theirs: dict[str, Any], lr: float, groups: Any = None) -> tuple[list[list[float]], Any]:
    """The learning rates of timm's own schedule, set as its train.py does, and the optimizer."""
    scheduling = pytest.importorskip("timm.scheduler.scheduler_factory")
    optimizer = torch.optim.SGD(groups or [nn.Parameter(torch.ones(1))], lr=lr)
    kwargs = scheduling.scheduler_kwargs(Namespace(**theirs))
    scheduler, epochs = scheduling.create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=PER_EPOCH)
    rows = []
    for t in range(int(epochs) * PER_EPOCH):
        if t % PER_EPOCH == 0:
            scheduler.step(t // PER_EPOCH)
        scheduler.step_update(t)
        rows.append([group["lr"] for group in optimizer.param_groups])
    return rows, optimizer


@pytest.mark.parametrize(
    "how", [{}, {"sched_on_updates": True}, {"warmup_prefix": True}, {"sched_on_updates": True, "warmup_prefix": True}],
    ids=["epochs", "updates", "prefix", "updates-prefix"],
)  # fmt: skip
@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str, how: dict[str, Any]) -> None:
    theirs = {**BASE, **TIMM[name], **how}
    rows, _ = timms(theirs, 5e-4)
    check(built(theirs, PER_EPOCH), [row[0] for row in rows])


@pytest.mark.parametrize("name", ["floor", "wsd", "rsqrt", "cycles"])
def test_timms_batch_size(name: str) -> None:
    """Its floors are learning rates, whatever the batch size makes of the peak."""
    theirs = {**BASE, **TIMM[name], "lr": None, "lr_base": 1e-3, "lr_base_size": 256, "batch_size": 64}
    for processes in (1, 8):
        lr = 1e-3 * (64 * processes / 256) ** 0.5
        rows, _ = timms(theirs, lr)
        check(built(theirs, PER_EPOCH, batch_scaling__batch=64 * processes), [row[0] for row in rows])


@pytest.mark.parametrize("more", [{}, {"sched": "tanh", "min_lr": 1e-5}, {"min_lr": 1e-5, "sched_on_updates": True}])
def test_timms_layers(more: dict[str, Any]) -> None:
    """Every group has its own floor there too, as timm multiplies what its schedule says with the group's scale."""
    optim = pytest.importorskip("timm.optim")
    model = vit()
    theirs = {**BASE, **more, "weight_decay": 0.05, "layer_decay": 0.5}
    optimizer = optim.create_optimizer_v2(model, opt="adamw", lr=5e-4, weight_decay=0.05, layer_decay=0.5)
    rows, theirs_optimizer = timms(theirs, 5e-4, optimizer.param_groups)
    ours = built(theirs, PER_EPOCH, model)
    names = {id(p): name for name, p in model.named_parameters()}
    for step, row, found in zip(itertools.count(), rows, ours.scheduler.preview(len(rows)), strict=False):
        expected = {
            names[id(p)]: (lr, group["weight_decay"])
            for group, lr in zip(theirs_optimizer.param_groups, row, strict=True)
            for p in group["params"]
        }
        for group, lr in zip(ours.optimizer.param_groups, found, strict=True):
            for name in group["param_names"]:
                assert (lr, group["weight_decay"]) == pytest.approx(expected[name], rel=1e-9), (step, name)


# detectron2, which has no package: its schedules, on the way from 0 to 1, as its documentation has them

STEPS = {"STEPS": [60, 80], "MAX_ITER": 90, "WARMUP_ITERS": 10}
D2: dict[str, dict[str, Any]] = {
    "steps": STEPS,
    "in_warmup": {**STEPS, "STEPS": [7, 80], "WARMUP_FACTOR": 0.05},
    "rescaled": {**STEPS, "RESCALE_INTERVAL": True},
    "constant": {**STEPS, "WARMUP_METHOD": "constant"},
    "no_warmup": {**STEPS, "WARMUP_ITERS": 0},
    "cosine": {**STEPS, "LR_SCHEDULER_NAME": "WarmupCosineLR", "BASE_LR_END": 0.001},
    "cosine_rescaled": {**STEPS, "LR_SCHEDULER_NAME": "WarmupCosineLR", "RESCALE_INTERVAL": True},
    "fixed_gamma": {**STEPS, "LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR", "NUM_DECAYS": 3},
    "fixed_gamma_rescaled": {**STEPS, "LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR", "RESCALE_INTERVAL": True},
    "poly": {**STEPS, "LR_SCHEDULER_NAME": "WarmupPolyLR"},
}


def detectron2s(solver: dict[str, Any], t: int, lr: float) -> float:
    total, warmup, gamma = solver["MAX_ITER"], solver["WARMUP_ITERS"], 0.1
    name, where = solver.get("LR_SCHEDULER_NAME", "WarmupMultiStepLR"), t / solver["MAX_ITER"]
    end = solver.get("BASE_LR_END", 0.0) / lr

    def factor(where: float) -> float:
        if name == "WarmupMultiStepLR":
            return gamma ** sum(int((where + 1e-6) * total) >= step for step in solver["STEPS"])
        if name == "WarmupStepWithFixedGammaLR":
            return gamma ** int((where + 1e-6) * 4)
        if name == "WarmupPolyLR":
            return (1 - where) ** 0.9
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * where))

    start, rescaled = solver.get("WARMUP_FACTOR", 1e-3), solver.get("RESCALE_INTERVAL", False)
    constant = solver.get("WARMUP_METHOD") == "constant"
    if t < warmup and name == "WarmupPolyLR":
        return lr * factor(where) * (start + (1 - start) * t / warmup)
    if t < warmup:
        meets = start if constant else factor(0.0 if rescaled else warmup / total)
        return lr * (start + (meets - start) * t / warmup)
    return lr * factor((t - warmup) / (total - warmup) if rescaled else where)


@pytest.mark.parametrize("name", D2)
def test_detectron2(name: str) -> None:
    theirs = {"SOLVER": {"BASE_LR": 0.02, **D2[name]}}
    check(built(theirs, 1), [detectron2s(D2[name], t, 0.02) for t in range(90)])
