"""Which tensors are updated together, by which backend, and why not by a faster one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from torch.optim import Optimizer

from . import _backend
from ._plan import classify, sharing_memory
from ._step import MultiTensorStep
from ._table import aligned

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class ExplanationRow:
    """Parameters that share a launch (or, with a ``reason``, torch's own step).

    Attributes:
        backend: ``"triton"``, ``"native"`` or ``"torch"``.
        tensors, elements: How many.
        groups: Parameter groups they come from.
        device: Such as ``"cuda:0"``.
        dtypes: Of parameter, gradient and states.
        reason: Why torch's own step, else empty.
    """

    backend: str
    tensors: int
    elements: int
    groups: int
    device: str
    dtypes: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; prints as a table."""

    optimizer: str
    rows: tuple[ExplanationRow, ...]

    @property
    def table(self) -> list[tuple[str, ...]]:
        """The rows as texts, after one with the names of the columns."""
        rows: list[tuple[str, ...]] = [("backend", "tensors", "elements", "groups", "device", "dtypes")]
        for row in self.rows:
            counts = (f"{row.tensors:,}", f"{row.elements:,}", f"{row.groups:,}")
            rows.append((row.backend, *counts, row.device, _dtypes(row.dtypes)))
        return rows

    def __str__(self) -> str:
        lines = [self.optimizer]
        for i, line in enumerate(aligned(self.table, numbers=range(1, 4))):
            lines.append(line)
            if i and self.rows[i - 1].reason:
                lines.append(f"  because: {self.rows[i - 1].reason}")
        return "\n".join(lines)


def explain(optimizer: Optimizer) -> Explanation:
    """Show which parameters share a launch, and for the others why torch's own step updates them.

    A parameter without a gradient is shown as it would be with one of its own dtype. Nothing is changed.

    Args:
        optimizer: Any torch optimizer.

    Returns:
        An :class:`Explanation`; ``print`` it.
    """
    rows: dict[tuple[str, str, tuple[str, ...], str, object], list[tuple[int, int]]] = {}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    shared = sharing_memory(optimizer, params, params)
    positions = count()
    for g, group in enumerate(optimizer.param_groups):
        for param, position in zip(group["params"], positions, strict=False):
            if not isinstance(optimizer, MultiTensorStep):
                key, reason = None, f"{type(optimizer).__name__} is not an optimx optimizer"
            elif position in shared:
                key, reason = None, shared[position]
            else:
                key, reason = classify(optimizer, param, param if param.grad is None else param.grad, group)
            dtypes = (param.dtype,) if key is None else key.dtypes
            backend = _backend.TORCH if key is None else key.backend
            names = tuple(str(dtype).removeprefix("torch.") for dtype in dtypes)
            rows.setdefault((backend, str(param.device), names, reason, key), []).append((g, param.numel()))
    return Explanation(
        type(optimizer).__name__,
        tuple(
            ExplanationRow(
                backend, len(members), sum(n for _, n in members), len({g for g, _ in members}), device, dtypes, reason
            )
            for (backend, device, dtypes, reason, _), members in rows.items()
        ),
    )


def _dtypes(dtypes: Sequence[str]) -> str:
    """``float32`` if all are, else each role's own."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    param, grad, *states = dtypes
    return (param if grad == param else f"{param}, grad {grad}") + (
        f", state {'/'.join(dict.fromkeys(states))}" if states else ""
    )
