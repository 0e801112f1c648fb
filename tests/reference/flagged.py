"""Adam, AdamW and NAdam with flags that torch's classes have not, in torch's operators, one parameter after the other.

Cautious weight decay is https://arxiv.org/abs/2510.12402: an element decays where ``step * param >= 0``. Cautious
steps are https://arxiv.org/abs/2411.16085, with the tensor's mean of the mask, at least 1e-3; with ``"last_mean"`` with
that of the last step that any element took, and 1 at the first. Update clipping is
StableAdamW's (https://arxiv.org/abs/2304.13013), as timm has it: eps is added to the root, and decay is not clipped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import NAdam, Optimizer


class FlaggedLoop(Optimizer):
    """A step of a torch optimizer's groups, in which flags may be set; states have torch's names.

    Args:
        stock: The optimizer, whose groups and defaults these are.
        flags: Set in all groups.
    """

    def __init__(self, stock: Optimizer, **flags: Any) -> None:
        super().__init__(stock.param_groups, stock.defaults)
        self.flags = flags
        self.is_nadam = isinstance(stock, NAdam)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step(group, param, -param.grad if group["maximize"] else param.grad)

    def _step(self, group: dict[str, Any], param: Tensor, g: Tensor) -> None:
        state, (beta1, beta2), decoupled = self.state[param], group["betas"], group["decoupled_weight_decay"]
        if not state:
            state["step"] = torch.zeros(())
            if self.is_nadam:
                state["mu_product"] = torch.ones(())
            names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group.get("amsgrad") else [])]
            state.update({name: torch.zeros_like(param) for name in names})
        state["step"] += 1
        t = float(state["step"])
        if not decoupled:
            g = g + group["weight_decay"] * param
        m, v = state["exp_avg"].lerp_(g, 1 - beta1), state["exp_avg_sq"]
        v.mul_(beta2).add_((1 - beta2) * g * g)
        if group.get("amsgrad"):
            v = state["max_exp_avg_sq"].copy_(torch.maximum(state["max_exp_avg_sq"], v))
        denominator = (v / (1 - beta2**t)).sqrt() + group["eps"]
        average = m / (1 - beta1**t)
        if self.is_nadam:
            mu, next_mu = (beta1 * (1 - 0.5 * 0.96 ** (i * group["momentum_decay"])) for i in (t, t + 1))
            product = float(state["mu_product"]) * mu
            state["mu_product"].fill_(product)
            average = g * (1 - mu) / (1 - product) + m * next_mu / (1 - product * next_mu)
        step = average / denominator
        if self.flags.get("cautious"):
            mask = (step.sign() * g.sign() > 0).to(step.dtype)
            step = step * mask / self._divisor(state, mask).double().clamp(min=1e-3)
        if self.flags.get("update_clipping"):
            step = step / (g / denominator).square().mean().sqrt().clamp(min=1.0)
        kept = 1 - group["lr"] * group["weight_decay"] if decoupled else 1.0
        if self.flags.get("cautious_weight_decay"):
            param.copy_(torch.where(step * param.sign() >= 0, kept * param, param))
        else:
            param.mul_(kept)
        param.sub_(group["lr"] * step)

    def _divisor(self, state: dict[str, Any], mask: Tensor) -> Tensor:
        if self.flags["cautious"] != "last_mean":
            return mask.mean()
        last = state.get("mask_mean", torch.ones(()))
        state["mask_mean"] = mask.mean().float() if mask.any() else last
        return last
