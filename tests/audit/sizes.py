"""What launchers are called with that is no kernel's constant: it may change and nothing may be compiled anew."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from optimx.triton_kernels.tensor_table import LaunchSize, TensorTable


def addresses(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64)


def numbers(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float64)


@dataclass(frozen=True)
class Sizes:
    """What changes from step to step and from model to model, and the tile sizes.

    Attributes:
        tiles: The same in all calls of a variant.
        n_tensors: In one launch.
        offset: Where the launch's partial results begin; an odd one is no multiple of 16 bytes.
        shift: By how many elements scalars are off a multiple of 16 bytes.
    """

    tiles: LaunchSize = field(default_factory=LaunchSize)
    n_tensors: int = 1
    offset: int = 0
    shift: int = 0

    def table(self, n_roles: int = 1) -> TensorTable:
        numels, role = [16] * self.n_tensors, [torch.empty(16)] * self.n_tensors
        return TensorTable(numels, [role] * n_roles, range(self.n_tensors), torch.device("cpu"), self.tiles)

    def grads(self) -> torch.Tensor:
        return addresses(self.n_tensors)

    def scalar(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(1 + self.shift, dtype=dtype)[self.shift]

    def partials(self, n: int) -> torch.Tensor:
        """Room for the results of ``n`` programs, behind those of others."""
        return numbers(2, self.offset + n)[:, self.offset :]
