"""What a step costs on a model: who takes part, what is told of it, and that the model stays as it was."""

from __future__ import annotations

import importlib
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimx
from optimx import cli
from optimx.measuring import contest, packages, stock, timing
from optimx.measuring.cost import StepCost, row_of
from optimx.measuring.packages import Missing, Peer

MUON = {"optimizer": {"name": "muon", "lr": 0.01, "adamw": {"lr": 1e-3}}, "groups": {"muon": "auto"}}
CLIP = {"optimizer.max_grad_norm": 1.0}
ALL_STOCK = [stock.DEFAULT, stock.FOREACH, stock.FUSED]


class Net(nn.Module):
    """Tied weights, a frozen layer, a buffer, something large and something small."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 100)
        self.block = nn.Linear(100, 100)
        self.norm = nn.BatchNorm1d(100)
        self.frozen = nn.Linear(100, 100).requires_grad_(False)
        self.head = nn.Linear(100, 60, bias=False)
        self.head.weight = self.embed.weight


def cost(model: nn.Module | None = None, *args: Any, **kwargs: Any) -> StepCost:
    return optimx.step_cost(model or Net(), *args, **{"rounds": 1, "peers": False, **kwargs})


def names(found: StepCost) -> list[str]:
    return [row.name for row in found.rows]


def test_all_ways_are_timed() -> None:
    found = cost()
    assert names(found) == [*ALL_STOCK, stock.OURS]
    assert (found.baseline, found.optimizer, found.max_grad_norm) == (stock.FUSED, "AdamW", None)
    # the tied weight counts once, the frozen layer not at all
    assert (found.tensors, found.elements) == (5, 60 * 100 + 100 * 100 + 3 * 100)
    assert (found.small_tensors, found.small_elements) == (3, 300)
    assert found.moved == found.elements * 28
    assert found.floor_ms == pytest.approx(found.moved / found.memory_gb_per_s / 1e6)
    for row in found.rows:
        assert row.ms > 0
        assert row.p20_ms <= row.ms <= row.p80_ms
        assert row.peak is not None
        assert row.calls >= 1
        assert row.note == ""
    assert [row.ratio for row in found.rows if row.name == stock.FUSED] == [1.0]


def test_the_model_stays_as_it_was() -> None:
    """Its tensors are the same objects with the same values, also where something raises; random numbers go on."""
    model = Net().train()
    for param in model.block.parameters():
        param.grad = torch.ones_like(param)
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    grads = {name: param.grad for name, param in model.named_parameters()}
    states = torch.get_rng_state(), random.getstate()
    cost(model, overrides=CLIP)
    with pytest.raises(optimx.ConfigError):
        cost(model, "muon")
    after = model.state_dict(keep_vars=True)
    assert {name: id(tensor) for name, tensor in after.items()} == {name: known for name, (known, _) in before.items()}
    assert all(torch.equal(after[name], value) for name, (_, value) in before.items())
    assert all(param.grad is grads[name] for name, param in model.named_parameters())
    assert model.head.weight is model.embed.weight
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_contestants_take_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same parameters, all ways change them alike, clipped, with several groups and without decay for some."""
    ends: dict[str, torch.Tensor] = {}

    def recorded(run: timing.Run, clock: Any) -> list[float]:
        params = who.params
        start = [param.detach().clone() for param in params]
        for _ in range(3):
            run.prepare()
            run.step()
        ends[str(len(ends))] = torch.cat([param.detach().flatten() for param in params])
        with torch.no_grad():
            for param, value in zip(params, start, strict=True):
                param.copy_(value)
        return [0.0]

    made = contest.Contest.__init__

    def remember(self: contest.Contest, *args: Any) -> None:
        nonlocal who
        made(self, *args)
        who = self

    who: Any = None
    monkeypatch.setattr(contest.Contest, "__init__", remember)
    monkeypatch.setattr(contest, "_plain_sum", lambda device, n_bytes: timing.Run(lambda: None, lambda: None, moved=1))
    monkeypatch.setattr(contest, "warm_up", recorded)
    monkeypatch.setattr(contest, "take_turns", lambda runs, *rest: {name: [1.0] for name in runs})
    config = {"optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.3}, "groups": {"no_decay": "auto"}}
    found = cost(None, config, {"optimizer.max_grad_norm": 0.5})
    assert found.groups == 2
    runs = [*ends.values()][:4]
    for end in runs:
        # another order of float32 roundings, over three steps of 0.01
        assert (end - runs[0]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Lion", [stock.FOREACH]), ("lamb", [stock.FOREACH]), ("sgd", ALL_STOCK), ("adafactor", ALL_STOCK[:2])],
)
def test_other_optimizers(name: str, expected: list[str]) -> None:
    found = cost(None, name)
    assert names(found) == [*expected, stock.OURS]
    assert found.baseline == (stock.FUSED if stock.FUSED in expected else stock.FOREACH)
    assert all(row.ms for row in found.rows)


def test_several_optimizers_in_one() -> None:
    model = nn.Sequential(nn.Embedding(30, 16), *(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 30))
    found = cost(model, MUON, CLIP)
    assert found.optimizer == "Muon and AdamW"
    assert found.max_grad_norm == "1.0"
    assert found.tensors == len([*model.parameters()])
    assert all(row.ms for row in found.rows)


def test_what_others_do_without_is_told() -> None:
    found = cost(None, {"optimizer": {"name": "adamw", "cautious": True, "skip_nonfinite": True}})
    notes = {row.name: row.note for row in found.rows}
    for name in ALL_STOCK:
        assert notes[name] == "does without skip_nonfinite=True, cautious=True"
    assert notes[stock.OURS] == ""
    assert "torch default, torch foreach, torch fused: does without" in " ".join(found.lines())


def test_a_rule_that_clips_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cost(None, {"optimizer": {"name": "sgd", "max_grad_norm": {"name": "autoclip"}}})
    assert found.max_grad_norm.startswith("AutoClip")
    assert "max_grad_norm=AutoClip" in found.rows[0].note


def test_clipping_reads_the_gradients_once_more() -> None:
    assert cost(overrides=CLIP).moved - cost().moved == 4 * cost().elements


def test_device_and_dtype_are_those_of_the_measurement() -> None:
    with torch.device("meta"):
        model = Net()
    found = cost(model, dtype=torch.bfloat16)
    assert found.dtypes == ("bfloat16",)
    assert "CPU" in found.device
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    assert {param.device.type for param in model.parameters()} == {"meta"}


def test_what_torch_updates_is_told() -> None:
    model = Net()
    model.block.weight = nn.Parameter(torch.ones(100, 100, dtype=torch.complex64))
    found = cost(model)
    (row,) = found.torch_steps
    assert (row.names, row.tensors, row.elements) == (("block.weight",), 1, 10_000)
    assert f"because {row.reason}: block.weight." in " ".join(found.lines())


def test_compiled_is_asked_for_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that is compiled is that of stock's foreach; of too many tensors there is a reason and no time."""
    steps: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda step: steps.append(step) or step)
    found = cost(compiled=True)
    assert names(found) == [*ALL_STOCK, stock.COMPILED, stock.OURS]
    (step,) = steps
    assert isinstance(step.__self__, torch.optim.AdamW)
    assert step.__self__.defaults["foreach"] is True
    monkeypatch.setattr(stock, "MOST_COMPILED", 4)
    (row,) = (row for row in cost(compiled=True).rows if row.name == stock.COMPILED)
    assert (row.ms, row.note) == (None, "not measured (5 tensors: compiling takes minutes)")


