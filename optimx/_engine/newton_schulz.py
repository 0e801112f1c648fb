"""Newton-Schulz iterations, which bring all singular values of a matrix near to 1: of a batch of matrices at once.

An iteration is an odd polynomial of the matrix, ``aX + (bR + cRR)X`` with ``R = XX'``, whose values on the singular
values approach 1. Results are rounded where torch's Muon rounds: the matrix once to ``dtype``, its norm, and each of
the three products of an iteration.

In the Gram form (https://github.com/Dao-AILab/gram-newton-schulz), iterations are on ``R`` alone, which is smaller:
what ``X`` is to be multiplied by is gathered in ``Q``. Rounding makes eigenvalues of ``R`` negative, and more so with
every iteration, so after a few of them ``X`` is multiplied and ``R`` computed anew: see :func:`parts_on_gram`.

Sources of the coefficients: torch's Muon and https://kellerjordan.github.io/posts/muon (``"standard"``), Polar Express
(https://arxiv.org/abs/2505.16932) as modded-nanogpt and dion use it, and those of Megatron's Emerging-Optimizers and of
DeepSeek-V4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Iterations(NamedTuple):
    """What happens to a matrix.

    Attributes:
        coefficients: ``(a, b, c)`` of each iteration.
        safety: The matrix is divided by its Frobenius norm times this first: some polynomials must not see values
            that rounding brings above 1.
        gram: Iterations take the Gram form where the shorter side is at most half of the longer.
    """

    coefficients: tuple[tuple[float, float, float], ...]
    safety: float = 1.0
    gram: bool = False


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

#: Factors that are tried for coefficients of one's own.
_SAFETIES = (1.0, 1.01, 1.02, 1.05)
#: What rounding may bring a singular value to that is the norm, in bfloat16 with some to spare.
_LARGEST = 1.02


@lru_cache(maxsize=64)
def safe(coefficients: tuple[tuple[float, float, float], ...]) -> Iterations:
    """Iterations with coefficients of one's own, with the least of a few scalings under which none runs away.

    Raises:
        ValueError: With none of them all singular values end between 0 and 2.
    """
    for safety in _SAFETIES:
        x = torch.linspace(0.0, _LARGEST / safety, 4097, dtype=torch.float64, device="cpu")[1:]
        for a, b, c in coefficients:
            square = x * x
            x = x * (a + square * (b + square * c))
        if bool(((x > 0.0) & (x < 2.0)).all()):
            return Iterations(coefficients, safety)
    raise ValueError(f"coefficients should bring singular values from 0 to 1 between 0 and 2 but are: {coefficients}")


#: Gives memory of a shape and a dtype, by name; what it held is of no use.
Memory = Callable[[str, tuple[int, ...], torch.dtype], Tensor]


class Multiply(Protocol):
    """A batched product, rounded once.

    ``out = beta * addend + alpha * left @ right``, without an addend ``left @ right``. ``out`` is none of the others.
    ``symmetric`` says that the result is, but for rounding, so that a half of it may do.
    """

    def __call__(
        self,
        left: Tensor,
        right: Tensor,
        out: Tensor,
        addend: Tensor | None = None,
        beta: float = 1.0,
        alpha: float = 1.0,
        *,
        symmetric: bool = False,
    ) -> Tensor: ...


class Products(NamedTuple):
    """Where products come from.

    Attributes:
        multiply: The products.
        multiple: Rows and columns are filled up with zeros to multiples of it.
        takes_transposes: Results may be transposes of contiguous matrices.
    """

    multiply: Multiply
    multiple: int = 1
    takes_transposes: bool = False

    def padded(self, size: int) -> int:
        """Rows or columns with those that fill up."""
        return -(-size // self.multiple) * self.multiple


def _multiply(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    addend: Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
    *,
    symmetric: bool = False,
) -> Tensor:
    if addend is None:
        return torch.bmm(left, right, out=out)
    return torch.baddbmm(addend, left, right, beta=beta, alpha=alpha, out=out)


#: Torch's, which compute symmetric results as all others.
TORCH = Products(_multiply)


def first_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a matrix before its norm is 1: float16 would lose what is small, and overflow."""
    return torch.float32 if dtype is torch.float16 else dtype


