"""Whose the states are: nobody but ``optimizer.state`` keeps them alive, and who holds a view of one sees it."""

from __future__ import annotations

import copy
import gc
import io
import random
import weakref
from collections import OrderedDict, deque
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
from optimx._engine.plan import StepPlan
from tests.cases import BY_NAME, CASES, CLOSE, Case, assert_same, loop, make_params, set_grads, train, twins
from tests.conftest import INTERPRETED
from tests.edits import EDITS, SETTINGS, apply, complete
from tests.engine import a_step, each_of, params_of, usual

#: The interpreter, at milliseconds a program, takes those whose buckets differ in what they keep.
each_case = each_of(CASES, [BY_NAME[name] for name in ("nadam", "asgd")])
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
def test_states_change_places(case: Case, device: torch.device) -> None:
    """By torch.utils.swap_tensors, with each other and with a new one: the objects stay where they were."""
    ours, stock = pair(case, device)
    for step in range(3):
        train([ours, stock], 2, first=2 * step)
        for optimizer in (ours, stock):
            first, second = (optimizer.state[param] for param in params_of(optimizer)[1:3])
            for name in first:
                torch.utils.swap_tensors(first[name], second[name])
            for name in second:
                torch.utils.swap_tensors(second[name], second[name] + 1.0)
    train([ours, stock], 2, first=6)
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


def of_one_element(i: int, value: Tensor) -> Tensor:
    return value.reshape(1).clone()


def of_both_shapes(i: int, value: Tensor) -> Tensor:
    return value.reshape([(), (1,)][i % 2]).clone()


def with_gaps(i: int, value: Tensor) -> Tensor:
    return torch.stack([value.reshape(1), value.reshape(1)], 1)[:, 0]


@pytest.mark.parametrize("make", [of_one_element, of_both_shapes, with_gaps], ids=lambda make: make.__name__)
@pytest.mark.parametrize("n", [3, 12])
@each_case
def test_scalars_that_others_made(
    case: Case, make: Callable[[int, Tensor], Tensor], n: int, device: torch.device
) -> None:
    """Who makes the states by hand often counts in tensors of one element; they stay."""
    ours, stock, _ = twins(case, make_params([(3,)] * n, device), usual(case))
    train([ours, stock], 1)
    for optimizer in (ours, stock):
        for i, state in enumerate(optimizer.state.values()):
            state.update({name: make(i, state[name]) for name in case.cls.rule.scalars})
    before = [id(value) for value in states_of(ours)]
    train([ours, stock], 3, first=1)
    assert_same(ours, stock)
    assert [id(value) for value in states_of(ours)] == before


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
@each_of(CASES)
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
    # on the CPU, if nothing else is said
    state = {
        i: {name: read[f"{i}.{name}"].to(value.device) for name, value in state.items()}
        for i, state in snapshot["state"].items()
    }
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


@pytest.mark.parametrize("shape", [(), (5,), (5000,)], ids=str)
@each_case
def test_what_a_single_parameter_loads_keeps_its_numbers(
    case: Case, shape: tuple[int, ...], device: torch.device
) -> None:
    """Its states have no neighbours."""
    if INTERPRETED and shape == (5000,):
        pytest.skip("takes the interpreter long")
    ours = case.cls(make_params([shape], device), **usual(case))
    train([ours], 2)
    snapshot = copy.deepcopy(ours.state_dict())
    frozen = copy.deepcopy(snapshot)
    for step in range(2, 4):
        ours.load_state_dict(snapshot)
        train([ours], 1, first=step)
        assert_equal(snapshot, frozen)


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
        "deque": deque([tensor(11.0)]),
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
        state["deque"][0].add_(1)
        assert_equal(snapshot, frozen)
        for name in theirs:
            del state[name]
    train([ours, stock], 2, first=2)
    assert_same(ours, stock)
    assert_equal(snapshot, frozen)


@each_case
def test_states_of_no_parameter(case: Case, device: torch.device) -> None:
    """Torch saves and loads whatever else is among the states."""
    ours, _ = pair(case, device)
    train([ours], 1)
    ours.state["of_all"] = {"seen": torch.ones(2), "many": [torch.ones(2)]}
    snapshot = copy.deepcopy(ours.state_dict())
    frozen = copy.deepcopy(snapshot)
    for optimizer in (ours, another(case, device)):
        optimizer.load_state_dict(snapshot)
        optimizer.state["of_all"]["seen"].add_(1)
        optimizer.state["of_all"]["many"][0].add_(1)
        train([optimizer], 1, first=1)
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


