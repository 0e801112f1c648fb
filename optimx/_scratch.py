"""How much memory a step needs beside parameters, gradients and states: bounds, from the constants of the engine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._engine import backends, storage
from ._engine.bucket import BucketKey
from ._engine.cpu.batch import BATCH, is_small
from ._engine.cpu.elementwise import PIECE
from ._engine.cpu.factored import TOGETHER
from ._engine.cpu.noise import PER_COUNTER
from ._engine.rounds import ROUNDS_OF
from ._engine.rule import UpdateRule

__all__ = ["scratch_bound"]

#: Pieces that a formula may use beside one a role and the gradient's.
_TEMPORARIES = 3
#: And what flags take beside these: which elements agree with a step, and what becomes of them.
_MASKS = 2
#: Pieces of a factored walk: see :mod:`optimx._engine.cpu.factored`.
_FACTORED = 4
#: Sums over rows and columns, their means, averages and roots, of which so many are there at a time.
_SUMS = 5
#: Bytes of an address or a number in a table; such words a tensor for what else is told of it; bytes for the ends of
#: tables, which begin at multiples of 16.
_WORD, _SPARE, _TABLES = 8, 12, 512
#: Bytes a tensor for what is planned, on a CPU: rows, views, places.
_PLANNED = 256
#: Philox works on six words of 64 bits a counter, is told one, and leaves four of 32.
_NOISE = (7 * 8 + 4 * 4) / PER_COUNTER
#: Bytes an element that codecs use beside the pieces, by names that kinds of formats share.
_CODECS: dict[int, dict[str, float]] = {
    storage.NEAREST: {},
    storage.STOCHASTIC: {"bits": 4, "noise": _NOISE},
    storage.REMAINDER8: {"bits": 4, "remainder": 4},
    storage.REMAINDER16: {"bits": 4, "remainder": 4},
    storage.MASTER: {},
    # and a few numbers a group
    storage.SIGNED8: {"numbers": 4, "sizes": 4, "groups": 24 / storage.GROUP},
    storage.UNSIGNED8: {"numbers": 4, "sizes": 4, "groups": 24 / storage.GROUP},
}


def scratch_bound(rule: UpdateRule, key: BucketKey, parts: Sequence[Tensor], clips: bool) -> int | None:
    """Bytes that a step of a bucket needs at most for a while, on its device; some of them stay from step to step.

    Args:
        rule: The optimizer's.
        key: The bucket's.
        parts: What of its parameters lies in this process.
        clips: The norm of gradients is asked for.

    Returns:
        The bytes; None where nothing is told of them: matrices that are orthogonalized, sums that meet other ranks'.
    """
    if rule.walk == "orthogonal" or (
        key.cut is not None and key.cut.n_shards > 1 and ROUNDS_OF[rule.walk_of(key.variant)]
    ):
        return None
    if key.backend == backends.TRITON:
        return _of_tables(rule, key, parts)
    return math.ceil(_of_pieces(rule, key, parts, clips))


def _of_pieces(rule: UpdateRule, key: BucketKey, parts: Sequence[Tensor], clips: bool) -> float:
    """On a CPU: pieces of large tensors and batches of small ones, in the dtype to compute in."""
    compute = _compute_dtype(key)
    codecs: dict[str, float] = {}
    for of_role in key.formats:
        codecs |= _CODECS[of_role.kind]
    if _rounds_float16(key):
        codecs |= {"multiples": 4, "sizes": 4, "are small": 1}
    n_small = sum(part.numel() for part in parts if is_small(part))
    # gradients of small tensors are flattened for all of a step
    total: float = _PLANNED * len(parts) + n_small * key.dtypes[1].itemsize
    if rule.walk == "factored":
        piece = max([PIECE, *(_longest_run(key, part) for part in parts)])
        # gradients, parameters and first averages of another dtype become pieces for a while
        copied = sum(dtype is not compute for dtype in (*key.dtypes[:2], key.dtypes[-1]))
        total += piece * ((_FACTORED + copied) * compute.itemsize + sum(codecs.values()))
        return total + _of_stacks(key, parts)
    total += PIECE * (_slots(rule, key, bool(n_small)) * compute.itemsize + sum(codecs.values()))
    if clips and key.dtypes[1] is not compute:
        # torch's norms are of copies in the dtype that they are asked for in
        largest = max((part.numel() for part in parts), default=0)
        total += (largest + min(BATCH, n_small)) * compute.itemsize
    return total + (_of_batches(rule, key, n_small, "noise" in codecs) if n_small else 0)


def _compute_dtype(key: BucketKey) -> torch.dtype:
    return torch.float64 if key.dtypes[0] is torch.float64 else torch.float32


def _slots(rule: UpdateRule, key: BucketKey, has_batches: bool) -> int:
    """Pieces of the gradient, of roles, and for what a formula works out."""
    compute = _compute_dtype(key)
    n_roles = 1 + len(rule.state_names(key.variant))
    if rule.operator(key.variant, compute) is None:
        masks = _MASKS if rule.flags and key.variant else 0
        if rule.walk_of(key.variant) == "measured":
            return n_roles + rule.temporaries + n_roles + masks
        return 1 + n_roles + max(rule.temporaries, _TEMPORARIES) + masks
    if key.formats or has_batches:
        return 1 + n_roles
    # an operator takes what is in the dtype to compute in where it lies
    kept = [key.dtypes[0], *key.dtypes[2:]]
    return 1 + max((i for i, dtype in enumerate(kept, 1) if dtype is not compute), default=0)


def _of_batches(rule: UpdateRule, key: BucketKey, n_small: int, draws: bool) -> int:
    """Copies of small tensors, and what is worked out for each of their elements."""
    itemsize, batch, total = _compute_dtype(key).itemsize, min(BATCH, n_small), 0
    if key.formats:
        total += BATCH * sum(dtype.itemsize for dtype in (key.dtypes[0], *key.dtypes[2:]))
    if draws:
        # where they have their bits from stays; tensors are told apart in a draw
        total += n_small * 2 * _WORD + batch * 3 * _WORD
    if rule.walk_of(key.variant) in ("measured", "lagged"):
        total += batch * 4 * _WORD
    if rule.by_element:
        total += n_small * (len(rule.by_element) * itemsize + _WORD)
    return total


def _of_stacks(key: BucketKey, parts: Sequence[Tensor]) -> int:
    """Sums over rows and over columns and what is worked out from them, and copies of what is kept of a stack."""
    factored, _, _ = key.variant
    sums = (sum(part.numel() // max(1, n) for n in part.shape[-2:]) if factored else part.numel() for part in parts)
    total = _SUMS * sum(sums) * _compute_dtype(key).itemsize
    if key.formats:
        together = min(TOGETHER, sum(part.numel() for part in parts))
        total += together * sum(dtype.itemsize for dtype in (key.dtypes[0], *key.dtypes[2:]))
    return total


def _rounds_float16(key: BucketKey) -> bool:
    """Whether float16 tensors are rounded stochastically, which takes more."""
    return any(kept.kind == storage.STOCHASTIC and kept.dtype is torch.float16 for kept in key.formats)


def _longest_run(key: BucketKey, part: Tensor) -> int:
    """Elements of the shortest piece of a tensor with averages of rows, which never cuts a row or a group of codes."""
    factored, transposed, _ = key.variant
    if not factored:
        return 0
    columns = part.shape[-2 if transposed else -1]
    coded = any(kept.kind in storage.CODED for kept in key.formats)
    return columns * (storage.GROUP // math.gcd(storage.GROUP, columns)) if coded else columns


def _of_tables(rule: UpdateRule, key: BucketKey, parts: Sequence[Tensor]) -> int:
    """On a GPU: tables of addresses and hyperparameters, which chunk is whose, and what chunks find for norms."""
    # in a package that imports triton
    from .triton_kernels.matrix_table import ENTRIES, tile_of
    from .triton_kernels.tensor_table import launch_size

    size = launch_size(key.device, sum(part.numel() for part in parts))
    chunks = sum(-(-part.numel() // size.chunk_size) for part in parts)
    columns = 2 * len(rule.kernels.HYPER) + 2 * len(rule.kernels.RAW) if key.on_device else 2 * len(rule.kernels.HYPER)
    # addresses, sizes and rows; gradients and hyperparameters, the new ones beside the last ones
    total = len(parts) * (_WORD * (len(key.dtypes) + len(rule.scalars) + columns + _SPARE)) + _TABLES
    total += chunks * (_WORD + 4 + 4 * _WORD)
    if rule.walk != "factored":
        return total
    factored, transposed, _ = key.variant
    for part in parts:
        n, rows, of_row = 1, 1, part.numel()
        if factored:
            rows, of_row = part.shape[:-3:-1] if transposed else part.shape[-2:]
            n = math.prod(part.shape[:-2])
        tile = tile_of((n, rows, of_row), factored, size.block(key.dtypes), size.chunk_size // 8)
        strips, blocks = -(-rows // tile.strip), -(-of_row // tile.columns)
        programs = -(-n // tile.matrices) * strips * blocks
        total += _WORD * n * (rows * (blocks + 1) + of_row * (strips + 1) + 1) + programs * (4 + 4 * _WORD)
        total += (n * (rows + of_row) // ENTRIES + n + 2) * (_WORD + 4) + _TABLES
    return total
