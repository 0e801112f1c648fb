"""Whose the states are: nobody but ``optimizer.state`` keeps them alive, and who holds one, or a view of it, sees it."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.optim import Optimizer

import optimx
from optimx._plan import StepPlan
from tests.cases import CASES, CLOSE, Case, assert_same, make_params, set_grads, train, twins
from tests.conftest import INTERPRETED
from tests.engine import a_step, params_of, usual
from tests.engine import each_case_natively as each_case

#: Small ones, which lie together on a CPU, and a large one.
SHAPES = [(5,), (3, 4), (3, 4), (150,) if INTERPRETED else (4100,)]
#: What hundreds of steps are to the interpreter.
MANY = 3 if INTERPRETED else 300


def two_groups(params: list[Any]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}]


def pair(case: Case, device: torch.device, **ours: Any) -> tuple[Any, Any]:
    """Ours and the oracle."""
    mine, stock, _ = twins(case, make_params(SHAPES, device), usual(case), two_groups, **ours)
    return mine, stock


def another(case: Case, device: torch.device) -> Any:
    """One of ours that loads what :func:`pair` saves."""
    return case.cls(two_groups(make_params(SHAPES, device)), **usual(case))


def states_of(optimizer: Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


def assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# who holds a view sees the state


def views_of(optimizer: Optimizer) -> list[tuple[Tensor, list[Any]]]:
    """Each state, with what people make of one to look at it later."""
    return [
        (value, [value.detach(), value.view(-1), value[None], *([value.numpy()] if value.device.type == "cpu" else [])])
        for value in states_of(optimizer)
    ]


def assert_shown(optimizer: Optimizer, seen: list[tuple[Tensor, list[Any]]]) -> None:
    states = {id(value) for value in states_of(optimizer)}
    assert all(id(value) in states for value, _ in seen)
    for value, views in seen:
        for view in views:
            assert_equal(torch.as_tensor(view).reshape(value.shape), value)


def group_added(optimizer: Optimizer) -> None:
    optimizer.add_param_group({"params": make_params([(2,), (3,)], params_of(optimizer)[0].device, seed=1)})


def settings_differ(optimizer: Optimizer) -> None:
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = 0.03 * 0.9**i


def maximized(optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["maximize"] = True


def looked_at(optimizer: Optimizer) -> None:
    optimx.explain(optimizer)
    copy.deepcopy(optimizer.state_dict())
    copy.deepcopy(optimizer)


CHANGES = (settings_differ, maximized, looked_at, group_added)


@each_case
def test_views_go_on_showing_the_states(case: Case, device: torch.device) -> None:
    """Whatever becomes of groups, gradients and plans, and after hundreds of steps."""
    ours, stock = pair(case, device)
    seen = []
    train([ours, stock], 1)
    seen += views_of(ours)
    for step, change in enumerate(CHANGES, start=1):
        for optimizer in (ours, stock):
            change(optimizer)
        train([ours, stock], 1, first=2 * step, skip=[step % 4])
        assert_shown(ours, seen)
        train([ours, stock], 1, first=2 * step + 1)
        assert_shown(ours, seen)
    assert_same(ours, stock, {"rtol": 2e-5, "atol": 2e-6})
    train([ours], MANY)
    assert_shown(ours, seen)


@each_case
def test_views_go_on_when_another_loads_the_state(case: Case, device: torch.device) -> None:
    """Who loads a state dict as it is, uncopied, has states of its own."""
    ours, stock = pair(case, device)
    train([ours, stock], 2, skip=[1])
    seen = views_of(ours)
    other = another(case, device)
    other.load_state_dict(ours.state_dict())
    assert_shown(ours, seen)
    before = copy.deepcopy(ours.state_dict())
    train([other], 2, first=2)
    assert_equal(ours.state_dict(), before)
    train([ours, stock], 2, first=2)
    assert_shown(ours, seen)
    assert_same(ours, stock)


@each_case
def test_what_is_written_through_a_view_is_used(case: Case, device: torch.device) -> None:
    ours, stock = pair(case, device)
    train([ours, stock], 1)
    views = [[value.view(-1) for value in states_of(optimizer) if value.dim()] for optimizer in (ours, stock)]
    for step in range(3):
        for of_one in views:
            for view in of_one:
                view.add_(0.5)
        train([ours, stock], 1, first=1 + step, skip=[step])
    assert_same(ours, stock)


# nobody else keeps them


@pytest.fixture
def no_gc() -> Iterator[None]:
    """Only counted references free: what lies in a cycle stays."""
    gc.disable()
    yield
    gc.enable()


class Watched:
    """Weak references to tensors, and to the memory of those that lie in memory of their own."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = [weakref.ref(tensor) for tensor in tensors]
        storages = [
            tensor.untyped_storage() for tensor in tensors if tensor.untyped_storage().nbytes() == tensor.nbytes
        ]
        self.memory = [StorageWeakRef(storage) for storage in storages if storage.nbytes()]

    @property
    def alive(self) -> tuple[int, int]:
        """How many there still are, tensors and memories."""
        return (
            sum(tensor() is not None for tensor in self.tensors),
            sum(not memory.expired() for memory in self.memory),
        )


