"""What is not converted: configs of other projects that look alike, and values that have no counterpart."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import optimx
from optimx import ConfigError
from optimx.convert import convert
from tests.test_convert import DETECTRON2, HF, TIMM

YOLO = {"task": "detect", "epochs": 100, "optimizer": "SGD", "lr0": 0.01, "lrf": 0.01, "momentum": 0.937,
        "weight_decay": 5e-4, "warmup_epochs": 3.0, "warmup_momentum": 0.8, "patience": 100}  # fmt: skip
LOOK_ALIKES: dict[str, tuple[dict[str, Any], str]] = {
    "ultralytics": (YOLO, "Ultralytics'"),
    "mmengine": ({"optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.1}}, "param_scheduler": []}, "mmengine's"),
    "mmcv": ({"optimizer": {"type": "SGD", "lr": 0.1}, "lr_config": {"policy": "step"}}, "mmengine's"),
    "lightning": ({"seed_everything": 1, "trainer": {"max_epochs": 3}, "model": {"lr": 1e-3}}, "the Lightning CLI's"),
    "class_path": ({"optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 1}}}, "the Lightning CLI's"),
    "deepspeed": ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "train_batch_size": 8}, "DeepSpeed's"),
    "fairseq": ({"optimization": {"lr": [1e-3]}, "lr_scheduler": {"_name": "inverse_sqrt"}}, "fairseq's"),
    "hydra": ({"optimizer": {"_target_": "torch.optim.Adam", "lr": 1e-3}}, "Hydra's"),
    "torchtune": ({"optimizer": {"_component_": "torch.optim.AdamW"}, "max_steps_per_epoch": 3}, "torchtune's"),
    "megatron": ({"adam_beta1": 0.9, "lr_decay_style": "cosine", "train_iters": 10, "lr": 1e-3}, "Megatron-LM's"),
    "diffusers": ({"learning_rate": 1e-4, "num_train_epochs": 3, "lr_scheduler": "cosine", "lr_warmup_steps": 5,
                   "adam_beta1": 0.9}, "a script's of diffusers"),
    "no_trainer": ({"learning_rate": 1e-4, "lr_scheduler_type": "linear", "num_warmup_steps": 5}, "a script's of"),
    "axolotl": ({"base_model": "x", "micro_batch_size": 2, "learning_rate": 1e-4}, "Axolotl's"),
    "slowfast": ({"SOLVER": {"BASE_LR": 0.1, "LR_POLICY": "cosine", "MAX_EPOCH": 3}}, "SlowFast's"),
    "maskrcnn": ({"MODEL": {"WEIGHT": "catalog://x"}, "SOLVER": {"BASE_LR": 0.1}}, "maskrcnn-benchmark's"),
    "state": ({"log_history": [], "global_step": 3, "num_train_epochs": 3, "max_steps": 9}, "a trainer's state"),
    "strange_hf": ({"learning_rate": 1e-4, "num_train_epochs": 3, "scheduler": "cosine"}, "not scheduler"),
    "strange_timm": ({"opt": "adamw", "sched": "cosine", "lr": 1e-3, "unscale_lr": True, "blr": 1}, "not unscale_lr"),
    "mae": ({"blr": 1e-3, "min_lr": 0.0, "warmup_epochs": 40, "layer_decay": 0.75}, "none of them"),
    "swin": ({"TRAIN": {"BASE_LR": 1e-3, "OPTIMIZER": {"NAME": "adamw"}}}, "none of them"),
    "a_learning_rate": ({"learning_rate": 1e-3, "batch_size": 8}, "none of them"),
    "ours": ({"optimizer": {"name": "adamw", "lr": 1e-3}, "schedule": {"name": "linear"}}, "none of them"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_are_refused(name: str) -> None:
    theirs, told = LOOK_ALIKES[name]
    with pytest.raises(ConfigError, match=rf"^project should be (told|one) .*{re.escape(told)}"):
        convert(theirs)


def test_a_project_that_is_told() -> None:
    """Converts what is not known by its keys, but not what is known for another's."""
    strange = {"learning_rate": 1e-4, "num_train_epochs": 3, "embedding_learning_rate": 1e-5}
    with pytest.raises(ConfigError, match="not embedding_learning_rate"):
        convert(strange)
    assert convert(strange, "hf").config["optimizer"]["lr"] == 1e-4
    with pytest.raises(ConfigError, match="Ultralytics'"):
        convert(YOLO, "timm")


@pytest.mark.parametrize(("theirs", "project"), [(TIMM, "timm"), (HF, "hf"), (DETECTRON2, "detectron2")])
def test_build_tells_whose_config_it_is(theirs: dict[str, Any], project: str, tmp_path: Path) -> None:
    path = tmp_path / "args.json"
    path.write_text(json.dumps(theirs))
    with pytest.raises(ConfigError, match=rf"its keys are {project}'s \(`optimx convert .*args.json` makes"):
        optimx.build(nn.Linear(2, 2), path)
    with pytest.raises(ConfigError, match="optimx convert FILE"):
        optimx.build(nn.Linear(2, 2), theirs)


@pytest.mark.parametrize(
    ("theirs", "project", "message"),
    [
        ({}, None, r"project should be told \(--from, or project=\) as one of detectron2, hf, timm, as the keys"),
        (TIMM, "tim", r"project should be .* but is: 'tim'; did you mean 'timm'\?"),
        ({**TIMM, "opt": "adamww"}, None, r"opt should be .* but is: 'adamww'; did you mean 'adamw'\?"),
        ({**TIMM, "sched": "plateau"}, None, "sched should be one that has a counterpart"),
        ({"SOLVER": {"LR_SCHEDULER_NAME": "Mine"}}, None, "LR_SCHEDULER_NAME should be"),
        ({**HF, "optim": "galore_adamw"}, None, "optim should be"),
        ({**TIMM, "lr": "fast"}, None, "lr should be a number but is: 'fast'"),
        ({**TIMM, "min_lr": 1.0}, None, "min_lr should be <= lr, which is 0.0005, but is: 1.0"),
        ({**TIMM, "warmup_lr": 1.0}, None, "warmup_lr should be <= lr"),
        ({**TIMM, "sched": "poly", "lr_k_decay": 2.0}, None, "lr_k_decay should be 1 with sched = 'poly'"),
        ({**HF, "learning_rate": 0, "lr_scheduler_type": "polynomial"}, None, r"cannot be converted \(ZeroDivision"),
        ({"SOLVER": 3}, None, "SOLVER should be a table but is: 3"),
        ({"SOLVER": {"STEPS": "fast"}}, None, "SOLVER.STEPS should be a list of numbers but is: 'fast'"),
        ({"SOLVER": {"OPTIMIZER": "LARS"}}, None, "SOLVER.OPTIMIZER should be one that has a counterpart"),
        ({**HF, "lr_scheduler_type": "cosine_with_min_lr"}, None, "should have one of min_lr and min_lr_rate"),
        ({**HF, "lr_scheduler_type": "warmup_stable_decay"}, None, "should have num_decay_steps"),
        ([], None, r"theirs should be a table but is: \[\]"),
    ],
)
def test_refused(theirs: dict[str, Any], project: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(theirs, project)
