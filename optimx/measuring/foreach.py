"""Optimizers that torch.optim lacks, written as people write them, on torch's foreach operators.

They are what optimx's own are measured against. Hyperparameters are numbers, and every parameter has a gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

__all__ = ["LAMB", "Lion"]


class _Foreach(torch.optim.Optimizer):
    def lists(self, group: dict[str, Any], *names: str) -> list[list[Tensor]]:
        """Parameters, gradients and states of a group; states begin at zero."""
        params = group["params"]
        for p in params:
            for name in names:
                if name not in self.state[p]:
                    self.state[p][name] = torch.zeros_like(p)
        return [params, [p.grad for p in params], *([self.state[p][name] for p in params] for name in names)]


class Lion(_Foreach):
    """Lion (https://arxiv.org/abs/2302.06675)."""

    def __init__(
        self, params: ParamsT, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params, grads, exp_avgs = self.lists(group, "exp_avg")
            lr, (beta1, beta2), weight_decay = group["lr"], group["betas"], group["weight_decay"]
            if weight_decay != 0:
                torch._foreach_mul_(params, 1 - lr * weight_decay)
            updates = torch._foreach_lerp(exp_avgs, grads, 1 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_add_(params, updates, alpha=-lr)
            torch._foreach_lerp_(exp_avgs, grads, 1 - beta2)


class LAMB(_Foreach):
    """LAMB (https://arxiv.org/abs/1904.00962) with bias correction; without weight decay there is no trust ratio."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params, grads, exp_avgs, exp_avg_sqs = self.lists(group, "exp_avg", "exp_avg_sq")
            (beta1, beta2), weight_decay = group["betas"], group["weight_decay"]
            group["step"] += 1
            bias1, bias2 = 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]
            torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
            torch._foreach_mul_(exp_avg_sqs, beta2)
            torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
            # (m / bias1) / (sqrt(v / bias2) + eps), both corrections on the denominator
            denominators = torch._foreach_sqrt(exp_avg_sqs)
            torch._foreach_mul_(denominators, bias1 / math.sqrt(bias2))
            torch._foreach_add_(denominators, bias1 * group["eps"])
            updates = torch._foreach_div(exp_avgs, denominators)
            if weight_decay != 0:
                torch._foreach_add_(updates, params, alpha=weight_decay)
                param_norms = torch.stack(torch._foreach_norm(params))
                update_norms = torch.stack(torch._foreach_norm(updates))
                ratios = torch.where((param_norms > 0) & (update_norms > 0), param_norms / update_norms, 1.0)
                torch._foreach_mul_(updates, ratios.unbind())
            torch._foreach_add_(params, updates, alpha=-group["lr"])
