"""Devices and backends: every test of the engine runs on torch's native CPU kernels, on the Triton kernels interpreted
on the CPU (``TRITON_INTERPRET=1``, `make test` does both), and on a GPU where there is one (`make gpu`)."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from optimx._engine import backends

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def pytest_report_header() -> str:
    return "" if torch.cuda.is_available() else "no GPU: tests of every device run on the CPU alone"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None if torch.cuda.is_available() else "needs a GPU"
    if reason is None and INTERPRETED and "cuda" not in backends.interpreter_reaches:
        reason = "the interpreter reads no memory of a GPU"
    for item in items if reason else ():
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def interpreter_like_a_gpu() -> Iterator[None]:
    """Triton's interpreter converts as a GPU does, and leaves out what costs it time and changes nothing."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    convert, call, np_dtype = (
        interpreter._convert_float, interpreter.InterpretedFunction.__call__, interpreter._get_np_dtype
    )  # fmt: skip
    patched: set[str] = set()
    known: dict[str, Any] = {}

    def convert_bf16(data, source, target, rounding):
        """Triton's interpreter cuts float32 off where hardware rounds to the nearest bf16."""
        names = (str(source), str(target))
        if names == ("fp32", "bf16"):
            bits = torch.from_numpy(data.astype("float32").reshape(-1)).bfloat16().view(torch.uint16)
            return bits.numpy().reshape(data.shape)
        if names == ("bf16", "fp32"):
            return (data.astype("uint32") << 16).reshape(data.shape)
        return convert(data, source, target, rounding)

    def call_helper(self, *args, **kwargs):
        """Launching has patched triton.language for our helpers already, and the first call of one of its own has for
        the others; once more a call takes half of the time."""
        module = self.fn.__module__
        if module.startswith("optimx.") or module in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(module)
        return call(self, *args, **kwargs)

    def known_np_dtype(dtype):
        """Found once, not in a table that is made for every value."""
        if dtype.name not in known:
            known[dtype.name] = np_dtype(dtype)
        return known[dtype.name]

    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert_bf16)
        patch.setattr(interpreter.InterpretedFunction, "__call__", call_helper)
        patch.setattr(interpreter, "_get_np_dtype", known_np_dtype)
        # every sum of integers is computed twice, for an assertion that is made in debug mode only
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=builder.options.debug))
        yield


@pytest.fixture(scope="session", autouse=True)
def torchs_adafactor_loop() -> Iterator[Callable[..., None]]:
    """Torch's loop, which divides by the size of an empty tensor (`test_stock_defects`); as an oracle it must not."""
    loop = torch.optim._adafactor._single_tensor_adafactor

    def without_empty(params, *lists, **kwargs) -> None:
        *others, steps, grad_scale, found_inf = (*lists, kwargs.pop("grad_scale"), kwargs.pop("found_inf"))
        full = [i for i, param in enumerate(params) if param.numel()]
        for i in {*range(len(params))} - {*full}:
            steps[i] += 1
        picked = ([role[i] for i in full] for role in (params, *others, steps))
        loop(*picked, grad_scale=grad_scale, found_inf=found_inf, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim._adafactor, "_single_tensor_adafactor", without_empty)
        yield loop


@pytest.fixture(scope="session", autouse=True)
def nothing_old_is_searched() -> Iterator[None]:
    """What there is before the first test, thousands of tests above all, has no part in garbage collections."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=["cpu", *[pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available()])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program takes the interpreter a millisecond: with small chunks, small tensors reach every path."""
    if INTERPRETED:
        from optimx.triton_kernels.tensor_table import LaunchSize

        from optimx._engine.triton import elementwise

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
