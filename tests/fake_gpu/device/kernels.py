"""Triton's interpreter on the fake device: it works on the memory itself, on the current device, and is recorded."""

from __future__ import annotations

from typing import Any

import _fake_device
import torch


def _reachable(arg: Any, name: str, mixed: bool) -> Any:
    """An argument as the interpreter reads it, if a GPU could."""
    if isinstance(arg, tuple):
        return tuple(_reachable(entry, name, mixed) for entry in arg)
    if not isinstance(arg, torch.Tensor):
        return arg
    if not arg.is_cuda:
        if arg.numel() and mixed:
            raise ValueError(f"Pointer argument of {name} cannot be accessed from Triton (cpu tensor?)")
        return arg
    if arg.device.index != _fake_device.current_device():
        raise RuntimeError(
            f"Triton Error [CUDA]: {name} was launched on cuda:{_fake_device.current_device()} with a tensor of "
            f"{arg.device}"
        )
    return _fake_device.host_view(arg)


def _raw(arg: Any) -> Any:
    """An argument that keeps no memory alive."""
    return _fake_device.host_view(arg) if isinstance(arg, torch.Tensor) else arg


def install() -> None:
    """Put it in place."""
    from triton.runtime.interpreter import GridExecutor

    run: Any = GridExecutor.__call__

    def arguments(self: Any, args: Any, kwargs: Any) -> Any:
        everything = [*args, *kwargs.values()]
        mixed = any(isinstance(arg, torch.Tensor) and arg.is_cuda for arg in everything)
        name = self.fn.__name__
        return [_reachable(a, name, mixed) for a in args], {k: _reachable(v, name, mixed) for k, v in kwargs.items()}

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        if not _fake_device.capturing():
            run(self, *args, **kwargs)
            return
        device = _fake_device.current_device()
        # what a GPU would refuse, it refuses now
        arguments(self, args, kwargs)
        # a graph knows addresses: the tensors may die
        args, kwargs = [*map(_raw, args)], {name: _raw(arg) for name, arg in kwargs.items()}

        def again() -> None:
            before = _fake_device.exchange_device(device)
            try:
                run(self, *args, **kwargs)
            finally:
                _fake_device.exchange_device(before)

        _fake_device.record(again)

    # the interpreter would copy arguments to the host, and back after the launch
    GridExecutor._init_args_hst = arguments
    GridExecutor._restore_args_dev = lambda *args: None
    GridExecutor.__call__ = call
