"""Memory that is shared, by parameters or with other processes: each update sees the one before, as in torch's loop."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import optimx
from tests.cases import CASES, CLOSE, Case, assert_same, loop, make_params, set_grads, train, twins
from tests.conftest import INTERPRETED
from tests.engine import each_case_thinly, params_of, usual

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# by parameters

Make = Callable[..., Any]


def _numbers(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...] = (24,)) -> Tensor:
    return make_params([shape], device, dtype, seed=3)[0].detach()


def overlapping(device: torch.device, dtype: torch.dtype) -> list[Parameter]:
    memory = _numbers(device, dtype)
    return [Parameter(memory[:16]), Parameter(memory[8:].view(4, 4))]


def one_within_another(device: torch.device, dtype: torch.dtype) -> list[Parameter]:
    memory = _numbers(device, dtype)
    return [Parameter(memory), Parameter(memory[8:12]), Parameter(memory[16:20])]


def in_another_shape(device: torch.device, dtype: torch.dtype) -> list[Parameter]:
    memory = _numbers(device, dtype)
    return [Parameter(memory), Parameter(memory.view(4, 6)), Parameter(memory.view(4, 6).t())]


def chained(device: torch.device, dtype: torch.dtype) -> list[Parameter]:
    """Each with its neighbour."""
    memory = _numbers(device, dtype)
    return [Parameter(memory[i : i + 8]) for i in (0, 14, 7)]


def listed_twice(device: torch.device, dtype: torch.dtype) -> list[Parameter]:
    param = Parameter(_numbers(device, dtype))
    return [param, param]


def listed_thrice(device: torch.device, dtype: torch.dtype) -> list[Parameter]:
    """And seen in another one."""
    param = Parameter(_numbers(device, dtype))
    return [param, Parameter(param.detach()[2:9]), param, param]


SHARING = (overlapping, one_within_another, in_another_shape, chained, listed_twice, listed_thrice)


def optimizers(
    case: Case, make: Make, device: torch.device, dtype: torch.dtype, kwargs: dict[str, Any], **ours: Any
) -> tuple[Any, Any]:
    """Ours and torch's loop, in 16 bits too. Parameters that share nothing come before and after, in another group."""
    built: list[Any] = []
    for build in (lambda groups: case.cls(groups, **kwargs, **ours), lambda groups: loop(case, groups, **kwargs)):
        first, last = make_params([(5,), (3, 4)], device, dtype)
        sharing = make(device, dtype)
        optimizer = build([{"params": [first]}, {"params": [last], "lr": 0.05}])
        # torch refuses a parameter that is there already, in another group than its first
        optimizer.param_groups[0]["params"].append(sharing[0])
        optimizer.param_groups[1]["params"] = [*sharing[1:], last]
        if isinstance(optimizer, torch.optim.Adagrad):
            for param in sharing:
                value = torch.zeros_like(param, memory_format=torch.preserve_format)
                optimizer.state[param].update(step=torch.zeros(()), sum=value)
        built.append(optimizer)
    return built[0], built[1]


def shared_of(optimizer: Optimizer) -> list[Tensor]:
    return params_of(optimizer)[1:-1]


def assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, check_device=False)


def assert_shared_are_equal(ours: Optimizer, stock: Optimizer) -> None:
    """To the bit: torch's own code has updated those that share."""
    assert_equal(shared_of(ours), shared_of(stock))
    for mine, theirs in zip(shared_of(ours), shared_of(stock), strict=True):
        assert_equal(ours.state[mine], stock.state[theirs])


def reasons(optimizer: Optimizer) -> dict[str, int]:
    """How many parameters torch's own step updates, and why."""
    return {row.reason: row.tensors for row in optimx.explain(optimizer).rows if row.backend == "torch"}


