"""StepPlan: which tensors share a launch, worked out once and reused while nothing it depends on has changed.

A parameter is a member of a *bucket* (device, dtypes, kernel variant) or, for a reason, left to torch's own step.
All parameter groups share the buckets: hyperparameters are data of a tensor, not arguments of a launch.

A plan that is used although something changed would write to the wrong memory, so everything it stands
on is compared every step, in a handful of C loops: about 0.5 µs a tensor. It keeps no tensor alive: it knows where in
the lists of a step its tensors are, what they look like and where they lie, and takes them anew each time.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, compress, count, repeat
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from .. import _compat
from . import backends, flags, grad_transforms, sharding
from .averages import AVERAGE
from .bucket import WHOLE, Bucket, BucketKey
from .grad_norm import SKIP
from .layout import same_layout
from .offload import is_offloaded
from .optimizer import EngineOptimizer
from .placement import Placement, bucket_class, has_device_values, place_all, placement_flags
from .recode import bring_to_plain
from .rounds import Rounds
from .states import create_states
from .storage import PARAM_COMPANIONS, is_set, kept
from .twins import Twins


class StepInputs:
    """What a step finds: all parameters, their gradients, and the values of all states, in flat lists.

    Args:
        optimizer: Whose step it is.
        group_values: The hyperparameters of each group; a new list where one has changed.
        device_counts: Steps are counted on the device: whether one counts, only it knows (GradScaler).

    Attributes:
        params: Group after group.
        shards: What of them lies in this process: local tensors of DTensors, other parameters themselves.
        whole_grads: Of each parameter; None where it has none.
        grads: The same for shards.
        like_grads: The same; for members without a gradient, what looks as one usually does. A plan's own.
        grad_types: Of these.
        values: Of all state dicts, in their order; in place of DTensors their local tensors.
        identities: Of parameters, shards, keys of the optimizer's state, and values: equal ones mean that the same
            tensors, or others in their places, belong to the same parameters.
    """

    def __init__(self, optimizer: EngineOptimizer, group_values: list[tuple[Any, ...]], device_counts: bool) -> None:
        self.group_values = group_values
        self.device_counts = device_counts
        self.params: tuple[Tensor, ...] = (*chain.from_iterable(group["params"] for group in optimizer.param_groups),)
        self.whole_grads: list[Any] = [param.grad for param in self.params]
        self.shards: Sequence[Tensor] = self.params
        self.grads = self.whole_grads
        self.is_sharded = sharding.has_dtensors(self.params)
        if self.is_sharded:
            self.shards, self.grads = sharding.local_pairs(self.params, self.whole_grads)
        self.like_grads = self.grads
        self.grad_types = [*map(type, self.grads)]
        self.read_states(optimizer)

    def to_host(self, optimizer: EngineOptimizer, twins: Twins) -> None:
        """Put twins into the places of parameters on a device, and what gradients arrive in into those of gradients."""
        self.shards, self.grads = twins.begin(self.shards, self.grads)
        self.like_grads = self.grads
        self.is_sharded = True
        self.read_states(optimizer)

    def transform_grads(self, optimizer: EngineOptimizer, grad_scale: Tensor | None) -> None:
        """Put other gradients in the places of those that groups want changed; parameters keep theirs.

        Args:
            optimizer: Whose step it is.
            grad_scale: What GradScaler multiplied the gradients by, which stays; None: nothing.
        """
        names = grad_transforms.asked_for(optimizer.param_groups)
        if not names:
            return
        if optimizer.norm_group is not None and "max_group_norm" in names:
            raise RuntimeError(
                "max_group_norm should be None with norm_group, because other ranks have other parts of a group"
            )
        self.grads = grad_transforms.transformed(optimizer.param_groups, self.params, self.grads, names, grad_scale)
        self.like_grads = self.whole_grads = self.grads
        if self.is_sharded:
            self.whole_grads = [
                grad if grad is None else sharding.like(param, grad)
                for param, grad in zip(self.params, self.grads, strict=True)
            ]
        self.grad_types = [*map(type, self.grads)]

    def read_states(self, optimizer: EngineOptimizer) -> None:
        """Bring the states up to date."""
        state: Any = optimizer.state
        try:
            self.values = (*chain.from_iterable(map(dict.values, state.values())),)
        except TypeError:  # somebody keeps something else there
            self.values = (*chain.from_iterable(s.values() for s in state.values() if isinstance(s, dict)),)
        self.identities = [*map(_compat.identities, (self.params, (*state,), self.values))]
        if self.is_sharded:
            self.values = (*_compat.local_tensors(self.values),)
            # a DTensor may be given other memory
            self.identities += [*map(_compat.identities, ((*self.shards,), self.values))]


class StepPlan:
    """The buckets of a step, and everything that has to be the same for them to hold in another one.

    Which parameters have a gradient is the same, but for members of buckets that take missing ones. There also those
    are members that had a gradient before, and have a state: experts that got no token are nothing new.

    Args:
        optimizer: Whose step this plans; missing state is created.
        inputs: Of the step.

    Attributes:
        leftovers: What torch's own step updates: where it is among all parameters, and its placement.
        cuts_of_leftovers: How these are cut.
        reduction: Where ranks combine what they have found of the gradients.
        rounds: And of tensors, while these are updated.
        has_flat_shards: FSDP1 left this process a part of a parameter.
        is_of_graph: Made under capture. What was allocated then is the graph's, and holds nothing until it is replayed:
            such a plan is for one step.
        is_captured: A graph reads the tables.
        is_retired: It stays for the graph alone.
    """

    def __init__(self, optimizer: EngineOptimizer, inputs: StepInputs) -> None:
        rule, groups, params = optimizer.rule, optimizer.param_groups, inputs.params
        self.reduction = sharding.Reduction(params, optimizer.norm_group)
        self.rounds = Rounds(rule, groups)
        self.leftovers: list[tuple[int, Placement]] = []
        self.relayout: list[int] = []
        self.variant = [rule.group_variant(group) for group in groups]
        self.flags = [placement_flags(rule, group) for group in groups]
        self._capturable = optimizer.capturable
        self.is_of_graph = _compat.is_capturing()
        self.is_captured = self.is_retired = False
        self._states: list[weakref.ref[Tensor]] = []
        self._on_device = [*map(has_device_values, inputs.group_values)]
        self._values_seen = inputs.group_values
        self._group_sizes = [len(group["params"]) for group in groups]
        self.has_flat_shards = any(map(_compat.is_flat_shard, params))

        bring_to_plain(optimizer, inputs.shards)
        self.buckets = self._sort(optimizer, inputs)
        self.cuts_of_leftovers = [sharding.cut_of(params[position]) for position, _ in self.leftovers]
        self.on_triton = any(bucket.key.backend == backends.TRITON for bucket in self.buckets)
        #: Under capture the same parameters would be in the same buckets.
        self._suits_capture = not self.on_triton or (
            _compat.graphs_keep_pinned_memory()
            and all(group.get("capturable", optimizer.capturable) for group in self._groups_on_buckets(groups))
        )
        self._members = [position for bucket in self.buckets for position in bucket.positions]
        if self._members == list(range(len(params))):
            self._members = []
        for bucket in self.buckets:
            create_states(optimizer, bucket, params, inputs.shards)
        inputs.read_states(optimizer)
        self._optional = {i for bucket in self.buckets if bucket.takes_missing for i in bucket.positions}
        self._grad_types: list[type] = []
        self._missing: list[int] = []
        self._locate(optimizer, inputs)

        # what is compared every step; read after the states were made
        self._identities = inputs.identities
        # a first step that differs from the others is not planned for a second time
        self.is_first = any(bucket.key.first for bucket in self.buckets)
        self._guard = _compat.metadata_guard(self._compared(inputs))

    def _sort(self, optimizer: EngineOptimizer, inputs: StepInputs) -> list[Bucket]:
        """Buckets, with positions of their members; whoever is in none is a leftover."""
        groups, params, shards, grads = optimizer.param_groups, inputs.params, inputs.shards, inputs.grads
        like_grads = [
            _in_place_of_missing(shard) if grad is None and param.requires_grad else grad
            for param, shard, grad in zip(params, shards, grads, strict=True)
        ]
        placements = place_all(optimizer, shards, like_grads, device_counts=inputs.device_counts)
        by_key: dict[BucketKey, Bucket] = {}
        group_of = chain.from_iterable([i] * len(group["params"]) for i, group in enumerate(groups))
        places = range(len(params)) if optimizer._places is None else optimizer._places
        for position, (param, placement, g) in enumerate(zip(params, placements, group_of, strict=True)):
            if placement is None:
                continue
            key = placement.key
            if key is not None and optimizer._twins is not None:
                key = replace(key, transfer=optimizer._twins.transfer_of.get(position))
            if grads[position] is None:
                if key is None or key.backend != backends.TRITON:
                    continue
                if not _has_states(optimizer, param, key):
                    # torch makes what is missing of them when the parameter takes a step
                    continue
            if key is None:
                self._check_leftover(optimizer, inputs, position, g, placement.reason)
                self.leftovers.append((position, placement))
            else:
                if not same_layout(like_grads[position], shards[position]):
                    self.relayout.append(position)
                if key not in by_key:
                    by_key[key] = bucket_class(key.backend, optimizer.rule.walk_of(key.variant))(key, optimizer.rule)
                seed = groups[g].get("rounding_seed", 0)
                geometry = (sharding.geometry_of(param, shards[position]) if key.formats else None) or WHOLE
                by_key[key].add(position, places[position], g, param.shape, geometry, seed)
        return [*by_key.values()]

    @staticmethod
    def _check_leftover(optimizer: EngineOptimizer, inputs: StepInputs, position: int, g: int, reason: str) -> None:
        """Raise RuntimeError where torch's own step does not do what is asked for."""
        param, shard, group = inputs.params[position], inputs.shards[position], optimizer.param_groups[g]
        asked = ""
        if is_set(group) and not _loop_keeps(optimizer, param, shard, group):
            asked = "kept as param_rounding and state_dtype say"
        elif not optimizer.loop_knows_flags and (set_flags := flags.of_update(optimizer.rule, group)):
            asked = f"updated with {set_flags[0]}={group[set_flags[0]]}"
        elif is_offloaded(optimizer, param):
            asked = "updated on the host, where its states are,"
        if asked:
            raise RuntimeError(
                f"parameter {position} of all, in group {g}, should be {asked} but is left to torch's own step: "
                f"{reason}"
            )

    def _groups_on_buckets(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups of members."""
        return [groups[i] for i in {*chain.from_iterable(bucket.groups for bucket in self.buckets)}]

    def _locate(self, optimizer: EngineOptimizer, inputs: StepInputs) -> None:
        """Tell the buckets where their members' states are, and let them plan."""
        where: dict[int, dict[str, int]] = {}
        n_values = 0
        for param, state in optimizer.state.items():
            if isinstance(state, dict):
                where[id(param)] = {name: n_values + i for i, name in enumerate(state)}
                n_values += len(state)
        where_of = [where.get(id(param), {}) for param in inputs.params]
        #: By the positions of their parameters, where averages are among all values.
        self.averages = {i: of_param[AVERAGE] for i, of_param in enumerate(where_of) if AVERAGE in of_param}
        for bucket in self.buckets:
            bucket.locate([where_of[i] for i in bucket.positions])
        self._mark(inputs.grad_types)
        self.bind(inputs)
        scalars = [
            state[name] for state in optimizer.state.values() if isinstance(state, dict)
            for name in optimizer.rule.scalars if isinstance(state.get(name), Tensor)
        ]  # fmt: skip
        known = {scalar.data_ptr() for scalar in scalars if _compat.is_plain(scalar)}
        for bucket in self.buckets:
            bucket.finish(known)

    def _guarded(self, tensors: Sequence[Any]) -> Sequence[Tensor]:
        """The entries of members; the empty list stands for all of them."""
        return [tensors[i] for i in self._members] if self._members or not self.buckets else tensors

    def _compared(self, inputs: StepInputs) -> list[Tensor]:
        """Tensors whose dtypes, devices, shapes and strides are compared."""
        states = chain.from_iterable(bucket.compared_states() for bucket in self.buckets)
        return [*self._guarded(inputs.shards), *self._guarded(inputs.like_grads), *states]

    def _mark(self, grad_types: list[type]) -> None:
        """From now on these parameters have gradients."""
        self._grad_types = grad_types
        has_grad = [*map(is_not, grad_types, repeat(_NONE))]
        for bucket in self.buckets:
            if bucket.takes_missing:
                bucket.mark(has_grad)
        #: Members without a gradient.
        self._missing = [bucket.positions[i] for bucket in self.buckets for i in bucket.absent]

    def bind(self, inputs: StepInputs) -> None:
        """Give the buckets the tensors of a step that :meth:`is_for` has found to have the right gradients."""
        if inputs.grad_types != self._grad_types:
            self._mark(inputs.grad_types)
        inputs.like_grads = inputs.grads
        if self._missing:
            inputs.like_grads = [*inputs.grads]
            for i in self._missing:
                inputs.like_grads[i] = _in_place_of_missing(inputs.shards[i])
        for bucket in self.buckets:
            bucket.bind(inputs.shards, inputs.like_grads, inputs.values)

    def release(self) -> None:
        """Keep no tensor of a step."""
        for bucket in self.buckets:
            bucket.release()

    def lay_out_grads(self, inputs: StepInputs) -> None:
        """Gradients laid out unlike their parameters are copied."""
        if self.relayout:
            grads = [*inputs.like_grads]
            for i in self.relayout:
                grads[i] = torch.empty_like(inputs.shards[i], dtype=grads[i].dtype).copy_(grads[i])
            for bucket in self.buckets:
                bucket.bind(inputs.shards, grads, inputs.values)

    def is_for(self, inputs: StepInputs) -> bool:
        """Whether the same parameters have gradients, as far as that matters."""
        if inputs.grad_types == self._grad_types:
            return True
        if not self._optional or len(inputs.grad_types) != len(self._grad_types):
            return False
        return self._optional.issuperset(compress(count(), map(is_not, inputs.grad_types, self._grad_types)))

    def holds(self, optimizer: EngineOptimizer, inputs: StepInputs) -> bool:
        """Whether parameters, groups and states are the objects they were."""
        return (
            inputs.identities == self._identities
            and not self.is_retired
            and [len(group["params"]) for group in optimizer.param_groups] == self._group_sizes
            and self._same_variants(optimizer, inputs)
            and not self.is_first
            and self._capturable == optimizer.capturable
            and self.reduction.norm_group is optimizer.norm_group
            and (self._suits_capture or not _compat.is_capturing())
        )

    def _same_variants(self, optimizer: EngineOptimizer, inputs: StepInputs) -> bool:
        """Whether groups still choose the kernels they chose; looked at only where a setting has changed."""
        if inputs.group_values is self._values_seen:
            return True
        rule, groups = optimizer.rule, optimizer.param_groups
        same = (
            [*map(rule.group_variant, groups)] == self.variant
            and [placement_flags(rule, group) for group in groups] == self.flags
            and [*map(has_device_values, inputs.group_values)] == self._on_device
        )
        if same:
            self._values_seen = inputs.group_values
        return same

    def fits(self, inputs: StepInputs) -> bool:
        """Whether dtypes, devices, shapes, strides and addresses are what they were; the buckets are bound."""
        return self._guard(*self._compared(inputs)) and all(bucket.matches() for bucket in self.buckets)

    def keep_for_graph(self) -> None:
        """A graph has recorded launches that read this plan's tables; the buckets are bound."""
        if not self.is_captured:
            self.is_captured = True
            tensors = chain.from_iterable((*b.members.states, *b.members.scalars, b.means) for b in self.buckets)
            self._states = [*map(weakref.ref, chain.from_iterable(tensors))]

    def has_dead_states(self) -> bool:
        """Whether a state that a graph updates is gone, and the graph of no use."""
        return any(state() is None for state in self._states)

    def take_back_first(self, params: Sequence[Tensor], state: dict[Tensor, Any], control: Tensor) -> None:
        """A first step that was skipped is still to come. This waits to see whether it was."""
        if not bool(control[SKIP] != 0):
            return
        for bucket in self.buckets:
            for position in bucket.positions if bucket.key.first else ():
                for name in {*bucket.state_names} - PARAM_COMPANIONS:
                    del state[params[position]][name]


_NONE = type(None)


def _in_place_of_missing(param: Tensor) -> Tensor:
    """What looks as a gradient usually does."""
    return param.detach()


def _has_states(optimizer: EngineOptimizer, param: Tensor, key: BucketKey) -> bool:
    """Whether a parameter has all states and scalars that members of such a bucket have."""
    rule, state = optimizer.rule, optimizer.state.get(param, {})
    return all(isinstance(state.get(name), Tensor) for name in (*rule.scalars, *rule.state_names(key.variant)))


def _loop_keeps(optimizer: EngineOptimizer, param: Tensor, shard: Tensor, group: dict[str, Any]) -> bool:
    """Whether the step that leftovers take keeps their states as the group says."""
    return optimizer.loop_keeps_dtypes and not kept(optimizer.rule, param, shard, group, optimizer.defaults).formats
