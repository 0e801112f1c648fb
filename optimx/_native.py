"""Buckets of CPU tensors: torch's own fused operators on the plan's lists, in cache-sized pieces where that pays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _compat
from ._buckets import Bucket

if TYPE_CHECKING:
    from ._plan import StepCounts

#: Elements a piece of a large tensor has. Its scaled gradient, 2 MB of float32, stays in the cache; smaller pieces lose
#: more to calls and to threads that wait for each other (measured from 2**14 to 2**22).
PIECE = 1 << 19
#: Elements of small tensors that are flattened together.
BATCH = 1 << 16
#: Contiguous tensors up to this many elements are copied together rather than one by one.
SMALL = 1 << 12


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order of its memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def split_by_size(tensors: Sequence[Tensor]) -> tuple[list[list[int]], list[int]]:
    """Indices of small tensors, batch by batch, and of large (or not contiguous) ones."""
    small: list[list[int]] = []
    large: list[int] = []
    room = 0
    for i, tensor in enumerate(tensors):
        numel = tensor.numel()
        if numel > SMALL or not tensor.is_contiguous():
            large.append(i)
            continue
        if numel > room:
            small.append([])
            room = BATCH
        if small:
            small[-1].append(i)
            room -= numel
    return small, large


class _Batch:
    """Small tensors that are flattened together, with a scratch copy of their gradients."""

    def __init__(self, indices: list[int], params: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.indices = indices
        self._numels = [params[i].numel() for i in indices]
        self._dtype = dtype
        self._scratch: Tensor | None = None
        self.flat: Tensor | None = None

    def flatten(self, grads: Sequence[Tensor]) -> Tensor:
        """This step's gradients in one tensor, made once."""
        if self.flat is None:
            self.flat = _compat.flatten_dense_tensors([grads[i] for i in self.indices])
        return self.flat

    def scaled(self, grads: Sequence[Tensor], scale: float) -> Sequence[Tensor]:
        """Gradients times ``scale``. A thousand views cost more than the step, so scratch memory and views stay."""
        if self._scratch is None:
            self._scratch = torch.empty(sum(self._numels), dtype=self._dtype, device="cpu")
            self._views = self._scratch.split(self._numels)
        self._scratch.copy_(self.flatten(grads)).mul_(scale)
        return self._views


