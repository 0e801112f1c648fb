"""StepPlan: which tensors share a launch, worked out once and reused while nothing it depends on has changed.

A parameter is a member of a *bucket* (device, dtypes, kernel variant) or, for a reason, left to torch's own step.
All parameter groups share the buckets: hyperparameters are data of a tensor, not arguments of a launch.

A plan that is used although something changed would write to the wrong memory, so everything it stands
on is compared every step, in a handful of C loops: about 0.5 µs a tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _backend, _compat
from ._buckets import Bucket
from ._layout import is_dense, same_layout

if TYPE_CHECKING:
    from ._step import MultiTensorStep

_NUMBERS = {bool, int, float, type(None)}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class BucketKey:
    """What the members of a bucket have in common.

    Attributes:
        dtypes: Of parameter, gradient and states.
        structure: The kernel variant: values of the rule's ``structure`` hyperparameters.
        on_device: Counts live on the device, and hyperparameter rows are made there, because the host cannot know them
            (``capturable``, AMP skips, a tensor lr).
        count_dtype: Of the scalar states.
        first: Members take their first step, where the rule has it differ from the others.
        aligned: 128-bit accesses are possible.
    """

    backend: str
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    structure: tuple[Any, ...]
    on_device: bool
    count_dtype: torch.dtype
    first: bool
    aligned: bool


@dataclass(frozen=True)
class Leftover:
    """A parameter that torch's own step updates, and why."""

    param: Tensor
    position: int
    reason: str


def asks_for_torch(group: dict[str, Any]) -> bool:
    """Whether the user chose an implementation that is torch's alone."""
    fused, foreach = group.get("fused"), group.get("foreach")
    return bool(group.get("differentiable")) or fused is False or (foreach is not None and not fused)


def unsuitable(param: Tensor, grad: Tensor, group: dict[str, Any]) -> str | None:
    """Why torch's own step must update a parameter, as far as its group, type and layout tell."""
    if asks_for_torch(group):
        flags = ((name, group.get(name)) for name in ("foreach", "fused", "differentiable"))
        return "asked for: " + ", ".join(f"{name}={value}" for name, value in flags if value not in (None, ""))
    for name, tensor in (("parameter", param), ("gradient", grad)):
        if not _compat.is_plain(tensor):
            return f"{name} is a {type(tensor).__name__}"
        if tensor.layout is not torch.strided:
            return f"{name} is sparse"
        if tensor.dtype not in FLOATS:
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
    if grad.device != param.device or grad.shape != param.shape:
        return "gradient and parameter differ in device or shape"
    if not is_dense(param):
        return "parameter's memory has gaps or overlaps"
    if group.get("capturable") and not group.get("fused") and param.device.type == "cpu":
        return "capturable=True on a CPU"
    return None


