"""Configs that are refused: every problem with its path; nothing else than a build or a refusal comes of any config."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import optimx
from optimx import ConfigError
from tests.building import linear, problems


def test_all_problems_of_all_sections_at_once() -> None:
    cfg = {
        "optimizer": {"name": "adamw", "lr": -1, "eps": -1.0, "nesterov": True, "betas": [0.9, 1.5]},
        "groups": {"layer_decay": 2, "layr_decay": 0.5, "rules": [{"match": "9.*", "lr": 1}]},
        "schedule": {"name": "cosine", "total": 0, "warmup": "2ep", "powr": 2},
        "batch_scaling": {"batch": 1},
    }
    before = copy.deepcopy(cfg)
    assert [text.partition(" ")[0] for text in problems(linear(), cfg)] == [
        "optimizer.lr",
        "groups.layer_decay",
        "groups.layr_decay",
        "batch_scaling.reference",
        "optimizer.nesterov",
        "optimizer.eps",
        "optimizer.betas",
        "groups.rules[0]",
        "schedule.total",
        "schedule.warmup",
        "schedule.powr",
    ]
    assert cfg == before


WRONG: dict[str, tuple[Any, list[str]]] = {
    "optimizer": ({"optimizer": "adamww"}, ["optimizer.name should be a name .* 'adamww'; did you mean 'adamw'"]),
    "no_optimizer": ({"optimizer": dict}, ["optimizer.name should make a torch.optim.Optimizer|optimizer.*is refused"]),
    "values": (
        {"optimizer": {"eps": -1.0, "betas": [0.9, 1.5]}},
        [r"optimizer.eps \(value: -1.0\) is refused: .*epsilon", r"optimizer.betas \(value: \(0.9, 1.5\)\) is refused"],
    ),
    "together": (
        {"optimizer": {"name": "sgd", "nesterov": True, "lr": 0.1}},
        [r"optimizer.nesterov \(value: True\) is refused: Nesterov momentum requires"],
    ),
    "both": ({"optimizer": {"lr": 1, "args": {"eps": 1e-8}, "eps": 1e-8}}, ["optimizer.eps should be given once"]),
    "clip": (
        {"optimizer": {"name": "torch.optim:Adafactor", "max_grad_norm": 1.0}},
        [r"optimizer.max_grad_norm \(value: 1.0\) is no key of Adafactor"],
    ),
    "rules": (
        {"groups": {"rules": [{"match": "0.wieght", "lr_mult": 2}, {"match": "2.*", "lr_mul": 2},
                              {"match": "9", "lr": 1}]}},
        [r"groups.rules\[0\] is refused: match should fit a parameter but is: '0.wieght'",
         r"groups.rules\[1\].lr_mul \(value: 2\) is no key of a rule for AdamW .* did you mean 'lr_mult'",
         r"groups.rules\[2\] is refused: match should fit a parameter but is: '9'"],
    ),
    "patterns": (
        {"groups": {"rules": [{"match": "0.wieght", "lr_mult": 2}, {"match": "9", "lr": 1}], "freeze": ["2.bais"]}},
        [
            r"groups.rules\[0\] is refused: match should fit a parameter but is: '0.wieght'.* '0.weight'",
            r"groups.rules\[1\] is refused: match should fit a parameter but is: '9'",
            r"groups.freeze\[0\] \(value: '2.bais'\) is refused: .* '2.bias'",
        ],
    ),
    "rule_values": (
        {"groups": {"rules": [{"match": "*", "betas": [2, 2]}, {"match": "*"}, {"match": "*", "eps": "x"}, {"lr": 1}]}},
        [r"groups.rules\[0\].betas \(value: .*is refused", r"groups.rules\[1\] is refused: .* should set something",
         r"groups.rules\[2\].eps should be a number but is: 'x'", r"groups.rules\[3\].match is missing"],
    ),
    "rule_without_decay": (
        {"optimizer": "rprop", "groups": {"rules": [{"match": "*", "wd_mult": 2.0}]}},
        [r"groups.rules\[0\].wd_mult .* Rprop has no weight decay"],
    ),
    "one_layer": ({"groups": {"layer_decay": 0.5, "layers": ["*"]}}, ["groups is refused: .*"]),
    "preset": ({"preset": "bert-finetun"}, ["preset should be one of .* did you mean 'bert-finetune'"]),
    "no_total": ({"schedule": "cosine"}, ["schedule.total is missing, the length of 'cosine'"]),
    "bad_total": (
        {"schedule": {"name": "cosine", "total": "1000 steps", "warmup": 0.1, "powr": 2}},
        [r"schedule.powr \(value: 2\) is no key of Cosine", "schedule.total should be whole steps"],
    ),
    "total_of_no_epochs": (
        {"schedule": {"name": "cosine", "total": "2ep", "warmup": {"steps": 0.1}}},
        ["schedule.total should be steps, as there is no schedule.steps_per_epoch, but is: '2ep'"],
    ),
    "total_of_bad_epochs": (
        {"schedule": {"name": "StepLR", "total": "2ep", "steps_per_epoch": "many", "step_size": "1ep"}},
        ["schedule.steps_per_epoch should be a whole number but is: 'many'"],
    ),
    "long_warmup": (
        {"schedule": {"name": "cosine", "total": 10, "warmup": 11}},
        ["schedule.total should be >= 11, the steps of the warmup, but is: 10"],
    ),
    "no_steps_left": (
        {"schedule": {"phases": [{"name": "hold", "steps": 10}, {"name": "cosine"}], "total": 10}},
        ["schedule.total should be > 10, the steps of the other phases, but is: 10"],
    ),
    "ambiguous": (
        {"schedule": {"name": "cosine", "total": 10, "warmup": 1.0}},
        ["schedule.warmup should be whole steps >= 0, a fraction of the total < 1, or epochs .* but is: 1.0"],
    ),
    "nameless": ({"schedule": {"total": 5}}, ["schedule should have either name or phases"]),
    "name_and_phases": (
        {"schedule": {"name": "linear", "phases": [{"name": "linear"}], "total": 5}},
        ["schedule should have either name or phases but is: 'linear'"],
    ),
    "two_open_phases": (
        {"schedule": {"phases": [{"name": "hold"}, {"name": "linear"}], "total": 5}},
        [r"schedule.phases\[1\].steps is missing: only one phase gets"],
    ),
    "phases_and_total": (
        {"schedule": {"phases": [{"name": "hold", "steps": 3}, {"name": "linear", "steps": 3}], "total": 5}},
        ["schedule.total should be 6, what the phases have together, but is: 5"],
    ),
    "phases": (
        {"schedule": {"phases": [{"steps": 3}, {"name": "linaer", "steps": 3}, {"name": "StepLR", "steps": 2},
                                 {"name": "linear", "steps": 2, "flor": 0.1}], "bogus": 1, "floor": 0.1}},
        ["schedule.bogus .* is no key of a schedule of phases", "schedule.floor should be given in the phases"],
    ),
    "phase": (
        {"schedule": {"phases": [{"steps": 3}, {"name": "linaer", "steps": 3}, {"name": "StepLR", "steps": 2},
                                 {"name": "linear", "steps": 2, "flor": 0.1}]}},
        [r"schedule.phases\[0\].name is missing", r"schedule.phases\[1\].name .* did you mean 'linear'",
         r"schedule.phases\[2\].name should be a schedule, not a scheduler, but is: 'StepLR'",
         r"schedule.phases\[3\].flor \(value: 0.1\) is no key of Linear .* did you mean 'floor'"],
    ),
    "nested": (
        {"schedule": {"name": "restarts", "cycle": {"name": "cosine", "steps": 10, "powr": 2}}},
        [r"schedule.cycle.powr \(value: 2\) is no key of Cosine .* did you mean 'power'"],
    ),
    "argument": (
        {"schedule": {"name": "cosine", "total": 10, "power": -1.0}},
        [r"schedule.power should be > 0 but is: -1.0"],
    ),
    "torchs": (
        {"schedule": {"name": "StepLR", "total": 5, "floor": 0.1, "gama": 0.5}},
        [r"schedule.total .* is no key of StepLR", "schedule.floor .* is no key of StepLR",
         r"schedule.gama .* is no key of StepLR .* did you mean 'gamma'", "schedule.step_size is missing"],
    ),
    "refused": (
        {"schedule": {"name": "OneCycleLR", "max_lr": 0.1}},
        ["schedule.* is refused: .*total_steps"],
    ),
    "plateau": (
        {"schedule": {"name": "ReduceLROnPlateau", "warmup": 5}},
        ["schedule is refused: .*PlateauWithWarmup"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong(name: str) -> None:
    cfg, expected = WRONG[name]
    found = problems(linear(), cfg)
    assert len(found) == len(expected), found
    for text, pattern in zip(sorted(found), sorted(expected), strict=True):
        assert re.match(pattern, text), text


def test_no_model() -> None:
    with pytest.raises(TypeError, match=r"model should be a torch\.nn\.Module but is: list"):
        optimx.build([nn.Parameter(torch.ones(1))], {})  # type: ignore[arg-type]


def test_a_refused_config_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even with a parameter of the model."""
    model = linear()
    own = {id(p) for p in model.parameters()}
    seen: list[int] = []
    original = torch.optim.Optimizer.add_param_group

    def watch(self: Any, group: dict[str, Any]) -> None:
        members = group["params"] if isinstance(group["params"], list) else [group["params"]]
        seen.extend(id(p) for p in members)
        original(self, group)

    monkeypatch.setattr(torch.optim.Optimizer, "add_param_group", watch)
    problems(model, {"schedule": {"name": "cosine", "total": 10, "power": -1.0}})
    assert seen
    assert not own & set(seen)
    optimx.build(model, {"schedule": {"name": "cosine", "total": 10}})
    assert own <= set(seen)


