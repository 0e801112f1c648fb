"""Buckets of CPU tensors: torch's own fused operators on the plan's lists; formulas, where there are none, in pieces.

A formula is a handful of passes over memory. Large tensors go through it in pieces that stay in the cache, so that
memory sees each byte once; small ones are copied together, because an operator call costs more than their elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _compat
from ._buckets import Bucket
from ._layout import flat

#: Elements a piece of a large tensor has: 2 MB of float32 a role. Smaller pieces lose more to calls and to threads that
#: wait for each other, larger ones leave the cache (measured from 2**13 to 2**21).
PIECE = 1 << 19
#: Elements of small tensors that are copied together.
BATCH = 1 << 16
#: Contiguous tensors up to this many elements are copied together rather than one by one.
SMALL = 1 << 12


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


class Piece(NamedTuple):
    """Elements to update at once, in the dtype to compute in: a part of a large tensor, or a batch of small ones.

    For an operator the lists hold the tensors of a batch; for a formula they hold one tensor without dimensions of its
    own, in which those of a batch follow each other.

    Attributes:
        grads: Multiplied by their factor.
        steps: Of each tensor.
        sizes: Elements of each of the tensors that lie in it, whole or in part.
        numel: Elements of those tensors, all of them.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[Sequence[Tensor]]
    steps: Sequence[Tensor]
    sizes: Sequence[int]
    numel: int


class _Batch:
    """Small tensors that pass through scratch memory together."""

    def __init__(self, indices: list[int], roles: Sequence[Sequence[Tensor]]) -> None:
        self.indices = indices
        self.roles = [[role[i] for i in indices] for role in roles]
        self.sizes = [tensor.numel() for tensor in self.roles[0]]
        self._views: list[list[Tensor]] = []
        self.flat_grads: Tensor | None = None

    def flatten(self, grads: Sequence[Tensor]) -> Tensor:
        """This step's gradients in one tensor, made once."""
        if self.flat_grads is None:
            self.flat_grads = _compat.flatten_dense_tensors([grads[i] for i in self.indices])
        return self.flat_grads

    def views(self, memory: Sequence[Tensor]) -> list[list[Tensor]]:
        """The members' places in scratch memory, for each role. A thousand views cost more than the step: they stay."""
        if not self._views:
            shapes = [tensor.shape for tensor in self.roles[0]]
            split = [m.split(self.sizes) for m in memory]
            self._views = [[v.view(shape) for v, shape in zip(role, shapes, strict=True)] for role in split]
        return self._views


