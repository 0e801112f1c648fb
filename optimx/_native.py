"""Buckets of CPU tensors: torch's own fused operators on the plan's lists, in cache-sized pieces where that pays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _compat
from ._buckets import Bucket

#: Elements a piece of a large tensor has: four float32 roles and a scratch copy stay in two cores' L2.
PIECE = 1 << 16
#: Contiguous tensors up to this many elements are copied together rather than one by one.
SMALL = 1 << 12


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order of its memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def batches(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of small tensors together, up to a piece's elements; other tensors alone."""
    batch: list[int] = []
    elements = 0
    for i, tensor in enumerate(tensors):
        numel = tensor.numel()
        if numel > SMALL or not tensor.is_contiguous():
            yield [i]
            continue
        if elements + numel > PIECE:
            yield batch
            batch, elements = [], 0
        batch.append(i)
        elements += numel
    if batch:
        yield batch


class NativeBucket(Bucket):
    """Members on a CPU. One operator call for all groups whose hyperparameters are equal."""

    def finish(self, counts: Any) -> None:
        super().finish(counts)
        self._views = [self.steps.views[i] for i in self.step_indices]
        # gradients are scaled in float32: in half precision, unscaled AMP gradients would vanish
        self._staged_dtype = torch.float64 if self.key.dtypes[0] is torch.float64 else torch.float32
        self._mixed = len(set(self.key.dtypes)) > 1
        self._values: Sequence[tuple[Any, ...]] = ()
        self._calls: list[tuple[tuple[Any, ...], list[int] | None]] = []

    def update(self, grads: Sequence[Tensor], values: Sequence[tuple[Any, ...]], control: Tensor | None) -> None:
        scale = 1.0
        if control is not None:
            _, scale, skip = control.tolist()
            if skip:
                return
        self.steps.count(self.increments)
        if values != self._values:
            self._values, self._calls = values, self._merge(values)
        for call_values, indices in self._calls:
            tensors = [self.params, grads, *self.states, self._views]
            if indices is not None:
                tensors = [[role[i] for i in indices] for role in tensors]
            params, grads_, *states, steps = tensors
            if scale == 1.0 and not self._mixed:
                self.rule.native(self.key.structure, call_values, params, grads_, states, steps)
            else:
                self._update_staged(call_values, params, grads_, states, steps, scale)

    def _merge(self, values: Sequence[tuple[Any, ...]]) -> list[tuple[tuple[Any, ...], list[int] | None]]:
        """Members by equal hyperparameters; None stands for all of them."""
        merged: dict[tuple[Any, ...], list[int]] = {}
        for i, group in enumerate(self.groups):
            merged.setdefault(values[group], []).append(i)
        return [(key, None if len(merged) == 1 else indices) for key, indices in merged.items()]

    def _update_staged(
        self,
        values: tuple[Any, ...],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        steps: Sequence[Tensor],
        scale: float,
    ) -> None:
        """Update with gradients times ``scale``, or of mixed dtypes, without writing a gradient.

        The operators take neither, so copies of what is not in the dtype to compute in pass through the cache, a
        piece at a time: memory still sees each byte once.
        """
        for batch in batches(params):
            if len(batch) > 1:
                roles = [[role[i] for i in batch] for role in (params, *states)]
                step_list = [steps[i] for i in batch]
                flat_grads = _compat.flatten_dense_tensors([grads[i] for i in batch]).to(self._staged_dtype) * scale
                pieces = flat_grads.split([grads[i].numel() for i in batch])
                self._staged_call(values, roles, pieces, step_list)
                continue
            (i,) = batch
            split = [flat(role[i]).split(PIECE) for role in (params, grads, *states)]
            for piece, grad, *rest in zip(*split, strict=True):
                scaled = torch.mul(grad.to(self._staged_dtype), scale)
                self._staged_call(values, [[piece], *([tensor] for tensor in rest)], [scaled], [steps[i]])

    def _staged_call(
        self, values: tuple[Any, ...], roles: list[list[Tensor]], grads: Sequence[Tensor], steps: list[Tensor]
    ) -> None:
        staged = [[tensor.to(self._staged_dtype) for tensor in role] for role in roles]
        self.rule.native(self.key.structure, values, staged[0], grads, staged[1:], steps)
        for role, copies in zip(roles, staged, strict=True):
            if role[0].dtype is not self._staged_dtype:
                _compat.foreach_copy_(role, copies)
