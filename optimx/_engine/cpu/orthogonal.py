"""Buckets of matrices of one shape on a CPU, whose steps are orthogonalized (Muon): many small ones at once."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _compat
from ..bucket import picker
from ..layout import flat
from ..matrices import Block, equalized, row_squares
from ..newton_schulz import first_dtype, orthogonalize_
from ..rounds import MATRICES, Share, Update
from ..rule import Row
from .batch import in_order, runs
from .elementwise import PIECE, NativeBucket

#: Elements of matrices that are orthogonalized together: more products in a call take less time each (measured from
#: 2**18 to 2**22).
TOGETHER = 1 << 21
#: Elements of matrices up to which these are updated in copies: more calls take longer (measured from 2**12 to 2**16).
COPIED = 1 << 16


class Stack(NamedTuple):
    """Matrices that are orthogonalized together: a block of some members.

    Attributes:
        block: Which matrices of each.
        times: What the step size is multiplied by.
        members: Which of the bucket's.
        copied: They are updated together, in copies.
        together: Their momentum buffers lie one after the other, in this order.
    """

    block: Block
    times: float
    members: list[int]
    copied: bool
    together: bool


class OrthogonalBucket(NativeBucket):
    """Members on a CPU, whose variant is a :class:`~..matrices.MatrixVariant`: whole ones, or parts of larger ones."""

    takes_riders = False

    def _new_compiled(self) -> None:
        return None

    def finish(self, known_scalars: Container[int]) -> None:
        super().finish(known_scalars)
        self.memory = self.scratch_for("matrices")
        self._stacks: list[Stack] = []
        indices = range(len(self.positions))
        buffers = self.members.states[0]
        for block, times in () if self.meets else zip(self.key.variant.blocks, self.key.variant.times, strict=True):
            count = max(1, TOGETHER // max(1, block.numel))
            for members in ([*indices[i : i + count]] for i in range(0, len(indices), count)):
                tensors = self._parts([buffers[i] for i in members], block)
                lie_together = len(runs(range(len(members)), [tensors])) == 1 and in_order(tensors)
                copied = len(members) > 1 and block.numel <= COPIED and self.coder is None
                self._stacks.append(Stack(block, times, members, copied, copied and lie_together))

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
        numels = [param.numel() for param in self.members.params]
        everyone = range(len(numels))
        parts = self.memory("parts", (sum(numels),), first_dtype(self.key.variant.dtype)).split(numels)
        self._advance_each(everyone, 0, rows, scale, parts)
        yield MATRICES, [*map(Share, self.positions, repeat("matrix"), parts)]
        self._take_each(everyone, 0, rows, parts, self.key.variant.times[0])

    def _step(self, stack: Stack, rows: list[Row], scale: float) -> None:
        """One step of some matrices, with gradients times ``scale``."""
        block, n, variant = stack.block, len(stack.members), self.key.variant
        of_members = self.members.pick(picker(stack.members))
        params, grads, buffers = (
            self._parts(role, block) for role in (of_members.params, of_members.grads, of_members.states[0])
        )
        _, eps, momentum_c, mix, decay, lr, beta2_c = map(_of_stack, zip(*rows, strict=True))
        # a member's matrices, if it has several, follow each other
        shape = n, block.n_matrices, block.rows, block.columns
        x = self.memory("matrices", shape, first_dtype(variant.dtype))
        if stack.copied:
            self._advance_together(grads, buffers, scale, momentum_c, mix, x, together=stack.together)
        else:
            self._advance_each(stack.members, block.first_row * block.columns, rows, scale, x.view(n, block.numel))
        matrices = x.view(n * block.n_matrices, block.rows, block.columns)
        if isinstance(eps, Tensor):
            eps = eps.to(x.dtype).view(-1, 1, 1).repeat_interleave(block.n_matrices, 0)
        matrices = orthogonalize_(matrices, variant.iterations, variant.dtype, eps, self.memory)
        if variant.normalized and matrices.numel():
            averages = self._parts(of_members.states[1], block, 1)
            self._normalize_(matrices, averages, block, beta2_c)
        steps = matrices.view(shape)
        if stack.copied:
            self._take_together(params, decay, lr, steps, stack.times)
        else:
            self._take_each(stack.members, block.first_row * block.columns, rows, steps, stack.times)

    def _take_each(
        self, members: Sequence[int], first: int, rows: Sequence[Row], steps: Iterable[Tensor], times: float
    ) -> None:
        """Take a step along each of ``-steps``, in the elements of members from ``first`` on."""
        for i, (*_, decay, lr, _), of_member in zip(members, rows, steps, strict=True):
            if self.coder is None:
                # whatever the order of its columns
                p = flat(self.members.params[i])[first : first + of_member.numel()].view(of_member.shape)
                walk: Iterable[tuple[Tensor, tuple[Tensor, ...]]] = [(p, (of_member,))]
            else:
                walk = self._walk(0, i, first, self.memory("step", of_member.shape, of_member.dtype).copy_(of_member))
            for p, (x,) in walk:
                self._decay_(p, x, decay)
                p.add_(x, alpha=-lr * times)

    def _walk(self, role: int, i: int, first: int, *others: Tensor) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """A member's parameter (0) or momentum (1) from an element on, beside others of as many; what is yielded may be
        written."""
        params, _, states, _ = self.members
        tensors = [flat(params[i]), *(flat(of_state[i]) for of_state in states)]
        for pieces in zip(*(other.view(-1).split(PIECE) for other in others), strict=True):
            n = len(pieces[0])
            if self.coder is None:
                yield tensors[role][first : first + n], pieces
            else:
                kept = self.coder.elements(self.coder.roles[role], tensors, i, first, n)
                values = kept.read(self.scratch(role, n))
                yield values, pieces
                kept.write(values)
            first += n

    def _take_together(
        self, params: Sequence[Tensor], decay: float | Tensor, lr: float | Tensor, steps: Tensor, times: float
    ) -> None:
        """The same for small tensors, in copies, because operators on lists take longer."""
        p = self._stacked("params", params, steps.shape)
        self._decay_(p, steps, decay)
        if isinstance(lr, Tensor):
            p.sub_(steps * _like(lr * times, p))
        else:
            p.add_(steps, alpha=-lr * times)
        self._put_back("params", params)

    def _normalize_(self, x: Tensor, averages: Sequence[Tensor], block: Block, beta2_c: float | Tensor) -> None:
        """Bring the rows of matrices to alike sizes, by averages of their mean squares, which are moved."""
        squares = row_squares(x)
        moved = self._stacked("averages", averages, (len(averages), block.n_matrices, block.rows, 1))
        moved.copy_(moved.double().lerp_(squares.view(moved.shape) / block.columns, beta2_c))
        self._put_back("averages", averages)
        x.mul_(equalized(squares, moved.view(squares.shape)).float())

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
            self._put_back("buffers", buffers)

    def _advance_each(
        self, members: Sequence[int], first: int, rows: Sequence[Row], scale: float, out: Iterable[Tensor]
    ) -> None:
        """The same for large tensors, in their elements from ``first`` on, piece by piece."""
        for i, (_, _, momentum_c, mix, *_), of_member in zip(members, rows, out, strict=True):
            grad = flat(self.members.grads[i])[first : first + len(of_member)]
            for average, (g, x) in self._walk(1, i, first, grad, of_member):
                update = self.memory("piece", g.shape, average.dtype)
                if scale != 1.0 or g.dtype is not average.dtype:
                    g = self.memory("scaled piece", g.shape, average.dtype).copy_(g).mul_(scale)
                average.lerp_(g, momentum_c)
                x.copy_(torch.lerp(g, average, mix, out=update))

    def _stacked(self, name: str, tensors: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Copies of tensors, one after the other."""
        memory = self.memory(name, shape, tensors[0].dtype)
        torch.stack([*tensors], out=memory.view(len(tensors), *tensors[0].shape))
        return memory

    def _put_back(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Let tensors be what their copies have become."""
        shape = torch.Size([len(tensors), *tensors[0].shape])
        _compat.foreach_copy_(tensors, self.memory.entries(name, shape, tensors[0].dtype))


def _of_stack(column: Sequence[float]) -> float | Tensor:
    """A hyperparameter of all members of a stack: one number, or ``[n, 1, 1, 1]``."""
    if len({*column}) == 1:
        return column[0]
    return torch.tensor(column, dtype=torch.float64, device="cpu").view(-1, 1, 1, 1)


def _like(weight: float | Tensor, tensor: Tensor) -> float | Tensor:
    return weight.to(tensor.dtype) if isinstance(weight, Tensor) else weight
