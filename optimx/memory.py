"""How much memory an optimizer takes, and how much a step moves, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ._kept import Memory, MemoryRow, placements_of, rows_of
from .build import build
from .composite import Composite
from .config import Config

__all__ = ["Memory", "MemoryRow", "memory"]


def memory(model: nn.Module | Optimizer, cfg: Config | Mapping[str, Any] | str | None = None) -> Memory:
    """How many bytes parameters, gradients and states take, and a step moves. Computed; nothing is allocated.

    Beside them a step takes scratch memory, of which there is a bound for each row, computed from how the engine works.
    On a CPU these are pieces of 2 MB a role and copies of small tensors; on a GPU tables of addresses, some words a
    tensor and a chunk of 8192 elements. Muon's is what it orthogonalizes at a time (see its page), and that of torch's
    own step is torch's.

    Args:
        model: A model, or an optimizer that there is already.
        cfg: For a model, what :func:`optimx.build` takes.

    Returns:
        A :class:`Memory`; ``print`` it.

    Raises:
        TypeError: A model comes without a config, or an optimizer with one.
        ConfigError: The config is wrong.
    """
    if isinstance(model, Optimizer) and cfg is None:
        optimizer = model
    elif isinstance(model, nn.Module) and cfg is not None:
        optimizer = build(model, cfg).optimizer
    else:
        raise TypeError("memory should be given a model and a config, or an optimizer alone")
    members = optimizer.optimizers.values() if isinstance(optimizer, Composite) else [optimizer]
    return Memory(tuple(row for member in members for row in rows_of(member, placements_of(member))))
