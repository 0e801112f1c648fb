"""The text that the small GPT reads: Python's own source code, so that nothing is downloaded."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


class Corpus:
    """Python's standard library as one row of bytes; every twentieth file is kept for validation."""

    def __init__(self) -> None:
        files = [path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
        if not files:
            raise RuntimeError("the standard library should be *.py files but this Python has none")
        self.validation = torch.frombuffer(bytearray(b"".join(files[::20])), dtype=torch.uint8)
        del files[::20]
        self.training = torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8)

    def batches(self, steps: int, batch: int, length: int, seed: int) -> Iterator[Tensor]:
        """Yield ``steps`` random batches, int64 ``[batch, length]``; one seed, one order."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            starts = torch.randint(len(self.training) - length, (batch, 1), generator=generator)
            yield self.training[starts + torch.arange(length)].long()

    def validation_batches(self, batch: int, length: int, count: int = 16) -> Iterator[Tensor]:
        """Yield ``count`` batches spread evenly over the validation files, the same ones every time."""
        starts = torch.linspace(0, len(self.validation) - length, batch * count).long()
        for some in starts.view(count, batch, 1):
            yield self.validation[some + torch.arange(length)].long()
