"""Compiling, for a GPU that need not be here, exactly what a launcher would launch.

The launcher runs, and the ``launch`` helper it calls only takes notes. Each note then goes through Triton's own JIT,
with a driver that names the target: types, constants and alignments are what they would be on that GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any
from unittest.mock import patch

import optimx.triton_kernels as package
import torch
import triton
import triton.language as tl
from optimx.triton_kernels import device
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

REQUIRED = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Those that not every version of Triton compiles for.
OPTIONAL = {"gfx950": GPUTarget("hip", "gfx950", 64)}


@dataclass(frozen=True)
class Launch:
    """A launch that did not take place."""

    launcher: device.Launcher
    args: tuple[Any, ...]

    @property
    def options(self) -> dict[str, Any]:
        """Of the launcher: constexprs, and ``num_warps``; without what is the same for all kernels."""
        return {name: value for name, value in self.launcher.options.items() if name not in device.OPTIONS}


class _AbsentGPU:
    """All that the JIT asks of a driver before a launch."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # the JIT remembers kernels by device
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


def kernel_modules() -> list[ModuleType]:
    """Every module of ``optimx.triton_kernels``."""
    return [import_module(f"{package.__name__}.{module.name}") for module in iter_modules(package.__path__)]


def record(launcher: Callable[[], None]) -> list[Launch]:
    """What ``launcher`` launches."""
    launches: list[Launch] = []

    def launch(launcher: device.Launcher, n_programs: int, *args: Any, warmup: bool = False) -> None:
        launches.append(Launch(launcher, args))

    with ExitStack() as patches:
        for module in kernel_modules():
            if hasattr(module, "launch"):
                patches.enter_context(patch.object(module, "launch", launch))
        launcher()
    return launches


def compile_for(target: GPUTarget, launch: Launch) -> Any:
    """The compiled kernel: ``asm`` holds its assembly, ``metadata`` its shared memory."""
    with _active(_AbsentGPU(target)):
        return launch.launcher.compile(launch.args)


@triton.jit
def _nothing_kernel(x_ptr):
    tl.store(x_ptr, 0.0)


def why_not(target: GPUTarget) -> str | None:
    """Why the compiler compiles nothing for ``target``; None if it does."""
    try:
        compile_for(target, Launch(device.Launcher(_nothing_kernel), (torch.empty(1),)))
    # each backend and version has an error of its own for what it does not know
    except Exception as error:
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return None


@contextmanager
def _active(gpu: _AbsentGPU) -> Iterator[None]:
    driver.set_active(gpu)
    try:
        yield
    finally:
        # None: whoever comes next gets the machine's own driver
        driver.set_active(None)


#: Why each of :data:`OPTIONAL` is left out.
LEFT_OUT = {name: reason for name, target in OPTIONAL.items() if (reason := why_not(target)) is not None}
TARGETS = REQUIRED | {name: target for name, target in OPTIONAL.items() if name not in LEFT_OUT}
