"""Buckets of matrices on the Triton backend: sums first, which also tell the gradients' norm, then the update."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from ...triton_kernels import matrix_walk
from ...triton_kernels.matrix_table import MatrixTable, tables
from ..rounds import LENGTHS, MEANS, SUMS, Share, Update, together
from ..storage import CODED, GROUP, Format
from .elementwise import TritonBucket

#: By the name of what a walk has found first.
ROUNDS = {"rows": SUMS, "columns": SUMS, "means": MEANS, "lengths": LENGTHS}


class FactoredTritonBucket(TritonBucket):
    """Members that one round of launches updates; kernels of convolutions have a round of their own."""

    takes_riders = False
    watches_grads = False

    @classmethod
    def formats_problem(cls, variant: Any, formats: Sequence[Format], param: Tensor) -> str:
        factored, transposed, _ = variant
        if any(kept.kind in CODED for kept in formats) and _matrices(param.shape, factored, transposed)[2] % GROUP:
            return f"its rows in memory, which 8-bit states have scales for, are no multiple of {GROUP} long"
        return ""

    def finish(self, known_scalars: Container[int]) -> None:
        super().finish(known_scalars)
        factored, transposed, _ = self.key.variant
        size = self.table.size
        params, _, states, _ = self.members
        shapes = [_matrices(param.shape, factored, transposed) for param in params]
        # averages are of any length, and read as such; scales one by one
        formats = self.storage.formats
        each = formats.elements_each[2:] or [1] * len(states)
        others = zip(states[1 + factored :], each[1 + factored :], strict=True)
        walked = [params, *(role for role, n in others if n == 1)]
        aligned = [all(tensor.data_ptr() % 16 == 0 for tensor in tensors) for tensors in zip(*walked, strict=True)]
        dtypes = matrix_walk.walked(self.key.dtypes, factored, formats)
        divisor = matrix_walk.row_divisor(dtypes)
        # of a block of four rows no group is cut
        block_size = max(size.block(dtypes), 4 * GROUP if formats.elements_each else 0)
        whole = [_matrices(shape, factored, transposed) for shape in self.shapes] if self.meets else None
        self._matrices = tables(shapes, aligned, factored, divisor, self.key.device, size, block_size, whole)
        # of a part that is a block of columns, not in rows, too
        self._is_straight = not any(geometry.gap or geometry.first % 8 for geometry in self.geometries)
        self._measured = False
        self._grad_scale: Tensor | None = None
        self._sums: list[matrix_walk.Sums] = []

    @property
    def n_partials(self) -> int:
        return sum(table.n_programs for table in self._matrices)

    @property
    def member_of_partial(self) -> Tensor:
        return torch.cat([table.tensor[table.program_tensor] for table in self._matrices])

    def send(self, values: Sequence[tuple[Any, ...]]) -> None:
        super().send(values)
        self._measured, self._grad_scale = False, None
        self._aligned = not any(address % 16 for address in self.addresses)

    def _needs(self, control: Tensor | None) -> tuple[Any, ...]:
        return *super()._needs(control), self._aligned, self._measured, self._grad_scale is not None

    def _measure(self, partials: Tensor, offset: int, grad_scale: Tensor | None) -> None:
        self._measured, self._grad_scale = True, grad_scale
        self._sum(partials[:, offset:], grad_scale, None, warmup=False)

    def _sum(self, partials: Tensor, grad_scale: Tensor | None, control: Tensor | None, warmup: bool) -> None:
        dtype = torch.float64 if self.key.dtypes[0] is torch.float64 else torch.float32
        factored = self.key.variant[0]
        self._sums = [matrix_walk.Sums.of(table, dtype, factored) for table in self._matrices]
        first = 0
        for table, sums in zip(self._matrices, self._sums, strict=True):
            norms, bad = partials[:2, first : first + table.n_programs]
            matrix_walk.sums_(
                self.table, table, self.grads, grad_scale, control, sums, norms, bad, factored=factored,
                dtypes=self.key.dtypes, storage=self.storage, aligned=self._aligned and table.aligned, warmup=warmup,
            )  # fmt: skip
            first += table.n_programs

    def _launch_update(self, control: Tensor | None, warmup: bool) -> Update:
        if not self._measured:
            partials = torch.empty(2, max(1, self.n_partials), dtype=torch.float64, device=self.key.device)
            self._sum(partials, None, control, warmup)
        updates = (
            self._update(table, sums, control, warmup) for table, sums in zip(self._matrices, self._sums, strict=True)
        )
        yield from together(updates)
        if not warmup:
            self._sums = []

    def _update(self, table: MatrixTable, sums: matrix_walk.Sums, control: Tensor | None, warmup: bool) -> Update:
        positions = [self.positions[i] for i in table.indices]
        for found in matrix_walk.update_(
            self.table, table, self.grads, self._rows, self._grad_scale, control, sums, measured=self._measured,
            variant=self.key.variant, dtypes=self.key.dtypes, storage=self.storage,
            aligned=self._aligned and table.aligned, is_straight=self._is_straight and table.aligned,
            whole_rows=self.has_whole_rows, warmup=warmup,
        ):  # fmt: skip
            shares = chain.from_iterable(map(Share, positions, repeat(name), each) for name, each in found.items())
            yield ROUNDS[next(iter(found))], [*shares]


def _matrices(shape: torch.Size, factored: bool, transposed: bool) -> tuple[int, int, int]:
    """How many matrices, of how many rows and columns, lie in a tensor's memory."""
    if not factored:
        return 1, 1, shape.numel()
    n_rows, n_columns = shape[:-3:-1] if transposed else shape[-2:]
    return math.prod(shape[:-2]), n_rows, n_columns
