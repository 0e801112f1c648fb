"""Buckets of CPU tensors: torch's own fused operators on the plan's lists; formulas, where there are none, in pieces.

A formula is a handful of passes over memory. Large tensors go through it in pieces that stay in the cache, so that
memory sees each byte once; small ones are copied together, because an operator call costs more than their elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _compat
from ._batch import Batch
from ._buckets import Bucket
from ._call import Call, MixedCall, mix
from ._layout import flat, is_part_of_memory

#: Elements a piece of a large tensor has: 2 MB of float32 a role. Smaller pieces lose more to calls and to threads that
#: wait for each other, larger ones leave the cache (measured from 2**13 to 2**21).
PIECE = 1 << 19


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
        self._flat_grads: dict[Batch, Tensor] = {}
        self._values: Sequence[tuple[Any, ...]] | None = None
        self._pattern: list[int] = []
        self._setting_of_member: Sequence[int] = []
        self._calls: Sequence[Call] = []
        self._homes: list[Tensor] = []
        self._housed: list[Tensor] = []
        self._addresses: list[int] = []

    @property
    def has_formula(self) -> bool:
        """Whether no operator updates the members."""
        return self._staged is None

    def inherit(self, former: Iterable[Bucket]) -> None:
        self._homes = [home for bucket in former if isinstance(bucket, NativeBucket) for home in bucket._homes]

    def matches(self) -> bool:
        """A state whose memory is replaced, by hand or by a plan for other gradients, has left its home."""
        return super().matches() and [*map(Tensor.data_ptr, self._housed)] == self._addresses

    def send(self, grads: Sequence[Tensor], values: Sequence[tuple[Any, ...]]) -> None:
        self._grads = grads
        self._forget()
        if self.has_formula:
            self._merge(*self.host_rows(values))
        elif values is not self._values:
            self._values = values
            self._merge(self.values_of(values), self.groups)

    def _forget(self) -> None:
        """Keep no copies of this step's gradients."""
        self._flat_grads.clear()

    def _flatten(self, batch: Batch, grads: Sequence[Tensor]) -> Tensor:
        """A batch's gradients in one tensor, made once a step."""
        if batch not in self._flat_grads:
            self._flat_grads[batch] = batch.flatten(grads)
        return self._flat_grads[batch]

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
            calls = [
                self.new_call(None if len(members) == 1 else indices, setting_of_member[indices[0]])
                for indices in members.values()
            ]
            self._calls = mix(self, calls, settings) if self._direct is not None and self.rule.by_element else calls
            # now: before the next step somebody may replace the memory
            homed = [pair for call in self._calls for pair in call.settle(self)]
            self._homes = [home for role, home in homed if len(role) > 1]
            self._housed = [*chain.from_iterable(role for role, _ in homed)]
            self._addresses = [*map(Tensor.data_ptr, self._housed)]
        for call in self._calls:
            call.read(settings)

    def new_call(self, members: list[int] | None, index: int) -> Call:
        """Members (None stands for all) with equal settings, those at ``index`` of all settings."""
        return Call(self, members, index)

    def home_of(self, states: Sequence[Tensor]) -> Tensor | None:
        """Let states lie one after the other in memory that can be updated at once; None if they cannot move there.

        They stay the tensors they are. Those that share other memory than former homes of this bucket's states belong
        to a plan for other gradients or to somebody else, who may be another process. A single one need not move.
        """
        if any(state.dtype is not self.compute_dtype for state in states):
            return None
        if len(states) == 1:
            return flat(states[0])
        former = {*map(Tensor.data_ptr, self._homes)}
        for state in states:
            if state.is_shared():
                return None
            if is_part_of_memory(state) and state.untyped_storage().data_ptr() not in former:
                return None
        home = torch.cat([state.view(-1) for state in states])
        offset = 0
        for state in states:
            state.set_(home.untyped_storage(), offset, state.shape, state.stride())
            offset += state.numel()
        return home

    def norms(self, wide: bool = False) -> list[Tensor]:
        """Norms whose norm is the norm of this step's gradients; in float64 with ``wide``."""
        dtype = torch.float64 if wide else self.compute_dtype
        norms: list[Tensor] = []
        for call in self._calls:
            grads = call.pick(self._grads)
            norms += [torch.linalg.vector_norm(self._flatten(batch, grads), dtype=dtype) for batch in call.batches]
            if call.large:
                norms += _compat.foreach_norm([grads[i] for i in call.large], 2.0, dtype=dtype)
        return norms

    def update(self, grads: Sequence[Tensor], control: Tensor | None) -> None:
        _, scale, skip = (0.0, 1.0, 0.0) if control is None else control.tolist()
        if not skip:
            self.count()
            together = False
            if self._direct is not None:
                fewest, most = (0, 0) if self.counts is None else self.counts.steps.aminmax()
                together = bool(fewest == most)
            for call in self._calls:
                if isinstance(call, MixedCall) and call.settings and together:
                    self._update_mixed(call, call.pick(grads), scale, float(most))
                    continue
                for part in call.parts:
                    if self._direct is not None and scale == 1.0:
                        steps = part.first_step if together else part.steps
                        self._direct(part.setting, part.params, part.pick(grads), part.states, steps)
                    else:
                        self._update_in_pieces(part, part.pick(grads), scale)
        self._grads = []
        self._forget()

    def _update_mixed(self, call: MixedCall, grads: Sequence[Tensor], scale: float, step: float) -> None:
        for batch, setting in zip(call.batches, call.settings, strict=True):
            for piece in self._batch(call, batch, grads, scale, by_formula=True):
                p, g, *states = (role[0] for role in (piece.params, piece.grads, *piece.states))
                self.rule.formula_by_element(setting, p, g, states, step, self.temporaries(p))

    def _update_in_pieces(self, call: Call, grads: Sequence[Tensor], scale: float) -> None:
        """Update with gradients times ``scale``, or of mixed dtypes, or by a formula; no gradient is written."""
        # the factor that operators have an argument for
        factor = scale if self._staged is not None else scale * call.setting[0]
        for batch in call.batches:
            self._update_tensors(call.setting, partial(self._batch, call, batch, grads, factor, self.has_formula))
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

    def temporaries(self, like: Tensor, count: int = 3) -> tuple[Tensor, ...]:
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

    def _batch(
        self, call: Call, batch: Batch, grads: Sequence[Tensor], factor: float, by_formula: bool
    ) -> Iterator[Piece]:
        """A batch as one piece: as one tensor a role for a formula, else the tensors themselves."""
        flat_grads = self._flatten(batch, grads)
        scaled = factor != 1.0 or flat_grads.dtype is not self.compute_dtype
        memory = [self.scratch(i, batch.numel) for i in range(1 + len(batch.roles))]
        if scaled:
            flat_grads = memory[0].copy_(flat_grads).mul_(factor)
        copied = [
            slot
            for slot, (role, home) in enumerate(zip(batch.roles, batch.homes, strict=True), 1)
            if home is None and (by_formula or role[0].dtype is not self.compute_dtype)
        ]
        for slot in copied:
            batch.gather(slot, memory[slot])
        if by_formula:
            params, *states = ([m if home is None else home] for m, home in zip(memory[1:], batch.homes, strict=True))
            yield Piece(params, [flat_grads], states, [], batch.sizes, batch.numel)
        else:
            params, *states = (
                batch.views(slot, memory[slot]) if slot in copied else role for slot, role in enumerate(batch.roles, 1)
            )
            working_grads = batch.views(0, memory[0]) if scaled else [grads[i] for i in batch.indices]
            steps = [call.steps[i] for i in batch.indices] if call.steps else []
            yield Piece(params, working_grads, states, steps, batch.sizes, batch.numel)
        for slot in copied:
            batch.scatter(slot, memory[slot])

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
