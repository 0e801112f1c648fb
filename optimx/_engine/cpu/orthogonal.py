"""Buckets of matrices of one shape on a CPU, whose steps are orthogonalized (Muon): many small ones at once."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _compat
from ..bucket import picker
from ..layout import flat
from ..matrices import Block, Scratch, equalized, row_squares
from ..newton_schulz import first_dtype, orthogonalize_
from ..rounds import MATRICES, Share, Update
from ..rule import Row
from .batch import in_order, runs
from .elementwise import PIECE, NativeBucket

#: Elements of matrices that are orthogonalized together: more products in a call take less time each (measured from
#: 2**18 to 2**21).
TOGETHER = 1 << 20


class Stack(NamedTuple):
    """Matrices that are orthogonalized together: a block of some members.

    Attributes:
        block: Which matrices of each.
        times: What the step size is multiplied by.
        members: Which of the bucket's.
        together: Their momentum buffers lie one after the other, in this order.
    """

    block: Block
    times: float
    members: list[int]
    together: bool


class OrthogonalBucket(NativeBucket):
    """Members on a CPU, whose variant is a :class:`~..matrices.MatrixVariant`: whole ones, or parts of larger ones."""

    def finish(self, known_scalars: Container[int]) -> None:
        super().finish(known_scalars)
        self.memory = Scratch(self.key.device)
        self._stacks: list[Stack] = []
        indices = range(len(self.positions))
        buffers = self.members.states[0]
        for block, times in () if self.meets else zip(self.key.variant.blocks, self.key.variant.times, strict=True):
            count = max(1, TOGETHER // max(1, block.numel))
            for members in ([*indices[i : i + count]] for i in range(0, len(indices), count)):
                tensors = self._parts([buffers[i] for i in members], block)
                lie_together = len(runs(range(len(members)), [tensors])) == 1 and in_order(tensors)
                self._stacks.append(Stack(block, times, members, len(members) > 1 and lie_together))

    def _parts(self, tensors: Sequence[Tensor], block: Block, row_numel: int | None = None) -> Sequence[Tensor]:
        """Of tensors with ``row_numel`` elements a row (None: as parameters have), what belongs to a block."""
        if len(self.key.variant.blocks) == 1:
            return tensors
        return [block.of(flat(tensor), row_numel) for tensor in tensors]

    def take_step(self, scale: float) -> Update:
        rows: list[Row] = [()] * len(self.positions)
        for call in self._calls:
            for i in range(len(rows)) if call.indices is None else call.indices:
                rows[i] = call.row
        if self.meets:
            yield from self._step_of_parts(rows, scale)
        for stack in self._stacks:
            self._step(stack, [rows[i] for i in stack.members], scale)

    def _step_of_parts(self, rows: Sequence[Row], scale: float) -> Update:
        """One step of parts of matrices, which ranks put together and orthogonalize."""
        params, grads, (buffers,), _ = self.members
        numels = [param.numel() for param in params]
        parts = self.memory("parts", (sum(numels),), first_dtype(self.key.variant.dtype)).split(numels)
        for grad, buffer, (_, _, momentum_c, mix, *_), x in zip(grads, buffers, rows, parts, strict=True):
            _advance(flat(buffer), flat(grad), scale, momentum_c, mix, x, self.memory)
        yield MATRICES, [*map(Share, self.positions, repeat("matrix"), parts)]
        for param, (*_, decay, lr, _), x in zip(params, rows, parts, strict=True):
            p = flat(param)
            self._decay_(p, x, decay)
            p.add_(x, alpha=-lr * self.key.variant.times[0])

    def _step(self, stack: Stack, rows: list[Row], scale: float) -> None:
        """One step of some matrices, with gradients times ``scale``."""
        block, n = stack.block, len(stack.members)
        of_members = self.members.pick(picker(stack.members))
        params, grads, buffers = (
            self._parts(role, block) for role in (of_members.params, of_members.grads, of_members.states[0])
        )
        _, eps, momentum_c, mix, decay, lr, beta2_c = (_of_stack(column) for column in zip(*rows, strict=True))
        variant = self.key.variant
        # a member's matrices, if it has several, follow each other
        x = self.memory("matrices", (n, block.n_matrices * block.rows, block.columns), first_dtype(variant.dtype))
        if n == 1:
            _advance(flat(buffers[0]), flat(grads[0]), scale, momentum_c, mix, x.view(-1), self.memory)
        else:
            self._advance_together(grads, buffers, scale, momentum_c, mix, x, together=stack.together)
        matrices = x.view(n * block.n_matrices, block.rows, block.columns)
        eps = _of_matrices(_like(eps, x), block)
        matrices = orthogonalize_(matrices, variant.iterations, variant.dtype, eps, self.memory)
        if variant.normalized and matrices.numel():
            averages = self._parts(of_members.states[1], block, 1)
            self._normalize_(matrices, averages, block, _of_matrices(beta2_c, block))
        x = matrices.reshape(x.shape)
        # operators on lists take longer than both copies
        p = params[0].view(x.shape) if n == 1 else self._stacked("params", params, x.shape)
        self._decay_(p, x, decay)
        if isinstance(lr, Tensor):
            p.sub_(x * _like(lr * stack.times, p))
        else:
            p.add_(x, alpha=-lr * stack.times)
        if n > 1:
            _compat.foreach_copy_(params, p.view(n, *params[0].shape).unbind())

    def _normalize_(self, x: Tensor, averages: Sequence[Tensor], block: Block, beta2_c: float | Tensor) -> None:
        """Bring the rows of matrices to alike sizes, by averages of their mean squares, which are moved."""
        squares = row_squares(x)
        moved = self._stacked("averages", averages, (len(averages), block.n_matrices * block.rows))
        average = moved.view(squares.shape)
        average.copy_(average.double().lerp_(squares / block.columns, beta2_c))
        _compat.foreach_copy_(averages, moved.view(len(averages), *averages[0].shape).unbind())
        x.mul_(equalized(squares, average).float())

    def _decay_(self, p: Tensor, x: Tensor, decay: float | Tensor) -> None:
        """Let weights decay before a step along ``-x``."""
        decay = _like(decay, p)
        if not self.key.variant.cautious:
            p.mul_(decay)
            return
        # signs, because products may underflow
        sign = torch.sign(p, out=self.memory("signs", p.shape, p.dtype)).mul_(x)
        opposed = torch.lt(sign, 0, out=self.memory("opposed", p.shape, torch.bool))
        decayed = torch.mul(p, decay, out=self.memory("decayed", p.shape, p.dtype))
        torch.where(opposed, p, decayed, out=p)

    def _advance_together(
        self,
        grads: Sequence[Tensor],
        buffers: Sequence[Tensor],
        scale: float,
        momentum_c: float | Tensor,
        mix: float | Tensor,
        x: Tensor,
        *,
        together: bool,
    ) -> None:
        """Move the averages of several matrices, and leave in ``x`` what is to be orthogonalized."""
        g = self._stacked("grads", grads, x.shape)
        if g.dtype is not buffers[0].dtype:
            g = self.memory("scaled grads", x.shape, buffers[0].dtype).copy_(g)
        if scale != 1.0:
            g.mul_(scale)
        if together:
            average = buffers[0].as_strided(x.shape, x.stride())
        else:
            average = self._stacked("buffers", buffers, x.shape)
        average.lerp_(g, _like(momentum_c, g))
        x.copy_(g.lerp_(average, _like(mix, g)))
        if not together:
            _compat.foreach_copy_(buffers, average.view(len(buffers), *buffers[0].shape).unbind())

    def _stacked(self, name: str, tensors: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Copies of tensors, one after the other."""
        memory = self.memory(name, shape, tensors[0].dtype)
        torch.stack([tensor.detach() for tensor in tensors], out=memory.view(len(tensors), *tensors[0].shape))
        return memory


