"""States on the host: the numbers of the CPU step, checkpoints as without, and copies that overlap."""

from __future__ import annotations

import copy
import io
import pickle
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import optimx
from optimx._engine import backends, twins
from optimx._engine.cpu.elementwise import NativeBucket
from optimx._engine.engine import Engine
from optimx._engine.states import State
from tests.cases import BY_NAME, CASES, Case, make_params, set_grads
from tests.engine import params_of, usual
from tests.test_gpu import no_sync

on_gpu = pytest.mark.gpu
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

SHAPES = [(), (0,), (1,), (63,), (128,), (3, 5, 7), (16, 24), (300, 40), (64, 128)]
#: For kernels that are interpreted.
SMALL = [(), (0,), (129,), (3, 5, 7), (32, 128)]
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


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_matrices_of_muon(dtype: torch.dtype, late: Late) -> None:
    ours, host = pair(optimx.Muon, make_params([(16, 24), (24, 16), (64, 128), (130, 64)], "cuda", dtype), lr=0.02)
    train(ours, host, range(3))
    assert len(ours._twins.transfers) > 1
    assert_equal(ours, host)


FORMATS: list[dict[str, Any]] = [
    {"param_rounding": "master"},
    {"param_rounding": "remainder16"},
    {"param_rounding": "stochastic", "state_dtype": "stochastic"},
    {"state_dtype": "8bit", "param_rounding": "remainder8"},
]
each_format = pytest.mark.parametrize("how", FORMATS, ids=lambda how: "-".join(how.values()))


@on_gpu
@each_format
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_formats(name: str, how: dict[str, Any], late: Late) -> None:
    case = BY_NAME[name]
    params = make_params([*SHAPES, (64, 256)], "cuda", torch.bfloat16)
    ours, host = pair(case.cls, params, **usual(case, lr=0.01), **how)
    train(ours, host, range(4))
    assert_equal(ours, host)
    for mine, theirs in zip(optimx.master_weights(ours), optimx.master_weights(host), strict=True):
        assert torch.equal(mine.cpu(), theirs)
    for optimizer in (ours, host):
        optimx.set_master_weights(optimizer, [weight * 1.01 for weight in optimx.master_weights(optimizer)])
    assert_equal(ours, host)
    train(ours, host, range(4, 6))
    assert_equal(ours, host)


RULES: list[dict[str, Any]] = [
    {"max_grad_norm": 1.0},
    {"max_grad_norm": optimx.AutoClip(50.0, 16), "skip_nonfinite": True, "skip_spikes": optimx.Spikes(8)},
]


@on_gpu
@pytest.mark.parametrize(
    ("name", "rules"),
    [*product(["adamw", "sgd", "lamb", "adafactor"], RULES), ("lamb", {"normalize_grads": True})],
    ids=lambda entry: entry if isinstance(entry, str) else "-".join(entry),
)
def test_clipping_and_skipping(name: str, rules: dict[str, Any], late: Late) -> None:
    """In one transfer the norm is a sum in the same order, too."""
    case = BY_NAME[name]
    ours, host = pair(case.cls, make_params(SHAPES, "cuda"), bucket_mb=32.0, **usual(case, lr=0.01), **rules)
    for step in range(6):
        set_both(ours, host, step)
        if step == 3 and "skip_nonfinite" in rules:
            for optimizer in (ours, host):
                params_of(optimizer)[-1].grad.view(-1)[7] = torch.inf
        poison(ours)
        late.log.clear()
        ours.step()
        host.step()
        torch.testing.assert_close(ours.grad_norm, host.grad_norm, rtol=0, atol=0, equal_nan=True)
        leaves = any(entry[0] == "copy" and entry[2] == "cuda" for entry in late.log)
        assert leaves != bool(ours.step_was_skipped)
        assert bool(ours.step_was_skipped) == bool(host.step_was_skipped) == (step == 3 and "skip_nonfinite" in rules)
    assert_equal(ours, host)


@on_gpu
def test_the_norm_is_that_of_all_transfers(late: Late) -> None:
    ours, _ = pair(optimx.AdamW, make_params(SHAPES, "cuda"), max_grad_norm=1.0)
    for step in range(3):
        set_grads(params_of(ours), step)
        expected = torch.nn.utils.get_total_norm([param.grad.cpu() for param in params_of(ours)])
        poison(ours)
        ours.step()
        torch.testing.assert_close(ours.grad_norm, expected, rtol=1e-6, atol=0)


