"""Buckets whose tensors take cautious steps divided by their shares of the step before, on a CPU."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from ... import _compat
from .. import flags
from ..rounds import LENGTHS, Share, Update
from ..rule import Row
from .batch import in_order, runs
from .measured import MeasuredBucket, roles_of
from .piece import Walk
from .watched import of_each


class LaggedBucket(MeasuredBucket):
    """A step in one walk, which counts the elements that take it: their share is for the coming step."""

    takes_riders = True
    has_means = True

    def finish(self, known_scalars: Container[int]) -> None:
        super().finish(known_scalars)
        self._numels = torch.tensor([shape.numel() for shape in self.shapes], device="cpu")
        self._are_together = len(runs(range(len(self.means)), [self.means])) == 1 and in_order(self.means)

    def _new_compiled(self) -> None:
        return None

    def take_step(self, scale: float) -> Update:
        kept = self.means[0].as_strided((len(self.means),), (1,)) if self._are_together else None
        means = (torch.stack([*self.means]) if kept is None else kept).double()
        factors = flags.divisor(means).reciprocal_()
        counts = torch.zeros(len(self.positions), dtype=torch.float64, device="cpu")
        for call in self._calls:
            for indices, pieces in self.walks(call, call.of(self.members), scale):
                members = call.of_bucket(indices)
                counts[members] = self._take_known(
                    call.row, self._around(call, indices, pieces, scale), factors[members]
                )
        if self.meets:
            yield LENGTHS, [Share(position, "lengths", counts[i]) for i, position in enumerate(self.positions)]
        # where none has taken it nothing is known: a thousandth would make the coming step a thousand times too long
        means = torch.where(counts > 0, counts / self._numels, means)
        if kept is None:
            _compat.foreach_copy_([*self.means], [*means.float().unbind()])
        else:
            kept.copy_(means)

    def _take_known(self, row: Row, pieces: Walk, factors: Tensor) -> Tensor:
        """Take steps times factors, one a tensor; how many elements of each have taken one, float64."""
        counts = torch.zeros(len(factors), dtype=torch.float64, device="cpu")
        for piece in pieces():
            p, g, *states = roles_of(piece)
            scratch = self.temporaries(p, self.rule.temporaries)
            step, taken, _ = self.rule.advance(self.key.variant, row, p, g, states, scratch)
            assert taken is not None
            # before the step, which is taken in the memory of the mask
            # exact in float32: a piece has fewer than 2**24 elements
            alone = len(piece.sizes) == 1
            counts += taken.sum() if alone else of_each(taken, piece.sizes, "sum")
            self._apply(row, piece, step, factors, scratch)
        return counts
