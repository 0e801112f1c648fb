"""Adamax (https://arxiv.org/abs/1412.6980, section 7.1)."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Adamax as TorchAdamax
from torch.optim.optimizer import ParamsT

from ._engine.averages import Average
from ._engine.guards import Clipping, Spikes
from ._engine.rule import UpdateRule, l2_gradient
from ._engine.step import MultiTensorStep
from ._engine.storage import StateDtype

__all__ = ["Adamax"]


class AdamaxRow(NamedTuple):
    """A tensor's hyperparameters in one step: the columns of the kernel's ``HYPER``."""

    factor: float
    l2: float
    beta1_c: float
    beta2: float
    eps: float
    step_size: float


class AdamaxRule(UpdateRule):
    """One step of Adamax."""

    module = "adamax"
    codes = {"exp_avg": False, "exp_inf": True}
    _read = itemgetter("lr", "betas", "eps", "weight_decay", "maximize")

    def values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        lr, (beta1, beta2), eps, weight_decay, maximize = self._read(group)
        return lr, beta1, beta2, eps, weight_decay, float(maximize)

    def state_names(self, variant: tuple[bool, ...]) -> tuple[str, ...]:
        return "exp_avg", "exp_inf"

    def prepare(self, values, scalars):
        lr, beta1, beta2, eps, weight_decay, maximize = values
        step = scalars[0] + 1
        row = AdamaxRow(-1.0 if maximize else 1.0, weight_decay, 1.0 - beta1, beta2, eps, lr / (1.0 - beta1**step))
        return row, (step,)

    def formula(self, variant, row, p, g, states, scratch):
        _, l2, beta1_c, beta2, eps, step_size = row
        exp_avg, exp_inf = states
        g = l2_gradient(g, p, l2, scratch[0])
        exp_avg.lerp_(g, beta1_c)
        torch.maximum(exp_inf.mul_(beta2), torch.abs(g, out=scratch[1]).add_(eps), out=exp_inf)
        p.addcdiv_(exp_avg, exp_inf, value=-step_size)


class Adamax(MultiTensorStep, TorchAdamax):
    """Adamax, a drop-in for :class:`torch.optim.Adamax`: same arguments, state and numbers.

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

    ``foreach=True`` and ``foreach=False`` ask for torch's implementation and get it.

    Raises:
        ValueError: A hyperparameter is out of range (torch's messages), or ``max_grad_norm`` is not > 0.
        RuntimeError: A gradient is sparse, as in torch.
    """

    rule = AdamaxRule()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        max_grad_norm: float | Clipping | None = None,
        skip_nonfinite: bool = False,
        skip_spikes: Spikes | bool | None = None,
        max_skips: int | None = None,
        average: Average | None = None,
        norm_group: Any = None,
        param_rounding: str = "nearest",
        state_dtype: StateDtype = None,
        rounding_seed: int = 0,
    ) -> None:
        TorchAdamax.__init__(
            self, params, lr, betas, eps, weight_decay, foreach, maximize=maximize, differentiable=differentiable,
            capturable=capturable,
        )  # fmt: skip
        self._init_step(
            max_grad_norm, norm_group=norm_group, skip_nonfinite=skip_nonfinite, skip_spikes=skip_spikes,
            max_skips=max_skips, average=average, param_rounding=param_rounding, state_dtype=state_dtype,
            rounding_seed=rounding_seed,
        )  # fmt: skip
