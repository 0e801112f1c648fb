"""Lion (https://arxiv.org/abs/2302.06675)."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from . import _compat
from ._engine import flags
from ._engine.averages import Average
from ._engine.guards import Clipping, Spikes
from ._engine.optimizer import evaluated
from ._engine.rule import UpdateRule, decay_cautiously_, subtract_
from ._engine.sharding import gathered
from ._engine.step import MultiTensorStep
from ._engine.storage import StateDtype
from ._loop import as_number, as_real, check_at_least_zero, check_betas, each_parameter

__all__ = ["Lion"]


class LionRow(NamedTuple):
    """A tensor's hyperparameters in one step: the columns of the kernel's ``HYPER``."""

    factor: float
    decay: float
    beta1_c: float
    beta2_c: float
    lr: float


class LionRule(UpdateRule):
    """One step of Lion."""

    module = "lion"
    codes = {"exp_avg": False}
    flags = optional_settings = ("cautious_weight_decay", "cautious")
    scalars = ()
    _read = itemgetter("lr", "betas", "weight_decay", "maximize")

    def group_variant(self, group: dict[str, Any]) -> tuple[bool, ...]:
        return flags.variant(self, group)

    def walk_of(self, variant: tuple[bool, ...]) -> str:
        return flags.walk_of(variant)

    def values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        lr, (beta1, beta2), weight_decay, maximize = self._read(group)
        return lr, beta1, beta2, weight_decay, float(maximize)

    def state_names(self, variant: tuple[bool, ...]) -> tuple[str, ...]:
        return ("exp_avg",)

    def prepare(self, values, scalars):
        lr, beta1, beta2, weight_decay, maximize = values
        return LionRow(-1.0 if maximize else 1.0, 1.0 - lr * weight_decay, 1.0 - beta1, 1.0 - beta2, lr), ()

    def formula(self, variant, row, p, g, states, scratch):
        if variant:
            step, *_ = self.advance(variant, row, p, g, states, scratch)
            self.take(variant, row, p, step, 1.0, scratch)
            return
        _, decay, beta1_c, beta2_c, lr = row
        (exp_avg,) = states
        step = torch.lerp(exp_avg, g, beta1_c, out=scratch[0]).sign_()
        if decay != 1.0 and lr:
            # SGD whose gradient is the sign
            _compat.plain_sgd_(p, step, lr, (1.0 - decay) / lr)
        else:
            p.add_(step, alpha=-lr)
        exp_avg.lerp_(g, beta2_c)

    def advance(self, variant, row, p, g, states, scratch):
        (exp_avg,) = states
        step = torch.lerp(exp_avg, g, row.beta1_c, out=scratch[0]).sign_()
        exp_avg.lerp_(g, row.beta2_c)
        taken = flags.cautious(step, g, scratch[1]) if variant[1] else None
        return step if taken is None else step.mul_(taken), taken, None

    def factors(self, variant, row, squares, numels):
        return flags.factors(variant, squares, numels)

    def take(self, variant, row, p, step, factor, scratch):
        if variant[0]:
            decay_cautiously_(p, row.decay, step, scratch[2])
        else:
            p.mul_(row.decay)
        subtract_(p, step, row.lr, factor)


class LionLoop(Optimizer):
    """Lion, one parameter after the other: any device, complex numbers; what :class:`Lion` falls back to."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = evaluated(closure)
        for group, param, grad, state in each_parameter(self):
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            p, g, exp_avg = as_real(param, grad, state["exp_avg"])
            lr, (beta1, beta2) = as_number(group["lr"]), group["betas"]
            step, decay = exp_avg.lerp(g, 1 - beta1).sign_(), 1 - lr * as_number(group["weight_decay"])
            if group.get("cautious"):
                taken = (step * g.sign() > 0).to(step.dtype)
                is_lagged = group["cautious"] == flags.LAST_MEAN
                step.mul_(taken / (_last_divisor(state, taken) if is_lagged else flags.divisor(taken.mean())))
            if group.get("cautious_weight_decay"):
                p.copy_(torch.where(step * p.sign() < 0, p, p * decay))
            else:
                p.mul_(decay)
            p.sub_(step.mul_(lr))
            exp_avg.lerp_(g, 1 - beta2)
        return loss


def _last_divisor(state: dict[str, Any], taken: Tensor) -> Tensor:
    """What cautious steps are divided by at ``cautious="last_mean"``; the share of this step is kept."""
    count = gathered(taken.sum(dtype=torch.float32))
    last = state.setdefault(flags.MASK_MEAN, torch.ones_like(count))
    divisor = flags.divisor(last.to(torch.promote_types(taken.dtype, torch.float32)))
    # a step that no element takes tells nothing
    last.copy_(torch.where(count > 0, count / taken.numel(), last))
    return divisor


class Lion(MultiTensorStep, LionLoop):
    """Lion: the sign of an interpolated momentum, with decoupled weight decay. Torch has no class of this name.

    Every element moves by lr, so lr should be 3-10x smaller than AdamW's, and ``weight_decay`` 3-10x larger, as only
    their product matters.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate, a number or a tensor of one element (default: 1e-4).
        betas: Of the interpolation whose sign is taken, and of the average that is kept (default: (0.9, 0.99)).
        weight_decay: Decoupled weight decay (default: 0).
        maximize: Ascend (default: False).
        capturable: The step may be recorded in a CUDA graph (default: False: recorded steps are a plain loop).
        cautious: Elements whose step does not go against their gradient take none, and the others of a tensor a longer
            one: divided by their share, at least 1e-3 (https://arxiv.org/abs/2411.16085); with "last_mean" by their
            share at the step before, and by 1 at the first, which saves a pass (default: False).
        cautious_weight_decay: Weights decay only where the step does not move them away from zero
            (https://arxiv.org/abs/2510.12402) (default: False).
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

    State: ``exp_avg``, of the parameter's shape.

    Raises:
        ValueError: A hyperparameter is out of range.
        RuntimeError: A gradient is sparse.
    """

    rule = LionRule()
    loop_knows_flags = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
        cautious: bool | str = False,
        cautious_weight_decay: bool = False,
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
        check_at_least_zero(lr=lr, weight_decay=weight_decay)
        check_betas(betas)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(
            params, defaults, max_grad_norm=max_grad_norm, capturable=capturable, norm_group=norm_group,
            skip_nonfinite=skip_nonfinite, skip_spikes=skip_spikes, max_skips=max_skips, average=average,
            param_rounding=param_rounding, state_dtype=state_dtype, rounding_seed=rounding_seed, cautious=cautious,
            cautious_weight_decay=cautious_weight_decay, centralize_grads=centralize_grads, agc=agc,
        )  # fmt: skip
