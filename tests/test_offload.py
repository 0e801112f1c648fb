"""States on the host: the numbers of the CPU step, checkpoints as without, and copies that overlap."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import optimx
from optimx._engine import backends, twins
from optimx._engine.states import State
from tests.cases import CASES, Case, make_params, set_grads
from tests.engine import params_of, usual

on_gpu = pytest.mark.gpu
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

SHAPES = [(), (0,), (1,), (63,), (128,), (3, 5, 7), (16, 24), (300, 40), (64, 128)]
#: So small that every few parameters travel apart.
FEW = 20_000 / (1 << 20)


@pytest.fixture(autouse=True)
def host_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the fake GPU kernels are interpreted, but what is on the host is not their business."""
    monkeypatch.setattr(backends, "interpreter_reaches", {"cuda"})


class Late:
    """Copies that happen as late as they may: when somebody waits for them.

    Attributes:
        log: What was asked of streams: ``("copy", stream)``, ``("wait", stream, for which)``, ``("host waits",)``.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[Any, ...]] = []
        self._queues: dict[Any, list[Any]] = defaultdict(list)
        late, stream_cls = self, torch.cuda.Stream

        def enqueue_copy(target: Tensor, source: Tensor) -> None:
            stream = torch.cuda.current_stream()
            assert stream.stream_id, "copies are on streams of their own"
            late.log.append(("copy", stream, target.device.type, target.nbytes))
            late._queues[stream].append(lambda: target.copy_(source))

        def wait_stream(stream: Any, other: Any) -> None:
            late.log.append(("wait", stream, other))
            late.run(other)

        def record_event(stream: Any, event: Any = None) -> Any:
            event = torch.cuda.Event()
            late._queues[stream].append(event)
            event.stream = stream
            return event

        def synchronize(event: Any) -> None:
            late.log.append(("host waits",))
            late.run(event.stream, event)

        monkeypatch.setattr(twins, "enqueue_copy", enqueue_copy)
        monkeypatch.setattr(stream_cls, "wait_stream", wait_stream)
        monkeypatch.setattr(stream_cls, "record_event", record_event)
        monkeypatch.setattr(stream_cls, "synchronize", lambda stream: late.run(stream))
        monkeypatch.setattr(torch.cuda.Event, "synchronize", synchronize)

    def run(self, stream: Any, until: Any = None) -> None:
        """Let a stream come to its end, or to an event."""
        queue = self._queues[stream]
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        while queue:
            entry = queue.pop(0)
            if entry is until:
                break
            if callable(entry):
                entry()
        torch.cuda.set_sync_debug_mode(mode)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Late:
    return Late(monkeypatch)


def pair(make: Callable[..., Any], params: list[Parameter], bucket_mb: float = FEW, **kwargs: Any) -> tuple[Any, Any]:
    """An offloaded optimizer of ``params``, and the same one of their copies on the host."""
    copies = [Parameter(param.detach().to("cpu", copy=True)) for param in params]
    ours, host = make(params, **copy.deepcopy(kwargs)), make(copies, **copy.deepcopy(kwargs))
    optimx.offload_states(ours, bucket_mb=bucket_mb)
    return ours, host


def set_both(ours: Any, host: Any, step: int, **kwargs: Any) -> None:
    for optimizer in (ours, host):
        set_grads(params_of(optimizer), step, **kwargs)


def poison(optimizer: Any) -> None:
    """What gradients arrive in holds nothing until they have arrived."""
    for transfer in optimizer._twins.transfers if optimizer._twins else ():
        for arrived in transfer._grads.values():
            for grad in arrived:
                grad.fill_(torch.nan)


def train(ours: Any, host: Any, steps: range, **kwargs: Any) -> None:
    for step in steps:
        set_both(ours, host, step, **kwargs)
        poison(ours)
        ours.step()
        host.step()


def assert_equal(ours: Any, host: Any) -> None:
    """Parameters and states have the same bits, and states lie on the host."""
    for i, (a, b) in enumerate(zip(params_of(ours), params_of(host), strict=True)):
        assert a.is_cuda
        assert torch.equal(a.cpu(), b), i
        mine: State = ours.state.get(a, {})
        theirs = host.state.get(b, {})
        assert [*mine] == [*theirs]
        for name, value in mine.items():
            assert value.device.type == "cpu", name
            assert value.dtype is theirs[name].dtype
            assert torch.equal(value, theirs[name]), (i, name)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_case
def test_the_numbers_are_those_of_the_cpu_step(case: Case, dtype: torch.dtype, late: Late) -> None:
    ours, host = pair(case.cls, make_params(SHAPES, "cuda", dtype), **usual(case, lr=0.01))
    train(ours, host, range(4))
    assert len(ours._twins.transfers) > 2
    assert_equal(ours, host)
