"""Batched products of Newton-Schulz iterations: ``out = beta * addend + alpha * left @ right``, rounded once.

Of a symmetric result the tiles on and below the diagonal are computed, and each is stored twice, the second time
transposed: half of the work, and a result that is symmetric bit by bit. Matrices lie in memory of their own, rows and
columns filled up with zeros to multiples of 16: loads are of 16 bytes, and one compiled kernel serves all shapes. They
are read as they lie or transposed. In float32 products are float32's ("ieee"), not TF32's, whatever torch is told to
use.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import Launcher, launch

#: What rows and columns must be multiples of: integers that are make Triton's compiler use wide accesses.
MULTIPLE = 16
#: Matrices have fewer elements, because offsets are int32.
MOST_ELEMENTS = 2**31
#: Tiles of rows whose programs follow each other: what they read of ``right`` stays in the cache.
_GROUP = 8
# the interpreter multiplies the bit patterns of bfloat16
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Blocks(NamedTuple):
    """Tile sizes of a product.

    Attributes:
        size: Rows and columns of a program's tile of the result.
        inner: What is multiplied at a time.
        num_warps: Of a program.
        num_stages: How many loads are under way, in shared memory.
    """

    size: int
    inner: int
    num_warps: int
    num_stages: int


def blocks_for(n_rows: int, dtype: torch.dtype, *, on_amd: bool = torch.version.hip is not None) -> Blocks:
    """Tile sizes for results of ``n_rows``, the shorter side of the matrices.

    Not measured here. Those for large matrices are flash-muon's and modded-nanogpt's for an H100; stages are as many as
    find room in the shared memory of every NVIDIA GPU since 2020 (99 KB), and on MI300 (64 KB).
    """
    size, inner, n_threads = (128, 64, 256) if n_rows >= 768 else (64, 64, 128)
    if dtype is torch.float32:
        # without matrix units; longer tiles spill registers
        size, inner, n_threads = 128, 16, 256
    return Blocks(size, inner, n_threads // (64 if on_amd else 32), 2 if on_amd else 3)


@triton.jit
def _lower_tile(pid):
    """Row and column of a tile, counted row by row up to the diagonal."""
    row = ((tl.sqrt(8.0 * pid + 1.0) - 1.0) / 2.0).to(tl.int32)
    # a root may be rounded past a whole number
    row = tl.where(row * (row + 1) // 2 > pid, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= pid, row + 1, row)
    return row, pid - row * (row + 1) // 2


@triton.jit
def _grouped_tile(pid, n_rows, n_columns, GROUP: tl.constexpr):
    """Row and column of a tile, counted column by column within ``GROUP`` rows."""
    first = pid // (GROUP * n_columns) * GROUP
    height = tl.minimum(n_rows - first, GROUP)
    within = pid % (GROUP * n_columns)
    return first + within % height, within // height


@triton.jit
def _offsets(rows, columns, n_rows, n_columns, TRANSPOSED: tl.constexpr):
    """Of elements of a matrix, and which of them there are."""
    mask = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    if TRANSPOSED:
        return columns[None, :] * n_rows + rows[:, None], mask
    else:
        return rows[:, None] * n_columns + columns[None, :], mask


@triton.jit
def _newton_schulz_kernel(
    left_ptr,  # [n, n_rows, n_inner]
    right_ptr,  # [n, n_inner, n_columns]
    addend_ptr,  # [n, n_rows, n_columns], or anything
    out_ptr,  # [n, n_rows, n_columns], written
    beta: float,
    alpha: float,
    n_rows,
    n_columns,
    n_inner,
    SYMMETRIC: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    LEFT_TRANSPOSED: tl.constexpr,  # in memory
    RIGHT_TRANSPOSED: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
):
    height, width = tl.cdiv(n_rows, SIZE), tl.cdiv(n_columns, SIZE)
    if SYMMETRIC:
        n_tiles = height * (height + 1) // 2
        row, column = _lower_tile(tl.program_id(0) % n_tiles)
    else:
        n_tiles = height * width
        row, column = _grouped_tile(tl.program_id(0) % n_tiles, height, width, GROUP)
    matrix = (tl.program_id(0) // n_tiles).to(tl.int64)
    left_ptr += matrix * n_rows * n_inner
    right_ptr += matrix * n_inner * n_columns
    rows = row * SIZE + tl.arange(0, SIZE)
    columns = column * SIZE + tl.arange(0, SIZE)
    products = tl.zeros((SIZE, SIZE), tl.float32)
    for first in range(0, n_inner, INNER):
        inner = first + tl.arange(0, INNER)
        offsets, mask = _offsets(rows, inner, n_rows, n_inner, LEFT_TRANSPOSED)
        left = tl.load(left_ptr + offsets, mask=mask, other=0.0)
        offsets, mask = _offsets(inner, columns, n_inner, n_columns, RIGHT_TRANSPOSED)
        right = tl.load(right_ptr + offsets, mask=mask, other=0.0)
        if _INTERPRETED:
            left, right = left.to(tl.float32), right.to(tl.float32)
        products = tl.dot(left, right, products, input_precision="ieee")
    products *= alpha
    offsets, mask = _offsets(rows, columns, n_rows, n_columns, False)
    of_matrix = matrix * n_rows * n_columns
    if HAS_ADDEND:
        products += beta * tl.load(addend_ptr + of_matrix + offsets, mask=mask, other=0.0).to(tl.float32)
    result = products.to(out_ptr.dtype.element_ty)
    if SYMMETRIC:
        mirrored = tl.trans(result)
        if row == column:
            # a sum may have met in another order on the other side of the diagonal
            result = tl.where(rows[:, None] >= columns[None, :], result, mirrored)
        else:
            offsets_there, mask_there = _offsets(columns, rows, n_columns, n_rows, False)
            tl.store(out_ptr + of_matrix + offsets_there, mirrored, mask=mask_there)
    tl.store(out_ptr + of_matrix + offsets, result, mask=mask)


def multiply_(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    addend: Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
    *,
    symmetric: bool = False,
    blocks: Blocks | None = None,
    warmup: bool = False,
) -> Tensor:
    """``out = beta * addend + alpha * left @ right``; without an addend ``alpha * left @ right``.

    Sums are float32's, and the result is rounded once. A matrix gets the same bits in any batch.

    Args:
        left, right: ``[n, rows, inner]`` and ``[n, inner, columns]``, contiguous or transposes of contiguous ones. All
            sizes but ``n`` are multiples of 16.
        out: ``[n, rows, columns]``, likewise; none of the others' memory.
        addend: As ``out`` lies in memory; where the result is ``symmetric``, so is it.
        beta, alpha: Factors.
        symmetric: The result is symmetric but for rounding. It becomes so bit by bit.
        blocks: Tile sizes; None: those of :func:`blocks_for`.
        warmup: Compile, launch nothing.

    Returns:
        ``out``.

    Raises:
        ValueError: Shapes or dtypes do not fit, or matrices lie otherwise.
    """
    if _transposed(out):
        addend = None if addend is None else addend.mT
        multiply_(right.mT, left.mT, out.mT, addend, beta, alpha, symmetric=symmetric, blocks=blocks, warmup=warmup)
        return out
    n, n_rows, n_inner = left.shape
    n_columns = right.shape[2]
    if right.shape != (n, n_inner, n_columns) or out.shape != (n, n_rows, n_columns):
        raise ValueError(f"shapes should fit but are: {(*left.shape,)} @ {(*right.shape,)} = {(*out.shape,)}")
    if any(each is not None and each.dtype is not out.dtype for each in (left, right, addend)):
        raise ValueError(f"dtypes should be one but are: {left.dtype}, {right.dtype}, {out.dtype}")
    if any(size % MULTIPLE for size in (n_rows, n_columns, n_inner)):
        raise ValueError(
            f"rows and columns should be multiples of {MULTIPLE} but are: {n_rows}, {n_inner}, {n_columns}"
        )
    if max(n_rows * n_columns, n_rows * n_inner, n_inner * n_columns) >= MOST_ELEMENTS:
        raise ValueError(f"matrices should have less than {MOST_ELEMENTS} elements")
    if symmetric and n_rows != n_columns:
        raise ValueError(f"a symmetric result should be square but is: {n_rows} x {n_columns}")
    if addend is not None and (addend.shape != out.shape or not addend.is_contiguous()):
        raise ValueError("addend should have the shape of out, and lie in memory as it does")
    if blocks is None:
        blocks = blocks_for(min(n_rows, n_columns), out.dtype)
    launcher = _launcher(symmetric, addend is not None, _transposed(left), _transposed(right), out.dtype, blocks)
    height, width = triton.cdiv(n_rows, blocks.size), triton.cdiv(n_columns, blocks.size)
    n_tiles = height * (height + 1) // 2 if symmetric else height * width
    launch(
        launcher, n * n_tiles, left, right, out if addend is None else addend, out, beta, alpha, n_rows, n_columns,
        n_inner, warmup=warmup,
    )  # fmt: skip
    return out


def _transposed(matrices: Tensor) -> bool:
    """Whether columns lie one after the other in memory, not rows."""
    if matrices.is_contiguous():
        return False
    if not matrices.mT.is_contiguous():
        raise ValueError(f"matrices should be contiguous or transposed but have strides: {matrices.stride()}")
    return True


@cache
def _launcher(
    symmetric: bool, has_addend: bool, of_left: bool, of_right: bool, dtype: torch.dtype, blocks: Blocks
) -> Launcher:
    return Launcher(
        _newton_schulz_kernel, SYMMETRIC=symmetric, HAS_ADDEND=has_addend, LEFT_TRANSPOSED=of_left,
        RIGHT_TRANSPOSED=of_right, GROUP=_GROUP, SIZE=blocks.size, INNER=blocks.inner, num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )  # fmt: skip
