"""Rprop (http://citeseerx.ist.psu.edu/viewdoc/summary?doi=10.1.1.21.1417)."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Rprop as TorchRprop
from torch.optim.optimizer import ParamsT

from ._engine.averages import Average
from ._engine.guards import Clipping, Spikes
from ._engine.rule import StateKind, UpdateRule
from ._engine.step import MultiTensorStep
from ._engine.storage import StateDtype

__all__ = ["Rprop"]


class RpropRow(NamedTuple):
    """A tensor's hyperparameters in one step: the columns of the kernel's ``HYPER``."""

    factor: float
    eta_minus: float
    eta_plus: float
    smallest: float
    largest: float


class RpropRule(UpdateRule):
    """One step of Rprop. ``lr`` is where step sizes begin, and nothing later."""

    module = "rprop"
    codes = {"prev": False, "step_size": True}
    _read = itemgetter("etas", "step_sizes", "maximize")

    def values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        (eta_minus, eta_plus), (smallest, largest), maximize = self._read(group)
        return eta_minus, eta_plus, smallest, largest, float(maximize)

    def state_names(self, variant: tuple[bool, ...]) -> tuple[str, ...]:
        return "prev", "step_size"

    def kind_of(self, name: str, param: Tensor, group: dict[str, Any], defaults: dict[str, Any]) -> StateKind:
        return StateKind(float(group["lr"]) if name == "step_size" else 0.0)

    def prepare(self, values, scalars):
        eta_minus, eta_plus, smallest, largest, maximize = values
        return RpropRow(-1.0 if maximize else 1.0, eta_minus, eta_plus, smallest, largest), (scalars[0] + 1,)

    def formula(self, variant, row, p, g, states, scratch):
        _, eta_minus, eta_plus, smallest, largest = row
        prev, step_size = states
        factor = torch.mul(g, prev, out=scratch[0]).sign_()
        # masks by arithmetic on whole vectors: masked_fill_ and where branch at every element, 50 times slower where
        # signs are random. The sign bit, stretched to an integer of ones, takes out what turned round, infinite or not
        bits, shift = (torch.int64, 63) if g.dtype is torch.float64 else (torch.int32, 31)
        kept = torch.bitwise_right_shift(factor.view(bits), shift, out=scratch[1].view(bits)).bitwise_not_()
        torch.bitwise_and(g.view(bits), kept, out=prev.view(bits))
        if eta_minus <= 1.0 <= eta_plus:
            # -1, 0, 1 are sent below eta_minus, to 1, and above eta_plus
            factor.mul_(1.0 + eta_plus).add_(1.0).clamp_(eta_minus, eta_plus)
        else:  # a group edited to what the constructor refuses
            factor.copy_(torch.where(factor > 0, eta_plus, torch.where(factor < 0, eta_minus, 1.0)))
        step_size.mul_(factor).clamp_(smallest, largest)
        p.addcmul_(torch.sign(prev, out=scratch[0]), step_size, value=-1)


class Rprop(MultiTensorStep, TorchRprop):
    """Rprop, a drop-in for :class:`torch.optim.Rprop`: same arguments, state and numbers.

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

    rule = RpropRule()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
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
        TorchRprop.__init__(
            self, params, lr, etas, step_sizes, capturable=capturable, foreach=foreach, maximize=maximize,
            differentiable=differentiable,
        )  # fmt: skip
        self._init_step(
            max_grad_norm, norm_group=norm_group, skip_nonfinite=skip_nonfinite, skip_spikes=skip_spikes,
            max_skips=max_skips, average=average, param_rounding=param_rounding, state_dtype=state_dtype,
            rounding_seed=rounding_seed,
        )  # fmt: skip
