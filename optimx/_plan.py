"""StepPlan: which tensors share a launch, worked out once and reused while nothing it depends on has changed.

A parameter is a member of a *bucket* (device, dtypes, kernel variant) or, for a reason, left to torch's own step.
All parameter groups share the buckets: hyperparameters are data of a tensor, not arguments of a launch.

A plan that is used although something changed would write to the wrong memory, so everything it stands
on is compared every step, in a handful of C loops: about 0.5 µs a tensor.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _backend, _compat
from ._buckets import Bucket
from ._native import NativeBucket

if TYPE_CHECKING:
    from ._step import MultiTensorStep

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class BucketKey:
    """What the members of a bucket have in common.

    Attributes:
        dtypes: Of parameter, gradient and states.
        structure: The kernel variant: values of the rule's ``structure`` hyperparameters.
        device_steps: Step counts live on the device, because the host cannot know them (``capturable``, AMP skips).
        aligned: 128-bit accesses are possible.
    """

    backend: str
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    structure: tuple[Any, ...]
    device_steps: bool
    step_dtype: torch.dtype
    aligned: bool


@dataclass(frozen=True)
class Leftover:
    """A parameter that torch's own step updates, and why."""

    param: Tensor
    position: int
    reason: str


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory exactly once, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether equal offsets mean equal elements; the stride of a dimension of size 1 means nothing."""
    if a.shape != b.shape:
        return False
    return all(x == y or n == 1 for x, y, n in zip(a.stride(), b.stride(), a.shape, strict=True))


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


def has_device_values(values: Iterable[Any]) -> bool:
    """Whether a hyperparameter is a tensor that the host could not read without waiting."""
    return any(isinstance(value, Tensor) and value.device.type != "cpu" for value in values)


def classify(
    optimizer: MultiTensorStep, param: Tensor, grad: Tensor, group: dict[str, Any]
) -> tuple[BucketKey | None, str]:
    """The bucket of a parameter, or None and the reason. Changes nothing."""
    reason = unsuitable(param, grad, group)
    backend, why = _backend.choose(param.device)
    if reason or backend == _backend.TORCH:
        return None, reason or why
    structure = optimizer.rule.structure_of(group)
    state = optimizer.state.get(param, {})
    states = [state.get(name, param) for name in optimizer.rule.state_names(structure)]
    for tensor in states:
        if not isinstance(tensor, Tensor) or not _compat.is_plain(tensor) or tensor.dtype not in FLOATS:
            return None, "a state is not a plain floating-point tensor"
        if tensor.device != param.device or not same_layout(tensor, param):
            return None, "a state differs from the parameter in device, shape or layout"
    dtypes = (param.dtype, grad.dtype, *(tensor.dtype for tensor in states))
    if param.dtype is not torch.float64 and torch.float64 in dtypes:
        return None, "float64 gradient or state of a smaller parameter"
    on_device = bool(group.get("fused") or group.get("capturable"))
    triton = backend == _backend.TRITON
    # a tensor lr on the device is read there, never here: so are the rows made, and the steps counted
    by_tensor = has_device_values(optimizer.rule.values(group))
    device_steps = triton and (on_device or by_tensor or optimizer._device_steps)
    step = state.get("step")
    fresh_dtype = torch.float32 if device_steps else _compat.step_dtype(on_device)
    step_dtype = step.dtype if isinstance(step, Tensor) else fresh_dtype
    if device_steps and step_dtype is not torch.float32:
        return None, f"step counts are {step_dtype}"
    for value in optimizer.rule.values(group):
        if isinstance(value, Tensor) and value.device.type != "cpu" and value.device != param.device:
            return None, "a tensor hyperparameter is on another device"
    aligned = triton and not any(tensor.data_ptr() % 16 for tensor in (param, grad, *states))
    return BucketKey(backend, param.device, dtypes, structure, device_steps, step_dtype, aligned), ""


class StepBuffer:
    """Step counts in one tensor, so that one addition counts a step.

    The tensors ``state[p]["step"]`` become views of it; they stay the objects they were, because others may hold them.
    """

    def __init__(self, steps: Sequence[Tensor]) -> None:
        self.values = torch.stack([step.detach().reshape(()) for step in steps])
        self.views = steps
        for i, step in enumerate(steps):
            step.set_(self.values.untyped_storage(), i, (), ())
        self._expected: Tensor | None = None
        # weak: a buffer outlives the plans that count with it, and must not keep their tensors alive
        self._last_user: Callable[[], object] = lambda: None

    def count(self, increments: Tensor | None) -> None:
        """Add 1 to all counts, or ``increments`` where only some parameters step."""
        for tensor in (self.values, self._expected):
            if tensor is not None:
                tensor.add_(1 if increments is None else increments)

    def unchanged_since(self, user: object) -> bool:
        """Whether ``user`` was the last to count here and nobody wrote a count since; remembers ``user``."""
        expected = self._expected
        if self._last_user() is user and expected is not None and torch.equal(self.values, expected):
            return True
        self._last_user, self._expected = weakref.ref(user), self.values.clone()
        return False


class StepCounts:
    """The step buffers of an optimizer."""

    _KEPT = 8

    def __init__(self) -> None:
        self._buffers: dict[int, StepBuffer] = {}

    def home(
        self, states: Sequence[dict[str, Any]], device: torch.device, others: Iterable[Any] = ()
    ) -> tuple[StepBuffer, list[int]]:
        """Bring the step counts of ``states`` into one buffer on ``device``; returns it and each one's index.

        Where a new buffer has to be made, it takes the counts of ``others`` too, all that are alike: patterns of
        gradients that overlap would otherwise take counts out of each other's buffers forever.
        """
        for state in states:
            if state["step"].device != device:
                # towards the host a copy that nobody waits for would be read too early
                state["step"] = state["step"].to(device, non_blocking=device.type != "cpu")
        steps = [state["step"] for state in states]
        buffers = {id(buffer): buffer for buffer in map(self._find, steps)}
        buffer = next(iter(buffers.values())) if len(buffers) == 1 else None
        if buffer is None:
            candidates = (state.get("step") for state in others if isinstance(state, dict))
            alike = [s for s in candidates if isinstance(s, Tensor) and (s.device, s.dtype) == (device, steps[0].dtype)]
            buffer = StepBuffer([*{id(step): step for step in (*steps, *alike)}.values()])
            self._buffers[buffer.values.untyped_storage().data_ptr()] = buffer
            while len(self._buffers) > self._KEPT:
                del self._buffers[next(iter(self._buffers))]
        return buffer, [step.storage_offset() for step in steps]

    def _find(self, step: Tensor) -> StepBuffer | None:
        buffer = self._buffers.get(step.untyped_storage().data_ptr())
        # a copy or a view that somebody made of a view is not ours to count with
        return buffer if buffer is not None and buffer.views[int(step.storage_offset())] is step else None


def ensure_state(optimizer: MultiTensorStep, param: Tensor, group: dict[str, Any], key: BucketKey) -> dict[str, Any]:
    """The parameter's state with what torch would have put there; only missing keys are filled in.

    Some wrappers (schedule-free ones) put keys of their own there first, at which stock raises KeyError.
    """
    state = optimizer.state[param]
    if not isinstance(state.get("step"), Tensor):
        on_device = key.device_steps or group.get("fused")
        device = param.device if on_device else torch.device("cpu")
        count = float(state.get("step", 0.0))
        state["step"] = torch.full((), count, dtype=key.step_dtype, device=device)
    for name in optimizer.rule.state_names(key.structure):
        if name not in state:
            state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
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
        for bucket in self.buckets:
            bucket.finish(optimizer._step_counts, optimizer.state.values())

        # what is compared every step; read after the states were made
        self._grad_types = [*map(type, grads)]
        self._state_dicts = [*optimizer.state.values()]
        self._value_dicts = [state for state in self._state_dicts if isinstance(state, dict)]
        self._state_values = [*chain.from_iterable(map(dict.values, self._value_dicts))]
        self._members = [position for bucket in self.buckets for position in bucket.positions]
        if self._members == list(range(len(params))):
            self._members = []
        self._states = [tensor for bucket in self.buckets for tensor in bucket.watched_states()]
        self.on_triton = any(bucket.key.backend == _backend.TRITON for bucket in self.buckets)
        self._guard = _compat.metadata_guard([*self._guarded(params), *self._guarded(grads), *self._states])

    @staticmethod
    def _new_bucket(key: BucketKey, optimizer: MultiTensorStep) -> Bucket:
        if key.backend == _backend.NATIVE:
            return NativeBucket(key, optimizer.rule)
        from ._triton import TritonBucket

        return TritonBucket(key, optimizer.rule)

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
        return self.on_triton and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

    def gather(self, grads: list[Any]) -> Iterator[tuple[Bucket, Sequence[Tensor]]]:
        """Each bucket with the gradients of its members, laid out like their parameters."""
        if self.relayout:
            grads = list(grads)
            for i in self.relayout:
                grads[i] = torch.empty_like(self.params[i], dtype=grads[i].dtype).copy_(grads[i])
        for bucket in self.buckets:
            yield bucket, self._guarded(grads) if len(self.buckets) == 1 else [grads[i] for i in bucket.positions]
