"""Offloading: where the states of an optimizer lie whose parameters are on a GPU, and how they get there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .optimizer import EngineOptimizer
from .twins import HOST


def state_device(optimizer: EngineOptimizer, param: Tensor) -> torch.device:
    """Where the states of a parameter lie."""
    return HOST if optimizer.offload is not None and param.is_cuda else param.device


def is_offloaded(optimizer: EngineOptimizer, param: Tensor) -> bool:
    """Whether the states of a parameter lie on the host, and it does not."""
    return state_device(optimizer, param) != param.device


class Loading:
    """What stands for the offloaded parameters of an optimizer while a checkpoint is loaded.

    Torch casts what it loads to the device and dtype of the parameters, and all states may have no place on a GPU.
    """

    def __init__(self, optimizer: EngineOptimizer) -> None:
        self._optimizer = optimizer
        self._param_of: dict[Tensor, Tensor] = {}

    def begin(self) -> None:
        """Put tensors without elements into the groups."""
        for group in self._optimizer.param_groups if self._optimizer.offload is not None else ():
            for i, param in enumerate(group["params"]):
                if is_offloaded(self._optimizer, param):
                    stand_in = group["params"][i] = torch.empty(0, dtype=param.dtype, device=HOST)
                    self._param_of[stand_in] = param

    def end(self) -> None:
        """Let groups and states be those of the parameters again."""
        if not self._param_of:
            return
        param_of, self._param_of = self._param_of, {}
        for group in self._optimizer.param_groups:
            group["params"] = [param_of.get(param, param) for param in group["params"]]
        state: Any = self._optimizer.state
        entries = [*state.items()]
        state.clear()
        state.update((param_of.get(key, key), entry) for key, entry in entries)
