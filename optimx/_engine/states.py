"""States that we create: where they lie in memory, which never changes afterwards.

Small tensors on a CPU are updated together, and scalars counted together, where they lie one after the other; so they
are laid out like that when we make them: before a parameter's first step, and when a checkpoint is loaded. What
somebody else put into ``optimizer.state`` (shared memory, a view, another dtype) is used where it is.

Memory that tensors share is kept small, and where nothing is gained nothing is shared: pickle, other than
``torch.save``, writes all of it with each tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .. import _compat
from . import backends, sharding
from .averages import AVERAGE
from .bucket import Bucket
from .cpu.batch import BATCH, cut, is_small
from .cpu.call import MANY
from .flags import MASK_MEAN
from .offload import state_device
from .optimizer import EngineOptimizer
from .recode import bring_to_formats
from .rule import new_state
from .storage import MASTER_NAME, is_set, kept

State = dict[str, Any]

#: Scalars that lie together, at most.
SCALARS = 1 << 10
#: Elements that lie together, at most, where torch's operator updates them: a few tensors in a cache line.
NEIGHBOURS = 1 << 8
#: Elements of averages that lie together, at most.
AVERAGES = 1 << 12


def create_states(
    optimizer: EngineOptimizer, bucket: Bucket, all_params: Sequence[Tensor], all_shards: Sequence[Tensor]
) -> None:
    """Give the members of a bucket what torch would have given them; only missing states are made.

    Those of DTensors are DTensors, of what is made for this process's parts.

    Some wrappers (schedule-free ones) put keys of their own there first, at which stock raises KeyError.
    """
    rule, key = optimizer.rule, bucket.key
    if not (rule.scalars or bucket.state_names):
        # as in torch, whose plain SGD leaves the state empty
        return
    groups = [optimizer.param_groups[g] for g in bucket.groups]
    params, shards = ([tensors[i] for i in bucket.positions] for tensors in (all_params, all_shards))
    states = [optimizer.state[param] for param in params]
    # what is made in inference mode cannot be updated outside of it
    with torch.inference_mode(False):
        fresh = []
        for state, group in zip(states, groups, strict=True):
            missing = [name for name in rule.scalars if not isinstance(state.get(name), Tensor)]
            for name in missing:
                value = float(state[name]) if name in state else rule.new_scalar(name, group)
                state[name] = torch.full((), value, dtype=key.scalar_dtype, device="cpu")
            if missing and len(missing) == len(rule.scalars):
                fresh.append(state)
        device = key.device if key.on_device else torch.device("cpu")
        settle_scalars(rule.scalars, fresh, device)
        away = [state for state in states if any(state[name].device != device for name in rule.scalars)]
        settle_scalars(rule.scalars, away, device)
        kinds = [
            kept(rule, param, shard, group, optimizer.defaults).kinds
            for param, shard, group in zip(params, shards, groups, strict=True)
        ]
        for param, shard, group, state in zip(params, shards, groups, states, strict=True):
            if is_set(group):
                bring_to_formats(optimizer, param, shard, group, state)
        for name in bucket.state_names:
            without = [i for i, state in enumerate(states) if not isinstance(state.get(name), Tensor)]
            # what has equal settings and shapes is updated together
            without.sort(key=lambda i: (bucket.groups[i], shards[i].shape))
            if name == MASTER_NAME:
                new = [shards[i].detach().to(torch.float32, copy=True) for i in without]
            else:
                new = [new_state(kinds[i][name], shards[i]) for i in without]
            if key.backend == backends.NATIVE:
                new = side_by_side(new, _most_neighbours(optimizer, key.variant, key.dtypes[0]))
            for i, tensor in zip(without, new, strict=True):
                if params[i] is not shards[i]:
                    tensor = sharding.like(params[i], tensor, kinds[i][name])
                states[i][name] = tensor
        _create_means(states if bucket.has_means else (), key.device)


def _most_neighbours(optimizer: EngineOptimizer, variant: tuple[bool, ...], dtype: torch.dtype) -> int:
    """Up to how many elements lie together: a batch where a formula updates it at once, few for torch's operator."""
    rule = optimizer.rule
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    by_formula = rule.operator(variant, compute) is None or (rule.by_element and len(optimizer.param_groups) >= MANY)
    return BATCH if by_formula else NEIGHBOURS


def _create_means(states: Sequence[State], device: torch.device) -> None:
    """Give states their shares of cautious steps, 1 before the first; what is there is brought to float32."""
    fresh = [state for state in states if MASK_MEAN not in state]
    for first in range(0, len(fresh), SCALARS):
        block = torch.ones(len(fresh[first : first + SCALARS]), dtype=torch.float32, device=device)
        for state, place in zip(fresh[first:], _places(block, [torch.Size()] * len(block)), strict=False):
            state[MASK_MEAN] = place
    for state in states:
        mean = torch.as_tensor(state[MASK_MEAN])
        if mean is not state[MASK_MEAN] or (mean.device, mean.dtype, mean.dim()) != (device, torch.float32, 0):
            state[MASK_MEAN] = mean.detach().to(device, torch.float32).reshape(())