def is_capturing() -> bool:
    """Whether a CUDA graph records the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def has_device_values(values: Iterable[Any]) -> bool:
    """Whether a hyperparameter is a tensor that the host could not read without waiting."""
    values = [*values]
    # numbers are the rule, and hundreds of groups may change every step
    if _NUMBERS.issuperset(map(type, values)):
        return False
    return any(isinstance(value, Tensor) and value.device.type != "cpu" for value in values)


def classify(
    optimizer: MultiTensorStep, param: Tensor, grad: Tensor, group: dict[str, Any]
) -> tuple[BucketKey | None, str]:
    """The bucket of a parameter, or None and the reason. Changes nothing."""
    reason = unsuitable(param, grad, group)
    backend, why = _backend.choose(param.device)
    if reason or backend == _backend.TORCH:
        return None, reason or why
    rule = optimizer.rule
    reason = rule.unsuitable(param)
    if reason:
        return None, reason
    structure = rule.variant_of(rule.structure_of(group), param)
    state = optimizer.state.get(param, {})
    names = rule.state_names(structure)
    states = {name: state[name] for name in names if state.get(name) is not None}
    for name, tensor in states.items():
        if not isinstance(tensor, Tensor) or not _compat.is_plain(tensor) or tensor.dtype not in FLOATS:
            return None, "a state is not a plain floating-point tensor"
        if tensor.device != param.device or not rule.suits(name, tensor, param):
            return None, "a state differs from the parameter in device, shape or layout"
    fresh = rule.state_dtype(param, group)
    dtypes = (param.dtype, grad.dtype, *(states[name].dtype if name in states else fresh for name in names))
    if param.dtype is not torch.float64 and torch.float64 in dtypes:
        return None, "float64 gradient or state of a smaller parameter"
    triton = backend == _backend.TRITON
    capturable = group.get("capturable", optimizer.capturable)
    if triton and not capturable and is_capturing():
        return None, "capture without capturable=True"
    values = rule.values(group)
    # a tensor lr on the device is read there, never here: so are the rows made, and the steps counted
    on_device = triton and (capturable or has_device_values(values) or optimizer._device_counts)
    on_device = on_device or (triton and bool(rule.counts) and (rule.counts_on_device or bool(group.get("fused"))))
    fresh_dtype = torch.float32
    if rule.counts_on_device or not on_device:
        fresh_dtype = _compat.count_dtype(bool(group.get("fused") or capturable))
    known = [state[name].dtype for name in rule.counts if isinstance(state.get(name), Tensor)]
    count_dtype = known[0] if known else fresh_dtype
    if any(dtype is not count_dtype for dtype in known) or (on_device and count_dtype is not torch.float32):
        return None, f"{' and '.join(rule.counts)} of dtype {', '.join(map(str, known))}"
    for value in values:
        if isinstance(value, Tensor) and value.device.type != "cpu" and value.device != param.device:
            return None, "a tensor hyperparameter is on another device"
    aligned = triton and not any(tensor.data_ptr() % 16 for tensor in (param, grad, *states.values()))
    first = rule.is_first(state, values)
    return BucketKey(backend, param.device, dtypes, structure, on_device, count_dtype, first, aligned), ""


def ensure_state(optimizer: MultiTensorStep, param: Tensor, group: dict[str, Any], key: BucketKey) -> dict[str, Any]:
    """The parameter's state with what torch would have put there; only missing keys are filled in.

    Some wrappers (schedule-free ones) put keys of their own there first, at which stock raises KeyError.
    """
    rule = optimizer.rule
    names = rule.state_names(key.structure)
    if not (rule.counts or names):
        # as in torch, whose plain SGD leaves the state empty
        return optimizer.state.get(param, {})
    state = optimizer.state[param]
    on_device = key.on_device or rule.counts_on_device or group.get("fused")
    for name in rule.counts:
        if not isinstance(state.get(name), Tensor):
            value = float(state[name]) if name in state else rule.new_count(name, group)
            device = param.device if on_device else torch.device("cpu")
            state[name] = torch.full((), value, dtype=key.count_dtype, device=device)
    for name in names:
        if not isinstance(state.get(name), Tensor):
            state[name] = rule.new_state(name, param, group, optimizer.defaults)
    return state


class StepPlan:
    """The buckets of one pattern of gradients, and everything that has to be the same for them to hold.

    Args:
        optimizer: Whose step this plans; missing state is created.
        params: All parameters, group after group.
        grads: Their gradients; None where a parameter has none and is left out.
    """

    def __init__(self, optimizer: MultiTensorStep, params: list[Tensor], grads: list[Tensor | None]) -> None:
        rule = optimizer.rule
        groups = optimizer.param_groups
        self.buckets: list[Bucket] = []
        self.leftovers: list[Leftover] = []
        self.relayout: list[int] = []
        self.params = params
        self.structure = [rule.structure_of(group) for group in groups]
        self.flags = [rule.flags_of(group) for group in groups]
        self._capture = optimizer.capturable, is_capturing()
        self._on_device = [*map(has_device_values, optimizer._values)]
        self._values_seen = optimizer._values

        self._group_sizes = [len(group["params"]) for group in groups]
        # torch steps a parameter twice that is listed twice; in one launch the two would race
        twice = {param for param, count in Counter(params).items() if count > 1}

        by_key: dict[BucketKey, Bucket] = {}
        group_of = chain.from_iterable([i] * len(group["params"]) for i, group in enumerate(groups))
        for position, (param, grad, g) in enumerate(zip(params, grads, group_of, strict=True)):
            if grad is None:
                continue
            key, reason = classify(optimizer, param, grad, groups[g])
            if param in twice:
                key, reason = None, "listed twice"
            if key is None:
                self.leftovers.append(Leftover(param, position, reason))
                continue
            if not same_layout(grad, param):
                self.relayout.append(position)
            if key not in by_key:
                by_key[key] = self._new_bucket(key, optimizer)
            by_key[key].add(param, position, g, ensure_state(optimizer, param, groups[g], key))
        self.buckets = list(by_key.values())
        for bucket in self.buckets * 2:
            # what a later bucket brings together may have been an earlier one's
            bucket.home(optimizer._counts, optimizer.state.values())
        for bucket in self.buckets:
            bucket.finish()

        # what is compared every step; read after the states were made
        self._grad_types = [*map(type, grads)]
        self._state_dicts = [*optimizer.state.values()]
        self._value_dicts = [state for state in self._state_dicts if isinstance(state, dict)]
        self._state_values = [*chain.from_iterable(map(dict.values, self._value_dicts))]
        self._members = [position for bucket in self.buckets for position in bucket.positions]
        if self._members == list(range(len(params))):
            self._members = []
        self._states = [tensor for bucket in self.buckets for tensor in bucket.watched_states()]
        # a first step that differs from the others is not planned for a second time
        self.is_first = any(bucket.key.first for bucket in self.buckets)
        self.on_triton = any(bucket.key.backend == _backend.TRITON for bucket in self.buckets)
        self._guard = _compat.metadata_guard([*self._guarded(params), *self._guarded(grads), *self._states])

    def inherit(self, gone: Sequence[StepPlan]) -> None:
        """Take over what belonged to plans that nobody will use any more."""
        former = [bucket for plan in gone for bucket in plan.buckets]
        for bucket in self.buckets:
            bucket.inherit(former)

    @staticmethod
    def _new_bucket(key: BucketKey, optimizer: MultiTensorStep) -> Bucket:
        if key.backend == _backend.NATIVE:
            return optimizer.rule.native_bucket(key, optimizer.rule)
        return optimizer.rule.triton_bucket()(key, optimizer.rule)

    def _guarded(self, tensors: Sequence[Any]) -> Sequence[Tensor]:
        """The entries of members; the empty list stands for all of them."""
        return [tensors[i] for i in self._members] if self._members or not self.buckets else tensors

    def is_for(self, grads: list[Tensor | None]) -> bool:
        """Whether the same parameters have gradients."""
        return [*map(type, grads)] == self._grad_types

    def holds(self, optimizer: MultiTensorStep, params: list[Tensor]) -> bool:
        """Whether parameters, groups and states are the objects they were."""
        groups, states = optimizer.param_groups, optimizer.state
        return (
            len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and [len(group["params"]) for group in groups] == self._group_sizes
            and len(states) == len(self._state_dicts)
            and all(map(is_, states.values(), self._state_dicts))
            and sum(map(len, self._value_dicts)) == len(self._state_values)
            and all(map(is_, chain.from_iterable(map(dict.values, self._value_dicts)), self._state_values))
            and self._same_variants(optimizer)
            and not self.is_first
            and self._capture == (optimizer.capturable, is_capturing())
        )

    def _same_variants(self, optimizer: MultiTensorStep) -> bool:
        """Whether groups still choose the kernels they chose; looked at only where a setting has changed."""
        if optimizer._values is self._values_seen:
            return True
        rule, groups = optimizer.rule, optimizer.param_groups
        same = (
            [*map(rule.structure_of, groups)] == self.structure
            and [*map(rule.flags_of, groups)] == self.flags
            and [*map(has_device_values, optimizer._values)] == self._on_device
        )
        if same:
            self._values_seen = optimizer._values
        return same

    def fits(self, params: list[Tensor], grads: list[Tensor | None]) -> bool:
        """Whether dtypes, devices, shapes, strides and addresses are what they were."""
        return self._guard(*self._guarded(params), *self._guarded(grads), *self._states) and all(
            bucket.matches() for bucket in self.buckets
        )

    def is_captured(self) -> bool:
        """Whether a CUDA graph records this step."""
        return self.on_triton and is_capturing()

    def take_back_first(self) -> None:
        """A first step that was skipped is still to come."""
        for bucket in self.buckets:
            if bucket.key.first:
                bucket.drop_states()

    def gather(self, grads: list[Any]) -> Iterator[tuple[Bucket, Sequence[Tensor]]]:
        """Each bucket with the gradients of its members, laid out like their parameters."""
        if self.relayout:
            grads = list(grads)
            for i in self.relayout:
                grads[i] = torch.empty_like(self.params[i], dtype=grads[i].dtype).copy_(grads[i])
        for bucket in self.buckets:
            yield bucket, self._guarded(grads) if len(self.buckets) == 1 else [grads[i] for i in bucket.positions]