# anything, in any order

RUNS, EDITS_OF_A_RUN = (1, 6) if INTERPRETED else (4, 30)
#: Steps from the same numbers, with settings that none of the other tests has.
ONE_STEP = {"rtol": 5e-6, "atol": 1e-6}

RandomEdit = Callable[[Any, Case, random.Random], Any]
RANDOM: dict[str, RandomEdit] = {}


def at_random(function: RandomEdit) -> RandomEdit:
    RANDOM[function.__name__] = function
    return function


def a_state(optimizer: Optimizer, rng: random.Random, contiguous: bool = False) -> dict[str, Tensor]:
    """A parameter's; ``contiguous``: of one that kernels of ours update."""
    states = [
        state
        for param, state in ((param, optimizer.state.get(param)) for param in params_of(optimizer))
        if state and not (contiguous and not all(tensor.is_contiguous() for tensor in (param, *state.values())))
    ]
    return rng.choice(states) if states else {}


def a_name(state: dict[str, Tensor], rng: random.Random, scalar: bool = False) -> list[str]:
    """One of its keys, if there is one."""
    names = sorted(name for name, value in state.items() if scalar or value.dim())
    return [rng.choice(names)] if names else []


@at_random
def state_cloned(optimizer, case, rng):
    state = a_state(optimizer, rng)
    for name in a_name(state, rng, scalar=True):
        state[name] = state[name].clone() * 2


@at_random
def state_made_anew_in_its_place(optimizer, case, rng):
    """The new one often has the address or the identity of the old one."""
    state = a_state(optimizer, rng)
    for name in a_name(state, rng):
        shape = state[name].shape
        del state[name]
        state[name] = torch.zeros(shape)


@at_random
def state_rekeyed(optimizer, case, rng):
    for param in params_of(optimizer):
        optimizer.state[param] = dict(
            rng.sample([*sorted(optimizer.state[param].items())], len(optimizer.state[param]))
        )


@at_random
def state_mapping_reordered(optimizer, case, rng):
    for i in rng.sample(range(len(params_of(optimizer))), 2):
        param = params_of(optimizer)[i]
        optimizer.state[param] = optimizer.state.pop(param, {})


@at_random
def states_swapped(optimizer, case, rng):
    """Between two parameters, each tensor or the scalars too."""
    by_shape: dict[Any, list[Any]] = {}
    for param in params_of(optimizer):
        if optimizer.state.get(param):
            by_shape.setdefault((param.shape, param.stride()), []).append(optimizer.state[param])
    alike = [states for states in by_shape.values() if len(states) > 1]
    if alike:
        first, second = rng.sample(rng.choice(alike), 2)
        for name in a_name(first, rng, scalar=True):
            first[name], second[name] = second[name], first[name]


@at_random
def key_popped(optimizer, case, rng):
    """Ours makes it anew, stock is given what it would have begun with."""
    state = a_state(optimizer, rng, contiguous=True)
    for name in a_name(state, rng, scalar=True):
        old = state.pop(name)
        if isinstance(optimizer, (torch.optim.SGD, case.cls)):
            return
        rule = case.cls.rule
        (param,) = (param for param, of_param in optimizer.state.items() if of_param is state)
        (group,) = (group for group in optimizer.param_groups if any(p is param for p in group["params"]))
        if name in rule.scalars:
            state[name] = torch.full_like(old, rule.new_scalar(name, group))
        elif name in rule.state_names(rule.variant_of(rule.group_variant(group), param)):
            state[name] = rule.new_state(name, param, group, optimizer.defaults)


@at_random
def memory_moved_beneath(optimizer, case, rng):
    state = a_state(optimizer, rng)
    for name in a_name(state, rng, scalar=True):
        value = state[name]
        moved = value.detach().clone() + (1.0 if name == "step" else 0.25)
        if rng.random() < 0.5:
            value.data = moved
        else:
            value.set_(moved)


@at_random
def memory_of_all_moved_beneath(optimizer, case, rng):
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