class Call:
    """Members with equal settings, which are updated together.

    Attributes:
        setting: For an operator the hyperparameters, for a formula the row.
    """

    def __init__(self, bucket: NativeBucket, members: list[int] | None) -> None:
        self._members = members
        self.setting: tuple[Any, ...] = ()
        self.params, *self.states = map(self.pick, (bucket.params, *bucket.states))
        self.roles = (self.params, *self.states)
        small, self.large = split_by_size(self.params)
        self.batches = [_Batch(indices, self.roles) for indices in small]
        self.steps: Sequence[Tensor] = []
        self.first_step: Sequence[Tensor] = []
        if bucket.counts is not None:
            self.steps = self.pick([bucket.counts.views[i] for i in bucket.count_indices])
            # where all counts are equal, one of them does: a thousand fewer tensors to fetch from memory
            self.first_step = [self.steps[0]] * len(self.steps)

    def pick(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors if self._members is None else [tensors[i] for i in self._members]


class NativeBucket(Bucket):
    """Members on a CPU."""

    def finish(self) -> None:
        super().finish()
        # scaled gradients are float32 at least: unscaled AMP gradients would vanish in half precision
        self.compute_dtype = torch.float64 if self.key.dtypes[0] is torch.float64 else torch.float32
        self._direct = self.rule.operator(self.key.structure, self.key.dtypes[0])
        if len(set(self.key.dtypes)) > 1:
            self._direct = None
        self._staged = self.rule.operator(self.key.structure, self.compute_dtype)
        self._scratch: list[Tensor] = []
        self._grads: Sequence[Tensor] = []
        self._flattened = False
        self._values: Sequence[tuple[Any, ...]] | None = None
        self._pattern: list[int] = []
        self._setting_of_member: Sequence[int] = []
        self._calls: Sequence[Call] = []

    def send(self, grads: Sequence[Tensor], values: Sequence[tuple[Any, ...]]) -> None:
        self._grads = grads
        self._forget()
        if self._staged is None:
            self._merge(*self.host_rows(values))
        elif values is not self._values:
            self._values = values
            self._merge(self.values_of(values), self.groups)

    def _forget(self) -> None:
        """Keep no copies of this step's gradients."""
        if self._flattened:
            self._flattened = False
            for call in self._calls:
                for batch in call.batches:
                    batch.flat_grads = None

    def _merge(self, settings: Sequence[tuple[Any, ...]], setting_of_member: Sequence[int] | None) -> None:
        """One call for equal settings; which are equal changes less often than their values."""
        if setting_of_member is None:
            setting_of_member = self._setting_of_member
        distinct: dict[tuple[Any, ...], int] = {}
        pattern = [distinct.setdefault(setting, len(distinct)) for setting in settings]
        if pattern != self._pattern or setting_of_member != self._setting_of_member:
            self._pattern, self._setting_of_member = pattern, setting_of_member
            members: dict[int, list[int]] = {}
            for i, setting in enumerate(setting_of_member):
                members.setdefault(pattern[setting], []).append(i)
            self._calls = [self.new_call(None if len(members) == 1 else indices) for indices in members.values()]
            self._call_settings = [setting_of_member[indices[0]] for indices in members.values()]
        for call, i in zip(self._calls, self._call_settings, strict=True):
            call.setting = settings[i]

    def new_call(self, members: list[int] | None) -> Call:
        """Members with equal settings; None stands for all."""
        return Call(self, members)

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

    def update(self, grads: Sequence[Tensor], control: Tensor | None) -> None:
        _, scale, skip = (0.0, 1.0, 0.0) if control is None else control.tolist()
        if not skip:
            self.count()
            if self._direct is not None and scale == 1.0:
                fewest, most = (0, 0) if self.counts is None else self.counts.steps.aminmax()
                together = bool(fewest == most)
                for call in self._calls:
                    steps = call.first_step if together else call.steps
                    self._direct(call.setting, call.params, call.pick(grads), call.states, steps)
            else:
                self._flattened = True
                for call in self._calls:
                    self._update_in_pieces(call, call.pick(grads), scale)
        self._grads = []
        self._forget()

    def _update_in_pieces(self, call: Call, grads: Sequence[Tensor], scale: float) -> None:
        """Update with gradients times ``scale``, or of mixed dtypes, or by a formula; no gradient is written."""
        # the factor that operators have an argument for
        factor = scale if self._staged is not None else scale * call.setting[0]
        for batch in call.batches:
            self._update_tensors(call.setting, partial(self._batch, call, batch, grads, factor))
        for i in call.large:
            self._update_tensors(call.setting, partial(self._pieces, call, i, grads[i], factor))

    def _update_tensors(self, setting: tuple[Any, ...], pieces: Callable[[], Iterator[Piece]]) -> None:
        """Update one large tensor, or a batch.

        Args:
            setting: See :class:`Call`.
            pieces: Begins a walk over them. What a piece holds is written back when the next one is asked for, so a
                walk must come to its end.
        """
        for piece in pieces():
            if self._staged is not None:
                self._staged(setting, *piece[:4])
            else:
                p, g, *states = (role[0] for role in (piece.params, piece.grads, *piece.states))
                self.rule.formula(self.key.structure, setting, p, g, states, self.temporaries(p))

    def temporaries(self, like: Tensor, count: int = 2) -> tuple[Tensor, ...]:
        """Pieces of scratch memory."""
        first = 2 + len(self.states)
        return tuple(self.scratch(first + i, len(like)) for i in range(count))

    def scratch(self, i: int, numel: int) -> Tensor:
        """Memory that stays, in the cache: fresh memory of that size is mapped anew every time.

        Up to a piece it is always the same memory; longer than a piece are some matrices' rows.
        """
        while len(self._scratch) <= i:
            self._scratch.append(torch.empty(PIECE, dtype=self.compute_dtype, device="cpu"))
        if len(self._scratch[i]) < numel:
            self._scratch[i] = torch.empty(numel, dtype=self.compute_dtype, device="cpu")
        return self._scratch[i][:numel]

    def _batch(self, call: Call, batch: _Batch, grads: Sequence[Tensor], factor: float) -> Iterator[Piece]:
        """A batch as one piece: copied together for a formula, else where its members are."""
        numel = sum(batch.sizes)
        memory = [self.scratch(i, numel) for i in range(1 + len(batch.roles))]
        grad_views, *views = batch.views(memory)
        flat_grads = memory[0]
        if factor == 1.0 and grads[batch.indices[0]].dtype is self.compute_dtype:
            flat_grads = batch.flatten(grads)
            grad_views = [grads[i] for i in batch.indices]
        else:
            flat_grads.copy_(batch.flatten(grads)).mul_(factor)
        staged = [self._staged is None or role[0].dtype is not self.compute_dtype for role in batch.roles]
        for role, copies, is_staged in zip(batch.roles, views, staged, strict=True):
            if is_staged:
                _compat.foreach_copy_(copies, role)
        if self._staged is None:
            params, *states = ([m] for m in memory[1:])
            yield Piece(params, [flat_grads], states, [], batch.sizes, numel)
        else:
            params, *states = (c if s else r for r, c, s in zip(batch.roles, views, staged, strict=True))
            steps = [call.steps[i] for i in batch.indices] if call.steps else []
            yield Piece(params, grad_views, states, steps, batch.sizes, numel)
        for role, copies, is_staged in zip(batch.roles, views, staged, strict=True):
            if is_staged:
                _compat.foreach_copy_(role, copies)

    def _pieces(self, call: Call, i: int, grad: Tensor, factor: float) -> Iterator[Piece]:
        """A large tensor, piece by piece; what is not in the dtype to compute in passes through scratch memory."""
        steps = [call.steps[i]] if call.steps else []
        split = [flat(tensor).split(PIECE) for tensor in (grad, *(role[i] for role in call.roles))]
        for g, *roles in zip(*split, strict=True):
            if factor != 1.0 or g.dtype is not self.compute_dtype:
                scaled = self.scratch(0, len(g))
                if g.dtype is self.compute_dtype:
                    torch.mul(g, factor, out=scaled)
                else:
                    scaled.copy_(g).mul_(factor)
                g = scaled
            working = [
                role if role.dtype is self.compute_dtype else self.scratch(1 + j, len(role)).copy_(role)
                for j, role in enumerate(roles)
            ]
            p, *states = working
            yield Piece([p], [g], [[state] for state in states], steps, [len(p)], grad.numel())
            for role, copy in zip(roles, working, strict=True):
                if copy is not role:
                    role.copy_(copy)
