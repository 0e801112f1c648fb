"""The command ``optimx``: what is installed, what a config does to a model, what a step costs, what names there are."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import nn

from . import __version__, search
from ._engine import backends
from ._table import aligned
from .build import build, is_function_of_step
from .config import ConfigError
from .config.files import read_file
from .config.loading import load
from .config.writing import to_toml
from .convert import convert
from .explain import Explanation
from .lr_finder import LRCurve, lr_find
from .measuring import step_cost
from .presets import PRESETS, TREES
from .registry import OPTIMIZERS, SCHEDULERS, matches

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """One line on bad input, not the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments (default: those of the process).

    Returns:
        The exit code: 0; 1 where the output cannot be written; 2 on bad input. Lines on stderr tell why, one a problem.
    """
    if sys.stdout is None:
        _say("error", "the output cannot be written: it is closed")
        return 1
    try:
        try:
            arguments = _parser().parse_args([*_one_setting_each(sys.argv[1:] if argv is None else argv)])
            return _run(arguments)
        finally:
            # here an error can be told, at exit python would tell it as its own
            sys.stdout.flush()
    except BrokenPipeError:
        # `optimx list | head`: nobody reads on
        _discard_output()
        return 0
    except OSError as error:
        _discard_output()
        _say("error", f"the output cannot be written: {error.strerror or error}")
        return 1


def _run(arguments: argparse.Namespace) -> int:
    try:
        arguments.run(arguments)
    except ConfigError as error:
        for problem in error.problems:
            _say("error", str(problem))
        return 2
    except _BadInput as error:
        _say("error", str(error))
        return 2
    return 0


def _one_setting_each(argv: Sequence[str]) -> Iterator[str]:
    """``--set A=1 B=2 FILE`` as ``--set A=1 --set B=2 FILE``: only the ``=`` tells a setting from the file."""
    rest = [*argv]
    while rest:
        argument = rest.pop(0)
        yield argument
        if argument == "--set" and rest:
            yield rest.pop(0)
            while rest and "=" in rest[0] and not rest[0].startswith("-"):
                yield from ("--set", rest.pop(0))


def _say(kind: str, message: str) -> None:
    """A line on stderr, where there is one."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(f"optimx: {kind}:", " ".join(message.split()), file=sys.stderr)


