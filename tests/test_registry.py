"""Names of optimizers and schedulers, of optimx, of programs and of installed plugins."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

import optimx
from optimx.lr_scheduler import Schedule
from optimx.registry import OPTIMIZERS, SCHEDULERS, Registry
from tests.cases import CASES

PLUGIN = Path(__file__).parent / "plugin"


@pytest.fixture
def registry() -> Registry:
    return Registry("optimizer", "optimx.test_of_the_registry", lambda: [("adamw", optimx.AdamW), ("sgd", optimx.SGD)])


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package that has entry points, and that nobody has imported."""
    monkeypatch.syspath_prepend(str(PLUGIN))
    # as in a fresh interpreter
    for registry in (OPTIMIZERS, SCHEDULERS):
        for field in ("_names", "_things"):
            monkeypatch.setattr(registry, field, {})
        monkeypatch.setattr(registry, "_complete", False)
    yield
    sys.modules.pop("optimx_plugin", None)


def test_all_of_torch_and_ours() -> None:
    names = optimx.list_optimizers()
    torchs = [n for n in torch.optim.__all__ if isinstance(getattr(torch.optim, n), type) and n != "Optimizer"]
    assert set(names) >= {name.lower() for name in torchs} | {case.name for case in CASES}
    assert names == sorted(names)
    for name in torchs:
        assert OPTIMIZERS.get(name) is getattr(optimx, name)
    for name in torch.optim.lr_scheduler.__all__:
        if name != "LRScheduler":
            assert SCHEDULERS.get(name) is getattr(optimx.lr_scheduler, name)


@pytest.mark.parametrize("name", ["adamw", "AdamW", "adam_w", "Adam-W"])
def test_case_and_dashes_do_not_count(name: str) -> None:
    assert OPTIMIZERS.get(name) is optimx.AdamW


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("adam*", ["adam", "adamax", "adamw"]), ("AdamW", ["adamw"]), ("*adam", ["adam", "nadam", "radam", "sparseadam"])],
)
def test_globs(pattern: str, names: list[str]) -> None:
    assert optimx.list_optimizers(pattern) == names


