"""RAdam (https://arxiv.org/abs/1908.03265), and with decoupled weight decay."""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import RAdam as TorchRAdam
from torch.optim.optimizer import ParamsT

from . import _compat
from ._engine.averages import Average
from ._engine.guards import Clipping, Spikes
from ._engine.rule import UpdateRule, l2_gradient
from ._engine.step import MultiTensorStep
from ._engine.storage import StateDtype

__all__ = ["RAdam"]


class RAdamRow(NamedTuple):
    """A tensor's hyperparameters in one step: the columns of the kernel's ``HYPER``."""

    factor: float
    decay: float
    l2: float
    beta1_c: float
    beta2: float
    beta2_c: float
    step_size: float
    rectification: float
    eps: float


class RAdamRule(UpdateRule):
    """One step of RAdam: with the weight decay in the gradient, or decoupled from it."""

    module = "radam"
    codes = {"exp_avg": False, "exp_avg_sq": True}
    _read = itemgetter("lr", "betas", "eps", "weight_decay", "maximize", "decoupled_weight_decay")

    def values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        lr, (beta1, beta2), eps, weight_decay, maximize, decoupled = self._read(group)
        return lr, beta1, beta2, eps, weight_decay, float(maximize), float(decoupled)

    def state_names(self, variant: tuple[bool, ...]) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    def prepare(self, values, scalars):
        lr, beta1, beta2, eps, weight_decay, maximize, decoupled = values
        step = scalars[0] + 1
        bias2 = 1.0 - beta2**step
        longest = 2.0 / (1.0 - beta2) - 1.0
        length = longest - 2.0 * step * beta2**step / bias2
        rectification = 0.0
        if length > 5.0:
            square = (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length)
            rectification = math.sqrt(square * bias2)
        row = RAdamRow(
            -1.0 if maximize else 1.0,
            1.0 - lr * weight_decay if decoupled else 1.0,
            0.0 if decoupled else weight_decay,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            lr / (1.0 - beta1**step),
            rectification,
            eps,
        )
        return row, (step,)

    def formula(self, variant, row, p, g, states, scratch):
        _, decay, l2, beta1_c, beta2, beta2_c, step_size, rectification, eps = row
        exp_avg, exp_avg_sq = states
        if decay != 1.0:
            p.mul_(decay)
        if rectification:
            _compat.uncorrected_adam_(
                p, g, exp_avg, exp_avg_sq, lr=step_size * rectification, beta1=1.0 - beta1_c, beta2=beta2,
                weight_decay=l2, eps=eps,
            )  # fmt: skip
            return
        g = l2_gradient(g, p, l2, scratch[0])
        exp_avg.lerp_(g, beta1_c)
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=beta2_c)
        p.add_(exp_avg, alpha=-step_size)


class RAdam(MultiTensorStep, TorchRAdam):
    """RAdam, a drop-in for :class:`torch.optim.RAdam`: same arguments, state and numbers.

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

    rule = RAdamRule()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
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
        TorchRAdam.__init__(
            self, params, lr, betas, eps, weight_decay, decoupled_weight_decay, foreach=foreach, maximize=maximize,
            capturable=capturable, differentiable=differentiable,
        )  # fmt: skip
        self._init_step(
            max_grad_norm, norm_group=norm_group, skip_nonfinite=skip_nonfinite, skip_spikes=skip_spikes,
            max_skips=max_skips, average=average, param_rounding=param_rounding, state_dtype=state_dtype,
            rounding_seed=rounding_seed,
        )  # fmt: skip
