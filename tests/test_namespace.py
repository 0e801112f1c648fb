"""``import optimx as optim`` has all of ``torch.optim``; and which file may import or ask what."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

import optimx
from tests.cases import CASES, Case

ROOT = Path(__file__).parent.parent
OPTIMX = sorted((ROOT / "optimx").rglob("*.py"))
KERNELS = sorted((ROOT / "triton_kernels").rglob("*.py"))

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_module = pytest.mark.parametrize("name", ["", ".lr_scheduler", ".swa_utils"])


def file_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


# names


@each_module
def test_every_public_name_of_torch(name: str) -> None:
    ours, torchs = (importlib.import_module(package + name) for package in ("optimx", "torch.optim"))
    assert [n for n in torchs.__all__ if not hasattr(ours, n)] == []
    assert set(torchs.__all__) <= set(ours.__all__)


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
    replaced = {case.stock.__name__ for case in CASES}
    for name in torch.optim.__all__:
        ours, torchs = getattr(optimx, name), getattr(torch.optim, name)
        if inspect.ismodule(ours):
            continue
        if name in replaced:
            assert ours is not torchs, name
            assert issubclass(ours, torchs), name
        else:
            assert ours is torchs, name


def test_modules_as_in_torch() -> None:
    """``optim.lr_scheduler.StepLR`` is how everybody writes it; and a class is not hidden by its file."""
    assert issubclass(optimx.lr_scheduler.StepLR, torch.optim.lr_scheduler.StepLR)
    assert optimx.swa_utils.AveragedModel is torch.optim.swa_utils.AveragedModel
    assert inspect.isclass(optimx.AdamW)
    assert inspect.isfunction(optimx.explain)
    assert optimx.Optimizer is torch.optim.Optimizer


def test_version() -> None:
    assert optimx.__version__.count(".") == 2


# classes


def test_relations() -> None:
    ours = optimx.AdamW([Parameter(torch.ones(2))])
    for cls in (optimx.AdamW, optimx.Adam, torch.optim.AdamW, torch.optim.Adam, torch.optim.Optimizer):
        assert isinstance(ours, cls)
    assert not issubclass(optimx.Adam, torch.optim.AdamW)
    assert not isinstance(torch.optim.AdamW([Parameter(torch.ones(2))]), optimx.Adam)


@each_case
def test_signature(case: Case) -> None:
    ours = [*inspect.signature(case.cls).parameters.values()]
    torchs = [*inspect.signature(case.stock).parameters.values()]
    assert [(p.name, p.kind, p.default) for p in ours[: len(torchs)]] == [(p.name, p.kind, p.default) for p in torchs]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in ours[len(torchs) :])
    assert [p.name for p in ours[len(torchs) :]] == ["max_grad_norm"]


@each_case
def test_methods_have_torchs_signatures(case: Case) -> None:
    for name, method in inspect.getmembers(case.stock, inspect.isfunction):
        if not name.startswith("_") and name != "step":
            ours = inspect.signature(getattr(case.cls, name)).parameters
            assert [*ours] == [*inspect.signature(method).parameters], name
    assert [*inspect.signature(case.cls.step).parameters] == ["self", "closure"]


@each_case
def test_defaults_and_repr(case: Case) -> None:
    ours, stock = (cls([Parameter(torch.ones(2))], lr=0.5) for cls in (case.cls, case.stock))
    assert ours.defaults == stock.defaults
    assert list(ours.param_groups[0]) == list(stock.param_groups[0])
    assert repr(ours) == repr(stock)
    assert "    lr: 0.5\n" in repr(ours)


@each_case
def test_documented(case: Case) -> None:
    assert case.cls.__name__ == case.stock.__name__
    assert case.cls.__module__.split(".")[0] == "optimx"
    assert "max_grad_norm" in (inspect.getdoc(case.cls) or "")


# what an import loads


def loaded_by(code: str) -> set[str]:
    """The modules of a fresh interpreter after ``code``, and ``cuda`` if it initialised that."""
    code += "\nimport sys, torch\nprint(*sys.modules, *(['cuda'] if torch.cuda.is_initialized() else []))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return set(output.split())


def test_import_is_light() -> None:
    more = loaded_by("import optimx") - loaded_by("import torch, torch.optim, torch.amp")
    heavy = {"triton", "torch._dynamo", "torch._inductor", "numpy", "yaml", "cuda"}
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
        optim.AdamW([p]).step()
    """
    ours, torchs = (loaded_by(inspect.cleandoc(code).format(package=name)) for name in ("optimx", "torch.optim"))
    more = ours - torchs
    assert "optimx._native" in more
    assert not any(name.startswith(("triton", "optimx.triton_kernels", "optimx._triton", "cuda")) for name in more)


