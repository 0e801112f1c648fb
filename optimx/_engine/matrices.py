"""Which matrices a parameter is, and what happens to them, for algorithms that treat each as a whole (Muon)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import as_steps, told
from .newton_schulz import Iterations


class Block(NamedTuple):
    """Matrices of one shape that follow each other in a tensor's memory.

    Attributes:
        first_row: Of all the tensor's rows.
        n_matrices: How many there are.
        rows, columns: Of each.
    """

    first_row: int
    n_matrices: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        """Elements of all of them."""
        return self.n_matrices * self.rows * self.columns

    def of(self, flat: Tensor, row_numel: int | None = None, dim: int = 0) -> Tensor:
        """The block's part of a tensor that has its elements, ``row_numel`` a row, along ``dim`` alone."""
        numel = self.columns if row_numel is None else row_numel
        return flat.narrow(dim, self.first_row * numel, self.n_matrices * self.rows * numel)


class MatrixVariant(NamedTuple):
    """What parameters have in common whose matrices are treated together.

    Attributes:
        blocks: The matrices of each.
        times: What the step sizes of each block are multiplied by.
        iterations: What orthogonalizes them.
        dtype: That iterations compute in.
        normalized: Rows of the result are divided by the root of an average of their squares.
        cautious: Weights decay only where the step does not move them away from zero.
    """

    blocks: tuple[Block, ...]
    times: tuple[float, ...]
    iterations: Iterations
    dtype: torch.dtype
    normalized: bool
    cautious: bool

    @property
    def cost(self) -> int:
        """Of an iteration, about: products of the short side with itself, along the long one."""
        return sum(b.n_matrices * min(b.rows, b.columns) ** 2 * max(b.rows, b.columns) for b in self.blocks)


def as_split(split: Any) -> int | tuple[int, ...] | None:
    """Into how many matrices rows are split, or how many rows each has: whole numbers of 1 or more.

    Raises:
        ValueError: A number is less than 1, or there is none.
        TypeError: It is something else.
    """
    if split is None:
        return None
    if not isinstance(split, Sequence):
        return as_steps("split", split, 1)
    if isinstance(split, str) or not split:
        raise ValueError(told("split", "should be a whole number or several", split))
    return tuple(as_steps(f"split[{i}]", height, 1) for i, height in enumerate(split))


def blocks_of(shape: torch.Size, *, stacked: bool, split: int | tuple[int, ...] | None) -> tuple[Block, ...]:
    """The matrices of a tensor.

    Args:
        shape: Of the tensor, two dimensions or more.
        stacked: Leading dimensions count matrices, else all but the first are columns.
        split: Into how many matrices the rows are split, or how many rows each has.

    Raises:
        ValueError: The rows cannot be split like that.
    """
    n, (rows, columns) = 1, (shape[0], prod(shape[1:]))
    if stacked:
        n, (rows, columns) = prod(shape[:-2]), shape[-2:]
    heights = [rows]
    if isinstance(split, int):
        if rows % split:
            raise ValueError(f"split should divide the rows but is {split} for {rows} rows of shape {[*shape]}")
        heights = [rows // split] * split
    elif split is not None and rows:
        heights = [*split]
        if sum(heights) != rows:
            raise ValueError(f"split should add up to the rows but is {heights} for {rows} rows of shape {[*shape]}")
    blocks = []
    heights *= n
    starts = iter(accumulate(heights, initial=0))
    for height, same in groupby(heights):
        first, *others = (next(starts) for _ in same)
        blocks.append(Block(first, 1 + len(others), height, columns))
    # of no matrices, the first is where they would be
    return (*blocks,) or (Block(0, 0, rows, columns),)


#: Added to what rows are divided by, as in dion's NorMuon.
EPS = 1e-8


def row_squares(matrices: Tensor) -> Tensor:
    """Sums of squares of the rows of matrices ``[n, rows, columns]``, float64 ``[n, rows, 1]``."""
    return torch.linalg.vector_norm(matrices, dim=2, keepdim=True, dtype=torch.float64).square_()


def equalized(squares: Tensor, averages: Tensor) -> Tensor:
    """Factors that bring rows to alike sizes, and no matrix to another Frobenius norm, ``[n, rows, 1]``.

    As in NorMuon (https://arxiv.org/abs/2510.05491): each row is divided by the root of an average.

    Args:
        squares: Sums of squares of the rows, float64 ``[n, rows, 1]``.
        averages: Of their mean squares.
    """
    factors = 1.0 / (averages.double().sqrt_() + EPS)
    before, after = squares.sum(1, keepdim=True), (squares * factors * factors).sum(1, keepdim=True)
    # rows of zeros stay what they are
    return factors * torch.where(after > 0, before / after, 0.0).sqrt_()


class Scratch:
    """Memory that stays, by name; what it held is of no use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}
        self._entries: dict[tuple[str, torch.Size, torch.dtype], tuple[Tensor, ...]] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        numel = prod(shape)
        kept = self._kept.get((name, dtype))
        if kept is None or kept.numel() < numel:
            kept = self._kept[name, dtype] = torch.empty(numel, dtype=dtype, device=self._device)
            self._entries = {key: entries for key, entries in self._entries.items() if key[0] != name}
        return kept[:numel].view(shape)

    def entries(self, name: str, shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The memory, entry by entry of the first dimension; made once, because thousands of views take long."""
        key = name, shape, dtype
        if key not in self._entries:
            self._entries[key] = self(name, shape, dtype).unbind()
        return self._entries[key]
