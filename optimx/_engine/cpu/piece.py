"""What walks over the tensors of a bucket on a CPU come by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor


class Piece(NamedTuple):
    """Elements to update at once, in the dtype to compute in: a part of a large tensor, or a batch of small ones.

    For an operator the lists hold the tensors of a batch; for a formula they hold one tensor without dimensions of its
    own, in which those of a batch follow each other.

    Attributes:
        grads: Multiplied by their factor, but for ``factor``.
        steps: Of each tensor.
        sizes: Elements of each of the tensors that lie in it, whole or in part.
        numel: Elements of those tensors, all of them.
        factor: What the gradients are still to be multiplied by.
        stored: These are the tensors themselves, whatever their dtypes: for compiled formulas.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[Sequence[Tensor]]
    steps: Sequence[Tensor]
    sizes: Sequence[int]
    numel: int
    factor: float = 1.0
    stored: bool = False


#: Begins a walk over tensors.
Walk = Callable[[], Iterator[Piece]]
