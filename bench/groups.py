"""A step with layer-wise learning rates beside one of a single group, on a CPU: ``python -m bench.groups``."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn
from torch.optim import Optimizer

import optimx

WIDTHS = {"ViT-Ti": 192, "ViT-S": 384, "ViT-B": 768}
ROUNDS = {"ViT-Ti": 100, "ViT-S": 60, "ViT-B": 24}
WARMUP = 4
GROUPS = {"one group": {"no_decay": []}, "layer decay": {"layer_decay": 0.75}}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)


class ViT(nn.Module):
    """The parameters of a ViT of 12 layers on 224 x 224 pixels in patches of 16."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 197, width))
        self.patch_embed = nn.Conv2d(3, width, 16, 16)
        self.blocks = nn.ModuleList(Block(width) for _ in range(12))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1000)


def optimizer_of(width: int, groups: dict) -> Optimizer:
    model = ViT(width)
    for param in model.parameters():
        param.grad = torch.full_like(param, 1e-3)
    return optimx.build(model, {"optimizer": {"weight_decay": 0.05}, "groups": groups}).optimizer


def main() -> None:
    torch.set_num_threads(1)
    print(f"AdamW, float32, one thread, torch {torch.__version__}; medians of rounds that take turns")
    for name, width in WIDTHS.items():
        one, layered = (optimizer_of(width, groups) for groups in GROUPS.values())
        times: dict[Optimizer, list[float]] = {one: [], layered: []}
        for i in range(WARMUP + ROUNDS[name]):
            for optimizer in (one, layered) if i % 2 else (layered, one):
                start = time.perf_counter()
                optimizer.step()
                times[optimizer].append(time.perf_counter() - start)
        medians = {optimizer: statistics.median(seconds[WARMUP:]) for optimizer, seconds in times.items()}
        print(
            f"{name:6}  1 group {1e3 * medians[one]:7.2f} ms  {len(layered.param_groups)} groups "
            f"{1e3 * medians[layered]:7.2f} ms  ratio {medians[layered] / medians[one]:.3f}"
        )


if __name__ == "__main__":
    main()
