"""Schedule-free AdamW (https://arxiv.org/abs/2405.15682)."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._engine.averages import Average
from ._engine.guards import Clipping, Spikes
from ._engine.rule import UpdateRule
from ._engine.storage import StateDtype
from ._loop import FormulaLoop, check_at_least_zero, check_betas
from ._schedule_free import ScheduleFree, ScheduleFreeRule, averaging, check_averaging

__all__ = ["ScheduleFreeAdamW"]


class ScheduleFreeAdamWRow(NamedTuple):
    """A tensor's hyperparameters in one step: the columns of the kernel's ``HYPER``."""

    factor: float
    weight_decay: float
    beta2: float
    beta2_c: float
    bias2: float
    eps: float
    lr: float
    share: float
    y_size: float


class ScheduleFreeAdamWRule(ScheduleFreeRule):
    """One step of schedule-free AdamW."""

    module = "schedule_free_adamw"
    codes = {"exp_avg_sq": True}
    _read = itemgetter(
        "lr", "betas", "eps", "weight_decay", "warmup_steps", "r", "weight_lr_power", "maximize"
    )  # fmt: skip

    def beta(self, group: dict[str, Any]) -> Any:
        return group["betas"][0]

    def values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        lr, (beta1, beta2), *others, maximize = self._read(group)
        return (lr, beta1, beta2, *others, float(maximize))

    def state_names(self, variant: tuple[bool, ...]) -> tuple[str, ...]:
        return "z", "exp_avg_sq"

    def prepare(self, values, scalars):
        lr, beta1, beta2, eps, weight_decay, warmup_steps, r, weight_lr_power, maximize = values
        sizes, counts = averaging(lr, beta1, warmup_steps, r, weight_lr_power, scalars)
        row = ScheduleFreeAdamWRow(
            -1.0 if maximize else 1.0, weight_decay, beta2, 1.0 - beta2, 1.0 - beta2 ** counts[0], eps, *sizes
        )
        return row, counts

    def formula(self, variant, row, p, g, states, scratch):
        _, weight_decay, beta2, beta2_c, bias2, eps, lr, share, y_size = row
        z, exp_avg_sq = states
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=beta2_c)
        denominator = torch.sqrt(exp_avg_sq, out=scratch[0]).div_(torch.sym_sqrt(bias2)).add_(eps)
        step = torch.div(g, denominator, out=scratch[0])
        if weight_decay:
            step.add_(p, alpha=weight_decay)
        p.lerp_(z, share).add_(step, alpha=-y_size)
        z.add_(step, alpha=-lr)


class ScheduleFreeAdamWLoop(FormulaLoop):
    """The plain loop that :class:`ScheduleFreeAdamW` falls back to."""

    rule: ClassVar[UpdateRule] = ScheduleFreeAdamWRule()


class ScheduleFreeAdamW(ScheduleFree, ScheduleFreeAdamWLoop):
    """Schedule-free AdamW: averages its iterates in place of decaying lr. Torch has no class of this name.

    It needs no length of training: at any time, what an evaluation sees is what a schedule that ends then would have
    reached. Names and defaults of arguments are those of ``AdamWScheduleFree`` of the package ``schedulefree``.
    Evaluate, save for inference and export inside ``with optimizer.averaged():``, or between :meth:`eval` and
    :meth:`train`.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate, a number or a tensor of one element, 1 to 10 times AdamW's; it should not decay
            (default: 2.5e-3).
        betas: How near to the average gradients are taken, above 0, and of the average of squared gradients
            (default: (0.9, 0.999)).
        eps: Added to the denominator (default: 1e-8).
        weight_decay: Decoupled weight decay, of the point where gradients are taken (default: 0).
        warmup_steps: Steps in which lr rises linearly (default: 0).
        r: Iterates count in the average with the power ``r`` of their step (default: 0).
        weight_lr_power: And with this power of the largest lr so far, after warmup_steps (default: 2).
        maximize: Ascend (default: False).
        capturable: The step may be recorded in a CUDA graph (default: False).
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

    State: ``step``, ``weight_sum``, ``lr_max``, and ``z`` and ``exp_avg_sq`` of the parameter's shape; in evaluation
    ``y``, what the parameter goes on with.

    Raises:
        ValueError: A hyperparameter is out of range.
        RuntimeError: In a step, the parameters hold averages, a gradient is sparse, or a parameter is complex.
    """

    rule: ClassVar[ScheduleFreeRule] = ScheduleFreeAdamWRule()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        maximize: bool = False,
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
        check_at_least_zero(lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas(betas)
        check_averaging("betas[0]", betas[0], warmup_steps, r, weight_lr_power)
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "warmup_steps": warmup_steps, "r": r,
            "weight_lr_power": weight_lr_power, "maximize": maximize, "train_mode": True,
        }  # fmt: skip
        super().__init__(
            params, defaults, max_grad_norm=max_grad_norm, capturable=capturable, norm_group=norm_group,
            skip_nonfinite=skip_nonfinite, skip_spikes=skip_spikes, max_skips=max_skips, average=average,
            param_rounding=param_rounding, state_dtype=state_dtype, rounding_seed=rounding_seed,
        )  # fmt: skip
