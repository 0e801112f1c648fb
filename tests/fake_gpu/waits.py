"""A step of optimx that waits for the device is a failed test, whatever the test is about."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import _fake_device

from optimx._engine import engine, states, twins
from optimx._engine.bad_gradients import BadGradients
from optimx._engine.engine import Engine
from optimx._engine.plan import StepPlan

#: Where a step may wait: name, whose it is, and what for.
MAY_WAIT: list[tuple[str, Any, str]] = [
    ("run_stock", engine, "torch's own step waits as it likes"),
    ("take_back_first", StepPlan, "whether SGD's first step with dampening was skipped: once"),
    ("last", BadGradients, "the report of an error: that too many steps were skipped"),
    ("wait", twins.Transfer, "gradients that the CPU step needs: once a transfer"),
    ("_refresh", twins.Twins, "parameters that somebody else has written"),
    ("on_host", engine, "whether to skip, and the scale, which a CPU step has to know"),
    ("settle_scalars", states, "counts that come back to the host: once"),
]
_DEFAULT, _ERROR = 0, 2
#: Of ``set_sync_debug_mode``, as the tests set it, of the steps that are under way.
_modes: list[int] = []


def _refusing(step: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(step)
    def call(*args: Any, **kwargs: Any) -> Any:
        _modes.append(_fake_device.sync_mode())
        _fake_device.set_sync_mode(_ERROR)
        try:
            return step(*args, **kwargs)
        finally:
            _fake_device.set_sync_mode(_modes.pop())

    return call


def _allowing(function: Callable[..., Any]) -> Callable[..., Any]:
    """A test that refuses waits itself refuses these too."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        before = _fake_device.sync_mode()
        _fake_device.set_sync_mode(_modes[-1] if _modes else before)
        try:
            return function(*args, **kwargs)
        finally:
            _fake_device.set_sync_mode(before)

    return call


def refuse() -> None:
    """Let waits in steps be errors from now on."""
    Engine.step = _refusing(Engine.step)  # type: ignore[method-assign]
    for name, owner, _ in MAY_WAIT:
        setattr(owner, name, _allowing(getattr(owner, name)))
