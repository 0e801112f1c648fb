"""Products of Newton-Schulz iterations on the Triton backend: which matrices Triton's kernels multiply."""

from __future__ import annotations

from functools import partial

import torch

from ...triton_kernels import newton_schulz
from .. import backends
from ..newton_schulz import TORCH, Products

KERNELS = Products(newton_schulz.multiply_, newton_schulz.MULTIPLE, takes_transposes=True)
#: These compile kernels, and multiply nothing.
COMPILING = KERNELS._replace(multiply=partial(newton_schulz.multiply_, warmup=True))
#: Whether products are those of kernels; None: where :func:`fills_device` says so.
use_kernels: bool | None = None


def products_for(device: torch.device, n: int, rows: int, columns: int, dtype: torch.dtype) -> Products:
    """Products of ``n`` matrices: :data:`KERNELS`, or torch's."""
    fills = fills_device(device, n, rows, columns, dtype) if use_kernels is None else use_kernels
    return KERNELS if fills else TORCH


def fills_device(device: torch.device, n: int, rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether the lower tiles of ``n`` Gram matrices are enough for all multiprocessors of a device.

    Computed, not measured: with fewer tiles, or sides below 512, where what is not a product takes most of the time, a
    half of the work gains less than torch's products do by being cut otherwise.
    """
    side = min(rows, columns)
    if side < 512 or rows * columns >= newton_schulz.MOST_ELEMENTS // 2:
        return False
    if dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        # kernels compute in float32 itself
        return False
    n_tiles = -(-side // newton_schulz.blocks_for(side, dtype).size)
    return 0 < backends.multiprocessors(device) <= n * n_tiles * (n_tiles + 1) // 2
