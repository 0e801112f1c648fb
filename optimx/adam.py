"""Adam (https://arxiv.org/abs/1412.6980), and the rule it shares with AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import _compat
from ._step import MultiTensorStep, UpdateRule

__all__ = ["Adam"]


class AdamRule(UpdateRule):
    """One step of Adam: with the weight decay in the gradient, or decoupled from it (AdamW)."""

    structure = ("amsgrad",)
    hyperparameters = ("lr", "betas", "eps", "weight_decay", "maximize", "decoupled_weight_decay")
    _read = itemgetter(*hyperparameters)

    def values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        lr, (beta1, beta2), eps, weight_decay, maximize, decoupled = self._read(group)
        return lr, beta1, beta2, eps, weight_decay, float(maximize), float(decoupled)

    def state_names(self, structure: tuple[Any, ...]) -> tuple[str, ...]:
        (amsgrad,) = structure
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if amsgrad else ("exp_avg", "exp_avg_sq")

    def native(
        self,
        structure: tuple[Any, ...],
        values: tuple[float, ...],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        steps: Sequence[Tensor],
    ) -> None:
        lr, beta1, beta2, eps, weight_decay, maximize, decoupled = values
        (amsgrad,) = structure
        operator = _compat.fused_adamw_ if decoupled else _compat.fused_adam_
        operator(
            params, grads, states[0], states[1], states[2] if amsgrad else [], steps,
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps,
            amsgrad=amsgrad, maximize=bool(maximize),
        )  # fmt: skip

    def kernels(self) -> Any:
        from .triton_kernels import adam

        return adam

    def launch(self, structure: tuple[Any, ...], *args: Any, dtypes: Sequence[torch.dtype], **kwargs: Any) -> None:
        (amsgrad,) = structure
        self.kernels().adam_(*args, dtypes=dtypes[:4], amsgrad=amsgrad, **kwargs)


ADAM = AdamRule()


class Adam(MultiTensorStep, torch.optim.Adam):
    """Adam, a drop-in for :class:`torch.optim.Adam`: same arguments, state and numbers.

    Args beyond torch's:
        max_grad_norm: Clip the gradients of *all* groups to this 2-norm inside the step, without rewriting them
            (default: None, no clipping). :attr:`grad_norm` then holds the norm before clipping.

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
        max_grad_norm: float | None = None,
    ) -> None:
        torch.optim.Adam.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize,
            capturable=capturable, differentiable=differentiable, fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )  # fmt: skip
        self._init_step(max_grad_norm)
