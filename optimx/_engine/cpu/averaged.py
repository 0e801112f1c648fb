"""Averages of parameters, which move after a step: small ones that lie together in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _compat
from ..layout import same_layout
from .batch import RUN, is_small, runs


class Places:
    """How the averages of members lie; it keeps none of them.

    Args:
        params: Of the members.
        averages: Theirs.
    """

    def __init__(self, params: Sequence[Tensor], averages: Sequence[Tensor]) -> None:
        alike = all(map(same_layout, averages, params))
        small = [i for i, average in enumerate(averages) if is_small(average) and average.numel()] if alike else []
        self._together = [run for run in runs(small, [averages]) if len(run) >= RUN]
        self._others = sorted({*range(len(averages))}.difference(*self._together))
        self._are_vectors = all(params[i].dim() == 1 for i in small)

    def move(self, averages: Sequence[Tensor], params: Sequence[Tensor], weight: float) -> None:
        """Move averages towards parameters, as ``torch.lerp``."""
        dtype = averages[0].dtype
        for run in self._together:
            values = [params[i] for i in run]
            joined = torch.cat(values) if self._are_vectors else _compat.flatten_dense_tensors(values)
            averages[run[0]].as_strided((len(joined),), (1,)).lerp_(joined.to(dtype), weight)
        if self._others:
            values = [params[i].to(dtype) for i in self._others]
            _compat.foreach_lerp_([averages[i] for i in self._others], values, weight)