# whatever a config is, it is built or refused

SECTIONS: dict[str, list[str]] = {
    "optimizer": ["name", "lr", "weight_decay", "max_grad_norm", "betas", "eps", "momentum", "nesterov", "args",
                  "fused"],
    "groups": ["no_decay", "layer_decay", "layers", "layer_preset", "min_lr_scale", "rules", "freeze",
               "include_frozen"],
    "schedule": ["name", "phases", "total", "warmup", "floor", "steps_per_epoch", "convention", "power", "milestones",
                 "cycle", "decay", "shape", "steps", "step_size", "args"],
    "batch_scaling": ["batch", "reference", "rule"],
    "search": ["optimizer.lr", "optimizer.name", "schedule.total", "groups.rules[0].lr_mult", "low", "high", "log"],
}  # fmt: skip
RULE = ["match", "lr", "lr_mult", "weight_decay", "wd_mult", "freeze", "betas", "eps"]
NAMES = ["adamw", "sgd", "muon", "lion", "cosine", "linear", "wsd", "warmup", "hold", "StepLR", "restarts", "noam",
         "*", "0.*", "*.weight", "2ep", "0.5 epochs", "auto", "beit", "timm", "hf", "sqrt", "torch.optim:SGD", "re:(",
         "1-sqrt"]  # fmt: skip
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.floats()
    | st.floats(0, 1)
    | st.sampled_from(NAMES)
    | st.text(max_size=5)
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "steps", *RULE]) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
configs = st.fixed_dictionaries(
    {},
    optional={
        section: st.dictionaries(st.sampled_from(keys) | st.text(max_size=4), values, max_size=5) | leaves
        for section, keys in SECTIONS.items()
    },
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(configs)
def test_any_config_is_built_or_refused(cfg: dict[str, Any]) -> None:
    before = copy.deepcopy(cfg)
    model = linear()
    built_or_refused(model, cfg)
    assert repr(cfg) == repr(before)


def built_or_refused(model: nn.Module, cfg: Any) -> None:
    try:
        build = optimx.build(model, cfg)
    except ConfigError as error:
        texts = [str(problem) for problem in error.problems]
    else:
        texts = [str(build.explain())]
    assert texts
    assert all(texts)


@given(st.text() | leaves | st.binary() | st.lists(leaves))
def test_what_is_no_config_is_refused(cfg: Any) -> None:
    for suffix in ("", ".toml"):
        with pytest.raises(ConfigError):
            optimx.build(nn.Linear(1, 1), cfg + suffix if isinstance(cfg, str) else cfg)


BASES: list[dict[str, Any]] = [
    {"optimizer": {"name": "adamw", "lr": 0.1}, "schedule": {"name": "cosine", "total": 20}},
    {"optimizer": {"name": "sgd", "momentum": 0.9}, "groups": {"rules": [{"match": "0.*", "lr_mult": 2.0}]},
     "schedule": {"phases": [{"name": "hold", "steps": 3}, {"name": "linear", "steps": 4}]}},
    {"optimizer": {"name": "lamb"}, "schedule": {"name": "StepLR", "step_size": 3, "warmup": 2}},
    {"groups": {"layer_decay": 0.5, "layers": ["0.*", "2.*"]}, "schedule": {"name": "wsd", "total": 9, "decay": 3},
     "batch_scaling": {"batch": 2, "reference": 1}},
    {"schedule": {"name": "linear", "total": 9}, "search": {"optimizer.lr": {"low": 0.1, "high": 1}}},
    {"schedule": {"name": "restarts", "cycle": {"name": "linear", "steps": 3}, "mult": 2, "steps_per_epoch": 2}},
]  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(BASES), st.data())
def test_one_wrong_value_is_built_or_refused(base: dict[str, Any], data: st.DataObject) -> None:
    cfg = copy.deepcopy(base)
    section = data.draw(st.sampled_from(sorted(cfg)))
    at: Any = cfg[section]
    nested = [*(at.get("rules") or at.get("phases") or []), *([at["cycle"]] if "cycle" in at else [])]
    at = data.draw(st.sampled_from([at, *nested]))
    key = data.draw(st.sampled_from([*at, *SECTIONS[section], *(RULE if section == "groups" else [])]))
    at[key] = data.draw(values)
    built_or_refused(linear(), cfg)