@on_gpu
def test_a_norm_that_somebody_else_has_measured(late: Late) -> None:
    ours, host = pair(optimx.AdamW, make_params(SHAPES, "cuda"), max_grad_norm=1.0)
    for step in range(2):
        set_both(ours, host, step)
        ours.total_norm = torch.tensor(3.0, device="cuda")
        host.total_norm = torch.tensor(3.0)
        poison(ours)
        ours.step()
        host.step()
    assert_equal(ours, host)


@on_gpu
@pytest.mark.parametrize("scaler_cls", [torch.amp.GradScaler, optimx.GradScaler], ids=["torch", "optimx"])
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale"])
@pytest.mark.parametrize("kwargs", [{}, {"fused": True}, {"max_grad_norm": 1.0}], ids=["plain", "fused", "clipping"])
def test_grad_scaler(scaler_cls: Any, unscale: bool, kwargs: dict[str, Any], late: Late) -> None:
    ours, host = pair(optimx.AdamW, make_params(SHAPES, "cuda"), bucket_mb=32.0, lr=0.01, **kwargs)
    scalers = [scaler_cls(device, init_scale=1024.0, growth_interval=2) for device in ("cuda", "cpu")]
    for step in range(6):
        for optimizer, scaler in zip((ours, host), scalers, strict=True):
            scaler.scale(torch.ones((), device=params_of(optimizer)[0].device))
            set_grads(params_of(optimizer), step, scale=1024.0)
            if step == 3:
                params_of(optimizer)[3].grad[5] = torch.inf
            if unscale:
                scaler.unscale_(optimizer)
            poison(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert {float(state["step"]) for state in ours.state.values()} == {5.0}
    assert_equal(ours, host)


@on_gpu
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_whatever_else_a_loop_does(name: str, late: Late) -> None:
    """Schedules, groups, missing gradients, closures, gradients in other layouts, and a group that joins."""
    case = BY_NAME[name]
    params = [*make_params(SHAPES, "cuda"), Parameter(torch.randn(6, 4, 5, 3, device="cuda").transpose(1, 2))]

    def make(params: list[Parameter], **kwargs: Any) -> Any:
        groups = [{"params": params[:4]}, {"params": params[4:], "lr": 0.05, "weight_decay": 0.3}]
        return case.cls(groups, **kwargs)

    ours, host = pair(make, params, **usual(case, lr=0.01))
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.9**t) for optimizer in (ours, host)]
    for step in range(8):
        set_both(ours, host, step, skip=[2, 7] if step in (2, 3) else [step])
        if step == 5:
            more = make_params([(33, 5), (2,)], "cuda", seed=1)
            ours.add_param_group({"params": more, "lr": 0.2})
            host.add_param_group({"params": [Parameter(param.detach().cpu()) for param in more], "lr": 0.2})
            set_both(ours, host, step)
        for optimizer, scheduler in zip((ours, host), schedulers, strict=True):
            last = params_of(optimizer)[6]
            if last.grad is not None:
                last.grad = last.grad.t().contiguous().t() if step % 2 else last.grad.mean().expand(last.shape)
            poison(optimizer)
            assert optimizer.step(lambda: 3.0) == 3.0
            if step < 5:
                scheduler.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
    assert_equal(ours, host)


# what somebody else writes


def scaled(optimizer: Any, factor: float) -> None:
    for param in params_of(optimizer):
        param.mul_(factor)


def replaced(optimizer: Any, factor: float) -> None:
    for param in params_of(optimizer):
        param.data = param.detach() * factor


@on_gpu
@pytest.mark.parametrize("write", [scaled, replaced])
def test_parameters_that_somebody_else_has_written(write: Callable[..., None], late: Late) -> None:
    ours, host = pair(optimx.AdamW, make_params(SHAPES, "cuda"), lr=0.01)
    for step in range(3):
        train(ours, host, range(step, step + 1))
        with torch.no_grad():
            write(ours, 0.5)
            write(host, 0.5)
    train(ours, host, range(3, 4))
    assert_equal(ours, host)


