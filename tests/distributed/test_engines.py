"""Every way to spread a model over ranks ends where one process with the whole batch does: one norm, one skip."""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

import optimx
from tests.conftest import INTERPRETED
from tests.distributed.engines import ENGINES, Trained, fsdp2, full, local, loss_of, named_states, net

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.interpreted]

WORLDS, STEPS, BAD_STEP, SCALE, CLIP = (2, 4), 4, 1, 1024.0, 0.5
ADAMW: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}

#: Optimizers that update the parts of a DTensor, and what is theirs in torch.
BY_PARTS: dict[str, dict[str, Any]] = {
    "Adam": {"lr": 1e-2, "amsgrad": True},
    "AdamW": ADAMW,
    "SGD": {"lr": 1e-2, "momentum": 0.9, "dampening": 0.5},
    "RMSprop": {"lr": 1e-3, "centered": True},
    "Adagrad": {"lr": 1e-2},
    "Adadelta": {"lr": 0.1},
    "Adamax": {"lr": 1e-2},
    "NAdam": {"lr": 1e-2},
    "RAdam": {"lr": 1e-2},
    "Rprop": {"lr": 1e-2},
    "ASGD": {"lr": 1e-2},
    "Lion": {"lr": 1e-3},
    "LAMB": {"lr": 1e-2},
}


def params_of(optimizer: Any) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def train(trained: Trained, *, amp: bool = False, is_bad: bool = False) -> dict[str, Any]:
    """The documented loop. With ``amp`` one rank finds an infinite gradient in one step."""
    optimizer, stepped = trained.optimizer, trained.stepped or trained.optimizer
    scaler = optimx.GradScaler("cpu", init_scale=SCALE, enabled=amp, process_group=optimizer.norm_group)
    norms, moves = [], []
    for step in range(STEPS):
        for param in params_of(stepped):
            param.grad = None
        scaler.scale(trained.loss(step)).backward()
        if is_bad and step == BAD_STEP:
            # not one that other ranks have, too
            grads = sorted((p.grad for p in params_of(stepped) if p.grad is not None), key=lambda g: type(g) is Tensor)
            next(grad for grad in map(local, grads) if grad.numel()).view(-1)[0] = torch.inf
        before = [local(p).detach().clone() for p in params_of(optimizer)]
        scaler.step(stepped)
        scaler.update()
        moves.append(any(not torch.equal(local(p), old) for p, old in zip(params_of(optimizer), before, strict=True)))
        norms.append(None if optimizer.grad_norm is None else float(optimizer.grad_norm))
    return {"params": trained.params(), "norms": norms, "moves": moves, "scale": scaler.get_scale()}


def engine(rank: int, name: str, clip: float | None, amp: bool) -> dict[str, Any]:
    make = partial(optimx.AdamW, **ADAMW, max_grad_norm=clip)
    return train(ENGINES[name](rank, make), amp=amp, is_bad=amp and rank == dist.get_world_size() - 1)


def mixed(rank: int) -> dict[str, Any]:
    """The first rank asks for torch's step, the others have their own."""
    return train(fsdp2(rank, partial(optimx.AdamW, **ADAMW, max_grad_norm=CLIP, foreach=True if rank == 0 else None)))


def by_parts(rank: int, name: str, clip: float | None) -> dict[str, Any]:
    trained = fsdp2(rank, partial(getattr(optimx, name), **BY_PARTS[name], max_grad_norm=clip))
    result = train(trained)
    result["states"] = named_states(trained.optimizer, params_of(trained.optimizer))
    result["reasons"] = [row.reason for row in optimx.explain(trained.optimizer).rows]
    result["shown"] = str(optimx.explain(trained.optimizer))
    return result


