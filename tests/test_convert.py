"""Configs of other projects as ours: the same learning rates, and a note for all that is lost."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimx
from optimx import ConfigError
from optimx.config.files import read_file
from optimx.config.writing import to_toml
from optimx.convert import convert
from optimx.lr_scheduler import get_scheduler

# python 3.10 has none of its own
tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

TIMM = {
    "opt": "adamw", "lr": 5e-4, "weight_decay": 0.05, "layer_decay": None, "sched": "cosine", "epochs": 30,
    "warmup_epochs": 5, "warmup_lr": 1e-6, "min_lr": 1e-5, "clip_grad": 1.0, "clip_mode": "norm", "momentum": 0.9,
    "sched_on_updates": True, "model": "vit_base_patch16_224", "batch_size": 64, "warmup_prefix": False,
}  # fmt: skip
DETECTRON2: dict[str, Any] = {
    "MODEL": {"META_ARCHITECTURE": "GeneralizedRCNN"},
    "SOLVER": {"BASE_LR": 0.02, "STEPS": [60, 80], "MAX_ITER": 90, "WARMUP_ITERS": 10, "IMS_PER_BATCH": 16},
}
HF = {
    "output_dir": "out", "learning_rate": 2e-5, "lr_scheduler_type": "cosine", "warmup_steps": 10, "max_steps": 100,
    "weight_decay": 0.1, "optim": "adamw_torch_fused", "max_grad_norm": 0.5, "adam_beta2": 0.95,
}  # fmt: skip
PER_EPOCH = 10


def built(theirs: dict[str, Any], project: str | None = None) -> Any:
    """Through a file and back."""
    tree = tomllib.loads(to_toml(convert(theirs, project).config))
    return optimx.build(nn.Sequential(nn.Linear(2, 2)), tree, {"schedule.steps_per_epoch": PER_EPOCH})


def rates(theirs: dict[str, Any], steps: int) -> list[float]:
    return [step[0] for step in built(theirs).scheduler.preview(steps)]


def test_timm() -> None:
    """Its ``lr_min + (lr - lr_min) / 2 (1 + cos(pi t / T))``, with a clock that the warmup does not shift."""
    total, warmup = 30 * PER_EPOCH, 5 * PER_EPOCH
    for t, lr in enumerate(rates(TIMM, total)):
        cosine = 1e-5 + (5e-4 - 1e-5) / 2 * (1 + math.cos(math.pi * t / total))
        assert lr == pytest.approx(1e-6 + t * (5e-4 - 1e-6) / warmup if t < warmup else cosine)
    assert [note.partition(":")[0] for note in convert(TIMM).notes] == ["lengths are in epochs"]


def test_timms_prefix() -> None:
    total, warmup = 30 * PER_EPOCH, 5 * PER_EPOCH
    for t, lr in enumerate(rates({**TIMM, "warmup_prefix": True}, total + warmup)):
        cosine = 1e-5 + (5e-4 - 1e-5) / 2 * (1 + math.cos(math.pi * (t - warmup) / total))
        assert lr == pytest.approx(1e-6 + t * (5e-4 - 1e-6) / warmup if t < warmup else cosine)


@pytest.mark.parametrize(
    ("more", "at", "expected"),
    [
        ({"sched": "multistep", "decay_milestones": [10, 20], "decay_rate": 0.5}, 250, 5e-4 / 4),
        ({"sched": "step", "decay_epochs": 10, "decay_rate": 0.5}, 250, 5e-4 / 4),
        ({"sched": "poly", "decay_rate": 2.0}, 150, 1e-5 + 4.9e-4 / 4),
        ({"sched": "constant"}, 250, 5e-4),
        ({"sched": "tanh", "min_lr": 0.0}, 300, 0.0),
    ],
    ids=lambda value: value.get("sched") if isinstance(value, dict) else "",
)
def test_timms_schedules(more: dict[str, Any], at: int, expected: float) -> None:
    assert rates({**TIMM, **more}, at + 1)[-1] == pytest.approx(expected)


def test_timms_optimizers() -> None:
    for name, cls in {
        "sgd": optimx.SGD,
        "momentum": optimx.SGD,
        "lion": optimx.Lion,
        "rmsprop": optimx.RMSprop,
    }.items():
        optimizer = built({**TIMM, "opt": name, "sched": "none"}).optimizer
        assert type(optimizer) is cls
        assert optimizer.defaults.get("nesterov", False) is (name == "sgd")
        assert optimizer.defaults.get("momentum", 0.9) == 0.9
    assert built({**TIMM, "opt": "rmsprop"}).optimizer.defaults["alpha"] == 0.9


def test_timms_groups_and_batch() -> None:
    theirs = {**TIMM, "layer_decay": 0.65, "lr": None, "lr_base": 0.1, "lr_base_size": 512, "clip_mode": "agc",
              "sched_on_updates": False, "lr_noise": [0.5]}  # fmt: skip
    conversion = convert(theirs)
    assert conversion.config["groups"] == {"layer_decay": 0.65, "layer_preset": "timm"}
    assert conversion.config["batch_scaling"] == {"batch": 64, "reference": 512, "rule": "sqrt"}
    assert conversion.config["schedule"]["interval"] == "1ep"
    notes = " ".join(conversion.notes)
    for told in ("batch_scaling.batch is 64", "clip_grad = 1.0 by agc", "lr_noise = [0.5]", "ratios of 0.0353553",
                 "grad_accum_steps = 1"):  # fmt: skip
        assert told in notes


def test_detectron2() -> None:
    """Its warmup from a thousandth, and steps that count from the beginning."""
    build = built(DETECTRON2)
    for t, lr in enumerate(step[0] for step in build.scheduler.preview(90)):
        warmup = 0.001 + 0.999 * t / 10 if t < 10 else 1.0
        assert lr == pytest.approx(0.02 * warmup * 0.1 ** ((t >= 60) + (t >= 80)))
    assert type(build.optimizer) is optimx.SGD
    assert build.optimizer.defaults["momentum"] == 0.9
    assert any("biases (0.0001)" in note for note in convert(DETECTRON2).notes)


def test_detectron2s_options() -> None:
    clipping = {"ENABLED": True, "CLIP_TYPE": "full_model", "CLIP_VALUE": 2.0, "NORM_TYPE": 2.0}
    solver = {**DETECTRON2["SOLVER"], "LR_SCHEDULER_NAME": "WarmupCosineLR", "BASE_LR_END": 0.002,
              "BIAS_LR_FACTOR": 2.0, "WEIGHT_DECAY_NORM": 1e-4, "NESTEROV": True, "WARMUP_METHOD": "constant",
              "NUM_DECAYS": 3, "CLIP_GRADIENTS": clipping}  # fmt: skip
    theirs = {"SOLVER": solver, "_BASE_": "base.yaml"}
    build = built(theirs)
    assert build.optimizer.max_grad_norm == 2.0
    assert build.optimizer.defaults["nesterov"]
    weight, bias = build.optimizer.param_groups
    assert bias["initial_lr"] == 2 * weight["initial_lr"]
    assert weight["weight_decay"] == bias["weight_decay"] == 1e-4
    for t, lr in enumerate(step[0] for step in build.scheduler.preview(90)):
        cosine = 0.002 + 0.018 / 2 * (1 + math.cos(math.pi * t / 90))
        assert lr == pytest.approx(0.02 * 0.001 if t < 10 else cosine)
    notes = " ".join(convert(theirs).notes)
    assert "base.yaml" in notes
    assert "SOLVER.NUM_DECAYS = 3" in notes


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", {"power": 2.0}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("inverse_sqrt", {}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("warmup_stable_decay", {"num_decay_steps": 30}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hugging_face(name: str, arguments: dict[str, Any]) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=2e-5)
    theirs = get_scheduler(name, optimizer, 10, 100, arguments)
    expected = [step[0] for step in theirs.preview(100)]
    assert rates({**HF, "lr_scheduler_type": name, "lr_scheduler_kwargs": arguments}, 100) == pytest.approx(expected)


def test_hugging_faces_optimizer() -> None:
    optimizer = built(HF).optimizer
    assert type(optimizer) is optimx.AdamW
    assert (optimizer.defaults["betas"], optimizer.max_grad_norm) == ((0.9, 0.95), 0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    conversion = convert({"learning_rate": 1e-4, "num_train_epochs": 3, "warmup_ratio": 0.1, "optim_args": "a=b",
                          "lr_scheduler_kwargs": '{"bogus": 1}', "max_grad_norm": 0})  # fmt: skip
    assert conversion.config["schedule"] == {"name": "linear", "total": "3ep", "convention": "hf", "warmup": 0.1}
    assert "max_grad_norm" not in conversion.config["optimizer"]
    assert conversion.notes[:2] == ["not converted: optim_args = 'a=b'", "not converted: lr_scheduler_kwargs.bogus = 1"]
    assert convert({**HF, "optim": "sgd", "optim_args": "momentum=0.9, nesterov=True"}).config["optimizer"] == {
        "name": "sgd", "lr": 2e-5, "weight_decay": 0.1, "momentum": 0.9, "nesterov": True, "max_grad_norm": 0.5,
    }  # fmt: skip
    plateau = convert({**HF, "lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"factor": 0.5}})
    assert plateau.config["schedule"] == {"name": "ReduceLROnPlateau", "factor": 0.5}
    assert "step(metric)" in plateau.notes[-1]


@pytest.mark.parametrize(
    ("theirs", "assumed"),
    [
        (
            {"SOLVER": {"STEPS": "(60, 80)", "MAX_ITER": 90}, "_BASE_": "../Base.yaml"},
            {"SOLVER.BASE_LR = 0.001", "SOLVER.GAMMA = 0.1", "SOLVER.WARMUP_ITERS = 1000", "SOLVER.MOMENTUM = 0.9",
             "SOLVER.WEIGHT_DECAY = 0.0001", "SOLVER.WEIGHT_DECAY_BIAS = 0.0001", "SOLVER.WARMUP_FACTOR = 0.001"},
        ),
        (
            {"learning_rate": 1e-4, "num_train_epochs": 2, "lr_scheduler_type": "polynomial"},
            {"optim = 'adamw_torch'", "adam_beta2 = 0.999", "adam_epsilon = 1e-08", "max_grad_norm = 1.0",
             "weight_decay = 0.0", "warmup_steps = 0", "lr_scheduler_kwargs.lr_end = 1e-07"},
        ),
        (
            {"opt": "sgd", "sched": "cosine"},
            {"lr_base = 0.1", "lr_base_size = 256", "batch_size = 128", "momentum = 0.9", "weight_decay = 2e-05",
             "epochs = 100", "warmup_epochs = 5", "warmup_lr = 1e-05", "min_lr = 0.0", "sched_on_updates = False"},
        ),
    ],
    ids=["detectron2", "hf", "timm"],
)  # fmt: skip
def test_defaults_are_noted(theirs: dict[str, Any], assumed: set[str]) -> None:
    """Of the project, where they decide something and the file does not."""
    (note,) = [note for note in convert(theirs).notes if note.startswith("not given")]
    assert assumed <= set(note.partition("default: ")[2].split(", "))
    assert not any(key in note for key in ("decay_milestones", "lr_cycle", "num_cycles", "NUM_DECAYS"))


def test_detectron2s_files(tmp_path: Path) -> None:
    """Strings that are Python there, and tags that would run something."""
    pytest.importorskip("yaml")
    path = tmp_path / "config.yaml"
    text = """
        _BASE_: "../Base-RCNN-FPN.yaml"
        MODEL:
          ANCHOR_GENERATOR:
            SIZES: !!python/object/apply:eval ["[[x, x * 2] for x in [32, 64]]"]
          CLASSES: {{1: person}}
        SOLVER:
          BASE_LR: 2e-2
          STEPS: {}
          MAX_ITER: 90
          WARMUP_ITERS: 10
    """
    for steps, expected in {
        "(60, 80)": [60, 80],
        "(60,)": [60],
        "()": [],
        "[60, 80]": [60, 80],
        "(60, 95)": [60],
    }.items():
        path.write_text(text.format(steps))
        assert convert(read_file(path)).config["schedule"]["milestones"] == expected
    assert "SOLVER.STEPS [95]" in " ".join(convert(read_file(path)).notes)
    path.write_text(text.format('!!python/object/apply:eval ["(1, 2)"]'))
    with pytest.raises(
        ConfigError, match="STEPS should be a list of numbers, not what YAML's tag !!python/object/apply"
    ):
        convert(read_file(path))


def test_dumps_of_python_objects(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "args.yaml"
    path.write_text(
        "!!python/object:argparse.Namespace\nopt: sgd\nlr: 0.1\nsched: none\nopt_betas: !!python/tuple [1, 2]\n"
    )
    assert convert(read_file(path)).config["optimizer"]["betas"] == [1, 2]
    kind = "!!python/object/apply:transformers.trainer_utils.SchedulerType [cosine]"
    path.write_text(f"learning_rate: 1e-4\nmax_steps: 10\nlr_scheduler_type: {kind}\n")
    assert convert(read_file(path)).config["schedule"]["name"] == "cosine"
