"""The command line: what it prints, and one line and exit code 2 on bad input."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import optimx
from optimx import cli
from optimx.lr_rules import RULES
from optimx.presets import PRESETS

# python 3.10 has none of its own
tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

CONFIG = """
[optimizer]
name = "adamw"
lr = 0.5
[groups]
rules = [{ match = "2.*", lr_mult = 2.0 }]
[schedule]
name = "cosine"
total = 100
warmup = 0.1
"""
MODEL = """
from torch import nn

def make():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))

instance = make()

def broken():
    raise RuntimeError("no weights\\nhere")

def wrong():
    return 3

def trial():
    import torch
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, lambda: model(torch.ones(5, 3)).square().mean()

def settings():
    model, optimizer, closure = trial()
    return {"model": model, "optimizer": optimizer, "closure": closure, "steps": 40, "high": 0.5}

def unknown():
    return {**settings(), "stepz": 3}

def failing():
    model, optimizer, _ = trial()
    return model, optimizer, broken
"""

DEEP = """
from torch import nn

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(16))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

def make():
    return Deep()
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config and a model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for module in ("models_here", "deep"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    Path("train.toml").write_text(CONFIG)
    Path("models_here.py").write_text(MODEL)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(argv) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What is wrong, a line each."""
    try:
        code = cli.main(argv)
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("optimx: note:")]
    assert lines
    assert all(line.startswith("optimx") and ": error: " in line for line in lines)
    return "\n".join(line.partition(": error: ")[2] for line in lines)


SEARCH = """
[search]
optimizer.lr = { low = 0.01, high = 1.0, log = true }
optimizer.betas = [[0.9, 0.95], [0.9, 0.999]]
"""


def test_search_lists_configs(capsys: pytest.CaptureFixture[str]) -> None:
    Path("train.toml").write_text(CONFIG + SEARCH)
    assert run(capsys, "search", "train.toml", "--grid", "2").splitlines() == [
        "optimizer.lr  optimizer.betas",
        "0.01          [0.9, 0.95]",
        "0.01          [0.9, 0.999]",
        "1.0           [0.9, 0.95]",
        "1.0           [0.9, 0.999]",
    ]
    lines = run(capsys, "search", "train.toml", "--random", "3", "--seed", "1", "--json").splitlines()
    assert [json.loads(line) for line in lines] == optimx.search.sample("train.toml", 3, 1)
    assert lines != run(capsys, "search", "train.toml", "--random", "3", "--json").splitlines()
    chosen = run(
        capsys, "search", "train.toml", "--grid", "1", "--json", "--set", "search.optimizer.betas=[[0.8, 0.9]]"
    )
    assert json.loads(chosen)["optimizer.betas"] == [0.8, 0.9]


def test_search_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "search", "train.toml", "--grid", "2").startswith("search is missing")
    Path("train.toml").write_text(CONFIG + SEARCH + 'optimizer.epz = [1e-8]\nschedule.warmup = ["x"]')
    found = refused(capsys, "search", "train.toml", "--random", "2").splitlines()
    assert [line.split()[0] for line in found] == ["search.optimizer.epz", "search.schedule.warmup"]
    assert "did you mean 'eps'?" in found[0]
    assert "one of the arguments --grid --random is required" in refused(capsys, "search", "train.toml")
    assert "not allowed with" in refused(capsys, "search", "train.toml", "--grid", "2", "--random", "2")
    assert "should be >= 1 but is: 0" in refused(capsys, "search", "train.toml", "--grid", "0")
    assert "should be >= 0 but is: -1" in refused(capsys, "search", "train.toml", "--random", "1", "--seed", "-1")
    assert "--seed should come with --random" in refused(capsys, "search", "train.toml", "--grid", "1", "--seed", "3")


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = run(capsys, "doctor")
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert optimx.__version__ in lines["optimx"]
    assert torch.__version__ in lines["torch"]
    assert lines["cpu"].split()[-5:] == ["torch's", "own", "fused", "CPU", "operators"] or "triton" in lines["cpu"]
    monkeypatch.setattr(cli.backends, "_triton_missing", lambda: "triton is not installed")
    text = run(capsys, "doctor")
    assert "not installed" in text
    assert "no: triton is not installed" in text


def test_doctor_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels = pytest.importorskip("optimx.triton_kernels.grad_norm")
    if not isinstance(kernels._finish_kernel, triton.runtime.JITFunction):
        pytest.skip("kernels are interpreted")
    assert cli.backends.triton_problem() is None

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no assembler")

    monkeypatch.setattr(triton, "compile", fail)
    assert cli.backends.triton_problem() == "RuntimeError: no assembler"


def test_doctor_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, because triton warns once: of an option whose default is about to change, say."""
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    found = subprocess.run([sys.executable, "-m", "optimx", "doctor"], capture_output=True, text=True, check=True)
    assert "triton compiles" in found.stdout
    assert found.stderr == ""


@pytest.mark.parametrize("model", ["models_here:make", "models_here:instance"])
def test_explain(capsys: pytest.CaptureFixture[str], model: str) -> None:
    text = run(capsys, "explain", "train.toml", "--model", model, "--set", "schedule.floor=0.1", "optimizer.name=lion")
    groups = [line.split() for line in text.splitlines() if line.startswith("    ") and line.split()[0].isdigit()]
    # tensors, elements, lr, scale, weight decay
    assert [row[1:6] for row in groups] == [["4", "24", "0.5", "1", "0"], ["2", "10", "1", "2", "0"]]
    assert "\nLion\n" in text
    assert text.splitlines()[-1].split() == ["100", "0.05", "0.1"]


def test_explain_tells_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """Of each member of a composite in a table of its own, with why states are float32."""
    Path("deep.py").write_text(DEEP)
    config = {"optimizer": {"name": "muon", "adamw": {"state_dtype": "8bit"}}}
    Path("muon.json").write_text(json.dumps(config))
    lines = run(capsys, "explain", "muon.json", "--model", "deep:make").splitlines()
    heads = [i for i, line in enumerate(lines) if line == "bytes a parameter"]
    owners = [next(line for line in reversed(lines[:i]) if line.endswith((": Muon", ": AdamW"))) for i in heads]
    assert [owner.rpartition(" ")[2] for owner in owners] == ["Muon", "AdamW"]
    assert [lines[i + 2].split()[0] for i in heads] == ["Muon", "AdamW"]
    assert sum("float32, because they have fewer than 4096 elements" in line for line in lines) == 1


def test_explain_plain_torch(capsys: pytest.CaptureFixture[str]) -> None:
    sets = ("optimizer.name=torch.optim:AdamW", "schedule=null")
    text = run(capsys, "explain", "train.toml", "--model", "models_here:make", "--set", *sets)
    assert "torch because: AdamW is not an optimx optimizer" in text
    assert "ScheduleLR" not in text


@pytest.mark.parametrize(
    "more", [(), ("--model", "models_here:make"), ("--steps", "7")], ids=["alone", "model", "steps"]
)
def test_plot(capsys: pytest.CaptureFixture[str], more: tuple[str, ...]) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["plot", "train.toml", "-o", "lr.png", *more]) == 0
    out, err = capsys.readouterr()
    assert out == "lr.png\n"
    # the rules of the config are about a model
    assert ("one group is drawn" in err) is ("--model" not in more)
    assert Path("lr.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("function", "head"), [("trial", "of 100 steps, lr 1e-07 to "), ("settings", "of 40 steps, ")])
def test_lr_find(capsys: pytest.CaptureFixture[str], function: str, head: str) -> None:
    lines = run(capsys, "lr-find", f"models_here:{function}").splitlines()
    assert head in lines[0]
    assert lines[1].split() == ["rule", "lr", "where"]
    assert [line.split()[0] for line in lines[2:]] == [*RULES]


def test_lr_find_as_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    options = ("--low", "1e-4", "--high", "1e-2", "--steps", "20", "--json", "--plot", "lr.png")
    found = json.loads(run(capsys, "lr-find", "models_here:settings", *options))
    assert found["lrs"] == pytest.approx([1e-4 * 100 ** (step / 19) for step in range(20)])
    assert len(found["losses"]) == 20
    assert found["suggestions"].keys() == RULES.keys()
    assert Path("lr.png").read_bytes().startswith(b"\x89PNG")
    refused(capsys, "lr-find", "models_here:settings", *options)
    run(capsys, "lr-find", "models_here:settings", *options, "--force")


def test_convert(capsys: pytest.CaptureFixture[str]) -> None:
    theirs = {"learning_rate": 1e-4, "max_steps": 100, "lr_scheduler_type": "cosine", "optim_args": "a=b"}
    Path("args.json").write_text(json.dumps(theirs))
    assert cli.main(["convert", "args.json"]) == 0
    out, err = capsys.readouterr()
    notes = err.splitlines()
    assert notes[0] == "optimx: note: not converted: optim_args = 'a=b'"
    assert all(note.startswith("optimx: note: ") for note in notes)
    tree = tomllib.loads(out)
    assert tree["schedule"] == {"name": "cosine", "total": 100, "convention": "hf"}
    for suffix in ("toml", "json"):
        run(capsys, "convert", "args.json", "-o", f"ours.{suffix}")
        refused(capsys, "convert", "args.json", "-o", f"ours.{suffix}")
        run(capsys, "convert", "args.json", "--from", "hf", "-o", f"ours.{suffix}", "--force")
        assert optimx.build(torch.nn.Linear(2, 2), f"ours.{suffix}").config.optimizer.lr == 1e-4


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [line.split() for line in run(capsys, "list").splitlines()]
    assert rows[0] == ["kind", "name", "what"]
    assert ["optimizer", "adamw", "optimx.adamw:AdamW"] in rows
    names = {row[1] for row in rows[1:]}
    assert names == {*optimx.list_optimizers(), *optimx.list_schedulers(), *PRESETS}
    assert [line.split()[1] for line in run(capsys, "list", "ADAM*").splitlines()[1:]] == ["adam", "adamax", "adamw"]


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "required: COMMAND"),
    "command": (("plto",), "invalid choice: 'plto'"),
    "option": (("list", "--bogus"), "unrecognized arguments: --bogus"),
    "no_model": (("explain", "train.toml"), "required: --model"),
    "pattern": (("list", "nothing*"), "no name matches: 'nothing*'"),
    "file": (("plot", "nowhere.toml"), "(No such file or directory) but is: 'nowhere.toml'"),
    "preset": (("plot", "gpt-pretrian"), "did you mean 'gpt-pretrain'?"),
    "set": (("plot", "train.toml", "--set", "optimizer.lr"), 'should be like "optimizer.lr=0.1"'),
    "values": (
        ("plot", "train.toml", "--set", "optimizer.lr=-1", "schedule.total=0"),
        "optimizer.lr should be >= 0 and finite but is: -1\nschedule.total should be >= 1 step but is: 0",
    ),
    "no_colon": (("explain", "train.toml", "--model", "models_here"), "should be PACKAGE.MODULE:FACTORY"),
    "no_module": (("explain", "train.toml", "--model", "no_such:x"), "ModuleNotFoundError: No module named 'no_such'"),
    "no_name": (("explain", "train.toml", "--model", "models_here:x"), "has no attribute 'x'"),
    "broken": (("explain", "train.toml", "--model", "models_here:broken"), "RuntimeError: no weights here"),
    "wrong": (("explain", "train.toml", "--model", "models_here:wrong"), "'models_here:wrong' made: int"),
    "no_schedule": (("plot", "gan"), "should be a schedule, a function of the step: there is none"),
    "torchs": (
        ("plot", "train.toml", "--set", 'schedule={"name": "StepLR", "step_size": 3}'),
        "a function of the step: StepLR is none",
    ),
    "endless": (("plot", "train.toml", "--set", 'schedule={"name": "constant"}'), "to draw, as --steps 1000 does"),
    "steps": (("plot", "train.toml", "--steps", "-1"), "argument --steps: should be >= 1 but is: -1"),
    "no_steps": (("plot", "train.toml", "--steps", "0"), "argument --steps: should be >= 1 but is: 0"),
    "some_steps": (("plot", "train.toml", "--steps", "few"), "argument --steps: invalid _steps value: 'few'"),
    "output_is_a_folder": (("plot", "train.toml", "-o", "."), "output should be a file but is a folder: ."),
    "output_exists": (("plot", "train.toml", "-o", "train.toml"), "come with --force, but exists: train.toml"),
    "toml_exists": (("convert", "args.json", "-o", "train.toml"), "come with --force, but exists: train.toml"),
    "suffix": (("plot", "train.toml", "-o", "lr.toml"), "plot: "),
    "folder": (("plot", "train.toml", "-o", "no/lr.png"), "plot: "),
    "lr_find_wrong": (
        ("lr-find", "models_here:wrong"),
        "should return (model, optimizer, closure) or a dict but 'models_here:wrong' returned: 3",
    ),
    "lr_find_no_name": (("lr-find", "models_here:x"), "FUNCTION 'models_here:x' does not return: AttributeError"),
    "lr_find_unknown": (("lr-find", "models_here:unknown"), "lr-find: TypeError: lr_find() got an unexpected keyword"),
    "lr_find_failing": (("lr-find", "models_here:failing"), "lr-find: RuntimeError: no weights here"),
    "lr_find_low": (("lr-find", "models_here:trial", "--low", "-1"), "low should be > 0 but is: -1.0"),
    "lr_find_suffix": (("lr-find", "models_here:trial", "--plot", "lr.toml"), "plot: "),
    "project": (
        ("convert", "train.toml"),
        "project should be told (--from, or project=) as one of detectron2, hf, timm",
    ),
    "output": (("convert", "train.toml", "-o", "x.ini"), "output should end with .toml or .json but is: x.ini"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(capsys: pytest.CaptureFixture[str], name: str) -> None:
    if BAD[name][0][:1] == ("plot",):
        pytest.importorskip("matplotlib")
    argv, message = BAD[name]
    assert message in refused(capsys, *argv)


def test_plot_without_matplotlib(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "plot needs matplotlib: pip install 'torch-optimx[bench]'" in refused(capsys, "plot", "train.toml")


def test_plots_have_a_file_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    """The one that is printed, whatever its name, and no other one that exists, unless it may."""
    pytest.importorskip("matplotlib")
    Path("lr.png").write_text("mine")
    assert run(capsys, "plot", "train.toml", "--model", "models_here:make", "-o", "lr") == "lr\n"
    assert Path("lr").read_bytes().startswith(b"\x89PNG")
    assert Path("lr.png").read_text() == "mine"
    refused(capsys, "plot", "train.toml", "-o", "lr.png")
    assert Path("lr.png").read_text() == "mine"
    run(capsys, "plot", "train.toml", "-o", "lr.png", "--force")
    assert Path("lr.png").read_bytes().startswith(b"\x89PNG")
    run(capsys, "plot", "train.toml", "-o", "lr.svg")
    assert b"<svg" in Path("lr.svg").read_bytes()


def test_plots_label_every_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the parameters of its groups have in common, however many there are."""
    figures = pytest.importorskip("matplotlib.figure")
    seen: list[Any] = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *args, **kwargs: seen.append(self))
    Path("deep.py").write_text(DEEP)
    run(capsys, "plot", "train.toml", "--model", "deep:make", "--set", 'groups={"layer_decay": 0.75}')
    (legend,) = seen[0].legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["embed", *(f"blocks.{i}" for i in range(16)), "norm, head"]
    colors = {line.get_color() for line in seen[0].axes[0].lines}
    assert len(colors) == len(labels)
    run(capsys, "plot", "train.toml", "--model", "models_here:make", "--set", "optimizer.name=sgd")
    assert [text.get_text() for text in seen[1].legends[0].get_texts()] == ["0, 1", "2"]


@pytest.mark.parametrize(
    "order",
    [
        ("--set", "optimizer.lr=0.25", "schedule.total=50", "train.toml", "--model", "models_here:make"),
        ("--set", "optimizer.lr=0.25", "--model", "models_here:make", "train.toml", "--set", "schedule.total=50"),
        ("train.toml", "--model", "models_here:make", "--set", "optimizer.lr=0.25", "--set", "schedule.total=50"),
        ("--model", "models_here:make", "--set=optimizer.lr=0.25", "train.toml", "--set=schedule.total=50"),
    ],
)
def test_settings_before_and_after_the_file(capsys: pytest.CaptureFixture[str], order: tuple[str, ...]) -> None:
    assert run(capsys, "explain", *order).splitlines()[-1].split() == ["50", "0", "0"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"optimx {optimx.__version__}\n"


@pytest.mark.parametrize("width", [60, 80, 100])
def test_tables_in_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Nothing is cut, no name and no number is broken."""
    commands = (
        ["list"],
        ["doctor"],
        ["explain", "train.toml", "--model", "models_here:make", "--set", "optimizer.lr=1.234e-4"],
    )
    plain = [run(capsys, *command) for command in commands]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(width))
    for command, text in zip(commands, plain, strict=True):
        shown = run(capsys, *command)
        assert "\N{HORIZONTAL ELLIPSIS}" not in shown
        assert {*text.split()} - {"-"} == {*shown.split()} - {"-"}
        tables = [line for line in shown.splitlines() if not line.startswith("in every group")]
        assert max(map(len, tables)) <= width
    assert "0.0001234" in shown


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_output_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        found = subprocess.run([sys.executable, "-m", "optimx", "list"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert found.returncode == 1
    assert found.stderr == "optimx: error: the output cannot be written: No space left on device\n"


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's syntax")
@pytest.mark.parametrize(("where", "code", "told"), [("| true", 0, ""), (">&-", 1, "it is closed"), ("2>&-", 0, "")])
def test_output_that_nobody_reads(where: str, code: int, told: str) -> None:
    command = f"{sys.executable} -m optimx list {where}"
    found = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert found.returncode == code
    assert found.stderr.strip().endswith(told)
    assert "Traceback" not in found.stderr
    assert found.stderr.count("\n") == bool(told)


def test_the_command_itself() -> None:
    script = Path(sys.executable).parent / "optimx"
    if not script.exists():
        pytest.skip("not installed")
    found = subprocess.run([script, "list", "lion"], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[1].split() == ["optimizer", "lion", "optimx.lion:Lion"]
    module = [sys.executable, "-m", "optimx"]
    found = subprocess.run([*module, "list", "nothing*"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (2, "", "optimx: error: no name matches: 'nothing*'\n")
