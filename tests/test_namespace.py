"""``import optimx as optim`` has all of ``torch.optim``; and which file may import or ask what."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

import optimx
from optimx._engine.flags import FLAGS
from optimx._engine.storage import SETTINGS
from tests.cases import CASES, Case

ROOT = Path(__file__).parent.parent
OPTIMX = sorted((ROOT / "optimx").rglob("*.py"))
KERNELS = sorted((ROOT / "triton_kernels").rglob("*.py"))

TORCHS = [case for case in CASES if case.is_torchs]
OWN = [case for case in CASES if not case.is_torchs]

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_of_torchs = pytest.mark.parametrize("case", TORCHS, ids=lambda case: case.name)
each_of_our_own = pytest.mark.parametrize("case", OWN, ids=lambda case: case.name)
each_module = pytest.mark.parametrize("name", ["", ".lr_scheduler", ".param_groups", ".swa_utils"])
each_of_torchs_modules = pytest.mark.parametrize("name", ["", ".lr_scheduler", ".swa_utils"])


def file_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


# names


@each_of_torchs_modules
def test_every_public_name_of_torch(name: str) -> None:
    ours, torchs = (importlib.import_module(package + name) for package in ("optimx", "torch.optim"))
    assert [n for n in torchs.__all__ if not hasattr(ours, n)] == []
    assert set(torchs.__all__) <= set(ours.__all__)


def test_schedulers_names_that_torch_does_not_export() -> None:
    """Other projects import some of them: ``_LRScheduler`` for isinstance, ``_enable_get_lr_call`` for a subclass."""
    torchs, ours = torch.optim.lr_scheduler, optimx.lr_scheduler
    names = [name for name in dir(torchs) if not name.startswith("__")]
    assert {"_LRScheduler", "EPOCH_DEPRECATION_WARNING", "_enable_get_lr_call"} <= {*names}
    assert [name for name in names if getattr(ours, name, None) is not getattr(torchs, name)] == []
    assert not {"_LRScheduler", "EPOCH_DEPRECATION_WARNING"} & {*dir(ours), *ours.__all__}
    with pytest.raises(AttributeError, match=r"module 'optimx\.lr_scheduler' has no attribute 'LRSchedulr'"):
        _ = ours.LRSchedulr


def test_modules_are_ours() -> None:
    """In a process of its own: whoever imports ``optimx.lr_scheduler`` puts it right for everybody."""
    names = ["lr_scheduler", "swa_utils", "param_groups"]
    code = f"import optimx; print(*(getattr(optimx, name).__name__ for name in {names}))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.split() == [f"optimx.{name}" for name in names]


@each_module
def test_names_are_sorted_and_exist(name: str) -> None:
    module = importlib.import_module("optimx" + name)
    assert list(module.__all__) == sorted(set(module.__all__))
    assert [n for n in module.__all__ if not hasattr(module, n)] == []
    namespace: dict[str, object] = {}
    exec(f"from optimx{name} import *", namespace)
    assert set(module.__all__) <= namespace.keys()


@each_module
def test_no_public_name_is_left_out(name: str) -> None:
    """What a module defines or imports for its users is listed; modules of one algorithm are not."""
    module = importlib.import_module("optimx" + name)
    public = {
        n
        for n, value in vars(module).items()
        if not n.startswith("_") and not inspect.ismodule(value) and n not in ("annotations",)
    }
    assert public <= set(module.__all__)


def test_torchs_names_are_torchs_objects_or_subclasses() -> None:
    # which takes no vectors, and is in no table of them
    replaced = {case.stock.__name__ for case in TORCHS} | {"Muon"}
    for name in torch.optim.__all__:
        ours, torchs = getattr(optimx, name), getattr(torch.optim, name)
        if inspect.ismodule(ours):
            continue
        if name in replaced:
            assert ours is not torchs, name
            assert issubclass(ours, torchs), name
        else:
            assert ours is torchs, name


def test_optimizers_that_torch_lacks() -> None:
    """When torch gets a class of that name, ours has to become its drop-in."""
    assert OWN
    for case in OWN:
        name = case.cls.__name__
        assert name in optimx.__all__
        assert getattr(optimx, name) is case.cls
        assert not hasattr(torch.optim, name)
        assert issubclass(case.cls, torch.optim.Optimizer)


def test_modules_as_in_torch() -> None:
    """``optim.lr_scheduler.StepLR`` is how everybody writes it; and a class is not hidden by its file."""
    assert issubclass(optimx.lr_scheduler.StepLR, torch.optim.lr_scheduler.StepLR)
    assert optimx.swa_utils.AveragedModel is torch.optim.swa_utils.AveragedModel
    assert all(inspect.isclass(getattr(optimx, case.cls.__name__)) for case in CASES)
    assert inspect.isfunction(optimx.explain)
    assert inspect.isfunction(optimx.build)
    assert inspect.isfunction(optimx.param_groups.param_groups)
    assert optimx.Optimizer is torch.optim.Optimizer


def test_version() -> None:
    assert optimx.__version__.count(".") == 2


# classes


@each_of_torchs
def test_relations(case: Case) -> None:
    ours = case.cls([Parameter(torch.ones(2))])
    assert isinstance(ours, case.stock)
    assert not isinstance(case.stock([Parameter(torch.ones(2))]), case.cls)
    # no other class of torch's than the one replaced and those it inherits from
    strangers = [other.stock for other in TORCHS if not issubclass(case.stock, other.stock)]
    assert not issubclass(case.cls, tuple(strangers))


def test_adamw_is_an_adam() -> None:
    ours = optimx.AdamW([Parameter(torch.ones(2))])
    assert all(isinstance(ours, cls) for cls in (optimx.Adam, torch.optim.AdamW, torch.optim.Adam))
    assert not issubclass(optimx.Adam, torch.optim.AdamW)


#: Beyond torch's arguments; ``capturable`` where torch's class has none.
WHOLE = ["max_grad_norm", "skip_nonfinite", "skip_spikes", "max_skips", "average", "norm_group"]
EXTRA = {case.name: WHOLE for case in TORCHS}
EXTRA["sgd"] = EXTRA["adagrad"] = [*WHOLE, "capturable"]
# what makes it transformers' has tests of its own
EXTRA["adafactor"] = [
    "variant", "beta1", "scale_parameter", "relative_step", "warmup_init", "clip_threshold", "decay_rate",
    "state_dtype", "capturable", *WHOLE,
]  # fmt: skip


#: Of torch's, those that have adaptive gradient clipping as an argument.
WITH_AGC = {"adam", "adamw", "nadam", "rmsprop", "sgd"}


@each_of_torchs
def test_signature(case: Case) -> None:
    ours = [*inspect.signature(case.cls).parameters.values()]
    torchs = [*inspect.signature(case.stock).parameters.values()]
    assert [(p.name, p.kind, p.default) for p in ours[: len(torchs)]] == [(p.name, p.kind, p.default) for p in torchs]
    extra = ours[len(torchs) :]
    assert all(p.kind is p.KEYWORD_ONLY for p in extra)
    values = {"capturable": False, "variant": "torch", "scale_parameter": True, "warmup_init": False}
    values["skip_nonfinite"] = False
    flags = dict.fromkeys((*case.cls.rule.flags, "centralize_grads") if case.cls.rule.flags else (), False)
    flags.update({"agc": None} if case.name in WITH_AGC else {})
    others = {name: values.get(name) for name in EXTRA[case.name]}
    assert {p.name: p.default for p in extra} == {**others, **SETTINGS, **flags}


@each_of_our_own
def test_signature_of_our_own(case: Case) -> None:
    """The arguments that torch's classes have too come in torch's order; what else there is, by keyword only."""
    parameters = inspect.signature(case.cls).parameters
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    like: type = torch.optim.SGD if "momentum" in parameters else torch.optim.AdamW
    torchs = [name for name in inspect.signature(like).parameters if name in positional]
    assert positional == torchs
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values() if p.name not in positional)
    others = [name for name in parameters if name not in FLAGS]
    assert others[-len(WHOLE) - 4 :] == ["capturable", *WHOLE, *SETTINGS]
    assert all(p.default is not p.empty for p in parameters.values() if p.name != "params")


@each_case
def test_annotated(case: Case) -> None:
    signature = inspect.signature(case.cls.__init__)
    named = [p for p in signature.parameters.values() if p.name != "self"]
    assert [p.name for p in named if p.annotation is p.empty] == []
    assert signature.return_annotation in (None, "None")
    assert inspect.signature(case.cls.step).return_annotation is not inspect.Signature.empty


@each_case
def test_methods_have_torchs_signatures(case: Case) -> None:
    stock = case.stock if case.is_torchs else torch.optim.Optimizer
    for name, method in inspect.getmembers(stock, inspect.isfunction):
        if not name.startswith("_") and name != "step":
            ours = inspect.signature(getattr(case.cls, name)).parameters
            added = [p.name for p in ours.values() if p.kind is p.KEYWORD_ONLY]
            assert [*ours] == [*inspect.signature(method).parameters, *added], name
    assert [*inspect.signature(case.cls.step).parameters] == ["self", "closure"]


@each_of_torchs
def test_defaults_and_repr(case: Case) -> None:
    ours, stock = (cls([Parameter(torch.ones(2))], lr=0.5) for cls in (case.cls, case.stock))
    assert ours.defaults == stock.defaults
    assert list(ours.param_groups[0]) == list(stock.param_groups[0])
    assert repr(ours) == repr(stock)
    assert "    lr: 0.5\n" in repr(ours)


@each_of_our_own
def test_defaults_and_repr_of_our_own(case: Case) -> None:
    """Settings of the whole optimizer are on the optimizer, all others in its groups."""
    ours = case.cls([Parameter(torch.ones(2))], lr=0.5)
    whole = {"params", "capturable", "normalize_grads", *WHOLE, *SETTINGS, *FLAGS}
    parameters = inspect.signature(case.cls).parameters
    # what nobody sets, but groups tell
    told = {"train_mode": True} if hasattr(ours, "eval") else {}
    expected = {name: p.default for name, p in parameters.items() if name not in whole}
    assert ours.defaults == {**expected, **told, "lr": 0.5}
    assert list(ours.param_groups[0]) == ["params", *ours.defaults]
    assert repr(ours).startswith(f"{case.cls.__name__} (\nParameter Group 0\n")
    assert "    lr: 0.5\n" in repr(ours)


@each_case
def test_documented(case: Case) -> None:
    """Every argument that torch's page does not tell of."""
    text = inspect.getdoc(case.cls) or ""
    torchs = inspect.signature(case.stock).parameters if case.is_torchs else {}
    missing = [n for n in inspect.signature(case.cls).parameters if n not in torchs and f"{n}: " not in text]
    assert missing == []
    assert "Raises:" in text
    assert case.cls.__module__ == f"optimx.{case.name}"
    if case.is_torchs:
        assert case.cls.__name__ == case.stock.__name__
        assert f":class:`torch.optim.{case.stock.__name__}`" in text
    else:
        assert "Torch has no class of this name" in text


