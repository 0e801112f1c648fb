"""A new optimizer is seven files, as CONTRIBUTING.md says: all else comes from its rule and its row.

A copy of the project gets Signum, and the tests of the copy take it up. ``pytest -s`` prints what was touched.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# the copy's tests would be skipped, and nothing held
for package in ("triton", "mkdocstrings_handlers.python", "sklearn", "matplotlib"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[1]
COPIED = ("optimx", "triton_kernels", "tests", "bench", "docs")

NEW = {
    "optimx/signum.py": '''\
"""Signum (https://arxiv.org/abs/1802.04434), signSGD with momentum."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._engine.rule import UpdateRule
from ._engine.step import MultiTensorStep
from ._engine.storage import StateDtype
from ._loop import FormulaLoop, check_at_least_zero

__all__ = ["Signum"]


class SignumRow(NamedTuple):
    """A tensor's hyperparameters in one step: the columns of the kernel's ``HYPER``."""

    factor: float
    decay: float
    momentum_c: float
    lr: float


class SignumRule(UpdateRule):
    """One step of Signum."""

    module = "signum"
    scalars = ()

    def values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return group["lr"], group["momentum"], group["weight_decay"], float(group["maximize"])

    def state_names(self, variant: tuple[bool, ...]) -> tuple[str, ...]:
        return ("momentum_buffer",)

    def prepare(self, values, scalars):
        lr, momentum, weight_decay, maximize = values
        return SignumRow(-1.0 if maximize else 1.0, 1.0 - lr * weight_decay, 1.0 - momentum, lr), ()

    def formula(self, variant, row, p, g, states, scratch):
        _, decay, momentum_c, lr = row
        states[0].lerp_(g, momentum_c)
        p.mul_(decay).add_(torch.sign(states[0], out=scratch[0]), alpha=-lr)


class SignumLoop(FormulaLoop):
    """The plain loop that :class:`Signum` falls back to."""

    rule: ClassVar[UpdateRule] = SignumRule()


class Signum(MultiTensorStep, SignumLoop):
    """Signum: the sign of the momentum, with decoupled weight decay. Torch has no class of this name.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate, a number or a tensor of one element (default: 1e-4).
        momentum: Of the average of gradients (default: 0.9).
        weight_decay: Decoupled weight decay (default: 0).
        maximize: Ascend (default: False).
        capturable: The step may be recorded in a CUDA graph (default: False).
        max_grad_norm: Clip the gradients of all groups to this 2-norm inside the step (default: None, no clipping).
        skip_nonfinite: Skip steps with infinite or NaN gradients (default: False).
        skip_spikes: Skip steps whose gradient norm is far above those before (default: None).
        max_skips: Raise RuntimeError after so many skipped steps in a row (default: None).
        average: Average the parameters in the step (default: None).
        norm_group: A process group with other parts of the parameters (default: None).
        param_rounding: How a 16-bit parameter is kept (default: "nearest").
        state_dtype: How states are kept (default: None: as the parameter).
        rounding_seed: Of random bits (default: 0).

    Raises:
        ValueError: A hyperparameter is out of range.
        RuntimeError: A gradient is sparse, or a parameter complex.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.9,
        maximize: bool = False,
        capturable: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        skip_spikes: Any = None,
        max_skips: int | None = None,
        average: Any = None,
        norm_group: Any = None,
        param_rounding: str = "nearest",
        state_dtype: StateDtype = None,
        rounding_seed: int = 0,
    ) -> None:
        check_at_least_zero(lr=lr, momentum=momentum, weight_decay=weight_decay)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(
            params, defaults, max_grad_norm=max_grad_norm, capturable=capturable, norm_group=norm_group,
            skip_nonfinite=skip_nonfinite, skip_spikes=skip_spikes, max_skips=max_skips, average=average,
            param_rounding=param_rounding, state_dtype=state_dtype, rounding_seed=rounding_seed,
        )  # fmt: skip
''',
    "triton_kernels/signum.py": '''\
"""Signum.

Bytes a parameter, float32: param 4+4, grad 4, momentum_buffer 4+4 = 20.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import gradient_factor, lerp, save, sign

RAW = ("lr", "momentum", "weight_decay", "maximize")
HYPER = ("factor", "decay", "momentum_c", "lr")


@triton.jit
def prepare(raw, scalars):
    lr, momentum, weight_decay, maximize = raw
    return (gradient_factor(maximize), 1.0 - lr * weight_decay, 1.0 - momentum, lr), scalars


@triton.jit
def update(p, g, states, hyper, VARIANT: tl.constexpr, out):
    """States: momentum_buffer."""
    decay, momentum_c, lr = hyper
    buffer = lerp(states[0], g, momentum_c)
    save(out, 0, buffer)
    return p * decay - lr * sign(buffer)
''',
    "tests/reference/signum.py": '''\
"""Signum, on lists of float64 numbers: https://arxiv.org/abs/1802.04434, algorithm 2. sign(0) is 0."""

from __future__ import annotations

from collections.abc import Sequence


def signum(
    theta: Sequence[float],
    gradients: Sequence[Sequence[float]],
    *,
    lr: float = 1e-4,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> list[float]:
    """Parameters after ``len(gradients)`` steps."""
    result = list(theta)
    for i in range(len(result)):
        m = 0.0
        for gradient in gradients:
            m = momentum * m + (1 - momentum) * (-gradient[i] if maximize else gradient[i])
            result[i] -= lr * ((m > 0) - (m < 0) + weight_decay * result[i])
    return result
''',
    "docs/optimizers/signum.md": """\
# Signum

Signum is signSGD with momentum.

<!-- paper Signum -->

## Cost

<!-- cost Signum -->

## Reference

::: optimx.Signum
""",
}
ROW = """\
    Case(
        optimx.Signum,
        SignumLoop,
        signum,
        {**_DECAY, "momentum": {"lr": 0.01, "momentum": 0.5}},
        {"lr": 0.05, "momentum": 0.8},
        takes_complex=False,
    ),
"""
#: Lines, each with the beginning of the line that it follows.
ADDED = {
    "tests/cases.py": [
        ("from optimx.lion import ", "from optimx.signum import SignumLoop\n"),
        ("from tests.reference.sgd import ", "from tests.reference.signum import signum\n"),
        ("CASES = [", ROW),
    ],
    "optimx/__init__.py": [
        ("from .sgd import ", "from .signum import Signum\n"),
        ('        "MultiTensorStep",', '        "Signum",\n'),
    ],
    "CHANGELOG.md": [("### ", "- `optimx.Signum`.\n")],
}

#: Tests that hold the whole catalogue at once, and would ask for another file.
OF_ALL = (
    "test_every_optimizer_has_a_page",
    "test_every_page_is_in_the_navigation",
    "test_every_public_class_and_function_is_somewhere",
    "test_every_optimizer_has_cases",
    "test_every_optimizer_takes_part",
    "test_cases_are_consistent",
    "test_no_import_leads_up",
    "test_optimizers_that_torch_lacks",
    "test_names_are_sorted_and_exist",
    "test_every_algorithm_is_listed",
)
#: Files and a selection of their tests, and what is in the environment.
RUNS = {
    "native": (
        ["contract", "parity", "kernels", "namespace", "imports", "docs", "bench", "convergence", "audit"],
        # one architecture is enough
        " or ".join(["signum and (sm_90 or not audit)", *OF_ALL]),
        {},
    ),
    "interpreted": (["parity", "kernels"], "signum", {"TRITON_INTERPRET": "1"}),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The copy, with the optimizer."""
    copy = tmp_path_factory.mktemp("project")
    ignored = shutil.ignore_patterns("__pycache__", "build", "results")
    for folder in COPIED:
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored, symlinks=True)
    for name in ("pyproject.toml", "mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy)
    if not (copy / "optimx" / "triton_kernels").exists():
        (copy / "optimx" / "triton_kernels").symlink_to("../triton_kernels")
    for name, text in NEW.items():
        assert not (copy / name).exists()
        (copy / name).write_text(text)
    for name, lines in ADDED.items():
        for beginning, new in lines:
            add_line(copy / name, beginning, new)
    return copy


def add_line(path: Path, beginning: str, new: str) -> None:
    """Add lines after the first one that begins so."""
    lines = path.read_text().splitlines(keepends=True)
    index = next(i for i, line in enumerate(lines) if line.startswith(beginning))
    path.write_text("".join([*lines[: index + 1], new, *lines[index + 1 :]]))


def test_contributing_names_these_files() -> None:
    touched = {name: text.count("\n") for name, text in NEW.items()}
    touched |= {name: sum(new.count("\n") for _, new in lines) for name, lines in ADDED.items()}
    for name, count in touched.items():
        print(f"{name}: {count} lines")
    in_place = sum(touched[name] for name in ADDED)
    print(f"{len(touched)} files, {sum(touched.values())} lines, {in_place} of them in files that were there")
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding an optimizer\n")[2].partition("\n## ")[0]
    listed = section.partition("An algorithm that needs")[0]
    named = re.findall(r"^\d\. `([^`]+)`", listed, re.MULTILINE)
    assert sorted(name.replace("NAME", "signum") for name in named) == sorted(touched)


@pytest.mark.parametrize(("files", "selection", "environment"), RUNS.values(), ids=RUNS)
def test_the_copys_tests_take_it_up(
    project: Path, files: list[str], selection: str, environment: dict[str, str]
) -> None:
    paths = [f"tests/{name}" if name == "audit" else f"tests/test_{name}.py" for name in files]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INT"))}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "not gpu", "-k", selection, *paths]
    run = subprocess.run(
        command, cwd=project, env={**inherited, **environment}, capture_output=True, text=True, timeout=240
    )
    print(run.stdout.splitlines()[-1])
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = {*re.findall(r"::(test_\w+)(?:\[\S*\])? PASSED", run.stdout)}
    assert passed >= {name for name in OF_ALL if name in selection}
    assert "signum" in run.stdout
