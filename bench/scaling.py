"""A law for the time of a step: fixed cost + cost per tensor + bytes over bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

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
    times = np.array([row.median_ms for row in rows])
    terms = np.array([[1.0, row.tensors, row.params * ADAMW_BYTES] for row in rows])
    scale = terms.max(axis=0)
    costs, _ = nnls(terms / scale / times[:, None], np.ones(len(rows)))
    fixed, per_tensor, per_byte = costs / scale
    error = np.median(np.abs(terms @ (costs / scale) / times - 1))
    return Law(1e3 * fixed, 1e3 * per_tensor, 1e-6 / per_byte if per_byte else float("inf"), float(error))
