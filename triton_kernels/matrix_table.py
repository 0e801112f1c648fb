"""The host side of launches over matrices: how tensors are cut into tiles, and where partial sums go.

A tensor is a batch of matrices in memory order, ``[n_matrices, n_rows, n_columns]``; a vector is one row. No kernel is
defined here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch

from .tensor_table import LaunchSize, chunk_map, upload_all

Shape = tuple[int, int, int]


class Tile(NamedTuple):
    """What a program works on at a time, powers of two, and how far it walks.

    Attributes:
        matrices, rows, columns: Of a block. Either one matrix, or whole small ones.
        strip: Rows that a program walks through, a multiple of ``rows``.
    """

    matrices: int
    rows: int
    columns: int
    strip: int


def tile_of(shape: Shape, factored: bool, block_size: int, strip: int) -> Tile:
    """The tile for matrices of a shape; few tiles, as each is compiled.

    Args:
        shape: Matrices, rows and columns.
        factored: False for vectors, which are one row.
        block_size: Elements of a block.
        strip: Rows that a program walks through.
    """
    _, n_rows, n_columns = shape
    if not factored:
        return Tile(1, 1, block_size, 1)
    rows, columns = (1 << (n - 1).bit_length() for n in (max(1, n_rows), max(1, n_columns)))
    side = max(rows, columns)
    if side * side * 8 <= block_size:
        # kernels of convolutions
        return Tile(block_size // (side * side), side, side, side)
    # a row a warp, 128 bits a thread, so that sums over a row stay in a warp; with two rows ptxas spills
    return Tile(1, 4, max(1, block_size // 4), max(strip, 4))


class MatrixTable:
    """What stays the same from step to step for the matrices of one launch.

    Args:
        indices: Rows of the tensor table, and of the hyperparameters' ``rows``.
        shapes: Of these tensors.
        tile: Of all of them.
        aligned: Tensors and their rows begin at multiples of 16 bytes.
        device: Where the kernels run.

    Attributes:
        shapes: int64 ``[n_tensors, 7]``: matrices, rows, columns; then where things begin: its programs, its partial
            row sums, its partial column sums, its matrices.
        tensor: int32 ``[n_tensors]``: row of the tensor table.
        program_tensor: int32 ``[n_programs]``: which of the shapes a program works on.
        n_sums: Elements of memory for partial sums.
        n_matrices: Of all tensors.
        entries: For rows and for columns, what averages them: int64 ``[n_tensors, 4]``: entries, partial sums of an
            entry, where they begin, elements in a sum; with the programs' ``(tensor, start)``.
        means: ``(tensor, first matrix)`` of programs that average matrices.
    """

    def __init__(
        self, indices: Sequence[int], shapes: Sequence[Shape], tile: Tile, aligned: bool, device: torch.device
    ) -> None:
        self.tile = tile
        self.aligned = aligned
        self.device = device
        self.n_tensors = len(indices)
        rows_at = columns_at = matrices_at = programs_at = 0
        columns: list[list[int]] = []
        counts: list[int] = []
        entries: tuple[list[list[int]], list[list[int]]] = ([], [])
        for n_matrices, n_rows, n_columns in shapes:
            strips, blocks = -(-n_rows // tile.strip), -(-n_columns // tile.columns)
            groups = -(-n_matrices // tile.matrices)
            columns.append([n_matrices, n_rows, n_columns, programs_at, rows_at, columns_at, matrices_at])
            entries[0].append([n_matrices * n_rows, blocks, rows_at, n_columns])
            entries[1].append([n_matrices * n_columns, strips, columns_at, n_rows])
            counts.append(groups * strips * blocks)
            programs_at += counts[-1]
            rows_at += n_matrices * n_rows * blocks
            columns_at += n_matrices * n_columns * strips
            matrices_at += n_matrices
        self.n_programs = programs_at
        self.n_row_sums, self.n_column_sums, self.n_matrices = rows_at, columns_at, matrices_at
        programs = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), torch.tensor(counts, device="cpu"))
        chunks = [chunk_map([n for n, *_ in role], ENTRIES) for role in entries]
        chunks.append(chunk_map([n for n, *_ in shapes], self.matrices_per_mean))
        self.shapes, self.tensor, self.program_tensor, of_rows, of_columns, *sent = upload_all(
            [
                torch.tensor(columns, dtype=torch.int64, device="cpu"),
                torch.tensor(list(indices), dtype=torch.int32, device="cpu"), programs.to(torch.int32),
                *(torch.tensor(role, dtype=torch.int64, device="cpu") for role in entries),
                *chain.from_iterable(chunks),
            ],
            device,
        )  # fmt: skip
        self.entries = [of_rows, of_columns]
        self.entry_chunks = [(sent[0], sent[1]), (sent[2], sent[3])]
        self.mean_chunks = sent[4], sent[5]

    @property
    def matrices_per_mean(self) -> int:
        """Matrices of which a program averages the rows."""
        return min(self.tile.matrices, 64)


#: Averages that a program updates.
ENTRIES = 256


def tables(
    shapes: Sequence[Shape],
    aligned: Sequence[bool],
    factored: bool,
    divisor: int,
    device: torch.device,
    size: LaunchSize,
    block_size: int,
) -> list[MatrixTable]:
    """One table for all tensors that are cut into the same tiles and alike aligned.

    Args:
        shapes: Tensors without elements are in no table.
        aligned: Of each, whether it begins at a multiple of 16 bytes.
        factored: False for vectors.
        divisor: Rows whose length it divides begin at multiples of 16 bytes.
        device: Where the kernels run.
        size: The strip of a tile follows from it.
        block_size: Elements of a block.
    """
    members: dict[tuple[Tile, bool], list[int]] = {}
    for i, (shape, begins_aligned) in enumerate(zip(shapes, aligned, strict=True)):
        if shape[0] * shape[1] * shape[2]:
            tile = tile_of(shape, factored, block_size, size.chunk_size // 8)
            members.setdefault((tile, begins_aligned and shape[2] % divisor == 0), []).append(i)
    return [
        MatrixTable(indices, [shapes[i] for i in indices], tile, wide, device)
        for (tile, wide), indices in members.items()
    ]
