"""A config of Muon and AdamW: one optimizer, groups that go to either, one schedule."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp

import optimx
from optimx import Composite
from optimx.config import AdamWConfig, Config, GroupsConfig, OptimizerConfig, ScheduleConfig
from optimx.config.writing import to_toml
from tests.building import ViT, problems

BOTH = {"name": "muon", "lr": 0.02, "adamw": {"lr": 3e-4}}
MUONS = {f"blocks.{i}.mlp.weight" for i in range(3)}


def vit() -> nn.Module:
    torch.manual_seed(0)
    return ViT(depth=3)


def train(build: optimx.Build, steps: range) -> None:
    for step in steps:
        build.optimizer.zero_grad()
        torch.manual_seed(step)
        build.model(torch.randn(4, 8)).square().mean().backward()
        build.optimizer.step()
        if build.scheduler is not None:
            build.scheduler.step()


def of_each(build: optimx.Build, key: str) -> dict[str, tuple[str, Any]]:
    """Whose each parameter is, and a setting of its group."""
    names = {param: name for name, param in build.model.named_parameters()}
    return {
        names[param]: (owner, group.get(key))
        for owner, member in build.optimizer.optimizers.items()
        for group in member.param_groups
        for param in group["params"]
    }


def muons(build: optimx.Build) -> set[str]:
    return {name for name, (owner, _) in of_each(build, "lr").items() if owner == "muon"}


def test_trains_as_two_by_hand() -> None:
    """With one norm over all, and the learning rate of each from its own beginning."""
    optimizer = {**BOTH, "name": "torch.optim:Muon", "max_grad_norm": 0.1, "weight_decay": 0.1}
    schedule = {"name": "linear", "total": 8, "warmup": 2}
    build = optimx.build(vit(), {"optimizer": optimizer, "groups": {"no_decay": None}, "schedule": schedule})
    train(build, range(6))
    model = vit()
    named = dict(model.named_parameters())
    hidden = [named[name] for name in sorted(MUONS)]
    others = [param for name, param in named.items() if name not in MUONS]
    pair = [(0.02, torch.optim.Muon(hidden, weight_decay=0.1)), (3e-4, torch.optim.AdamW(others))]
    norms = []
    for step, factor in enumerate([1 / 2, 1.0, 6 / 7, 5 / 7, 4 / 7, 3 / 7]):
        model.zero_grad()
        torch.manual_seed(step)
        model(torch.randn(4, 8)).square().mean().backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        for lr, optimizer in pair:
            optimizer.param_groups[0]["lr"] = lr * factor
            optimizer.step()
    assert min(norms) > 0.1
    torch.testing.assert_close(build.optimizer.grad_norm, norms[-1], rtol=1e-5, atol=0.0)
    for name, param in build.model.named_parameters():
        # in bfloat16 the last bit of a clipped gradient may become 2**-8 of an update of 0.02
        atol = 1e-4 if name in MUONS else 1e-7
        torch.testing.assert_close(param, named[name], rtol=1e-5, atol=atol)


def test_the_optimizer_is_a_composite() -> None:
    build = optimx.build(vit(), {"optimizer": {**BOTH, "max_grad_norm": 1.0}})
    assert type(build.optimizer) is Composite
    assert build.optimizer.max_grad_norm == 1.0
    assert [*build.optimizer.optimizers] == ["muon", "adamw"]
    assert isinstance(build.optimizer["muon"], torch.optim.Muon)
    assert type(build.optimizer["adamw"]) is optimx.AdamW
    assert muons(build) == MUONS
    assert all("optimizer" not in group for group in build.optimizer.param_groups)
    assert dict(of_each(build, "lr").values()) == {"muon": 0.02, "adamw": 3e-4}
    # what is not given is each class's own
    decays = of_each(build, "weight_decay")
    assert decays["blocks.0.mlp.weight"] == ("muon", 0.1)
    assert decays["head.weight"] == ("adamw", 0.01)
    assert decays["head.bias"] == ("adamw", 0.0)


@pytest.mark.parametrize("form", ["dict", "dataclasses", "toml", "resolved", "namespace", "overrides"])
def test_every_form_says_the_same(form: str, tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "optimizer": {**BOTH, "adamw": {"lr": 3e-4, "betas": [0.9, 0.95]}},
        "groups": {"muon": ["auto", "!blocks.1.*"], "rules": [{"match": "head.weight", "optimizer": "muon"}]},
        "schedule": {"name": "cosine", "total": 10},
    }
    cfg: Any = tree
    overrides: Any = {}
    if form == "dataclasses":
        adamw = AdamWConfig(lr=3e-4, args={"betas": (0.9, 0.95)})
        groups = GroupsConfig(muon=("auto", "!blocks.1.*"), rules=({"match": "head.weight", "optimizer": "muon"},))
        cfg = Config(OptimizerConfig("muon", lr=0.02, adamw=adamw), groups, ScheduleConfig("cosine", total=10))
    elif form == "toml":
        cfg = tmp_path / "train.toml"
        cfg.write_text(to_toml(tree))
    elif form == "resolved":
        cfg = optimx.build(vit(), tree).config.to_dict()
    elif form == "namespace":
        cfg = argparse.Namespace(**{"optimizer": "muon", "lr": 0.02, "optimizer.adamw.lr": 3e-4,
                                    "optimizer.adamw.betas": [0.9, 0.95], "groups": tree["groups"],
                                    "schedule": tree["schedule"]})  # fmt: skip
    elif form == "overrides":
        cfg = {**tree, "optimizer": "muon"}
        overrides = ["optimizer.lr=0.02", "optimizer.adamw.lr=3e-4", "optimizer.adamw.betas=[0.9, 0.95]"]
    build = optimx.build(vit(), cfg, overrides)
    assert muons(build) == MUONS - {"blocks.1.mlp.weight"} | {"head.weight"}
    assert of_each(build, "betas")["blocks.1.mlp.weight"] == ("adamw", (0.9, 0.95))
    resolved = build.config.to_dict()
    assert resolved == optimx.build(vit(), resolved).config.to_dict() == optimx.build(vit(), tree).config.to_dict()
    assert (resolved["optimizer"]["lr"], resolved["optimizer"]["adamw"]["lr"]) == (0.02, 3e-4)
    assert resolved["groups"]["muon"] == ["auto", "!blocks.1.*"]


def test_who_is_muons_is_written_back() -> None:
    assert optimx.build(vit(), {"optimizer": BOTH}).config.groups.muon == "auto"
    assert "muon" not in optimx.build(vit(), {}).config.to_dict()["groups"]
    # nobody is not the same as what is not said
    build = optimx.build(vit(), {"optimizer": BOTH, "groups": {"muon": []}})
    assert [*build.optimizer.optimizers] == ["adamw"]
    assert build.config.to_dict()["groups"]["muon"] == []
    assert muons(optimx.build(vit(), build.config.to_dict())) == set()


def test_both_learning_rates_are_scheduled() -> None:
    schedule = {"name": "linear", "total": 10, "warmup": 2, "floor": 0.1}
    build = optimx.build(vit(), {"optimizer": BOTH, "schedule": schedule})
    owners = [name for name, own in build.optimizer.optimizers.items() for _ in own.param_groups]
    factors = [0.5, 1.0, 0.9, 0.8]
    for factor, rates in zip(factors, build.scheduler.preview(len(factors)), strict=True):
        assert rates == pytest.approx([factor * (0.02 if owner == "muon" else 3e-4) for owner in owners])
    rows = build.explain().rates
    assert rows[0] == (0, pytest.approx(1.5e-4), pytest.approx(0.01))
    assert rows[-1] == (10, pytest.approx(3e-5), pytest.approx(0.002))


def test_batch_scaling_scales_both() -> None:
    rules = [{"match": "blocks.0.mlp.weight", "lr": 0.1}, {"match": "blocks.1.*", "lr_mult": 0.5}]
    scaling = {"batch": 512, "reference": 256}
    build = optimx.build(vit(), {"optimizer": BOTH, "groups": {"rules": rules}, "batch_scaling": scaling})
    rates = {name: lr for name, (_, lr) in of_each(build, "lr").items()}
    assert rates["blocks.0.mlp.weight"] == pytest.approx(0.2)
    assert rates["blocks.1.mlp.weight"] == pytest.approx(0.02)
    assert rates["blocks.1.mlp.bias"] == pytest.approx(3e-4)
    assert rates["blocks.2.mlp.weight"] == pytest.approx(0.04)
    assert rates["head.weight"] == pytest.approx(6e-4)
    assert build.config.optimizer.adamw.lr == pytest.approx(6e-4)
    # AdamW's own, where it is not given
    build = optimx.build(vit(), {"optimizer": {"name": "muon", "lr": 0.02, "adamw": {}}, "batch_scaling": scaling})
    assert of_each(build, "lr")["head.weight"] == ("adamw", pytest.approx(2e-3))


def test_layer_decay_of_both() -> None:
    build = optimx.build(vit(), {"optimizer": BOTH, "groups": {"layer_decay": 0.5}})
    rates = {name: lr for name, (_, lr) in of_each(build, "lr").items()}
    assert rates["blocks.1.mlp.weight"] == pytest.approx(0.02 / 4)
    assert rates["blocks.1.mlp.bias"] == pytest.approx(3e-4 / 4)


def test_options_go_to_whose_they_are() -> None:
    """A rule for a block has betas for its norms, and a momentum for its matrix."""
    rules = [{"match": "blocks.0.*", "betas": [0.8, 0.9], "momentum": 0.9}, {"match": "blocks.1.*", "eps": 1e-6}]
    build = optimx.build(vit(), {"optimizer": BOTH, "groups": {"rules": rules}})
    betas, momenta, eps = (of_each(build, key) for key in ("betas", "momentum", "eps"))
    assert betas["blocks.0.norm.weight"] == ("adamw", (0.8, 0.9))
    assert betas["blocks.0.mlp.weight"] == ("muon", None)
    assert momenta["blocks.0.mlp.weight"] == ("muon", 0.9)
    assert momenta["blocks.0.norm.weight"] == ("adamw", None)
    assert momenta["blocks.1.mlp.weight"] == ("muon", 0.95)
    assert {eps[f"blocks.1.{name}"] for name in ("mlp.weight", "mlp.bias")} == {("muon", 1e-6), ("adamw", 1e-6)}


def test_frozen_matrices_leave_adamw_alone() -> None:
    build = optimx.build(vit(), {"optimizer": BOTH, "groups": {"freeze": ["blocks.*.mlp.weight"]}})
    assert [*build.optimizer.optimizers] == ["adamw"]
    train(build, range(2))


def test_any_optimizer_beside_adamw() -> None:
    optimizer = {"name": "torch.optim:SGD", "lr": 0.5, "momentum": 0.9, "adamw": {"lr": 1e-3}}
    build = optimx.build(vit(), {"optimizer": optimizer})
    assert type(build.optimizer["muon"]) is torch.optim.SGD
    assert muons(build) == MUONS
    train(build, range(2))


def test_explains() -> None:
    build = optimx.build(
        vit(), {"optimizer": BOTH, "groups": {"rules": [{"match": "head.weight", "optimizer": "muon"}]}}
    )
    groups = build.explain().groups
    said = {
        name: (group.settings["optimizer"], reason)
        for group in groups.groups
        for name, reason in zip(group.names, group.reasons, strict=True)
    }
    assert {name for name, (owner, _) in said.items() if owner == "muon"} == MUONS | {"head.weight"}
    assert said["head.weight"] == ("muon", "by a rule or a pattern")
    assert said["blocks.0.mlp.weight"] == ("muon", "hidden matrix")
    assert said["pos_embed"] == ("adamw", "positions")
    assert {line.split(":")[0] for line in groups.notes} == {"in every group of muon", "in every group of adamw"}
    assert str(groups) in str(build.explain())


@pytest.mark.parametrize("schedule", [None, {"name": "cosine", "total": 20, "warmup": 3}])
def test_resume(schedule: dict[str, Any] | None) -> None:
    cfg = {"optimizer": {**BOTH, "max_grad_norm": 0.1}, "schedule": schedule}
    straight, first, second = (optimx.build(vit(), cfg) for _ in range(3))
    train(straight, range(6))
    train(first, range(3))
    file = io.BytesIO()
    torch.save({"model": first.model.state_dict(), **first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second.model.load_state_dict(saved.pop("model"))
    second.load_state_dict(saved)
    train(second, range(3, 6))
    assert all(map(torch.equal, straight.model.parameters(), second.model.parameters()))


def test_distributed_checkpoint(tmp_path: Path) -> None:
    cfg = {"optimizer": {**BOTH, "max_grad_norm": 0.1}, "schedule": {"name": "cosine", "total": 20, "warmup": 3}}
    first, second = optimx.build(vit(), cfg), optimx.build(vit(), cfg)
    train(first, range(3))
    dcp.save({"train": first.as_stateful()}, checkpoint_id=tmp_path)
    dcp.load({"train": second.as_stateful()}, checkpoint_id=tmp_path)
    for build in (first, second):
        train(build, range(3, 6))
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters()))


# what is wrong


def test_all_problems_at_once() -> None:
    cfg = {
        "optimizer": {"name": "muon", "lr": -1.0, "adamw": {"lr": "x", "betas": [0.9, 2.0], "momentum": 0.9,
                                                             "max_grad_norm": 1.0}},
        "groups": {"muon": ["auto", "blocsk.*"], "rules": [{"match": "head.*", "optimizer": "adam"}]},
        "schedule": {"name": "cosine", "total": 0},
    }  # fmt: skip
    assert [text.partition(" ")[0] for text in problems(vit(), cfg)] == [
        "optimizer.lr",
        "optimizer.adamw.lr",
        "optimizer.adamw.max_grad_norm",
        "optimizer.adamw.momentum",
        "optimizer.adamw.betas",
        "groups.rules[0]",
        "groups.muon",
        "schedule.total",
    ]


def test_rules_are_of_the_composite() -> None:
    rules = {
        "max_grad_norm": {"name": "zclip", "warmup": 5}, "skip_nonfinite": True, "skip_spikes": {"window": 16},
        "max_skips": 4, "average": {"name": "swa", "start": 2},
    }  # fmt: skip
    build = optimx.build(vit(), {"optimizer": {**BOTH, **rules}})
    for optimizer in (build.optimizer, optimx.build(vit(), build.config.to_dict()).optimizer):
        assert isinstance(optimizer, optimx.Composite)
        assert optimizer.max_grad_norm == optimx.ZClip(warmup=5)
        assert optimizer.skip_spikes == optimx.Spikes(16)
        assert optimizer.skip_nonfinite
        assert optimizer.max_skips == 4
        for member in optimizer.optimizers.values():
            assert not member.needs_norm
            assert member.max_skips is None
            assert member.average == optimx.SWA(start=2)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "table": ({"optimizer": {"name": "muon", "adamw": "adamw"}}, "optimizer.adamw should be a table but is: 'adamw'"),
    "key": ({"optimizer": {**BOTH, "adamw": {"beta": [0.9, 0.9]}}},
            "optimizer.adamw.beta (value: [0.9, 0.9]) is no key of AdamW ("),
    "value": ({"optimizer": {**BOTH, "adamw": {"eps": -1.0}}}, "optimizer.adamw.eps (value: -1.0) is refused: "),
    "clip": ({"optimizer": {**BOTH, "adamw": {"max_grad_norm": 1.0}}},
             "optimizer.adamw.max_grad_norm should be given as optimizer.max_grad_norm, which holds for both, but"),
    "skip": ({"optimizer": {**BOTH, "adamw": {"skip_nonfinite": True}}},
             "optimizer.adamw.skip_nonfinite should be given as optimizer.skip_nonfinite, which holds for both, but"),
    "average": ({"optimizer": {**BOTH, "adamw": {"average": {"name": "ema"}}}},
                "optimizer.adamw.average should be given as optimizer.average, which holds for both, but"),
    "skips": ({"optimizer": {**BOTH, "max_skips": 3}},
              "optimizer.max_skips (value: 3) is refused: max_skips should be None without skip_nonfinite"),
    "muon-alone": ({"groups": {"muon": "auto"}}, "groups.muon (value: 'auto') is refused: there is no table "
                   "optimizer.adamw"),
    "rule-alone": ({"groups": {"rules": [{"match": "head.*", "optimizer": "adamw"}]}},
                   "groups.rules[0].optimizer (value: 'adamw') is refused: there is no table optimizer.adamw"),
    "muon": ({"optimizer": BOTH, "groups": {"muon": "all"}},
             "groups.muon (value: 'all') is refused: muon should be "),
    "pattern": ({"optimizer": BOTH, "groups": {"muon": ["auto", "!haed.*"]}},
                "groups.muon (value: ('auto', '!haed.*')) is refused: muon[1] should fit a parameter but is: 'haed.*'"),
    "vectors": ({"optimizer": BOTH, "groups": {"rules": [{"match": "norm.*", "optimizer": "muon"}]}},
                "groups.rules[0] is refused: rules[0] should give Muon matrices only but gives it: 'norm.bias'"),
    "option": ({"optimizer": BOTH, "groups": {"rules": [{"match": "head.*", "momentm": 0.5}]}},
               "groups.rules[0].momentm (value: 0.5) is no key of a rule for Muon and AdamW ("),
    "option-value": ({"optimizer": BOTH, "groups": {"rules": [{"match": "head.*", "betas": [2, 2]}]}},
                     "groups.rules[0].betas (value: (2.0, 2.0)) is refused: "),
    "option-type": ({"optimizer": BOTH, "groups": {"rules": [{"match": "*", "eps": "x"}]}},
                    "groups.rules[0].eps should be a number but is: 'x'"),
    "no-effect": ({"optimizer": BOTH, "groups": {"rules": [{"match": "head.*", "momentum": 0.5}]}},
                  "groups.rules[0].momentum (value: 0.5) is no option of AdamW, whose are all that the rule matches"),
    "no-effect-of-two": ({"optimizer": BOTH, "groups": {"rules": [{"match": "blocks.*.mlp.weight", "betas": [0.5, 0.5]},
                                                                   {"match": "*", "betas": [0.9, 0.9]}]}},
                         "groups.rules[0].betas (value: (0.5, 0.5)) is no option of Muon, whose are all"),
    "decay": ({"optimizer": {"name": "sgd", "lr": 1, "adamw": {"lr": float("inf")}}}, "optimizer.adamw.lr"),
}  # fmt: skip


@pytest.mark.parametrize(("cfg", "expected"), WRONG.values(), ids=WRONG)
def test_refusals(cfg: dict[str, Any], expected: str) -> None:
    (problem,) = problems(vit(), cfg)
    assert problem.startswith(expected)


# the preset


def test_preset() -> None:
    build = optimx.build(vit(), {"preset": "gpt-muon", "optimizer": {"adamw": {"lr": 1e-4}}}, ["optimizer.lr=0.01"])
    assert build.config.optimizer.lr == 0.01
    adamw = build.config.optimizer.adamw
    assert (adamw.lr, adamw.weight_decay, adamw.args["betas"], adamw.args["eps"]) == (1e-4, 0.01, (0.9, 0.95), 1e-10)
    assert {decay for _, decay in of_each(build, "weight_decay").values()} == {0.01}
    assert muons(build) == MUONS
    # another optimizer's table is its own
    build = optimx.build(vit(), {"preset": "gpt-muon", "optimizer": {"name": "adamw"}})
    assert type(build.optimizer) is optimx.AdamW
    build = optimx.build(vit(), {"preset": "gpt-muon", "optimizer": {"name": "lion", "adamw": {}}})
    assert build.config.optimizer.adamw.args["betas"] == (0.9, 0.999)


def test_settings_of_muon_alone() -> None:
    """A dtype by its name; by a rule, matrices that are split: both are settings that no group has by default."""
    rules = [{"match": "blocks.0.mlp.weight", "split": [4, 4], "normalize": "neuron"}]
    cfg = {"optimizer": {**BOTH, "ns_dtype": "float32"}, "groups": {"rules": rules}}
    build = optimx.build(vit(), cfg)
    splits = {name: split for name, (_, split) in of_each(build, "split").items() if split is not None}
    assert splits == {"blocks.0.mlp.weight": (4, 4)}
    assert build.optimizer["muon"].param_groups[0]["ns_dtype"] is torch.float32
    train(build, range(2))
    written = to_toml(build.config.to_dict())
    assert 'ns_dtype = "float32"' in written
    assert optimx.build(vit(), build.config.to_dict()).config == build.config


@pytest.mark.parametrize(
    ("of_muon", "told"),
    [
        ({"ns_dtype": "float12"}, "optimizer.ns_dtype should be a dtype ('bfloat16') but is: 'float12'"),
        ({"split": 0}, "optimizer.split (value: 0) is refused: split should be >= 1 but is: 0"),
    ],
)
def test_wrong_settings_of_muon(of_muon: dict[str, Any], told: str) -> None:
    assert problems(vit(), {"optimizer": {**BOTH, **of_muon}}) == [told]
