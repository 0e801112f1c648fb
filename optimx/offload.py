"""Offloading: states of optimizers, and their updates, on the host, while parameters are on a GPU."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._checks import check_instance
from ._engine.averager import N_AVERAGED
from ._engine.offload import state_device
from ._engine.states import own_states
from ._engine.step import MultiTensorStep
from ._engine.twins import HOST, Offload
from .composite import Composite

__all__ = ["offload_states"]


def offload_states(optimizer: Optimizer, *, bucket_mb: float = 32.0, pin_memory: bool = True) -> None:
    """Keep the states of an optimizer on the host, and update there, while its parameters stay on a GPU.

    A step copies the gradients to pinned host memory, updates copies of the parameters there with optimx's CPU step,
    and copies these back. It does so in buckets: while one is updated, the gradients of the next ones arrive and the
    parameters of those before leave. The numbers are those of the CPU step. States that there are already move to the
    host; those that are made or loaded later are made there. Checkpoints are the same with and without.

    Args:
        optimizer: An optimizer of optimx, or a :class:`~optimx.Composite` of such.
        bucket_mb: Megabytes (of 2**20 bytes) of parameters that travel together (default: 32). A larger parameter
            travels alone.
        pin_memory: Copies go through pinned memory; without it nothing overlaps (default: True).

    Raises:
        TypeError: The optimizer, or a member, is not optimx's, or an argument is of the wrong type.
        ValueError: No parameter is on a CUDA device, or ``bucket_mb`` is not above 0. Nothing is changed then.
    """
    settings = Offload(bucket_mb, pin_memory)
    members: list[Any] = [*optimizer.optimizers.values()] if isinstance(optimizer, Composite) else [optimizer]
    for member in members:
        check_instance("optimizer", member, MultiTensorStep, "an optimizer of optimx")
    params = [param for member in members for group in member.param_groups for param in group["params"]]
    if not any(param.is_cuda for param in params):
        devices = ", ".join(dict.fromkeys(str(param.device) for param in params))
        raise ValueError(f"states are offloaded from a CUDA device, but all parameters are on: {devices}")
    for member in members:
        member.offload = settings
        vars(member).pop("_twins", None)
        _bring_states(member)


def _bring_states(optimizer: MultiTensorStep) -> None:
    """Move what there is of the states to the host."""
    with torch.no_grad():
        for param in chain.from_iterable(group["params"] for group in optimizer.param_groups):
            state: Any = optimizer.state.get(param)
            for name, value in state.items() if isinstance(state, dict) else ():
                if isinstance(value, Tensor):
                    state[name] = value.to(state_device(optimizer, param))
        for group in optimizer.param_groups:
            if isinstance(group.get(N_AVERAGED), Tensor):
                group[N_AVERAGED] = group[N_AVERAGED].to(HOST)
        if optimizer.guard_state is not None:
            optimizer.guard_state = {name: vector.to(HOST) for name, vector in optimizer.guard_state.items()}
    own_states(optimizer)
