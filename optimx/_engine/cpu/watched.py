"""Sums over what a watched step reads and writes, taken piece by piece while it is in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from ..layout import flat
from ..watched_step import OF_GRADS, OF_MOMENTS, OF_UPDATES, moment_in
from .piece import Piece, Walk
from .sums import integers

#: Runs of tensors of equal sizes that are measured one by one; for more, a slower operator takes all of them at once.
FEW_RUNS = 16


class _Found:
    """What was found of members: scalars, each of one of them, and vectors of several."""

    def __init__(self) -> None:
        self._scalars: list[Tensor] = []
        self._members: list[int] = []
        self._vectors: list[Tensor] = []
        self._members_of_vectors: list[int] = []

    def add(self, members: Sequence[int], numbers: Tensor | Sequence[Tensor]) -> None:
        """Add a vector, or a scalar of each member."""
        if isinstance(numbers, Tensor):
            self._vectors.append(numbers)
            self._members_of_vectors += members
        else:
            self._scalars += numbers
            self._members += members

    def into(self, row: Tensor, factor: float, reduce: str) -> None:
        """Put what is each member's together in its place in a row, float64."""
        found = [*self._vectors, torch.stack(self._scalars)] if self._scalars else self._vectors
        if found:
            values = torch.cat([numbers.double() for numbers in found]).mul_(factor)
            where = integers((*self._members_of_vectors, *self._members), row.device)
            row.scatter_reduce_(0, where, values, reduce, include_self=False)


class Watched:
    """The sums of a step over the members of a bucket.

    Args:
        names: What is asked for.
        numels: Elements of each member of the bucket.
        state_names: States of the bucket.
        dtype: Parameters as they are stored.

    Attributes:
        names: What is measured.
        copies: A piece's parameters are copied.
    """

    def __init__(
        self, names: Sequence[str], numels: Sequence[int], state_names: Sequence[str], dtype: torch.dtype
    ) -> None:
        self._moment = moment_in(state_names)
        unknown = () if self._moment is not None else OF_MOMENTS
        self.names = [name for name in (*OF_GRADS, *OF_UPDATES) if name in names and name not in unknown]
        self.copies = "update_sq" in self.names
        self._numels = numels
        self._dtype = dtype
        self._inverse = 1.0
        self._scratch = torch.empty(0, device="cpu")
        self._found = {name: _Found() for name in self.names}

    def numbers(self) -> Tensor:
        """What was found, float64 ``[n_names, n_members]``; NaN where nothing was measured."""
        numbers = torch.full((len(self.names), len(self._numels)), torch.nan, dtype=torch.float64, device="cpu")
        # nothing walks over what is empty
        numbers[:, [i for i, numel in enumerate(self._numels) if not numel]] = 0.0
        factors = {"grad_sq": self._inverse**2, "grad_max": self._inverse, "grad_moment": self._inverse}
        for row, (name, found) in zip(numbers, self._found.items(), strict=True):
            found.into(row, factors.get(name, 1.0), "amax" if name == "grad_max" else "sum")
        return numbers

    def walk(self, members: Sequence[int], pieces: Walk, factor: float) -> Iterator[Piece]:
        """A walk over pieces, each of which is measured before it is handed out, and when the next one is asked for.

        Args:
            members: Who lies in each piece: one in part, or several.
            pieces: Begins the walk.
            factor: What its gradients are multiplied by, but for their sign; the same in all of a step.
        """
        self._inverse = 1.0 / abs(factor) if factor else torch.nan
        found = self._found
        for piece in pieces():
            sizes, grads = piece.sizes, _vectors(piece, piece.grads)
            if "grad_sq" in found:
                found["grad_sq"].add(members, _products(grads, grads, sizes))
            if "grad_max" in found:
                found["grad_max"].add(members, _maxima(grads, sizes))
            if "grad_zeros" in found:
                found["grad_zeros"].add(members, _zeros(grads, sizes))
            if self._moment is not None and not found.keys().isdisjoint(OF_MOMENTS):
                moments = _vectors(piece, piece.states[self._moment])
                if "moment_sq" in found:
                    found["moment_sq"].add(members, _products(moments, moments, sizes))
                if "grad_moment" in found:
                    found["grad_moment"].add(members, _products(grads, moments, sizes))
            before = self._copies(piece) if self.copies else []
            yield piece
            after = _vectors(piece, piece.params)
            if after[0].dtype is not self._dtype:
                after = [part.to(self._dtype).to(part.dtype) for part in after]
            if "param_sq" in found:
                found["param_sq"].add(members, _products(after, after, sizes))
            if self.copies:
                moved = [*map(Tensor.sub_, before, after)]
                found["update_sq"].add(members, _products(moved, moved, sizes))

    def _copies(self, piece: Piece) -> Sequence[Tensor]:
        """Copies of its parameters, in scratch memory that stays in the cache."""
        parts = _vectors(piece, piece.params)
        if piece.join is not None:
            # what is joined is a copy
            return parts
        numels = [*map(Tensor.numel, parts)]
        numel, dtype = sum(numels), parts[0].dtype
        if self._scratch.numel() < numel or self._scratch.dtype is not dtype:
            self._scratch = torch.empty(numel, dtype=dtype, device="cpu")
        copies = torch.split_with_sizes(self._scratch[:numel], numels)
        for copy, part in zip(copies, parts, strict=True):
            copy.copy_(part)
        return copies


def _vectors(piece: Piece, role: Sequence[Tensor]) -> Sequence[Tensor]:
    """The elements of a role's tensors: of each a vector, or those of many small ones in one."""
    if piece.join is not None:
        return [piece.join(role)]
    return [tensor.view(-1) if tensor.is_contiguous() else flat(tensor) for tensor in role]


def _products(a: Sequence[Tensor], b: Sequence[Tensor], sizes: Sequence[int]) -> Tensor | Sequence[Tensor]:
    """Of each tensor the sum of products of elements."""
    return [*map(torch.dot, a, b)] if len(a) == len(sizes) else of_each(a[0] * b[0], sizes, "sum")


def _maxima(a: Sequence[Tensor], sizes: Sequence[int]) -> Tensor | Sequence[Tensor]:
    """Of each tensor the largest absolute value."""
    if len(a) == len(sizes):
        # a fraction of the time of a norm
        return [torch.stack(torch.aminmax(part)).abs_().amax() for part in a]
    return of_each(a[0].abs(), sizes, "max")


def _zeros(a: Sequence[Tensor], sizes: Sequence[int]) -> Tensor | Sequence[Tensor]:
    """Of each tensor how many elements are 0."""
    if len(a) == len(sizes):
        return [part.numel() - part.count_nonzero() for part in a]
    return of_each((a[0] == 0).double(), sizes, "sum")


def of_each(elements: Tensor, sizes: Sequence[int], reduce: str) -> Tensor:
    """Of each tensor's elements in a vector the sum or the largest one, float64."""
    runs = _runs_of((*sizes,))
    if len(runs) > FEW_RUNS:
        lengths = integers((*sizes,), elements.device)
        return torch.segment_reduce(elements.double(), reduce, lengths=lengths, unsafe=True)
    rows = [elements[first : first + n * size].view(n, size) for first, n, size in runs]
    return torch.cat([row.amax(1).double() if reduce == "max" else row.sum(1, dtype=torch.float64) for row in rows])


@lru_cache(maxsize=256)
def _runs_of(sizes: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Runs of equal sizes: the element at which one begins, how many sizes, and which."""
    runs, first = [], 0
    for size, same in groupby(sizes):
        n = len([*same])
        runs.append((first, n, size))
        first += n * size
    return runs
