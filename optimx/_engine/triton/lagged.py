"""Buckets whose tensors take cautious steps divided by their shares of the step before, on the Triton backend."""

from __future__ import annotations

from collections.abc import Container
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from ...triton_kernels.lagged import lagged_update_
from ...triton_kernels.tensor_table import upload
from ..rounds import LENGTHS, Share, Update
from .measured import MeasuredTritonBucket


class LaggedTritonBucket(MeasuredTritonBucket):
    """Members that three launches update: what the last shares make of the rows, the step, the shares."""

    has_means = True

    def finish(self, known_scalars: Container[int]) -> None:
        super().finish(known_scalars)
        addresses = torch.tensor([*map(Tensor.data_ptr, self.means)], dtype=torch.int64, device="cpu")
        self._addresses_of_means = upload(addresses, self.key.device)

    def _launch_update(self, control: Tensor | None, warmup: bool) -> Update:
        riders, kernels = self._riders, self.rule.kernels
        n_sums = len(riders.sums)
        partials = torch.empty(n_sums + 1, self.table.n_chunks, dtype=torch.float32, device=self.key.device)
        if n_sums:
            # which stays where the step is skipped
            self._riders = riders._replace(partials=partials[:n_sums].fill_(torch.nan))
        launches: Any = lagged_update_(
            kernels, self.table, self.grads, self._rows, control, variant=self.key.variant, dtypes=self.key.dtypes,
            means=self._addresses_of_means, partials=partials, storage=self.storage, riders=riders,
            numels=self._whole_numels, warmup=warmup,
        )  # fmt: skip
        for counts in launches:
            yield LENGTHS, [*map(Share, self.positions, repeat("lengths"), counts)]