class _Call:
    """Members with equal hyperparameters, which one operator call updates."""

    def __init__(self, bucket: NativeBucket, members: list[int] | None) -> None:
        self._members = members
        steps = [bucket.steps.views[i] for i in bucket.step_indices]
        self.params, self.steps, *self.states = map(self.pick, (bucket.params, steps, *bucket.states))
        small, self.large = split_by_size(self.params)
        self.batches = [_Batch(indices, self.params, bucket.compute_dtype) for indices in small]
        self.values: tuple[Any, ...] = ()
        # where all counts are equal, one of them does: a thousand fewer tensors to fetch from memory
        self.first_step = [self.steps[0]] * len(self.steps)

    def pick(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors if self._members is None else [tensors[i] for i in self._members]


class NativeBucket(Bucket):
    """Members on a CPU."""

    def finish(self, counts: StepCounts, all_states: Iterable[Any]) -> None:
        super().finish(counts, all_states)
        # scaled gradients are float32 at least: unscaled AMP gradients would vanish in half precision
        self.compute_dtype = torch.float64 if self.key.dtypes[0] is torch.float64 else torch.float32
        self._mixed = len(set(self.key.dtypes)) > 1
        self._piece: Tensor | None = None
        self._grads: Sequence[Tensor] = []
        self._flattened = False
        self._values: Sequence[tuple[Any, ...]] = ()
        self._pattern: list[int] = []
        self._calls: list[_Call] = []

    def send(self, grads: Sequence[Tensor], values: Sequence[tuple[Any, ...]]) -> None:
        """Merge groups with equal hyperparameters; which groups are equal changes less often than their values."""
        if values is not self._values:
            self._values = values
            self._merge(values)
        self._grads = grads
        self._forget()

    def _forget(self) -> None:
        """Keep no copies of this step's gradients."""
        if self._flattened:
            self._flattened = False
            for call in self._calls:
                for batch in call.batches:
                    batch.flat = None

    def _merge(self, values: Sequence[tuple[Any, ...]]) -> None:
        distinct: dict[tuple[Any, ...], int] = {}
        pattern = [distinct.setdefault(group_values, len(distinct)) for group_values in values]
        if pattern != self._pattern:
            self._pattern = pattern
            members: dict[int, list[int]] = {}
            for i, group in enumerate(self.groups):
                members.setdefault(pattern[group], []).append(i)
            self._calls = [_Call(self, None if len(members) == 1 else indices) for indices in members.values()]
            self._call_groups = [self.groups[indices[0]] for indices in members.values()]
        for call, group in zip(self._calls, self._call_groups, strict=True):
            call.values = values[group]

    def norms(self, wide: bool = False) -> list[Tensor]:
        """Norms whose norm is the norm of this step's gradients; in float64 with ``wide``."""
        dtype = torch.float64 if wide else self.compute_dtype
        norms: list[Tensor] = []
        self._flattened = True
        for call in self._calls:
            grads = call.pick(self._grads)
            norms += [torch.linalg.vector_norm(batch.flatten(grads), dtype=dtype) for batch in call.batches]
            if call.large:
                norms += _compat.foreach_norm([grads[i] for i in call.large], 2.0, dtype=dtype)
        return norms

    def update(self, grads: Sequence[Tensor], values: Sequence[tuple[Any, ...]], control: Tensor | None) -> None:
        _, scale, skip = (0.0, 1.0, 0.0) if control is None else control.tolist()
        if not skip:
            self.steps.count(self.increments)
            if scale == 1.0 and not self._mixed:
                fewest, most = self.steps.values.aminmax()
                together = bool(fewest == most)
                native, structure = self.rule.native, self.key.structure
                for call in self._calls:
                    steps = call.first_step if together else call.steps
                    native(structure, call.values, call.params, call.pick(grads), call.states, steps)
            else:
                self._flattened = True
                for call in self._calls:
                    self._update_staged(call, call.pick(grads), scale)
        self._grads = []
        self._forget()

    def _update_staged(self, call: _Call, grads: Sequence[Tensor], scale: float) -> None:
        """Update with gradients times ``scale``, or of mixed dtypes, without writing a gradient.

        The operators take neither, so copies of what is not in the dtype to compute in pass through the cache, a
        piece at a time: memory still sees each byte once.
        """
        roles = (call.params, *call.states)
        for batch in call.batches:
            members = [[role[i] for i in batch.indices] for role in roles]
            steps = [call.steps[i] for i in batch.indices]
            self._native_staged(call.values, members, batch.scaled(grads, scale), steps)
        for i in call.large:
            split = [flat(tensor).split(PIECE) for tensor in (grads[i], *(role[i] for role in roles))]
            scratch = self._scratch()
            for grad, *pieces in zip(*split, strict=True):
                scaled = scratch[: len(grad)]
                if grad.dtype is scaled.dtype:
                    torch.mul(grad, scale, out=scaled)
                else:
                    scaled.copy_(grad).mul_(scale)
                self._native_staged(call.values, [[piece] for piece in pieces], [scaled], [call.steps[i]])

    def _scratch(self) -> Tensor:
        """A piece's worth of memory that stays in the cache: fresh memory of that size is mapped anew every time."""
        if self._piece is None:
            self._piece = torch.empty(PIECE, dtype=self.compute_dtype, device="cpu")
        return self._piece

    def _native_staged(
        self,
        values: tuple[Any, ...],
        roles: Sequence[Sequence[Tensor]],
        grads: Sequence[Tensor],
        steps: Sequence[Tensor],
    ) -> None:
        """Call the operator on copies of the roles that are not in the dtype to compute in."""
        dtype = self.compute_dtype
        staged = [role if role[0].dtype is dtype else [tensor.to(dtype) for tensor in role] for role in roles]
        self.rule.native(self.key.structure, values, staged[0], grads, staged[1:], steps)
        for role, copies in zip(roles, staged, strict=True):
            if copies is not role:
                _compat.foreach_copy_(role, copies)