def collectives(rank: int, clip: float | None, missing: bool) -> list[Any]:
    """Shapes and groups of all collectives of a step, where a rank may have no gradient, or not all of them."""
    trained = fsdp2(rank, partial(optimx.AdamW, **ADAMW, max_grad_norm=clip))
    trained.loss(0).backward()
    if missing:
        for i, param in enumerate(params_of(trained.optimizer)):
            if rank == 0 or (rank == 1 and i == 3):
                param.grad = None
    seen: list[Any] = []
    original = dist.all_reduce

    def record(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((tuple(tensor.shape), str(tensor.dtype)))
        return original(tensor, *args, **kwargs)

    dist.all_reduce = record
    try:
        with CommDebugMode() as mode:
            trained.optimizer.step()
    finally:
        dist.all_reduce = original
    norm = trained.optimizer.grad_norm
    return [seen, mode.get_total_counts(), None if norm is None else float(norm)]


def checkpoint(rank: int, ours_first: bool) -> list[bool]:
    """Half of a training each, ours and stock's, beside all of it: DCP's state dicts go both ways."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    makes = [partial(optimx.AdamW, **ADAMW), partial(torch.optim.AdamW, **ADAMW, foreach=True)]
    models = [net() for _ in range(3)]
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for model in models:
        torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    first, second = makes if ours_first else makes[::-1]
    optimizers = [first(models[0].parameters()), second(models[1].parameters()), makes[1](models[2].parameters())]

    def steps(i: int, which: range) -> None:
        for step in which:
            optimizers[i].zero_grad()
            loss_of(models[i], step, rank).backward()
            optimizers[i].step()

    steps(0, range(2))
    of_model, of_optimizer = get_state_dict(models[0], optimizers[0])
    set_state_dict(models[1], optimizers[1], model_state_dict=of_model, optim_state_dict=of_optimizer)
    steps(1, range(2, 4))
    steps(2, range(4))
    return [
        torch.allclose(full(a), full(b), rtol=1e-5, atol=1e-6)
        for a, b in zip(models[1].parameters(), models[2].parameters(), strict=True)
    ]


def clip_function(rank: int, norm_type: float) -> tuple[float, list[Tensor]]:
    """DTensors, empty shards and plain parameters in one call."""
    trained = ENGINES["tensor_parallel"](rank, partial(optimx.SGD, lr=0.0))
    trained.loss(0).backward()
    params = params_of(trained.optimizer)
    norm = optimx.clip_grad_norm_(params, CLIP, norm_type)
    assert type(norm) is Tensor
    return float(norm), [full(p.grad) for p in params]


def disagreements(rank: int) -> list[str]:
    """What a step refuses."""
    found = []
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = optimx.SGD([param], lr=1.0)
    optimizer.total_norm = torch.ones(())
    for call in (optimizer.step, lambda: optimx.get_total_norm([param], 0.0, group=dist.group.WORLD)):
        try:
            call()
        except (RuntimeError, ValueError) as error:
            found.append(str(error))
    assert torch.equal(param.detach(), torch.ones(3))
    return found


CHECKS: dict[str, Callable[[int], Any]] = {
    **{
        f"{name}-{clip}-{amp}": partial(engine, name=name, clip=clip, amp=amp)
        for name in ENGINES for clip in (None, CLIP) for amp in (False, True)
        if not (amp and name in ("ddp", "total_norm", "fsdp1")) and (clip or name != "total_norm")
    },
    **{f"{name}-{clip}": partial(by_parts, name=name, clip=clip) for name in BY_PARTS for clip in (None, CLIP)},
    **{
        f"collectives-{clip}-{missing}": partial(collectives, clip=clip, missing=missing)
        for clip in (None, CLIP) for missing in (False, True)
    },
    **{f"checkpoint-{first}": partial(checkpoint, ours_first=first) for first in (False, True)},
    **{f"clip-{norm_type}": partial(clip_function, norm_type=norm_type) for norm_type in (1.0, 2.0, 3.0, torch.inf)},
    "refused": disagreements,
    "mixed": mixed,
}  # fmt: skip

#: Two ranks try the engines alone; the interpreter, a millisecond a program, what kernels see of them.
_IN_FEW = {
    "refused",
    "mixed",
    *(f"{name}-{clip}-{amp}" for name in ENGINES for clip in (None, CLIP) for amp in (False, True)),
}
_INTERPRETED = {
    "fsdp2-0.5-True", "tensor_parallel-0.5-True", "pipeline-0.5-True", "total_norm-0.5-False", "mixed", "SGD-0.5",
    f"collectives-{CLIP}-False", f"collectives-{CLIP}-True", "clip-2.0",
}  # fmt: skip
CHOSEN = {
    world: [
        name
        for name in CHECKS
        if name in (_INTERPRETED if INTERPRETED else _IN_FEW) or (world == 4 and not INTERPRETED)
    ]
    for world in WORLDS
}


def _run_all(rank: int, folder: str, world: int) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for i, name in enumerate(CHOSEN[world]):
        # a new group for each: ranks that one check has left apart meet in the next
        init, timeout = f"file://{folder}/{i}", datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", init, rank=rank, world_size=world, timeout=timeout)
        try:
            results[name] = CHECKS[name](rank)
        except Exception:
            results[name] = traceback.format_exc()
        dist.destroy_process_group()
    torch.save(results, f"{folder}/rank{rank}")


@pytest.fixture(scope="module", params=WORLDS[INTERPRETED:], ids=lambda world: f"{world}ranks")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank has to tell of each check, or the traceback."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_run_all, (str(folder), request.param), nprocs=request.param)
    return [torch.load(folder / f"rank{rank}") for rank in range(request.param)]


def by_rank(results: list[dict[str, Any]], name: str) -> list[Any]:
    if name not in CHOSEN[len(results)]:
        pytest.skip("four ranks try it, natively")
    for rank, result in enumerate(results):
        assert not isinstance(result[name], str), f"rank {rank}: {result[name]}"
    return [result[name] for result in results]


def in_one_process(name: str, kwargs: dict[str, Any], clip: float | None, steps: list[int]) -> tuple[Any, ...]:
    """Stock on all rows (ours where torch has none): parameters, states and norms."""
    model = net()
    cls: Any = getattr(torch.optim, name, None) or getattr(optimx, name)
    optimizer = cls(model.parameters(), **kwargs)
    norms = []
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or torch.inf)))
        optimizer.step()
    params = [*model.parameters()]
    return [*map(full, params)], named_states(optimizer, params), norms


@pytest.mark.parametrize("amp", [False, True], ids=["", "amp"])
@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("name", ENGINES)
def test_ends_where_one_process_does(name: str, clip: float | None, amp: bool, results: list[dict[str, Any]]) -> None:
    if f"{name}-{clip}-{amp}" not in CHECKS:
        pytest.skip("there is no such thing, or test_scaler_sharded tests its scaler")
    steps = [step for step in range(STEPS) if not (amp and step == BAD_STEP)]
    params, _, norms = in_one_process("AdamW", ADAMW, clip, steps)
    ranks = by_rank(results, f"{name}-{clip}-{amp}")
    for result in ranks:
        # gradients are added in another order
        torch.testing.assert_close(result["params"], params, rtol=1e-4, atol=1e-5)
        if clip is not None:
            # the same number everywhere
            assert all(result["norms"][step] == ranks[0]["norms"][step] for step in steps)
            assert [result["norms"][step] for step in steps] == pytest.approx(norms, rel=1e-4)
        if amp:
            assert result["scale"] == SCALE / 2
            assert result["moves"] == [step != BAD_STEP for step in range(STEPS)]


def test_ranks_of_different_backends(results: list[dict[str, Any]]) -> None:
    params, _, norms = in_one_process("AdamW", ADAMW, CLIP, [*range(STEPS)])
    for result in by_rank(results, "mixed"):
        torch.testing.assert_close(result["params"], params, rtol=1e-4, atol=1e-5)
        assert result["norms"] == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("name", BY_PARTS)
def test_parts_of_dtensors(name: str, clip: float | None, results: list[dict[str, Any]]) -> None:
    params, states, norms = in_one_process(name, BY_PARTS[name], clip, [*range(STEPS)])
    for result in by_rank(results, f"{name}-{clip}"):
        torch.testing.assert_close(result["params"], params, rtol=1e-3, atol=1e-4)
        for mine, expected in zip(result["states"], states, strict=True):
            assert mine.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(mine[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
        assert clip is None or result["norms"] == pytest.approx(norms, rel=1e-4)
        whole = name == "LAMB"
        assert any(result["reasons"]) is whole, result["reasons"]
        assert whole or "parts of DTensors: S(0) over" in result["shown"]


def test_one_collective_whatever_a_rank_has(results: list[dict[str, Any]]) -> None:
    for missing in (False, True):
        if not INTERPRETED:
            assert [seen for seen, _, _ in by_rank(results, f"collectives-None-{missing}")] == [[]] * len(results)
        ranks = by_rank(results, f"collectives-{CLIP}-{missing}")
        assert [seen for seen, _, _ in ranks] == [[((2,), "torch.float64")]] * len(results)
        assert len({norm for _, _, norm in ranks}) == 1


@pytest.mark.parametrize("ours_first", [False, True], ids=["from_stock", "to_stock"])
def test_checkpoints_go_both_ways(ours_first: bool, results: list[dict[str, Any]]) -> None:
    assert all(map(all, by_rank(results, f"checkpoint-{ours_first}")))


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, torch.inf])
def test_clip_grad_norm_of_dtensors_and_others(norm_type: float, results: list[dict[str, Any]]) -> None:
    model = net()
    loss_of(model, 0).backward()
    expected = nn.utils.clip_grad_norm_(model.parameters(), CLIP, norm_type)
    for norm, grads in by_rank(results, f"clip-{norm_type}"):
        assert norm == pytest.approx(float(expected), rel=1e-5)
        torch.testing.assert_close(grads, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-6)


def test_what_is_refused(results: list[dict[str, Any]]) -> None:
    for given_norm, norm_type in by_rank(results, "refused"):
        assert "total_norm should be None without max_grad_norm" in given_norm
        assert "norm_type should be > 0" in norm_type
