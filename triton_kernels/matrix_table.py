"""The host side of launches over matrices: how tensors are cut into tiles, and where partial sums go.

A tensor is a batch of matrices in memory order, ``[n_matrices, n_rows, n_columns]``; a vector is one row. No kernel is
defined here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from math import prod
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
        whole: Shapes of the tensors that these are parts of; None: they are whole.

    Attributes:
        indices: As given.
        shapes: int64 ``[n_tensors, 8]``: matrices, rows, columns; then where things begin: its programs, its partial
            row sums, its partial column sums, its matrices; elements of the whole tensor.
        tensor: int32 ``[n_tensors]``: row of the tensor table.
        program_tensor: int32 ``[n_programs]``: which of the shapes a program works on.
        first_program: int32 ``[n_tensors + 1]``.
        n_row_sums, n_column_sums: Elements of memory for partial sums.
        n_matrices: Of all tensors.
        entries: For rows and for columns, what averages them: int64 ``[n_tensors, 4]``: entries, partial sums of an
            entry, where they begin, elements in a sum.
        entry_chunks: For both ``(tensor, start)`` of programs.
        mean_chunks: ``(tensor, first matrix)`` of programs that average matrices.
        parts: What else it takes to update parts of tensors; None: they are whole.
    """

    def __init__(
        self,
        indices: Sequence[int],
        shapes: Sequence[Shape],
        tile: Tile,
        aligned: bool,
        device: torch.device,
        whole: Sequence[Shape] | None = None,
    ) -> None:
        self.tile = tile
        self.aligned = aligned
        self.device = device
        self.indices = [*indices]
        self.n_tensors = len(indices)
        rows_at = columns_at = matrices_at = programs_at = 0
        columns: list[list[int]] = []
        counts: list[int] = []
        entries: tuple[list[list[int]], list[list[int]]] = ([], [])
        for (n_matrices, n_rows, n_columns), of_whole in zip(shapes, whole or shapes, strict=True):
            strips, blocks = -(-n_rows // tile.strip), -(-n_columns // tile.columns)
            groups = -(-n_matrices // tile.matrices)
            places = [programs_at, rows_at, columns_at, matrices_at]
            columns.append([n_matrices, n_rows, n_columns, *places, prod(of_whole)])
            entries[0].append([n_matrices * n_rows, blocks, rows_at, of_whole[2]])
            entries[1].append([n_matrices * n_columns, strips, columns_at, of_whole[1]])
            counts.append(groups * strips * blocks)
            programs_at += counts[-1]
            rows_at += n_matrices * n_rows * blocks
            columns_at += n_matrices * n_columns * strips
            matrices_at += n_matrices
        self.n_programs = programs_at
        self.n_row_sums, self.n_column_sums, self.n_matrices = rows_at, columns_at, matrices_at
        programs = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), torch.tensor(counts, device="cpu"))
        first_program = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device="cpu")
        chunks = [chunk_map([n for n, *_ in role], ENTRIES) for role in entries]
        chunks.append(chunk_map([n for n, *_ in shapes], self.matrices_per_mean))
        self.shapes, self.tensor, self.program_tensor, self.first_program, of_rows, of_columns, *sent = upload_all(
            [
                torch.tensor(columns, dtype=torch.int64, device="cpu"),
                torch.tensor(self.indices, dtype=torch.int32, device="cpu"), programs.to(torch.int32), first_program,
                *(torch.tensor(role, dtype=torch.int64, device="cpu") for role in entries),
                *chain.from_iterable(chunks),
            ],
            device,
        )  # fmt: skip
        self.entries = [of_rows, of_columns]
        self.entry_chunks = [(sent[0], sent[1]), (sent[2], sent[3])]
        self.mean_chunks = sent[4], sent[5]
        self.parts = None if whole is None else Parts(shapes, whole, device)

    @property
    def matrices_per_mean(self) -> int:
        """Matrices of which a program averages the rows."""
        return min(self.tile.matrices, 64)


class Parts:
    """What it takes to update parts of tensors, the sums over which meet those of other parts.

    Attributes:
        n_entries: For rows and for columns, of each tensor.
        entries: As :attr:`MatrixTable.entries`, of sums that follow each other, one an entry.
        n_matrices: Of each tensor.
        tensor_of_matrix: int64 ``[n_matrices]``.
        lengths: How many rows, and how many columns, the whole matrices have: int64 ``[n_matrices]``.
    """

    def __init__(self, shapes: Sequence[Shape], whole: Sequence[Shape], device: torch.device) -> None:
        self.n_matrices = [n for n, *_ in shapes]
        self.n_entries = [[n * rows for n, rows, _ in shapes], [n * columns for n, _, columns in shapes]]
        tables = [
            [[n, 1, end - n, shape[elements]] for n, end, shape in zip(ns, accumulate(ns), whole, strict=True)]
            for ns, elements in zip(self.n_entries, (2, 1), strict=True)
        ]
        of_tensors = [[*range(len(shapes))], [rows for _, rows, _ in whole], [columns for _, _, columns in whole]]
        times = torch.tensor(self.n_matrices, device="cpu")
        of_rows, of_columns, self.tensor_of_matrix, *lengths = upload_all(
            [
                *(torch.tensor(table, dtype=torch.int64, device="cpu") for table in tables),
                *(torch.tensor(of_each, device="cpu").repeat_interleave(times) for of_each in of_tensors),
            ],
            device,
        )
        self.entries = [of_rows, of_columns]
        self.lengths = lengths


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
    whole: Sequence[Shape] | None = None,
) -> list[MatrixTable]:
    """One table for all tensors that are cut into the same tiles and alike aligned.

    Args:
        shapes: Whole tensors without elements are in no table.
        aligned: Of each, whether it begins at a multiple of 16 bytes.
        factored: False for vectors.
        divisor: Rows whose length it divides begin at multiples of 16 bytes.
        device: Where the kernels run.
        size: The strip of a tile follows from it.
        block_size: Elements of a block.
        whole: Shapes of the tensors that these are parts of; None: they are whole.
    """
    members: dict[tuple[Tile, bool], list[int]] = {}
    for i, (shape, begins_aligned) in enumerate(zip(shapes, aligned, strict=True)):
        if prod(shape) or whole is not None:
            tile = tile_of(shape, factored, block_size, size.chunk_size // 8)
            members.setdefault((tile, begins_aligned and shape[2] % divisor == 0), []).append(i)
    return [
        MatrixTable(
            indices,
            [shapes[i] for i in indices],
            tile,
            wide,
            device,
            None if whole is None else [whole[i] for i in indices],
        )
        for (tile, wide), indices in members.items()
    ]
