"""Which backend a tensor gets, and why not Triton: the only file that asks.

``triton``: one launch of our kernels for all tensors of a bucket (CUDA and ROCm; a CPU under ``TRITON_INTERPRET``).
``native``: torch's own fused CPU operators, called on the plan's lists. ``torch``: the stock class's step.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch

TRITON, NATIVE, TORCH = "triton", "native", "torch"

_broken: str | None = None


def interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


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
    if device.type == "cpu" and not interpreted():
        return NATIVE, ""
    if device.type not in ("cuda", "cpu"):
        return TORCH, f"no kernels for {device.type} devices"
    reason = _broken or _triton_missing()
    if reason is None and device.type == "cuda":
        reason = _too_old(torch.cuda.current_device() if device.index is None else device.index)
    return (TORCH, reason) if reason else (TRITON, "")


def give_up_on_triton(error: Exception) -> None:
    """From now on torch's own steps; says once why."""
    global _broken
    if _broken is None:
        _broken = f"Triton failed: {type(error).__name__}: {error}"
        message = f"optimx: a Triton kernel did not compile, torch's own steps are used instead. {_broken}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def triton_problem() -> str | None:
    """Why Triton compiles nothing here, None if it does: a kernel is tried, for sm_90 where there is no GPU."""
    missing = _broken or _triton_missing()
    if missing or interpreted():
        return missing or "TRITON_INTERPRET=1: kernels are interpreted"
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.runtime import driver

        from .triton_kernels.device import OPTIONS
        from .triton_kernels.grad_norm import _finish_kernel

        pointers = {"partials_ptr": "*fp64", "grad_scale_ptr": "*fp32", "found_inf_ptr": "*fp32", "norm_ptr": "*fp32",
                    "control_ptr": "*fp64"}  # fmt: skip
        constants = {"NORM_TYPE": 2, "CLIP": True, "CLAMP": True, "HAS_SCALE": False, "HAS_FOUND_INF": False,
                     "CHECK_FINITE": False, "BLOCK_SIZE": 128}  # fmt: skip
        signature = {**pointers, "n_partials": "i32", "max_norm": "fp32", **dict.fromkeys(constants, "constexpr")}
        signature = {p.name: signature[p.name] for p in _finish_kernel.params}
        target = driver.active.get_current_target() if torch.cuda.is_available() else GPUTarget("cuda", 90, 32)
        triton.compile(ASTSource(_finish_kernel, signature, constants), target=target, options=OPTIONS)
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
