"""Adam (https://arxiv.org/abs/1412.6980), and the rule it shares with AdamW."""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Adam as TorchAdam
from torch.optim.optimizer import ParamsT

from . import _compat
from ._engine import flags
from ._engine.averages import Average
from ._engine.guards import Clipping, Spikes
from ._engine.rule import Operator, UpdateRule, decay_cautiously_, l2_gradient, subtract_
from ._engine.step import MultiTensorStep
from ._engine.storage import StateDtype

__all__ = ["Adam"]


class AdamRow(NamedTuple):
    """A tensor's hyperparameters in one step: the columns of the kernel's ``HYPER``."""

    factor: float
    decay: float
    l2: float
    beta1_c: float
    beta2: float
    beta2_c: float
    bias2_sqrt: float
    step_size: float
    eps: float


class AdamRule(UpdateRule):
    """One step of Adam: with the weight decay in the gradient, or decoupled from it (AdamW)."""

    module = "adam"
    codes = {"exp_avg": False, "exp_avg_sq": True}
    flags = optional_settings = flags.OF_UPDATES
    temporaries = 4
    # lr and weight_decay
    by_element = (0, 4)
    _read = itemgetter("lr", "betas", "eps", "weight_decay", "maximize", "decoupled_weight_decay")

    def group_variant(self, group: dict[str, Any]) -> tuple[bool, ...]:
        flags.check_decay(group)
        chosen = flags.variant(self, group)
        has_l2 = (not group["decoupled_weight_decay"],) if chosen else ()
        return (bool(group["amsgrad"]), *chosen, *has_l2)

    def walk_of(self, variant: tuple[bool, ...]) -> str:
        return flags.walk_of(variant[1:5])

    def values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        lr, (beta1, beta2), eps, weight_decay, maximize, decoupled = self._read(group)
        return lr, beta1, beta2, eps, weight_decay, float(maximize), float(decoupled)

    def state_names(self, variant: tuple[bool, ...]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if variant[0] else ("exp_avg", "exp_avg_sq")

    def prepare(self, values, scalars):
        lr, beta1, beta2, eps, weight_decay, maximize, decoupled = values
        step = scalars[0] + 1
        row = AdamRow(
            -1.0 if maximize else 1.0,
            1.0 - lr * weight_decay if decoupled else 1.0,
            0.0 if decoupled else weight_decay,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            math.sqrt(1.0 - beta2**step),
            lr / (1.0 - beta1**step),
            eps,
        )
        return row, (step,)

    def formula(self, variant, row, p, g, states, scratch):
        if len(variant) > 1:
            step, *_ = self.advance(variant, row, p, g, states, scratch)
            self.take(variant, row, p, step, 1.0, scratch)
            return
        # what differs between groups, whose decay, l2 and size are vectors; else there is the operator
        _, decay, l2, beta1_c, beta2, beta2_c, bias2_sqrt, size, eps = row
        exp_avg, exp_avg_sq, *largest = states
        if isinstance(decay, Tensor):
            p.mul_(decay)
        elif l2.any():
            # an infinite parameter without one must not turn the state to NaN
            g = torch.where(l2 != 0, torch.addcmul(g, p, l2, out=scratch[0]), g)
        # no operator that wakes threads for a few elements: neither torch's own one nor sqrt
        exp_avg.lerp_(g, beta1_c)
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=beta2_c)
        square = torch.maximum(largest[0], exp_avg_sq, out=largest[0]) if largest else exp_avg_sq
        denominator = torch.rsqrt(square, out=scratch[1]).reciprocal_()
        denominator.div_(bias2_sqrt).add_(eps)
        p.addcdiv_(torch.mul(exp_avg, size, out=scratch[0]), denominator, value=-1.0)

    def advance(self, variant, row, p, g, states, scratch):
        _, _, l2, beta1_c, beta2, beta2_c, bias2_sqrt, _, eps = row
        exp_avg, exp_avg_sq, *largest = states
        _, _, is_cautious, is_clipped, *_ = variant
        g = l2_gradient(g, p, l2, scratch[2])
        exp_avg.lerp_(g, beta1_c)
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=beta2_c)
        square = torch.maximum(largest[0], exp_avg_sq, out=largest[0]) if largest else exp_avg_sq
        denominator = torch.sqrt(square, out=scratch[1]).div_(bias2_sqrt).add_(eps)
        step = torch.div(exp_avg, denominator, out=scratch[0])
        sizes = torch.div(g, denominator, out=scratch[1]) if is_clipped else None
        taken = flags.cautious(step, g, scratch[3]) if is_cautious else None
        return step if taken is None else step.mul_(taken), taken, sizes

    def factors(self, variant, row, squares, numels):
        return flags.factors(variant[1:5], squares, numels)

    def take(self, variant, row, p, step, factor, scratch):
        if variant[1]:
            decay_cautiously_(p, row.decay, step, scratch[1])
        elif row.decay != 1.0:
            p.mul_(row.decay)
        subtract_(p, step, row.step_size, factor)

    def operator(self, variant: tuple[bool, ...], dtype: torch.dtype) -> Operator | None:
        # torch's knows no flags
        return fused_adam if len(variant) == 1 else None