def settle_scalars(names: Sequence[str], states: Sequence[State], device: torch.device) -> None:
    """Replace scalars, all names of which are there, by copies that lie together on ``device``; in one transfer."""
    alike: dict[tuple[Any, ...], list[State]] = {}
    for state in states if names else ():
        kinds = {(state[name].device, state[name].dtype) for name in names}
        if len(kinds) == 1:
            alike.setdefault(kinds.pop(), []).append(state)
        else:
            for name in names:
                state[name] = state[name].detach().to(device, copy=True)
    for same in alike.values():
        values = torch.stack([torch.stack([state[name].detach().reshape(()) for state in same]) for name in names])
        if values.device.type == "cpu" and device.type == "cuda":
            # a copy of memory that is not pinned may wait, and cannot be recorded in a graph
            values = values.pin_memory()
        # towards the host a copy that nobody waits for would be read too early
        values = values.to(device, non_blocking=device.type != "cpu")
        n = SCALARS // len(names)
        for first in range(0, len(same), n):
            block = values[:, first : first + n].reshape(-1).clone()
            places = iter(_places(block, [torch.Size()] * len(block)))
            for name in names:
                for state in same[first : first + n]:
                    state[name] = next(places)


def side_by_side(tensors: Sequence[Tensor], most: int) -> list[Tensor]:
    """The tensors, those that are small and alike as copies in pieces of memory of ``most`` elements, in this order."""
    result = list(tensors)
    alike: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if is_small(tensor) and 0 < tensor.numel() <= most:
            alike.setdefault(tensor.dtype, []).append(i)
    for indices in chain.from_iterable(cut(same, tensors, most) for same in alike.values()):
        if len(indices) > 1:
            block = torch.cat([tensors[i].detach().view(-1) for i in indices])
            for i, place in zip(indices, _places(block, [tensors[i].shape for i in indices]), strict=True):
                result[i] = place
    return result


def _places(block: Tensor, shapes: Sequence[torch.Size]) -> Iterator[Tensor]:
    """Tensors of these shapes that fill ``block``: not views of it, whose versions would be counted together."""
    memory, offset = block.untyped_storage(), 0
    for shape in shapes:
        tensor = torch.empty(0, dtype=block.dtype, device=block.device)
        yield tensor.set_(memory, offset, shape)  # type: ignore[call-overload]
        offset += shape.numel()


def own_states(optimizer: EngineOptimizer, snapshot: Any = None, *, keep_shared: bool = False) -> None:
    """Let states lie as :func:`create_states` would have laid them, in memory that is not the snapshot's.

    Args:
        optimizer: Whose states have just been loaded or unpickled, or made by torch's ``__init__``.
        snapshot: The ``state`` of what was loaded: neither its tensors nor its containers may change later.
        keep_shared: Leave alone what other processes share.
    """
    taken = {*map(_memory, _tensors(snapshot))}
    scalars: dict[torch.device, list[State]] = {}
    small: dict[tuple[str, int], list[State]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for group in optimizer.param_groups:
            for param in sorted(group["params"], key=lambda param: param.shape):
                state = optimizer.state.get(param)
                if not isinstance(state, dict) or (keep_shared and _is_shared(state)):
                    continue
                together = _settled_scalars(optimizer, state)
                if together:
                    scalars.setdefault(state[together[0]].device, []).append(state)
                neighbours = _small_states(optimizer, param, group, state)
                for entry in neighbours.items():
                    small.setdefault(entry, []).append(state)
                for name in state.keys() - {*together, *neighbours}:
                    state[name] = _apart_from(taken, state[name])
        for key in optimizer.state.keys() - {param for group in optimizer.param_groups for param in group["params"]}:
            optimizer.state[key] = _apart_from(taken, optimizer.state[key])
        for device, states in scalars.items():
            settle_scalars(optimizer.rule.scalars, states, device)
        for (name, most), states in small.items():
            # one that is alone stays where it is
            places = side_by_side([state[name] for state in states], most)
            for state, place in zip(states, places, strict=True):
                state[name] = _apart_from(taken, place)


def _is_shared(state: State) -> bool:
    """Whether other processes share a state."""
    return any(_is_plain(value) and value.is_shared() for value in state.values())


def _settled_scalars(optimizer: EngineOptimizer, state: State) -> tuple[str, ...]:
    """Names of scalars that lie together with those of other parameters: all of a rule's, or none."""
    names = optimizer.rule.scalars
    return names if all(_is_plain(state.get(name)) and state[name].dim() == 0 for name in names) else ()


def _small_states(optimizer: EngineOptimizer, param: Tensor, group: dict[str, Any], state: State) -> dict[str, int]:
    """States that lie beside those of other parameters: of each name how many elements may lie together."""
    device = state_device(optimizer, param)
    if backends.choose(device)[0] != backends.NATIVE:
        return {}
    rule = optimizer.rule
    names = [
        name
        for name, value in state.items()
        if not (name in rule.scalars and _settled_scalars(optimizer, state))
        and _is_plain(value) and value.device == device and is_small(value)
    ]  # fmt: skip
    most = _most_neighbours(optimizer, rule.variant_of(rule.group_variant(group), param), param.dtype)
    # averages move together, whoever updates their parameters
    return {name: AVERAGES if name == AVERAGE else most for name in names}


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and _compat.is_plain(value) and value.layout is torch.strided


def _memory(tensor: Tensor) -> int:
    """What tells whether two tensors share memory."""
    return tensor.untyped_storage().data_ptr() if _is_plain(tensor) else id(tensor)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)


def _apart_from(taken: set[int], value: Any) -> Any:
    """The value, with copies of those tensors that lie in memory that is taken."""
    if isinstance(value, Tensor):
        # what was made in inference mode cannot be updated outside of it
        return value.clone() if _memory(value) in taken or value.is_inference() else value
    if isinstance(value, dict):
        return {key: _apart_from(taken, entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_apart_from(taken, entry) for entry in value)
    return copy.deepcopy(value) if taken and isinstance(value, Iterable) else value