def test_compiled_takes_the_step_of_stock() -> None:
    """LAMB's, which is not torch's own and counts steps in a group."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a compiler")
    results = []
    for way in (stock.FOREACH, stock.COMPILED):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(7))]
        optimizer = stock.ways(optimx.LAMB)[way](params, lr=0.01)
        step = stock.compiled_step(optimizer) if way == stock.COMPILED else optimizer.step
        for _ in range(4):
            for param in params:
                param.grad = torch.randn_like(param)
            step()
        results.append(torch.cat([param.detach().flatten() for param in params]))
    # one kernel rounds in another order
    assert (results[0] - results[1]).abs().max() < 1e-6


def test_packages_that_compile_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer("heavyball", "torch.optim:AdamW", most_tensors=4)
    monkeypatch.setattr(contest, "BY_OPTIMIZER", {"AdamW": (peer,)})
    monkeypatch.setattr(torch, "compile", lambda step: step)
    assert names(cost(peers=True)) == [*ALL_STOCK, stock.OURS]
    row = cost(peers=True, compiled=True).rows[-1]
    assert (row.name, row.note) == ("heavyball", "not measured (5 tensors: compiling takes minutes)")


def test_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are installed; what does not run says so, and what is not installed is not there."""
    peers = (
        Peer("torchao", "torch.optim:AdamW", {"foreach": False}),
        Peer("timm", "torch.optim:NoSuchClass"),
        Peer("apex", "no_such_package:FusedAdam"),
    )
    monkeypatch.setattr(contest, "BY_OPTIMIZER", {"AdamW": peers})
    monkeypatch.setattr(packages, "import_torchvision", lambda: None)
    found = cost(peers=True)
    assert names(found) == [*ALL_STOCK, stock.OURS, "torchao", "timm"]
    assert found.rows[-2].ms > 0
    assert found.rows[-1].ms is None
    assert found.rows[-1].note.startswith("does not run here, AttributeError: ")
    with pytest.raises(Missing, match="apex is not installed"):
        peers[2].load()


