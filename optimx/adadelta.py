"""Adadelta (https://arxiv.org/abs/1212.5701)."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Adadelta as TorchAdadelta
from torch.optim.optimizer import ParamsT

from ._engine.averages import Average
from ._engine.guards import Clipping, Spikes
from ._engine.rule import UpdateRule, l2_gradient
from ._engine.step import MultiTensorStep
from ._engine.storage import StateDtype

__all__ = ["Adadelta"]


class AdadeltaRow(NamedTuple):
    """A tensor's hyperparameters in one step: the columns of the kernel's ``HYPER``."""

    factor: float
    l2: float
    rho: float
    rho_c: float
    eps: float
    lr: float


class AdadeltaRule(UpdateRule):
    """One step of Adadelta."""

    module = "adadelta"
    codes = {"square_avg": True, "acc_delta": True}
    _read = itemgetter("lr", "rho", "eps", "weight_decay", "maximize")

    def values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        *numbers, maximize = self._read(group)
        return (*numbers, float(maximize))

    def state_names(self, variant: tuple[bool, ...]) -> tuple[str, ...]:
        return "square_avg", "acc_delta"

    def prepare(self, values, scalars):
        lr, rho, eps, weight_decay, maximize = values
        return AdadeltaRow(-1.0 if maximize else 1.0, weight_decay, rho, 1.0 - rho, eps, lr), (scalars[0] + 1,)

    def formula(self, variant, row, p, g, states, scratch):
        _, l2, rho, rho_c, eps, lr = row
        square_avg, acc_delta = states
        g = l2_gradient(g, p, l2, scratch[0])
        square_avg.mul_(rho).addcmul_(g, g, value=rho_c)
        # one root of a ratio for a ratio of roots; rsqrt would save a pass and a digit
        delta = torch.add(acc_delta, eps, out=scratch[1])
        delta.div_(torch.add(square_avg, eps, out=scratch[2])).sqrt_().mul_(g)
        acc_delta.mul_(rho).addcmul_(delta, delta, value=rho_c)
        p.add_(delta, alpha=-lr)


class Adadelta(MultiTensorStep, TorchAdadelta):
    """Adadelta, a drop-in for :class:`torch.optim.Adadelta`: same arguments, state and numbers.

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

    rule = AdadeltaRule()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
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
        TorchAdadelta.__init__(
            self, params, lr, rho, eps, weight_decay, foreach, capturable=capturable, maximize=maximize,
            differentiable=differentiable,
        )  # fmt: skip
        self._init_step(
            max_grad_norm, norm_group=norm_group, skip_nonfinite=skip_nonfinite, skip_spikes=skip_spikes,
            max_skips=max_skips, average=average, param_rounding=param_rounding, state_dtype=state_dtype,
            rounding_seed=rounding_seed,
        )  # fmt: skip