def test_scheduler_globs() -> None:
    assert {"CosineAnnealingLR", "CosineAnnealingWarmRestarts"} <= set(optimx.list_schedulers("*cosine*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lionn", r"^optimizer should be a name of optimx.list_optimizers\(\) but is: 'lionn'; did you mean 'lion'\?$"),
        ("no such thing", r"but is: 'no such thing'$"),
        (
            "no.such.module:Class",
            r"should be 'package.module:Class' .*\(ModuleNotFoundError: .* 'no.such.module:Class'$",
        ),
        ("torch.optim:AdamV", r"\(AttributeError: .* but is: 'torch.optim:AdamV'$"),
        ("torch.optim:__name__", r"of a class or function but is: 'torch.optim:__name__'$"),
        (":AdamW", r"\(ValueError: .* but is: ':AdamW'$"),
    ],
)
def test_unknown(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPTIMIZERS.get(name)


def test_importable() -> None:
    assert OPTIMIZERS.get("torch.optim:AdamW") is torch.optim.AdamW
    assert OPTIMIZERS.get("torch.optim:AdamW.step") is torch.optim.AdamW.step


def test_register(registry: Registry) -> None:
    @registry.register("my_adam", "mine")
    class MyAdam(optimx.Adam):
        pass

    assert registry.get("MyAdam") is registry.get("mine") is MyAdam
    assert registry.names() == ["adamw", "mine", "my_adam", "sgd"]
    # a notebook cell that is run again
    again = type("MyAdam", (optimx.Adam,), {"__module__": MyAdam.__module__, "__qualname__": MyAdam.__qualname__})
    registry.register("my_adam")(again)
    assert registry.get("my_adam") is again


@pytest.mark.parametrize(
    ("names", "thing", "error", "message"),
    [
        (("adamw",), optimx.SGD, ValueError, "'adamw' should be a new name but is: <class 'optimx.adamw.AdamW'>"),
        (("new", "Adam-W"), optimx.SGD, ValueError, "should be a new name"),
        (("",), optimx.SGD, ValueError, "a letter"),
        (("a:b",), optimx.SGD, ValueError, "no ':' but is: 'a:b'"),
        ((3,), optimx.SGD, TypeError, "should be a string but is: 3"),
        (("three",), 3, TypeError, "'three' should be a class or function but is: 3"),
    ],
    ids=["taken", "alias_taken", "empty", "colon", "no_string", "no_callable"],
)
def test_register_refuses(registry: Registry, names: tuple, thing: object, error: type, message: str) -> None:
    before = registry.names()
    with pytest.raises(error, match=message):
        registry.register(*names)(thing)  # type: ignore[type-var]
    assert registry.names() == before


@pytest.mark.usefixtures("plugin")
def test_installed_plugins_are_found() -> None:
    assert "plugin_sgd" in optimx.list_optimizers()
    assert "plugin_schedule" in optimx.list_schedulers("plugin*")
    # listing names imports no plugin
    assert "optimx_plugin" not in sys.modules
    optimizer = OPTIMIZERS.get("Plugin-SGD")([Parameter(torch.ones(2))], lr=0.1)
    assert isinstance(optimizer, torch.optim.SGD)
    assert type(optimizer).__module__ == "optimx_plugin"


@pytest.mark.usefixtures("plugin")
def test_configs_can_name_a_plugin() -> None:
    cfg = {"optimizer": {"name": "plugin_sgd", "lr": 1.0}, "schedule": {"name": "plugin_schedule", "half_life": 2}}
    optimizer, scheduler = optimx.build(torch.nn.Linear(2, 2), cfg)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25]
    with pytest.raises(optimx.ConfigError, match=r"schedule.half_lif .* did you mean 'half_life'\?"):
        optimx.build(torch.nn.Linear(2, 2), {"schedule": {"name": "plugin_schedule", "half_lif": 2, "half_life": 1}})


def test_configs_can_name_what_a_program_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule that is a class, and a function that makes one."""
    for field in ("_names", "_things"):
        monkeypatch.setattr(SCHEDULERS, field, dict(getattr(SCHEDULERS, field)))

    @optimx.register_scheduler("halving")
    @dataclasses.dataclass(frozen=True)
    class Halving(Schedule):
        steps: int
        every: int = 1

        def at(self, step: float, peak: float, base: float, lead: int = 0, tail: int = 0) -> float:
            return peak * 0.5 ** (min(step, self.steps) // self.every)

    @optimx.register_scheduler("halving_twice")
    def halving_twice(steps: int) -> Schedule:
        return Halving(steps, every=steps // 2)

    for name, more, expected in (("halving", {"every": 2}, [1, 1, 0.5, 0.5, 0.25]), ("halving_twice", {}, [1, 1, 0.5])):
        cfg = {"optimizer": {"lr": 1.0}, "schedule": {"name": name, "total": 4, **more}}
        scheduler = optimx.build(torch.nn.Linear(1, 1, bias=False), cfg).scheduler
        assert [rates[0] for rates in scheduler.preview(len(expected))] == expected


@pytest.mark.usefixtures("plugin")
def test_a_plugin_does_not_replace_a_name() -> None:
    """It has an entry point ``adamw`` too."""
    assert OPTIMIZERS.get("adamw") is optimx.AdamW


@pytest.mark.usefixtures("plugin")
def test_a_plugin_that_does_not_import() -> None:
    with pytest.raises(ValueError, match=r"\(AttributeError: .* but is: 'optimx_plugin:Missing'"):
        OPTIMIZERS.get("plugin_broken")


@pytest.mark.usefixtures("plugin")
def test_a_plugin_may_register_itself_too() -> None:
    """Decorated, and offered by an entry point of the same name."""
    plugin = importlib.import_module("optimx_plugin")
    assert OPTIMIZERS.get("plugin_sgd") is plugin.PluginSGD
