"""A law for the time of a step: fixed cost + cost per tensor + bytes over bandwidth."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.results import Row

#: Bytes of memory traffic that AdamW must cause, a float32 parameter.
ADAMW_BYTES = 28


@dataclass(frozen=True)
class Law:
    """What ``fit`` found, in microseconds and GB/s. ``error``: the median of |law / measured - 1|."""

    fixed_us: float
    per_tensor_us: float
    gb_per_s: float
    error: float

    def __call__(self, tensors: float, params: float) -> float:
        """Milliseconds of a step."""
        return (self.fixed_us + self.per_tensor_us * tensors) / 1e3 + params * ADAMW_BYTES / self.gb_per_s / 1e6


def fit(rows: Sequence[Row]) -> Law:
    """Least squares of the relative error, no cost below zero.

    Small and large steps weigh alike so, as they should for a law over five orders of magnitude.
    """
    times = torch.tensor([row.median_ms for row in rows], dtype=torch.float64)
    terms = torch.tensor([[1.0, row.tensors, row.params * ADAMW_BYTES] for row in rows], dtype=torch.float64)
    scale = terms.amax(dim=0)
    costs = nonnegative_least_squares(terms / scale / times[:, None]) / scale
    fixed, per_tensor, per_byte = costs.tolist()
    error = ((terms @ costs) / times - 1).abs().median().item()
    return Law(1e3 * fixed, 1e3 * per_tensor, 1e-6 / per_byte if per_byte else float("inf"), error)


def nonnegative_least_squares(matrix: torch.Tensor) -> torch.Tensor:
    """The x >= 0 that brings ``matrix @ x`` closest to ones: the best of those with some entries zero, others free."""
    ones = torch.ones(len(matrix), 1, dtype=matrix.dtype)
    best, smallest = torch.zeros(matrix.shape[1], dtype=matrix.dtype), float("inf")
    for free in itertools.product((False, True), repeat=matrix.shape[1]):
        columns = torch.tensor(free).nonzero().flatten()
        x = torch.zeros_like(best)
        x[columns] = torch.linalg.lstsq(matrix[:, columns], ones).solution.flatten()
        residual = (matrix @ x - 1).norm().item()
        if x.min() >= 0 and residual < smallest:
            best, smallest = x, residual
    return best
