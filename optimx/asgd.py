"""ASGD: averaged SGD (https://dl.acm.org/doi/10.1137/0330046)."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import ASGD as TorchASGD
from torch.optim.optimizer import ParamsT

from . import _compat
from ._engine.averages import Average
from ._engine.guards import Clipping, Spikes
from ._engine.rule import UpdateRule
from ._engine.step import MultiTensorStep
from ._engine.storage import StateDtype

__all__ = ["ASGD"]


class ASGDRow(NamedTuple):
    """A tensor's hyperparameters in one step: the columns of the kernel's ``HYPER``."""

    factor: float
    l2: float
    decay: float
    eta: float
    mu: float


class ASGDRule(UpdateRule):
    """One step of ASGD. A step uses the ``eta`` and ``mu`` that the last one left."""

    module = "asgd"
    scalars = ("step", "eta", "mu")
    scalars_on_device = True
    _read = itemgetter("lr", "lambd", "alpha", "t0", "weight_decay", "maximize")

    def values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        *numbers, maximize = self._read(group)
        return (*numbers, float(maximize))

    def state_names(self, variant: tuple[bool, ...]) -> tuple[str, ...]:
        return ("ax",)

    def new_scalar(self, name: str, group: dict[str, Any]) -> float:
        return {"step": 0.0, "eta": float(group["lr"]), "mu": 1.0}[name]

    def prepare(self, values, scalars):
        lr, lambd, alpha, t0, weight_decay, maximize = values
        step, eta, mu = scalars
        step += 1
        row = ASGDRow(-1.0 if maximize else 1.0, weight_decay, 1.0 - lambd * eta, eta, mu)
        return row, (step, lr / (1.0 + lambd * lr * step) ** alpha, 1.0 / max(1.0, step - t0))

    def formula(self, variant, row, p, g, states, scratch):
        _, l2, decay, eta, mu = row
        (ax,) = states
        if eta:
            # both decays are SGD's
            _compat.plain_sgd_(p, g, eta, l2 + (1.0 - decay) / eta)
        if mu == 1.0:
            ax.copy_(p)
        else:
            ax.lerp_(p, mu)


class ASGD(MultiTensorStep, TorchASGD):
    """ASGD, a drop-in for :class:`torch.optim.ASGD`: same arguments, state and numbers.

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

    rule = ASGDRule()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
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
        TorchASGD.__init__(
            self, params, lr, lambd, alpha, t0, weight_decay, foreach, maximize, differentiable, capturable
        )  # fmt: skip
        self._init_step(
            max_grad_norm, norm_group=norm_group, skip_nonfinite=skip_nonfinite, skip_spikes=skip_spikes,
            max_skips=max_skips, average=average, param_rounding=param_rounding, state_dtype=state_dtype,
            rounding_seed=rounding_seed,
        )  # fmt: skip