# who may import what


def imports(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Every imported module, as it is written: ``torch.optim``, ``.device``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node, module if node.module else module + alias.name) for alias in node.names[:1])
            if not node.module:
                yield from ((node, module + alias.name) for alias in node.names[1:])


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@pytest.mark.parametrize("path", KERNELS, ids=file_id)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    for _, name in imports(parse(path)):
        top = name.split(".")[0]
        own = name.startswith(".") and not name.startswith("..")
        assert own or top in ("torch", "triton") or top in sys.stdlib_module_names, name


def test_tensor_table_needs_no_triton() -> None:
    names = {name for _, name in imports(parse(ROOT / "triton_kernels" / "tensor_table.py"))}
    assert not any(name.startswith("triton") for name in names)


@pytest.mark.parametrize("path", OPTIMX, ids=file_id)
def test_optimx_imports_torch_only(path: Path) -> None:
    """The one run-time dependency."""
    for _, name in imports(parse(path)):
        top = name.split(".")[0]
        assert top in ("", "torch") or top in sys.stdlib_module_names, name


@pytest.mark.parametrize("path", OPTIMX, ids=file_id)
def test_kernels_are_imported_inside_functions(path: Path) -> None:
    """At the top only in the file that is itself imported inside one; type checkers may look anywhere."""
    tree = parse(path)
    allowed = set()
    for node in ast.walk(tree):
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if typing_only or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            allowed |= {id(inner) for inner in ast.walk(node)}
    at_the_top = [name for node, name in imports(tree) if id(node) not in allowed]
    wrong = [name for name in at_the_top if "triton_kernels" in name or name == "._triton"]
    assert wrong == [] or path.name == "_triton.py"


def own_modules() -> set[str]:
    return {path.stem for path in OPTIMX}


@pytest.mark.parametrize("path", OPTIMX, ids=file_id)
def test_only_compat_touches_private_names_of_torch(path: Path) -> None:
    if path.name == "_compat.py":
        return
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "torch":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            assert not any(name.startswith("_") for name in names), ast.unparse(node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert "._" not in alias.name, ast.unparse(node)
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            root = ast.unparse(node).split(".")[0]
            assert root not in ("torch", "Tensor", "Optimizer", "tensor", "param", "grad"), ast.unparse(node)


QUESTIONS = ("TRITON_INTERPRET", "get_device_capability", "find_spec", "torch.version.hip")


@pytest.mark.parametrize("path", OPTIMX, ids=file_id)
def test_only_backend_asks_for_the_backend(path: Path) -> None:
    if path.name == "_backend.py":
        return
    for node in ast.walk(parse(path)):
        # docstrings may name them
        if isinstance(node, ast.Attribute):
            assert not any(ast.unparse(node).endswith(question) for question in QUESTIONS), ast.unparse(node)
        if isinstance(node, ast.Call):
            assert not any(
                isinstance(argument, ast.Constant) and argument.value in QUESTIONS for argument in node.args
            ), ast.unparse(node)
    assert not any(name.split(".")[0] == "triton" for _, name in imports(parse(path)))


@pytest.mark.parametrize("path", OPTIMX, ids=file_id)
def test_engine_does_not_know_algorithms(path: Path) -> None:
    """``adamw.py`` imports ``_step``, never the other way round; only ``__init__`` imports ``build``."""
    names = {name.lstrip(".").split(".")[0] for _, name in imports(parse(path)) if name.startswith(".")}
    if path.stem.startswith("_") and path.stem != "__init__":
        public = {module for module in own_modules() if not module.startswith("_")}
        assert names & public == set()
    if path.stem != "__init__":
        assert "build" not in names
