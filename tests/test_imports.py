"""Which file may import or ask what.

Imports are a ladder: a module imports from its own floor, without a circle, or from lower ones. All imports
count: those inside functions, and those for type checkers. ``pytest -s`` prints the ladder.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

from tests.cases import CASES, Case

ROOT = Path(__file__).parents[1]
OPTIMX = sorted((ROOT / "optimx").rglob("*.py"))
KERNELS = "optimx.triton_kernels"

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

#: From below. A name stands for its module, and for all modules of a package that no other floor names.
FLOORS = [
    [KERNELS],
    ["optimx._checks", "optimx._compat", "optimx._table", "optimx.lr_rules", "optimx._torch_names", "optimx.swa_utils"],
    [
        f"optimx._engine.{name}"
        for name in (
            "layout", "rule", "backends", "scalars", "watched_step", "newton_schulz", "matrices", "storage", "sharding",
            "exchange", "rounds", "twins", "guards", "averages", "optimizer", "grad_transforms", "flags",
        )
    ],
    ["optimx._engine.bucket", "optimx._engine.cpu", "optimx._engine.triton"],
    [
        f"optimx._engine.{name}"
        for name in (
            "offload", "placement", "recode", "states", "plan", "grad_norm", "bad_gradients", "fallback", "recorder",
            "averager",
        )
    ],
    ["optimx._engine", "optimx._engine.engine", "optimx._engine.parts", "optimx._engine.step"],
    [
        "optimx._loop", "optimx._schedule_free", "optimx._transformers_checkpoint", "optimx._kept", "optimx._scratch",
        *(case.cls.__module__ for case in CASES), "optimx.muon",
        "optimx.lr_scheduler", "optimx.param_groups", "optimx.clip_grad", "optimx.grad_scaler", "optimx.explain",
        "optimx.composite", "optimx.bad_steps", "optimx.watching", "optimx.sinks", "optimx._preserve",
        "optimx.lr_finder", "optimx._released", "optimx.release", "optimx.offload",
        "optimx.early_stop", "optimx.noise_scale", "optimx.averages",
    ],
    ["optimx.config", "optimx.registry", "optimx.convert", "optimx.presets", "optimx.resolve"],
    ["optimx.build", "optimx.memory", "optimx.measuring", "optimx.search", "optimx", "optimx.cli", "optimx.__main__"],
]  # fmt: skip


@cache
def modules() -> dict[str, Path]:
    """Names and files."""
    found = {}
    for folder, name in ((ROOT / "optimx", "optimx"), (ROOT / "triton_kernels", KERNELS)):
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            if name == "optimx" and parts[0] == "triton_kernels":
                continue
            found[".".join([name, *(part for part in parts if part != "__init__")])] = file
    return found


@cache
def names_imported(module: str) -> list[str]:
    """Full names of what a module imports, whether modules or names in them."""
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def imported(module: str) -> set[str]:
    """Our modules among what a module imports."""
    found = set()
    for name in names_imported(module):
        while name and name not in modules():
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", module}


def floor_of(module: str) -> int:
    """That of the longest name that it begins with."""
    named = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    name = module
    while name not in named:
        name = name.rpartition(".")[0]
        assert name != "optimx", f"{module} should be on a floor of this test"
    return named[name]


def test_no_import_leads_up() -> None:
    for floor, names in enumerate(FLOORS):
        print(f"{floor}: {' '.join(name.removeprefix('optimx.') for name in names)}")
    up = [
        f"{module} imports {other}"
        for module in modules() for other in sorted(imported(module))
        if floor_of(other) > floor_of(module)
    ]  # fmt: skip
    assert not up
    assert len(FLOORS) <= 9


def test_no_circle() -> None:
    waiting = {module: imported(module) for module in modules()}
    while waiting:
        free = [module for module, needs in waiting.items() if needs.isdisjoint(waiting)]
        assert free, f"a circle among {sorted(waiting)}"
        for module in free:
            del waiting[module]


def test_kernels_need_torch_and_triton_alone() -> None:
    needed = chain.from_iterable(names_imported(module) for module in modules() if module.startswith(KERNELS))
    roots = {name.partition(".")[0] if not name.startswith(KERNELS) else KERNELS for name in needed}
    assert roots - set(sys.stdlib_module_names) == {"torch", "triton", KERNELS}


@pytest.mark.parametrize("name", ["optimx._engine", "optimx._engine.bucket", "optimx.triton_kernels.device"])
def test_the_ladder_is_of_modules_that_exist(name: str) -> None:
    assert {*chain.from_iterable(FLOORS)} <= modules().keys()
    assert name in modules()


# single files


def file_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


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


def test_tensor_table_needs_no_triton() -> None:
    names = {name for _, name in imports(parse(ROOT / "triton_kernels" / "tensor_table.py"))}
    assert not any(name.startswith("triton") for name in names)


#: Python 3.10 has no tomllib.
EXTRAS = {
    "optimx/_engine/backends.py": ("triton",),
    "optimx/config/files.py": ("tomli", "tomllib", "yaml"),
    "optimx/config/loading.py": ("omegaconf",),
    "optimx/lr_scheduler/_plot.py": ("matplotlib",),
    "optimx/sinks.py": ("rich",),
    "optimx/watching/_plot.py": ("matplotlib",),
}


@pytest.mark.parametrize("path", OPTIMX, ids=file_id)
def test_optimx_imports_torch_only(path: Path) -> None:
    """The one run-time dependency; what else there is, one file imports, in the function that needs it."""
    tree = parse(path)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    within = {id(node) for function in functions for node in ast.walk(function)}
    for node, name in imports(tree):
        top = name.split(".")[0]
        allowed = ("", "torch", *(EXTRAS.get(file_id(path), ()) if id(node) in within else ()))
        assert top in allowed or top in sys.stdlib_module_names, name


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
    wrong = [name for name in at_the_top if "triton_kernels" in name or name.startswith(".triton")]
    assert wrong == [] or path.parent.name == "triton"


@pytest.mark.parametrize("path", OPTIMX, ids=file_id)
def test_only_compat_touches_private_names_of_torch(path: Path) -> None:
    # one is written as people write optimizers, for comparison
    if path.name in ("_compat.py", "foreach.py"):
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
    # one looks for other packages' optimizers
    if path.name in ("backends.py", "packages.py"):
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


@each_case
def test_algorithms_know_the_engine_only(case: Case) -> None:
    """And the algorithm they are a variant of."""
    path = ROOT / "optimx" / f"{case.name}.py"
    bases = {cls.__module__.split(".")[-1] for cls in case.cls.__mro__ if cls.__module__.startswith("optimx.")}
    names = {name.lstrip(".").split(".")[0] for _, name in imports(parse(path)) if name.startswith(".")} - {""}
    assert {name for name in names if not name.startswith("_")} <= bases | {"triton_kernels"}


@each_case
def test_files_of_an_algorithm(case: Case) -> None:
    """A newcomer guesses the path."""
    assert inspect.getfile(case.cls) == str(ROOT / "optimx" / f"{case.name}.py")
    assert (ROOT / "triton_kernels" / f"{case.cls.rule.module}.py").is_file()
    reference = getattr(case.reference, "func", case.reference)
    assert reference.__module__ == f"tests.reference.{case.cls.rule.module}"
