"""Buckets of CPU tensors whose step is as long as the tensor (LAMB)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _compat
from ..rounds import LENGTHS, Share, Update
from ..rule import Row
from .elementwise import NativeBucket
from .piece import Walk


class TrustRatioBucket(NativeBucket):
    """A step in two walks: the length of a tensor's step is known only when all of it has been seen."""

    takes_riders = False

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
            self._take(row, pieces, _trust_ratio(row, squares[indices].t()))

    def _update_tensors(self, row: Row, pieces: Walk) -> None:
        squares, is_done = self._measure(row, pieces, at_once=True)
        if not is_done:
            self._take(row, pieces, _trust_ratio(row, squares))

    @property
    def _rounded(self) -> bool:
        """The second walk would take averages rounded to fewer bits for other ones: there it works them out anew."""
        return any(dtype is not self.compute_dtype for dtype in self.key.dtypes[2 : 1 + self.n_roles])

    def _measure(self, row: Row, pieces: Walk, *, at_once: bool = False) -> tuple[Tensor, bool]:
        """Squared norms of parameters and of their steps, ``[2, tensors]``; averages move, or are about to.

        With ``at_once``, pieces that are all of their tensors take the step; and whether they did.
        """
        squares = torch.zeros(2, 1, dtype=torch.float64, device="cpu")
        whole = False
        for piece in pieces():
            p, g, m, v = (role[0] for role in (piece.params, piece.grads, *piece.states))
            whole = at_once and len(p) == piece.numel
            step, *copies = self.temporaries(p, 3)
            if self._rounded and not whole:
                m, v = (copy.copy_(average) for copy, average in zip(copies, (m, v), strict=True))
            _advance(row, p, g, m, v, out=step)
            squares = squares + torch.stack([_squares(p, piece.sizes), _squares(step, piece.sizes)])
            if whole:
                _apply(row, p, step, _trust_ratio(row, squares), piece.sizes)
        return squares, whole

    def _take(self, row: Row, pieces: Walk, ratio: Tensor) -> None:
        """Take the step that has been measured."""
        for piece in pieces():
            p, g, m, v = (role[0] for role in (piece.params, piece.grads, *piece.states))
            (step,) = self.temporaries(p, 1)
            if self._rounded:
                _advance(row, p, g, m, v, out=step)
            else:
                _step_of(row, p, m, v, out=step)
            _apply(row, p, step, ratio, piece.sizes)


def _advance(row: Row, p: Tensor, g: Tensor, m: Tensor, v: Tensor, out: Tensor) -> Tensor:
    """Update the averages, and work out the step before it gets its length: what Adam makes of zeros."""
    _, beta1_c, beta2, _, bias1, bias2_sqrt, eps, weight_decay, _, _ = row
    _compat.uncorrected_adam_(
        out.zero_(), g, m, v, lr=-bias2_sqrt / bias1, beta1=1.0 - beta1_c, beta2=beta2, weight_decay=0.0,
        eps=eps * bias2_sqrt,
    )  # fmt: skip
    return out.add_(p, alpha=weight_decay) if weight_decay else out


def _step_of(row: Row, p: Tensor, m: Tensor, v: Tensor, out: Tensor) -> Tensor:
    """The same step, from averages that are updated already."""
    _, _, _, _, bias1, bias2_sqrt, eps, weight_decay, _, _ = row
    torch.sqrt(v, out=out).mul_(bias1 / bias2_sqrt).add_(eps * bias1)
    torch.div(m, out, out=out)
    return out.add_(p, alpha=weight_decay) if weight_decay else out


def _squares(elements: Tensor, sizes: Sequence[int]) -> Tensor:
    """The squared norm of each tensor, in float64."""
    if len(sizes) == 1:
        return torch.linalg.vector_norm(elements).double().square().view(1)
    sums = torch.zeros(len(sizes), dtype=torch.float64, device="cpu")
    return sums.index_add_(0, _tensor_of_element(sizes), elements.double().square())


def _tensor_of_element(sizes: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.tensor(sizes, device="cpu"))


def _trust_ratio(row: Row, squares: Tensor) -> Tensor:
    """Of each tensor, from the squared norms of parameters and steps; 1 where one of them is 0."""
    largest = row[-1]
    p_norm, step_norm = squares.sqrt()
    ratio = torch.where((p_norm == 0) | (step_norm == 0), 1.0, p_norm / step_norm)
    return ratio.clamp(max=largest) if largest else torch.ones_like(ratio)


def _apply(row: Row, p: Tensor, step: Tensor, ratio: Tensor, sizes: Sequence[int]) -> None:
    lr = row[-2]
    if len(sizes) == 1:
        p.add_(step, alpha=-lr * ratio.item())
    else:
        p.addcmul_(step, ratio.to(p.dtype)[_tensor_of_element(sizes)], value=-lr)
