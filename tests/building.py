"""Small models that tests build optimizers for, and what is said of a config that nothing is built from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optimx
from optimx import ConfigError


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class ViT(nn.Module):
    """Of a ViT what parameter groups see: stem, position, blocks, norm, head."""

    def __init__(self, depth: int = 12, width: int = 8) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x) + self.pos_embed[0]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def problems(model: nn.Module, cfg: Any, **kwargs: Any) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        optimx.build(model, cfg, **kwargs)
    return [str(problem) for problem in raised.value.problems]
