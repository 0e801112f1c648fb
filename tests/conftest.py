"""Devices and backends: every test of the engine runs on torch's native CPU kernels, on the Triton kernels interpreted
on the CPU (``TRITON_INTERPRET=1``, `make test` does both), and on a GPU where there is one (`make gpu`)."""

from __future__ import annotations

import os

import pytest
import torch

from optimx._engine import backends

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None if torch.cuda.is_available() else "needs a GPU"
    if reason is None and INTERPRETED and "cuda" not in backends.interpreter_reaches:
        reason = "the interpreter reads no memory of a GPU"
    for item in items if reason else ():
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


if INTERPRETED:
    from triton.runtime import interpreter

    _convert_float = interpreter._convert_float

    def _convert_bf16(data, source, target, rounding):
        """As a GPU converts: Triton's interpreter cuts float32 off where hardware rounds to the nearest bf16."""
        names = (str(source), str(target))
        if names == ("fp32", "bf16"):
            bits = torch.from_numpy(data.astype("float32").reshape(-1)).bfloat16().view(torch.uint16)
            return bits.numpy().reshape(data.shape)
        if names == ("bf16", "fp32"):
            return (data.astype("uint32") << 16).reshape(data.shape)
        return _convert_float(data, source, target, rounding)

    interpreter._convert_float = _convert_bf16
    _call = interpreter.InterpretedFunction.__call__

    _patched: set[str] = set()

    def _call_helper(self, *args, **kwargs):
        """Launching has patched triton.language for our helpers already, and the first call of one of its own has for
        the others; once more a call takes half of the time."""
        module = self.fn.__module__
        if module.startswith("optimx.") or module in _patched:
            return self.rewrite()(*args, **kwargs)
        _patched.add(module)
        return _call(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = _call_helper


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program takes the interpreter a millisecond: with small chunks, small tensors reach every path."""
    if INTERPRETED:
        from optimx._engine.triton import elementwise
        from optimx.triton_kernels.tensor_table import LaunchSize

        monkeypatch.setattr(elementwise, "launch_size", LaunchSize(chunk_size=128, block_size=128))


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that does not compile is a failed test, not torch's step."""
    monkeypatch.setattr(backends, "strict", True)
    monkeypatch.setattr(backends, "_given_up", {})


@pytest.fixture
def triton_backend(device: torch.device) -> torch.device:
    """The device, where Triton kernels run on it."""
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1 or a GPU")
    return device
