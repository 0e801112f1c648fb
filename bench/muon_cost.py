"""What a step of Muon computes and moves, by formula: nothing here is measured.

A product of ``[rows, inner]`` and ``[inner, columns]`` takes ``2 * rows * inner * columns`` FLOPs, half of them where
its result is symmetric and a kernel knows it. Each operand is read once and each result written once, which caches
that are too small for a matrix do not achieve: bytes are a lower bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from optimx._engine.newton_schulz import parts_on_gram

#: How iterations may be carried out.
FORMS = ("standard", "symmetric", "gram")
#: Of elementwise work, a float32 parameter and iterations in 16 bits: grad 4, momentum_buffer 4+4, matrix 2; the
#: division by its norm 2+2; matrix 2, param 4+4.
ELEMENTWISE_BYTES = 28


class Cost(NamedTuple):
    """Of one step.

    Attributes:
        params: Elements of all matrices.
        flops: Of the products.
        product_bytes: That the products read and write.
        elementwise_bytes: That all else reads and writes.
    """

    params: int
    flops: int
    product_bytes: int
    elementwise_bytes: int


class Product(NamedTuple):
    """FLOPs of a product, and elements that it reads and writes."""

    flops: int
    elements: int


def step_cost(
    shapes: Iterable[tuple[int, int]], form: str = "standard", iterations: int = 5, itemsize: int = 2
) -> Cost:
    """What a step costs.

    Args:
        shapes: Of the matrices.
        form: ``"standard"``; ``"symmetric"``, which computes a half of each symmetric product; or ``"gram"``, the same
            with iterations on the Gram matrix where the shorter side is at most half of the longer.
        iterations: How many there are.
        itemsize: Bytes of an element in iterations.
    """
    if form not in FORMS:
        raise ValueError(f"form should be one of {', '.join(FORMS)} but is: {form}")
    params = flops = elements = 0
    for rows, columns in shapes:
        m, n = sorted((rows, columns))
        params += m * n
        on_gram = form == "gram" and 2 * m <= n
        for product in _gram(m, n, iterations) if on_gram else _plain(m, n, iterations, form != "standard"):
            flops += product.flops
            elements += product.elements
    return Cost(params, flops, itemsize * elements, ELEMENTWISE_BYTES * params)


def _plain(m: int, n: int, iterations: int, symmetric: bool) -> Iterator[Product]:
    half = 2 if symmetric else 1
    for _ in range(iterations):
        yield Product(2 * m * m * n // half, m * n + m * m)  # XX'
        yield Product(2 * m**3 // half, 2 * m * m)  # bR + cRR
        yield Product(2 * m * m * n, m * m + 2 * m * n)  # aX + PX


def _gram(m: int, n: int, iterations: int) -> Iterator[Product]:
    """Products of polynomials of one Gram matrix are symmetric: half of each."""
    polynomial, product = Product(m**3, 2 * m * m), Product(m**3, 3 * m * m)
    for part in parts_on_gram(iterations):
        yield Product(m * m * n, m * n + m * m)  # XX'
        for i in range(part.stop - part.start):
            yield polynomial  # bR + cRR
            if i > 0:
                # R, twice, and Q, which X is to be multiplied by
                yield from (product,) * 3
        yield Product(2 * m * m * n, m * m + 2 * m * n)  # QX
