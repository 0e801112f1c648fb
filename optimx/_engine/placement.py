"""Placement: who updates a parameter, and with what. One question a function; :func:`optimx.explain` shows the answers.

A parameter is a member of a bucket, whose key it gets, or for a reason left to torch's own step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _compat
from . import backends, exchange, sharding, storage
from .bucket import Bucket, BucketKey
from .cpu import BUCKETS as CPU_BUCKETS
from .layout import extent, is_dense, same_layout
from .offload import is_offloaded
from .optimizer import EngineOptimizer
from .rounds import MATRICES, ROUNDS_OF
from .rule import StateKind, UpdateRule
from .sharding import Cut
from .storage import Format

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NUMBERS = {bool, int, float, type(None)}


class Placement(NamedTuple):
    """Where a parameter goes.

    Attributes:
        key: Of its bucket; None: torch's own step updates it.
        reason: Why that.
        in_turn: It shares memory with another one, or its memory has gaps: torch's loop, one after the other, is right.
    """

    key: BucketKey | None
    reason: str = ""
    in_turn: bool = False


def place_all(
    optimizer: EngineOptimizer, shards: Sequence[Tensor], grads: Sequence[Any], *, device_counts: bool
) -> list[Placement | None]:
    """Where each parameter goes, group after group; None without a gradient. Arguments are those of :func:`place`."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    groups = chain.from_iterable(repeat(group, len(group["params"])) for group in optimizer.param_groups)
    shared = sharing_memory(optimizer, params, shards, grads)
    if optimizer.offload is not None:
        # the parameters of twins, which have memory of their own
        shared.update(sharing_memory(optimizer, params, _compat.local_tensors(params), grads))
    placements: list[Placement | None] = []
    for position, (param, shard, grad, group) in enumerate(zip(params, shards, grads, groups, strict=True)):
        if grad is None:
            placements.append(None)
        elif position in shared:
            placements.append(Placement(None, shared[position], in_turn=True))
        else:
            placements.append(place(optimizer, param, shard, grad, group, device_counts=device_counts))
    return placements


def place(
    optimizer: EngineOptimizer,
    whole: Tensor,
    param: Tensor,
    grad: Tensor,
    group: dict[str, Any],
    *,
    device_counts: bool,
) -> Placement:
    """Where a parameter goes that shares no memory; nothing is changed.

    Args:
        optimizer: Whose it is.
        whole: The parameter.
        param: The part of it in this process; of most parameters, the same.
        grad: Its gradient, or what looks like the one that it will have.
        group: Its group.
        device_counts: Steps are counted on the device, because only it knows whether one counts (GradScaler).
    """
    rule = optimizer.rule
    backend, no_backend = backends.choose(param.device)
    reason = unsuitable(param, grad, group)
    if backend != backends.NATIVE and is_offloaded(optimizer, whole):
        return Placement(None, reason or no_backend or "TRITON_INTERPRET=1: the interpreter updates what is on a CPU")
    if reason or backend == backends.TORCH:
        # torch's fused step on a CPU takes any memory to be dense; its loop does not
        gaps = param.layout is torch.strided and not is_dense(param)
        return Placement(None, reason or no_backend, in_turn=gaps)
    if reason := rule.unsuitable(param):
        return Placement(None, reason)
    variant = rule.variant_for(group, whole, param)
    rounds = ROUNDS_OF[rule.walk_of(variant)]
    cut = sharding.cut_of(whole) if whole is not param else None
    if cut is not None and not rounds and not storage.is_set(group):
        # along which dimension makes no difference
        cut = cut._replace(dims=())
    if MATRICES in rounds and cut is not None and cut.n_shards > 1 and (reason := exchange.unsuitable(whole, variant)):
        return Placement(None, f"parameter is a DTensor that is cut, and {reason}: all of it is gathered for a step")
    state = optimizer.state.get(whole, {})
    if not isinstance(state, dict):
        return Placement(None, f"its state is a {type(state).__name__}")
    formats, kinds = storage.kept(rule, whole, param, group, optimizer.defaults)
    states = {name: state[name] for name in kinds if state.get(name) is not None}
    if storage.is_set(group):
        # others are brought to the format when it is known that there is a bucket for it
        states = {name: value for name, value in states.items() if _is_kept_as(value, kinds[name])}
    if whole is not param:
        states = {name: sharding.part_of(whole, value, kinds[name]) for name, value in states.items()}
    of_states = (getattr(states.get(name), "dtype", kind.dtype or param.dtype) for name, kind in kinds.items())
    dtypes = (param.dtype, grad.dtype, *of_states)
    values = rule.values(group)
    on_triton = backend == backends.TRITON
    capturable = bool(group.get("capturable", optimizer.capturable))
    on_device = on_triton and _rows_on_device(rule, values, group, capturable or device_counts)
    scalar_dtype, reason = _scalar_dtype(rule, state, group, on_device, capturable)
    reason = (
        _formats_problem(rule, variant, formats, cut, whole, param, backend)
        or _states_problem(kinds, states, param)
        or _dtypes_problem(dtypes)
        or (on_triton and _capture_problem(capturable))
        or reason
        or _values_problem(values, param.device)
    )
    if reason:
        return Placement(None, reason)
    first = rule.is_first({storage.state_of(name): value for name, value in state.items()}, values)
    key = BucketKey(backend, param.device, dtypes, variant, on_device, scalar_dtype, first, cut, formats)
    if on_triton and (reason := backends.given_up(key.kernel_key(rule))):
        return Placement(None, reason)
    return Placement(key)