def test_rows_of_known_times() -> None:
    row = row_of("optimx", [0.002, 0.001, 0.003], [0.004], 12, "")
    assert (row.ms, row.ratio, row.calls, row.peak) == (pytest.approx(2.0), pytest.approx(2.0), 3, 12)
    assert (row.p20_ms, row.p80_ms) == (pytest.approx(1.4), pytest.approx(2.6))
    assert row_of("a", [0.001], None, None, "").ratio is None
    assert row_of("a", None, [0.001], None, "why").ms is None


def test_it_prints_80_columns() -> None:
    lines = str(cost(overrides=CLIP)).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("AdamW, clipped to 1.0, float32, on ")
    assert lines[2].split() == ["step", "ms", "p20", "p80", "ratio", "peak"]
    assert [line.split("  ")[0] for line in lines[3:7]] == [*ALL_STOCK, stock.OURS]


def test_bad_arguments() -> None:
    for error, message, args in (
        (TypeError, "model should be a torch.nn.Module but is: int", (3,)),
        (ValueError, "parameters that require gradients but has none", (Net().requires_grad_(False),)),
        (ValueError, "'weight' gets its own in the forward pass", (nn.LazyLinear(3),)),
        (ValueError, "optimizer should be one of optimx's but is: 'LBFGS'", (nn.Linear(2, 2), "lbfgs")),
        (optimx.ConfigError, "no_such", (Net(), "no_such.toml")),
    ):
        with pytest.raises(error, match=message):
            cost(*args)
    with pytest.raises(ValueError, match="rounds should be >= 1 but is: 0"):
        cost(rounds=0)


def test_turns_rotate_and_who_raises_is_out() -> None:
    calls: list[str] = []

    def run(name: str) -> timing.Run:
        def step() -> None:
            calls.append(name)
            if name == "b" and calls.count("b") == 2:
                raise RuntimeError

        return timing.Run(lambda: None, step)

    failed: set[str] = set()

    class Guard:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None: ...

        def __exit__(self, kind: Any, *rest: Any) -> bool:
            failed.update([self.name] if kind else [])
            return True

    runs = {name: run(name) for name in "abc"}
    warm = {name: [1e-6] for name in "abc"}
    budget = timing.Budget(seconds=0.0, min_rounds=3, max_rounds=3, calls=1)
    times = timing.take_turns(runs, warm, timing.CLOCKS["wall"], budget, Guard, failed.__contains__)
    assert "".join(calls) == "abcbcaac"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "c": 3}


# the command

