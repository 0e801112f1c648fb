"""How tensors lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _compat


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory exactly once, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether equal offsets mean equal elements; the stride of a dimension of size 1 means nothing."""
    if a.shape != b.shape:
        return False
    return all(x == y or n == 1 for x, y, n in zip(a.stride(), b.stride(), a.shape, strict=True))


def memory_order(tensor: Tensor) -> str | None:
    """How the matrices of a tensor lie in memory: ``"rows"`` after each other, or ``"columns"``; else None.

    A scalar or a vector is one row.
    """
    if tensor.is_contiguous():
        return "rows"
    if tensor.dim() > 1 and tensor.mT.is_contiguous():
        return "columns"
    return None


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order of its memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def is_part_of_memory(tensor: Tensor) -> bool:
    """Whether a tensor on a CPU shares the memory allocated for it with others, or leaves some of it unused."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not _compat.is_plain(tensor):
        return False
    return tensor.untyped_storage().nbytes() > tensor.nbytes
