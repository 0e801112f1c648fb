"""What the engine knows of an optimizer. :class:`~optimx._engine.step.MultiTensorStep` is what users see of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _compat
from .rule import UpdateRule


class EngineOptimizer(_compat.GraphCaptureCheck):
    """An optimizer with a rule, and with settings that hold for all of its groups."""

    rule: ClassVar[UpdateRule]

    #: Torch's own step, or the loop that stands for one, without the step hooks.
    _stock_step: ClassVar[Callable[..., Any]]

    #: Clip the gradients of all groups to this 2-norm inside the step; None: do not. May be changed between steps.
    #: The norm is that of the parameters this optimizer has. DTensors (FSDP2, tensor parallel) tell the whole norm;
    #: flat parameters of FSDP1 are refused (use ``model.clip_grad_norm_``). Partitions of a ZeroRedundancyOptimizer and
    #: stages of a pipeline look like any other parameters, and a process would clip by its own part's norm: leave this
    #: None there, and clip before the step by a norm that is reduced over all processes.
    max_grad_norm: float | None = None
    #: Norm of all gradients before clipping in the last step, a scalar tensor on their device that nobody waits for
    #: (float32; float64 where a gradient is); None without ``max_grad_norm``. Under GradScaler it is of the unscaled
    #: gradients, and not finite where the step was skipped.
    grad_norm: Tensor | None = None
    #: Divide the gradients of all groups by their common 2-norm inside the step.
    normalize_grads: bool = False
    #: The step may be recorded in a CUDA graph. A group's own ``capturable``, where torch has one, overrides it.
    capturable: bool = False

    @property
    def needs_norm(self) -> bool:
        """Whether the step measures the norm of the gradients."""
        return self.max_grad_norm is not None or self.normalize_grads


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """The loss that a step's closure computes, with gradients; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
