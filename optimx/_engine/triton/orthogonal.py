"""Buckets of matrices of one shape on the Triton backend, whose steps are orthogonalized (Muon)."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...triton_kernels import muon
from ...triton_kernels.device import FACTOR
from ...triton_kernels.tensor_table import TensorTable, upload
from ...triton_kernels.update import update_
from ..newton_schulz import Products, first_dtype, orthogonalize_
from ..rounds import Update
from . import elementwise
from .elementwise import TritonBucket
from .products import COMPILING, KERNELS, products_for

#: Elements of matrices that are orthogonalized together: what memory beside the states may have.
TOGETHER = 1 << 27


class Stack(NamedTuple):
    """Matrices that are orthogonalized together.

    Attributes:
        members: Which of the bucket's.
        averages: Roles: what is to be orthogonalized, momentum buffers.
        steps: Role: params.
    """

    members: slice
    averages: TensorTable
    steps: TensorTable


class OrthogonalTritonBucket(TritonBucket):
    """Members that a launch for the momentum, batched products, Triton's or torch's, and a launch for the step update.

    Their variant says shape, iterations, dtype of these, and the factor of the step size that follows from the shape.
    """

    def finish(self, known_scalars: Container[int]) -> None:
        super().finish(known_scalars)
        self._memory: dict[str, Tensor] = {}
        (count, rows, columns), _, dtype, times = self.key.variant
        device, n, numel = self.key.device, len(self.positions), count * rows * columns
        #: Momentum is worked out in the parameters' precision.
        self._first_dtype = torch.float64 if self.key.dtypes[0] is torch.float64 else first_dtype(dtype)
        # rows of tables begin at multiples of 16 bytes
        most = max(4, TOGETHER // max(1, numel) // 4 * 4)
        params, _, (buffers,), _ = self.members
        self._stacks: list[Stack] = []
        for first in range(0, n, most):
            members = slice(first, min(n, first + most))
            numels = [numel] * len(params[members])
            matrices = self._matrices(len(numels)).view(len(numels), numel).unbind()
            tables = (
                TensorTable(numels, roles, range(len(numels)), device, elementwise.launch_size)
                for roles in ([matrices, buffers[members]], [params[members]])
            )
            self._stacks.append(Stack(members, *tables))
        self._products = products_for(device, min(n, most) * count, rows, columns, dtype)
        #: For the step there is neither a norm nor a loss scale, but the factor of its size.
        self._control = upload(torch.tensor([0.0, times, 0.0], dtype=torch.float64, device="cpu"), device)

    def _matrices(self, n_members: int) -> Tensor:
        (count, rows, columns), *_ = self.key.variant
        return self.memory("matrices", (n_members * count, rows, columns), self._first_dtype)

    def send(self, values: Sequence[tuple[Any, ...]]) -> None:
        super().send(values)
        for stack in self._stacks:
            stack.averages.rows = stack.steps.rows = self.table.rows[stack.members]

    def _launch_update(self, control: Tensor | None, warmup: bool) -> Update:
        _, _, dtype, _ = self.key.variant
        of_param, of_grad, of_buffer = self.key.dtypes
        of_step = self._control
        if control is not None:
            of_step = control.clone()
            of_step[FACTOR.value] = self._control[FACTOR.value]
        for stack in self._stacks:
            grads = self.grads[stack.members]
            update_(
                muon.AVERAGE, stack.averages, grads, self._rows, control, variant=(),
                dtypes=(self._first_dtype, of_grad, of_buffer), warmup=warmup,
            )  # fmt: skip
            x = self._matrices(len(grads))
            if not warmup:
                x = self._orthogonal(x, stack.averages.rows, self._products)
            elif self._products is KERNELS:
                # of whatever is in memory: nobody reads the result
                self._orthogonal(x, stack.averages.rows, COMPILING)
            bytes_of_each = x.numel() // len(grads) * dtype.itemsize
            places = x.data_ptr() + torch.arange(len(grads), device=grads.device) * bytes_of_each
            # what has no gradient stays as it is
            update_(
                muon.TAKE, stack.steps, torch.where(grads != 0, places, 0), self._rows, of_step, variant=(),
                dtypes=(of_param, dtype), warmup=warmup,
            )  # fmt: skip
        yield from ()

    def _orthogonal(self, x: Tensor, rows: Tensor, products: Products) -> Tensor:
        """Matrices, contiguous, orthogonalized."""
        _, iterations, dtype, _ = self.key.variant
        if x.dtype is torch.float64:
            x = self.memory("matrices in few bits", tuple(x.shape), first_dtype(dtype)).copy_(x)
        eps = self._rows.view(-1, len(muon.HYPER))[:, muon.HYPER.index("eps")]
        eps = eps[rows.long()].to(x.dtype).repeat_interleave(len(x) // len(rows)).view(-1, 1, 1)
        result = orthogonalize_(x, iterations, dtype, eps, self.memory, products)
        return result if result.is_contiguous() else self.memory("step", tuple(x.shape), dtype).copy_(result)

    def memory(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that stays; what it held is of no use."""
        numel = torch.Size(shape).numel()
        kept = self._memory.get(name)
        if kept is None or kept.numel() < numel:
            kept = self._memory[name] = torch.empty(numel, dtype=dtype, device=self.key.device)
        return kept[:numel].view(shape)