def orthogonalize_(
    x: Tensor,
    iterations: Iterations,
    dtype: torch.dtype,
    eps: float | Tensor,
    memory: Memory,
    products: Products = TORCH,
) -> Tensor:
    """Orthogonalize the matrices of a batch; ``x`` is overwritten.

    Each matrix becomes what it would become alone, bit by bit where products round alike in any batch.

    Args:
        x: ``[n, rows, columns]``, of :func:`first_dtype`.
        iterations: What happens to each matrix.
        dtype: To compute in.
        eps: Norms are not taken to be smaller; a number, or one a matrix, ``[n, 1, 1]``.
        memory: For results and products.
        products: Where products come from.

    Returns:
        ``[n, rows, columns]``; it may be ``x``.
    """
    if x.numel() == 0:
        return x
    n, rows, columns = x.shape
    norm = _norms(x).to(x.dtype).clamp_(min=eps)
    shape = n, products.padded(rows), products.padded(columns)
    scaled = x if x.dtype is dtype and x.shape == shape else memory("scaled", shape, dtype)
    if scaled.shape != x.shape:
        # a matrix with NaN has left it there
        scaled[:, rows:].zero_()
        scaled[:, :, columns:].zero_()
    torch.div(x, norm if iterations.safety == 1.0 else norm * iterations.safety, out=scaled[:, :rows, :columns])
    is_tall = rows > columns
    wide = scaled.mT if is_tall else scaled
    of_result = shape if products.takes_transposes else tuple(wide.shape)
    result = memory("result", of_result, dtype)
    if of_result == shape:
        results = [result.mT, wide] if is_tall else [result, wide]
    else:
        results = [result, memory("other result", of_result, dtype)]

    def square(name: str) -> Tensor:
        return memory(name, (n, wide.shape[1], wide.shape[1]), dtype)

    on_gram = iterations.gram and 2 * min(rows, columns) <= max(rows, columns)
    iterate = _iterate_on_gram if on_gram else _iterate
    wide = iterate(wide, results, iterations.coefficients, products.multiply, square)
    return (wide.mT if is_tall else wide)[:, :rows, :columns]


def _norms(x: Tensor) -> Tensor:
    """Frobenius norms of matrices ``[n, rows, columns]``, float64 ``[n, 1, 1]``; the same in any batch.

    Neither do sums of squares overflow, nor does their order show when they are rounded to 16 bits.
    """
    if x.device.type != "cpu" or x.dtype is torch.float64 or x.shape[1] == 1:
        return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float64)
    # in float64 the operator copies all of its argument first; float32 has the squares of most rows
    rows = torch.linalg.vector_norm(x, dim=2, keepdim=True, dtype=torch.float32)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
    low, high = _FLOAT32_HAS
    others = ~((norms > low) & (norms < high)).view(-1)
    if bool(others.any()):
        norms[others] = torch.linalg.vector_norm(x[others], dim=(1, 2), keepdim=True, dtype=torch.float64)
    return norms


#: Norms between these have squares of float32.
_FLOAT32_HAS = 1e-15, 1e18


def _iterate(
    x: Tensor,
    results: Sequence[Tensor],
    coefficients: Sequence[tuple[float, float, float]],
    multiply: Multiply,
    square: Callable[[str], Tensor],
) -> Tensor:
    """What iterations make of wide matrices of norm 1. Results alternate; ``square`` gives memory of R's shape."""
    gram, polynomial = square("gram"), square("polynomial")
    for i, (a, b, c) in enumerate(coefficients):
        multiply(x, x.mT, gram, symmetric=True)
        multiply(gram, gram, polynomial, gram, b, c, symmetric=True)
        x = multiply(polynomial, x, results[i % 2], x, a)
    return x


def parts_on_gram(n_iterations: int) -> list[slice]:
    """Which iterations share a Gram matrix: the first two, then three at a time, as their factors grow less."""
    bounds = [0, *range(2, n_iterations, 3), n_iterations]
    return [slice(*pair) for pair in pairwise(bounds)] if n_iterations else []


def _iterate_on_gram(
    x: Tensor,
    results: Sequence[Tensor],
    coefficients: Sequence[tuple[float, float, float]],
    multiply: Multiply,
    square: Callable[[str], Tensor],
) -> Tensor:
    """The same in the Gram form. Polynomials of one matrix commute, so all products but those with x are symmetric."""
    gram, polynomial, factor, spare = (square(name) for name in ("gram", "polynomial", "factor", "spare"))
    for n, part in enumerate(parts_on_gram(len(coefficients))):
        multiply(x, x.mT, gram, symmetric=True)
        for i, (a, b, c) in enumerate(coefficients[part]):
            multiply(gram, gram, polynomial, gram, b, c, symmetric=True)
            if i == 0:
                factor.copy_(polynomial).diagonal(dim1=1, dim2=2).add_(a)
            else:
                multiply(polynomial, factor, spare, factor, a, symmetric=True)
                factor, spare = spare, factor
            if part.start + i + 1 < part.stop:
                # R of the x that is not computed
                multiply(polynomial, gram, spare, gram, a, symmetric=True)
                multiply(polynomial, spare, gram, spare, a, symmetric=True)
        x = multiply(factor, x, results[n % 2])
    return x
