"""Buckets of CPU tensors whose step has a size that follows from all of the tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..rounds import LENGTHS, Share, Update
from ..rule import Row
from .batch import SMALL
from .compiled import CompiledWalks
from .elementwise import NativeBucket
from .piece import Piece, Walk


class MeasuredBucket(NativeBucket):
    """A step in two walks: the size of a tensor's step is known only when all of it has been seen."""

    takes_riders = False

    _compiled: CompiledWalks | None

    def _new_compiled(self) -> CompiledWalks | None:
        roles = self.key.dtypes[: 1 + self.n_roles]
        walks = CompiledWalks(self.rule, self.key.variant, self.compute_dtype, roles, moves_first=self._moves_first)
        rows = [call.row for call in self._calls if call.large]
        return walks if walks.is_ready(rows, self._takes_wholes) else None

    def take_step(self, scale: float) -> Update:
        if not self.meets:
            yield from super().take_step(scale)
            return
        squares = torch.zeros(len(self.positions), 2, dtype=torch.float64, device="cpu")
        walks = [
            (call.row, [i if call.indices is None else call.indices[i] for i in indices], pieces)
            for call in self._calls for indices, pieces in self.walks(call, call.of(self.members), scale)
        ]  # fmt: skip
        for row, indices, pieces in walks:
            squares[indices] = self._measure(row, pieces)[0].t()
        yield LENGTHS, [Share(position, "lengths", squares[i]) for i, position in enumerate(self.positions)]
        for row, indices, pieces in walks:
            numels = [self.shapes[i].numel() for i in indices]
            self._take(row, pieces, self._factors(row, squares[indices].t(), numels))

    def _update_tensors(self, row: Row, pieces: Walk) -> None:
        squares, numels, is_done = self._measure(row, pieces, at_once=True)
        if not is_done:
            self._take(row, pieces, self._factors(row, squares, numels))

    @property
    def _moves_first(self) -> bool:
        """Whether the first walk moves the states. Not where the second one would take them rounded to fewer bits."""
        rounded = any(dtype is not self.compute_dtype for dtype in self.key.dtypes[2 : 1 + self.n_roles])
        return self.rule.knows_moved and not rounded

    def _measure(self, row: Row, pieces: Walk, *, at_once: bool = False) -> tuple[Tensor, Sequence[int], bool]:
        """Squared lengths, ``[2, tensors]``, of what the rule measures; states move, or are about to.

        With ``at_once``, pieces that are all of their tensors take the step. Also the elements of the tensors, and
        whether they took it.
        """
        squares = torch.zeros(2, 1, dtype=torch.float64, device="cpu")
        numels: Sequence[int] = []
        whole = False
        for piece in pieces():
            p, g, *states = roles_of(piece)
            if self._compiled is not None and self._is_of_large(piece):
                found = self._compiled.measure(row, (p, g, *states), piece.factor, stored=piece.stored)
                squares, numels = squares + found.view(2, 1), [piece.numel]
                continue
            whole = at_once and len(p) == piece.numel
            numels = piece.sizes if len(p) == piece.numel else [piece.numel]
            scratch, copies = self._memory(p)
            if not whole and not self._moves_first:
                states = [copy.copy_(state) for copy, state in zip(copies, states, strict=True)]
            step, *measured = self.rule.advance(self.key.variant, row, p, g, states, scratch)
            squares = squares + torch.stack([_squares(of, piece.sizes) for of in measured])
            if whole:
                self._apply(row, piece, step, self._factors(row, squares, numels), scratch)
        return squares, numels, whole

    def _is_of_large(self, piece: Piece) -> bool:
        return piece.stored or (len(piece.sizes) == 1 and piece.numel > SMALL)

    def _take(self, row: Row, pieces: Walk, factors: Tensor) -> None:
        """Take the step that has been measured."""
        for piece in pieces():
            p, g, *states = roles_of(piece)
            if self._compiled is not None and self._is_of_large(piece):
                self._compiled.take(row, (p, g, *states), piece.factor, factors.item(), stored=piece.stored)
                continue
            scratch, _ = self._memory(p)
            if self._moves_first:
                step = self.rule.step_of_moved(self.key.variant, row, p, states, scratch)
            else:
                step, *_ = self.rule.advance(self.key.variant, row, p, g, states, scratch)
            self._apply(row, piece, step, factors, scratch)

    def _factors(self, row: Row, squares: Tensor, numels: Sequence[int]) -> Tensor:
        """What the step of each tensor is multiplied by."""
        return self.rule.factors(self.key.variant, row, squares, torch.tensor(numels, device="cpu"))

    def _apply(self, row: Row, piece: Piece, step: Tensor, factors: Tensor, scratch: tuple[Tensor, ...]) -> None:
        p = piece.params[0]
        factor: float | Tensor = factors.item() if len(factors) == 1 else factors.to(p.dtype)[_owners(piece.sizes)]
        self.rule.take(self.key.variant, row, p, step, factor, scratch)

    def _memory(self, like: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Scratch memory of the rule, and for copies of the states."""
        own = self.rule.temporaries
        memory = self.temporaries(like, own + self.n_roles - 1)
        return memory[:own], memory[own:]


def roles_of(piece: Piece) -> list[Tensor]:
    """The parameter, the gradient and the states of a piece for a formula."""
    return [role[0] for role in (piece.params, piece.grads, *piece.states)]


def _squares(elements: Tensor | None, sizes: Sequence[int]) -> Tensor:
    """The squared length of each tensor, in float64; 0 where nothing is measured."""
    sums = torch.zeros(len(sizes), dtype=torch.float64, device="cpu")
    if elements is None:
        return sums
    if len(sizes) == 1:
        return torch.linalg.vector_norm(elements).double().square().view(1)
    return sums.index_add_(0, _owners(sizes), elements.double().square())


def _owners(sizes: Sequence[int]) -> Tensor:
    """The tensor of each element."""
    return torch.repeat_interleave(torch.tensor(sizes, device="cpu"))
