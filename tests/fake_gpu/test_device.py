"""The fake GPU is as strict as a real one, and what only it can show: how much is copied, when, and how."""

from __future__ import annotations

import copy
import io
from contextlib import nullcontext

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import Parameter

import optimx
from tests.cases import make_params, set_grads

device = pytest.importorskip("_fake_device", reason="about the fake GPU: make fake-gpu")
pytestmark = pytest.mark.gpu


@triton.jit
def _add_kernel(addresses_ptr, out_ptr):
    pointer = tl.load(addresses_ptr).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr, tl.load(pointer) + 1)


@pytest.fixture(autouse=True)
def no_waiting():
    """Waits are errors."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")
    device.take_copies()


def pinned(values: Tensor) -> Tensor:
    return values.pin_memory()


def test_tensors_of_two_devices_do_not_meet() -> None:
    a, b = (torch.ones(3, device=f"cuda:{i}") for i in range(2))
    with pytest.raises(RuntimeError, match="same device"):
        a + b
    with pytest.raises(RuntimeError, match="same device"):
        a.add_(torch.ones(3))
    # numbers are welcome
    a.add_(torch.ones(()))
    assert a.device.index == 0
    assert (b + 1).device.index == 1
    with torch.cuda.device(1):
        assert torch.empty(1, device="cuda").device.index == 1


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.sum().item(),
        lambda t: bool(t[0] > 0),
        lambda t: t.cpu(),
        lambda t: t.tolist(),
        lambda t: t.copy_(torch.zeros(3)),
        lambda t: t[t > 0],
        lambda t: t.index_put_((torch.tensor([1]),), t[0]),
        lambda t: t.nonzero(),
        lambda t: torch.cuda.synchronize(),
    ],
)
def test_waits_are_errors(wait) -> None:
    tensor = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"):
        wait(tensor)
    torch.cuda.set_sync_debug_mode("default")
    wait(tensor)
    with pytest.raises(torch.AcceleratorError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        wait(tensor)


def test_kernels_run_on_the_current_device() -> None:
    value, out = torch.ones(1, device="cuda:1"), torch.zeros(1, device="cuda:1")
    table = pinned(torch.tensor([value.data_ptr()])).to("cuda:1", non_blocking=True)
    with pytest.raises(RuntimeError, match=r"launched on cuda:0 with a tensor of cuda:1"):
        _add_kernel[(1,)](table, out)
    with torch.cuda.device(1):
        _add_kernel[(1,)](table, out)
        with pytest.raises(ValueError, match="cpu tensor"):
            _add_kernel[(1,)](table, torch.zeros(1))
    assert out.to("cpu", non_blocking=True) == 2


def test_freed_memory_holds_nothing() -> None:
    value = torch.ones(1, device="cuda")
    view = device.host_view(value)
    assert view == 1
    del value
    assert view.isnan()
    assert torch.empty(3, device="cuda").isnan().all().to("cpu", non_blocking=True)


def test_a_graph_writes_when_it_is_replayed() -> None:
    source, out = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(source * 2 + 1)
        total = out.sum()
    assert device.host_view(out).tolist() == [0, 0, 0]
    source.fill_(2)
    graph.replay()
    assert device.host_view(out).tolist() == [5, 5, 5]
    assert device.host_view(total) == 15


def test_a_graph_knows_addresses() -> None:
    """What was allocated before and is given up is lost to it; what was allocated under capture is its own."""
    source, out = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        staging = pinned(torch.ones(1))
        out.copy_(source + staging.to("cuda", non_blocking=True))
        del staging
    graph.replay()
    assert device.host_view(out) == 2
    del source
    graph.replay()
    assert device.host_view(out).isnan()


def test_what_cannot_be_captured() -> None:
    tensor = torch.ones(3, device="cuda")
    with pytest.raises(torch.AcceleratorError, match="not pinned"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        tensor.copy_(torch.ones(3), non_blocking=True)
    device.set_graphs_own_pinned_memory(False)
    try:
        with pytest.raises(torch.AcceleratorError, match="pinned"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            pinned(torch.ones(3))
    finally:
        device.set_graphs_own_pinned_memory(True)


def test_copies_and_files() -> None:
    torch.cuda.set_sync_debug_mode("default")
    param = Parameter(torch.arange(3.0, device="cuda:1"))
    views = [param.detach()[1:], param]
    copied, param_copied = copy.deepcopy(views)
    assert copied.untyped_storage().data_ptr() == param_copied.untyped_storage().data_ptr() != param.data_ptr()
    file = io.BytesIO()
    torch.save(views, file)
    file.seek(0)
    loaded = torch.load(file)
    assert [t.device for t in loaded] == [param.device] * 2
    torch.testing.assert_close(loaded[0], views[0])


# what the step copies


def crossings(kind: str) -> list[tuple[bool, bool]]:
    """Copies since the last call, as (pinned, non_blocking)."""
    return [(pinned, non_blocking) for found, _, pinned, non_blocking in device.take_copies() if found == kind]


@pytest.mark.parametrize("n", [4, 40])
@pytest.mark.parametrize("name", ["AdamW", "NAdam", "SGD", "LAMB", "Adafactor"])
def test_copies_of_amp_do_not_depend_on_the_number_of_tensors(name: str, n: int) -> None:
    """Counts move to the device, and back for a checkpoint, in one copy."""
    torch.cuda.set_sync_debug_mode("default")
    params = make_params([(3,)] * n, "cuda")
    optimizer = getattr(optimx, name)(params)
    scaler = optimx.GradScaler("cuda", init_scale=2.0)
    for step in range(3):
        scaler.scale(torch.ones((), device="cuda"))
        set_grads(params, step, scale=2.0)
        device.take_copies()
        if step == 0:
            optimizer.step()
            assert len(crossings("h2d")) < 20
            continue
        scaler.step(optimizer)
        sent = crossings("h2d")
        assert set(sent) == {(True, True)}
        assert len(sent) <= (20 if step == 1 else 1)
        scaler.update()
    device.take_copies()
    optimizer.state_dict()
    assert len(crossings("d2h")) <= 1


def test_a_steady_step_sends_once_a_bucket() -> None:
    torch.cuda.set_sync_debug_mode("default")
    params = make_params([(3,)] * 5, "cuda")
    optimizer = optimx.AdamW(params, max_grad_norm=1.0)
    for step in range(3):
        torch.cuda.set_sync_debug_mode("default")
        set_grads(params, step)
        torch.cuda.set_sync_debug_mode("error")
        device.take_copies()
        optimizer.step()
    assert crossings("h2d") == [(True, True)]


# what a step may not do, whatever the test is about


class OnlyTheDeviceKnows:
    """A number that is read as NumPy's are."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __array__(self) -> None:
        raise AssertionError("it should be asked for its item")

    def item(self) -> float:
        return self.value.item()


def test_a_step_that_waits_is_an_error_in_every_test() -> None:
    torch.cuda.set_sync_debug_mode("default")
    params = make_params([(3,)], "cuda")
    optimizer = optimx.AdamW(params)
    lr = optimizer.param_groups[0]["lr"] = OnlyTheDeviceKnows(torch.ones((), device="cuda"))
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match="synchronizing"):
        optimizer.step()
    # and nothing outside of it
    assert lr.item() == 1


@pytest.mark.parametrize("mode", ["default", "error"])
def test_a_wait_that_is_allowed_is_an_error_where_a_test_asks(mode: str) -> None:
    """Whether SGD's first step with dampening was skipped is asked for, once."""
    torch.cuda.set_sync_debug_mode("default")
    params = make_params([(3,)], "cuda")
    optimizer = optimx.SGD(params, momentum=0.9, dampening=0.5)
    scaler = optimx.GradScaler("cuda", init_scale=2.0)
    scaler.scale(torch.ones((), device="cuda"))
    set_grads(params, 0)
    torch.cuda.set_sync_debug_mode(mode)
    with nullcontext() if mode == "default" else pytest.raises(RuntimeError, match="synchronizing"):
        scaler.step(optimizer)
