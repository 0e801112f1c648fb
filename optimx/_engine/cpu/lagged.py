"""Buckets whose tensors take cautious steps divided by their shares of the step before, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _compat
from .. import flags
from ..rounds import LENGTHS, Share, Update
from ..rule import Row
from .measured import MeasuredBucket, owners, roles_of
from .piece import Walk


class LaggedBucket(MeasuredBucket):
    """A step in one walk, which counts the elements that take it: their share is for the coming step."""

    takes_riders = True
    has_means = True

    def take_step(self, scale: float) -> Update:
        means = torch.stack([*self.means]).double()
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
        numels = torch.tensor([shape.numel() for shape in self.shapes], device="cpu")
        # where none has taken it nothing is known: a thousandth would make the coming step a thousand times too long
        means = torch.where(counts > 0, counts / numels, means).float()
        _compat.foreach_copy_([*self.means], [*means.unbind()])

    def _take_known(self, row: Row, pieces: Walk, factors: Tensor) -> Tensor:
        """Take steps times factors, one a tensor; how many elements of each have taken one, float64."""
        counts = torch.zeros(len(factors), dtype=torch.float64, device="cpu")
        for piece in pieces():
            p, g, *states = roles_of(piece)
            scratch = self.temporaries(p, self.rule.temporaries)
            step, taken, _ = self.rule.advance(self.key.variant, row, p, g, states, scratch)
            assert taken is not None
            # before the step, which is taken in the memory of the mask
            counts += _counts(taken, piece.sizes)
            self._apply(row, piece, step, factors, scratch)
        return counts


def _counts(taken: Tensor, sizes: Sequence[int]) -> Tensor:
    """The sum over each tensor of what is 1 or 0, float64."""
    if len(sizes) == 1:
        return taken.sum().view(1)
    return torch.zeros(len(sizes), dtype=torch.float64, device="cpu").index_add_(0, owners(sizes), taken.double())