@at_random
def states_put_into_one_tensor(optimizer, case, rng):
    """In another order than ours."""
    state = a_state(optimizer, rng)
    for name in a_name(state, rng):
        having = [of_param for of_param in optimizer.state.values() if name in of_param]
        rng.shuffle(having)
        memory = torch.cat([of_param[name].flatten() for of_param in having])
        parts = memory.split([of_param[name].numel() for of_param in having])
        for of_param, part in zip(having, parts, strict=True):
            of_param[name] = part.view(of_param[name].shape)


@at_random
def param_moved_to_another_group(optimizer, case, rng):
    groups = [group for group in optimizer.param_groups if len(group["params"]) > 1]
    if groups:
        group, other = rng.choice(groups), rng.choice(optimizer.param_groups)
        param = group["params"].pop(rng.randrange(len(group["params"])))
        other["params"].insert(rng.randint(0, len(other["params"])), param)


@at_random
def group_split(optimizer, case, rng):
    group = rng.choice(optimizer.param_groups)
    if len(group["params"]) > 1 and len(optimizer.param_groups) < 5:
        optimizer.param_groups.append(
            {**copy.deepcopy({**group, "params": []}), "params": group["params"][1:], "lr": 0.02}
        )
        del group["params"][1:]


@at_random
def groups_merged(optimizer, case, rng):
    if len(optimizer.param_groups) > 1:
        last = optimizer.param_groups.pop()
        optimizer.param_groups[0]["params"] += last["params"]


@at_random
def param_removed_with_its_state(optimizer, case, rng):
    groups = [group for group in optimizer.param_groups if len(group["params"]) > 1]
    if groups and len(params_of(optimizer)) > 3:
        optimizer.state.pop(rng.choice(groups)["params"].pop(0), None)


@at_random
def params_added(optimizer, case, rng):
    if len(params_of(optimizer)) < 7:
        shapes = rng.choices([(5,), (3, 4), (), (0,), (2, 1, 3)], k=2)
        optimizer.add_param_group({"params": make_params(shapes, seed=rng.randrange(99))})


@at_random
def param_replaced_by_a_new_one(optimizer, case, rng):
    """Which may well have the identity of the old one."""
    group = rng.choice([group for group in optimizer.param_groups if group["params"]])
    shape = group["params"][0].shape
    optimizer.state.pop(group["params"].pop(0), None)
    group["params"].insert(0, Parameter(torch.full(shape, 0.5)))


@at_random
def params_swapped(optimizer, case, rng):
    first, second, *_ = params_of(optimizer)
    if rng.random() < 0.5:
        first.grad = second.grad = None
        if optimizer.state.get(first) and optimizer.state.get(second) and first.shape == second.shape:
            torch.utils.swap_tensors(first, second)


@at_random
def settings_back(optimizer, case, rng):
    for group in optimizer.param_groups:
        group.update({name: copy.deepcopy(value) for name, value in optimizer.defaults.items() if name != "foreach"})
        group["lr"] = 0.1


@at_random
def norm_measured(optimizer, case, rng):
    if isinstance(optimizer, case.cls):
        optimizer.max_grad_norm = None if optimizer.max_grad_norm else 1e9


@at_random
def another_loads_it(optimizer, case, rng):
    groups = [{"params": [Parameter(p.detach().clone()) for p in g["params"]]} for g in optimizer.param_groups]
    kwargs = {name: value for name, value in optimizer.defaults.items() if name == "momentum"}
    other: Any = case.cls(groups, **kwargs) if isinstance(optimizer, case.cls) else loop(case, groups, **kwargs)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other


#: Of the table, those that ask for no certain number of groups, and for no state that may not be there.
OF_THE_TABLE = (
    "param_data_elsewhere",
    "param_data_misaligned",
    "param_data_other_values",
    "param_strides",
    "param_and_state_strides",
    "param_set_",
    "params_swapped_for_tensors",
    "param_share_memory",
    "add_empty_group",
    "reorder_params",
    "swap_groups",
    "replace_group_dict",
    "state_written_in_place",
    "state_data_elsewhere",
    "state_data_strides",
    "state_share_memory",
    "state_dict_of_param_replaced",
    "state_of_param_replaced_by_equal_tensors",
    "first_state_cleared",
    "last_state_cleared",
    "every_state_cleared",
    "state_cleared",
    "state_mapping_replaced",
    "load_own_state_dict",
    "load_copied_state_dict",
    "deepcopied",
    "pickled",
    "saved_by_torch",
)
OF_SETTINGS = SETTINGS.keys() - {"foreach", "fused_false", "differentiable", "lr_zero", "no_momentum"}
OF_COUNTS = ("written_in_place", "replaced", "replaced_by_views_of_one_tensor", "replaced_by_clone", "data_swapped")


