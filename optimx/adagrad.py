"""Adagrad (http://jmlr.org/papers/v12/duchi11a.html)."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Adagrad as TorchAdagrad
from torch.optim.optimizer import ParamsT

from . import _compat
from ._engine.averages import Average
from ._engine.guards import Clipping, Spikes
from ._engine.rule import Operator, StateKind, UpdateRule
from ._engine.step import MultiTensorStep
from ._engine.storage import StateDtype

__all__ = ["Adagrad"]


class AdagradRow(NamedTuple):
    """A tensor's hyperparameters in one step: the columns of the kernel's ``HYPER``."""

    factor: float
    l2: float
    step_size: float
    eps: float


class AdagradRule(UpdateRule):
    """One step of Adagrad."""

    module = "adagrad"
    _read = itemgetter("lr", "lr_decay", "weight_decay", "eps", "maximize")

    def values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        *numbers, maximize = self._read(group)
        return (*numbers, float(maximize))

    def state_names(self, variant: tuple[bool, ...]) -> tuple[str, ...]:
        return ("sum",)

    def kind_of(self, name: str, param: Tensor, group: dict[str, Any], defaults: dict[str, Any]) -> StateKind:
        return StateKind(defaults["initial_accumulator_value"])

    def prepare(self, values, scalars):
        lr, lr_decay, weight_decay, eps, maximize = values
        return AdagradRow(-1.0 if maximize else 1.0, weight_decay, lr / (1.0 + scalars[0] * lr_decay), eps), (
            scalars[0] + 1,
        )

    def operator(self, variant: tuple[bool, ...], dtype: torch.dtype) -> Operator | None:
        return fused_adagrad

    def rounds_once(self, values: tuple[Any, ...], dtype: torch.dtype) -> bool:
        # in 16 bits torch's operator rounds the sum of gradient and weight decay
        _, _, weight_decay, *_ = values
        return dtype.itemsize > 2 or not weight_decay


def fused_adagrad(values, params, grads, states, steps):
    """Torch's operator, with the values of :class:`AdagradRule`."""
    lr, lr_decay, weight_decay, eps, maximize = values
    _compat.fused_adagrad_(
        params, grads, states[0], steps, lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, eps=eps,
        maximize=bool(maximize),
    )  # fmt: skip


class Adagrad(MultiTensorStep, TorchAdagrad):
    """Adagrad, a drop-in for :class:`torch.optim.Adagrad`: same arguments, state and numbers.

    Args beyond torch's:
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

    rule = AdagradRule()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
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
        TorchAdagrad.__init__(
            self, params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, foreach, maximize=maximize,
            differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._init_step(
            max_grad_norm, capturable=capturable, norm_group=norm_group, skip_nonfinite=skip_nonfinite,
            skip_spikes=skip_spikes, max_skips=max_skips, average=average, param_rounding=param_rounding,
            state_dtype=state_dtype, rounding_seed=rounding_seed,
        )  # fmt: skip
