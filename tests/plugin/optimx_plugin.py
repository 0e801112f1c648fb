"""What a package that brings optimizers and schedulers for optimx looks like."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import LambdaLR

import optimx


@optimx.register_optimizer("plugin_sgd")
class PluginSGD(torch.optim.SGD):
    pass


def plugin_schedule(optimizer: torch.optim.Optimizer, half_life: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.5 ** (step / half_life))
