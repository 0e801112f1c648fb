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
