"""Which tensors are updated together, by which backend, why not by a faster one, and what memory that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from torch.optim import Optimizer

from ._engine import backends
from ._engine.sharding import layout_of
from ._engine.step import MultiTensorStep
from ._kept import Memory, placements_of, rows_of
from ._table import aligned
from .composite import Composite

__all__ = ["Explanation", "explain"]

#: Characters of a line, where it can be broken.
_WIDTH = 80


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
        sharding: How DTensors are laid out over which mesh, else empty.
    """

    backend: str
    tensors: int
    elements: int
    groups: int
    device: str
    dtypes: tuple[str, ...]
    reason: str
    sharding: str = ""


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; prints as a table, or as one for each member of a composite.

    Attributes:
        optimizer: Name of the class; of a member, with its name before it.
        rows: What shares launches; of a composite, those of its members one after the other.
        members: Of a composite, what was found of each member.
        memory: How parameters and states are kept, and what that takes; None for a composite, whose members have it,
            and for other classes than optimx's.
    """

    optimizer: str
    rows: tuple[ExplanationRow, ...]
    members: tuple[Explanation, ...] = ()
    memory: Memory | None = None

    @property
    def table(self) -> list[tuple[str, ...]]:
        """The rows as texts, after one with the names of the columns."""
        rows: list[tuple[str, ...]] = [("backend", "tensors", "elements", "groups", "device", "dtypes")]
        for row in self.rows:
            counts = (f"{row.tensors:,}", f"{row.elements:,}", f"{row.groups:,}")
            rows.append((row.backend, *counts, row.device, _dtypes(row.dtypes)))
        return rows

    def __str__(self) -> str:
        if self.members:
            return "\n\n".join(map(str, self.members))
        lines = [self.optimizer]
        for i, line in enumerate(aligned(self.table, numbers=range(1, 4))):
            lines.append(line)
            if i and self.rows[i - 1].reason:
                lines.append(f"  because: {self.rows[i - 1].reason}")
            if i and self.rows[i - 1].sharding:
                lines.append(f"  parts of DTensors: {self.rows[i - 1].sharding}")
        if self.memory is not None:
            lines += ["", *self.memory.lines(_WIDTH)]
        return "\n".join(lines)


def explain(optimizer: Optimizer) -> Explanation:
    """Show which parameters share a launch, and for the others why torch's own step updates them.

    And how parameters and states are kept, in how many bytes a parameter (see :func:`optimx.memory`).
    A parameter without a gradient is shown as it would be with one of its own dtype. Nothing is changed.

    Args:
        optimizer: Any torch optimizer.

    Returns:
        An :class:`Explanation`; ``print`` it.
    """
    if isinstance(optimizer, Composite):
        members = tuple(_of_member(optimizer, name) for name in optimizer.optimizers)
        return Explanation(type(optimizer).__name__, (*chain.from_iterable(each.rows for each in members),), members)
    rows: dict[tuple[str, str, tuple[str, ...], str, str, object], list[tuple[int, int]]] = {}
    placements = placements_of(optimizer)
    memory = None
    if isinstance(optimizer, MultiTensorStep):
        memory = Memory(rows_of(optimizer, placements))
    each = iter(placements)
    for g, group in enumerate(optimizer.param_groups):
        for param, (key, reason, _) in zip(group["params"], each, strict=False):
            dtypes = (param.dtype,) if key is None else key.dtypes
            backend = backends.TORCH if key is None else key.backend
            names = tuple(str(dtype).removeprefix("torch.") for dtype in dtypes)
            device, sharding = str(param.device), layout_of(param)
            rows.setdefault((backend, device, names, reason, sharding, key), []).append((g, param.numel()))
    return Explanation(
        type(optimizer).__name__,
        tuple(
            ExplanationRow(
                backend,
                tensors=len(members),
                elements=sum(n for _, n in members),
                groups=len({g for g, _ in members}),
                device=device,
                dtypes=dtypes,
                reason=reason,
                sharding=sharding,
            )
            for (backend, device, dtypes, reason, sharding, _), members in rows.items()
        ),
        memory=memory,
    )


def _of_member(composite: Composite, name: str) -> Explanation:
    """What shares launches in a member; where it is not optimx's, also what clipping does to its gradients."""
    optimizer = composite[name]
    found = explain(optimizer)
    rows = found.rows
    if composite.max_grad_norm is not None and not isinstance(optimizer, MultiTensorStep):
        rows = tuple(
            replace(row, reason=f"{row.reason}; its gradients are written when they are clipped") for row in rows
        )
    return replace(found, optimizer=f"{name}: {found.optimizer}", rows=rows)


def _dtypes(dtypes: Sequence[str]) -> str:
    """``float32`` if all are, else each role's own."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    param, grad, *states = dtypes
    return (param if grad == param else f"{param}, grad {grad}") + (
        f", state {'/'.join(dict.fromkeys(states))}" if states else ""
    )