#: Mostly right, so that many are built.
plausible = st.fixed_dictionaries(
    {
        "optimizer": st.fixed_dictionaries(
            {"name": st.sampled_from(["adamw", "adam", "lion", "lamb", "radam"]), "lr": st.floats(0, 1)},
            optional={
                "weight_decay": st.floats(0, 1),
                "max_grad_norm": st.floats(0.1, 2),
                "betas": st.just([0.9, 0.99]),
            },
        )
    },
    optional={
        "groups": st.fixed_dictionaries(
            {},
            optional={
                "no_decay": st.sampled_from(["auto", [], ["*.bias"], "embeddings"]),
                "rules": st.lists(
                    st.fixed_dictionaries(
                        {"match": st.sampled_from(["0.*", "*.bias", "2.weight", "9.*"])},
                        optional={"lr_mult": st.floats(0, 2), "wd_mult": st.floats(0, 2), "freeze": st.booleans()},
                    ),
                    max_size=2,
                ),
            },
        ),
        "schedule": st.fixed_dictionaries(
            {
                "name": st.sampled_from(["cosine", "linear", "wsd", "rex", "one_minus_sqrt"]),
                "total": st.integers(1, 50),
            },
            optional={"warmup": st.integers(0, 10) | st.floats(0, 0.9), "floor": st.floats(0, 1)},
        ),
        "batch_scaling": st.fixed_dictionaries({"batch": st.integers(1, 64), "reference": st.integers(1, 64)}),
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plausible)
def test_what_is_built_builds_again(cfg: dict[str, Any]) -> None:
    try:
        build = optimx.build(linear(), cfg)
    except ConfigError:
        return
    again = optimx.build(linear(), build.config.to_dict())
    assert again.config.to_dict() == build.config.to_dict()
    for mine, theirs in zip(build.optimizer.param_groups, again.optimizer.param_groups, strict=True):
        assert mine["lr"] == theirs["lr"]
        assert mine["weight_decay"] == theirs["weight_decay"]
        assert mine["param_names"] == theirs["param_names"]
