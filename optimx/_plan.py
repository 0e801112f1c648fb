"""StepPlan: which tensors share a launch, worked out once and reused while nothing it depends on has changed.

A parameter is a member of a *bucket* (device, dtypes, kernel variant) or, for a reason, left to torch's own step.
All parameter groups share the buckets: hyperparameters are data of a tensor, not arguments of a launch.

A plan that is used although something changed would write to the wrong memory, so everything it stands
on is compared every step, in a handful of C loops: about 0.5 µs a tensor. It keeps no tensor alive: it knows where in
the lists of a step its tensors are, what they look like and where they lie, and takes them anew each time.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _backend, _compat
from ._buckets import Bucket
from ._layout import extent, is_dense, same_layout
from ._states import create_states

if TYPE_CHECKING:
    from ._rule import UpdateRule
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
    """A parameter that torch's own step updates, and why.

    Attributes:
        position: Index in the step's list of all parameters.
        in_turn: It shares memory with another one, or its memory has gaps: torch's loop, one after the other, is right.
    """

    position: int
    reason: str
    in_turn: bool = False


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
    if not isinstance(state, dict):
        return None, f"its state is a {type(state).__name__}"
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
    if triton and _compat.is_capturing():
        if not capturable:
            return None, "capture without capturable=True"
        if not _compat.graphs_keep_pinned_memory():
            return None, f"CUDA graphs need torch 2.11, this is {torch.__version__}"
    values = rule.values(group)
    # a tensor lr on the device is read there, never here: so are the rows made, and the steps counted
    on_device = triton and (capturable or has_device_values(values) or optimizer._engine.device_counts)
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
    key = BucketKey(backend, param.device, dtypes, structure, on_device, count_dtype, first, aligned)
    broken = _backend.given_up(variant(rule, key)) if triton else None
    return (None, broken) if broken else (key, "")


def variant(rule: UpdateRule, key: BucketKey) -> tuple[Any, ...]:
    """What tells the kernels of a bucket from those of others."""
    return rule.module, replace(key, first=False)


class StepInputs:
    """What a step finds: all parameters, their gradients, and the values of all states, in flat lists.

    Attributes:
        params: Group after group.
        grads: Of each parameter; None where it has none.
        values: Of all state dicts, in their order.
        identities: Of parameters, keys of the optimizer's state, and values: equal ones mean that the same tensors, or
            others in their places, belong to the same parameters.
    """

    def __init__(self, optimizer: MultiTensorStep) -> None:
        self.params: tuple[Tensor, ...] = (*chain.from_iterable(group["params"] for group in optimizer.param_groups),)
        self.grads: list[Any] = [param.grad for param in self.params]
        self.read_states(optimizer)

    def read_states(self, optimizer: MultiTensorStep) -> None:
        """Bring the states up to date."""
        state: Any = optimizer.state
        try:
            self.values = (*chain.from_iterable(map(dict.values, state.values())),)
        except TypeError:  # somebody keeps something else there
            self.values = (*chain.from_iterable(s.values() for s in state.values() if isinstance(s, dict)),)
        self.identities = [*map(_compat.identities, (self.params, (*state,), self.values))]


class StepPlan:
    """The buckets of one pattern of gradients, and everything that has to be the same for them to hold.

    Args:
        optimizer: Whose step this plans; missing state is created.
        inputs: Of the step; a parameter without a gradient is left out.

    Attributes:
        leftovers: What torch's own step updates.
        has_flat_shards: FSDP1 left this process a part of a parameter.
        is_of_graph: Made under capture. What was allocated then is the graph's, and holds nothing until it is replayed:
            such a plan is for one step.
        is_captured: A graph reads the tables.
        is_retired: It stays for the graph alone.
    """

    def __init__(self, optimizer: MultiTensorStep, inputs: StepInputs) -> None:
        rule, engine, groups = optimizer.rule, optimizer._engine, optimizer.param_groups
        params, grads = inputs.params, inputs.grads
        self.leftovers: list[Leftover] = []
        self.relayout: list[int] = []
        self.structure = [rule.structure_of(group) for group in groups]
        self.flags = [rule.flags_of(group) for group in groups]
        self._capturable = optimizer.capturable
        self.is_of_graph = _compat.is_capturing()
        self.is_captured = self.is_retired = False
        self._states: list[weakref.ref[Tensor]] = []
        self._on_device = [*map(has_device_values, engine.values)]
        self._values_seen = engine.values
        self._group_sizes = [len(group["params"]) for group in groups]
        self.has_flat_shards = any(map(_compat.is_flat_shard, params))

        shared = sharing_memory(optimizer, params, grads)
        by_key: dict[BucketKey, Bucket] = {}
        group_of = chain.from_iterable([i] * len(group["params"]) for i, group in enumerate(groups))
        for position, (param, grad, g) in enumerate(zip(params, grads, group_of, strict=True)):
            if grad is None:
                continue
            key, reason = classify(optimizer, param, grad, groups[g])
            if position in shared:
                self.leftovers.append(Leftover(position, shared[position], in_turn=True))
            elif key is None:
                # torch's fused step on a CPU takes any memory to be dense; its loop does not
                gaps = param.layout is torch.strided and not is_dense(param)
                self.leftovers.append(Leftover(position, reason, in_turn=gaps))
            else:
                if not same_layout(grad, param):
                    self.relayout.append(position)
                if key not in by_key:
                    by_key[key] = self._new_bucket(key, optimizer)
                by_key[key].add(position, g)
        self.buckets = [*by_key.values()]
        self.on_triton = any(bucket.key.backend == _backend.TRITON for bucket in self.buckets)
        #: Under capture the same parameters would be in the same buckets.
        self._suits_capture = not self.on_triton or (
            _compat.graphs_keep_pinned_memory()
            and all(group.get("capturable", optimizer.capturable) for group in self._groups_on_buckets(groups))
        )
        self._members = [position for bucket in self.buckets for position in bucket.positions]
        if self._members == list(range(len(params))):
            self._members = []
        for bucket in self.buckets:
            create_states(optimizer, bucket, [params[i] for i in bucket.positions])
        inputs.read_states(optimizer)
        self._locate(optimizer, inputs)

        # what is compared every step; read after the states were made
        self._identities = inputs.identities
        self._grad_types = [*map(type, grads)]
        # a first step that differs from the others is not planned for a second time
        self.is_first = any(bucket.key.first for bucket in self.buckets)
        self._guard = _compat.metadata_guard(self._compared(inputs))

    def _groups_on_buckets(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups of members."""
        return [groups[i] for i in {*chain.from_iterable(bucket.groups for bucket in self.buckets)}]

    def _locate(self, optimizer: MultiTensorStep, inputs: StepInputs) -> None:
        """Tell the buckets where their members' states are, and let them plan."""
        where: dict[int, dict[str, int]] = {}
        n_values = 0
        for param, state in optimizer.state.items():
            if isinstance(state, dict):
                where[id(param)] = {name: n_values + i for i, name in enumerate(state)}
                n_values += len(state)
        for bucket in self.buckets:
            bucket.locate([where.get(id(inputs.params[i]), {}) for i in bucket.positions])
        self.bind(inputs)
        scalars = [
            state[name] for state in optimizer.state.values() if isinstance(state, dict)
            for name in optimizer.rule.counts if isinstance(state.get(name), Tensor)
        ]  # fmt: skip
        known = {scalar.data_ptr() for scalar in scalars if _compat.is_plain(scalar)}
        for bucket in self.buckets:
            bucket.finish(known)

    @staticmethod
    def _new_bucket(key: BucketKey, optimizer: MultiTensorStep) -> Bucket:
        if key.backend == _backend.NATIVE:
            return optimizer.rule.native_bucket(key, optimizer.rule)
        return optimizer.rule.triton_bucket()(key, optimizer.rule)

    def _guarded(self, tensors: Sequence[Any]) -> Sequence[Tensor]:
        """The entries of members; the empty list stands for all of them."""
        return [tensors[i] for i in self._members] if self._members or not self.buckets else tensors

    def _compared(self, inputs: StepInputs) -> list[Tensor]:
        """Tensors whose dtypes, devices, shapes and strides are compared."""
        states = chain.from_iterable(bucket.compared_states() for bucket in self.buckets)
        return [*self._guarded(inputs.params), *self._guarded(inputs.grads), *states]

    def bind(self, inputs: StepInputs) -> None:
        """Give the buckets the tensors of a step."""
        for bucket in self.buckets:
            bucket.bind(inputs.params, inputs.grads, inputs.values)

    def release(self) -> None:
        """Keep no tensor of a step."""
        for bucket in self.buckets:
            bucket.release()

    def lay_out_grads(self, inputs: StepInputs) -> None:
        """Gradients laid out unlike their parameters are copied."""
        if self.relayout:
            grads = list(inputs.grads)
            for i in self.relayout:
                grads[i] = torch.empty_like(inputs.params[i], dtype=grads[i].dtype).copy_(grads[i])
            for bucket in self.buckets:
                bucket.bind(inputs.params, grads, inputs.values)

    def is_for(self, inputs: StepInputs) -> bool:
        """Whether the same parameters have gradients."""
        return [*map(type, inputs.grads)] == self._grad_types

    def holds(self, optimizer: MultiTensorStep, inputs: StepInputs) -> bool:
        """Whether parameters, groups and states are the objects they were."""
        return (
            inputs.identities == self._identities
            and not self.is_retired
            and [len(group["params"]) for group in optimizer.param_groups] == self._group_sizes
            and self._same_variants(optimizer)
            and not self.is_first
            and self._capturable == optimizer.capturable
            and (self._suits_capture or not _compat.is_capturing())
        )

    def _same_variants(self, optimizer: MultiTensorStep) -> bool:
        """Whether groups still choose the kernels they chose; looked at only where a setting has changed."""
        values = optimizer._engine.values
        if values is self._values_seen:
            return True
        rule, groups = optimizer.rule, optimizer.param_groups
        same = (
            [*map(rule.structure_of, groups)] == self.structure
            and [*map(rule.flags_of, groups)] == self.flags
            and [*map(has_device_values, values)] == self._on_device
        )
        if same:
            self._values_seen = values
        return same

    def fits(self, inputs: StepInputs) -> bool:
        """Whether dtypes, devices, shapes, strides and addresses are what they were; the buckets are bound."""
        return self._guard(*self._compared(inputs)) and all(bucket.matches() for bucket in self.buckets)

    def keep_for_graph(self) -> None:
        """A graph has recorded launches that read this plan's tables; the buckets are bound."""
        if not self.is_captured:
            self.is_captured = True
            tensors = chain.from_iterable((*b.members.states, *b.members.scalars) for b in self.buckets)
            self._states = [*map(weakref.ref, chain.from_iterable(tensors))]

    def has_dead_states(self) -> bool:
        """Whether a state that a graph updates is gone, and the graph of no use."""
        return any(state() is None for state in self._states)

    def take_back_first(self, state: dict[Tensor, Any], control: Tensor) -> None:
        """A first step that was skipped is still to come. This waits to see whether it was."""
        if not bool(control[2] != 0):
            return
        for bucket in self.buckets:
            for param in bucket.members.params if bucket.key.first else ():
                for name in bucket.state_names:
                    del state[param][name]


def sharing_memory(optimizer: Optimizer, params: Sequence[Tensor], grads: Sequence[Any]) -> dict[int, str]:
    """Positions of parameters that have memory in common with another one, or whose states have; and how.

    In one launch their updates would race, and copies would be written back over each other.
    """
    times = Counter(map(id, params))
    found = {i: "listed twice" for i, param in enumerate(params) if times[id(param)] > 1 and grads[i] is not None}
    ranges: dict[torch.device, list[tuple[int, int, int]]] = {}
    for position, (param, grad) in enumerate(zip(params, grads, strict=True)):
        state = optimizer.state.get(param)
        if grad is None:
            continue
        for tensor in (param, *(state.values() if isinstance(state, dict) else ())):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided and _compat.is_plain(tensor):
                start, end = extent(tensor)
                if 0 < start < end:
                    ranges.setdefault(tensor.device, []).append((start, end, position))
    for on_device in ranges.values():
        # the one that reaches farthest, of those that begin before
        on_device.sort()
        farthest, owner = 0, -1
        for start, end, position in on_device:
            if start < farthest and position != owner:
                for one in (position, owner):
                    found.setdefault(one, "shares memory with another parameter")
            if end > farthest:
                farthest, owner = end, position
    return found