def _is_kept_as(tensor: Any, kind: StateKind) -> bool:
    return not isinstance(tensor, Tensor) or kind.dtype is None or tensor.dtype is kind.dtype


def placement_flags(rule: UpdateRule, group: dict[str, Any]) -> tuple[Any, ...]:
    """What a group says, beside its variant, about who updates it, where scalars live, and what states are."""
    names = ("foreach", "fused", "capturable", "differentiable", *storage.SETTINGS, *rule.optional_settings)
    return tuple(map(group.get, names))


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


def _rows_on_device(rule: UpdateRule, values: tuple[Any, ...], group: dict[str, Any], asked: bool) -> bool:
    """Whether scalars live on the device, and hyperparameter rows are made there.

    A tensor lr on the device is read there, never here.
    """
    if asked or has_device_values(values):
        return True
    return bool(rule.scalars) and (rule.scalars_on_device or bool(group.get("fused")))


def _scalar_dtype(
    rule: UpdateRule, state: dict[str, Any], group: dict[str, Any], on_device: bool, capturable: bool
) -> tuple[torch.dtype, str]:
    """The dtype of a parameter's scalar states, and why they can't be counted."""
    fresh = torch.float32
    if rule.scalars_on_device or not on_device:
        fresh = _compat.scalar_dtype(bool(group.get("fused")) or capturable)
    known = [state[name].dtype for name in rule.scalars if isinstance(state.get(name), Tensor)]
    dtype = known[0] if known else fresh
    if any(other is not dtype for other in known) or (on_device and dtype is not torch.float32):
        return dtype, f"{' and '.join(rule.scalars)} of dtype {', '.join(map(str, known))}"
    return dtype, ""


def _states_problem(kinds: dict[str, StateKind], states: dict[str, Any], param: Tensor) -> str:
    for name, tensor in states.items():
        kind = kinds[name]
        dtypes = FLOATS if kind.dtype is None or kind.dtype in FLOATS else (kind.dtype,)
        if not isinstance(tensor, Tensor) or not _compat.is_plain(tensor) or tensor.dtype not in dtypes:
            return "a state is not a plain floating-point tensor"
        suits = same_layout(tensor, param)
        if not kind.is_like_param:
            suits = tensor.shape == kind.shape(param) and tensor.is_contiguous()
        if tensor.device != param.device or not suits:
            return "a state differs from the parameter in device, shape or layout"
    return ""


def bucket_class(backend: str, walk: str) -> type[Bucket]:
    """Whose members a backend updates by a walk."""
    if backend == backends.NATIVE:
        return CPU_BUCKETS[walk]
    # imports triton
    from .triton import BUCKETS

    return BUCKETS[walk]


def _formats_problem(
    rule: UpdateRule,
    variant: Any,
    formats: Sequence[Format],
    cut: Cut | None,
    param: Tensor,
    part: Tensor,
    backend: str,
) -> str:
    """Why numbers cannot be kept as they should be."""
    if formats and (problem := bucket_class(backend, rule.walk_of(variant)).formats_problem(variant, formats, part)):
        return problem
    if any(kept.kind in storage.CODED for kept in formats) and cut is not None:
        if any(dim != -param.dim() for dim in cut.dims):
            return "its rows, which 8-bit states have scales for, are cut"
    if any(kept.kind == storage.STOCHASTIC for kept in formats) and sharding.geometry_of(param, part) is None:
        return "its shards are not where random bits can be told from the whole"
    return ""


def _dtypes_problem(dtypes: tuple[torch.dtype, ...]) -> str:
    if dtypes[0] is not torch.float64 and torch.float64 in dtypes:
        return "float64 gradient or state of a smaller parameter"
    return ""


def _capture_problem(capturable: bool) -> str:
    """Why a CUDA graph that is being recorded can't have our launches."""
    if not _compat.is_capturing():
        return ""
    if not capturable:
        return "capture without capturable=True"
    return "" if _compat.graphs_keep_pinned_memory() else f"CUDA graphs need torch 2.11, this is {torch.__version__}"


def _values_problem(values: tuple[Any, ...], device: torch.device) -> str:
    for value in values:
        if isinstance(value, Tensor) and value.device.type != "cpu" and value.device != device:
            return "a tensor hyperparameter is on another device"
    return ""


def sharing_memory(
    optimizer: Optimizer, params: Sequence[Tensor], shards: Sequence[Tensor], grads: Sequence[Any]
) -> dict[int, str]:
    """Positions of parameters that have memory in common with another one, or whose states have; and how.

    In one launch their updates would race, and copies would be written back over each other.
    """
    times = Counter(map(id, params))
    found = {i: "listed twice" for i, param in enumerate(params) if times[id(param)] > 1 and grads[i] is not None}
    ranges: dict[torch.device, list[tuple[int, int, int]]] = {}
    for position, (param, shard, grad) in enumerate(zip(params, shards, grads, strict=True)):
        state = optimizer.state.get(param)
        if grad is None:
            continue
        for tensor in (shard, *_compat.local_tensors(state.values() if isinstance(state, dict) else ())):
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
