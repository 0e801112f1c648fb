"""RMSprop (https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf).

The centered variant is of https://arxiv.org/abs/1308.0850.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import RMSprop as TorchRMSprop
from torch.optim.optimizer import ParamsT

from . import _compat
from ._engine.averages import Average
from ._engine.guards import Clipping, Spikes
from ._engine.rule import UpdateRule, l2_gradient
from ._engine.step import MultiTensorStep
from ._engine.storage import StateDtype

__all__ = ["RMSprop"]


class RMSpropRow(NamedTuple):
    """A tensor's hyperparameters in one step: the columns of the kernel's ``HYPER``."""

    factor: float
    l2: float
    alpha: float
    alpha_c: float
    eps: float
    momentum: float
    lr: float


class RMSpropRule(UpdateRule):
    """One step of RMSprop."""

    module = "rmsprop"
    codes = {"square_avg": True, "momentum_buffer": False, "grad_avg": False}
    _read = itemgetter("lr", "alpha", "eps", "weight_decay", "momentum", "maximize")

    def group_variant(self, group: dict[str, Any]) -> tuple[bool, ...]:
        return group["momentum"] > 0, bool(group["centered"])

    def values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        *numbers, maximize = self._read(group)
        return (*numbers, float(maximize))

    def state_names(self, variant: tuple[bool, ...]) -> tuple[str, ...]:
        momentum, centered = variant
        return ("square_avg", *["momentum_buffer"] * momentum, *["grad_avg"] * centered)

    def prepare(self, values, scalars):
        lr, alpha, eps, weight_decay, momentum, maximize = values
        return RMSpropRow(-1.0 if maximize else 1.0, weight_decay, alpha, 1.0 - alpha, eps, momentum, lr), (
            scalars[0] + 1,
        )

    def formula(self, variant, row, p, g, states, scratch):
        momentum, centered = variant
        _, l2, alpha, alpha_c, eps, mu, lr = row
        square_avg = states[0]
        if not momentum and not centered and alpha < 1.0:
            # one pass: Adam whose average is the gradient
            exp_avg = scratch[0].zero_()
            _compat.uncorrected_adam_(
                p, g, exp_avg, square_avg, lr=lr, beta1=0.0, beta2=alpha, weight_decay=l2, eps=eps
            )
            return
        g = l2_gradient(g, p, l2, scratch[0])
        square_avg.mul_(alpha).addcmul_(g, g, value=alpha_c)
        if centered:
            grad_avg = states[-1].lerp_(g, alpha_c)
            denominator = torch.addcmul(square_avg, grad_avg, grad_avg, value=-1, out=scratch[1]).sqrt_()
        else:
            denominator = torch.sqrt(square_avg, out=scratch[1])
        denominator.add_(eps)
        if momentum:
            p.add_(states[1].mul_(mu).addcdiv_(g, denominator), alpha=-lr)
        else:
            p.addcdiv_(g, denominator, value=-lr)


class RMSprop(MultiTensorStep, TorchRMSprop):
    """RMSprop, a drop-in for :class:`torch.optim.RMSprop`: same arguments, state and numbers.

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

    ``foreach=True`` and ``foreach=False`` ask for torch's implementation and get it.

    Raises:
        ValueError: A hyperparameter is out of range (torch's messages), or ``max_grad_norm`` is not > 0.
        RuntimeError: A gradient is sparse, as in torch.
    """

    rule = RMSpropRule()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        agc: float | None = None,
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
        TorchRMSprop.__init__(
            self, params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize,
            differentiable,
        )  # fmt: skip
        self._init_step(
            max_grad_norm, norm_group=norm_group, skip_nonfinite=skip_nonfinite, skip_spikes=skip_spikes,
            max_skips=max_skips, average=average, param_rounding=param_rounding, state_dtype=state_dtype,
            rounding_seed=rounding_seed, agc=agc,
        )  # fmt: skip
