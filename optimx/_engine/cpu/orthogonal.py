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

#: Elements of matrices that are orthogonalized together: more products in a call take less time each (measured from
#: 2**18 to 2**21).
TOGETHER = 1 << 20


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
        (count, rows_of_each, columns), iterations, dtype, times = self.key.variant
        # a member's matrices, if it has several, follow each other
        shape = count * rows_of_each, columns
        x = self.memory("matrices", (len(stack), *shape), first_dtype(dtype))
        if len(stack) == 1:
            _advance(flat(buffers[0]), flat(grads[0]), scale, momentum_c, mix, x.view(-1), self.memory)
        else:
            self._advance_together(grads, buffers, scale, momentum_c, mix, x, together=together)
        matrices = x.view(len(stack) * count, rows_of_each, columns)
        eps = eps.repeat_interleave(count, 0) if isinstance(eps, Tensor) else eps
        matrices = orthogonalize_(matrices, iterations, dtype, _like(eps, x), self.memory)
        x = matrices.reshape(x.shape)
        if len(stack) == 1:
            params[0].view(shape).mul_(decay).add_(x[0], alpha=-lr * times)
            return
        # operators on lists take longer than both copies
        p = self._stacked("params", params, x.shape)
        p.mul_(_like(decay, p))
        if isinstance(lr, Tensor):
            p.sub_(x * _like(lr * times, p))
        else:
            p.add_(x, alpha=-lr * times)
        _compat.foreach_copy_(params, p.view(len(params), *params[0].shape).unbind())

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

    def _stacked(self, name: str, tensors: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """Copies of tensors, one after the other, as matrices."""
        memory = self.memory(name, shape, tensors[0].dtype)
        torch.stack([tensor.detach() for tensor in tensors], out=memory.view(len(tensors), *tensors[0].shape))
        return memory

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
