"""Buckets of matrices on a CPU, whose second moment is kept as row and column averages.

A step of a tensor is three passes: sums of squares of rows and columns, from which the averages follow; the length of
the update; the update. Each walks the tensor in pieces that stay in the cache, and makes the update anew, so nothing of
the tensor's size is ever allocated. Small tensors of one shape are copied together, as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _compat
from ..bucket import Members, picker
from ..rounds import LENGTHS, MEANS, SUMS, Share, Update, together
from .batch import in_order, runs
from .call import Call
from .codecs import elements_each
from .coder import CodedMatrices
from .compiled import CompiledMatrices
from .elementwise import PIECE, NativeBucket

Slices = tuple[slice, ...]
_ALL = slice(None)

#: Elements of tensors of one shape that are updated together, where that is more than one: the forty operators of
#: an update cost more than copies of them (measured from 2**18 to 2**20).
TOGETHER = 1 << 19

#: What is in scratch memory.
WORK, GRADS, PARAMS, MOMENTS = range(4)


class Stack:
    """Parameters of one shape, updated together: a large one alone and where it is, small ones in scratch memory.

    Roles are seen as ``[n_tensors, n_matrices, n_rows, n_columns]``, in the order of memory.

    Args:
        bucket: Theirs.
        members: The call's.
        indices: Which of them.
        of_bucket: Which of the bucket's members.
    """

    def __init__(self, bucket: FactoredBucket, members: Members, indices: list[int], of_bucket: list[int]) -> None:
        self._pick = picker(indices)
        self.of_bucket = of_bucket
        self.positions = [bucket.positions[i] for i in of_bucket]
        self.factored, self.transposed, self.has_moment = bucket.key.variant
        first, *_ = self.of(members).params
        self.shape = len(indices), *self._matrices(first.shape)
        #: Of the tensors that these are parts of: elements, rows, columns.
        whole = bucket.shapes[of_bucket[0]]
        self.whole = whole.numel(), *self._matrices(whole)[1:]
        self.numel = first.numel()
        self.alone = len(indices) == 1
        #: Compiled walks are over one matrix.
        self.is_matrix = self.alone and self.factored and self.shape[1] == 1 and self.numel > 0
        #: What :meth:`measure` gave, from the norm to the update of a step.
        self.sums: tuple[Tensor, Tensor] | None = None
        self.pieces = [*self._pieces(max(map(elements_each, bucket.key.formats), default=1))]
        self._views: dict[int, list[Tensor]] = {}
        averages = self.of(members).states[: 1 + self.factored]
        #: Whether averages, of each kind, lie one after the other.
        self.together = not self.alone and len(runs(range(len(indices)), averages)) == 1 and in_order(averages[0])

    def _matrices(self, shape: torch.Size) -> tuple[int, int, int]:
        """Matrices, rows and columns in the memory of such a tensor."""
        if not self.factored:
            return 1, 1, shape.numel()
        rows, columns = shape[:-3:-1] if self.transposed else shape[-2:]
        return math.prod(shape[:-2]), rows, columns

    def of(self, members: Members) -> Members:
        """The stack's tensors of those of its call."""
        return members.pick(self._pick)

    def oriented(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors with rows that are contiguous."""
        return [tensor.mT for tensor in tensors] if self.transposed else tensors

    def where_it_is(self, tensor: Tensor) -> Tensor:
        return tensor.detach().as_strided(self.shape, (self.numel, self.shape[2] * self.shape[3], self.shape[3], 1))

    def _pieces(self, group: int) -> Iterator[Slices]:
        """Indices of matrices, rows and columns, whole groups of elements each; one piece, where all fit."""
        n, n_matrices, n_rows, n_columns = self.shape
        matrix = n_rows * n_columns
        if n * self.numel <= PIECE:
            yield _ALL, _ALL, _ALL, _ALL
        elif not self.factored:
            for i in range(0, n_columns, PIECE):
                yield _ALL, _ALL, _ALL, slice(i, i + PIECE)
        elif matrix <= PIECE or matrix % group:
            step = _whole_groups(PIECE, matrix, group)
            for i in range(0, n_matrices, step):
                yield _ALL, slice(i, i + step), _ALL, _ALL
        else:
            step = _whole_groups(PIECE, n_columns, group)
            for j in range(n_matrices):
                for i in range(0, n_rows, step):
                    yield _ALL, slice(j, j + 1), slice(i, i + step), _ALL

    def gather(self, bucket: FactoredBucket, i: int, tensors: Sequence[Tensor]) -> Tensor:
        """A role's elements, where they are if alone, else copied to scratch memory ``i``, for :meth:`scatter`."""
        if self.alone or not self.numel:
            return self.where_it_is(tensors[0])
        memory = bucket.scratch(i, len(tensors) * self.numel)
        if i not in self._views:
            shape = self.oriented(tensors[:1])[0].shape
            self._views[i] = [part.view(shape) for part in memory.split(self.numel)]
        _compat.foreach_copy_(self._views[i], self.oriented(tensors))
        return memory.view(self.shape)

    def scatter(self, i: int, tensors: Sequence[Tensor]) -> None:
        if not self.alone:
            _compat.foreach_copy_(self.oriented(tensors), self._views[i])

    def values(self, bucket: FactoredBucket, i: int, members: Members, role: int) -> Any:
        """A role that is read and written piece by piece, whatever its format, and then :meth:`put_back`."""
        tensors = members.params, *members.states
        if bucket.coder is None:
            return self.gather(bucket, i, tensors[role])
        values = partial(bucket.scratch, i)
        return CodedMatrices(bucket.coder, bucket.coder.roles[role], self.of_bucket, tensors, self.shape, values)

    def put_back(self, i: int, tensors: Sequence[Tensor], values: Any) -> None:
        if isinstance(values, CodedMatrices):
            values.put_back()
        else:
            self.scatter(i, tensors)

    def measure(self, bucket: FactoredBucket, g_all: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Sums of squares of gradients times ``factor``: ``[n, matrices, rows]`` and ``[n, matrices, columns]``."""
        compute = bucket.compute_dtype
        n, n_matrices, n_rows, n_columns = self.shape
        if bucket._compiled is not None and self.is_matrix and factor == 1.0:
            of_row, of_column = bucket._compiled.measure(g_all[0, 0])
            return of_row.view(1, 1, -1), of_column.view(1, 1, -1)
        of_rows = torch.zeros(n, n_matrices, n_rows, dtype=compute, device="cpu")
        of_columns = torch.zeros(n, n_matrices, n_columns, dtype=compute, device="cpu")
        for piece in self.pieces:
            g = g_all[piece].to(compute)
            square = torch.mul(g, g if factor == 1.0 else factor, out=_work(bucket, g))
            if factor != 1.0:
                square.square_()
            _, matrices, rows, columns = piece
            of_rows[:, matrices, rows] += square.sum(-1)
            of_columns[:, matrices, columns] += square.sum(-2)
        return of_rows, of_columns

    def update(self, bucket: FactoredBucket, members: Members, row: Sequence[float], scale: float) -> Update:
        """One step with gradients times ``scale``; ``row`` is of ``AdafactorRule.prepare``.

        Where it waits for other ranks, other stacks use the scratch memory.
        """
        stack = self.of(members)
        params, grads, states, _ = stack
        moment = 1 + self.factored
        averages = states[:moment]
        sign, omega, eps_stat, eps, rho, eps2, scaled, d, decay_lr, decay_alpha, beta1_c = row
        factor = sign * scale
        g_all = self.gather(bucket, GRADS, grads)
        r, c = yield from self._factors(bucket, averages, g_all, factor, (omega, eps_stat, eps))
        if not self.numel:
            return
        if bucket.meets:
            g_all = self.gather(bucket, GRADS, grads)
        # where nothing is clamped, there is no division for each element
        separable = bool(r.amin() * c.amin() >= eps)
        if separable:
            r, c = r.reciprocal_().mul_(factor), c.reciprocal_()
        divisor = Divisor(r.unsqueeze(-1), c.unsqueeze(-2), eps, factor, separable)
        compiled = bucket._compiled if self.is_matrix else None
        walk = Walk(self, bucket, divisor) if compiled is None else CompiledWalk(compiled, divisor)
        p_all = self.values(bucket, PARAMS, stack, 0)
        squares = walk.lengths(p_all, g_all, bool(scaled))
        if bucket.meets:
            yield LENGTHS, self._shares("lengths", squares)
            g_all, p_all = self.gather(bucket, GRADS, grads), self.values(bucket, PARAMS, stack, 0)
        rms, length = squares.div_(self.whole[0]).sqrt_().unbind(1)
        alpha = _larger(rms, eps2) * rho if scaled else torch.full_like(rms, rho)
        size = alpha / _larger(length / d, 1.0)
        decay = 1.0 - decay_lr - decay_alpha * alpha if decay_lr or decay_alpha else None
        moments = self.values(bucket, MOMENTS, stack, 1 + moment) if self.has_moment else None
        walk.take(p_all, g_all, moments, size, decay, beta1_c)
        self.put_back(PARAMS, params, p_all)
        if self.has_moment:
            self.put_back(MOMENTS, states[moment], moments)

    def _shares(self, name: str, numbers: Tensor) -> list[Share]:
        """What has been found, an entry of ``numbers`` each tensor."""
        return [*map(Share, self.positions, repeat(name), numbers)]

    def _factors(
        self,
        bucket: FactoredBucket,
        averages: Sequence[Sequence[Tensor]],
        g_all: Tensor,
        factor: float,
        constants: tuple[float, float, float],
    ) -> Generator[tuple[int, Sequence[Share]], None, tuple[Tensor, Tensor]]:
        """Move the averages; returns roots of rows' over their mean and of columns', whose product is the divisor.

        Their product stays in range where that of the averages would not.
        """
        omega, eps_stat, eps = constants
        of_rows, of_columns = self.sums or self.measure(bucket, g_all)
        square = factor * factor
        if square != 1.0 and not bool(of_rows.sum().isfinite()):
            # squares of scaled gradients overflow float32 long before those of the gradients would
            of_rows, of_columns = self.measure(bucket, g_all, factor)
            square = 1.0
        _, n_rows, n_columns = self.whole
        if not self.factored:
            c = self._average(averages[0], of_columns.mul_(square).add_(eps_stat), omega)
            return torch.ones((), dtype=bucket.compute_dtype, device="cpu").expand_as(of_rows).sqrt(), c.sqrt()
        means = [of_rows.mul_(square / n_columns), of_columns.mul_(square / n_rows)]
        moved: dict[int, Tensor] = {}

        def move(i: int) -> Tensor:
            moved[i] = self._average(averages[i], means[i].add_(eps_stat), omega)
            return moved[i]

        # torch's mean is of the logical rows, and so are its roundings
        logical = int(self.transposed)
        length = (n_rows, n_columns)[logical]
        if not bucket.meets:
            total = move(logical).sum(-1)
        else:
            names = ("columns", "rows") if self.transposed else ("rows", "columns")
            shares = [share for name, mean in zip(names, means, strict=True) for share in self._shares(name, mean)]
            if bucket.has_whole_rows:
                total = move(logical).sum(-1)
                yield SUMS, [*shares, *self._shares("means", total)]
            else:
                yield SUMS, shares
                total = move(logical).sum(-1)
                yield MEANS, self._shares("means", total)
        move(1 - logical)
        r, c = moved[0], moved[1]
        return (r / total.div_(length).clamp_(min=eps).unsqueeze(-1)).sqrt_(), c.sqrt()

    def _average(self, states: Sequence[Tensor], means: Tensor, omega: float) -> Tensor:
        """Move averages towards this step's means; returns them as they are stored, rounded or not."""
        if self.together and states[0].dtype is means.dtype:
            return states[0].as_strided(means.shape, means.stride()).lerp_(means, omega)
        stored = torch.stack([*states]).view(means.shape)
        average = stored.to(means.dtype).lerp_(means, omega).to(stored.dtype)
        _compat.foreach_copy_(states, average.view(len(states), *states[0].shape).unbind())
        return average.to(means.dtype)


class Divisor(NamedTuple):
    """What gradients are divided by: of rows and columns, ``[n, matrices, rows, 1]`` and ``[n, matrices, 1, columns]``.

    Attributes:
        r, c: Their roots, whose product is at least ``eps``; if ``separable`` what to multiply by, with ``factor``.
        factor: Of the gradients.
        separable: Nothing is clamped, and there is no division for each element.
    """

    r: Tensor
    c: Tensor
    eps: float
    factor: float
    separable: bool


class Walk:
    """The walks over a stack's tensors that follow its averages, piece by piece."""

    def __init__(self, stack: Stack, bucket: FactoredBucket, divisor: Divisor) -> None:
        self._stack, self._bucket, self._divisor = stack, bucket, divisor

    def _direction(self, g_all: Tensor, piece: Slices) -> Tensor:
        r, c, eps, factor, separable = self._divisor
        of_tensor, matrices, rows, columns = piece
        g = g_all[piece].to(self._bucket.compute_dtype)
        out = _work(self._bucket, g)
        r_piece, c_piece = r[of_tensor, matrices, rows], c[of_tensor, matrices, :, columns]
        if separable:
            return torch.mul(g, c_piece, out=out).mul_(r_piece)
        torch.mul(r_piece, c_piece, out=out)
        return torch.div(g, out.clamp_(min=eps), out=out).mul_(factor)

    def lengths(self, p_all: Any, g_all: Tensor, scaled: bool) -> Tensor:
        """Squared lengths of parameters (0 if not ``scaled``) and updates, float64 ``[n, 2]``."""
        squares = torch.zeros(self._stack.shape[0], 2, dtype=torch.float64, device="cpu")
        for piece in self._stack.pieces:
            if scaled:
                squares[:, 0] += _squares(p_all[piece].to(self._bucket.compute_dtype))
            self._update = self._direction(g_all, piece)
            squares[:, 1] += _squares(self._update)
        return squares

    def take(self, p_all: Any, g_all: Tensor, moments: Any, size: Tensor, decay: Tensor | None, beta1_c: float) -> None:
        """Take the step, of each tensor with its size and decay."""
        for piece in self._stack.pieces:
            if len(self._stack.pieces) > 1 or self._bucket.meets:
                self._update = self._direction(g_all, piece)
            self._apply(p_all, moments, piece, self._update, size, decay, beta1_c)

    def _apply(
        self,
        p_all: Any,
        moments: Any,
        piece: Slices,
        u: Tensor,
        size: Tensor,
        decay: Tensor | None,
        beta1_c: float,
    ) -> None:
        """Take the step in a piece, of each tensor with its size and decay."""
        p = p_all[piece].to(u.dtype)
        if decay is not None:
            p.mul_(decay.to(u.dtype).view(-1, 1, 1, 1))
        if moments is None and self._stack.alone:
            p.add_(u, alpha=-float(size))
        else:
            u.mul_(size.to(u.dtype).view(-1, 1, 1, 1))
            if moments is not None:
                u = moments[piece].to(u.dtype).lerp_(u, beta1_c)
                moments[piece] = u
            p.sub_(u)
        if p.dtype is not p_all.dtype:
            p_all[piece] = p


class CompiledWalk:
    """The same over a stack that is one matrix."""

    def __init__(self, compiled: CompiledMatrices, divisor: Divisor) -> None:
        self._compiled, self._separable = compiled, divisor.separable
        self._roots = divisor.r[0, 0].contiguous(), divisor.c[0, 0, 0].contiguous()
        self._constants = divisor.eps, 1.0 if divisor.separable else divisor.factor

    def lengths(self, p_all: Any, g_all: Tensor, scaled: bool) -> Tensor:
        tensors = p_all[0, 0], g_all[0, 0], *self._roots
        row = (*self._constants, 1.0, 1.0, 1.0)
        return self._compiled.lengths(row, tensors, scaled=scaled, separable=self._separable).view(1, 2)

    def take(self, p_all: Any, g_all: Tensor, moments: Any, size: Tensor, decay: Tensor | None, beta1_c: float) -> None:
        row = (*self._constants, 1.0 if decay is None else float(decay), float(size), beta1_c)
        tensors = [p_all[0, 0], g_all[0, 0], *self._roots, *([] if moments is None else [moments[0, 0]])]
        self._compiled.take(row, tensors, separable=self._separable)


def _squares(tensors: Tensor) -> Tensor:
    """Of each tensor the squared norm, in float64."""
    return torch.linalg.vector_norm(tensors, dim=(1, 2, 3)).double().square()


def _whole_groups(most: int, numel: int, group: int) -> int:
    """How many runs of ``numel`` elements are at most so many, and whole groups of elements."""
    unit = group // math.gcd(group, numel)
    return max(1, most // numel // unit) * unit


def _work(bucket: FactoredBucket, like: Tensor) -> Tensor:
    return bucket.scratch(WORK, like.numel()).view(like.shape)


def _larger(values: Tensor, than: float) -> Tensor:
    """As torch's scalars are compared: NaN is not larger. It is in the elements anyway."""
    return torch.where(values > than, values, than)


class FactoredCall(Call):
    """Members with equal rows."""

    def __init__(self, bucket: FactoredBucket, members: list[int] | None, index: int) -> None:
        super().__init__(bucket, members, index, by_formula=True)
        call_members = self.of(bucket.members)
        of_bucket = members if members is not None else [*range(len(bucket.positions))]
        alike: dict[tuple[torch.Size, torch.Size], list[int]] = {}
        groups: list[list[int]] = []
        for i, param in enumerate(call_members.params):
            numel = param.numel()
            if not numel and not bucket.meets:
                continue
            if numel <= TOGETHER // 2:
                shapes = param.shape, bucket.shapes[of_bucket[i]]
                same = alike.setdefault(shapes, [])
                if not same:
                    groups.append(same)
                same.append(i)
                if (len(same) + 1) * numel > TOGETHER:
                    del alike[shapes]
            else:
                groups.append([i])
        self.stacks = [Stack(bucket, call_members, indices, [of_bucket[i] for i in indices]) for indices in groups]


class FactoredBucket(NativeBucket):
    """Members on a CPU. One without elements may have averages, of which other ranks have the rest of the tensor."""

    takes_riders = False

    _compiled: CompiledMatrices | None

    def _new_compiled(self) -> CompiledMatrices | None:
        if self.coder is not None or not any(stack.is_matrix for call in self._calls for stack in call.stacks):
            return None
        states = self.key.dtypes[2 : 1 + self.n_roles]
        matrices = CompiledMatrices(self.compute_dtype, (*self.key.dtypes[:2], *states[2:]))
        rows = {(bool(scaled), beta1_c) for *_, scaled, _, _, _, beta1_c in (call.row for call in self._calls)}
        return matrices if matrices.is_ready(rows) else None

    _calls: Sequence[FactoredCall]

    def new_call(self, members: list[int] | None, index: int) -> FactoredCall:
        return FactoredCall(self, members, index)

    def send(self, values: Sequence[tuple[Any, ...]]) -> None:
        super().send(values)
        # the norm is of the sums that the update takes: both are the same kernel's
        self.compile(None)

    def norms(self, wide: bool = False) -> list[Tensor]:
        if wide:
            return super().norms(wide)
        norms = []
        for call in self._calls:
            members = call.of(self.members)
            for stack in call.stacks:
                stack.sums = stack.measure(self, stack.gather(self, GRADS, stack.of(members).grads))
                of_rows, _ = stack.sums
                norms.append(of_rows.sum(dtype=torch.float64).sqrt_())
        return norms

    def release(self) -> None:
        super().release()
        for call in self._calls:
            for stack in call.stacks:
                stack.sums = None

    def take_step(self, scale: float) -> Update:
        updates = (
            stack.update(self, call.of(self.members), call.row, scale) for call in self._calls for stack in call.stacks
        )
        yield from together(updates)
