"""AdamW: Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import AdamW as TorchAdamW
from torch.optim.optimizer import ParamsT

from ._engine.averages import Average
from ._engine.guards import Clipping, Spikes
from ._engine.storage import StateDtype
from .adam import Adam

__all__ = ["AdamW"]


class AdamW(Adam, TorchAdamW):
    """AdamW, a drop-in for :class:`torch.optim.AdamW`: same arguments, state and numbers.

    Args beyond torch's:
        cautious: Elements whose step does not go against their gradient take none, and the others of a tensor a longer
            one: divided by their share, at least 1e-3 (https://arxiv.org/abs/2411.16085); with "last_mean" by their
            share at the step before, and by 1 at the first, which saves a pass (default: False).
        cautious_weight_decay: Weights decay only where the step does not move them away from zero
            (https://arxiv.org/abs/2510.12402) (default: False).
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

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
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
        # not super(): this class is an optimx.Adam, as torch's AdamW is a torch Adam, with other arguments
        TorchAdamW.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach,
            capturable=capturable, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._init_step(
            max_grad_norm, norm_group=norm_group, skip_nonfinite=skip_nonfinite, skip_spikes=skip_spikes,
            max_skips=max_skips, average=average, param_rounding=param_rounding, state_dtype=state_dtype,
            rounding_seed=rounding_seed, cautious=cautious, cautious_weight_decay=cautious_weight_decay,
            update_clipping=update_clipping, centralize_grads=centralize_grads, agc=agc,
        )  # fmt: skip
