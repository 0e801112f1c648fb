"""What walks over the tensors of a bucket on a CPU come by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

#: Elements a piece of a large tensor has: 2 MB of float32 a role. Smaller pieces lose more to calls and to threads that
#: wait for each other, larger ones leave the cache (measured from 2**13 to 2**21).
PIECE = 1 << 19


class Piece(NamedTuple):
    """Elements to update at once, in the dtype to compute in: a part of a large tensor, or a batch of smaller ones.

    For an operator the lists hold the tensors of a batch; for a formula they hold one tensor without dimensions of its
    own, in which those of a batch follow each other.

    Attributes:
        grads: Multiplied by their factor, but for ``factor``.
        steps: Of each tensor.
        sizes: Elements of each of the tensors that lie in it, whole or in part.
        numel: Elements of those tensors, all of them.
        factor: What the gradients are still to be multiplied by.
        stored: These are the tensors themselves, whatever their dtypes: for compiled formulas.
        join: Puts the elements of small tensors together, one list of which has their order; None: they are few.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[Sequence[Tensor]]
    steps: Sequence[Tensor]
    sizes: Sequence[int]
    numel: int
    factor: float = 1.0
    stored: bool = False
    join: Callable[[Sequence[Tensor]], Tensor] | None = None


#: Begins a walk over tensors.
Walk = Callable[[], Iterator[Piece]]