def fused_adam(values, params, grads, states, steps):
    """Torch's operator, with the values of :class:`AdamRule`."""
    lr, beta1, beta2, eps, weight_decay, maximize, decoupled = values
    fused = _compat.fused_adamw_ if decoupled else _compat.fused_adam_
    exp_avgs, exp_avg_sqs, *largest = states
    fused(
        params, grads, exp_avgs, exp_avg_sqs, largest[0] if largest else [], steps,
        lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps,
        amsgrad=bool(largest), maximize=bool(maximize),
    )  # fmt: skip


ADAM = AdamRule()


class Adam(MultiTensorStep, TorchAdam):
    """Adam, a drop-in for :class:`torch.optim.Adam`: same arguments, state and numbers.

    Args beyond torch's:
        cautious: Elements whose step does not go against their gradient take none, and the others of a tensor a longer
            one: divided by their share, at least 1e-3 (https://arxiv.org/abs/2411.16085); with "last_mean" by their
            share at the step before, and by 1 at the first, which saves a pass (default: False).
        cautious_weight_decay: Weights decay only where the step does not move them away from zero
            (https://arxiv.org/abs/2510.12402), which has to be decoupled (default: False).
        update_clipping: A tensor's step is divided by the root mean square of its gradient over the root of the average
            square, where that is above 1; weight decay is not, as in timm (StableAdamW,
            https://arxiv.org/abs/2304.13013) (default: False).
        centralize_grads: Gradients lose their means over all dimensions but the first, before the norm is taken
            (https://arxiv.org/abs/2004.01461) (default: False).
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

    ``foreach=True``, ``foreach=False`` and ``fused=False`` ask for torch's implementation and get it.

    Raises:
        ValueError: A hyperparameter is out of range (torch's messages), or ``max_grad_norm`` is not > 0.
        RuntimeError: ``fused=True`` where it cannot hold, as in torch.
    """

    rule = ADAM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        cautious: bool | str = False,
        cautious_weight_decay: bool = False,
        update_clipping: bool = False,
        centralize_grads: bool = False,
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
        TorchAdam.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize,
            capturable=capturable, differentiable=differentiable, fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )  # fmt: skip
        self._init_step(
            max_grad_norm, norm_group=norm_group, skip_nonfinite=skip_nonfinite, skip_spikes=skip_spikes,
            max_skips=max_skips, average=average, param_rounding=param_rounding, state_dtype=state_dtype,
            rounding_seed=rounding_seed, cautious=cautious, cautious_weight_decay=cautious_weight_decay,
            update_clipping=update_clipping, centralize_grads=centralize_grads, agc=agc,
        )  # fmt: skip