MODEL = """
from torch import nn
from neighbour import width

def make():
    return nn.Sequential(nn.Linear(width, 4), nn.LayerNorm(4))

def with_name():
    return make(), "sgd"

def with_config():
    return make(), {"optimizer": {"name": "lion", "lr": 0.01}}

def wrong():
    return 3

def frozen():
    return make().requires_grad_(False)

def broken():
    raise RuntimeError("no weights\\nhere")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file of factories in a folder below it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for module in ("made", "neighbour"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "made.py").write_text(MODEL)
    (tmp_path / "sub" / "neighbour.py").write_text("width = 3")
    (tmp_path / "train.toml").write_text('[optimizer]\nname = "adamw"\nmax_grad_norm = 2.0\n')
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert cli.main(["bench", *argv, "--rounds", "1", "--no-peers", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("here")
def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    factory = "sub/made.py:make"
    found = run(capsys, factory)
    assert (found["optimizer"], found["elements"], found["max_grad_norm"]) == ("AdamW", 3 * 4 + 3 * 4, None)
    assert [row["name"] for row in found["rows"]] == [*ALL_STOCK, stock.OURS]
    assert found["floor_ms"] > 0
    assert run(capsys, "sub/made.py:with_name")["optimizer"] == "SGD"
    assert run(capsys, "sub/made.py:with_name", "--optimizer", "Adam")["optimizer"] == "Adam"
    assert run(capsys, "sub/made.py:with_config")["optimizer"] == "Lion"
    assert run(capsys, factory, "--config", "train.toml")["max_grad_norm"] == "2.0"
    assert run(capsys, factory, "--config", "train.toml", "--max-grad-norm", "3")["max_grad_norm"] == "3.0"
    assert run(capsys, factory, "--dtype", "bfloat16", "--device", "cpu")["dtypes"] == ["bfloat16"]
    assert run(capsys, factory, "--set", "optimizer.cautious=true")["rows"][0]["note"] == "does without cautious=True"
    assert cli.main(["bench", factory, "--rounds", "1", "--no-peers"]) == 0
    assert capsys.readouterr().out.startswith("AdamW, float32, on ")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sub/made.py"], "FACTORY should be PACKAGE.MODULE:FACTORY or FILE.py:FACTORY but is: 'sub/made.py'"),
        (["nowhere.py:make"], "FACTORY should name a file that exists but 'nowhere.py' does not"),
        (["sub/made.py:nothing"], "FACTORY 'sub/made.py:nothing' does not return: AttributeError"),
        (["sub/made.py:broken"], "RuntimeError: no weights here"),
        (["sub/made.py:wrong"], "FACTORY should make a torch.nn.Module but 'sub/made.py:wrong' made: int"),
        (["sub/made.py:frozen"], "model should have parameters that require gradients but has none"),
        (["sub/made.py:make", "--optimizer", "adamx"], "did you mean 'adamax'?"),
        (["sub/made.py:make", "--config", "no.toml"], "no.toml"),
        (["sub/made.py:make", "--device", "gpu"], "--device: should be a device of this machine but is: gpu"),
        (["sub/made.py:make", "--dtype", "int8"], "--dtype: should be a floating-point dtype of torch but is: int8"),
        (["sub/made.py:make", "--rounds", "0"], "--rounds: should be >= 1 but is: 0"),
        (["sub/made.py:make", "--max-grad-norm", "-1"], "optimizer.max_grad_norm should be > 0 but is: -1.0"),
        (["sub/made.py:make", "--optimizer", "sgd", "--config", "train.toml"], "not allowed with argument"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    try:
        code = cli.main(["bench", *argv])
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("optimx")
    assert message in err


@pytest.mark.parametrize(("name", "tensors", "elements"), [("gpt2", 148, 124_439_808), ("lora", 96, 1_179_648)])
def test_examples(name: str, tensors: int, elements: int) -> None:
    """They have the sizes that they tell, and their models run, sized down and with numbers."""
    module = importlib.import_module(f"examples.{name}")
    trained = [param for param in module.model().parameters() if param.requires_grad]
    assert (len(trained), sum(param.numel() for param in trained)) == (tensors, elements)
    small = importlib.import_module("examples.gpt2").GPT2(width=16, layers=2, heads=2, vocab=11, context=8)
    model = module.with_adapters(small, rank=2) if name == "lora" else small
    logits = model(torch.randint(11, (2, 8)))
    assert logits.shape == (2, 8, 11)
    logits.square().mean().backward()
    assert all(param.grad is not None for param in model.parameters() if param.requires_grad)
