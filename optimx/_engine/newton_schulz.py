"""Newton-Schulz iterations, which bring all singular values of a matrix near to 1: of a batch of matrices at once.

An iteration is an odd polynomial of the matrix, ``aX + (bR + cRR)X`` with ``R = XX'``, whose values on the singular
values approach 1. Results are rounded where torch's Muon rounds: the matrix once to ``dtype``, its norm, and each of
the three products of an iteration.

Sources of the coefficients: torch's Muon and https://kellerjordan.github.io/posts/muon (``"standard"``), Polar Express
(https://arxiv.org/abs/2505.16932) as modded-nanogpt and dion use it, and those of Megatron's Emerging-Optimizers and of
DeepSeek-V4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Iterations(NamedTuple):
    """What happens to a matrix.

    Attributes:
        coefficients: ``(a, b, c)`` of each iteration.
        safety: The matrix is divided by its Frobenius norm times this first: some polynomials must not see values
            that rounding brings above 1.
    """

    coefficients: tuple[tuple[float, float, float], ...]
    safety: float = 1.0


STANDARD = (3.4445, -4.7750, 2.0315)

#: By name. After them, singular values of 0.01 or more (0.001 for the last two) are about in the range that is given.
NAMED = {
    # 0.68 to 1.13
    "standard": Iterations((STANDARD,) * 5),
    # 0.98 to 1.03
    "quintic5": Iterations(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        )
    ),
    # 0.86 to 1.14
    "polar-express": Iterations(
        (
            (8.156554525, -22.48329293, 15.87876992),
            (4.042929935, -2.808917466, 0.5000178451),
            (3.891667802, -2.772484153, 0.5060648178),
            (3.285753658, -2.368129493, 0.4644902423),
            (2.346541326, -1.709782838, 0.4232355117),
        ),
        safety=1.02,
    ),
    # 1.000 to 1.001
    "deepseek-v4": Iterations((STANDARD,) * 8 + ((2.0, -1.5, 0.5),) * 2),
}

#: Gives memory of a shape and a dtype, by name; what it held is of no use.
Memory = Callable[[str, tuple[int, ...], torch.dtype], Tensor]


def first_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a matrix before its norm is 1: float16 would lose what is small, and overflow."""
    return torch.float32 if dtype is torch.float16 else dtype


def orthogonalize_(
    x: Tensor, iterations: Iterations, dtype: torch.dtype, eps: float | Tensor, memory: Memory
) -> Tensor:
    """Orthogonalize the matrices of a batch; ``x`` is overwritten.

    Each matrix becomes, bit by bit, what it would become alone.

    Args:
        x: ``[n, rows, columns]``, of :func:`first_dtype`.
        iterations: What happens to each matrix.
        dtype: To compute in.
        eps: Norms are not taken to be smaller; a number, or one a matrix, ``[n, 1, 1]``.
        memory: For results and products.

    Returns:
        ``[n, rows, columns]``; it may be ``x``.
    """
    if x.numel() == 0:
        return x
    # neither is the sum of squares to overflow, nor does its order show, when it is rounded
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float64).to(x.dtype)
    norm = norm.clamp_(min=eps)
    x.div_(norm if iterations.safety == 1.0 else norm * iterations.safety)
    if x.dtype is not dtype:
        x = memory("rounded", tuple(x.shape), dtype).copy_(x)
    is_tall = x.shape[1] > x.shape[2]
    wide = x.mT if is_tall else x
    n, rows, columns = wide.shape
    gram, products = (memory(name, (n, rows, rows), x.dtype) for name in ("gram", "products"))
    results = [memory("result", (n, rows, columns), x.dtype)]
    results.append(memory("other result", (n, rows, columns), x.dtype) if is_tall else x)
    for i, (a, b, c) in enumerate(iterations.coefficients):
        torch.bmm(wide, wide.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=products)
        wide = torch.baddbmm(wide, products, wide, beta=a, out=results[i % 2])
    return wide.mT if is_tall else wide