def some_steps(optimizer: Any) -> None:
    for step in range(3):
        a_step(optimizer, step)


def many_patterns(optimizer: Any) -> None:
    """Of missing gradients, more than there are plans kept."""
    for step in range(6):
        set_grads(params_of(optimizer), step, skip=[] if step == 4 else [step % 4])
        optimizer.step()


def clipped(optimizer: Any) -> None:
    optimizer.max_grad_norm = 0.5
    some_steps(optimizer)


def mixed_settings(optimizer: Any) -> None:
    optimizer.param_groups[0]["maximize"] = True
    some_steps(optimizer)


def explained(optimizer: Any) -> None:
    some_steps(optimizer)
    str(optimx.explain(optimizer))


def saved_and_copied(optimizer: Any) -> None:
    some_steps(optimizer)
    copy.deepcopy(optimizer)
    torch.save(optimizer.state_dict(), io.BytesIO())
    optimizer.load_state_dict(optimizer.state_dict())
    a_step(optimizer)


def failed(optimizer: Any) -> None:
    """In the middle of a step."""
    some_steps(optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepPlan, "lay_out_grads", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            a_step(optimizer)


def stepped_by_stock(optimizer: Any) -> None:
    some_steps(optimizer)
    optimizer.param_groups[0]["foreach"] = False
    a_step(optimizer)


PASTS = (
    some_steps, many_patterns, clipped, mixed_settings, explained, saved_and_copied, failed, stepped_by_stock
)  # fmt: skip


def cloned(optimizer: Any) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            state[name] = value.clone()


def moved_away(optimizer: Any) -> None:
    """As people do who offload."""
    for state in optimizer.state.values():
        for name in state:
            state[name] = state[name].to("cpu", copy=True)


def cleared_one_by_one(optimizer: Any) -> None:
    for state in optimizer.state.values():
        state.clear()


def state_cleared(optimizer: Any) -> None:
    optimizer.state.clear()


def params_removed(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["params"] = [Parameter(param.detach().clone()) for param in group["params"]]
    optimizer.state.clear()


def groups_removed(optimizer: Any) -> None:
    optimizer.param_groups.clear()
    optimizer.state.clear()
    optimizer.add_param_group({"params": make_params([(2,)])})


ENDS = (cloned, moved_away, cleared_one_by_one, state_cleared, params_removed, groups_removed)


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("past", PASTS, ids=lambda past: past.__name__)
@each_case
def test_what_is_taken_out_of_the_state_is_free_at_once(
    case: Case, past: Callable[[Any], None], device: torch.device
) -> None:
    for end in ENDS:
        optimizer = another(case, device)
        past(optimizer)
        watched = Watched(states_of(optimizer))
        assert watched.alive[0] == len(watched.tensors) > 0
        assert watched.alive[1] == len(watched.memory) > 0
        end(optimizer)
        assert watched.alive == (0, 0), end.__name__
        if not (end is moved_away and device.type != "cpu"):
            a_step(optimizer)


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("past", PASTS, ids=lambda past: past.__name__)
@each_case
def test_a_removed_group_is_free_at_once(case: Case, past: Callable[[Any], None], device: torch.device) -> None:
    """Parameters, gradients and states; the other group trains on."""
    optimizer = another(case, device)
    past(optimizer)
    params = optimizer.param_groups[1]["params"]
    watched = Watched([each for param in params for each in (param, *optimizer.state[param].values())])
    grads = Watched([param.grad for param in params if param.grad is not None])
    del params, optimizer.param_groups[1]
    for param in set(optimizer.state) - set(params_of(optimizer)):
        del optimizer.state[param]
    del param
    assert (watched.alive, grads.alive) == ((0, 0), (0, 0))
    some_steps(optimizer)


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("past", PASTS, ids=lambda past: past.__name__)
@each_case
def test_model_and_optimizer_are_free_at_once(case: Case, past: Callable[[Any], None], device: torch.device) -> None:
    """There are no cycles."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 70)).to(device)
    optimizer: Any = case.cls(two_groups([*model.parameters()]), **usual(case))
    past(optimizer)
    tensors = Watched([*states_of(optimizer), *model.parameters()])
    grads = Watched([param.grad for param in model.parameters() if param.grad is not None])
    optimizers = weakref.ref(optimizer), weakref.ref(optimizer._engine)
    del model, optimizer
    assert [each() for each in optimizers] == [None, None]
    assert (tensors.alive, grads.alive) == ((0, 0), (0, 0))


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("past", PASTS, ids=lambda past: past.__name__)
@each_case
def test_gradients_are_free_at_once(case: Case, past: Callable[[Any], None], device: torch.device) -> None:
    optimizer = another(case, device)
    past(optimizer)
    for _ in range(2):
        grads = Watched([param.grad for param in params_of(optimizer) if param.grad is not None])
        assert grads.alive[0] > 0
        optimizer.zero_grad()
        assert grads.alive == (0, 0)
        a_step(optimizer)


# loading


def as_it_is(snapshot: dict[str, Any], folder: Path) -> Any:
    return snapshot


def through_torch(snapshot: dict[str, Any], folder: Path) -> Any:
    torch.save(snapshot, folder / "saved.pt")
    return torch.load(folder / "saved.pt", weights_only=True)


def mapped(snapshot: dict[str, Any], folder: Path) -> Any:
    """From a file that stays where it is."""
    torch.save(snapshot, folder / "mapped.pt")
    return torch.load(folder / "mapped.pt", weights_only=True, mmap=True)


def through_safetensors(snapshot: dict[str, Any], folder: Path) -> Any:
    save_file = pytest.importorskip("safetensors.torch").save_file
    load_file = pytest.importorskip("safetensors.torch").load_file
    tensors = {f"{i}.{name}": v for i, state in snapshot["state"].items() for name, v in state.items()}
    save_file(tensors, folder / "saved.safetensors")
    read = load_file(folder / "saved.safetensors")
    state = {i: {name: read[f"{i}.{name}"] for name in state} for i, state in snapshot["state"].items()}
    return {**snapshot, "state": state}


def through_distributed(snapshot: dict[str, Any], folder: Path) -> Any:
    from torch.distributed import checkpoint

    checkpoint.save(snapshot["state"], checkpoint_id=folder / "saved", no_dist=True)
    state = {i: {name: torch.zeros_like(v) for name, v in state.items()} for i, state in snapshot["state"].items()}
    checkpoint.load(state, checkpoint_id=folder / "saved", no_dist=True)
    return {**snapshot, "state": state}


ROUNDS = [
    as_it_is,
    through_torch,
    mapped,
    through_safetensors,
    pytest.param(
        through_distributed,
        marks=[
            pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
            pytest.mark.filterwarnings("ignore::UserWarning:torch"),
        ],
    ),
]


@pytest.mark.parametrize("round_", ROUNDS, ids=lambda round_: round_.__name__)
@each_case
def test_a_live_state_dict_is_saved_whole(
    case: Case, round_: Callable[[dict[str, Any], Path], Any], device: torch.device, tmp_path: Path
) -> None:
    """Uncopied, as everybody saves it: each tensor of those that lie together is itself."""
    ours, stock = pair(case, device)
    train([ours, stock], 2, skip=[1])
    saved = round_(ours.state_dict(), tmp_path)
    assert_equal(saved["state"], ours.state_dict()["state"])
    other = another(case, device)
    for param, twin in zip(params_of(other), params_of(ours), strict=True):
        param.data.copy_(twin.data)
    other.load_state_dict(saved)
    train([ours, other, stock], 2, first=2)
    assert_equal(other.state_dict(), ours.state_dict())
    assert_same(other, stock)


def pass_on(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    return {**state_dict, "state": dict(state_dict["state"])}


def plain(optimizer: Any, snapshot: Any) -> None:
    optimizer.load_state_dict(snapshot)


def hooked(optimizer: Any, snapshot: Any) -> None:
    before = optimizer.register_load_state_dict_pre_hook(pass_on)
    seen: list[Any] = []
    after = optimizer.register_load_state_dict_post_hook(lambda optimizer: seen.extend(views_of(optimizer)))
    optimizer.load_state_dict(snapshot)
    before.remove()
    after.remove()
    # what a hook has found is where it will stay
    assert seen
    assert_shown(optimizer, seen)
    a_step(optimizer, 5)
    assert_shown(optimizer, seen)
    optimizer.load_state_dict(snapshot)


def through_setstate(optimizer: Any, snapshot: Any) -> None:
    copy.copy(optimizer).load_state_dict(snapshot)
    optimizer.load_state_dict(snapshot)


@pytest.mark.parametrize("load", [plain, hooked, through_setstate], ids=lambda load: load.__name__)
@pytest.mark.parametrize("round_", ROUNDS[:3], ids=lambda round_: round_.__name__)
@each_case
def test_what_is_loaded_keeps_its_numbers(
    case: Case,
    round_: Callable[[dict[str, Any], Path], Any],
    load: Callable[[Any, Any], None],
    device: torch.device,
    tmp_path: Path,
) -> None:
    """Loaded twice, and into two optimizers, which step in turn."""
    ours, stock = pair(case, device)
    train([ours, stock], 2, skip=[1])
    snapshot = round_(copy.deepcopy(ours.state_dict()), tmp_path)
    frozen = copy.deepcopy(snapshot)
    other = another(case, device)
    for optimizer in (ours, other, ours):
        load(optimizer, snapshot)
        train([ours, other], 2, first=2)
        assert_equal(snapshot, frozen)
    load(other, snapshot)
    load(ours, snapshot)
    assert_equal(ours.state_dict(), other.state_dict())
    assert not {v.untyped_storage().data_ptr() for v in states_of(ours)} & {
        v.untyped_storage().data_ptr() for v in states_of(other)
    }


@each_case
def test_containers_in_the_state(case: Case, device: torch.device) -> None:
    """Of somebody else's: they come back as they were, and what is loaded is not what was saved."""
    ours, stock = pair(case, device)
    train([ours, stock], 2)

    def tensor(value: float) -> Tensor:
        return torch.full((2,), value, device=device)

    shared = tensor(7.0)
    theirs = {
        "dict": {"list": [tensor(1.0), (tensor(2.0), 3)], "dict": {"deep": tensor(4.0)}},
        "ordered": OrderedDict(a=tensor(5.0), b=None),
        "list": [tensor(6.0), shared, shared],
        "tuple": (tensor(8.0), [tensor(9.0)]),
        "number": 10,
        "empty": {},
    }
    ours.state[params_of(ours)[0]].update(theirs)
    snapshot = copy.deepcopy(ours.state_dict())
    frozen = copy.deepcopy(snapshot)
    other = another(case, device)
    for optimizer in (ours, other):
        optimizer.load_state_dict(snapshot)
    # stock's cast makes a plain dict of an ordered one
    assert_equal(ours.state_dict()["state"], other.state_dict()["state"])
    for optimizer in (ours, other):
        state = optimizer.state[params_of(optimizer)[0]]
        assert_equal({name: state[name] for name in theirs}, theirs)
        state["dict"]["list"][0].add_(1)
        state["dict"]["list"][1][0].add_(1)
        state["dict"]["dict"]["deep"].add_(1)
        state["dict"]["dict"]["new"] = 1
        state["ordered"]["a"].add_(1)
        state["list"].append(1)
        state["tuple"][1][0].add_(1)
        assert_equal(snapshot, frozen)
        for name in theirs:
            del state[name]
    train([ours, stock], 2, first=2)
    assert_same(ours, stock)
    assert_equal(snapshot, frozen)


# inference mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("clip", [None, 0.5], ids=["plain", "clipped"])
@each_case
def test_steps_inside_and_outside_of_inference_mode(
    case: Case, clip: float | None, dtype: torch.dtype, device: torch.device
) -> None:
    """What was made inside, a state or anything else, can be changed outside."""
    make = [make_params(SHAPES, device, dtype) for _ in range(2)]
    inside, outside = (case.cls(two_groups(params), **usual(case), max_grad_norm=clip) for params in make)
    for step in range(8):
        for optimizer in (inside, outside):
            set_grads(params_of(optimizer), step, skip=[step % 4] if step > 4 else [])
            if step == 3:
                # calls of settings that differ are planned anew
                optimizer.param_groups[0]["maximize"] = True
            with torch.inference_mode(optimizer is inside and step % 3 != 2):
                optimizer.step()
    assert not any(value.is_inference() for value in states_of(inside))
    assert_equal(params_of(inside), params_of(outside))
    assert_equal(inside.state_dict(), outside.state_dict())


@each_case
def test_loaded_inside_of_inference_mode(case: Case, device: torch.device) -> None:
    """As it was, and where loading makes other dtypes of it."""
    ours = another(case, device)
    train([ours], 2)
    saved = ours.state_dict()
    half = copy.deepcopy(saved)
    for state in half["state"].values():
        state.update({name: value.bfloat16() for name, value in state.items() if value.dim()})
    for snapshot in (saved, copy.deepcopy(saved), half):
        inside, outside = another(case, device), another(case, device)
        with torch.inference_mode():
            inside.load_state_dict(snapshot)
        outside.load_state_dict(snapshot)
        train([inside, outside], 2, first=2)
        assert_equal(params_of(inside), params_of(outside))
        assert_equal(inside.state_dict(), outside.state_dict())