def _discard_output() -> None:
    """What is still buffered goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _BadInput(Exception):
    """What the user gave cannot be used."""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="optimx", description=__doc__)
    parser.add_argument("--version", action="version", version=f"optimx {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor", help="versions, devices, which backend each gets and why, whether Triton compiles"
    )
    doctor.set_defaults(run=_doctor)

    explain = commands.add_parser("explain", help="the parameter groups and learning rates that a config gives a model")
    explain.add_argument("--model", required=True, metavar="PACKAGE.MODULE:FACTORY", help="what makes the model")
    explain.set_defaults(run=_explain)

    plot = commands.add_parser("plot", help="the learning rate of each group over the steps, as an image")
    plot.add_argument("--model", metavar="PACKAGE.MODULE:FACTORY", help="what makes the model (default: one group)")
    plot.add_argument("-o", "--output", default="schedule.png", type=Path, help="the image (default: schedule.png)")
    plot.add_argument("--steps", type=_steps, help="how many (default: all of the schedule)")
    plot.add_argument("--force", action="store_true", help="write over a file that exists")
    plot.set_defaults(run=_plot)

    finder = commands.add_parser("lr-find", help="learning rates that a short training with a rising one suggests")
    finder.add_argument("function", metavar="PACKAGE.MODULE:FUNCTION", help="returns model, optimizer and closure, or "
                        "a dict of the arguments of optimx.lr_find")  # fmt: skip
    finder.add_argument("--low", type=float, help="learning rate to begin with (default: 1e-7)")
    finder.add_argument("--high", type=float, help="learning rate to end with (default: 10)")
    finder.add_argument("--steps", type=_steps, help="of the sweep (default: 100)")
    finder.add_argument("--plot", type=Path, metavar="FILE", help="draw the losses into an image")
    finder.add_argument("--force", action="store_true", help="write over a file that exists")
    finder.add_argument("--json", action="store_true", help="learning rates, losses and suggestions as JSON")
    finder.set_defaults(run=_lr_find)

    bench = commands.add_parser("bench", help="what an optimizer's step costs on a model, beside torch's and others'")
    bench.add_argument("model", metavar="FILE.py:FACTORY", help="returns the model, or a tuple of it and the name "
                       "of an optimizer or a config; PACKAGE.MODULE:FACTORY, too")  # fmt: skip
    which = bench.add_mutually_exclusive_group()
    which.add_argument("--optimizer", metavar="NAME", help="one of optimx's (default: what FACTORY tells, or AdamW)")
    which.add_argument("--config", metavar="CFG", help="a TOML, YAML or JSON file, or the name of a preset")
    bench.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                       help="over it, such as optimizer.lr=3e-4; several, too")  # fmt: skip
    bench.add_argument("--max-grad-norm", type=float, metavar="NORM", help="clip to this norm (default: as configured)")
    bench.add_argument("--device", type=_device, help="such as cpu or cuda:1 (default: the model's)")
    bench.add_argument("--dtype", type=_dtype, help="of the parameters, such as bfloat16 (default: the model's)")
    bench.add_argument("--rounds", type=_steps, default=20, help="turns that each contestant has (default: 20)")
    bench.add_argument("--compile", action="store_true",
                       help="also torch's foreach step under torch.compile, which takes a minute or so")  # fmt: skip
    bench.add_argument("--no-peers", action="store_true", help="without other packages that are installed")
    bench.add_argument("--json", action="store_true", help="all figures as JSON")
    bench.set_defaults(run=_bench)

    searching = commands.add_parser("search", help="the configs that a config's section search stands for")
    which = searching.add_mutually_exclusive_group(required=True)
    which.add_argument("--grid", type=_steps, metavar="N", help="every combination, with N numbers of each range")
    which.add_argument("--random", type=_steps, metavar="N", help="N combinations at random")
    searching.add_argument("--seed", type=_seed, help="of --random: the same seed gives the same ones (default: 0)")
    searching.add_argument("--json", action="store_true", help="each as a line of JSON, overrides for optimx.build")
    searching.set_defaults(run=_search)

    for command in (explain, plot, searching):
        command.add_argument("config", metavar="CFG", help="a TOML, YAML or JSON file, or the name of a preset")
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                             help="over it, such as optimizer.lr=3e-4; several, too")  # fmt: skip

    conversion = commands.add_parser("convert", help="a config of timm, detectron2 or Hugging Face as one of ours")
    conversion.add_argument(
        "config", metavar="FILE", help="timm's args.yaml, detectron2's YAML, TrainingArguments as JSON"
    )
    conversion.add_argument(
        "--from", dest="project", metavar="PROJECT", help="timm, detectron2 or hf (default: by its keys)"
    )
    conversion.add_argument("-o", "--output", type=Path, help="a .toml or .json file (default: TOML to the terminal)")
    conversion.add_argument("--force", action="store_true", help="write over a file that exists")
    conversion.set_defaults(run=_convert)

    names = commands.add_parser("list", help="names that configs can use")
    names.add_argument("pattern", nargs="?", default="*", help="a glob, such as 'adam*'")
    names.set_defaults(run=_list)
    return parser


def _steps(text: str) -> int:
    steps = int(text)
    if steps < 1:
        raise argparse.ArgumentTypeError(f"should be >= 1 but is: {text}")
    return steps


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    # no such name, not built in, not there
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"should be a device of this machine but is: {text} ({reason})") from error


def _dtype(text: str) -> torch.dtype:
    dtype = getattr(torch, text, None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise argparse.ArgumentTypeError(f"should be a floating-point dtype of torch but is: {text}")
    return dtype


def _seed(text: str) -> int:
    seed = int(text)
    if seed < 0:
        raise argparse.ArgumentTypeError(f"should be >= 0 but is: {text}")
    return seed


# commands


def _doctor(arguments: argparse.Namespace) -> None:
    problem = backends.triton_problem()
    versions = [
        ("optimx", __version__),
        ("python", platform.python_version()),
        ("platform", platform.platform()),
        ("torch", torch.__version__),
        ("torch is built for", backends.toolkit()),
        ("triton", backends.triton_version() or "not installed"),
        ("triton compiles", "yes" if problem is None else f"no: {problem}"),
    ]
    _show([("what", "is"), *versions])
    print()
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    rows = [("device", "name", "backend", "why")]
    whys = {backends.TRITON: "whole steps in a few launches", backends.NATIVE: "torch's own fused CPU operators"}
    for device in devices:
        backend, reason = backends.choose(device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        rows.append((str(device), name, backend, reason or whys[backend]))
    _show(rows)


def _explain(arguments: argparse.Namespace) -> None:
    found = build(_model(arguments.model), arguments.config, arguments.set).explain()
    _show(found.groups.table, range(6))
    print(*found.groups.notes, "", sep="\n")
    for of_optimizer in found.backends.members or (found.backends,):
        _show_optimizer(of_optimizer)
    if found.scheduler:
        print(found.scheduler)
    if found.rates:
        _show(found.table, range(3))


def _show_optimizer(found: Explanation) -> None:
    """What its steps run on, and the memory that is taken."""
    print(found.optimizer)
    _show(found.table, range(1, 4))
    reasons = {row.reason: row.backend for row in found.rows if row.reason}
    print(*(f"{backend} because: {reason}" for reason, backend in reasons.items()), sep="\n")
    if found.memory is not None:
        print(*found.memory.lines(_terminal_width()), "", sep="\n")


def _plot(arguments: argparse.Namespace) -> None:
    _check_output(arguments.output, arguments.force)
    tree = load(arguments.config, arguments.set, TREES)
    if arguments.model is None and tree.pop("groups", None):
        _say("note", "groups are of a model (--model), so one group is drawn")
    model = nn.Linear(1, 1, bias=False) if arguments.model is None else _model(arguments.model)
    built = build(model, tree)
    if not is_function_of_step(built.scheduler):
        kind = "there is none" if built.scheduler is None else f"{type(built.scheduler).__name__} is none"
        raise ConfigError.of("schedule", f"should be a schedule, a function of the step: {kind};", tree.get("schedule"))
    if arguments.steps is None and getattr(built.scheduler.schedule, "steps", None) is None:
        raise _BadInput("the schedule has no end: tell how many steps to draw, as --steps 1000 does")
    with _drawing():
        built.scheduler.plot(arguments.output, arguments.steps)
    print(arguments.output)


@contextmanager
def _drawing() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise _BadInput(f"plot needs {error.name}: pip install 'torch-optimx[bench]'") from error
    # a file that cannot be written, a suffix that is no image's
    except (ValueError, OSError) as error:
        raise _BadInput(f"plot: {error}") from error


def _lr_find(arguments: argparse.Namespace) -> None:
    if arguments.plot is not None:
        _check_output(arguments.plot, arguments.force)
    curve = _curve(arguments)
    if arguments.plot is not None:
        with _drawing():
            curve.plot(arguments.plot)
    if arguments.json:
        print(json.dumps(curve.to_dict()))
        return
    print(curve.summary)
    _show(curve.table, [1])


def _curve(arguments: argparse.Namespace) -> LRCurve:
    """The sweep of what the user's function returns; what is given on the command line goes before that."""
    path = arguments.function
    made = _called("FUNCTION", path)
    if isinstance(made, tuple) and len(made) == 3:
        made = dict(zip(("model", "optimizer", "closure"), made, strict=True))
    if not isinstance(made, dict):
        raise _BadInput(f"FUNCTION should return (model, optimizer, closure) or a dict but {path!r} returned: {made!r}")
    given = {name: getattr(arguments, name) for name in ("low", "high", "steps")}
    made |= {name: value for name, value in given.items() if value is not None}
    try:
        return lr_find(**made)
    # arguments that do not go together, or the training fails in a way of its own
    except Exception as error:
        raise _BadInput(f"lr-find: {type(error).__name__}: {error}") from error


