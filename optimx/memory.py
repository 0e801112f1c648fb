"""How much memory an optimizer takes, and how much a step moves, before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ._engine.rule import StateKind
from ._engine.sharding import local
from ._engine.step import MultiTensorStep
from ._engine.storage import MASTER_NAME, kept
from ._table import aligned
from .build import build
from .composite import Composite
from .config import Config

__all__ = ["Memory", "MemoryRow", "memory"]


@dataclass(frozen=True)
class MemoryRow:
    """Parameters that are kept alike.

    Attributes:
        optimizer: Name of the class.
        tensors, elements: How many, in this process.
        kept: How parameters and states are kept, in words: ``"bfloat16, param_remainder int16, exp_avg float32"``.
        params, grads, states: Bytes; companions of parameters are states. A gradient is of the parameter's dtype.
        traffic: Bytes that a step reads and writes, each byte once: gradients, and twice parameters and states.
    """

    optimizer: str
    tensors: int
    elements: int
    kept: str
    params: int
    grads: int
    states: int
    traffic: int

    @property
    def total(self) -> int:
        """Bytes of parameters, gradients and states."""
        return self.params + self.grads + self.states


@dataclass(frozen=True)
class Memory:
    """What :func:`memory` found; prints as a table of bytes a parameter, with the sums of all below.

    Attributes:
        rows: What is kept alike.
    """

    rows: tuple[MemoryRow, ...]

    @property
    def total(self) -> int:
        """Bytes of all parameters, gradients and states."""
        return sum(row.total for row in self.rows)

    @property
    def traffic(self) -> int:
        """Bytes that a step reads and writes."""
        return sum(row.traffic for row in self.rows)

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [("optimizer", "elements", "param", "grad", "state", "step moves", "kept")]
        for row in self.rows:
            sums = row.params, row.grads, row.states, row.traffic
            each = (f"{n_bytes / max(1, row.elements):.4g}" for n_bytes in sums)
            table.append((row.optimizer, f"{row.elements:,}", *each, row.kept))
        lines = ["bytes a parameter", *aligned(table, numbers=range(1, 6))]
        return "\n".join([*lines, f"together {_size(self.total)}; a step moves {_size(self.traffic)}"])


def memory(model: nn.Module | Optimizer, cfg: Config | Mapping[str, Any] | str | None = None) -> Memory:
    """How many bytes parameters, gradients and states take, and a step moves. Computed; nothing is allocated.

    Beside them a step takes scratch memory that does not grow with the model: on a CPU pieces of 2 MB a role, on a GPU
    tables of addresses. Muon's is what it orthogonalizes at a time, which does (see its page).

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
    return Memory(tuple(row for member in members for row in _rows(member)))


def _rows(optimizer: Optimizer) -> list[MemoryRow]:
    if not isinstance(optimizer, MultiTensorStep):
        raise TypeError(f"memory should be that of optimx's optimizers but is asked of: {type(optimizer).__name__}")
    sums: dict[str, Counter[str]] = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            part = local(param)
            kinds = kept(optimizer.rule, param, part, group, optimizer.defaults).kinds
            names = [str(part.dtype), *(f"{name} {kind.dtype or part.dtype}" for name, kind in kinds.items())]
            of_kind = sums.setdefault(", ".join(names).replace("torch.", ""), Counter())
            states = sum(_bytes(kind, part) for kind in kinds.values())
            # a parameter that is but a copy is not read
            of_kind.update(tensors=1, elements=part.numel(), params=part.nbytes, states=states)
            of_kind.update(traffic=(2 if MASTER_NAME in kinds else 3) * part.nbytes + 2 * states)
    name = type(optimizer).__name__
    return [
        MemoryRow(
            name, n["tensors"], n["elements"], kept_as, n["params"], n["params"], n["states"],
            traffic=n["traffic"],
        )
        for kept_as, n in sums.items()
    ]  # fmt: skip


def _bytes(kind: StateKind, param: Tensor) -> int:
    return kind.shape(param).numel() * (kind.dtype or param.dtype).itemsize


def _size(n_bytes: float) -> str:
    for unit in ("B", "KB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.3g} GB"
