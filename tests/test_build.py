"""From a model and a config to optimizer and scheduler."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp

import optimx
from optimx import Build, Config, ConfigError
from optimx.config import OptimizerConfig, ScheduleConfig
from optimx.config.writing import to_toml
from optimx.lr_scheduler import WSDLR, Cosine, ScheduleLR, Warmup
from optimx.presets import PRESETS
from tests.building import ViT, linear, problems
from tests.cases import CASES

TRAIN = """
[optimizer]
name = "adamw"
lr = 1e-3
weight_decay = 0.05
betas = [0.9, 0.95]
max_grad_norm = 1.0
[groups]
no_decay = "auto"          # norms, biases, 0/1-D, the model's own hints
layer_decay = 0.75
rules = [{ match = "head.*", lr_mult = 2.0 }]
[schedule]
name = "cosine"
total = 1000
warmup = 0.05              # a fraction of total; 50 and "1ep" work too
floor = 0.1                # ratio of each group's lr
[batch_scaling]
batch = 2048
reference = 256
rule = "sqrt"
"""


def train(build: Build, steps: int) -> None:
    for step in range(steps):
        build.optimizer.zero_grad()
        torch.manual_seed(step)
        build.model(torch.randn(5, 3)).square().mean().backward()
        build.optimizer.step()
        if build.scheduler is not None:
            build.scheduler.step()


def snapshot(model: nn.Module) -> list[Any]:
    return [(name, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()]


# a config from end to end


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "train.toml"
    path.write_text(TRAIN)
    return path


def test_a_file(toml: Path) -> None:
    model = ViT()
    before = snapshot(model)
    build = optimx.build(model, toml)
    assert type(build.optimizer) is optimx.AdamW
    assert build.optimizer.defaults["betas"] == (0.9, 0.95)
    assert build.optimizer.max_grad_norm == 1.0
    assert isinstance(build.scheduler, ScheduleLR)
    lr = 1e-3 * 8**0.5
    by_name = {
        name: group for group in build.optimizer.param_groups for name in group["param_names"]
    }  # fmt: skip
    expected = {
        "pos_embed": (lr * 0.75**13, 0.05),
        "patch_embed.bias": (lr * 0.75**13, 0.0),
        "blocks.0.mlp.weight": (lr * 0.75**12, 0.05),
        "blocks.11.mlp.weight": (lr * 0.75, 0.05),
        "blocks.11.norm.weight": (lr * 0.75, 0.0),
        "norm.weight": (lr, 0.0),
        "head.weight": (2 * lr, 0.05),
        "head.bias": (2 * lr, 0.0),
    }
    for name, (peak, decay) in expected.items():
        assert by_name[name]["initial_lr"] == pytest.approx(peak), name
        assert by_name[name]["weight_decay"] == decay, name
    assert len(by_name) == len(before)
    assert len(build.optimizer.param_groups) >= 26
    # warmup over 50 steps, then down to a tenth of each group's own
    rates = build.scheduler.preview(1001)
    for step, factor in [(0, 1 / 50), (24, 0.5), (49, 1.0), (1000, 0.1)]:
        assert rates[step] == pytest.approx([g["initial_lr"] * factor for g in build.optimizer.param_groups])
    after = snapshot(model)
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] == b[2] for a, b in zip(before, after, strict=True))


def test_unpacks(toml: Path) -> None:
    optimizer, scheduler = optimx.build(ViT(), toml)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    optimizer, scheduler = optimx.build(ViT(), {})
    assert isinstance(optimizer, torch.optim.AdamW)
    assert scheduler is None


def test_explains(toml: Path) -> None:
    text = str(optimx.build(ViT(), toml, ['groups.freeze=["patch_embed.*"]']).explain())
    assert "AdamW\nbackend " in text
    assert "patch_embed" in text
    assert "ScheduleLR\n step   least lr  greatest lr" in text
    assert [line.split()[0] for line in text.splitlines()[-5:]] == ["0", "50", "500", "999", "1,000"]
    plain = optimx.build(linear(), {"schedule": {"name": "StepLR", "step_size": 3}}).explain()
    assert str(plain).endswith("StepLR")
    assert not optimx.build(linear(), {}).explain().scheduler


def test_what_is_resolved_builds_the_same(toml: Path) -> None:
    first = optimx.build(ViT(), toml)
    assert first.config.optimizer.lr == pytest.approx(1e-3 * 8**0.5)
    assert first.config.optimizer.args["eps"] == 1e-8
    assert (first.config.schedule.warmup, first.config.batch_scaling) == (50, None)  # type: ignore[union-attr]
    for again in (optimx.build(ViT(), first.config), optimx.build(ViT(), first.config.to_dict())):
        assert again.config.to_dict() == first.config.to_dict()
        for mine, theirs in zip(first.optimizer.param_groups, again.optimizer.param_groups, strict=True):
            assert {k: v for k, v in mine.items() if k != "params"} == {
                k: v for k, v in theirs.items() if k != "params"
            }
        assert again.scheduler.schedule == first.scheduler.schedule


RESOLVED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "epochs": (
        {"name": "multi_step", "total": "9ep", "milestones": ["3ep", "6ep"], "steps_per_epoch": 10},
        {"name": "multi_step", "total": 90, "milestones": [30, 60], "steps_per_epoch": 10},
    ),
    "phases": (
        {"phases": [{"name": "warmup", "steps": 0.1}, {"name": "hold"}, {"name": "1-sqrt", "steps": 20}], "total": 200},
        {"phases": [{"name": "warmup", "steps": 20}, {"name": "hold", "steps": 160}, {"name": "1-sqrt", "steps": 20}],
         "total": 200},
    ),
    "wsd": (
        {"name": "wsd", "total": 200, "warmup": 20, "decay": 0.25},
        {"name": "wsd", "total": 200, "warmup": 20, "decay": 50},
    ),
    "wsd_default": ({"name": "wsd", "total": 200}, {"name": "wsd", "total": 200, "decay": 20}),
    "warmup_table": (
        {"name": "linear", "total": 100, "warmup": {"steps": 0.2, "shape": "cosine", "start": 0.1}},
        {"name": "linear", "total": 100, "warmup": {"steps": 20, "shape": "cosine", "start": 0.1}},
    ),
    "steps": ({"name": "linear", "steps": 100}, {"name": "linear", "steps": 100}),
    "noam": ({"name": "noam", "total": 100, "warmup": 0.1}, {"name": "noam", "total": 100, "warmup": 10}),
    "restarts": (
        {"name": "restarts", "mult": 2, "steps_per_epoch": 5,
         "cycle": {"name": "phases", "phases": [{"name": "warmup", "steps": 2}, {"name": "cosine", "steps": "2ep"}]}},
        {"name": "restarts", "mult": 2, "steps_per_epoch": 5,
         "cycle": {"name": "phases", "phases": [{"name": "warmup", "steps": 2}, {"name": "cosine", "steps": 10}]}},
    ),
    "torchs": (
        {"name": "StepLR", "step_size": "2ep", "steps_per_epoch": 7},
        {"name": "StepLR", "step_size": 14, "steps_per_epoch": 7},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RESOLVED)
def test_schedules_in_steps(name: str) -> None:
    section, resolved = RESOLVED[name]
    before = copy.deepcopy(section)
    build = optimx.build(linear(), {"schedule": section})
    assert build.config.to_dict()["schedule"] == resolved
    again = optimx.build(linear(), build.config.to_dict())
    assert again.config.to_dict() == build.config.to_dict()
    train(build, 30)
    train(again, 30)
    assert build.scheduler.get_last_lr() == again.scheduler.get_last_lr()
    assert section == before


def rates(section: dict[str, Any], steps: int = 30) -> list[float]:
    build = optimx.build(linear(), {"optimizer": {"lr": 1.0}, "schedule": section})
    return [step[0] for step in build.scheduler.preview(steps)]


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"name": "linear", "total": 30, "warmup": 10}, Warmup(10) >> optimx.lr_scheduler.Linear(20)),
        ({"name": "cosine", "total": 30, "warmup": 30}, lambda step: (step + 1) / 30),
        ({"name": "wsd", "total": 4, "warmup": 0.9}, lambda step: (step + 1) / 4 if step < 4 else 0.0),
        ({"name": "WarmupLinearLR", "total": 30, "warmup": 30}, lambda step: (step + 1) / 30),
        ({"name": "Cosine", "total": 30, "floor": 0.2, "power": 2}, Cosine(30, 0.2, power=2)),
        ({"name": Cosine, "total": 30}, Cosine(30)),
        ({"name": "optimx.lr_scheduler:Cosine", "total": 30}, Cosine(30)),
        ({"name": "constant"}, lambda step: 1.0),
        ({"name": "inverse_sqrt", "timescale": 4, "warmup": 5}, Warmup(5) >> optimx.lr_scheduler.InverseSqrt(4)),
        (
            {"name": "cosine", "total": 30, "warmup": 5, "convention": "hf"},
            optimx.lr_scheduler.Phases((Warmup(5), Cosine(25)), "hf"),
        ),
        ({"name": "WarmupCosineLR", "total": 30, "warmup": 0.2, "floor": 0.1}, Warmup(6) >> Cosine(24, 0.1)),
        (
            {"name": "WarmupCosineLR", "total": 30, "warmup": {"steps": 6, "shape": "cosine"}},
            Warmup(6, "cosine") >> Cosine(24),
        ),
        (
            {"phases": [{"name": "linear", "steps": 10, "floor": 0.5}, {"name": "cooldown"}], "total": 30},
            optimx.lr_scheduler.Linear(10, 0.5) >> optimx.lr_scheduler.Cooldown(20),
        ),
    ],
    ids=[
        "warmup",
        "all_warmup",
        "all_warmup_wsd",
        "all_warmup_class",
        "arguments",
        "class",
        "path",
        "endless",
        "timescale",
        "convention",
        "named_class",
        "its_warmup",
        "phases",
    ],
)
def test_schedules(section: dict[str, Any], expected: Any) -> None:
    assert rates(section) == pytest.approx([expected(step) for step in range(30)])


def test_wsd_is_the_named_class() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    expected = WSDLR(optimizer, 3, 17, 10, min_lr_ratio=0.1).preview(31)
    section = {"name": "wsd", "total": 30, "warmup": 3, "decay": 10, "floor": 0.1}
    assert rates(section, 31) == pytest.approx([step[0] for step in expected])


@pytest.mark.parametrize("warmup", [None, 4])
def test_torchs_schedulers(warmup: int | None) -> None:
    """With a warmup around them too."""
    build = optimx.build(
        linear(), {"optimizer": {"lr": 1.0}, "schedule": {"name": "StepLR", "step_size": 3, "warmup": warmup}}
    )
    seen = []
    for _ in range(10):
        seen.append(build.optimizer.param_groups[0]["lr"])
        build.optimizer.step()
        build.scheduler.step()
    drops = [1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001]
    assert seen == pytest.approx(drops if warmup is None else [0.25, 0.5, 0.75, *drops[:7]])


def test_the_length_of_an_epoch_is_no_schedule() -> None:
    """A program may always tell it."""
    assert optimx.build(linear(), "gan", {"schedule.steps_per_epoch": 10}).scheduler is None


@pytest.mark.parametrize("name", ["sgd", "torch.optim:SGD"])
def test_a_group_joins(name: str) -> None:
    """Without a name, as groups have none in most programs: it is stepped, scheduled, and in the checkpoint."""
    cfg = {"optimizer": {"name": name, "lr": 1.0}, "schedule": {"name": "linear", "total": 4}}
    model, more = linear(), [nn.Parameter(torch.ones(2))]
    build = optimx.build(model, cfg)
    names = [group.get("param_names") for group in build.optimizer.param_groups]
    assert names == [[*dict(model.named_parameters())] if name == "sgd" else None]
    build.optimizer.add_param_group({"params": more, "lr": 0.5})
    build.scheduler.step()
    more[0].grad = torch.ones(2)
    build.optimizer.step()
    assert more[0].tolist() == pytest.approx([1 - 0.5 * 0.75] * 2)
    again = optimx.build(linear(), cfg)
    again.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.5})
    again.load_state_dict(build.state_dict())
    again.scheduler.step()
    assert [group["lr"] for group in again.optimizer.param_groups] == pytest.approx([0.5, 0.25])
    assert [group.get("param_names") for group in again.optimizer.param_groups] == [*names, None]


# optimizers


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_optimizer(case: Any) -> None:
    build = optimx.build(linear(), {"optimizer": {"name": case.name, "max_grad_norm": 1.0}})
    assert type(build.optimizer) is case.cls
    assert build.optimizer.max_grad_norm == 1.0
    before = [p.clone() for p in build.model.parameters()]
    train(build, 1)
    assert not any(map(torch.equal, before, build.model.parameters()))


def test_every_registered_optimizer_is_checked_or_built() -> None:
    """Also those that want matrices (Muon), one group (LBFGS) or sparse gradients."""
    refused = {}
    for name in optimx.list_optimizers():
        try:
            build = optimx.build(linear(), {"optimizer": name})
        except ConfigError as error:
            refused[name] = str(error)
        else:
            assert sum(len(group["params"]) for group in build.optimizer.param_groups) == 6
    assert set(refused) <= {"muon", "lbfgs"}
    assert "2D" in refused.get("muon", "2D")


def test_other_ways_to_name_one() -> None:
    assert type(optimx.build(linear(), {"optimizer": torch.optim.SGD}).optimizer) is torch.optim.SGD
    for name in (torch.optim.SGD, "torch.optim:SGD", "torch.optim.sgd:SGD"):
        assert type(optimx.build(linear(), {"optimizer": {"name": name, "lr": 0.1}}).optimizer) is torch.optim.SGD
    half = lambda params, lr: torch.optim.SGD(params, lr=lr / 2)  # noqa: E731
    build = optimx.build(linear(), {"optimizer": {"name": half, "lr": 0.5}})
    assert build.optimizer.defaults["lr"] == 0.25


@pytest.mark.parametrize("warmup", [0, 2])
def test_tensor_lr(warmup: int) -> None:
    """Which schedulers write into, so that nothing may share it."""
    lr = torch.tensor(0.5)
    schedule = ScheduleConfig("linear", total=4 + warmup, warmup=warmup)
    build = optimx.build(linear(), Config(OptimizerConfig("adamw", lr=lr), schedule=schedule))
    assert all(isinstance(group["lr"], Tensor) for group in build.optimizer.param_groups)
    rates = [step[0] for step in build.scheduler.preview(4)]
    assert rates == pytest.approx([0.5, 0.375, 0.25, 0.125] if not warmup else [0.25, 0.5, 0.4, 0.3])
    train(build, 2)
    assert build.optimizer.param_groups[0]["lr"].item() == pytest.approx(rates[2])
    assert lr == 0.5


def test_groups_without_weight_decay() -> None:
    """An optimizer without weight decay gets no groups for it."""
    build = optimx.build(linear(), {"optimizer": "rprop"})
    assert len(build.optimizer.param_groups) == 1
    assert "weight_decay" not in build.optimizer.param_groups[0]


def test_rules_set_the_optimizers_own_options() -> None:
    cfg = {"groups": {"rules": [{"match": "0.weight", "betas": [0.5, 0.6], "lr": 0.25}]}}
    build = optimx.build(linear(), {**cfg, "batch_scaling": {"batch": 4, "reference": 2}})
    group = build.optimizer.param_groups[0]
    assert (group["param_names"], group["betas"], group["lr"]) == (["0.weight"], (0.5, 0.6), 0.5)
    # of the lr that the batch is scaled to
    assert build.config.groups.rules[0]["lr"] == 0.5


def test_rules_say_how_numbers_are_kept() -> None:
    """Also where the optimizer's own table does not."""
    rule = {"match": "0.*", "state_dtype": {"exp_avg": "8bit"}, "param_rounding": "master", "rounding_seed": 1}
    build = optimx.build(linear(), {"groups": {"rules": [rule]}})
    matched = {"0.weight", "0.bias"}
    for group in build.optimizer.param_groups:
        for key in rule.keys() - {"match"}:
            assert group.get(key) == (rule[key] if matched & {*group["param_names"]} else None)
    for wrong, told in (
        ({"state_dtype": "8bits"}, r"groups.rules[0].state_dtype (value: '8bits') is refused: state_dtype should be"),
        ({"state_dtype": {"exp": "8bit"}}, r"groups.rules[0].state_dtype (value: {'exp': '8bit'}) is refused: state_"),
        ({"param_rounding": "up"}, r"groups.rules[0].param_rounding (value: 'up') is refused: param_rounding should"),
    ):
        (problem,) = problems(linear(), {"groups": {"rules": [{"match": "0.*", **wrong}]}})
        assert problem.startswith(told)


