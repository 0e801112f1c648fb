"""Buckets of CPU tensors, some roles of which are kept in formats of their own (see :mod:`optimx._engine.storage`).

Whatever the format, an update sees float32: a piece of a large tensor, or a batch of small ones, is decoded to scratch
memory, updated there by the operator or the formula that float32 tensors get, and encoded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ... import _compat
from ..bucket import BucketKey, Members
from ..layout import flat
from ..matrices import Scratch
from ..storage import MOST_ROLES, STOCHASTIC, Format, Geometry, companions
from . import noise
from .batch import BATCH, Batch
from .call import Call
from .codecs import decode, elements_each, encode
from .noise import Part, Places
from .piece import Piece, Walk


class CodedBucket(Protocol):
    """What a :class:`Coder` has to know of :class:`~.elementwise.NativeBucket`."""

    key: BucketKey
    members: Members
    places: list[int]
    geometries: list[Geometry]
    seeds: list[int]
    noise_step: int
    compute_dtype: torch.dtype

    @property
    def has_formula(self) -> bool: ...

    def scratch(self, i: int, numel: int) -> Tensor: ...

    def split(self, tensor: Tensor) -> Sequence[Tensor]: ...

    def piece_grad(self, g: Tensor, factor: float) -> Tensor: ...

    def batch_grads(
        self, batch: Batch, grads: Sequence[Tensor], factor: float, by_formula: bool
    ) -> Sequence[Tensor]: ...


class Role(NamedTuple):
    """The parameter, or one of the states.

    Attributes:
        slot: Its index, and that of its own tensor among parameter, states and companions.
        kept: Its format.
        companion: Its companion's index among these; None if it has none.
    """

    slot: int
    kept: Format
    companion: int | None

    def of(self, tensors: Sequence[Tensor] | Mapping[int, Tensor], elements: slice) -> tuple[Tensor, Tensor | None]:
        """Some elements of its own tensor and of its companion, out of those of parameter, states and companions."""
        own = tensors[self.slot][elements]
        if self.companion is None:
            return own, None
        each = elements_each(self.kept)
        return own, tensors[self.companion][elements.start // each : elements.stop // each]


class Elements(NamedTuple):
    """Elements of a role, as they are kept.

    Attributes:
        coder: Whose.
        role: Which one.
        own, companion: What is kept.
        members: Whose elements these are, by their indices in the bucket.
        places: Tells where their random bits come from.
    """

    coder: Coder
    role: Role
    own: Tensor
    companion: Tensor | None
    members: Sequence[int]
    places: Callable[[], Places]

    def read(self, out: Tensor) -> Tensor:
        """The values, in ``out`` or where they are."""
        memory, kept = self.coder.memory, self.role.kept
        if kept.is_plain or out.dtype is torch.float32:
            return decode(kept, self.own, self.companion, out, memory)
        narrow = memory("float32", (len(out),), torch.float32)
        return out.copy_(decode(kept, self.own, self.companion, narrow, memory))

    def write(self, values: Tensor) -> None:
        """Keep values."""
        memory, kept = self.coder.memory, self.role.kept
        if not kept.is_plain and values.dtype is not torch.float32:
            values = memory("float32", (len(values),), torch.float32).copy_(values)
        bits = None
        if kept.kind == STOCHASTIC:
            bits = self.coder.noise(self.role.slot, self.members, self.places())
        encode(kept, values, self.own, self.companion, bits, memory)


class Coder:
    """Walks over the members of a bucket."""

    def __init__(self, bucket: CodedBucket, memory: Scratch) -> None:
        self.bucket = bucket
        formats = bucket.key.formats
        where = {role: len(formats) + i for i, role in enumerate(companions(formats))}
        self.roles = [Role(i, kept, where.get(i)) for i, kept in enumerate(formats)]
        self.memory = memory
        self._places: WeakKeyDictionary[Batch, Places] = WeakKeyDictionary()

    def walks(self, call: Call, members: Members, factor: float) -> Iterator[tuple[Sequence[int], Walk]]:
        """See :meth:`~.elementwise.NativeBucket.walks`."""
        for batch in call.batches:
            yield batch.indices, partial(self._batch, call, batch, members, factor)
        for i in call.large:
            yield [i], partial(self._pieces, call, i, members, factor)

    def _pieces(self, call: Call, i: int, members: Members, factor: float) -> Iterator[Piece]:
        """A large tensor, piece by piece."""
        bucket, grad = self.bucket, members.grads[i]
        steps = [members.scalars[0][i]] if members.scalars else []
        tensors = [flat(members.params[i]), *(flat(role[i]) for role in members.states)]
        (member,) = call.of_bucket([i])
        first = 0
        for g in bucket.split(grad):
            n = len(g)
            kept = [self.elements(role, tensors, member, first, n) for role in self.roles]
            working = [role.read(bucket.scratch(1 + j, n)) for j, role in enumerate(kept)]
            p, *states = working
            yield Piece([p], [bucket.piece_grad(g, factor)], [[s] for s in states], steps, [n], grad.numel())
            for role, values in zip(kept, working, strict=True):
                role.write(values)
            first += n

    def _batch(self, call: Call, batch: Batch, members: Members, factor: float) -> Iterator[Piece]:
        """A batch as one piece: as one tensor a role for a formula, else tensors."""
        bucket = self.bucket
        params, grads, states, scalars = batch.of(members)
        tensors = params, *states
        whole: dict[int, Tensor] = {}
        copied: list[int] = []
        for slot, tensor in enumerate(tensors):
            if slot and batch.together:
                whole[slot] = batch.where_they_are(tensor)
            elif slot >= len(self.roles) or bucket.has_formula or not self._is_direct(slot):
                numel = sum(map(Tensor.numel, tensor))
                # always as large, because views of it stay
                whole[slot] = self.memory(f"kept {slot}", (BATCH,), tensor[0].dtype)[:numel]
                batch.gather(("kept", slot), tensor, whole[slot])
                copied.append(slot)
        of_bucket = call.of_bucket(batch.indices)
        places = partial(self._places_of, batch, of_bucket)
        kept: list[tuple[Elements, Tensor]] = []
        working: list[Sequence[Tensor]] = []
        for role in self.roles:
            if role.slot not in whole:
                working.append(tensors[role.slot])
                continue
            companion = None if role.companion is None else whole[role.companion]
            elements = Elements(self, role, whole[role.slot], companion, of_bucket, places)
            values = elements.read(bucket.scratch(1 + role.slot, batch.numel))
            kept.append((elements, values))
            working.append([values] if bucket.has_formula else batch.views(("values", role.slot), params, values))
        g = bucket.batch_grads(batch, grads, factor, bucket.has_formula)
        p, *others = working
        yield Piece(p, g, others, scalars[0] if scalars else [], batch.sizes, batch.numel)
        for elements, values in kept:
            elements.write(values)
        for slot in copied:
            batch.scatter(("kept", slot), tensors[slot], whole[slot])

    def _is_direct(self, slot: int) -> bool:
        """Whether an operator takes the tensors of a role where they are."""
        kept = self.roles[slot].kept
        return kept.is_plain and kept.dtype is self.bucket.compute_dtype

    def _places_of(self, batch: Batch, members: Sequence[int]) -> Places:
        if batch not in self._places:
            geometries = [self.bucket.geometries[i] for i in members]
            parts = [Part(geometry, 0, numel) for geometry, numel in zip(geometries, batch.sizes, strict=True)]
            self._places[batch] = noise.places(parts)
        return self._places[batch]

    def elements(self, role: Role, tensors: Sequence[Tensor], member: int, first: int, numel: int) -> Elements:
        """Some elements of a member, of which parameter, states and companions are given, flat."""
        own, companion = role.of(tensors, slice(first, first + numel))
        part = Part(self.bucket.geometries[member], first, numel)
        return Elements(self, role, own, companion, [member], partial(noise.places, [part], self.memory))

    def noise(self, role: int, members: Sequence[int], where: Places) -> Tensor:
        """Random bits of elements of a role in the step at hand, until the next ones are asked for."""
        bucket = self.bucket

        def of_counters(values: list[int]) -> int | Tensor:
            if len({*values}) == 1:
                return values[0]
            return torch.tensor(values, dtype=torch.int64, device="cpu")[where.parts]

        # counted already
        scalars = bucket.members.scalars
        steps = [int(scalars[0][i]) if scalars else bucket.noise_step for i in members]
        streams = [bucket.places[i] * MOST_ROLES + role for i in members]
        seeds = [bucket.seeds[i] for i in members]
        return noise.draw(where, of_counters(seeds), of_counters(steps), of_counters(streams), self.memory)


class CodedMatrices:
    """A role of some tensors as matrices, which are decoded where they are read and encoded where they are written.

    Args:
        coder: The bucket's.
        role: Which role.
        members: The tensors' indices in the bucket.
        tensors: Of parameter, states and companions the members' tensors.
        shape: ``[n_tensors, n_matrices, n_rows, n_columns]``, in the order of memory.
        values: Holds what has been read, until it is read again.

    Attributes:
        dtype: Of the role's own tensors.
    """

    def __init__(
        self,
        coder: Coder,
        role: Role,
        members: Sequence[int],
        tensors: Sequence[Sequence[Tensor]],
        shape: tuple[int, ...],
        values: Callable[[int], Tensor],
    ) -> None:
        self._coder, self._role, self._members = coder, role, members
        self._shape, self._values = shape, values
        self.dtype = role.kept.dtype
        slots = [role.slot] if role.companion is None else [role.slot, role.companion]
        self._tensors = {slot: [*map(flat, tensors[slot])] for slot in slots}
        self._flat = {slot: self._together(slot, of_slot) for slot, of_slot in self._tensors.items()}

    def _together(self, slot: int, tensors: Sequence[Tensor]) -> Tensor:
        """All tensors in one; themselves where there is one."""
        if len(tensors) == 1:
            return tensors[0]
        memory = self._coder.memory(f"matrices {slot}", (sum(map(Tensor.numel, tensors)),), tensors[0].dtype)
        return torch.cat([*tensors], out=memory)

    def put_back(self) -> None:
        """Let the tensors be what has been written."""
        for slot, tensors in self._tensors.items():
            if len(tensors) > 1:
                _compat.foreach_copy_(tensors, self._flat[slot].split([*map(Tensor.numel, tensors)]))

    def _elements(self, piece: tuple[slice, ...]) -> tuple[Elements, list[int]]:
        """What is kept of a piece, and its shape; of several tensors a piece has all."""
        bounds = [range(*of_dim.indices(n)) for of_dim, n in zip(piece, self._shape, strict=True)]
        shape = [*map(len, bounds)]
        first, numel = 0, prod(shape)
        for of_dim, n in zip(bounds, self._shape, strict=True):
            first = first * n + of_dim.start
        coder, geometries = self._coder, self._coder.bucket.geometries
        own, companion = self._role.of(self._flat, slice(first, first + numel))
        n = numel // shape[0]
        parts = [Part(geometries[i], first, n) for i in self._members]
        places = partial(noise.places, parts, coder.memory)
        return Elements(coder, self._role, own, companion, self._members, places), shape

    def __getitem__(self, piece: tuple[slice, ...]) -> Tensor:
        elements, shape = self._elements(piece)
        return elements.read(self._values(prod(shape))).view(shape)

    def __setitem__(self, piece: tuple[slice, ...], values: Tensor) -> None:
        elements, _ = self._elements(piece)
        elements.write(values.view(-1))
