"""SGD with momentum and Nesterov momentum (http://www.cs.toronto.edu/%7Ehinton/absps/momentum.pdf)."""

from __future__ import annotations

from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD as TorchSGD
from torch.optim.optimizer import ParamsT

from . import _compat
from ._engine.averages import Average
from ._engine.guards import Clipping, Spikes
from ._engine.rule import Operator, UpdateRule
from ._engine.step import MultiTensorStep
from ._engine.storage import StateDtype

__all__ = ["SGD"]


class SGDRow(NamedTuple):
    """A tensor's hyperparameters in one step: the columns of the kernel's ``HYPER``."""

    factor: float
    l2: float
    keep: float
    take: float
    momentum: float
    lr: float


class SGDRule(UpdateRule):
    """One step of SGD. Torch keeps no step count; that a step is a parameter's first shows in the missing buffer."""

    module = "sgd"
    codes = {"momentum_buffer": False}
    scalars = ()
    _read = itemgetter("lr", "momentum", "dampening", "weight_decay", "maximize")

    def group_variant(self, group: dict[str, Any]) -> tuple[bool, ...]:
        momentum = group["momentum"] != 0
        return momentum, momentum and bool(group["nesterov"])

    def values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        lr, momentum, dampening, weight_decay, maximize = self._read(group)
        return lr, momentum, dampening, weight_decay, float(maximize), 0.0

    def state_names(self, variant: tuple[bool, ...]) -> tuple[str, ...]:
        momentum, _ = variant
        return ("momentum_buffer",) if momentum else ()

    def is_first(self, state: dict[str, Any], values: tuple[Any, ...]) -> bool:
        # without dampening, a buffer of zeros leads to the same
        _, momentum, dampening, *_ = values
        return momentum != 0 and dampening != 0 and state.get("momentum_buffer") is None

    def values_for(self, values: tuple[Any, ...], dtype: torch.dtype, first: bool) -> tuple[Any, ...]:
        return (*values[:-1], float(first))

    def prepare(self, values, scalars):
        lr, momentum, dampening, weight_decay, maximize, first = values
        keep, take = (0.0, 1.0) if first else (momentum, 1.0 - dampening)
        return SGDRow(-1.0 if maximize else 1.0, weight_decay, keep, take, momentum, lr), ()

    def operator(self, variant: tuple[bool, ...], dtype: torch.dtype) -> Operator | None:
        _, nesterov = variant
        if dtype.itemsize == 2:
            # torch 2.13 writes no parameter past the vector width, and garbage into the buffer
            return None
        return fused_nesterov if nesterov else fused_sgd


def fused_sgd(values, params, grads, states, steps, nesterov=False):
    """Torch's operator, with the values of :class:`SGDRule`."""
    lr, momentum, dampening, weight_decay, maximize, first = values
    _compat.fused_sgd_(
        params, grads, states[0] if states else [], weight_decay=weight_decay, momentum=momentum, lr=lr,
        dampening=dampening, nesterov=nesterov, maximize=bool(maximize), is_first_step=bool(first),
    )  # fmt: skip


fused_nesterov = partial(fused_sgd, nesterov=True)


class SGD(MultiTensorStep, TorchSGD):
    """SGD, a drop-in for :class:`torch.optim.SGD`: same arguments, state and numbers.

    Args beyond torch's:
        agc: Adaptive gradient clipping: units of a gradient (entries of the first dimension, or vectors) are clipped to
            this times the norm of the parameter's unit, at least 1e-3; 0.01 is usual, and None for the last layer
            (https://arxiv.org/abs/2102.06171) (default: None).
        max_grad_norm: Clip the gradients of *all* groups to this 2-norm, or to what an :class:`AutoClip` or a
            :class:`ZClip` finds, inside the step, without rewriting them (default: None, no clipping).
            :attr:`grad_norm` then holds the norm before clipping.
        skip_nonfinite: Skip steps with infinite or NaN gradients (default: False).
        skip_spikes: Skip steps whose gradient norm is far above those before: True, or an :class:`Spikes` (default:
            None).
        max_skips: Raise RuntimeError after so many skipped steps in a row (default: None).
        average: Average the parameters in the step: an :class:`EMA`, :class:`SWA` or :class:`PowerEMA` (default: None).
        norm_group: A process group, each rank of which has other parameters or other parts of them, that are no
            DTensors (default: None: they are alike on all ranks). See :attr:`norm_group`.
        param_rounding: How 16-bit parameters are kept: "nearest", "stochastic", "remainder8", "remainder16" or "master"
            (default: "nearest"); docs/storage.md tells of them.
        state_dtype: How states are kept: a dtype, "stochastic", "8bit", or a dict of these by name (default: None).
        rounding_seed: Of the random bits (default: 0).
        capturable: The step may be recorded in a CUDA graph (default: False: recorded steps are torch's own).

    ``foreach=True``, ``foreach=False`` and ``fused=False`` ask for torch's implementation and get it.

    Raises:
        ValueError: A hyperparameter is out of range (torch's messages), or ``max_grad_norm`` is not > 0.
        RuntimeError: ``fused=True`` where it cannot hold, as in torch.
    """

    rule = SGDRule()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        agc: float | None = None,
        max_grad_norm: float | Clipping | None = None,
        skip_nonfinite: bool = False,
        skip_spikes: Spikes | bool | None = None,
        max_skips: int | None = None,
        average: Average | None = None,
        norm_group: Any = None,
        capturable: bool = False,
        param_rounding: str = "nearest",
        state_dtype: StateDtype = None,
        rounding_seed: int = 0,
    ) -> None:
        TorchSGD.__init__(
            self, params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, foreach=foreach,
            differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._init_step(
            max_grad_norm, capturable=capturable, norm_group=norm_group, skip_nonfinite=skip_nonfinite,
            skip_spikes=skip_spikes, max_skips=max_skips, average=average, param_rounding=param_rounding,
            state_dtype=state_dtype, rounding_seed=rounding_seed, agc=agc,
        )  # fmt: skip
