"""Every way to spread a model over ranks ends where one process with the whole batch does: one norm, one skip."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import optimx
from tests.conftest import INTERPRETED
from tests.distributed import ranks
from tests.distributed.engines import ENGINES, Trained, fsdp2, full, local, loss_of, named_states, net

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.interpreted]

WORLDS, STEPS, BAD_STEP, SCALE, CLIP = (2, 4), 4, 1, 1024.0, 0.5
ORDERS = (1.0, 2.0, 3.0, torch.inf)
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
    "ScheduleFreeAdamW": {"lr": 1e-2, "warmup_steps": 2},
    "ScheduleFreeSGD": {"lr": 1e-1},
    "Adafactor": {"lr": 1e-2},
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


def whole_tensors(rank: int, name: str) -> dict[str, Any]:
    """Under AMP, for algorithms whose parts of a tensor depend on each other; the last rank's gradient is infinite."""
    trained = fsdp2(rank, partial(getattr(optimx, name), **BY_PARTS[name], max_grad_norm=CLIP))
    return train(trained, amp=True, is_bad=rank == dist.get_world_size() - 1)


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


def clip_function(rank: int, norm_type: float) -> tuple[float, list[Tensor]]:
    """DTensors, empty shards and plain parameters in one call."""
    trained = ENGINES["tensor_parallel"](rank, partial(optimx.SGD, lr=0.0))
    trained.loss(0).backward()
    params = params_of(trained.optimizer)
    norm = optimx.clip_grad_norm_(params, CLIP, norm_type)
    assert type(norm) is Tensor
    return float(norm), [full(p.grad) for p in params]


def disagreements(rank: int) -> list[str]:
    """What is refused, on the last rank."""
    world = dist.get_world_size()
    first, all_ranks = DeviceMesh("cpu", [0]), init_device_mesh("cpu", (world,))
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    sharded = distribute_tensor(torch.ones(3), all_ranks, [Shard(0)])
    told = optimx.SGD([param], lr=1.0)
    told.total_norm = torch.ones(())
    elsewhere = optimx.SGD(
        [param, nn.Parameter(distribute_tensor(torch.ones(3), first, [Shard(0)]))], max_grad_norm=1.0
    )
    calls = [
        told.step,
        lambda: optimx.get_total_norm([param], 0.0, group=dist.group.WORLD),
        lambda: optimx.get_total_norm([sharded], foreach=True, group=dist.group.WORLD),
        elsewhere.step,
    ]
    found = []
    # the first rank may do all this, but for the others
    for call in calls if rank == world - 1 else ():
        with pytest.raises((RuntimeError, ValueError)) as raised:
            call()
        found.append(str(raised.value))
    assert torch.equal(param.detach(), torch.ones(3))
    return found