@pytest.mark.parametrize("section", [{"lr": 0.5}, {}], ids=["lr", "default"])
def test_batch_scaling(section: dict) -> None:
    build = optimx.build(linear(), {"optimizer": section, "batch_scaling": {"batch": 32, "reference": 256}})
    assert build.optimizer.param_groups[0]["lr"] == pytest.approx(section.get("lr", 1e-3) / 8)


# presets

NEEDS = {
    "bert-finetune": {"schedule.steps_per_epoch": 100},
    "vit-finetune": {"schedule.steps_per_epoch": 100},
    "gpt-pretrain": {"schedule.total": 10_000},
    "gpt-pretrain-bf16": {"schedule.total": 10_000},
    "finetune-8bit": {"schedule.steps_per_epoch": 100},
    "resnet-sgd": {"schedule.steps_per_epoch": 100},
    "ppo": {"schedule.total": 10_000},
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    model = ViT(depth=3)
    build = optimx.build(model, name, NEEDS.get(name, {}))
    assert optimx.build(ViT(depth=3), build.config.to_dict()).config.to_dict() == build.config.to_dict()
    if name in NEEDS:
        path = next(iter(NEEDS[name]))
        assert any(path in problem for problem in problems(ViT(depth=3), name))
    for _ in range(2):
        build.optimizer.zero_grad()
        model(torch.randn(2, 8)).square().mean().backward()
        build.optimizer.step()
        if build.scheduler is not None:
            build.scheduler.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_numbers_of_presets() -> None:
    """Beside those of the sources that a builder works out."""
    resnet = optimx.build(linear(), "resnet-sgd", NEEDS["resnet-sgd"])
    assert [resnet.scheduler.preview(1, step)[0][0] for step in (2999, 3000, 6000)] == pytest.approx([0.1, 0.01, 0.001])
    # momentum 0.9 and weight decay of everything
    assert [(g["momentum"], g["weight_decay"]) for g in resnet.optimizer.param_groups] == [(0.9, 1e-4)]
    vit = optimx.build(ViT(), "vit-finetune", NEEDS["vit-finetune"])
    assert vit.config.optimizer.lr == pytest.approx(4e-3)
    assert len(vit.optimizer.param_groups) >= 26
    ppo = optimx.build(linear(), "ppo", {"schedule.total": 10})
    assert [step[0] for step in ppo.scheduler.preview(3)] == pytest.approx([2.5e-4, 2.25e-4, 2e-4])
    finetune = optimx.build(linear(), "finetune-8bit", NEEDS["finetune-8bit"])
    # a line down to zero after three epochs, no warmup
    assert [finetune.scheduler.preview(1, step)[0][0] for step in (0, 150, 300)] == pytest.approx([5e-5, 2.5e-5, 0.0])


def preset_of(name: str, dtype: torch.dtype) -> optimx.Build:
    """A model large enough for states of 8 bits, trained for three steps."""
    torch.manual_seed(0)
    build = optimx.build(torch.nn.Linear(128, 64, dtype=torch.bfloat16).to(dtype), name, NEEDS[name])
    for _ in range(3):
        build.optimizer.zero_grad()
        build.model(torch.randn(4, 128, dtype=torch.bfloat16).to(dtype)).float().square().mean().backward()
        build.optimizer.step()
    return build


def test_presets_that_round_keep_what_they_say() -> None:
    remainder = preset_of("gpt-pretrain-bf16", torch.bfloat16)
    state = remainder.optimizer.state[remainder.model.weight]
    assert {name: t.dtype for name, t in state.items() if name != "step"} == {
        "exp_avg": torch.float32, "exp_avg_sq": torch.float32, "param_remainder": torch.int16,
    }  # fmt: skip
    codes = preset_of("finetune-8bit", torch.bfloat16)
    state = codes.optimizer.state[codes.model.weight]
    assert {t.dtype for t in state.values() if t.numel() == 64 * 128} == {torch.int8, torch.uint8}
    assert codes.optimizer.state[codes.model.bias]["exp_avg"].dtype == torch.float32


def test_presets_that_round_leave_float32_parameters_alone() -> None:
    plain, remainder = (preset_of(name, torch.float32) for name in ("gpt-pretrain", "gpt-pretrain-bf16"))
    assert torch.equal(remainder.model.weight, plain.model.weight)
    assert "param_remainder" not in remainder.optimizer.state[remainder.model.weight]
    codes = preset_of("finetune-8bit", torch.float32)
    assert not torch.equal(codes.model.weight, codes.model.weight.bfloat16().float())


# checkpoints


@pytest.mark.parametrize(
    "schedule", [None, {"name": "cosine", "total": 20, "warmup": 3}, {"name": "StepLR", "step_size": 2}]
)
def test_resume(schedule: dict | None) -> None:
    cfg = {"optimizer": {"lr": 0.1}, "schedule": schedule}
    straight = optimx.build(linear(), cfg)
    train(straight, 10)
    first = optimx.build(linear(), cfg)
    train(first, 5)
    file = io.BytesIO()
    torch.save({"model": first.model.state_dict(), **first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = optimx.build(linear(), cfg)
    second.model.load_state_dict(saved.pop("model"))
    second.load_state_dict(saved)
    for step in range(5, 10):
        second.optimizer.zero_grad()
        torch.manual_seed(step)
        second.model(torch.randn(5, 3)).square().mean().backward()
        second.optimizer.step()
        if second.scheduler is not None:
            second.scheduler.step()
    assert all(map(torch.equal, straight.model.parameters(), second.model.parameters()))


def test_refused_states() -> None:
    with_one = optimx.build(linear(), {"schedule": {"name": "linear", "total": 10}})
    without = optimx.build(linear(), {})
    with pytest.raises(ValueError, match="should be a scheduler's state but is: none"):
        with_one.load_state_dict(without.state_dict())
    with pytest.raises(ValueError, match="should be none but is: a scheduler's state"):
        without.load_state_dict(with_one.state_dict())
    with pytest.raises(ValueError, match=r"should have 'optimizer' and 'scheduler' but has: \['optimizer'\]"):
        without.load_state_dict({"optimizer": {}})
    # a scheduler that refuses its part leaves the optimizer as it was, also its codes
    codes = {"name": "adamw", "state_dtype": "8bit"}
    large = nn.Sequential(nn.Linear(3, 128), nn.Linear(128, 64))
    coded = optimx.build(large, {"optimizer": codes, "schedule": {"name": "linear", "total": 10}})
    train(coded, 2)
    wrong, before = copy.deepcopy(coded.state_dict()), copy.deepcopy(coded.optimizer.state_dict(compressed=True))
    wrong["scheduler"] = {}
    wrong["optimizer"]["param_groups"][0] |= {"lr": 1.0, "state_dtype": "stochastic"}
    with pytest.raises(ValueError, match="state_dict should have"):
        coded.load_state_dict(wrong)
    after = coded.optimizer.state_dict(compressed=True)
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    other = optimx.build(linear(), {"schedule": {"name": "linear", "total": 20}})
    train(other, 3)
    with pytest.raises(ValueError, match="checkpoint"):
        with_one.load_state_dict(other.state_dict())
    assert with_one.optimizer.state_dict()["state"] == {}


def test_distributed_checkpoint(tmp_path: Path) -> None:
    """Also of a schedule with more phases than the one that reads it has: nothing is dropped without a word."""
    cfg = {"optimizer": {"lr": 0.1}, "schedule": {"name": "cosine", "total": 20, "warmup": 3}}
    first, second = optimx.build(linear(), cfg), optimx.build(linear(), cfg)
    train(first, 5)
    dcp.save({"train": first.as_stateful()}, checkpoint_id=tmp_path)
    dcp.load({"train": second.as_stateful()}, checkpoint_id=tmp_path)
    for build in (first, second):
        train(build, 5)
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters()))
    assert second.scheduler.last_epoch == 10
    without = optimx.build(linear(), {})
    with pytest.raises(ValueError, match="should be none but is: a scheduler's state"):
        dcp.load({"train": without.as_stateful()}, checkpoint_id=tmp_path)
    shorter = optimx.build(linear(), {**cfg, "schedule": {"name": "cosine", "total": 20}})
    with pytest.raises(ValueError, match=r"differs: schedule of lr\.phases"):
        dcp.load({"train": shorter.as_stateful()}, checkpoint_id=tmp_path)
    shorter.scheduler.on_mismatch = "use_new"
    dcp.load({"train": shorter.as_stateful()}, checkpoint_id=tmp_path)
    assert shorter.scheduler.last_epoch == 5
    assert (
        shorter.optimizer.param_groups[0]["lr"]
        == shorter.scheduler.preview(1, 5)[0][0]
        != first.scheduler.preview(1, 5)[0][0]
    )
    with pytest.raises(ValueError, match="should be a scheduler's state but is: none"):
        second.as_stateful().load_state_dict(without.as_stateful().state_dict())


# what it costs


@pytest.mark.interpreted
def test_launches_do_not_grow_with_layers(
    triton_backend: torch.device, toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 layers, 26 groups and more, all in one bucket: a norm, its end, an update."""
    # needs triton
    from tests.test_kernels import record_launches

    build = optimx.build(ViT().to(triton_backend), toml)
    assert len(build.optimizer.param_groups) >= 26
    launched = record_launches(monkeypatch)
    for _ in range(2):
        build.model(torch.randn(2, 8, device=triton_backend)).square().mean().backward()
        launched.clear()
        build.optimizer.step()
        assert launched == ["_norm_kernel", "_finish_kernel", "_adam_kernel"]
        build.scheduler.step()


# other people's loops


def test_as_lightning() -> None:
    build = optimx.build(linear(), {"schedule": {"name": "linear", "total": 10}})
    assert build.as_lightning() == {
        "optimizer": build.optimizer,
        "lr_scheduler": {"scheduler": build.scheduler, "interval": "step", "frequency": 1},
    }
    more = build.as_lightning(interval="epoch", monitor="loss")["lr_scheduler"]
    assert (more["interval"], more["monitor"]) == ("epoch", "loss")
    without = optimx.build(linear(), {})
    assert without.as_lightning() == {"optimizer": without.optimizer}


# rules as tables


RULES: dict[str, Any] = {
    "max_grad_norm": {"name": "autoclip", "percentile": 20},
    "skip_nonfinite": True,
    "skip_spikes": {"window": 16, "sigma": 4},
    "max_skips": 4,
    "average": {"name": "ema", "decay": 0.99, "dtype": "float64"},
}


def rules_of(optimizer: Any) -> tuple[Any, ...]:
    return tuple(getattr(optimizer, name) for name in RULES)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_rules(name: str, tmp_path: Path) -> None:
    build = optimx.build(linear(), {"optimizer": {"name": name, **RULES}})
    average = optimx.EMA(decay=0.99, dtype=torch.float64)
    assert rules_of(build.optimizer) == (optimx.AutoClip(20.0), True, optimx.Spikes(16, 4.0), 4, average)
    tree = build.config.to_dict()
    assert tree["optimizer"]["max_grad_norm"] == {"name": "autoclip", "percentile": 20.0, "window": 1000}
    assert tree["optimizer"]["average"]["dtype"] == "float64"
    assert build.config.optimizer == optimx.build(linear(), build.config).config.optimizer
    path = tmp_path / "train.toml"
    path.write_text(to_toml({"optimizer": tree["optimizer"]}))
    assert rules_of(optimx.build(linear(), path).optimizer) == rules_of(build.optimizer)


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"max_grad_norm": {"name": "zclip", "max_norm": None}}, optimx.ZClip(max_norm=None)),
        ({"max_grad_norm": optimx.AutoClip(50.0)}, optimx.AutoClip(50.0)),
        ({"skip_spikes": True}, optimx.Spikes()),
        ({"average": {"name": "power_ema", "sigma": 0.1}}, optimx.PowerEMA(sigma=0.1)),
    ],
    ids=str,
)
def test_rule_is_written_back(given: dict[str, Any], rule: Any) -> None:
    (name,) = given
    build = optimx.build(linear(), {"optimizer": given})
    assert getattr(build.optimizer, name) == rule
    tree = json.loads(json.dumps(build.config.to_dict()))
    assert getattr(optimx.build(linear(), tree).optimizer, name) == rule


WRONG_RULES = {
    "name": ({"max_grad_norm": {"name": "autoclp"}},
             "max_grad_norm.name should be one of 'autoclip', 'zclip' but is: 'autoclp'; did you mean 'autoclip'?"),
    "no-name": ({"max_grad_norm": {"percentile": 10}}, "max_grad_norm.name is missing"),
    "key": ({"max_grad_norm": {"name": "autoclip", "percentil": 10}},
            "max_grad_norm.percentil (value: 10) is no key of optimizer.max_grad_norm (percentile, window); "
            "did you mean 'percentile'?"),
    "value": ({"max_grad_norm": {"name": "zclip", "decay": 1.5}},
              "max_grad_norm is refused: decay should be in [0, 1) but is: 1.5"),
    "type": ({"max_grad_norm": {"name": "zclip", "decay": "x"}}, "max_grad_norm.decay should be a number but is: 'x'"),
    "spikes": ({"skip_spikes": {"windw": 8}}, "skip_spikes.windw (value: 8) is no key of optimizer.skip_spikes ("),
    "window": ({"skip_spikes": {"window": 1}}, "skip_spikes is refused: window should be >= 2 but is: 1"),
    "skips": ({"max_skips": 3}, "max_skips (value: 3) is refused: max_skips should be None without skip_nonfinite"),
    "average": ({"average": {"name": "emma"}},
                "average.name should be one of 'ema', 'swa', 'power_ema' but is: 'emma'; did you mean 'ema'?"),
    "text": ({"average": "ema"}, "average should be a table but is: 'ema'"),
    "stock": ({"name": "torch.optim:AdamW", "skip_nonfinite": True},
              "skip_nonfinite (value: True) is no key of AdamW ("),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_RULES)
def test_wrong_rules(case: str) -> None:
    given, text = WRONG_RULES[case]
    with pytest.raises(ConfigError) as raised:
        optimx.build(linear(), {"optimizer": given})
    assert str(raised.value).startswith(f"optimizer.{text}")
