"""Which backend a tensor gets, and why not Triton: the only file that asks.

``triton``: one launch of our kernels for all tensors of a bucket (CUDA and ROCm; a CPU under ``TRITON_INTERPRET``).
``native``: torch's own fused CPU operators, called on the plan's lists. ``torch``: the stock class's step.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch

from .. import _compat

TRITON, NATIVE, TORCH = "triton", "native", "torch"


def interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


#: Raise what goes wrong in a kernel, instead of leaving its tensors to torch's step. The interpreter compiles nothing,
#: so there it is always our mistake.
strict = interpreted()

#: Devices whose memory Triton's interpreter reads.
interpreter_reaches = {"cpu"}

#: Kernel variants that do not compile here, and why.
_given_up: dict[Hashable, str] = {}


@functools.cache
def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


@functools.cache
def _too_old(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and major < 7:
        return f"Triton needs compute capability 7.0, this device has {major}.{minor}"
    return None


def choose(device: torch.device) -> tuple[str, str]:
    """The backend for tensors on ``device``, and the reason where it is not the fastest there could be."""
    if device.type == "cpu" and not (interpreted() and "cpu" in interpreter_reaches):
        return NATIVE, ""
    if device.type not in ("cuda", "cpu"):
        return TORCH, f"no kernels for {device.type} devices"
    reason = _triton_missing()
    if reason is None and interpreted() and device.type not in interpreter_reaches:
        reason = f"TRITON_INTERPRET=1: the interpreter reads no memory of {device.type} devices"
    if reason is None and device.type == "cuda":
        reason = _too_old(torch.cuda.current_device() if device.index is None else device.index)
    return (TORCH, reason) if reason else (TRITON, "")


def multiprocessors(device: torch.device) -> int:
    """How many there are that products of matrices by Triton run on; 0 without a GPU, or on one before Ampere.

    Those have less shared memory than tiles of matrices take.
    """
    if device.type != "cuda":
        return 0
    properties = torch.cuda.get_device_properties(device)
    return 0 if torch.version.hip is None and properties.major < 8 else properties.multi_processor_count


class CompileError(Exception):
    """A kernel that does not compile, before anything was changed; ``variants`` are those that need it."""

    def __init__(self, variants: tuple[Hashable, ...], cause: Exception) -> None:
        super().__init__(*variants)
        self.variants = variants
        self.cause = cause


@contextmanager
def compiling(*variants: Hashable) -> Iterator[None]:
    """Raise :class:`CompileError` for what a compiler or a driver raises about these kernel variants.

    What the device says of something else comes through: memory that is full, an earlier kernel's error, waiting where
    nothing may wait. Under capture everything does: a graph that lacks a step must not look like one that has it.
    """
    try:
        yield
    except (torch.OutOfMemoryError, AssertionError):
        raise
    except Exception as error:
        if (
            strict
            or isinstance(error, _compat.DEVICE_ERRORS)
            or "synchronizing" in str(error)
            or _compat.is_capturing()
        ):
            raise
        raise CompileError(variants, error) from error


def give_up(failed: CompileError, what: str) -> None:
    """From now on torch's own operators do what these kernel variants would; says once why.

    Args:
        failed: The variants and the error.
        what: Which tensors that concerns.
    """
    reason = f"a Triton kernel failed: {type(failed.cause).__name__}: {failed.cause}"
    news = [variant for variant in failed.variants if variant not in _given_up]
    _given_up.update(dict.fromkeys(news, reason))
    if news:
        message = (
            f"optimx: torch's own operators are used for {what}, because {reason}\n"
            "Whatever else Triton updates, it goes on updating; optimx.explain(optimizer) shows which tensors."
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def given_up(variant: Hashable) -> str | None:
    """Why a kernel variant is not used any more; None if it is."""
    return _given_up.get(variant)


def triton_problem() -> str | None:
    """Why Triton compiles nothing here, None if it does: a kernel is tried, for sm_90 where there is no GPU."""
    missing = _triton_missing()
    if missing or interpreted():
        return missing or "TRITON_INTERPRET=1: kernels are interpreted"
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.runtime import driver

        from ..triton_kernels.device import OPTIONS
        from ..triton_kernels.grad_norm import finish_launcher

        launcher = finish_launcher(torch.float32, 2.0, True, True, False, False, False)
        pointers = {"partials_ptr": "*fp64", "grad_scale_ptr": "*fp32", "found_inf_ptr": "*fp32", "norm_ptr": "*fp32",
                    "control_ptr": "*fp64"}  # fmt: skip
        types = {**pointers, "n_partials": "i32", "max_norm": "fp32"}
        names = [param.name for param in launcher.kernel.params]
        signature = {name: types.get(name, "constexpr") for name in names}
        constants = {name: launcher.options[name] for name in names if name not in types}
        target = driver.active.get_current_target() if torch.cuda.is_available() else GPUTarget("cuda", 90, 32)
        triton.compile(ASTSource(launcher.kernel, signature, constants), target=target, options=OPTIONS)
    # whatever goes wrong in a compiler is the answer
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def toolkit() -> str:
    """What torch was built for."""
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"


def triton_version() -> str | None:
    """None if it is not installed."""
    if _triton_missing():
        return None
    import triton

    return triton.__version__
