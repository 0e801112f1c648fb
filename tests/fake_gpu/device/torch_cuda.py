"""``torch.cuda`` and ``torch.accelerator`` on the fake device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace
from typing import Any

import _fake_device
import torch

_PROPERTIES = SimpleNamespace(
    name="fake device", major=9, minor=0, multi_processor_count=132, total_memory=4 << 30, L2_cache_size=50 << 20,
    warp_size=32, max_threads_per_multi_processor=2048, gcnArchName="",
)  # fmt: skip
_MODES = {"default": 0, "warn": 1, "error": 2}
_stream_ids = count(1)


def _index(device: Any = None) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return _fake_device.current_device() if index is None else index


class Stream:
    """Everything has happened when a call returns, so streams only have names."""

    def __init__(self, device: Any = None, priority: int = 0, *, stream_id: int | None = None) -> None:
        self.device = torch.device("cuda", _index(device))
        self.stream_id = self.cuda_stream = next(_stream_ids) if stream_id is None else stream_id

    def wait_stream(self, stream: Stream) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def synchronize(self) -> None:
        _fake_device.host_waits("a stream")

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return _fake_device.capturing()

    def __enter__(self) -> Stream:
        index = self.device.index
        self._before = _fake_device.exchange_device(index), _fake_device.exchange_stream(index, self.stream_id)
        return self

    def __exit__(self, *error: object) -> None:
        device, stream = self._before
        _fake_device.exchange_stream(self.device.index, stream)
        _fake_device.exchange_device(device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and (self.device, self.stream_id) == (other.device, other.stream_id)

    def __hash__(self) -> int:
        return hash((self.device, self.stream_id))


class Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        _fake_device.host_waits("an event")

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return (end._time - self._time) * 1e3


class CUDAGraph:
    def __init__(self, keep_graph: bool = False) -> None:
        self.recorded: Any = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        self.recorded = _fake_device.Graph()
        _fake_device.begin_capture(self.recorded)

    def capture_end(self) -> None:
        _fake_device.end_capture()

    def replay(self) -> None:
        self.recorded.replay()

    def reset(self) -> None:
        self.recorded = None

    def pool(self) -> tuple[int, int]:
        return 0, 1


@contextmanager
def graph(
    cuda_graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
) -> Iterator[None]:
    with stream or Stream():
        cuda_graph.capture_begin()
        try:
            yield
        finally:
            cuda_graph.capture_end()


@contextmanager
def _on_stream(stream: Stream | None) -> Iterator[None]:
    if stream is None:
        yield
    else:
        with stream:
            yield


def _set_device(device: Any) -> None:
    _fake_device.exchange_device(_index(device))


def _current_stream(device: Any = None) -> Stream:
    return Stream(device, stream_id=_fake_device.current_stream(_index(device)))


def install() -> None:
    """Put all of it in place of what a CPU build of torch has."""
    cuda: Any = torch.cuda
    # a function of its own for every name: dynamo has rules by function
    yes = {name: lambda *args, **kwargs: True for name in ("is_available", "is_initialized", "is_bf16_supported")}
    nothing = {
        name: lambda *args, **kwargs: None
        for name in (
            "_lazy_init", "init", "manual_seed", "manual_seed_all", "empty_cache", "_sleep", "reset_peak_memory_stats"
        )
    }  # fmt: skip
    functions = {
        **yes,
        **nothing,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 2,
        "current_device": _fake_device.current_device,
        "set_device": _set_device,
        "_exchange_device": _fake_device.exchange_device,
        "_maybe_exchange_device": _fake_device.exchange_device,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: _PROPERTIES.name,
        "get_device_properties": lambda device=None: _PROPERTIES,
        "mem_get_info": lambda device=None: (4 << 30, 4 << 30),
        "memory_allocated": lambda device=None: _fake_device.bytes_in_use(),
        "max_memory_allocated": lambda device=None: _fake_device.bytes_in_use(),
        "synchronize": lambda device=None: _fake_device.host_waits("a device"),
        "set_sync_debug_mode": lambda mode: _fake_device.set_sync_mode(_MODES.get(mode, mode)),
        "get_sync_debug_mode": _fake_device.sync_mode,
        "is_current_stream_capturing": lambda: _fake_device.capturing(),
        "current_stream": _current_stream,
        "default_stream": lambda device=None: Stream(device, stream_id=0),
        "stream": _on_stream,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
    }
    for name, function in functions.items():
        setattr(cuda, name, function)
    torch._C._cuda_isCurrentStreamCapturing = _fake_device.capturing
    cuda.graphs.is_current_stream_capturing = cuda.is_current_stream_capturing
    accelerator: Any = torch.accelerator
    accelerator.is_available = lambda: True
    accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")
    accelerator.current_stream = lambda device=None: _current_stream(device)
    accelerator.synchronize = lambda device=None: _fake_device.host_waits("a device")
