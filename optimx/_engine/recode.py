"""What is kept in one format, in another: for checkpoints, for settings that change, and as float32 for others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .cpu.codecs import decode, encode
from .layout import flat, same_layout
from .matrices import Scratch
from .offload import state_device
from .optimizer import EngineOptimizer
from .rule import new_state
from .sharding import like, local
from .storage import (
    MASTER_NAME,
    PARAM_COMPANIONS,
    REMAINDER8,
    REMAINDER16,
    REMAINDER_NAME,
    SIGNED8,
    UNSIGNED8,
    Format,
    is_set,
    kept,
    names,
    state_of,
)

State = dict[str, Any]

#: Formats of what is there, by the dtype of codes and of remainders.
_OF_CODES = {torch.int8: SIGNED8, torch.uint8: UNSIGNED8}
_OF_REMAINDERS = {torch.int8: REMAINDER8, torch.int16: REMAINDER16}


def decoded(kept: Format, own: Tensor, companion: Tensor) -> Tensor:
    """The values of a role's whole tensors, float32, in memory of their own."""
    out = torch.empty_like(own, dtype=torch.float32, memory_format=torch.preserve_format)
    values = decode(kept, flat(own), flat(companion), flat(out), Scratch(own.device))
    flat(out).copy_(values)
    return out


def encode_(kept: Format, values: Tensor, own: Tensor, companion: Tensor) -> None:
    """Keep values in a role's whole tensors."""
    if values.dtype is not torch.float32 or not same_layout(values, own):
        values = torch.empty_like(own, dtype=torch.float32, memory_format=torch.preserve_format).copy_(values)
    encode(kept, flat(values), flat(own), flat(companion), None, Scratch(own.device))


def bring_to_plain(optimizer: EngineOptimizer, shards: Sequence[Tensor]) -> None:
    """Let what is there be plain tensors where a group no longer says something else.

    Args:
        optimizer: Whose states.
        shards: What of its parameters lies in this process, group after group.
    """
    for (param, group), shard in zip(_params(optimizer), shards, strict=True):
        state = optimizer.state.get(param)
        if isinstance(state, dict) and not is_set(group) and _is_recoded(state):
            bring_to_formats(optimizer, param, shard, group, state)


def bring_to_formats(
    optimizer: EngineOptimizer, param: Tensor, shard: Tensor, group: dict[str, Any], state: State
) -> None:
    """Let what is there be kept as its group says: made by torch's ``__init__``, loaded, or of other settings.

    Args:
        optimizer: Whose state.
        param: Whose state.
        shard: What of it lies in this process.
        group: Its group.
        state: Changed.
    """
    rule = optimizer.rule
    formats, kinds = kept(rule, param, shard, group, optimizer.defaults)
    made = Maker(param, shard, kinds)
    of_param = formats[0] if formats else Format(0, shard.dtype)
    wanted = names("", of_param.kind)
    is_there = bool(wanted) and wanted[0] in state and local(state[wanted[0]]).dtype is of_param.companion
    found = None if is_there or not wanted else _found_values(state, shard)
    _drop_companions(state, of_param)
    if found is not None:
        companion = made.new(wanted[0])
        encode_(of_param, found, shard.detach(), companion)
        state[wanted[0]] = made.laid_out(wanted[0], companion)
    for i, name in enumerate(rule.state_names(rule.variant_for(group, param, shard)), 1):
        codes, scales = names(name, SIGNED8)
        is_coded = codes in kinds
        if is_coded and isinstance(state.get(name), Tensor):
            values, state[codes], state[scales] = local(state.pop(name)), made.new(codes), made.new(scales)
            encode_(formats[i], values, state[codes], state[scales])
            state[codes], state[scales] = (made.laid_out(tensor, state[tensor]) for tensor in (codes, scales))
        elif not is_coded and codes in state:
            values = _decoded_codes(state.pop(codes), state.pop(scales))
            state[name] = made.laid_out(name, values.to(kinds[name].dtype or shard.dtype))
        elif not is_coded and isinstance(state.get(name), Tensor):
            dtype = kinds[name].dtype
            if dtype is not None and state[name].dtype is not dtype:
                state[name] = state[name].detach().to(dtype)


class Maker:
    """Makes tensors of a parameter's state."""

    def __init__(self, param: Tensor, shard: Tensor, kinds: dict[str, Any]) -> None:
        self._param, self._shard, self._kinds = param, shard, kinds

    def new(self, name: str) -> Tensor:
        """What belongs to the part in this process."""
        return new_state(self._kinds[name], self._shard)

    def laid_out(self, name: str, part: Tensor) -> Tensor:
        """As ``optimizer.state`` has it."""
        return part if self._param is self._shard else like(self._param, part, self._kinds[name])


def _is_recoded(state: State) -> bool:
    return any(state_of(name) != name or name in PARAM_COMPANIONS for name in state)


def _drop_companions(state: State, of_param: Format) -> None:
    """Leave no companion but one that a parameter's format has."""
    for name in PARAM_COMPANIONS & state.keys():
        if name not in names("", of_param.kind) or local(state[name]).dtype is not of_param.companion:
            del state[name]


