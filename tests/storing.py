"""A bucket whose members are kept in given formats, without an optimizer around it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from optimx._engine import backends
from optimx._engine.bucket import WHOLE, BucketKey
from optimx._engine.cpu.batch import BATCH
from optimx._engine.cpu.codecs import decode, elements_each
from optimx._engine.layout import flat
from optimx._engine.placement import bucket_class
from optimx._engine.states import side_by_side
from optimx._engine.storage import MASTER, SIGNED8, UNSIGNED8, Format, Geometry, companions, tensor_names
from tests.cases import BY_NAME

_CODES = {SIGNED8: torch.int8, UNSIGNED8: torch.uint8}


def format_of(kind: int, dtype: torch.dtype) -> Format:
    """A format whose dtype is of use: that of codes is given."""
    return Format(kind, _CODES.get(kind, dtype))


def _new_companion(kept: Format, param: Tensor) -> Tensor:
    """Before the first step."""
    if kept.kind == MASTER:
        return param.float()
    each = elements_each(kept)
    if each > 1:
        return torch.zeros(param.numel() // each, dtype=kept.companion, device=param.device)
    return torch.zeros_like(param, dtype=kept.companion)


class Stored:
    """Parameters that are trained, and whatever is kept of them.

    Args:
        name: Of the optimizer.
        formats: Of the parameter, and of each state.
        params: What they begin with; their layout is kept.
        positions: Index of each parameter among all; None: one after the other.
        geometries: Of each; None: whole ones.
        seeds: Of each; None: 0.
        neighbours: Small states of one name lie one after the other.
        backend: Which one updates them.
        kwargs: Of the optimizer.
    """

    def __init__(
        self,
        name: str,
        formats: Sequence[Format],
        params: Sequence[Tensor],
        *,
        positions: Sequence[int] | None = None,
        geometries: Sequence[Geometry] | None = None,
        seeds: Sequence[int] | None = None,
        neighbours: bool = False,
        backend: str = backends.NATIVE,
        **kwargs: Any,
    ) -> None:
        cls: Any = BY_NAME[name].cls
        self.rule = cls.rule
        self.formats = tuple(formats)
        (self.group,) = cls([Parameter(params[0].float())], **kwargs).param_groups
        variant = self.rule.variant_of(self.rule.group_variant(self.group), params[0])
        names = self.rule.state_names(variant)
        self.n_states = len(names)
        of_state = dict(zip(names, self.formats[1:], strict=True))
        self.params = [param.to(self.formats[0].dtype, copy=True) for param in params]
        self.states: list[dict[str, Tensor]] = []
        for param in self.params:
            own = [self.rule.new_state(n, param, self.group, self.group).to(kept.dtype) for n, kept in of_state.items()]
            others = [_new_companion(self.formats[role], param) for role in companions(self.formats)]
            tensors = dict(zip(tensor_names(names, self.formats), [*own, *others], strict=True))
            scalars = {n: torch.tensor(self.rule.new_scalar(n, self.group)) for n in self.rule.scalars}
            self.states.append({**tensors, **scalars})
        for n in tensor_names(names, self.formats) if neighbours else ():
            for state, tensor in zip(self.states, side_by_side([s[n] for s in self.states], BATCH), strict=True):
                state[n] = tensor
        of_states = [tensor.dtype for n, tensor in self.states[0].items() if n not in self.rule.scalars]
        dtypes = (self.formats[0].dtype, torch.float32, *of_states)
        are_plain = all(kept.is_plain for kept in self.formats)
        key = BucketKey(
            backend, params[0].device, dtypes, variant, False, torch.float32, False,
            formats=() if are_plain else self.formats,
        )  # fmt: skip
        self.bucket = bucket_class(backend, self.rule.walk_of(variant))(key, self.rule)
        for i, param in enumerate(self.params):
            place = i if positions is None else positions[i]
            self.bucket.add(
                place, place, 0, param.shape,
                WHOLE if geometries is None else geometries[i], 0 if seeds is None else seeds[i],
            )  # fmt: skip
        self._is_planned = False

    def step(self, grads: Sequence[Tensor], control: Tensor | None = None) -> None:
        """One step of all of them."""
        bucket = self.bucket
        values = [tensor for state in self.states for tensor in state.values()]
        size = len(self.states[0])
        where = [{n: i * size + j for j, n in enumerate(state)} for i, state in enumerate(self.states)]
        everything: list[Any] = [None] * (max(bucket.positions) + 1)
        of_grads = [*everything]
        for position, param, grad in zip(bucket.positions, self.params, grads, strict=True):
            everything[position], of_grads[position] = param, grad
        bucket.locate(where)
        bucket.bind(everything, of_grads, values)
        if not self._is_planned:
            bucket.finish({tensor.data_ptr() for tensor in values if not tensor.dim()})
            self._is_planned = True
        bucket.send([self.rule.values(self.group)])
        deque(bucket.update(control), maxlen=0)
        bucket.release()
        bucket.noise_step += 1

    def role(self, i: int, role: int) -> Tensor:
        """The values of a parameter (0) or of a state of the ``i``-th, in float32, flat."""
        tensors = [flat(t).cpu() for n, t in self.states[i].items() if n not in self.rule.scalars]
        own = flat(self.params[i]).cpu() if role == 0 else tensors[role - 1]
        kept, companion = self.formats[role], None
        if kept.companion is not None:
            companion = tensors[self.n_states + companions(self.formats).index(role)]
        out = torch.empty(own.shape)
        return decode(kept, own, companion, out, lambda name, shape, dtype: torch.empty(shape, dtype=dtype)).clone()

    def bytes(self) -> list[list[int]]:
        """All that is kept, as it lies in memory."""
        return [
            [flat(t).view(torch.uint8).tolist() for t in (param, *(t for t in state.values() if t.dim()))]
            for param, state in zip(self.params, self.states, strict=True)
        ]  # fmt: skip
