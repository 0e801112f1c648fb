"""LAMB (https://arxiv.org/abs/1904.00962)."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from . import _compat
from ._checks import above
from ._engine import flags
from ._engine.averages import Average
from ._engine.guards import Clipping, Spikes
from ._engine.optimizer import evaluated
from ._engine.rule import UpdateRule, subtract_
from ._engine.step import MultiTensorStep
from ._engine.storage import StateDtype
from ._loop import as_number, as_real, check_at_least_zero, check_betas, each_parameter

__all__ = ["LAMB"]


class LAMBRow(NamedTuple):
    """A tensor's hyperparameters in one step: the columns of the kernel's ``HYPER``."""

    factor: float
    beta1_c: float
    beta2: float
    beta2_c: float
    bias1: float
    bias2_sqrt: float
    eps: float
    weight_decay: float
    size: float
    largest: float


class LAMBRule(UpdateRule):
    """One step of LAMB. Both norms of a tensor come from all of it, so it walks twice."""

    module = "lamb"
    codes = {"exp_avg": False, "exp_avg_sq": True}
    walk = "measured"
    flags = optional_settings = ("cautious_weight_decay",)
    temporaries = 1
    knows_moved = True
    # the kernels need a row for each tensor, and rows are that where they are made on the device
    scalars_on_device = True
    _read = itemgetter(
        "lr", "betas", "eps", "weight_decay", "bias_correction", "max_trust_ratio", "always_adapt", "maximize"
    )

    def group_variant(self, group: dict[str, Any]) -> tuple[bool, ...]:
        return flags.variant(self, group)

    def values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        lr, (beta1, beta2), eps, weight_decay, corrected, largest, always_adapt, maximize = self._read(group)
        largest = math.inf if largest is None else largest
        return lr, beta1, beta2, eps, weight_decay, float(corrected), largest, float(always_adapt), float(maximize)

    def state_names(self, variant: tuple[bool, ...]) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    def prepare(self, values, scalars):
        lr, beta1, beta2, eps, weight_decay, corrected, largest, always_adapt, maximize = values
        step = scalars[0] + 1
        row = LAMBRow(
            -1.0 if maximize else 1.0,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            1.0 - beta1**step if corrected else 1.0,
            math.sqrt(1.0 - beta2**step) if corrected else 1.0,
            eps,
            weight_decay,
            lr,
            largest if weight_decay or always_adapt else 0.0,
        )
        return row, (step,)

    def advance(self, variant, row, p, g, states, scratch):
        # what Adam makes of zeros
        _compat.uncorrected_adam_(
            scratch[0].zero_(), g, *states, lr=-row.bias2_sqrt / row.bias1, beta1=1.0 - row.beta1_c, beta2=row.beta2,
            weight_decay=0.0, eps=row.eps * row.bias2_sqrt,
        )  # fmt: skip
        return _with_decay(variant, row, p, scratch[0]), p, scratch[0]

    def step_of_moved(self, variant, row, p, states, scratch):
        m, v = states
        (out,) = scratch
        torch.sqrt(v, out=out).mul_(row.bias1 / row.bias2_sqrt).add_(row.eps * row.bias1)
        return _with_decay(variant, row, p, torch.div(m, out, out=out))

    def factors(self, variant, row, squares, numels):
        p_norm, step_norm = squares.sqrt()
        # a norm of 0 tells nothing
        ratio = torch.where((p_norm == 0) | (step_norm == 0), 1.0, p_norm / step_norm)
        return ratio.clamp(max=row.largest) if row.largest else torch.ones_like(ratio)

    def take(self, variant, row, p, step, factor, scratch):
        subtract_(p, step, row.size, factor)


def _with_decay(variant: tuple[bool, ...], row: LAMBRow, p: Tensor, step: Tensor) -> Tensor:
    """A step, to which weight decay is added."""
    if not row.weight_decay:
        return step
    if variant and variant[0]:
        # signs, because products may underflow
        p = torch.where(torch.sign(p).mul_(step) < 0, 0.0, p)
    return step.add_(p, alpha=row.weight_decay)


class LAMBLoop(Optimizer):
    """LAMB, one parameter after the other: any device, complex numbers; what :class:`LAMB` falls back to."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = evaluated(closure)
        for group, param, grad, state in each_parameter(self):
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=_compat.scalar_dtype(False), device=param.device)
            for name in ("exp_avg", "exp_avg_sq"):
                if name not in state:
                    state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
            p, g, exp_avg, exp_avg_sq = as_real(param, grad, state["exp_avg"], state["exp_avg_sq"])
            beta1, beta2 = group["betas"]
            state["step"] += 1
            # in float64: bias corrections of the first steps lose four digits in float32
            step = state["step"].double() if param.device.type != "mps" else state["step"]
            exp_avg.lerp_(g, 1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            bias1, bias2 = (1 - beta1**step, 1 - beta2**step) if group["bias_correction"] else (1.0, 1.0)
            direction = exp_avg / bias1 / ((exp_avg_sq / bias2).sqrt() + group["eps"])
            if group["weight_decay"] != 0:
                decaying = p
                if group.get("cautious_weight_decay"):
                    decaying = torch.where(direction * p.sign() < 0, 0.0, p)
                direction.add_(decaying, alpha=group["weight_decay"])
            if group["weight_decay"] != 0 or group["always_adapt"]:
                p_norm, norm = torch.linalg.vector_norm(p), torch.linalg.vector_norm(direction)
                ratio = torch.where((p_norm == 0) | (norm == 0), 1.0, p_norm / norm)
                direction.mul_(ratio.clamp(max=group["max_trust_ratio"]) if group["max_trust_ratio"] else ratio)
            p.sub_(direction.mul_(as_number(group["lr"])))
        return loss


class LAMB(MultiTensorStep, LAMBLoop):
    """LAMB: Adam whose step in each tensor is as long as the tensor, times lr. Torch has no class of this name.

    For large batches, where one learning rate fits no two layers. Tensors whose group has ``weight_decay=0`` (biases
    and norms, mostly) take Adam's step as it is, unless ``always_adapt``.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate, a number or a tensor of one element (default: 1e-3).
        betas: Of the averages of gradient and squared gradient (default: (0.9, 0.999)).
        eps: Added to the denominator (default: 1e-6).
        weight_decay: Added to the step before its length is measured (default: 0.01).
        bias_correction: Correct the averages for their zero start (default: True).
        max_trust_ratio: Largest factor that a tensor's step is scaled by; 1 only shortens (default: None, no limit).
        always_adapt: Scale also the steps of tensors without weight decay (default: False).
        normalize_grads: Divide the gradients of *all* groups by their common 2-norm inside the step, as NVLAMB does
            (default: False). ``max_grad_norm=1.0`` divides only where the norm is larger, as apex's FusedLAMB does.
            A setting of the whole optimizer.
        maximize: Ascend (default: False).
        capturable: The step may be recorded in a CUDA graph (default: False: recorded steps are a plain loop).
        cautious_weight_decay: Weights decay only where Adam's step does not move them away from zero
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

    State: ``step``, and ``exp_avg`` and ``exp_avg_sq`` of the parameter's shape.

    Raises:
        ValueError: A hyperparameter is out of range, or both ``max_grad_norm`` and ``normalize_grads`` are given.
        RuntimeError: A gradient is sparse.
    """

    rule = LAMBRule()
    loop_knows_flags = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool = True,
        max_trust_ratio: float | None = None,
        always_adapt: bool = False,
        normalize_grads: bool = False,
        maximize: bool = False,
        capturable: bool = False,
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
        check_at_least_zero(lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas(betas)
        if max_trust_ratio is not None:
            above(0).check("max_trust_ratio", max_trust_ratio)
        if normalize_grads and max_grad_norm is not None:
            raise ValueError(f"max_grad_norm should be None with normalize_grads=True but is: {max_grad_norm}")
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": bias_correction,
            "max_trust_ratio": max_trust_ratio, "always_adapt": always_adapt, "maximize": maximize,
        }  # fmt: skip
        super().__init__(
            params, defaults, max_grad_norm=max_grad_norm, capturable=capturable, norm_group=norm_group,
            skip_nonfinite=skip_nonfinite, skip_spikes=skip_spikes, max_skips=max_skips, average=average,
            param_rounding=param_rounding, state_dtype=state_dtype, rounding_seed=rounding_seed,
            cautious_weight_decay=cautious_weight_decay, centralize_grads=centralize_grads, agc=agc,
        )  # fmt: skip
        self.normalize_grads = normalize_grads