def _bench(arguments: argparse.Namespace) -> None:
    made = _called("FACTORY", arguments.model)
    model, cfg = made if isinstance(made, tuple) and len(made) == 2 else (made, "adamw")
    if not isinstance(model, nn.Module):
        raise _BadInput(f"FACTORY should make a torch.nn.Module but {arguments.model!r} made: {type(model).__name__}")
    if arguments.optimizer is not None and arguments.optimizer not in OPTIMIZERS:
        # with the nearest name
        OPTIMIZERS.get(arguments.optimizer, "--optimizer")
    if arguments.max_grad_norm is not None:
        arguments.set.append(f"optimizer.max_grad_norm={arguments.max_grad_norm}")
    try:
        found = step_cost(
            model, arguments.optimizer or arguments.config or cfg, arguments.set, device=arguments.device,
            dtype=arguments.dtype, compiled=arguments.compile, peers=not arguments.no_peers, rounds=arguments.rounds,
        )  # fmt: skip
    except ConfigError:
        raise
    # a model that nothing can train, or too little memory
    except Exception as error:
        raise _BadInput(f"bench: {type(error).__name__}: {error}") from error
    print(json.dumps(found.to_dict()) if arguments.json else found)


def _search(arguments: argparse.Namespace) -> None:
    if arguments.random is None and arguments.seed is not None:
        raise _BadInput("--seed should come with --random, as a grid is always the same")
    if arguments.grid is not None:
        found = search.grid(arguments.config, arguments.grid, arguments.set)
    else:
        found = search.sample(arguments.config, arguments.random, arguments.seed or 0, arguments.set)
    if arguments.json:
        print(*(json.dumps(overrides, default=str) for overrides in found), sep="\n")
    else:
        _show(
            [(*found[0],), *([json.dumps(value, default=str) for value in overrides.values()] for overrides in found)]
        )


