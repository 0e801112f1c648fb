"""GPT-2 small, frozen, with LoRA adapters (https://arxiv.org/abs/2106.09685): ``optimx bench examples/lora.py:model``.

Many small tensors are trained, which is where the time of a step is per tensor rather than per byte.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.gpt2 import GPT2

RANK, ALPHA = 8, 16


class LoRALinear(nn.Module):
    """A frozen linear layer and a trained product of two small matrices beside it."""

    def __init__(self, frozen: nn.Linear, rank: int = RANK) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        weight = frozen.weight
        self.lora_a = nn.Parameter(torch.empty(rank, frozen.in_features, device=weight.device).normal_(std=0.02))
        self.lora_b = nn.Parameter(torch.zeros(frozen.out_features, rank, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + ALPHA / RANK * (x @ self.lora_a.T @ self.lora_b.T)


def with_adapters(model: nn.Module, rank: int = RANK) -> nn.Module:
    """The model with all of its parameters frozen, and adapters for the linear layers of its blocks."""
    model.requires_grad_(False)
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, LoRALinear(child, rank))
    return model


def model() -> nn.Module:
    """1,179,648 trained parameters in 96 tensors, on the device ``meta``: their values cost no step anything."""
    with torch.device("meta"):
        return with_adapters(GPT2())
