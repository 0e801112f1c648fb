"""The arguments of programs: what is read of them, and that the rest is theirs."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import optimx
from optimx.config import ConfigError
from optimx.config.loading import load
from optimx.presets import TREES
from tests.building import ViT, linear

#: Arguments that well-known programs have, and the tree that is read of them.
PROGRAMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mnist": (
        {"batch_size": 64, "epochs": 14, "lr": 1.0, "gamma": 0.7, "no_cuda": False, "dry_run": False, "seed": 1},
        {"optimizer": {"lr": 1.0}},
    ),
    "imagenet": (
        {"arch": "resnet18", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "start_epoch": 0, "resume": ""},
        {"optimizer": {"lr": 0.1, "weight_decay": 1e-4}},
    ),
    "torchvision": (
        {"opt": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "norm_weight_decay": None,
         "lr_scheduler": "steplr", "lr_warmup_epochs": 0, "lr_step_size": 30, "lr_gamma": 0.1, "lr_min": 0.0},
        {"optimizer": {"lr": 0.1, "weight_decay": 1e-4}},
    ),
    "timm": (
        {"opt": "sgd", "opt_eps": None, "opt_betas": None, "momentum": 0.9, "weight_decay": 2e-5, "clip_grad": None,
         "layer_decay": None, "sched": "cosine", "sched_on_updates": False, "lr": None, "lr_base": 0.1,
         "warmup_lr": 1e-5, "warmup_epochs": 5, "min_lr": 0, "epochs": 300, "decay_milestones": [90, 180]},
        {"optimizer": {"weight_decay": 2e-5}},
    ),
    "mae": (
        {"model": "mae_vit", "accum_iter": 1, "mask_ratio": 0.75, "weight_decay": 0.05, "lr": None, "blr": 1e-3,
         "layer_decay": 0.75, "min_lr": 0.0, "warmup_epochs": 40, "clip_grad": None},
        {"optimizer": {"weight_decay": 0.05}, "groups": {"layer_decay": 0.75}},
    ),
    "dino": (
        {"optimizer": "adamw", "lr": 5e-4, "weight_decay": 0.04, "weight_decay_end": 0.4, "momentum_teacher": 0.996,
         "warmup_epochs": 10, "min_lr": 1e-6, "clip_grad": 3.0, "global_crops_scale": (0.4, 1.0)},
        {"optimizer": {"name": "adamw", "lr": 5e-4, "weight_decay": 0.04}},
    ),
    "moco": (
        {"lr": 0.03, "schedule": [120, 160], "momentum": 0.9, "weight_decay": 1e-4, "moco_m": 0.999, "cos": True},
        {"optimizer": {"lr": 0.03, "weight_decay": 1e-4}},
    ),
    "open_clip": (
        {"lr": 5e-4, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "wd": 0.2, "warmup": 10000, "lr_scheduler": "cosine",
         "grad_clip_norm": None, "momentum": None, "precision": "amp", "opt": "adamw"},
        {"optimizer": {"lr": 5e-4}},
    ),
    "yolo": (
        {"optimizer": "SGD", "lr0": 0.01, "lrf": 0.01, "momentum": 0.937, "weight_decay": 5e-4, "warmup_epochs": 3.0,
         "warmup_momentum": 0.8, "freeze": [0], "cos_lr": False, "box": 7.5},
        {"optimizer": {"name": "SGD", "momentum": 0.937, "weight_decay": 5e-4}},
    ),
    "cleanrl_ppo": (
        {"env_id": "CartPole-v1", "learning_rate": 2.5e-4, "anneal_lr": True, "gamma": 0.99, "total_timesteps": 5e5,
         "max_grad_norm": 0.5, "clip_coef": 0.2, "target_kl": None},
        {"optimizer": {"max_grad_norm": 0.5}},
    ),
    "dqn": ({"lr": 1e-3, "eps": 0.1, "eps_decay": 0.99, "total": 500}, {"optimizer": {"lr": 1e-3}}),
    "fairseq": (
        {"optimizer": "adam", "lr": [5e-4], "adam_betas": "(0.9, 0.98)", "adam_eps": 1e-8, "clip_norm": 0.0,
         "lr_scheduler": "inverse_sqrt", "warmup_updates": 4000, "weight_decay": 0.0, "max_update": 50000},
        {"optimizer": {"name": "adam", "lr": 5e-4, "weight_decay": 0.0}},
    ),
    "transformers": (
        {"learning_rate": 5e-5, "weight_decay": 0.0, "adam_epsilon": 1e-8, "max_grad_norm": 0.0, "warmup_steps": 0},
        {"optimizer": {"weight_decay": 0.0}},
    ),
    "detectron2": ({"config_file": "x.yaml", "num_gpus": 8, "opts": ["SOLVER.BASE_LR", "0.1"], "resume": True}, {}),
    "dcgan": ({"lr": 2e-4, "beta1": 0.5, "nz": 100, "netG": "", "ngf": 64}, {"optimizer": {"lr": 2e-4}}),
    "cyclegan": ({"lr": 2e-4, "b1": 0.5, "lr_policy": "linear", "n_epochs_decay": 100}, {"optimizer": {"lr": 2e-4}}),
    "vae": ({"lr": 1e-3, "beta": 4.0, "epochs": 3, "floors": 2, "totals": 3}, {"optimizer": {"lr": 1e-3}}),
    "diffusion": (
        {"lr": 1e-4, "schedule": "linear", "noise_schedule": "cosine", "lr_warmup": 500, "ema_decay": 0.9999},
        {"optimizer": {"lr": 1e-4}},
    ),
    "pipeline": ({"schedule": "1f1b", "steps_per_epoch": 5, "warmup": 3, "lr": 0.1}, {"optimizer": {"lr": 0.1}}),
    "grouped_conv": ({"groups": 32, "group": 3, "preset": "slow", "preset_name": "x", "batch_scaling": True}, {}),
    "another_scheduler": (
        {"scheduler": "step", "optimizers": 2, "optimiser": "adam", "player_decay": 0.5, "scheduler.gamma": 0.1,
         "group.size": 3, "layer_decay": False, "no_decay": True},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str) -> None:
    arguments, tree = PROGRAMS[name]
    assert load(Namespace(**arguments), presets=TREES) == tree
    assert load(SimpleNamespace(**arguments), presets=TREES) == tree
    build = optimx.build(ViT(), Namespace(**arguments))
    assert build.scheduler is None
    assert build.optimizer.defaults["lr"] == tree.get("optimizer", {}).get("lr", 1e-3)


def read(**arguments: Any) -> dict[str, Any]:
    return load(Namespace(**arguments), presets=TREES)


def test_what_some_optimizers_have() -> None:
    """Programs have a momentum for SGD whatever the optimizer; what is given by its path is taken at its word."""
    for name, expected in (
        ("sgd", {"momentum": 0.9}), ("rmsprop", {"momentum": 0.9}), ("adamw", {"betas": [0.8, 0.9]}),
        ("lion", {"betas": [0.8, 0.9]}), ("torch.optim:SGD", {"momentum": 0.9}), ("rprop", {}),
    ):  # fmt: skip
        decay = {} if name == "rprop" else {"weight_decay": 0}
        tree = read(optimizer=name, momentum=0.9, betas=(0.8, 0.9), weight_decay=0)
        assert tree == {"optimizer": {"name": name, **decay, **expected}}
    assert read(optimizer=torch.optim.Adam, momentum=0.9) == {"optimizer": {"name": torch.optim.Adam}}
    assert read(preset="resnet-sgd", momentum=0.8)["optimizer"]["momentum"] == 0.8
    assert load(Namespace(optimizer="adamw", momentum=0.9), {"optimizer.name": "sgd"})["optimizer"]["momentum"] == 0.9
    for explicit in (
        lambda: optimx.build(linear(), Namespace(**{"optimizer": "adamw", "optimizer.momentum": 0.9})),
        lambda: optimx.build(linear(), Namespace(optimizer={"name": "adamw", "momentum": 0.9})),
        lambda: optimx.build(linear(), Namespace(optimizer="adamw", momentum=0.5), {"optimizer.momentum": 0.9}),
        lambda: optimx.build(linear(), Namespace(optimizer="rprop", weight_decay=0.1)),
    ):
        with pytest.raises(ConfigError, match=r"optimizer\.(momentum|weight_decay) .* is no key of"):
            explicit()
    with pytest.raises(ConfigError, match=r"optimizer\.name .* 'adamww'; did you mean 'adamw'"):
        optimx.build(linear(), Namespace(optimizer="adamww", momentum=0.9))


@pytest.mark.parametrize(
    ("arguments", "overrides", "schedule"),
    [
        ({"schedule": "cosine", "total": 10, "warmup": 2, "floor": 0.1}, {},
         {"name": "cosine", "total": 10, "warmup": 2, "floor": 0.1}),
        ({"schedule": "cosine", "warmup": 2}, {"schedule.total": 10}, {"name": "cosine", "total": 10, "warmup": 2}),
        ({"schedule": "cosine", "schedule.total": 10}, {}, {"name": "cosine", "total": 10}),
        ({"schedule": {"name": "cosine", "total": 10}, "warmup": 2}, {}, {"name": "cosine", "total": 10}),
        ({"total": 10, "warmup": 2}, {}, None),
        ({"schedule": [3, 6], "total": 10}, {}, None),
    ],
)  # fmt: skip
def test_schedules_beside_their_length(
    arguments: dict[str, Any], overrides: dict[str, Any], schedule: dict[str, Any] | None
) -> None:
    assert load(Namespace(**arguments), overrides).get("schedule") == schedule


def test_a_preset_of_ours() -> None:
    tree = read(preset="bert-finetune", steps_per_epoch=7, total="2ep")
    assert (tree["schedule"]["name"], tree["schedule"]["steps_per_epoch"], tree["schedule"]["total"]) == (
        "linear", 7, "2ep",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="did you mean 'bert-finetune'"):
        read(preset="bert-fintune")


def test_the_more_explicit_one_counts() -> None:
    """Whichever the program defined first."""
    for names in (("lr", "optimizer", "optimizer.eps"), ("optimizer.eps", "optimizer", "lr")):
        values = {"lr": 0.1, "optimizer": {"name": "sgd", "lr": 0.2, "eps": 1.0}, "optimizer.eps": 2.0}
        tree = read(**{name: values[name] for name in names}, weight_decay=0.3)
        assert tree["optimizer"] == {"name": "sgd", "lr": 0.2, "weight_decay": 0.3, "eps": 2.0}


def test_namespaces_within() -> None:
    """As jsonargparse returns them; None is not given there too."""
    within = Namespace(name="adamw", lr=0.1, weight_decay=None)
    assert read(optimizer=within, schedule=SimpleNamespace(name="linear", total=5)) == {
        "optimizer": {"name": "adamw", "lr": 0.1}, "schedule": {"name": "linear", "total": 5},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "tree"),
    [
        ({"lr": [0.1], "weight_decay": [0]}, {"optimizer": {"lr": 0.1, "weight_decay": 0}}),
        ({"max_grad_norm": -1, "layer_decay": 1.0}, {}),
        ({"max_grad_norm": float("inf"), "layer_decay": 0.5},
         {"optimizer": {"max_grad_norm": float("inf")}, "groups": {"layer_decay": 0.5}}),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)]), "momentum": True}, {}),
    ],
)  # fmt: skip
def test_values_that_programs_have(arguments: dict[str, Any], tree: dict[str, Any]) -> None:
    assert read(**arguments) == tree


def test_values_that_are_wrong_are_told() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr should be a number.* but is: \[0\.1, 0\.2\]"):
        optimx.build(linear(), Namespace(lr=[0.1, 0.2]))
    with pytest.raises(ConfigError, match=r"weight_dceay .* 'weight_decay'"):
        read(weight_dceay=0.1)
