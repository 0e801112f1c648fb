"""Sums over what a watched step reads and writes, taken piece by piece while it is in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..watched_step import OF_GRADS, OF_MOMENTS, OF_UPDATES, moment_in
from .piece import Piece, Walk
from .sums import integers


class Watched:
    """The sums of a step over the members of a bucket.

    Args:
        names: What is asked for.
        numels: Elements of each member of the bucket.
        state_names: States of the bucket.
        dtype: Parameters as they are stored.

    Attributes:
        names: What is measured.
        numbers: float64 ``[n_names, n_members]``; NaN where nothing was measured.
    """

    def __init__(
        self, names: Sequence[str], numels: Sequence[int], state_names: Sequence[str], dtype: torch.dtype
    ) -> None:
        self._moment = moment_in(state_names)
        unknown = () if self._moment is not None else OF_MOMENTS
        self.names = [name for name in (*OF_GRADS, *OF_UPDATES) if name in names and name not in unknown]
        self.numbers = torch.full((len(self.names), len(numels)), torch.nan, dtype=torch.float64, device="cpu")
        # nothing walks over what is empty
        self.numbers[:, [i for i, numel in enumerate(numels) if not numel]] = 0.0
        self._dtype = dtype
        self._scratch = torch.empty(0, device="cpu")

    def walk(self, members: Sequence[int], pieces: Walk, factor: float) -> Iterator[Piece]:
        """A walk over pieces, each of which is measured before it is handed out, and when the next one is asked for.

        Args:
            members: Who lies in each piece: one in part, or several.
            pieces: Begins the walk.
            factor: What its gradients are multiplied by, but for their sign.
        """
        self.numbers[:, [*members]] = 0.0
        for piece in pieces():
            with self._around(members, piece, factor):
                yield piece

    @contextmanager
    def _around(self, members: Sequence[int], piece: Piece, factor: float) -> Iterator[None]:
        """Measure while a piece is updated."""
        inverse = 1.0 / abs(factor) if factor else torch.nan
        p, g = _flat(piece.params), _flat(piece.grads)
        self._add("grad_sq", members, lambda: _products(g, g, piece.sizes) * inverse**2)
        self._add("grad_max", members, lambda: _maxima(g, piece.sizes) * inverse)
        self._add("grad_zeros", members, lambda: _zeros(g, piece.sizes))
        if self._moment is not None and not {*OF_MOMENTS}.isdisjoint(self.names):
            moment = _flat(piece.states[self._moment])
            self._add("moment_sq", members, lambda: _products(moment, moment, piece.sizes))
            self._add("grad_moment", members, lambda: _products(g, moment, piece.sizes) * inverse)
        before = self._copy(p) if "update_sq" in self.names else p
        yield
        after = _flat(piece.params).to(self._dtype).to(p.dtype)
        self._add("param_sq", members, lambda: _products(after, after, piece.sizes))
        if "update_sq" in self.names:
            change = before.sub_(after)
            self._add("update_sq", members, lambda: _products(change, change, piece.sizes))

    def _copy(self, elements: Tensor) -> Tensor:
        if len(self._scratch) < len(elements) or self._scratch.dtype is not elements.dtype:
            self._scratch = torch.empty_like(elements)
        return self._scratch[: len(elements)].copy_(elements)

    def _add(self, name: str, members: Sequence[int], measure: Callable[[], Tensor]) -> None:
        if name not in self.names:
            return
        row, found = self.numbers[self.names.index(name)], measure()
        where = integers((*members,), row.device)
        row[where] = torch.maximum(row[where], found) if name == "grad_max" else row[where] + found


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])


def _products(a: Tensor, b: Tensor, sizes: Sequence[int]) -> Tensor:
    """The sum of products of each tensor's elements, float64."""
    if len(sizes) == 1:
        total = torch.linalg.vector_norm(a).double().square() if a is b else torch.dot(a, b).double()
        return total.view(1)
    return _of_each(a.double() * b.double(), sizes, "sum")


def _maxima(elements: Tensor, sizes: Sequence[int]) -> Tensor:
    if len(sizes) == 1:
        return torch.linalg.vector_norm(elements, float("inf")).double().view(1)
    return _of_each(elements.double().abs_(), sizes, "max")


def _zeros(elements: Tensor, sizes: Sequence[int]) -> Tensor:
    if len(sizes) == 1:
        return (len(elements) - elements.count_nonzero()).double().view(1)
    return _of_each((elements == 0).double(), sizes, "sum")


def _of_each(elements: Tensor, sizes: Sequence[int], reduce: str) -> Tensor:
    return torch.segment_reduce(elements, reduce, lengths=integers((*sizes,), elements.device), unsafe=True)
