"""Section ``search``: what is wrong with it, and the overrides that it stands for."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimx
from optimx import Config, ConfigError, search
from optimx.config import OptimizerConfig, SearchRange
from optimx.config.files import read_file
from optimx.config.loading import load
from optimx.config.writing import to_toml

BASE: dict[str, Any] = {
    "optimizer": {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.95]},
    "groups": {"rules": [{"match": "0.*", "lr_mult": 2.0}]},
    "schedule": {"name": "cosine", "total": 100, "warmup": 0.05},
}
LR = {"low": 1e-5, "high": 1e-1, "log": True}
SEARCH: dict[str, Any] = {
    "optimizer.lr": LR,
    "optimizer.betas": [[0.9, 0.95], [0.9, 0.999]],
    "schedule.warmup": {"low": 10, "high": 13},
}
TOML = """
[optimizer]
name = "adamw"
[search]
{search}
"""


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def with_search(section: Any) -> dict[str, Any]:
    return {**BASE, "search": section}


# what it stands for


def test_grid() -> None:
    found = search.grid(with_search(SEARCH), 3)
    assert [*found[0]] == [*SEARCH]
    lrs = sorted({each["optimizer.lr"] for each in found})
    assert lrs == pytest.approx([1e-5, 1e-3, 1e-1])
    assert (lrs[0], lrs[-1]) == (1e-5, 1e-1)
    # 11.5 is no number of steps; the last key is the fastest
    assert [each["schedule.warmup"] for each in found[:4]] == [10, 12, 13, 10]
    assert len(found) == 3 * 2 * 3
    for overrides in found:
        built = optimx.build(model(), with_search(SEARCH), overrides)
        assert built.config.optimizer.lr == overrides["optimizer.lr"]
        assert [*built.config.optimizer.args["betas"]] == overrides["optimizer.betas"]
    (middle,) = search.grid(with_search({"optimizer.lr": LR, "optimizer.weight_decay": {"low": 0, "high": 1}}), 1)
    assert middle == {"optimizer.lr": pytest.approx(1e-3), "optimizer.weight_decay": 0.5}


def test_there_may_be_fewer_whole_numbers_than_points() -> None:
    found = search.grid(with_search({"schedule.total": {"low": 100, "high": 102}}), 9)
    assert [each["schedule.total"] for each in found] == [100, 101, 102]
    assert all(type(each["schedule.total"]) is int for each in found)


def test_sample() -> None:
    section = {**SEARCH, "optimizer.weight_decay": {"low": 0, "high": 1}}
    found = search.sample(with_search(section), 2000, seed=3)
    assert search.sample(with_search(section), 20, seed=3) == found[:20]
    assert search.sample(with_search(section), 20, seed=4) != found[:20]
    assert search.sample(with_search(section), 0) == []
    lrs, decays = ([each[key] for each in found] for key in ("optimizer.lr", "optimizer.weight_decay"))
    assert min(lrs) >= 1e-5
    assert max(lrs) <= 1e-1
    # a quarter of the factors, a quarter of the numbers: five standard deviations are 0.05
    assert sum(lr < 1e-4 for lr in lrs) / 2000 == pytest.approx(0.25, abs=0.05)
    assert sum(decay < 0.25 for decay in decays) / 2000 == pytest.approx(0.25, abs=0.05)
    for value in (10, 11, 12, 13):
        assert sum(each["schedule.warmup"] == value for each in found) / 2000 == pytest.approx(0.25, abs=0.05)
    assert sum(each["optimizer.betas"] == [0.9, 0.95] for each in found) / 2000 == pytest.approx(0.5, abs=0.06)


def test_whole_numbers_at_equal_factors() -> None:
    found = search.sample(with_search({"schedule.total": {"low": 10, "high": 1000, "log": True}}), 1000)
    totals = [each["schedule.total"] for each in found]
    assert {type(total) for total in totals} == {int}
    assert min(totals) >= 10
    assert max(totals) <= 1000
    assert sum(total < 100 for total in totals) / 1000 == pytest.approx(0.5, abs=0.08)


class Trial:
    """The last of the choices, the upper bounds; what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.asked.append((name, *choices))
        return choices[-1]

    def suggest_int(self, name: str, low: int, high: int, *, log: bool) -> int:
        self.asked.append((name, low, high, log))
        return high

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:
        self.asked.append((name, low, high, log))
        return high


def test_suggest() -> None:
    trial = Trial()
    section = {**SEARCH, "optimizer.amsgrad": [True, False]}
    assert search.suggest(trial, with_search(section)) == {
        "optimizer.lr": 1e-1, "optimizer.betas": [0.9, 0.999], "schedule.warmup": 13, "optimizer.amsgrad": False,
    }  # fmt: skip
    assert trial.asked == [
        ("optimizer.lr", 1e-5, 1e-1, True),
        ("optimizer.betas", "[0.9, 0.95]", "[0.9, 0.999]"),
        ("schedule.warmup", 10, 13, False),
        ("optimizer.amsgrad", True, False),
    ]


