"""Everything that a trial run changes, put back as it was: the same tensors, dicts and lists, with what they held."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ._checks import told
from ._engine.sharding import local

__all__ = ["check_restorable", "preserved", "random_states"]

Restore = Callable[[], Any]


@contextmanager
def preserved(model: nn.Module, optimizer: Optimizer, also: Iterable[Any] = ()) -> Iterator[None]:
    """Whatever happens in the ``with`` block, leave no trace of it when it is left, also by an exception.

    Put back are parameters, gradients, buffers, the mode of every module, states, groups and attributes of the
    optimizer (and of its members), and the random generators of python, numpy (where it is imported) and torch. Copies
    lie in the memory of the CPU. Tensors stay the same objects, and so do states, groups and lists; what has joined is
    taken out again. Within the block parameters have no gradients to begin with.

    Args:
        model: Its parameters need not be the optimizer's.
        optimizer: Any torch optimizer.
        also: Others that change: what :func:`check_restorable` lets pass.
    """
    params = {param: None for group in optimizer.param_groups for param in group["params"]}
    params.update(dict.fromkeys(model.parameters()))
    memory = _Memory()
    # the last one is the first to be put back
    with ExitStack() as stack:
        stack.callback(random_states())
        stack.callback(memory.of(optimizer))
        stack.callback(memory.of([*params]))
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
            for name, buffer in module.named_buffers(recurse=False):
                restore = memory.of(buffer)
                stack.callback(lambda module, name, restore: setattr(module, name, restore()), module, name, restore)
        for param in params:
            stack.callback(setattr, param, "grad", param.grad)
            # nobody writes into what is not there
            param.grad = None
        for other in also:
            read, write = _state_methods(other)
            restore = memory.of(getattr(other, read)())
            stack.callback(lambda load, restore: load(restore()), getattr(other, write), restore)
        # before schedulers, which compare the groups with their state, as well as after them, who write into the groups
        stack.callback(memory.of(optimizer.param_groups))
        yield


def check_restorable(what: str, value: Any) -> None:
    """TypeError unless it has ``state_dict`` and ``load_state_dict``, or is a generator of random numbers."""
    if not all(callable(getattr(value, name, None)) for name in _state_methods(value)):
        raise TypeError(told(what, "should have state_dict and load_state_dict", value))


def _state_methods(value: Any) -> tuple[str, str]:
    return ("get_state", "set_state") if isinstance(value, torch.Generator) else ("state_dict", "load_state_dict")


class _Memory:
    """What objects hold, as functions that put it back and return the same object; each tensor is copied once."""

    def __init__(self) -> None:
        self._known: dict[int, Restore] = {}

    def of(self, value: Any) -> Restore:
        """Of a tensor, an optimizer, a dict, list or tuple with everything in it. Others stay as they are."""
        if not isinstance(value, (Tensor, Optimizer, dict, list, tuple)):
            return lambda: value
        if id(value) not in self._known:
            # something may hold itself
            self._known[id(value)] = lambda: value
            self._known[id(value)] = self._copied(value)
        return self._known[id(value)]

    def _copied(self, value: Any) -> Restore:
        if isinstance(value, Tensor):
            return _of_tensor(value)
        if isinstance(value, Optimizer):
            return _with(value, self.of(vars(value)))
        if isinstance(value, dict):
            return _of_dict(value, {key: self.of(item) for key, item in value.items()})
        items = [self.of(item) for item in value]
        return _of_list(value, items) if isinstance(value, list) else _with(value, *items)


def _with(value: Any, *parts: Restore) -> Restore:
    """Of what always has the same parts."""

    def restore() -> Any:
        for part in parts:
            part()
        return value

    return restore


def _of_dict(value: dict[Any, Any], entries: dict[Any, Restore]) -> Restore:
    def restore() -> dict[Any, Any]:
        before = {key: entry() for key, entry in entries.items()}
        value.clear()
        value.update(before)
        return value

    return restore


def _of_list(value: list[Any], items: Sequence[Restore]) -> Restore:
    def restore() -> list[Any]:
        value[:] = [item() for item in items]
        return value

    return restore


def _of_tensor(tensor: Tensor) -> Restore:
    # of an expanded tensor nobody can write single elements, neither can we
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return lambda: tensor
    held = local(tensor).detach().to("cpu", copy=True)

    def restore() -> Tensor:
        with torch.no_grad():
            local(tensor).copy_(held)
        return tensor

    return restore


def random_states() -> Restore:
    """What puts the random generators of python, numpy (where it is imported) and torch back as they are now."""
    python, host = random.getstate(), torch.get_rng_state()
    # torch.cuda's would start CUDA
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    numpy = sys.modules.get("numpy")
    others = None if numpy is None else copy.deepcopy(numpy.random.get_state())

    def restore() -> None:
        random.setstate(python)
        torch.set_rng_state(host)
        if devices:
            torch.cuda.set_rng_state_all(devices)
        if numpy is not None:
            numpy.random.set_state(others)

    return restore
