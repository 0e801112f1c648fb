"""How tensors lie in memory."""

from __future__ import annotations

from torch import Tensor


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


def extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses at which a strided tensor's memory begins and ends."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.itemsize