@on_gpu
def test_parameters_are_copied_to_the_host_only_when_they_were_written(late: Late) -> None:
    ours, _ = pair(optimx.AdamW, make_params(SHAPES, "cuda"))
    grads = sum(param.nbytes for param in params_of(ours))
    sizes = []
    for step in range(4):
        set_grads(params_of(ours), step)
        if step == 2:
            with torch.no_grad():
                params_of(ours)[-1].zero_()
        late.log.clear()
        ours.step()
        sizes.append(sum(entry[3] for entry in late.log if entry[0] == "copy" and entry[2] == "cpu") - grads)
    assert sizes == [grads, 0, params_of(ours)[-1].nbytes, 0]


@on_gpu
def test_a_step_that_failed_goes_on_from_the_parameters(late: Late, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair(optimx.SGD, make_params(SHAPES, "cuda"), lr=0.5)
    set_grads(params_of(ours), 0)
    ours.step()
    before = [param.detach().clone() for param in params_of(ours)]

    def fails(bucket: NativeBucket, scale: float) -> Any:
        yield from take_step(bucket, scale)
        raise MemoryError

    take_step = NativeBucket.take_step
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(NativeBucket, "take_step", fails)
        ours.step()
    assert all(map(torch.equal, params_of(ours), before))
    set_grads(params_of(ours), 1)
    ours.step()
    for param, old in zip(params_of(ours), before, strict=True):
        torch.testing.assert_close(param.detach(), old - 0.5 * param.grad)


@on_gpu
@pytest.mark.parametrize("how", [{}, *FORMATS[:2]], ids=str)
def test_averages(how: dict[str, Any], late: Late) -> None:
    params = make_params(SHAPES, "cuda", torch.bfloat16 if how else torch.float32)
    ours, host = pair(optimx.AdamW, params, lr=0.01, average=optimx.EMA(0.9), **how)
    for step in range(4):
        train(ours, host, range(step, step + 1))
        assert_equal(ours, host)
        with ours.averaged(), host.averaged():
            assert_equal(ours, host)
    assert_equal(ours, host)


@on_gpu
@pytest.mark.parametrize("how", [{}, FORMATS[0]], ids=str)
def test_schedule_free_modes(how: dict[str, Any], late: Late) -> None:
    params = make_params(SHAPES, "cuda", torch.bfloat16 if how else torch.float32)
    ours, host = pair(optimx.ScheduleFreeAdamW, params, lr=0.01, **how)
    for step in range(3):
        train(ours, host, range(step, step + 1))
        ours.eval()
        host.eval()
        for a, b in zip(params_of(ours), params_of(host), strict=True):
            torch.testing.assert_close(a.cpu(), b)
        ours.train()
        host.train()
    assert_equal(ours, host)


# checkpoints and copies


def reload(saved: dict[str, Any]) -> Any:
    """The state dict from a file."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


CHECKPOINTS = [
    ("adamw", torch.float32, {}),
    ("sgd", torch.float32, {}),
    ("nadam", torch.bfloat16, {}),
    ("adafactor", torch.float32, {}),
    ("adamw", torch.bfloat16, {"param_rounding": "master"}),
    ("adamw", torch.bfloat16, {"state_dtype": "8bit", "param_rounding": "remainder16"}),
]


@on_gpu
@pytest.mark.parametrize(("name", "dtype", "how"), CHECKPOINTS, ids=str)
def test_checkpoints_load_in_both_directions(name: str, dtype: torch.dtype, how: dict[str, Any], late: Late) -> None:
    case = BY_NAME[name]
    kwargs = {**usual(case, lr=0.01), **how}
    ours, host = pair(case.cls, make_params(SMALL, "cuda", dtype), **kwargs)
    on_device = case.cls(make_params(SMALL, "cuda", dtype), **kwargs)
    train(ours, host, range(3))
    saved = reload(ours.state_dict())
    for step in range(3):
        set_grads(params_of(on_device), step)
        on_device.step()
    other = on_device.state_dict()
    assert saved["param_groups"] == other["param_groups"]
    assert {key: [*state] for key, state in saved["state"].items()} == {
        key: [*state] for key, state in other["state"].items()
    }

    on_device.load_state_dict(saved)
    for param, mine in zip(params_of(on_device), params_of(ours), strict=True):
        param.data.copy_(mine)
        assert all(state.device == param.device for state in on_device.state[param].values() if state.dim())
    fresh, _ = pair(case.cls, [Parameter(param.detach().clone()) for param in params_of(ours)], **kwargs)
    fresh.load_state_dict(on_device.state_dict())
    assert {id(param) for param in fresh.state} == {id(param) for param in params_of(fresh)}
    for mine, theirs in zip(params_of(ours), params_of(fresh), strict=True):
        assert "8bit" in how.values() or {*fresh.state[theirs]} == {*ours.state[mine]}
        for key, value in fresh.state[theirs].items():
            assert value.device.type == "cpu"
            if "8bit" not in how.values():
                assert torch.equal(value, ours.state[mine][key])
    train(fresh, host, range(3, 5))
    if "8bit" not in how.values():
        assert_equal(fresh, host)


@on_gpu
def test_states_never_pass_through_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, host = pair(optimx.AdamW, make_params(SHAPES, "cuda"))
    train(ours, host, range(1))
    sizes = []
    to = Tensor.to
    monkeypatch.setattr(
        Tensor, "to", lambda self, *args, **kwargs: sizes.append(to(self, *args, **kwargs)) or sizes[-1]
    )
    ours.load_state_dict(host.state_dict())
    assert sizes
    assert not any(tensor.is_cuda for tensor in sizes)


@on_gpu
def test_a_checkpoint_that_does_not_fit_changes_nothing() -> None:
    ours, host = pair(optimx.AdamW, make_params(SHAPES, "cuda"))
    train(ours, host, range(1))
    before = params_of(ours)
    saved = ours.state_dict()
    saved["param_groups"][0]["params"] = saved["param_groups"][0]["params"][:-1]
    with pytest.raises(ValueError, match="parameter group"):
        ours.load_state_dict(saved)
    assert all(a is b for a, b in zip(params_of(ours), before, strict=True))
    train(ours, host, range(1, 2))
    assert_equal(ours, host)


@on_gpu
def test_hooks_see_the_parameters() -> None:
    """Those before loading and those after it."""
    ours, host = pair(optimx.AdamW, make_params(SHAPES, "cuda"))
    train(ours, host, range(1))
    seen = []
    ours.register_load_state_dict_pre_hook(lambda optimizer, _: seen.append(params_of(optimizer)))
    ours.register_load_state_dict_post_hook(lambda optimizer: seen.append([*optimizer.state]))
    expected = params_of(ours)
    ours.load_state_dict(ours.state_dict())
    for found in seen:
        assert all(a is b for a, b in zip(found, expected, strict=True))


@on_gpu
def test_states_that_there_are_move_to_the_host(late: Late) -> None:
    """In the middle of training, also with rules and averages."""
    settings: dict[str, Any] = {"lr": 0.01, "average": optimx.EMA(0.9), "skip_nonfinite": True}
    params = make_params(SMALL, "cuda")
    ours = optimx.AdamW(params, **settings)
    for step in range(2):
        set_grads(params, step)
        ours.step()
    host = optimx.AdamW([Parameter(param.detach().cpu()) for param in params], **settings)
    host.load_state_dict(reload(ours.state_dict()))
    optimx.offload_states(ours, bucket_mb=FEW)
    train(ours, host, range(2, 4))
    assert_equal(ours, host)


@on_gpu
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_are_offloaded_too(copied: Callable[[Any], Any]) -> None:
    ours, host = pair(optimx.AdamW, make_params(SHAPES, "cuda"), lr=0.01)
    train(ours, host, range(2))
    twin = copied(ours)
    train(twin, host, range(2, 4))
    assert_equal(twin, host)
    assert not any(torch.equal(a, b) for a, b in zip(params_of(ours), params_of(twin), strict=True) if a.numel())


@on_gpu
def test_distributed_checkpoint_state_dicts() -> None:
    from torch.distributed.checkpoint import state_dict as dcp

    def build(device: str) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)).to(device)
        return model, optimx.AdamW(model.parameters(), lr=0.01)

    model, ours = build("cuda")
    optimx.offload_states(ours)
    other, host = build("cpu")
    train(ours, host, range(2))
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, ours))
    fresh_model, fresh = build("cuda")
    optimx.offload_states(fresh)
    dcp.set_optimizer_state_dict(fresh_model, fresh, saved)
    fresh_model.load_state_dict(model.state_dict())
    train(fresh, host, range(2, 4))
    assert_equal(fresh, host)
    dcp.set_optimizer_state_dict(other, host, saved)


@on_gpu
def test_members_of_a_composite(late: Late) -> None:
    def build(params: list[Parameter], **kwargs: Any) -> Any:
        members = {"muon": optimx.Muon(params[:2], lr=0.02), "adamw": optimx.AdamW(params[2:], lr=0.01)}
        return optimx.Composite(members, **kwargs)

    params = make_params([(16, 24), (64, 128), (63,), (129,)], "cuda")
    copies = [Parameter(param.detach().cpu()) for param in params]
    ours, host = (build(each, max_grad_norm=1.0, skip_nonfinite=True) for each in (params, copies))
    optimx.offload_states(ours, bucket_mb=FEW)
    for step in range(4):
        for each in (params, copies):
            set_grads(each, step)
            if step == 2:
                each[0].grad[0, 0] = torch.nan
        ours.step()
        host.step()
        assert bool(ours.step_was_skipped) == (step == 2)
    for a, b in zip(params, copies, strict=True):
        # the norm is measured on the device, and Newton-Schulz in bfloat16 makes more of its last bit
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=2e-4)
    assert all(value.device.type == "cpu" for name in ("muon", "adamw") for state in ours[name].state.values()
               for value in state.values())  # fmt: skip


@on_gpu
def test_watched_steps(late: Late) -> None:
    ours, host = pair(optimx.AdamW, make_params(SHAPES, "cuda"), lr=0.01, max_grad_norm=1.0)
    watchers = [optimx.watch(optimizer, every=1) for optimizer in (ours, host)]
    train(ours, host, range(3))
    mine, theirs = (watcher.frame() for watcher in watchers)
    for name, column in theirs.items():
        assert mine[name] == pytest.approx(column, rel=1e-5, nan_ok=True), name


@pytest.fixture
def mesh() -> Any:
    """A mesh of one rank, which has nobody to communicate with."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield DeviceMesh("cuda", [0])
    torch.distributed.destroy_process_group()


@on_gpu
@pytest.mark.parametrize("name", ["adamw", "lamb", "adafactor"])
@pytest.mark.parametrize("later", [False, True], ids=["", "later"])
def test_dtensors(name: str, later: bool, mesh: Any, late: Late) -> None:
    """What of them lies in this process travels; states are DTensors on the host."""
    from torch.distributed.tensor import DTensor, Shard

    def sharded(tensor: Tensor) -> Any:
        return DTensor.from_local(tensor.cuda(), mesh, [Shard(0)])

    case, generator = BY_NAME[name], torch.Generator().manual_seed(0)
    plain = [Parameter(torch.randn(shape, generator=generator)) for shape in [(8, 6), (4, 10), (7,)]]
    params = [Parameter(sharded(param.detach())) for param in plain]
    kwargs = usual(case, lr=0.01)
    ours, host = case.cls(params, **kwargs, max_grad_norm=1.0), case.cls(plain, **kwargs, max_grad_norm=1.0)
    for step in range(5):
        if step == 2 * later:
            optimx.offload_states(ours, bucket_mb=100 / (1 << 20))
        set_grads(plain, step)
        for param, twin in zip(params, plain, strict=True):
            param.grad = sharded(twin.grad)
        poison(ours)
        ours.step()
        host.step()
        if step == 3:
            ours.load_state_dict(ours.state_dict())
    for param, twin in zip(params, plain, strict=True):
        torch.testing.assert_close(param.to_local().cpu(), twin.detach())
        for key, value in ours.state[param].items():
            assert value.device.type == "cpu"
            assert isinstance(value, DTensor) == (value.dim() > 0), key


# copies and waits


@on_gpu
def test_a_step_waits_once_a_transfer(late: Late) -> None:
    """Gradients come all at once, parameters leave one transfer after the other, and each direction has a stream."""
    ours, _ = pair(optimx.AdamW, make_params(SHAPES, "cuda"))
    for step in range(3):
        set_grads(params_of(ours), step)
        late.log.clear()
        ours.step()
    transfers = ours._twins.transfers
    (lanes,) = ours._twins._lanes.values()
    current = torch.cuda.current_stream()
    assert late.log[:3] == [
        ("wait", lanes.to_device, current), ("wait", lanes.to_host, current), ("wait", lanes.to_host, lanes.to_device)
    ]  # fmt: skip
    # first of all, gradients of all transfers are on their way
    n = len(params_of(ours))
    assert [entry[:3] for entry in late.log[3 : 3 + n]] == [("copy", lanes.to_host, "cpu")] * n
    expected: list[tuple[Any, ...]] = []
    for transfer in transfers:
        expected += [("host waits",), *[("copy", lanes.to_device, "cuda")] * len(transfer.positions)]
        expected.append(("wait", current, lanes.to_device))
    assert [entry[:3] for entry in late.log[3 + n :]] == expected


@on_gpu
@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clipping"])
def test_copies_do_not_wait(kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are all of pinned memory; the only waits are those for gradients."""
    device = pytest.importorskip("_fake_device", reason="the fake GPU counts copies")
    ours, _ = pair(optimx.AdamW, make_params(SHAPES, "cuda"), **kwargs)
    waits: list[Any] = []
    # without what refuses waits in steps
    wait = getattr(twins.Transfer.wait, "__wrapped__", twins.Transfer.wait)

    def counted(transfer: twins.Transfer) -> None:
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        wait(transfer)
        torch.cuda.set_sync_debug_mode(mode)
        waits.append(transfer)

    monkeypatch.setattr(twins.Transfer, "wait", counted)
    for step in range(3):
        set_grads(params_of(ours), step)
        device.take_copies()
        waits.clear()
        with no_sync() if step == 2 else nullcontext():
            ours.step()
    copies = [entry for entry in device.take_copies() if entry[0] in ("h2d", "d2h")]
    sizes = {kind: sum(entry[1] for entry in copies if entry[0] == kind) for kind in ("h2d", "d2h")}
    assert {(pinned, non_blocking) for _, _, pinned, non_blocking in copies} == {(True, True)}
    nbytes = sum(param.nbytes for param in params_of(ours))
    assert sizes == {"h2d": nbytes, "d2h": nbytes}
    assert {*waits} == {*ours._twins.transfers}


@on_gpu
def test_without_pinned_memory() -> None:
    ours, host = pair(optimx.AdamW, make_params(SHAPES, "cuda"))
    optimx.offload_states(ours, pin_memory=False)
    train(ours, host, range(2))
    assert not any(twin.is_pinned() for twin in ours._twins.transfers[0].twins)
    assert_equal(ours, host)


@on_gpu
def test_transfers_are_of_one_dtype_and_device_and_no_longer_than_they_may_be(late: Late) -> None:
    params = [
        *make_params([(1000,)] * 5, "cuda"), *make_params([(1000,)] * 5, "cuda:1", torch.bfloat16),
        *make_params([(100_000,)], "cuda"), *make_params([(10,)], "cpu"),
    ]  # fmt: skip
    ours, host = pair(optimx.AdamW, params, bucket_mb=8500 / (1 << 20))
    train(ours, host, range(3))
    assert [transfer.positions for transfer in ours._twins.transfers] == [[0, 1], [2, 3], [4], [5, 6, 7, 8], [9], [10]]
    for a, b in zip(params, params_of(host), strict=True):
        assert torch.equal(a.cpu(), b)


@on_gpu
@pytest.mark.parametrize(
    ("cls", "how"), [(optimx.RMSprop, {}), (optimx.AdamW, {"state_dtype": "8bit"}), (optimx.Muon, {})], ids=str
)
def test_scratch_memory_does_not_grow_with_the_number_of_transfers(cls: Any, how: dict[str, Any], late: Late) -> None:
    ours, host = pair(cls, make_params([(64, 128)] * 5, "cuda", torch.bfloat16), lr=0.01, **how)
    train(ours, host, range(2))
    buckets = ours._engine.plans[0].buckets
    assert len(buckets) == len(ours._twins.transfers) > 2
    assert len({id(bucket._scratch) for bucket in buckets}) == 1
    assert len({id(bucket.scratch_for("codecs")) for bucket in buckets}) == 1
    assert_equal(ours, host)


# errors


def test_states_of_parameters_on_a_cpu_stay() -> None:
    optimizer = optimx.AdamW(make_params(SHAPES))
    with pytest.raises(ValueError, match="from a CUDA device, but all parameters are on: cpu"):
        optimx.offload_states(optimizer)
    assert optimizer.offload is None
    with pytest.raises(TypeError, match="an optimizer of optimx"):
        optimx.offload_states(torch.optim.SGD(make_params(SHAPES), lr=0.1))
    with pytest.raises(ValueError, match="bucket_mb should be > 0 but is: 0"):
        optimx.offload_states(optimizer, bucket_mb=0)
    with pytest.raises(TypeError, match="pin_memory should be a bool"):
        optimx.offload_states(optimizer, pin_memory=1)  # type: ignore[arg-type]


def shared(params: list[Parameter]) -> list[Parameter]:
    return [*params, Parameter(params[-1].detach()[:3])]


UNSUITABLE: list[tuple[str, Callable[[list[Parameter]], Any], dict[str, Any]]] = [
    ("asked for: foreach=True", list, {"foreach": True}),
    ("parameter is complex64", lambda params: [*params, Parameter(torch.ones(3, device="cuda") * 1j)], {}),
    ("shares memory", shared, {}),
    ("has gaps", lambda params: [*params, Parameter(torch.ones(6, device="cuda")[::2])], {}),
    ("capturable=True", list, {"capturable": True}),
    ("another device", list, {"lr": "tensor"}),
]


@on_gpu
@pytest.mark.parametrize(("reason", "make", "kwargs"), UNSUITABLE, ids=[row[0] for row in UNSUITABLE])
def test_what_the_cpu_step_cannot_update_is_refused(
    reason: str, make: Callable[[list[Parameter]], Any], kwargs: dict[str, Any]
) -> None:
    if "lr" in kwargs:
        kwargs = {"lr": torch.tensor(0.1, device="cuda")}
    params = make(make_params(SHAPES, "cuda"))
    optimizer = optimx.AdamW(params, **kwargs)
    optimx.offload_states(optimizer)
    for param in params:
        param.grad = torch.ones_like(param)
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match=f"should be updated on the host.*{reason}"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert not any(optimizer.state.values())


@on_gpu
def test_a_graph_cannot_record_it() -> None:
    ours, host = pair(optimx.AdamW, make_params(SHAPES, "cuda"), capturable=False)
    train(ours, host, range(2))
    with pytest.raises(RuntimeError, match="no graph records it"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        Engine.step(ours._engine, ours)


@on_gpu
def test_explain_and_memory() -> None:
    ours, host = pair(optimx.AdamW, make_params(SHAPES, "cuda"), state_dtype="8bit")
    for _ in range(2):
        assert {row.backend for row in optimx.explain(ours).rows} == {"native"}
        assert {row.device for row in optimx.explain(ours).rows} == {"cuda:0"}
        assert optimx.memory(ours).total == optimx.memory(host).total
        train(ours, host, range(1))


@on_gpu
@pytest.mark.parametrize("offloads_first", [True, False])
def test_with_released_gradients(offloads_first: bool, late: Late) -> None:
    """Parts of the optimizer that step during backward, with states on the host."""
    ours, host = (optimx.AdamW(make_params(SHAPES, device=device), lr=1e-2) for device in ("cuda", "cpu"))
    if offloads_first:
        optimx.offload_states(ours, bucket_mb=FEW)
    with optimx.release_gradients(ours, bucket_mb=FEW):
        if not offloads_first:
            optimx.offload_states(ours, bucket_mb=FEW)
        for step in range(3):
            for optimizer in (ours, host):
                params = params_of(optimizer)
                weights = make_params(SHAPES, seed=step)
                sums = [(param * weight.to(param.device)).sum() for param, weight in zip(params, weights, strict=True)]
                torch.stack(sums).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    assert_equal(ours, host)
