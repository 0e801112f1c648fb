"""What the engine knows of an optimizer. :class:`~optimx._engine.step.MultiTensorStep` is what users see of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _compat
from .averages import Average
from .guards import Guarded
from .rule import UpdateRule
from .twins import Offload, Twins


class EngineOptimizer(Guarded, _compat.GraphCaptureCheck):
    """An optimizer with a rule, and with settings that hold for all of its groups."""

    rule: ClassVar[UpdateRule]

    #: Torch's own step, or the loop that stands for one, without the step hooks.
    _stock_step: ClassVar[Callable[..., Any]]

    #: A process group, each rank of which has other parameters, or other parts of them, that are no DTensors: flat
    #: parameters of FSDP1, partitions of a ZeroRedundancyOptimizer, stages of a pipeline. Their squared norms are added
    #: up, and all skip a step that one has to skip. None: parameters that are no DTensors are alike on all ranks.
    norm_group: Any = None
    #: The norm of all gradients on all ranks, for one step: whoever has measured it sets it, and nothing is measured
    #: or communicated. A scalar tensor, a number, or a DTensor, of which all parts are gathered first.
    total_norm: Tensor | float | None = None
    #: Norm of all gradients before clipping in the last step, a scalar tensor on their device that nobody waits for
    #: (float32; float64 where a gradient is); None where nobody asks for it. Under GradScaler it is of the unscaled
    #: gradients, and not finite where the step was skipped.
    grad_norm: Tensor | None = None
    #: Averages the parameters in the step, see :class:`EMA`; None: nobody does.
    average: Average | None = None
    #: States lie on the host, and so does the update, see :func:`optimx.offload_states`; None: where parameters are.
    offload: Offload | None = None
    #: The step may be recorded in a CUDA graph. A group's own ``capturable``, where torch has one, overrides it.
    capturable: bool = False
    #: Measures some steps, a ``Recorder``; None: nobody watches. Of the optimizer, because a compiler looks at it.
    _recorder: Any = None
    #: Takes steps of parts of it during backward, a ``Released``; None: nobody does. For a compiler, too.
    _release: Any = None
    #: Of such a part: where its parameters are among all. None: they are all.
    _places: Sequence[int] | None = None
    #: That step keeps plain states in the dtypes that groups ask for; others are refused where they ask.
    loop_keeps_dtypes: ClassVar[bool] = False
    #: And it knows the flags of updates; others are refused where they would have to take it.
    loop_knows_flags: ClassVar[bool] = False

    @cached_property
    def _twins(self) -> Twins | None:
        """What stands for parameters on the host; no part of checkpoints and copies."""
        return None if self.offload is None else Twins(self.offload)


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether its step cannot be taken without one, as LBFGS's cannot."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """The loss that a step's closure computes, with gradients; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
