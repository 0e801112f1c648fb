"""Buckets whose tensors take a step the size of which follows from all of it, on the Triton backend."""

from __future__ import annotations

from collections.abc import Container, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from ...triton_kernels.measured import measured_update_
from ...triton_kernels.tensor_table import upload
from ..rounds import LENGTHS, Share, Update
from ..rule import Row
from .elementwise import TritonBucket


class MeasuredTritonBucket(TritonBucket):
    """Members that three launches update: sums, what they make of the rows, the step."""

    def finish(self, known_scalars: Container[int]) -> None:
        super().finish(known_scalars)
        self._whole_numels: Tensor | None = None
        if self.meets:
            numels = torch.tensor([shape.numel() for shape in self.shapes], dtype=torch.int64, device="cpu")
            self._whole_numels = upload(numels, self.key.device)

    def host_rows(self, values: Sequence[tuple[Any, ...]]) -> tuple[list[Row], Tensor | None]:
        """A row for each member, as the table has it from the start: the launches change them."""
        rows, _ = super().host_rows(values)
        return [rows[i] for i in self._row_of_member.tolist()], None

    def _launch_update(self, control: Tensor | None, warmup: bool) -> Update:
        kernels: Any = self.rule.kernels
        for lengths in measured_update_(
            kernels, self.table, self.grads, self._rows, control, variant=self.key.variant, dtypes=self.key.dtypes,
            storage=self.storage, riders=self._riders, warmup=warmup, numels=self._whole_numels,
        ):  # fmt: skip
            yield LENGTHS, [*map(Share, self.positions, repeat("lengths"), lengths)]
