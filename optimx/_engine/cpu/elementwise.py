"""Buckets of CPU tensors: torch's own fused operators on the plan's lists; formulas, where there are none, in pieces.

A formula is a handful of passes over memory. Large tensors go through it in pieces that stay in the cache, so that
memory sees each byte once; small ones are copied together, because an operator call costs more than their elements.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ... import _compat
from ..bucket import Bucket, Members
from ..layout import flat
from ..matrices import Scratch
from ..rounds import Update
from ..rule import Row
from ..twins import Workspace
from .averaged import Places
from .batch import Batch
from .call import MANY, Call, MixedCall, mix
from .coder import Coder
from .compiled import CompiledUpdates, is_asked
from .piece import PIECE, Piece, Walk
from .watched import Watched


class NativeBucket(Bucket):
    """Members on a CPU.

    Attributes:
        takes_riders: Every element is updated in one piece, around which a watched step can measure.
    """

    takes_riders = True

    def finish(self, known_scalars: Container[int]) -> None:
        super().finish(known_scalars)
        # scaled gradients are float32 at least: unscaled AMP gradients would vanish in half precision
        self.compute_dtype = torch.float64 if self.key.dtypes[0] is torch.float64 else torch.float32
        self._direct = self.rule.operator(self.key.variant, self.key.dtypes[0])
        if len(set(self.key.dtypes)) > 1 or self.key.formats:
            self._direct = None
        self._staged = self.rule.operator(self.key.variant, self.compute_dtype)
        workspace = self._workspace
        self._scratch: list[Tensor] = [] if workspace is None else workspace.pieces[self.compute_dtype]
        self._flat_grads: dict[Batch, Tensor] = {}
        self._values: Sequence[tuple[Any, ...]] | None = None
        self._pattern: list[int] = []
        self._row_of_each: Sequence[int] = []
        self._calls: Sequence[Call] = []
        self._watched: Watched | None = None
        self._average_weight: float | None = None
        self._places: Places | None = None
        self._average_addresses: list[int] = []
        #: Of the kind that :meth:`_new_compiled` makes; None: formulas are torch's operators.
        self._compiled: Any = None
        #: Walks instead of this bucket where roles are kept in formats of their own.
        self.coder = Coder(self, self.scratch_for("codecs")) if self.key.formats else None
        self._addresses = self._all_addresses() if self.compares_addresses else []

    @property
    def _workspace(self) -> Workspace | None:
        """Scratch memory of this bucket and others; None: it has its own, in which nobody writes while it waits."""
        return None if self.key.transfer is None or self.meets else self.key.transfer.workspace

    def scratch_for(self, purpose: str) -> Scratch:
        """Memory that stays, by name."""
        return Scratch(self.key.device) if self._workspace is None else self._workspace.scratches[purpose]

    @property
    def has_formula(self) -> bool:
        """Whether no operator updates the members."""
        return self._staged is None

    @property
    def compares_addresses(self) -> bool:
        # where it matters how members lie to each other: to a formula, or to one that takes rows by element
        return self.has_formula or (bool(self.rule.by_element) and len({*self.groups}) >= MANY)

    def matches(self) -> bool:
        """What gets other memory, by hand, may not lie beside its neighbours any more, or lie in another's."""
        return super().matches() and (not self.compares_addresses or self._all_addresses() == self._addresses)

    def _all_addresses(self) -> list[int]:
        return [*map(Tensor.data_ptr, chain(self.members.params, *self.members.states, self.means))]

    def release(self) -> None:
        super().release()
        # copies of this step's gradients
        self._flat_grads.clear()
        self._average_weight = None

    def send(self, values: Sequence[tuple[Any, ...]]) -> None:
        if self.has_formula:
            rows, row_of_member = self.host_rows(values)
            self._merge(rows, None if row_of_member is None else row_of_member.tolist())
        elif values is not self._values:
            self._values = values
            self._merge(self.values_of(values), self.groups)

    def _flatten(self, batch: Batch, grads: Sequence[Tensor]) -> Tensor:
        """A batch's gradients in one tensor, made once a step."""
        if batch not in self._flat_grads:
            self._flat_grads[batch] = batch.flatten(grads)
        return self._flat_grads[batch]

    def _merge(self, rows: Sequence[tuple[Any, ...]], row_of_member: Sequence[int] | None) -> None:
        """One call for equal rows; which are equal changes less often than their values."""
        if row_of_member is None:
            row_of_member = self._row_of_each
        distinct: dict[tuple[Any, ...], int] = {}
        pattern = [distinct.setdefault(row, len(distinct)) for row in rows]
        if pattern != self._pattern or row_of_member != self._row_of_each:
            self._pattern, self._row_of_each = pattern, row_of_member
            members: dict[int, list[int]] = {}
            for i, row in enumerate(row_of_member):
                members.setdefault(pattern[row], []).append(i)
            calls = [
                self.new_call(None if len(members) == 1 else indices, row_of_member[indices[0]])
                for indices in members.values()
            ]
            if self._direct is not None and self.rule.by_element:
                self._calls = mix(self, calls, rows, self.compute_dtype)
            else:
                self._calls = calls
        for call in self._calls:
            call.read(rows)

    def new_call(self, members: list[int] | None, index: int) -> Call:
        """Members (None stands for all) with equal rows, those at ``index`` of all rows."""
        return Call(self, members, index, by_formula=self.has_formula, room=PIECE)

    def compile(self, control: Tensor | None) -> None:
        self._compiled = self._new_compiled() if self.has_formula and is_asked() else None

    def _new_compiled(self) -> Any:
        """Compiled formulas for the calls of this step; None if they cannot be had."""
        dtypes = self.key.dtypes[: 1 + self.n_roles]
        updates = CompiledUpdates(self.rule, self.key.variant, self.compute_dtype, dtypes)
        kinds = {self._takes_wholes} if any(call.large for call in self._calls) else set()
        if any(call.batches for call in self._calls):
            kinds.add(False)
        return updates if updates.is_ready([call.row for call in self._calls], kinds) else None

    @property
    def _takes_wholes(self) -> bool:
        """Whether a compiled formula takes large tensors as they are, not in pieces."""
        return self.coder is None and self._watched is None

    def norms(self, wide: bool = False) -> list[Tensor]:
        """Norms whose norm is the norm of this step's gradients; in float64 with ``wide``."""
        dtype = torch.float64 if wide else self.compute_dtype
        norms: list[Tensor] = []
        for call in self._calls:
            members = call.of(self.members)
            for batch in call.batches:
                norms.append(torch.linalg.vector_norm(self._flatten(batch, batch.of(members).grads), dtype=dtype))
            if call.large:
                norms += _compat.foreach_norm([members.grads[i] for i in call.large], 2.0, dtype=dtype)
        return norms

    def carry(self, sums: Sequence[str]) -> Sequence[str]:
        computes = all(dtype is self.compute_dtype for dtype in self.key.dtypes)
        # an operator on tensors of 16 bits rounds otherwise than on copies of more
        if not self.takes_riders or self.coder is not None or not (self._direct is None or computes):
            return ()
        numels = [param.numel() for param in self.members.params]
        self._watched = Watched(sums, numels, self.state_names, self.key.dtypes[0])
        return sums

    def carried(self) -> Iterator[tuple[Sequence[str], Tensor]]:
        if self._watched is not None:
            yield self._watched.names, self._watched.numbers()
            self._watched = None

    def carry_averages(self, weight: Tensor) -> bool:
        averages = self.averages
        if self.coder is not None or weight.device.type != "cpu" or len({average.dtype for average in averages}) != 1:
            return False
        addresses = [*map(Tensor.data_ptr, averages)]
        if self._places is None or addresses != self._average_addresses:
            self._places, self._average_addresses = Places(self.members.params, averages), addresses
        self._average_weight = float(weight)
        return True

    def update(self, control: Tensor | None) -> Update:
        _, scale, skip = (0.0, 1.0, 0.0) if control is None else control.tolist()
        if not skip:
            self.count()
            yield from self.take_step(scale)
            if self._places is not None and self._average_weight is not None:
                self._places.move(self.averages, self.members.params, self._average_weight)

    def take_step(self, scale: float) -> Update:
        """Update all members with gradients times ``scale``; counts are those of after the step."""
        step: float | None = 0.0
        if self._direct is not None and self.scalars is not None:
            step = self.scalars.common_step(self.members.scalars[0])
        for call in self._calls:
            if isinstance(call, MixedCall) and call.values and step is not None:
                self._update_mixed(call, scale, step)
                continue
            for part in call.parts:
                members = part.of(self.members)
                direct = self._direct if scale == 1.0 and self._watched is None else None
                if direct is not None and self.rule.rounds_once(part.row, self.key.dtypes[0]):
                    params, grads, states, scalars = members
                    steps: Sequence[Tensor] = scalars[0] if scalars else ()
                    if step is not None:
                        # where all counts are equal, one of them does: a thousand fewer tensors to fetch from memory
                        steps = [*steps[:1]] * len(steps)
                    direct(part.row, params, grads, states, steps)
                else:
                    for indices, pieces in self.walks(part, members, scale):
                        self._update_tensors(part.row, self._around(part, indices, pieces, scale))
        yield from ()

    def _update_mixed(self, call: MixedCall, scale: float, step: float) -> None:
        members = call.of(self.members)
        for batch, values in zip(call.batches, call.values, strict=True):
            # counted already
            row, _ = self.rule.prepare(values, (step - 1.0,))
            pieces = partial(self._batch, batch, members, scale * row[0], by_formula=True)
            for piece in self._around(call, batch.indices, pieces, scale)():
                self._formula(row, piece)

    def _around(self, call: Call, indices: Sequence[int], pieces: Walk, scale: float) -> Walk:
        """The same walk, measured if the step is watched.

        Args:
            call: Whose tensors it is over.
            indices: Of these.
            pieces: Begins it.
            scale: Of the gradients, but for their sign.
        """
        return pieces if self._watched is None else partial(self._watched.walk, call.of_bucket(indices), pieces, scale)

    def _formula(self, row: Row, piece: Piece) -> None:
        if self._compiled is not None:
            tensors = [role[0] for role in (piece.params, piece.grads, *piece.states)]
            self._compiled.update(row, tensors, piece.factor, stored=piece.stored)
            return
        p, g, *states = (role[0] for role in (piece.params, piece.grads, *piece.states))
        self.rule.formula(self.key.variant, row, p, g, states, self.temporaries(p))

    def walks(self, call: Call, members: Members, scale: float) -> Iterator[tuple[Sequence[int], Walk]]:
        """Walks over a call's large tensors, and over its batches: for mixed dtypes, other gradients, formulas.

        Args:
            call: The call.
            members: Its tensors.
            scale: Of the gradients, none of which is written.

        Yields:
            Which of the call's members are walked over, and what begins a walk.
        """
        # the factor that operators have an argument for
        factor = scale if self._staged is not None else scale * call.row[0]
        if self.coder is not None:
            yield from self.coder.walks(call, members, factor)
            return
        for batch in chain(call.batches, call.bundles):
            yield batch.indices, partial(self._batch, batch, members, factor, self.has_formula)
        for i in call.alone:
            yield [i], partial(self._pieces, i, members, factor)

    def _update_tensors(self, row: tuple[Any, ...], pieces: Walk) -> None:
        """Update one large tensor, or a batch.

        Args:
            row: See :class:`Call`.
            pieces: Begins a walk over them. What a piece holds is written back when the next one is asked for, so a
                walk must come to its end.
        """
        for piece in pieces():
            if self._staged is not None:
                self._staged(row, *piece[:4])
            else:
                self._formula(row, piece)

    def temporaries(self, like: Tensor, count: int = 3) -> tuple[Tensor, ...]:
        """Pieces of scratch memory."""
        first = 1 + self.n_roles
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

    def _batch(self, batch: Batch, members: Members, factor: float, by_formula: bool) -> Iterator[Piece]:
        """A batch as one piece: as one tensor a role for a formula, else the tensors themselves."""
        params, grads, states, scalars = batch.of(members)
        roles = (params, *states)
        working_grads = self.batch_grads(batch, grads, factor, by_formula)
        # a formula takes one tensor a role
        whole = [
            batch.where_they_are(role) if i and by_formula and batch.together and self._computes_in(role) else None
            for i, role in enumerate(roles)
        ]
        copied = [
            slot
            for slot, (role, tensor) in enumerate(zip(roles, whole, strict=True), 1)
            if tensor is None and (by_formula or not self._computes_in(role))
        ]
        memory = {slot: self.scratch(slot, batch.numel) for slot in copied}
        for slot in copied:
            batch.gather(slot, roles[slot - 1], memory[slot])
        if by_formula:
            p, *others = ([memory[i] if tensor is None else tensor] for i, tensor in enumerate(whole, 1))
            yield Piece(p, working_grads, others, [], batch.sizes, batch.numel)
        else:
            working, *working_states = (
                batch.views(slot, role, memory[slot]) if slot in copied else role for slot, role in enumerate(roles, 1)
            )
            steps = scalars[0] if scalars else []
            join = batch.flatten if batch.are_small and len(batch.sizes) > 1 else None
            yield Piece(working, working_grads, working_states, steps, batch.sizes, batch.numel, join=join)
        for slot in copied:
            batch.scatter(slot, roles[slot - 1], memory[slot])

    def batch_grads(self, batch: Batch, grads: Sequence[Tensor], factor: float, by_formula: bool) -> Sequence[Tensor]:
        """A batch's gradients times a factor, in the dtype to compute in: one tensor for a formula."""
        plain = factor == 1.0 and self._computes_in(grads)
        if plain and not by_formula:
            return grads
        if plain:
            return [self._flatten(batch, grads)]
        scaled = self.scratch(0, batch.numel)
        if batch.are_small:
            scaled.copy_(self._flatten(batch, grads)).mul_(factor)
        else:
            for view, grad in zip(batch.views(0, grads, scaled), grads, strict=True):
                view.copy_(grad).mul_(factor)
        return [scaled] if by_formula else batch.views(0, grads, scaled)

    def _computes_in(self, role: Sequence[Tensor]) -> bool:
        return role[0].dtype is self.compute_dtype

    def _pieces(self, i: int, members: Members, factor: float) -> Iterator[Piece]:
        """A large tensor, piece by piece; what is not in the dtype to compute in passes through scratch memory."""
        grad = members.grads[i]
        steps = [members.scalars[0][i]] if members.scalars else []
        roles_of_tensor = (members.params[i], *(role[i] for role in members.states))
        if self._compiled is not None and self._takes_wholes:
            p, *states = roles_of_tensor
            numel = grad.numel()
            yield Piece([p], [grad], [[state] for state in states], steps, [numel], numel, factor, stored=True)
            return
        tensors = (grad, *roles_of_tensor)
        copies = factor != 1.0 or not all(tensor.dtype is self.compute_dtype for tensor in tensors)
        if self._staged is None or copies or (self._watched is not None and self._watched.copies):
            split = [self.split(tensor) for tensor in tensors]
        else:
            # an operator needs no pieces, each of which costs calls that wait for all threads
            split = [[flat(tensor)] for tensor in tensors]
        for g, *roles in zip(*split, strict=True):
            g = self.piece_grad(g, factor)
            working = [
                role if role.dtype is self.compute_dtype else self.scratch(1 + j, len(role)).copy_(role)
                for j, role in enumerate(roles)
            ]
            p, *states = working
            yield Piece([p], [g], [[state] for state in states], steps, [len(p)], grad.numel())
            for role, copy in zip(roles, working, strict=True):
                if copy is not role:
                    role.copy_(copy)

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """A large tensor's pieces."""
        return flat(tensor).split(PIECE)

    def piece_grad(self, g: Tensor, factor: float) -> Tensor:
        """A piece of a gradient times a factor, in the dtype to compute in."""
        if g.dtype is not self.compute_dtype:
            return self.scratch(0, len(g)).copy_(g).mul_(factor)
        return g if factor == 1.0 else torch.mul(g, factor, out=self.scratch(0, len(g)))