@pytest.mark.parametrize("decay", [0.0, 0.3], ids=["plain", "decay"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharing", SHARING, ids=lambda sharing: sharing.__name__)
@each_case_thinly
def test_parameters_that_share_memory(
    case: Case, sharing: Make, dtype: str, decay: float, device: torch.device
) -> None:
    if decay and not case.has("weight_decay"):
        pytest.skip("has no weight decay")
    kwargs = usual(case, lr=0.01, **({"weight_decay": decay} if decay else {}))
    ours, stock = optimizers(case, sharing, device, DTYPES[dtype], kwargs)
    for step, skip in enumerate([(), (), (0,), ()]):
        train([ours, stock], 1, first=step, skip=skip)
        assert_shared_are_equal(ours, stock)
    if dtype == "float32":
        assert_same(ours, stock)
    explained = reasons(ours)
    assert sum(explained.values()) == len(shared_of(ours))
    assert explained.keys() <= {"listed twice", "shares memory with another parameter"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharing", SHARING, ids=lambda sharing: sharing.__name__)
@each_case_thinly
def test_clipped_parameters_that_share_memory(case: Case, sharing: Make, dtype: str, device: torch.device) -> None:
    """All gradients count; that of a parameter that is listed twice is scaled once."""
    kwargs = usual(case, lr=0.01)
    ours, stock = optimizers(case, sharing, device, DTYPES[dtype], kwargs, max_grad_norm=0.5)
    for step in range(3):
        set_grads(params_of(ours), step)
        ours.step()
        params = params_of(stock)
        set_grads(params, step)
        norm = torch.stack([param.grad.double().norm() for param in params]).norm()
        torch.testing.assert_close(ours.grad_norm.double(), norm, rtol=1e-5, atol=0.0)
        for param in {id(param): param for param in params}.values():
            param.grad = (param.grad * (0.5 / (ours.grad_norm.double() + 1e-6))).to(param.dtype)
        stock.step()
    pairs = zip(shared_of(ours), shared_of(stock), strict=True)
    for mine, theirs in pairs:
        # a factor's last bit makes an ulp of a 16-bit gradient
        torch.testing.assert_close(mine, theirs, **CLOSE[DTYPES[dtype]])


def one_state_dict(optimizer: Optimizer, first: Tensor, second: Tensor) -> None:
    optimizer.state[second] = optimizer.state[first]


def one_step_count(optimizer: Optimizer, first: Tensor, second: Tensor) -> None:
    optimizer.state[second]["step"] = optimizer.state[first]["step"]


def one_tensor(optimizer: Optimizer, first: Tensor, second: Tensor) -> None:
    name = next(name for name, value in optimizer.state[first].items() if value.dim())
    optimizer.state[second][name] = optimizer.state[first][name]


def every_tensor(optimizer: Optimizer, first: Tensor, second: Tensor) -> None:
    optimizer.state[second] = dict(optimizer.state[first])


def views_that_overlap(optimizer: Optimizer, first: Tensor, second: Tensor) -> None:
    name = next(name for name, value in optimizer.state[first].items() if value.dim())
    mine, theirs = optimizer.state[first], optimizer.state[second]
    memory = torch.cat([mine[name].flatten(), theirs[name].flatten()])
    n = mine[name].numel()
    mine[name] = memory[:n].view(mine[name].shape)
    theirs[name] = memory[n - 2 : 2 * n - 2].view(mine[name].shape)


STATES = (one_state_dict, one_step_count, one_tensor, every_tensor, views_that_overlap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", STATES, ids=lambda share: share.__name__)
@each_case_thinly
def test_states_that_two_parameters_share(
    case: Case, share: Callable[[Optimizer, Tensor, Tensor], None], dtype: str, device: torch.device
) -> None:
    if share is one_step_count and "step" not in case.cls.rule.scalars:
        pytest.skip("counts no steps")
    built = []
    for build in (case.cls, lambda params, **kwargs: loop(case, params, **kwargs)):
        params = make_params([(3, 4)] * 4, device, DTYPES[dtype])
        built.append(build([{"params": params[:2]}, {"params": params[2:], "lr": 0.05}], **usual(case, lr=0.01)))
    ours, stock = built
    if dtype == "float32":
        train([ours, stock], 1)
    else:
        # the first step of those that do not share yet is not rounded as torch's is
        ours.param_groups[0]["foreach"] = ours.param_groups[1]["foreach"] = False
        train([ours, stock], 1)
        ours.param_groups[0]["foreach"] = ours.param_groups[1]["foreach"] = None
    for optimizer in (ours, stock):
        share(optimizer, *shared_of(optimizer))
    if dtype == "float32":
        # from numbers that are the same to the bit
        for mine, theirs in zip(params_of(ours), params_of(stock), strict=True):
            theirs.data.copy_(mine)
            for name, value in ours.state[mine].items():
                stock.state[theirs][name].copy_(value)
    assert reasons(ours) == {"shares memory with another parameter": 2}
    for step in range(1, 4):
        train([ours, stock], 1, first=step, skip=[0] if step == 2 else [])
        assert_shared_are_equal(ours, stock)
    if dtype == "float32":
        assert_same(ours, stock)


@pytest.mark.parametrize("size", [5, 5000], ids=["small", "large"])
@each_case_thinly
def test_parameters_become_shared_between_steps(case: Case, size: int, device: torch.device) -> None:
    """Beneath tensors that stay the same objects: weights are tied by ``.data``."""
    if INTERPRETED and size > 5:
        pytest.skip("takes the interpreter long")
    ours, stock, _ = twins(case, make_params([(size,)] * 6, device), usual(case, lr=0.01))
    train([ours, stock], 2)
    for optimizer in (ours, stock):
        params_of(optimizer)[4].data = params_of(optimizer)[2].data
    train([ours, stock], 2, first=2)
    assert_same(ours, stock)


@each_case_thinly
def test_views_of_one_storage_share_nothing(case: Case, device: torch.device) -> None:
    """Parameters that lie side by side, as flattened models have them, are updated together."""
    memory = _numbers(device, torch.float32, (40,))
    twin = memory.clone()
    cuts = [(0, 8), (8, 20), (20, 21), (21, 40)]
    ours = case.cls([Parameter(memory[a:b]) for a, b in cuts], **usual(case))
    stock = loop(case, [Parameter(twin[a:b]) for a, b in cuts], **usual(case))
    assert reasons(ours) == {}
    train([ours, stock], 3, skip=[2])
    train([ours, stock], 2, first=3)
    assert_same(ours, stock)
    torch.testing.assert_close(memory, twin, **CLOSE[torch.float32])


# by processes

STEPS = 3


def put_in_shared_memory(optimizer: Optimizer, case: Case) -> None:
    """Before the first step, as A3C's SharedAdam does in its ``__init__``, with step counts of shape (1,)."""
    rule, group = case.cls.rule, optimizer.param_groups[0]
    for param in params_of(optimizer):
        state = optimizer.state[param]
        for name in rule.scalars:
            state[name] = torch.tensor([rule.new_scalar(name, group)]).share_memory_()
        for name in case.state_names(param, **usual(case)):
            state[name] = rule.new_state(name, param, group, optimizer.defaults).share_memory_()


def share_after_a_step(optimizer: Optimizer, case: Case) -> None:
    """What the first step has made."""
    train([optimizer], 1, first=50)
    for state in optimizer.state.values():
        for value in state.values():
            value.share_memory_()


def share_by_method(optimizer: Any, case: Case) -> None:
    """Adagrad has one, for its sums."""
    optimizer.share_memory()


SHARED = [(case, share) for case in CASES for share in (put_in_shared_memory, share_after_a_step)]
SHARED += [(case, share_by_method) for case in CASES if hasattr(case.cls, "share_memory")]


def shared_pair(case: Case, share: Callable[[Any, Case], None]) -> tuple[Optimizer, Optimizer]:
    """Ours and torch's loop, with parameters and states in shared memory."""
    pair = []
    for build in (case.cls, lambda params, **kwargs: loop(case, params, **kwargs)):
        params = [param.share_memory_() for param in make_params([(5,), (3, 4)] * 5)]
        optimizer = build([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}], **usual(case, lr=0.01))
        share(optimizer, case)
        pair.append(optimizer)
    return pair[0], pair[1]


def addresses(optimizer: Optimizer) -> list[int]:
    return [value.data_ptr() for state in optimizer.state.values() for value in state.values()]


def work(rank: int, turns: Any, pairs: list[tuple[Optimizer, Optimizer]]) -> None:
    """A worker's steps, in turn with the other's."""
    torch.set_num_threads(1)
    try:
        for step in range(STEPS):
            assert turns[rank].acquire(timeout=60)
            for pair in pairs:
                train(pair, 1, first=10 * step + rank)
            turns[1 - rank].release()
    except BaseException:
        # the other one need not wait
        for _ in range(STEPS):
            turns[1 - rank].release()
        raise


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_workers_in_turn(method: str) -> None:
    """Each finds what the other has left, as with stock: parameters, states, step counts, which stay where they are."""
    pairs = [shared_pair(case, share) for case, share in SHARED]
    context: Any = multiprocessing.get_context(method)
    turns = [context.Semaphore(1), context.Semaphore(0)]
    workers = [context.Process(target=work, args=(rank, turns, pairs), daemon=True) for rank in range(2)]
    for worker in workers:
        worker.start()
    # what a process is started with is put in shared memory too
    before = [addresses(ours) for ours, _ in pairs]
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    for (case, share), (ours, stock), where in zip(SHARED, pairs, before, strict=True):
        counts = [state["step"].item() for state in ours.state.values()] if "step" in case.cls.rule.scalars else []
        expected = {put_in_shared_memory: [2 * STEPS], share_after_a_step: [1 + 2 * STEPS]}
        assert {*counts} <= {*expected.get(share, counts)}, case.name
        # what another process has counted is counted on here
        for steps in (0, 2):
            train([ours, stock], steps, first=70)
            assert_same(ours, stock, {"rtol": 1e-5, "atol": 1e-6})
        assert addresses(ours) == where, case.name