def random_edits(case: Case) -> list[str]:
    """Names of what can be done to an optimizer of ours and to stock."""
    counts = [f"{count}_{name}" for count in case.cls.rule.scalars for name in OF_COUNTS]
    settings = [name for name in sorted(OF_SETTINGS) if EDITS[name][1](case, usual(case))]
    table = [name for name in OF_THE_TABLE if EDITS[name][1](case, usual(case))]
    # few settings, which are many
    return [*RANDOM, *table, *counts, *settings]


def edited(name: str, optimizer: Any, case: Case, seed: str) -> Any:
    if name in RANDOM:
        return complete(RANDOM[name](optimizer, case, random.Random(seed)) or optimizer)
    has_all = all(optimizer.state.get(param) for param in params_of(optimizer))
    of_counts = any(name.startswith(f"{count}_") for count in case.cls.rule.scalars)
    return apply(name, optimizer) if has_all or not of_counts else optimizer


def one_rounded_state(ours: Any, stock: Any, case: Case, rng: random.Random) -> None:
    """A step with a state in bfloat16, which stock has rounded: it stays, and is used."""
    state = a_state(ours, rng, contiguous=True)
    names = a_name(state, rng)
    if not names or case.name == "adafactor":
        # which steps by averages as they are stored
        return
    (name,) = names
    param, twin = next(
        pair for pair in zip(params_of(ours), params_of(stock), strict=True) if ours.state.get(pair[0]) is state
    )
    rounded = ours.state[param][name].bfloat16()
    stock.state[twin][name].copy_(rounded)
    ours.state[param][name] = rounded
    train([ours, stock], 1, first=rng.randrange(1000))
    assert ours.state[param][name] is rounded
    torch.testing.assert_close(rounded.float(), stock.state[twin][name], **CLOSE[torch.bfloat16])
    torch.testing.assert_close(param, twin, **ONE_STEP)
    ours.state[param][name] = rounded.float()


def take_over(stock: Any, ours: Any) -> None:
    """Give stock our numbers, so that nothing adds up."""
    for param, twin in zip(params_of(ours), params_of(stock), strict=True):
        twin.data.copy_(param.detach())
        for name, value in ours.state.get(param, {}).items():
            stock.state[twin][name].copy_(value)


@pytest.mark.parametrize("run", range(RUNS))
@each_of(CASES)
def test_random_edits(case: Case, run: int) -> None:
    """A step after each, beside stock's, from the same numbers."""
    rng = random.Random(f"{case.name} {run}")
    shapes = [(5,), (5,), (3, 4), (3, 4), ()][: rng.choice([3, 4, 5])]
    ours, stock, _ = twins(case, make_params(shapes), usual(case), two_groups)
    names = random_edits(case)
    done: list[str] = []
    for i in range(EDITS_OF_A_RUN):
        done.append(rng.choice(names))
        ours, stock = (edited(done[-1], optimizer, case, f"{case.name} {run} {i}") for optimizer in (ours, stock))
        n = len(params_of(ours))
        skip = rng.sample(range(n), rng.choice([0, 0, 0, 1, 2, n]))
        if done[-1] == "key_popped" or case.name == "adagrad":
            # what is missing is made for a gradient
            skip = []
        try:
            for step in range(rng.choice([1, 1, 2])):
                train([ours, stock], 1, first=100 * i + step, skip=skip)
                assert_same(ours, stock, ONE_STEP)
                take_over(stock, ours)
            if rng.random() < 0.1:
                done.append("one_rounded_state")
                one_rounded_state(ours, stock, case, rng)
                take_over(stock, ours)
        except Exception as error:
            raise AssertionError(f"after {' '.join(done)}: {error}") from error
