"""Buckets of matrices of one shape on the Triton backend, whose steps are orthogonalized (Muon)."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...triton_kernels import muon
from ...triton_kernels.device import FACTOR, NORM, SKIP
from ...triton_kernels.storage import Formats, Noise, Storage
from ...triton_kernels.tensor_table import TensorTable, upload
from ...triton_kernels.update import update_
from ..matrices import Block, Scratch, equalized, row_squares
from ..newton_schulz import Products, first_dtype, orthogonalize_
from ..rounds import MATRICES, Share, Update
from . import elementwise
from .elementwise import TritonBucket
from .products import COMPILING, KERNELS, products_for

#: Elements of matrices that are orthogonalized together: what memory beside the states may have.
TOGETHER = 1 << 27


class Stack(NamedTuple):
    """Matrices that are orthogonalized together: a block of some members.

    Attributes:
        block: Which matrices of each.
        members: Which of the bucket's.
        averages: Roles: what is to be orthogonalized, momentum buffers.
        steps: Role: params.
        row_averages: Roles: averages of rows, and the states that they are copies of; None: rows stay as they are.
        noise: Of the members, whose elements are those of the block; None: nothing is rounded stochastically.
        products: Where products of iterations come from.
    """

    block: Block
    members: slice
    averages: TensorTable
    steps: TensorTable
    row_averages: TensorTable | None
    noise: Tensor | None
    products: Products

    @property
    def tables(self) -> list[TensorTable]:
        """All of them."""
        return [self.averages, self.steps, *([] if self.row_averages is None else [self.row_averages])]


class OrthogonalTritonBucket(TritonBucket):
    """Members that a launch for the momentum, batched products, Triton's or torch's, and a launch for the step update.

    Their variant is a :class:`~..matrices.MatrixVariant`.
    """

    takes_riders = False

    def finish(self, known_scalars: Container[int]) -> None:
        super().finish(known_scalars)
        self.memory = Scratch(self.key.device)
        variant, device = self.key.variant, self.key.device
        #: Momentum is worked out in the parameters' precision.
        self._first_dtype = torch.float64 if self.key.dtypes[0] is torch.float64 else first_dtype(variant.dtype)
        #: For a step there is neither a norm nor a loss scale, but the factor of its size; for averages of rows 1.
        self._control_of = {
            block: upload(torch.tensor([0.0, times, 0.0], dtype=torch.float64, device="cpu"), device)
            for block, times in zip((*variant.blocks, None), (*variant.times, 1.0), strict=True)
        }
        self._companions = self._companions_of_roles()
        self._stacks: list[Stack] = []
        if self.meets:
            self._plan_parts()
            return
        for block in variant.blocks:
            # all that they need, because tables have its addresses
            n = min(self._most(block), len(self.positions))
            self._matrices(n, block)
            if variant.normalized:
                self._row_averages(n, block)
        self._stacks += chain.from_iterable(map(self._cut_into_stacks, variant.blocks))

    def _companions_of_roles(self) -> dict[int, int]:
        """For the parameter (0) and the momentum (1), where their companions are among states, if they have any."""
        first = self.n_roles - 1
        return {role: first + i for i, role in enumerate(self.storage.formats.companions)}

    def _companion(self, role: int) -> list[Sequence[Tensor]]:
        """The members' companions of a role, or nothing."""
        return [self.members.states[self._companions[role]]] if role in self._companions else []

    def _kept(self, role: int, *dtypes: torch.dtype) -> dict[str, Any]:
        """How a pass keeps the parameter (0), or the momentum (1) beside a plain matrix: dtypes, and kinds."""
        kinds = self.storage.formats.kinds
        companion = [self.key.dtypes[2 + self._companions[role]]] if role in self._companions else []
        of_pass = (0, kinds[1]) if kinds and role else kinds[:1]
        return {"dtypes": (*dtypes, *companion), "formats": Formats(of_pass if any(of_pass) else ())}

    def _plan_parts(self) -> None:
        """Parts of matrices have tables for all members, and a place each for what goes to other ranks."""
        params, _, (buffers, *_), _ = self.members
        numels = [param.numel() for param in params]
        # what begins at multiples of 16 bytes is read fastest
        padded = [-(-numel // 8) * 8 for numel in numels]
        memory = self.memory("parts", (sum(padded),), self._first_dtype)
        self._parts_of_members = [part[:numel] for part, numel in zip(memory.split(padded), numels, strict=True)]
        addresses = [*map(Tensor.data_ptr, self._parts_of_members)]
        device, size = self.key.device, elementwise.launch_size
        self._places = upload(torch.tensor(addresses, dtype=torch.int64, device="cpu"), device)
        indices = range(len(params))
        roles = [self._parts_of_members, buffers, *self._companion(1)]
        self._averages = TensorTable(numels, roles, indices, device, size)
        self._steps = TensorTable(numels, [params, *self._companion(0)], indices, device, size)

    def _most(self, block: Block) -> int:
        """Members whose blocks are orthogonalized together: rows of tables begin at multiples of 16 bytes."""
        return max(4, TOGETHER // max(1, block.numel) // 4 * 4)

    def _cut_into_stacks(self, block: Block) -> Iterator[Stack]:
        params, _, (buffers, *others), _ = self.members
        averages = others[: self.n_roles - 2]
        most = self._most(block)
        n_matrices = min(most, len(params)) * block.n_matrices
        products = products_for(self.key.device, n_matrices, block.rows, block.columns, self.key.variant.dtype)

        def table(numel: int, *roles: Sequence[Tensor]) -> TensorTable:
            n = len(roles[0])
            return TensorTable([numel] * n, roles, range(n), self.key.device, elementwise.launch_size)

        for first in range(0, len(params), most):
            members = slice(first, first + most)
            of_members = self._parts(params[members], block)
            n, n_rows = len(of_members), block.n_matrices * block.rows
            row_averages = None
            if averages:
                copies = self._row_averages(n, block).view(n, n_rows).unbind()
                row_averages = table(n_rows, copies, self._parts(averages[0][members], block, 1))
            matrices = self._matrices(n, block).view(n, block.numel).unbind()
            yield Stack(
                block,
                slice(first, first + n),
                table(block.numel, matrices, *self._parts_kept(1, buffers, members, block)),
                table(block.numel, *self._parts_kept(0, params, members, block)),
                row_averages,
                self._noise_of(members, block),
                products,
            )

    def _parts_kept(
        self, role: int, tensors: Sequence[Tensor], members: slice, block: Block
    ) -> Iterator[Sequence[Tensor]]:
        """What belongs to a block, of a role's tensors and of their companions."""
        yield self._parts(tensors[members], block)
        for companions in self._companion(role):
            each = tensors[0].numel() // max(1, companions[0].numel())
            yield self._parts(companions[members], block, block.columns // max(1, each))

    def _noise_of(self, members: slice, block: Block) -> Tensor | None:
        if self.storage.noise is None:
            return None
        rows = self.storage.noise.table[members].clone()
        rows[:, 2] += block.first_row * block.columns
        return rows

    def _storage(self, formats: Formats, noise: Tensor | None, members: slice) -> Storage:
        """Of a pass over some members."""
        if not formats.is_random:
            return Storage(formats)
        assert self.storage.noise is not None
        assert noise is not None
        return Storage(formats, Noise(noise, self.storage.noise.steps[members]))

    def _parts(self, tensors: Sequence[Tensor], block: Block, row_numel: int | None = None) -> Sequence[Tensor]:
        """Of tensors with ``row_numel`` elements a row (None: as parameters have), what belongs to a block."""
        return [block.of(tensor.detach().view(-1), row_numel) for tensor in tensors]

    def _matrices(self, n_members: int, block: Block) -> Tensor:
        return self.memory("matrices", (n_members * block.n_matrices, block.rows, block.columns), self._first_dtype)

    def _row_averages(self, n_members: int, block: Block) -> Tensor:
        return self.memory("averages of rows", (n_members * block.n_matrices, block.rows, 1), torch.float32)

    def send(self, values: Sequence[tuple[Any, ...]]) -> None:
        super().send(values)
        for stack in self._stacks:
            for table in stack.tables:
                table.rows = self.table.rows[stack.members]
        if self.meets:
            self._averages.rows = self._steps.rows = self.table.rows

    def _launch_update(self, control: Tensor | None, warmup: bool) -> Update:
        of_param, of_grad, of_buffer, *_ = self.key.dtypes
        variant = self.key.variant
        if self.meets:
            noise = None if self.storage.noise is None else self.storage.noise.table
            everyone = slice(len(self.positions))
            self._pass(
                muon.AVERAGE, self._averages, self.grads, control, (), noise, everyone, warmup,
                **self._kept(1, self._first_dtype, of_grad, of_buffer),
            )  # fmt: skip
            parts = map(Share, self.positions, repeat("matrix"), self._parts_of_members)
            yield MATRICES, self.updated([*parts])
            self._pass(
                muon.TAKE, self._steps, torch.where(self.grads[everyone] != 0, self._places, 0),
                self._control_like(variant.blocks[0], control), (variant.cautious,), noise, everyone, warmup,
                **self._kept(0, of_param, self._first_dtype),
            )  # fmt: skip
        for stack in self._stacks:
            grads, block = self.grads[stack.members], stack.block
            first = block.first_row * block.columns * of_grad.itemsize
            self._pass(
                muon.AVERAGE, stack.averages, torch.where(grads != 0, grads + first, 0) if first else grads, control,
                (), stack.noise, stack.members, warmup, **self._kept(1, self._first_dtype, of_grad, of_buffer),
            )  # fmt: skip
            x = self._matrices(len(grads), block)
            if not warmup:
                x = self._orthogonal(x, stack, stack.products)
            elif stack.products is KERNELS:
                # of whatever is in memory: nobody reads the result
                self._orthogonal(x, stack, COMPILING)
            if stack.row_averages is not None:
                squares = x.new_zeros(()) if warmup else row_squares(x)
                means = (squares / max(1, block.columns)).float()
                self._pass(
                    muon.AVERAGE_ROWS, stack.row_averages, _places(means, grads), self._control_like(None, control),
                    (), None, stack.members, warmup, formats=Formats(),
                    dtypes=(torch.float32, torch.float32, self.key.dtypes[3]),
                )  # fmt: skip
                if not warmup:
                    x.mul_(equalized(squares, self._row_averages(len(grads), block)).float())
            self._pass(
                muon.TAKE, stack.steps, _places(x, grads), self._control_like(block, control), (variant.cautious,),
                stack.noise, stack.members, warmup, **self._kept(0, of_param, variant.dtype),
            )  # fmt: skip

    def _pass(
        self,
        algorithm: muon.Pass,
        table: TensorTable,
        grads: Tensor,
        control: Tensor | None,
        variant: tuple[bool, ...],
        noise: Tensor | None,
        members: slice,
        warmup: bool,
        *,
        dtypes: tuple[torch.dtype, ...],
        formats: Formats,
    ) -> None:
        update_(
            algorithm, table, grads, self._rows, control, variant=variant, dtypes=dtypes,
            storage=self._storage(formats, noise, members), warmup=warmup,
        )  # fmt: skip

    def _control_like(self, block: Block | None, control: Tensor | None) -> Tensor:
        """What skips a step where ``control`` does, with the factor of a block's step size."""
        mine = self._control_of[block]
        return mine if control is None else torch.stack([mine[NORM.value], mine[FACTOR.value], control[SKIP.value]])

    def _orthogonal(self, x: Tensor, stack: Stack, products: Products) -> Tensor:
        """Matrices, contiguous, orthogonalized."""
        iterations, dtype, rows = self.key.variant.iterations, self.key.variant.dtype, stack.averages.rows
        if x.dtype is torch.float64:
            x = self.memory("matrices in few bits", tuple(x.shape), first_dtype(dtype)).copy_(x)
        eps = self._rows.view(-1, len(muon.HYPER))[:, muon.HYPER.index("eps")]
        eps = eps[rows.long()].to(x.dtype).repeat_interleave(stack.block.n_matrices).view(-1, 1, 1)
        result = orthogonalize_(x, iterations, dtype, eps, self.memory, products)
        return result if result.is_contiguous() else self.memory("step", tuple(x.shape), dtype).copy_(result)


def _places(tensor: Tensor, grads: Tensor) -> Tensor:
    """Addresses of its entries, one a member; what has no gradient stays as it is."""
    bytes_of_each = tensor.nbytes // len(grads)
    there = tensor.data_ptr() + torch.arange(len(grads), device=grads.device) * bytes_of_each
    return torch.where(grads != 0, there, 0)
