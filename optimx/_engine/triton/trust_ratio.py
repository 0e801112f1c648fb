"""Buckets whose tensors take a step as long as the tensor (LAMB), on the Triton backend."""

from __future__ import annotations

from itertools import repeat
from typing import Any

from torch import Tensor

from ...triton_kernels.lamb import lamb_
from ..rounds import LENGTHS, Share, Update
from .elementwise import TritonBucket


class TrustRatioTritonBucket(TritonBucket):
    """Members that three launches update: norms, ratios, the step."""

    takes_riders = False

    def _launch_update(self, control: Tensor | None, warmup: bool) -> Update:
        kernels: Any = self.rule.kernels
        for lengths in lamb_(
            kernels, self.table, self.grads, self._rows, control, dtypes=self.key.dtypes, storage=self.storage,
            warmup=warmup, whole=not self.meets,
        ):  # fmt: skip
            yield LENGTHS, [*map(Share, self.positions, repeat("lengths"), lengths)]