# the config


def test_a_build_is_of_the_other_sections() -> None:
    built, plain = optimx.build(model(), with_search(SEARCH)), optimx.build(model(), BASE)
    assert built.config == plain.config
    assert built.config.search is None
    assert optimx.build(model(), built.config).config == plain.config


@pytest.mark.parametrize(
    "lines",
    [
        '"optimizer.lr" = { low = 1e-5, high = 1e-1, log = true }\n"optimizer.amsgrad" = [true, false]',
        "optimizer.lr = { low = 1e-5, high = 1e-1, log = true }\noptimizer.amsgrad = [true, false]",
    ],
    ids=["quoted", "bare"],
)
def test_keys_in_a_file(lines: str, tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    file.write_text(TOML.format(search=lines))
    expected = {"optimizer.lr": LR, "optimizer.amsgrad": [True, False]}
    assert load(file)["search"] == expected
    assert search.grid(file, 2) == search.grid({"optimizer": {"name": "adamw"}, "search": expected}, 2)
    replaced = load(file, {"search.optimizer.lr": [1.0]})["search"]
    assert replaced == {**expected, "optimizer.lr": [1.0]}


def test_config_to_a_file_and_back(tmp_path: Path) -> None:
    config = Config(
        OptimizerConfig("adamw", 0.1), search={"optimizer.lr": SearchRange(0.1, 1.0), "optimizer.eps": (1e-8, 1e-6)}
    )
    tree = config.to_dict()
    assert tree["search"] == {
        "optimizer.lr": {"low": 0.1, "high": 1.0, "log": False},
        "optimizer.eps": [1e-8, 1e-6],
    }
    (tmp_path / "c.toml").write_text(to_toml(tree))
    assert read_file(tmp_path / "c.toml") == tree
    assert search.grid(config, 2) == search.grid(tree, 2)
    assert "search" not in Config().to_dict()


def test_a_choice_of_another_optimizer_over_a_preset() -> None:
    """What build makes of an override, its check makes of it, too: another name replaces the preset's section."""
    cfg = {"preset": "gpt-pretrain", "schedule": {"total": 100}, "search": {"optimizer.name": ["adamw", "sgd"]}}
    for overrides in search.grid(cfg):
        assert type(optimx.build(model(), cfg, overrides).optimizer).__name__.lower() == overrides["optimizer.name"]


def test_overrides_complete_the_config() -> None:
    cfg = {"optimizer": {"name": "adamw"}, "schedule": {"name": "cosine"}, "search": {"schedule.warmup": [0.1, 5]}}
    with pytest.raises(ConfigError, match=r"search\.schedule\.warmup should be steps or epochs, as there is no"):
        search.grid(cfg)
    for overrides in (["schedule.total=100"], {"schedule.total": 100}):
        assert search.grid(cfg, overrides=overrides) == [{"schedule.warmup": 0.1}, {"schedule.warmup": 5}]


def problems(section: Any, base: dict[str, Any] = BASE) -> list[str]:
    """That a build tells, and :func:`search.grid` too."""
    cfg = {**base, "search": section}
    with pytest.raises(ConfigError) as raised:
        optimx.build(model(), cfg)
    found = [str(problem) for problem in raised.value.problems]
    with pytest.raises(ConfigError) as again:
        search.grid(cfg)
    if not any("groups." in text for text in found):
        assert [str(problem) for problem in again.value.problems] == found
    return found


BAD: dict[str, tuple[Any, str]] = {
    "key": ({"optimizer.wieght_decay": [0.1]}, "search.optimizer.wieght_decay (value: 0.1) is no key of AdamW (*); did "
            "you mean 'weight_decay'?"),
    "section": ({"optimzer.lr": [0.1]}, "search.optimzer.lr (value: 0.1) is refused: optimzer (value: {'lr': 0.1}) is "
                "no key of a config (*); did you mean 'optimizer'?"),
    "type": ({"optimizer.lr": [0.1, "high"]}, "search.optimizer.lr should be a number or a tensor but is: 'high'"),
    "bound": ({"optimizer.lr": {"low": -1, "high": 1}}, "search.optimizer.lr should be >= 0 and finite but is: -1"),
    "high-bound": ({"groups.layer_decay": {"low": 0.5, "high": 1.5}}, "search.groups.layer_decay should be in (0, 1] "
                   "but is: 1.5"),
    "item": ({"optimizer.betas": [[0.9, "x"]]}, "search.optimizer.betas (value: [0.9, 'x']) is refused: "
             "optimizer.betas[1] should be a number or a tensor but is: 'x'"),
    "another-key": ({"optimizer.name": ["adamw", "sgd"]}, "search.optimizer.name (value: 'sgd') is refused: "
                    "optimizer.betas (value: *) is no key of SGD (*)"),
    "name": ({"optimizer.name": ["adamv"]}, "search.optimizer.name should be a name of *; did you mean 'adam*"),
    "reversed": ({"optimizer.lr": {"low": 1, "high": 1}}, "search.optimizer.lr.high should be > 1 but is: 1"),
    "log": ({"optimizer.lr": {"low": 0, "high": 1, "log": True}}, "search.optimizer.lr.low should be > 0 with log, but "
            "is: 0"),
    "fraction-of-steps": ({"schedule.total": {"low": 10.5, "high": 20}}, "search.schedule.total should be whole steps *"
                          " but is: 10.5"),
    "infinite": ({"optimizer.lr": {"low": 0, "high": math.inf}}, "search.optimizer.lr.high should be finite but is: "
                 "inf"),
    "huge": ({"optimizer.lr": {"low": 0, "high": 10**400}}, "search.optimizer.lr.high should be finite but is: 1000*"),
    "no-bound": ({"optimizer.lr": {"low": 1}}, "search.optimizer.lr.high is missing"),
    "empty": ({"optimizer.lr": []}, "search.optimizer.lr should have one value or more but is: []"),
    "number": ({"optimizer.lr": 3}, "search.optimizer.lr should be a table or a list but is: 3"),
    "nothing": ({"optimizer.lr": {}}, "search.optimizer.lr.low is missing"),
    "path": ({"optimizer..lr": [1]}, "search.optimizer..lr (value: 1) is refused: overrides should have paths like * "
             "is: 'optimizer..lr'"),
    "below-a-number": ({"optimizer.lr.x": [1]}, "search.optimizer.lr.x should lead to a table, but *"),
    "list": ([1], "search should be a table but is: [1]"),
    "rule": ({"groups.rules[0].lr_mult": [2.0, -1.0]}, "search.groups.rules[0].lr_mult (value: -1.0) is refused: "
             "groups.rules[0] is refused: *"),
}  # fmt: skip


@pytest.mark.parametrize(("section", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong(section: Any, message: str) -> None:
    if "groups.rules" in message:
        with pytest.raises(ConfigError) as raised:
            optimx.build(model(), with_search(section))
        found = [str(problem) for problem in raised.value.problems]
    else:
        found = problems(section)
    parts = message.split("*")
    assert found[0].startswith(parts[0])
    at = 0
    for part in parts:
        at = found[0].index(part, at) + len(part)
    assert message.endswith("*") or found[0].endswith(parts[-1])


def test_all_at_once_and_each_once() -> None:
    found = problems({"optimizer.lr": {"low": -2, "high": -1}, "optimizer.epz": [1, 1], "schedule.totl": [3]})
    assert [text.split()[0] for text in found] == [
        "search.optimizer.lr",
        "search.optimizer.epz",
        "search.schedule.totl",
    ]


def test_what_is_wrong_with_the_rest_is_told_once() -> None:
    base = {**BASE, "schedule": {"name": "cosine", "total": 100, "warmup": 200}}
    with pytest.raises(ConfigError) as raised:
        optimx.build(model(), {**base, "search": {"optimizer.lr": [1.0, 2.0], "optimizer.eps": [-1.0]}})
    assert [problem.path for problem in raised.value.problems] == ["schedule.total", "search.optimizer.eps"]


def test_no_section() -> None:
    for section in ({}, {"search": {}}):
        with pytest.raises(ConfigError, match=r"^search is missing: the keys that are searched"):
            search.sample({**BASE, **section}, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"points": 0}, ValueError, "points should be >= 1 but is: 0"),
        ({"points": 1.5}, TypeError, "points should be a whole number but is: 1.5"),
        ({"n": -1}, ValueError, "n should be >= 0 but is: -1"),
        ({"n": 1, "seed": -1}, ValueError, "seed should be >= 0 but is: -1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        (search.grid if "points" in arguments else search.sample)(with_search(SEARCH), **arguments)


def test_muon_and_adamw_without_a_model() -> None:
    cfg = {
        "optimizer": {"name": "muon", "lr": 0.02, "adamw": {"lr": 3e-4}},
        "schedule": {"name": "cosine", "total": 100},
        "search": {"optimizer.adamw.lr": {"low": 1e-4, "high": 1e-3}, "optimizer.momentum": [0.9, 0.95]},
    }
    assert len(search.grid(cfg, 2)) == 4
    cfg["search"] = {"optimizer.adamw.lrr": [1]}
    with pytest.raises(ConfigError, match=r"search\.optimizer\.adamw\.lrr .* did you mean 'lr'"):
        search.grid(cfg)


def test_the_check_changes_nothing() -> None:
    cfg = with_search({**SEARCH, "optimizer.lr": [torch.tensor(0.1), 0.2]})
    before, network = json.dumps(cfg, default=str), model()
    params = [p.clone() for p in network.parameters()]
    optimx.build(network, cfg)
    search.grid(cfg)
    assert json.dumps(cfg, default=str) == before
    assert all(map(torch.equal, params, network.parameters()))
