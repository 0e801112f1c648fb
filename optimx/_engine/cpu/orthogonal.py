"""Buckets of matrices of one shape on a CPU, whose steps are orthogonalized (Muon): many small ones at once."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _compat
from ..bucket import picker
from ..layout import flat
from ..newton_schulz import first_dtype, orthogonalize_
from ..rounds import Update
from ..rule import Row
from .batch import in_order, runs
from .elementwise import PIECE, NativeBucket

#: Elements of matrices that are orthogonalized together; larger ones, one after the other (there is no gain from
#: there on: measured from 2**12 to 2**19).
TOGETHER = 1 << 18


class OrthogonalBucket(NativeBucket):
    """Members on a CPU. Their variant says shape, iterations and dtype of these."""

    def finish(self, known_scalars: Container[int]) -> None:
        super().finish(known_scalars)
        self._memory: dict[str, Tensor] = {}
        count = max(1, TOGETHER // max(1, self.members.params[0].numel()))
        indices = range(len(self.positions))
        self._stacks = [[*indices[i : i + count]] for i in range(0, len(indices), count)]
        (buffers,) = self.members.states
        #: Of each stack, whether its buffers lie one after the other, in this order.
        self._together = []
        for stack in self._stacks:
            tensors = [buffers[i] for i in stack]
            lie_together = len(runs(range(len(stack)), [tensors])) == 1 and in_order(tensors)
            self._together.append(len(stack) > 1 and lie_together)

    def take_step(self, scale: float) -> Update:
        rows: list[Row] = [()] * len(self.positions)
        for call in self._calls:
            for i in range(len(rows)) if call.indices is None else call.indices:
                rows[i] = call.row
        for stack, together in zip(self._stacks, self._together, strict=True):
            self._step(stack, [rows[i] for i in stack], scale, together=together)
        yield from ()

    def _step(self, stack: list[int], rows: list[Row], scale: float, *, together: bool) -> None:
        """One step of some members, with gradients times ``scale``."""
        params, grads, (buffers,), _ = self.members.pick(picker(stack))
        _, eps, momentum_c, mix, decay, lr = (_of_stack(column) for column in zip(*rows, strict=True))
        shape, iterations, dtype, times = self.key.variant
        x = self.memory("matrices", (len(stack), *shape), first_dtype(dtype))
        if len(stack) == 1:
            _advance(flat(buffers[0]), flat(grads[0]), scale, momentum_c, mix, x.view(-1), self.memory)
        else:
            self._advance_together(grads, buffers, scale, momentum_c, mix, x, together=together)
        x = orthogonalize_(x, iterations, dtype, _like(eps, x), self.memory)
        matrices, steps = [param.view(shape) for param in params], x.unbind()
        # of tensors of 16 bits, the operator on lists rounds the factor, too
        if isinstance(decay, float) and isinstance(lr, float) and matrices[0].dtype.itemsize > 2:
            _compat.foreach_mul_(matrices, decay)
            _compat.foreach_add_(matrices, steps, alpha=-lr * times)
            return
        for matrix, step, row in zip(matrices, steps, rows, strict=True):
            matrix.mul_(row[-2]).add_(step, alpha=-row[-1] * times)

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
        dtype = buffers[0].dtype
        g, *copies = (self.memory(name, x.shape, dtype) for name in ("grads", "buffers")[: 2 - together])
        places = g.view(len(grads), *grads[0].shape).unbind()
        _compat.foreach_copy_(places, grads)
        if scale != 1.0:
            g.mul_(scale)
        if together:
            average = buffers[0].as_strided(x.shape, x.stride())
        else:
            (average,) = copies
            _compat.foreach_copy_(average.view(len(buffers), *buffers[0].shape).unbind(), buffers)
        average.lerp_(g, _like(momentum_c, g))
        x.copy_(g.lerp_(average, _like(mix, g)))
        if not together:
            _compat.foreach_copy_(buffers, average.view(len(buffers), *buffers[0].shape).unbind())

    def memory(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that stays; what it held is of no use."""
        numel = torch.Size(shape).numel()
        kept = self._memory.get(name)
        if kept is None or kept.numel() < numel or kept.dtype is not dtype:
            kept = self._memory[name] = torch.empty(numel, dtype=dtype, device="cpu")
        return kept[:numel].view(shape)


def _of_stack(column: Sequence[float]) -> float | Tensor:
    """A hyperparameter of all matrices of a stack: one number, or ``[n, 1, 1]``."""
    if len({*column}) == 1:
        return column[0]
    return torch.tensor(column, dtype=torch.float64, device="cpu").view(-1, 1, 1)


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