def _convert(arguments: argparse.Namespace) -> None:
    output: Path | None = arguments.output
    if output is not None:
        if output.suffix not in (".toml", ".json"):
            raise _BadInput(f"output should end with .toml or .json but is: {output}")
        _check_output(output, arguments.force)
    conversion = convert(read_file(Path(arguments.config)), arguments.project)
    # TOML has all that the config may be of
    text = to_toml(conversion.config)
    if output is not None and output.suffix == ".json":
        text = json.dumps(conversion.config, indent=2, default=str) + "\n"
    if output is None:
        print(text, end="")
    else:
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise _BadInput(
                f"output should be a file that can be written ({error.strerror}) but is: {output}"
            ) from error
    for note in conversion.notes:
        _say("note", note)


def _check_output(output: Path, force: bool) -> None:
    if output.is_dir():
        raise _BadInput(f"output should be a file but is a folder: {output}")
    if output.exists() and not force:
        raise _BadInput(f"output should be a new file, or come with --force, but exists: {output}")


def _list(arguments: argparse.Namespace) -> None:
    rows = [("kind", "name", "what")]
    for registry in (OPTIMIZERS, SCHEDULERS):
        rows += [(registry.kind, name, registry.place(name)) for name in registry.names(arguments.pattern)]
    presets = {name: preset for name, preset in PRESETS.items() if matches(name, arguments.pattern)}
    rows += [("preset", name, preset.summary) for name, preset in presets.items()]
    if len(rows) == 1:
        raise _BadInput(f"no name matches: {arguments.pattern!r}")
    _show(rows)


def _model(path: str) -> nn.Module:
    """The model that ``package.module:factory`` makes."""
    model = _called("--model", path)
    if not isinstance(model, nn.Module):
        raise _BadInput(f"--model should make a torch.nn.Module but {path!r} made: {type(model).__name__}")
    return model


def _called(option: str, path: str) -> Any:
    """What ``package.module:factory`` or ``file.py:factory`` returns, looked for in the current folder too.

    A module is returned as it is.
    """
    module, colon, name = path.rpartition(":")
    if not colon:
        raise _BadInput(f"{option} should be PACKAGE.MODULE:FACTORY or FILE.py:FACTORY but is: {path!r}")
    is_file = module.endswith(".py")
    if is_file and not Path(module).is_file():
        raise _BadInput(f"{option} should name a file that exists but {module!r} does not")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory: Any = _module_of_file(Path(module)) if is_file else importlib.import_module(module)
        for part in name.split("."):
            factory = getattr(factory, part)
        return factory if isinstance(factory, nn.Module) else factory()
    # it is not there, does not import, needs arguments, or fails in a way of its own
    except Exception as error:
        what = "make a model" if option == "--model" else "return"
        raise _BadInput(f"{option} {path!r} does not {what}: {type(error).__name__}: {error}") from error


def _module_of_file(file: Path) -> ModuleType:
    """The module in a file, which finds its neighbours as a script does."""
    folder = str(file.parent.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # pickle and dataclasses look for it there
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def _show(rows: Sequence[Sequence[str]], numbers: Container[int] = ()) -> None:
    """A table, the first row of which is its head; in a terminal as wide as that."""
    print(*aligned(rows, numbers, _terminal_width()), sep="\n")


def _terminal_width() -> int | None:
    """Characters of a line; None where the output goes to no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