def _of_stack(column: Sequence[float]) -> float | Tensor:
    """A hyperparameter of all matrices of a stack: one number, or ``[n, 1, 1]``."""
    if len({*column}) == 1:
        return column[0]
    return torch.tensor(column, dtype=torch.float64, device="cpu").view(-1, 1, 1)


def _of_matrices(value: float | Tensor, block: Block) -> float | Tensor:
    """What members have, for each of their matrices."""
    return value.repeat_interleave(block.n_matrices, 0) if isinstance(value, Tensor) and block.n_matrices > 1 else value


def _like(weight: float | Tensor, tensor: Tensor) -> float | Tensor:
    return weight.to(tensor.dtype) if isinstance(weight, Tensor) else weight


def _advance(buffer: Tensor, grad: Tensor, scale: float, momentum_c: Any, mix: Any, out: Tensor, memory: Any) -> None:
    """The same for a large matrix, piece by piece."""
    for average, g, x in _pieces(buffer, grad, out):
        update = memory("piece", g.shape, average.dtype)
        if scale != 1.0 or g.dtype is not average.dtype:
            g = memory("scaled piece", g.shape, average.dtype).copy_(g).mul_(scale)
        average.lerp_(g, momentum_c)
        x.copy_(torch.lerp(g, average, mix, out=update))


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(PIECE) for tensor in tensors), strict=True)
