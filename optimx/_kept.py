"""How parameters and states are kept, what memory that and a step take, and why some states are float32."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._engine.averages import AVERAGE
from ._engine.bucket import BucketKey
from ._engine.placement import Placement, place_all
from ._engine.rule import StateKind, UpdateRule
from ._engine.sharding import local, local_pairs
from ._engine.step import MultiTensorStep
from ._engine.storage import GROUP, LEAST, MASTER_NAME, PARAM_COMPANIONS, STATES, Kept, kept
from ._engine.twins import like_on_host
from ._scratch import scratch_bound
from ._table import aligned, plural, size

__all__ = ["Memory", "MemoryRow", "placements_of", "rows_of"]


class StaysFloat32(NamedTuple):
    """States that are float32 though they were to have fewer bits.

    Attributes:
        names: Of the states.
        tensors: How many parameters have them so.
        reason: Why.
    """

    names: tuple[str, ...]
    tensors: int
    reason: str

    def __str__(self) -> str:
        return f"{', '.join(self.names)} of {plural(self.tensors, 'tensor')}: float32, because {self.reason}"


@dataclass(frozen=True)
class MemoryRow:
    """Parameters that are kept alike.

    Attributes:
        optimizer: Name of the class.
        tensors, elements: How many, in this process.
        kept: How parameters and states are kept, in words: ``"bfloat16, param_remainder int16, exp_avg float32"``.
        params, grads, states: Bytes; companions of parameters are states. A gradient is of the parameter's dtype.
        traffic: Bytes that a step reads and writes, each byte once: gradients, and twice parameters and states.
        scratch: Bytes that a step needs at most beside all that, computed from how the engine works; None: nothing is
            told, because torch's own step updates them, or because matrices are orthogonalized.
        float32: Which states are float32 though they were to have fewer bits, and why.
    """

    optimizer: str
    tensors: int
    elements: int
    kept: str
    params: int
    grads: int
    states: int
    traffic: int
    scratch: int | None = None
    float32: tuple[StaysFloat32, ...] = ()

    @property
    def total(self) -> int:
        """Bytes of parameters, gradients and states."""
        return self.params + self.grads + self.states


@dataclass(frozen=True)
class Memory:
    """What :func:`optimx.memory` found; prints as a table of bytes a parameter, with the sums of all below.

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

    @property
    def scratch(self) -> int | None:
        """Bytes that a step needs at most beside parameters, gradients and states; None if a row tells none."""
        told = [row.scratch for row in self.rows if row.scratch is not None]
        return sum(told) if len(told) == len(self.rows) else None

    @property
    def table(self) -> list[tuple[str, ...]]:
        """The rows as texts, bytes a parameter, after one with the names of the columns."""
        rows: list[tuple[str, ...]] = [
            ("optimizer", "elements", "param", "grad", "state", "scratch", "step moves", "kept")
        ]
        for row in self.rows:
            sums = row.params, row.grads, row.states, row.scratch, row.traffic
            each = ("-" if n is None else _each(n / max(1, row.elements)) for n in sums)
            rows.append((row.optimizer, f"{row.elements:,}", *each, row.kept))
        return rows

    @property
    def notes(self) -> list[str]:
        """What stays float32 and why, and the sums."""
        tensors: Counter[tuple[tuple[str, ...], str]] = Counter()
        for names, n, reason in chain.from_iterable(row.float32 for row in self.rows):
            tensors[names, reason] += n
        reasons = [str(StaysFloat32(names, n, reason)) for (names, reason), n in tensors.items()]
        scratch = "not told" if self.scratch is None else f"at most {size(self.scratch)}"
        return [
            *reasons,
            f"together {size(self.total)}; a step moves {size(self.traffic)}",
            f"scratch memory of a step: {scratch}",
        ]

    def lines(self, width: int | None = None) -> list[str]:
        """The table and the notes, in lines as long as they have to be, or of ``width`` characters."""
        notes = self.notes if width is None else [line for note in self.notes for line in textwrap.wrap(note, width)]
        return ["bytes a parameter", *aligned(self.table, range(1, 7), width), *notes]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def placements_of(optimizer: Optimizer) -> list[Placement]:
    """Where each parameter would go in a step, group after group, if those without a gradient had one of their dtype.

    Nothing is changed, and no other rank is asked.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if not isinstance(optimizer, MultiTensorStep):
        return [Placement(None, f"{type(optimizer).__name__} is not an optimx optimizer")] * len(params)
    grads = [param if param.grad is None else param.grad for param in params]
    shards, grads = local_pairs(params, grads, communicate=False)
    if optimizer.offload is not None:
        shards, grads = ([like_on_host(tensor) for tensor in tensors] for tensors in (shards, grads))
    return [*filter(None, place_all(optimizer, shards, grads, device_counts=optimizer._engine.device_counts))]


@dataclass
class _Sums:
    """What is found of parameters that are kept alike."""

    sizes: Counter[str] = field(default_factory=Counter)
    buckets: dict[BucketKey | None, list[Tensor]] = field(default_factory=dict)
    float32: Counter[tuple[tuple[str, ...], str]] = field(default_factory=Counter)


def rows_of(optimizer: Optimizer, placements: Sequence[Placement]) -> tuple[MemoryRow, ...]:
    """What is kept alike in one optimizer, by where its parameters go."""
    if not isinstance(optimizer, MultiTensorStep):
        raise TypeError(f"memory should be that of optimx's optimizers but is asked of: {type(optimizer).__name__}")
    found: dict[str, _Sums] = {}
    each = iter(placements)
    for group in optimizer.param_groups:
        for param, placement in zip(group["params"], each, strict=False):
            part = local(param)
            of_param = kept(optimizer.rule, param, part, group, optimizer.defaults)
            kinds = of_param.kinds
            if optimizer.average is not None:
                kinds = {**kinds, AVERAGE: StateKind(dtype=optimizer.average.dtype_of(part))}
            names = [str(part.dtype), *(f"{name} {kind.dtype or part.dtype}" for name, kind in kinds.items())]
            sums = found.setdefault(", ".join(names).replace("torch.", ""), _Sums())
            states = sum(_bytes(kind, part) for kind in kinds.values())
            # a parameter that is but a copy is not read
            sums.sizes.update(tensors=1, elements=part.numel(), params=part.nbytes, states=states)
            sums.sizes.update(traffic=(2 if MASTER_NAME in kinds else 3) * part.nbytes + 2 * states)
            sums.buckets.setdefault(placement.key, []).append(part)
            sums.float32.update(_still_float32(optimizer.rule, group, param, of_param))
    return tuple(_row(optimizer, kept_as, sums) for kept_as, sums in found.items())


def _row(optimizer: MultiTensorStep, kept_as: str, sums: _Sums) -> MemoryRow:
    clips = optimizer.max_grad_norm is not None
    bounds = [
        None if key is None else scratch_bound(optimizer.rule, key, parts, clips) for key, parts in sums.buckets.items()
    ]
    told = [bound for bound in bounds if bound is not None]
    float32 = tuple(StaysFloat32(names, n, reason) for (names, reason), n in sums.float32.items())
    n = sums.sizes
    return MemoryRow(
        type(optimizer).__name__, n["tensors"], n["elements"], kept_as, n["params"], n["params"], n["states"],
        n["traffic"], sum(told) if len(told) == len(bounds) else None, float32,
    )  # fmt: skip


def _still_float32(
    rule: UpdateRule, group: Mapping[str, Any], whole: Tensor, of_param: Kept
) -> list[tuple[tuple[str, ...], str]]:
    """Names of states that are float32 though their group asks for fewer bits, with what they have as a reason."""
    asked = group.get("state_dtype")
    names: dict[str, list[str]] = {}
    for name, kind in of_param.kinds.items():
        wanted = asked.get(name) if isinstance(asked, Mapping) else asked
        # codes have a name of their own, and companions are asked for by no name
        if wanted not in STATES or kind.dtype is not torch.float32 or kind.each > 1 or name in PARAM_COMPANIONS:
            continue
        if name in rule.averages:
            reason = "averages over rows, over columns and of vectors take next to nothing"
        elif name not in rule.codes:
            reason = "sums and maxima are never coded"
        elif whole.numel() < LEAST:
            reason = f"they have fewer than {LEAST} elements"
        else:
            reason = f"the length of their rows (for Adafactor, or columns) is no multiple of {GROUP}, as of scales"
        names.setdefault(reason, []).append(name)
    return [(tuple(of_reason), reason) for reason, of_reason in names.items()]


def _bytes(kind: StateKind, param: Tensor) -> int:
    return kind.shape(param).numel() * (kind.dtype or param.dtype).itemsize


def _each(n_bytes: float) -> str:
    """Bytes a parameter: of few parameters they may be many."""
    return f"{n_bytes:.4g}" if n_bytes < 1000 else f"{n_bytes:,.0f}"