def _found_values(state: State, shard: Tensor) -> Tensor | None:
    """What a parameter's companion says its values are.

    Returns:
        None without one, or with one that is no longer the parameter's: torch's class rounds it when it loads it, and
        then trains without it, and ``module.to`` leaves no bfloat16 parameter.
    """
    if isinstance(master := state.get(MASTER_NAME), Tensor) and master.dtype is torch.float32:
        return local(master)
    remainder = state.get(REMAINDER_NAME)
    if isinstance(remainder, Tensor) and remainder.dtype in _OF_REMAINDERS and shard.dtype is torch.bfloat16:
        remainder = local(remainder)
        # of an offloaded parameter they are not where it is
        shard = shard.detach().to(remainder.device)
        return decoded(Format(_OF_REMAINDERS[remainder.dtype], shard.dtype), shard, remainder)
    return None


def _decoded_codes(codes: Tensor, scales: Tensor) -> Tensor:
    codes, scales = local(codes), local(scales)
    return decoded(Format(_OF_CODES[codes.dtype], codes.dtype), codes, scales)


def check_complete(state_dict: dict[str, Any]) -> None:
    """Raise ValueError where a state dict has nothing in place of codes.

    DCP takes out of flattened ones what has the names of the optimizer's states, and makes empty dicts of what is not
    there.
    """
    for key, state in state_dict["state"].items():
        for name, value in state.items() if isinstance(state, dict) else ():
            if state_of(name) != name and not isinstance(value, Tensor):
                raise ValueError(
                    f"state_dict['state'][{key!r}][{name!r}] should be a tensor (flatten_optimizer_state_dict=True "
                    f"loses states of 8 bits: get and set them without it) but is: {value}"
                )


def with_float32(optimizer: EngineOptimizer, state: dict[Any, Any]) -> dict[Any, Any]:
    """A state dict's ``state`` with float32 averages in place of codes: what every class and every tool takes."""
    params = dict(enumerate(param for param, _ in _params(optimizer)))
    return {key: _with_float32(params[key], of_param) if key in params else of_param for key, of_param in state.items()}


def _with_float32(param: Tensor, state: Any) -> Any:
    if not isinstance(state, dict) or not _is_recoded(state):
        return state
    result: State = {}
    for name, value in state.items():
        role = state_of(name)
        if role != name:
            result[role] = like(param, _decoded_codes(value, state[names(role, SIGNED8)[1]]))
        elif name.removesuffix("_scales") + "_codes" not in state:
            # neither NCCL nor Gloo sends 16-bit integers to other ranks
            result[name] = value.to(torch.int32) if getattr(value, "dtype", None) is torch.int16 else value
    return result


def _params(optimizer: EngineOptimizer) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    return ((param, group) for group in optimizer.param_groups for param in group["params"])


def master_weights(optimizer: EngineOptimizer) -> list[Tensor]:
    """The exact values of an optimizer's parameters, which 16-bit parameters with a companion show but rounded.

    Returns:
        float32 copies (float64 of float64 parameters; DTensors of DTensors), in the order of ``param_groups``.
    """
    with torch.no_grad():
        return [master_weight(param, optimizer.state.get(param, {})) for param, _ in _params(optimizer)]


def master_weight(param: Tensor, state: Any, shard: Tensor | None = None) -> Tensor:
    """A copy of the exact values of a parameter that has this state, see :func:`master_weights`.

    Args:
        param: The parameter.
        state: Its state.
        shard: What of it lies in this process, where the states are (default: None: where the parameter is).
    """
    shard = local(param) if shard is None else shard
    values = _found_values(state, shard) if isinstance(state, dict) else None
    dtype = torch.promote_types(shard.dtype, torch.float32)
    return like(param, (shard.detach() if values is None else values).to(dtype, copy=True))


def set_master_weights(optimizer: EngineOptimizer, tensors: Sequence[Tensor]) -> None:
    """Set the exact values of an optimizer's parameters, and what the parameters show of them.

    What is written into a parameter itself is lost where ``param_rounding="master"``, and exact to 16 bits elsewhere.

    Args:
        optimizer: Whose parameters.
        tensors: In the order of ``param_groups``, as :func:`master_weights` gives them; of any dtype.

    Raises:
        ValueError: There are more or fewer, or shapes differ; nothing is changed then.
    """
    members = [*_params(optimizer)]
    if len(tensors) != len(members):
        raise ValueError(f"tensors should be {len(members)}, one a parameter, but are: {len(tensors)}")
    for i, ((param, _), tensor) in enumerate(zip(members, tensors, strict=True)):
        if tensor.shape != param.shape:
            raise ValueError(f"tensors[{i}] should have shape {[*param.shape]} but has: {[*tensor.shape]}")
    with torch.no_grad():
        for (param, group), tensor in zip(members, tensors, strict=True):
            set_master_weight(optimizer, param, group, tensor)


def set_master_weight(optimizer: EngineOptimizer, param: Tensor, group: dict[str, Any], tensor: Tensor) -> None:
    """Set the exact values of one parameter, see :func:`set_master_weights`."""
    shard = local(param)
    formats, kinds = kept(optimizer.rule, param, shard, group, optimizer.defaults)
    of_param = formats[0] if formats else Format(0, shard.dtype)
    wanted = names("", of_param.kind)
    state = optimizer.state[param] if wanted else optimizer.state.get(param, {})
    # of a setting that has changed since the last step
    _drop_companions(state, of_param)
    if not wanted:
        param.copy_(tensor)
        return
    # of an offloaded parameter a copy beside its states
    there = shard.detach().to(state_device(optimizer, param))
    made, (name,) = Maker(param, there, kinds), wanted
    companion = local(state[name]) if name in state else made.new(name)
    encode_(of_param, local(tensor).to(there.device), there, companion)
    state[name] = state.get(name, made.laid_out(name, companion))
    if there.device != shard.device:
        shard.copy_(there)
    torch.autograd.graph.increment_version([param])