def gathered_norm(rank: int) -> list[float]:
    """A norm that is a DTensor, as torch's function returns it, is told to a step and to a function."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    param = nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Shard(0)]))
    param.grad = distribute_tensor(torch.full((8,), 3.0), mesh, [Shard(0)])
    optimizer = optimx.SGD([param], lr=1.0, max_grad_norm=1.0)
    for norm in (nn.utils.get_total_norm([param.grad]), optimx.get_total_norm([param.grad], foreach=True)):
        assert isinstance(norm, DTensor)
        optimizer.total_norm = norm
        optimizer.step()
    optimx.clip_grads_with_norm_([param], 1.0, nn.utils.get_total_norm([param.grad]))
    return [*full(param).tolist(), *full(param.grad).tolist()]


def explained(rank: int) -> str:
    """One rank may ask; gradients that are partial sums do not make it wait for the others."""
    trained = ENGINES["sequence_parallel"](rank, partial(optimx.AdamW, **ADAMW))
    trained.loss(0).backward()
    return str(optimx.explain(trained.optimizer)) if rank == 0 else ""


#: Engine, clip, and whether it is under AMP: not where all ranks have the same gradients, or the scale is in a norm
#: that was measured elsewhere. FSDP1 under a scaler is in test_scaler.
ON_ENGINES = [
    (name, clip, amp)
    for name in ENGINES for clip in (None, CLIP) for amp in (False, True)
    if not (amp and name in ("ddp", "total_norm", "fsdp1")) and (clip or name != "total_norm")
]  # fmt: skip

CHECKS: dict[str, ranks.Check] = {
    **{f"{name}-{clip}-{amp}": partial(engine, name=name, clip=clip, amp=amp) for name, clip, amp in ON_ENGINES},
    "mixed": mixed,
    "refused": disagreements,
    "gathered_norm": gathered_norm,
    "explained": explained,
}
#: What four ranks are enough for.
ON_FOUR: dict[str, ranks.Check] = {
    **{f"{name}-amp": partial(whole_tensors, name=name) for name in ("LAMB", "Adafactor")},
    **{f"{name}-{clip}": partial(by_parts, name=name, clip=clip) for name in BY_PARTS for clip in (None, CLIP)},
    **{
        f"collectives-{clip}-{missing}": partial(collectives, clip=clip, missing=missing)
        for clip in (None, CLIP) for missing in (False, True)
    },
    **{f"clip-{norm_type}": partial(clip_function, norm_type=norm_type) for norm_type in ORDERS},
}  # fmt: skip
#: The interpreter, a millisecond a program, tries what kernels see of them.
_INTERPRETED = {
    "fsdp2-0.5-True", "tensor_parallel-0.5-True", "pipeline-0.5-True", "total_norm-0.5-False", "mixed", "SGD-0.5",
    *(f"collectives-{clip}-{missing}" for clip in (None, CLIP) for missing in (False, True)), "clip-2.0",
    "refused", "gathered_norm", "explained", "LAMB-amp", "Adafactor-amp",
}  # fmt: skip


def checks_of(world: int) -> dict[str, ranks.Check]:
    """What so many ranks try."""
    checks = {**CHECKS, **ON_FOUR} if world == 4 else CHECKS
    return {name: check for name, check in checks.items() if not INTERPRETED or name in _INTERPRETED}


def tried(values: Iterable[Any]) -> list[Any]:
    """Values, by which a test is parametrized, of checks that are tried: their names begin with them."""
    names = {*checks_of(4)}
    joined = ["-".join(map(str, value if isinstance(value, tuple) else (value,))) for value in values]
    return [value for value, name in zip(values, joined, strict=True) if name in names]


@pytest.fixture(scope="module")
def on(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], ranks.Results]:
    """What so many ranks found."""
    return cache(lambda world: ranks.run(checks_of(world), world, tmp_path_factory.mktemp("ranks")))


@pytest.fixture(scope="module")
def four(on: Callable[[int], ranks.Results]) -> ranks.Results:
    return on(4)


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


@pytest.mark.parametrize("world", WORLDS[INTERPRETED:])
@pytest.mark.parametrize(("name", "clip", "amp"), tried(ON_ENGINES))
def test_ends_where_one_process_does(
    name: str, clip: float | None, amp: bool, world: int, on: Callable[[int], ranks.Results]
) -> None:
    steps = [step for step in range(STEPS) if not (amp and step == BAD_STEP)]
    params, _, norms = in_one_process("AdamW", ADAMW, clip, steps)
    results = on(world)[f"{name}-{clip}-{amp}"]
    for result in results:
        # gradients are added in another order
        torch.testing.assert_close(result["params"], params, rtol=1e-4, atol=1e-5)
        if clip is not None:
            # the same number everywhere
            assert all(result["norms"][step] == results[0]["norms"][step] for step in steps)
            assert [result["norms"][step] for step in steps] == pytest.approx(norms, rel=1e-4)
        if amp:
            assert result["scale"] == SCALE / 2
            assert result["moves"] == [step != BAD_STEP for step in range(STEPS)]


def test_ranks_of_different_backends(four: ranks.Results) -> None:
    params, _, norms = in_one_process("AdamW", ADAMW, CLIP, [*range(STEPS)])
    for result in four["mixed"]:
        torch.testing.assert_close(result["params"], params, rtol=1e-4, atol=1e-5)
        assert result["norms"] == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize(("name", "clip"), tried([(name, clip) for name in BY_PARTS for clip in (None, CLIP)]))
def test_parts_of_dtensors(name: str, clip: float | None, four: ranks.Results) -> None:
    params, states, norms = in_one_process(name, BY_PARTS[name], clip, [*range(STEPS)])
    for result in four[f"{name}-{clip}"]:
        torch.testing.assert_close(result["params"], params, rtol=1e-3, atol=1e-4)
        for mine, expected in zip(result["states"], states, strict=True):
            assert mine.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(mine[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
        assert clip is None or result["norms"] == pytest.approx(norms, rel=1e-4)
        assert not any(result["reasons"]), result["reasons"]
        assert "parts of DTensors: S(0) over" in result["shown"]


@pytest.mark.parametrize("name", ["LAMB", "Adafactor"])
def test_parts_of_a_tensor_skip_together(name: str, four: ranks.Results) -> None:
    params, _, _ = in_one_process(name, BY_PARTS[name], CLIP, [step for step in range(STEPS) if step != BAD_STEP])
    for result in four[f"{name}-amp"]:
        torch.testing.assert_close(result["params"], params, rtol=1e-3, atol=1e-4)
        assert result["moves"] == [step != BAD_STEP for step in range(STEPS)]


def test_one_collective_whatever_a_rank_has(four: ranks.Results) -> None:
    for missing in (False, True):
        assert [seen for seen, _, _ in four[f"collectives-None-{missing}"]] == [[]] * 4
        clipped = four[f"collectives-{CLIP}-{missing}"]
        assert [seen for seen, _, _ in clipped] == [[((2,), "torch.float64")]] * 4
        assert len({norm for _, _, norm in clipped}) == 1


@pytest.mark.parametrize("norm_type", [order for _, order in tried([("clip", p) for p in ORDERS])])
def test_clip_grad_norm_of_dtensors_and_others(norm_type: float, four: ranks.Results) -> None:
    model = net()
    loss_of(model, 0).backward()
    expected = nn.utils.clip_grad_norm_(model.parameters(), CLIP, norm_type)
    for norm, grads in four[f"clip-{norm_type}"]:
        assert norm == pytest.approx(float(expected), rel=1e-5)
        torch.testing.assert_close(grads, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-6)


def test_what_is_refused(four: ranks.Results) -> None:
    given_norm, norm_type, foreach, elsewhere = four["refused"][-1]
    assert "total_norm should be None without max_grad_norm" in given_norm
    assert "norm_type should be > 0" in norm_type
    assert "foreach should be None with a group" in foreach
    assert "some are on others only" in elsewhere


def test_norms_that_are_dtensors(four: ranks.Results) -> None:
    norm = 3.0 * 8**0.5
    for found in four["gathered_norm"]:
        assert found == pytest.approx([1.0 - 2 * 3.0 / norm] * 8 + [3.0 / norm] * 8)


def test_one_rank_explains(four: ranks.Results) -> None:
    assert "R over 4 ranks" in four["explained"][0]
