"""Configs in every format, and what is wrong with them, all at once."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import optimx
from optimx._checks import FINITE, above
from optimx.config import (
    BatchScalingConfig,
    Config,
    ConfigError,
    GroupsConfig,
    OptimizerConfig,
    Problem,
    ScheduleConfig,
)
from optimx.config.errors import MISSING, Problems
from optimx.config.loading import load, merge
from optimx.config.values import check_arguments, convert, read

TREE = {
    "optimizer": {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.95]},
    "groups": {"layer_decay": 0.75, "rules": [{"match": "head.*", "lr_mult": 2.0}]},
    "schedule": {"name": "cosine", "total": 1000, "warmup": 0.05},
}
TOML = """
[optimizer]
name = "adamw"
lr = 1e-3
betas = [0.9, 0.95]
[groups]
layer_decay = 0.75
rules = [{ match = "head.*", lr_mult = 2.0 }]
[schedule]
name = "cosine"
total = 1000
warmup = 0.05
"""
YAML = """
optimizer: {name: adamw, lr: 1e-3, betas: [0.9, 0.95]}
groups:
  layer_decay: .75
  rules:
    - match: head.*
      lr_mult: 2.0
schedule: {name: cosine, total: 1000, warmup: 5e-2}
"""


@dataclasses.dataclass
class TheirOptimizer:
    name: str = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float | None = None


@dataclasses.dataclass
class Theirs:
    optimizer: TheirOptimizer
    groups: dict[str, Any]
    schedule: dict[str, Any]


def written(suffix: str, text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / f"train{suffix}"
        path.write_text(text)
        return path

    return write


FORMATS: dict[str, Callable[[Path], Any]] = {
    "dict": lambda _: copy.deepcopy(TREE),
    "toml": written(".toml", TOML),
    "yaml": written(".yaml", YAML),
    "yml": written(".yml", YAML),
    "json": written(".json", json.dumps(TREE)),
    "text_path": lambda folder: str(written(".toml", TOML)(folder)),
    "namespace": lambda _: argparse.Namespace(
        **copy.deepcopy(TREE), seed=1, data="here", local=2, model="vit", **{"data.path": 3}
    ),
    "dotted_namespace": lambda _: argparse.Namespace(
        **{"optimizer": "adamw", "optimizer.lr": 1e-3, "betas": (0.9, 0.95), "optimizer.eps": None,
           "groups.layer_decay": 0.75, "groups.rules": TREE["groups"]["rules"],
           "schedule": "cosine", "total": 1000, "warmup": 0.05, "seed": 1}
    ),
    "dataclass": lambda _: Theirs(TheirOptimizer(), TREE["groups"], TREE["schedule"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_formats_say_the_same(name: str, tmp_path: Path) -> None:
    if name.startswith("y"):
        pytest.importorskip("yaml")
    assert load(FORMATS[name](tmp_path)) == TREE


def test_omegaconf() -> None:
    module = pytest.importorskip("omegaconf")
    cfg = module.OmegaConf.create({**TREE, "schedule": {**TREE["schedule"], "total": "${groups.steps}"}})
    cfg.groups.steps = 1000
    tree = load(cfg)
    assert tree["schedule"] == TREE["schedule"]
    with pytest.raises(ConfigError, match=r"should resolve \(.*lr"):
        load(module.OmegaConf.create({"optimizer": {"lr": "???"}}))


def test_our_dataclass() -> None:
    cfg = Config(
        OptimizerConfig("adamw", lr=1e-3, args={"betas": [0.9, 0.95]}),
        GroupsConfig(layer_decay=0.75, rules=({"match": "head.*", "lr_mult": 2.0},)),
        ScheduleConfig("cosine", total=1000, warmup=0.05),
        BatchScalingConfig(2048, 256, "sqrt"),
    )
    before = copy.deepcopy(cfg)
    problems = Problems()
    assert read(Config, load(cfg), "", problems) == cfg == before
    assert problems == []
    assert read(Config, cfg.to_dict(), "", problems) == cfg
    assert cfg.to_dict() == {
        "optimizer": TREE["optimizer"],
        "groups": {
            "no_decay": "auto",
            "layer_preset": "beit",
            "min_lr_scale": 0.0,
            "include_frozen": False,
            **TREE["groups"],
        },
        "schedule": TREE["schedule"],
        "batch_scaling": {"batch": 2048, "reference": 256, "rule": "sqrt"},
    }


def test_to_dict_is_plain() -> None:
    cfg = Config(
        OptimizerConfig(optimx.AdamW, lr=torch.tensor(0.5)), schedule=ScheduleConfig(torch.optim.lr_scheduler.StepLR)
    )
    table = json.loads(json.dumps(cfg.to_dict()))
    assert table["optimizer"] == {"name": "optimx.adamw:AdamW", "lr": 0.5}
    assert table["schedule"] == {"name": "torch.optim.lr_scheduler:StepLR"}


# overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.lr=3e-4", 3e-4),
        ("optimizer.name = sgd", "sgd"),
        ("optimizer.betas=[0.5, 0.9]", [0.5, 0.9]),
        ("optimizer.amsgrad=true", True),
        ("optimizer.eps=null", None),
        ("groups.rules[0].lr_mult=3", 3),
        ("groups.rules.0.match=a=b", "a=b"),
        ("batch_scaling.batch=64", 64),
        ("schedule.warmup=2ep", "2ep"),
    ],
)
def test_overrides(override: str, value: object) -> None:
    tree = load(TREE, [override])
    path, _, _ = override.partition("=")
    keys = path.strip().replace("[", ".").replace("]", "").split(".")
    at: Any = tree
    for key in keys:
        at = at[int(key)] if isinstance(at, list) else at[key]
    assert at == value
    assert load(TREE, {path.strip(): value}) == tree
    assert load(TREE) == TREE


def test_an_override_may_remove_or_name_a_section() -> None:
    assert load(TREE, ["schedule=null"])["schedule"] is None
    assert load(TREE, ["schedule=wsd"])["schedule"] == {"name": "wsd"}
    assert load({"optimizer": "sgd"}, {"optimizer.lr": 1})["optimizer"] == {"name": "sgd", "lr": 1}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lr"], "overrides should be like"),
        ("optimizer.lr=1", "overrides should be"),
        (3, "overrides should be"),
        ([3], "overrides should be like"),
        (["optimizer..lr=1"], "should have paths like"),
        ({3: 4}, "should have paths like"),
        (["groups.rules[1].lr=1"], r"groups.rules\[1\].lr should count from 0 to 0 at '1'"),
        (["groups.rules.x=1"], "at 'x'"),
        (["optimizer.lr.x=1"], "should lead to a table, but there is 0.001 before 'x'"),
    ],
)
def test_bad_overrides(overrides: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(TREE, overrides)


# what cannot be loaded


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        (".toml", "a = ", r"should be TOML \(Invalid value"),
        (".json", "{", r"should be JSON \(.*line 1"),
        (".yaml", "a: [", r"should be YAML \(.*line 1"),
        (".json", '{"optimizer": {"lr": 1, "lr": 2}}', "the key 'lr' is there twice"),
        (".yaml", "optimizer: {lr: 1, lr: 2}", "the key 'lr' is there twice"),
        (".yaml", "1: 2", "should have strings as keys"),
        (".yaml", "? [1]\n: 2", "keys should be strings"),
        (".yaml", "!!python/object:os.system {}", "should be YAML without the tag !!python/object:os.system"),
        (".yaml", "optimizer: {name: !!python/name:os.system ''}", r"cfg.optimizer.name should be YAML without"),
        (".json", "[1]", "should be a table but is: "),
        (".ini", "", r"should end with \.toml, \.yaml"),
    ],
)
def test_bad_files(suffix: str, text: str, message: str, tmp_path: Path) -> None:
    if suffix == ".yaml":
        pytest.importorskip("yaml")
    path = written(suffix, text)(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ("nowhere.toml", r"cfg should be a file that can be read \(No such file"),
        ("vit-finetun", r"preset should be one of vit-finetune but is: 'vit-finetun'; did you mean 'vit-finetune'\?"),
        (3, "cfg should be a table"),
        (None, "cfg should be a table"),
        ([], "cfg should be a table"),
        (Config, "cfg should be a table"),
        ({1: 2}, "cfg should have strings as keys but is: 1"),
        ({"groups": {"rules": [{2: 3}]}}, r"cfg.groups.rules\[0\] should have strings as keys but is: 2"),
        (argparse.Namespace(**{"optimzer.lr": 0.1}), r"optimzer.lr \(value: 0.1\) is no attribute .* 'optimizer'\?"),
        (argparse.Namespace(wieght_decay=0.1), r"wieght_decay \(value: 0.1\) is no attribute .* 'weight_decay'\?"),
    ],
)
def test_bad_cfgs(cfg: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(cfg, presets={"vit-finetune": {}})


def test_a_cfg_within_itself() -> None:
    cfg: dict[str, Any] = {}
    cfg["optimizer"] = cfg
    with pytest.raises(ConfigError, match="should not contain itself"):
        load(cfg)


def test_a_cfg_is_not_changed_and_not_shared() -> None:
    cfg = copy.deepcopy(TREE)
    tree = load(cfg, ["groups.rules[0].lr_mult=5"])
    tree["optimizer"]["betas"].append(1)
    assert cfg == TREE


# presets

BASE = {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}, "schedule": {"name": "cosine", "floor": 0.1}}


@pytest.mark.parametrize(
    ("over", "merged"),
    [
        ({}, BASE),
        ({"optimizer": {"lr": 0.2}}, {**BASE, "optimizer": {"name": "sgd", "lr": 0.2, "momentum": 0.9}}),
        ({"optimizer": {"name": "SGD"}}, {**BASE, "optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9}}),
        ({"optimizer": {"name": optimx.SGD}}, {**BASE, "optimizer": {"name": optimx.SGD}}),
        ({"optimizer": {"name": "lion"}}, {**BASE, "optimizer": {"name": "lion"}}),
        ({"schedule": {"phases": []}}, {**BASE, "schedule": {"phases": []}}),
        ({"schedule": None}, {**BASE, "schedule": None}),
        ({"groups": {"layer_decay": 0.5}}, {**BASE, "groups": {"layer_decay": 0.5}}),
    ],
    ids=["nothing", "key", "same_name", "class", "other_name", "phases", "removed", "more"],
)
def test_over_a_preset(over: dict, merged: dict) -> None:
    before = copy.deepcopy(BASE)
    assert merge(BASE, over) == load({"preset": "base", **over}, presets={"base": BASE}) == merged
    assert before == BASE


# values


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, 1.0),
        (1e6, int, 1_000_000),
        (True, bool, True),
        ("a", str, "a"),
        ([1, 2], tuple[float, float], (1.0, 2.0)),
        ([1, 2, 3], tuple[int, ...], (1, 2, 3)),
        ((1, 2), list[int], [1, 2]),
        ([1], Sequence[float], (1.0,)),
        (None, float | None, None),
        (3, int | float, 3),
        (3.0, int | float, 3.0),
        ("min", Literal["min", "max"], "min"),
        (0.5, Annotated[float, above(0)], 0.5),
        (len, Callable[[Any], int], len),
        ({"a": 1}, dict[str, Any], {"a": 1}),
        ({"a": 1}, Mapping[str, int], {"a": 1}),
        (object, Any, object),
        ("x", "a name that says nothing", "x"),
    ],
)
def test_fitting_values(value: Any, hint: Any, expected: Any) -> None:
    problems = Problems()
    converted = convert(value, hint, "x", problems)
    assert problems == []
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("1", float, "x should be a number but is: '1'"),
        (True, float, "x should be a number but is: True"),
        (float("nan"), float, "x should be a number but is: nan"),
        (10**400, float, "x should be a number but is: 1000"),
        (1.5, int, "x should be a whole number but is: 1.5"),
        (float("inf"), int, "x should be a whole number but is: inf"),
        (True, int, "x should be a whole number but is: True"),
        (1, bool, "x should be true or false but is: 1"),
        (1, str, "x should be a string but is: 1"),
        (1, tuple[float, float], "x should be a list but is: 1"),
        ([1], tuple[float, float], r"x should have 2 values but is: \[1\]"),
        ([1, "a"], tuple[float, float], r"x\[1\] should be a number but is: 'a'"),
        (["a"], tuple[int, ...], r"x\[0\] should be a whole number but is: 'a'"),
        ("ab", list[str], "x should be a list but is: 'ab'"),
        ("mix", Literal["min", "max"], r"x should be one of 'min', 'max' but is: 'mix'; did you mean '(min|max)'\?"),
        (0, Annotated[float, above(0)], "x should be > 0 but is: 0"),
        (float("inf"), Annotated[float, FINITE], "x should be >= 0 and finite but is: inf"),
        ("a", float | int | None, "x should be a number or a whole number but is: 'a'"),
        ([1, "a"], float | list[float], r"x\[1\] should be a number but is: 'a'"),
        (-1, Annotated[float, FINITE] | torch.Tensor | None, "x should be >= 0 and finite but is: -1"),
        (3, Callable[[], None], "x should be a callable but is: 3"),
        (3, dict[str, Any], "x should be a table but is: 3"),
        (3, torch.Tensor, "x should be a tensor but is: 3"),
    ],
)
def test_values_that_do_not_fit(value: Any, hint: Any, message: str) -> None:
    problems = Problems()
    convert(value, hint, "x", problems)
    assert len(problems) == 1
    with pytest.raises(ConfigError, match=message):
        problems.raise_if_any()


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists) | st.binary())
def test_any_value_converts_or_is_a_problem(value: object) -> None:
    for hint in (
        float,
        int,
        bool,
        tuple[float, float],
        float | list[int] | None,
        Literal["a", 1],
        Annotated[float, above(0)],
    ):
        problems = Problems()
        converted = convert(value, hint, "x", problems)
        if not problems:
            # what fits stays as it is
            assert convert(converted, hint, "x", problems) == converted
            assert problems == []


@pytest.mark.parametrize("name", [n for n in dir(torch.optim.lr_scheduler) if n in torch.optim.lr_scheduler.__all__])
def test_arguments_of_torchs_classes_are_typed(name: str) -> None:
    """Also where annotations name what is imported for type checkers only."""
    cls = getattr(torch.optim.lr_scheduler, name)
    problems = Problems()
    check_arguments(cls, {"last_epoch": "a", "gamma": "a", "bogus": 1}, "x", problems)
    texts = [str(problem) for problem in problems]
    assert any(text.startswith(f"x.bogus (value: 1) is no key of {name} (") for text in texts)
    for key in {"last_epoch", "gamma"} & set(parameter_names(cls)):
        assert any(text.startswith(f"x.{key} should be a ") for text in texts), key


def parameter_names(cls: type) -> list[str]:
    return list(inspect.signature(cls).parameters)


# all that is wrong at once


def test_all_problems_at_once() -> None:
    tree = {
        "optimizer": {"lr": -1, "max_grad_norm": "x", "betas": [0.9, 0.95]},
        "groups": {"layer_decay": 1.5, "layr": 2, "rules": [{"match": "a"}, 5]},
        "shedule": {},
        "batch_scaling": {"batch": 0, "rule": "sqr"},
    }
    problems = Problems()
    cfg = read(Config, tree, "", problems)
    with pytest.raises(ConfigError) as raised:
        problems.raise_if_any()
    assert str(raised.value).splitlines() == [
        "9 problems:",
        "  optimizer.lr should be >= 0 and finite but is: -1",
        "  optimizer.max_grad_norm should be a number or a table but is: 'x'",
        "  groups.layer_decay should be in (0, 1] but is: 1.5",
        "  groups.layr (value: 2) is no key of groups (freeze, include_frozen, layer_decay, layer_preset, layers, "
        "min_lr_scale, muon, no_decay, rules); did you mean 'layers'?",
        "  groups.rules[1] should be a table but is: 5",
        "  shedule (value: {}) is no key of a config (batch_scaling, groups, optimizer, preset, schedule, search); "
        "did you mean 'schedule'?",
        "  batch_scaling.batch should be >= 1 but is: 0",
        "  batch_scaling.rule should be one of 'linear', 'sqrt' but is: 'sqr'; did you mean 'sqrt'?",
        "  batch_scaling.reference is missing",
    ]
    # what is right is still looked at
    assert cfg.optimizer == OptimizerConfig(args={"betas": [0.9, 0.95]})


def test_errors_pickle() -> None:
    error = ConfigError([Problem("a.b", "should be > 0", -1, "c"), Problem("a.d", "is missing", MISSING)])
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert str(error).splitlines()[1:] == ["  a.b should be > 0 but is: -1; did you mean 'c'?", "  a.d is missing"]
    assert again.problems == error.problems
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(("rule", "factor"), [("linear", 8.0), ("sqrt", 8.0**0.5)])
def test_batch_scaling(rule: Any, factor: float) -> None:
    assert BatchScalingConfig(2048, 256, rule).factor == pytest.approx(factor)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # half an epoch of 5 steps is 2 of them, but 3 with Hugging Face
        ({"name": "linear", "total": "0.5ep"}, [1, 0.5, 0]),
        ({"name": "linear", "total": "0.5ep", "convention": "hf"}, [1, 2 / 3, 1 / 3, 0]),
        ({"name": "constant", "total": 10, "warmup": 0.15, "convention": "hf"}, [0, 0.5, 1]),
        ({"name": "multi_step", "total": "1ep", "milestones": ["1ep-3", "1 epochs - 1"]}, [1, 1, 0.1, 0.1, 0.01]),
        ({"name": "linear", "total": "0.8ep+1", "interval": 2}, [1, 1, 0.6, 0.6, 0.2]),
        ({"name": "linear", "total": "2ep", "interval": "1ep"}, [1] * 5 + [0.5] * 5 + [0]),
        ({"name": "linear", "total": 2, "floor": {"value": 0.1}}, [1, 0.6, 0.2]),
        ({"name": "wsd", "total": 2, "decay": 2, "shape": "linear", "floor": {"value": 0.1}}, [1, 0.6, 0.2]),
        ({"name": "inverse_sqrt", "total": 10, "timescale": 0.1}, [1, 0.5**0.5, 3**-0.5]),
        ({"name": "inverse_sqrt", "timescale": "1ep-4"}, [1, 0.5**0.5, 3**-0.5]),
    ],
)
def test_lengths_and_levels(schedule: dict, expected: list[float]) -> None:
    cfg = {"optimizer": {"lr": 0.5}, "schedule": {**schedule, "steps_per_epoch": 5}}
    build = optimx.build(torch.nn.Linear(1, 1, bias=False), cfg)
    for made in (build, optimx.build(torch.nn.Linear(1, 1, bias=False), build.config.to_dict())):
        found = [rates[0] for rates in made.scheduler.preview(len(expected))]
        assert found == pytest.approx([0.5 * factor for factor in expected])


def test_an_interval_is_of_a_schedule() -> None:
    cfg = {"schedule": {"name": "StepLR", "step_size": 2, "interval": 2}}
    with pytest.raises(ConfigError, match=r"schedule\.interval .* is no key of StepLR"):
        optimx.build(torch.nn.Linear(1, 1), cfg)