@each_of_our_own
def test_documented_defaults(case: Case) -> None:
    """``(default: 1e-3)`` in the text is what the signature has."""
    text = " ".join((inspect.getdoc(case.cls) or "").split())
    for name, parameter in inspect.signature(case.cls).parameters.items():
        if name == "params":
            continue
        told = re.search(rf"\b{name}: .*?\(default: (\([^)]*\)|[^,:)]*)", text)
        assert told, name
        assert ast.literal_eval(told[1]) == parameter.default, name


# what an import loads


def loaded_by(code: str) -> set[str]:
    """The modules of a fresh interpreter after ``code``, and ``cuda`` if it initialised that."""
    code += "\nimport sys, torch\nprint(*sys.modules, *(['cuda'] if torch.cuda.is_initialized() else []))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return set(output.split())


def test_import_is_light() -> None:
    more = loaded_by("import optimx") - loaded_by("import torch, torch.optim, torch.amp")
    heavy = {"triton", "torch._dynamo", "torch._inductor", "numpy", "yaml", "rich", "matplotlib", "omegaconf", "cuda"}
    assert more & heavy == set()
    assert not any(name.startswith(("triton.", "optimx.triton_kernels", "torch._dynamo")) for name in more)


def test_a_cpu_step_loads_no_kernels() -> None:
    """Beyond what torch loads for a step of its own (its compiler, and triton with that)."""
    code = """
        import os, torch
        os.environ.pop("TRITON_INTERPRET", None)
        import {package} as optim
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        for name in {names}:
            getattr(optim, name)([p], lr=0.1).step()
    """
    names = {"optimx": CASES, "torch.optim": TORCHS}
    ours, torchs = (
        loaded_by(inspect.cleandoc(code).format(package=package, names=[case.cls.__name__ for case in cases]))
        for package, cases in names.items()
    )
    more = ours - torchs
    assert "optimx._engine.cpu.elementwise" in more
    assert not any(
        name.startswith(("triton", "optimx.triton_kernels", "optimx._engine.triton", "cuda")) for name in more
    )
