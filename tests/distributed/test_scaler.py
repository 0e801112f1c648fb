"""GradScaler where every rank sees its own part of the gradients: one bad part, and both of two gloo ranks skip."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel as DDP

import optimx
from tests.distributed import ranks
from tests.distributed.engines import local, loss_of, net
from tests.engine import params_of

pytestmark = pytest.mark.filterwarnings("ignore")

WORLD, STEPS = 2, 4
SCALE = 1024.0
#: The step in which one rank finds an infinite gradient, and nobody else does.
BAD_STEP = 1
#: Whether a step moved the parameters, and the scale after it.
ONE_SKIPPED = [(True, SCALE), (False, SCALE / 2), (True, SCALE / 2), (True, SCALE / 2)]

#: What happened step by step, and the whole parameters at the end, where there is such a thing.
Result = tuple[list[tuple[bool, float]], list[Tensor]]


def train(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loss: Callable[[int], Tensor],
    is_bad: bool,
    clip: Callable[[], Any] | None = None,
) -> list[tuple[bool, float]]:
    """The documented loop; in one step a gradient is spoilt on the rank that ``is_bad``."""
    record = []
    for step in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(loss(step)).backward()
        if step == BAD_STEP and is_bad:
            grads = [local(p.grad) for p in params_of(optimizer) if p.grad is not None]
            next(grad for grad in grads if grad.numel()).view(-1)[0] = torch.inf
        before = [local(p).detach().clone() for p in params_of(optimizer)]
        if clip is not None:
            scaler.unscale_(optimizer)
            clip()
        scaler.step(optimizer)
        if type(scaler) is optimx.GradScaler:
            assert bool(optimizer.step_was_skipped) is (step == BAD_STEP), f"step_was_skipped is wrong in step {step}"
        scaler.update()
        moved = not all(torch.equal(local(p), old) for p, old in zip(params_of(optimizer), before, strict=True))
        record.append((moved, scaler.get_scale()))
    return record


def fsdp1(
    rank: int, scaler_cls: type, clip: float | None = None, use_orig_params: bool = True, **kwargs: Any
) -> Result:
    model = FSDP(net(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    optimizer = optimx.AdamW(model.parameters(), lr=1e-2, **kwargs)
    scaler = scaler_cls("cpu", init_scale=SCALE)
    clip_ = clip and partial(model.clip_grad_norm_, clip)
    record = train(optimizer, scaler, lambda step: loss_of(model, step, rank), rank == WORLD - 1, clip_)
    with FSDP.summon_full_params(model):
        return record, [p.detach().clone() for p in model.parameters()]


def fsdp1_of_one_element(rank: int, scaler_cls: type) -> list[float]:
    """The last rank has no parameters, and no gradients, but the others' scale."""
    model = FSDP(nn.Linear(1, 1, bias=False), device_id=torch.device("cpu"), use_orig_params=True)
    scaler = scaler_cls("cpu", init_scale=SCALE)
    optimizer = optimx.AdamW(model.parameters(), lr=1e-2)
    record = train(optimizer, scaler, lambda step: model(torch.ones(2, 1)).square().mean(), rank == 0)
    return [scale for _, scale in record]


def fsdp2(rank: int, scaler_cls: type, clip: float | None = None, **kwargs: Any) -> Result:
    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    optimizer = optimx.AdamW(model.parameters(), lr=1e-2, **kwargs)
    scaler = scaler_cls("cpu", init_scale=SCALE)
    clip_ = clip and partial(nn.utils.clip_grad_norm_, [*model.parameters()], clip)
    record = train(optimizer, scaler, lambda step: loss_of(model, step, rank), rank == WORLD - 1, clip_)
    return record, [p.full_tensor().detach() for p in model.parameters()]


def ddp(rank: int, scaler_cls: type) -> Result:
    """Averaged over the ranks, a gradient is bad on all of them or on none; nobody has to be asked."""
    model = DDP(net())
    optimizer = optimx.AdamW(model.parameters(), lr=1e-2)
    scaler = scaler_cls("cpu", init_scale=SCALE)

    def loss(step: int) -> Tensor:
        return loss_of(model, step, rank) * (torch.inf if step == BAD_STEP and rank == WORLD - 1 else 1.0)

    record = train(optimizer, scaler, loss, is_bad=False)
    return record, [p.detach().clone() for p in model.parameters()]


def stages(rank: int, n_gradients: int = WORLD, **kwargs: Any) -> list[float]:
    """Every rank has parameters of its own, as of a pipeline; those from ``n_gradients`` on get no gradient."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = optimx.AdamW(params, lr=1e-2, **kwargs)
    scaler = optimx.GradScaler("cpu", init_scale=SCALE, process_group=dist.group.WORLD)
    used = params if rank < n_gradients else [nn.Parameter(torch.ones(3))]
    record = train(optimizer, scaler, lambda step: sum(p.sum() for p in used), rank == 0)
    assert [moved for moved, _ in record] == [used is params and step != BAD_STEP for step in range(STEPS)]
    return [scale for _, scale in record]


CLIP = 0.1
#: Of the whole network: whether it ends as in one process that leaves out the bad step.
WHOLE: dict[str, ranks.Check] = {
    "fsdp1-sharded_scaler": partial(fsdp1, scaler_cls=ShardedGradScaler),
    "fsdp1-sharded_scaler-clip": partial(fsdp1, scaler_cls=ShardedGradScaler, clip=CLIP),
    "fsdp1-our_scaler": partial(fsdp1, scaler_cls=optimx.GradScaler),
    "fsdp1-our_scaler-clip": partial(fsdp1, scaler_cls=optimx.GradScaler, clip=CLIP),
    "fsdp1-our_scaler-flat": partial(fsdp1, scaler_cls=optimx.GradScaler, use_orig_params=False),
    "fsdp1-our_scaler-fused": partial(fsdp1, scaler_cls=optimx.GradScaler, fused=True),
    "fsdp2-torchs_scaler": partial(fsdp2, scaler_cls=torch.amp.GradScaler),
    "fsdp2-our_scaler": partial(fsdp2, scaler_cls=optimx.GradScaler),
    "fsdp2-our_scaler-clip": partial(fsdp2, scaler_cls=optimx.GradScaler, clip=CLIP),
    "fsdp2-our_scaler-fused": partial(fsdp2, scaler_cls=optimx.GradScaler, fused=True),
    "ddp-our_scaler": partial(ddp, scaler_cls=optimx.GradScaler),
}
#: Of which only the scales are the ranks' common ones.
PARTS: dict[str, ranks.Check] = {
    "fsdp1-sharded_scaler-empty_rank": partial(fsdp1_of_one_element, scaler_cls=ShardedGradScaler),
    "fsdp1-our_scaler-empty_rank": partial(fsdp1_of_one_element, scaler_cls=optimx.GradScaler),
    "process_group": stages,
    "process_group-fused": partial(stages, fused=True),
    "process_group-no_gradients": partial(stages, n_gradients=1),
    "process_group-no_gradients-fused": partial(stages, n_gradients=1, fused=True),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> ranks.Results:
    return ranks.run({**WHOLE, **PARTS}, WORLD, tmp_path_factory.mktemp("ranks"))


def in_one_process(clip: float | None) -> list[Tensor]:
    """Stock on all rows, without the bad step."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in {*range(STEPS)} - {BAD_STEP}:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", WHOLE)
def test_ranks_skip_together(name: str, results: ranks.Results) -> None:
    expected = torch.cat([p.flatten() for p in in_one_process(CLIP if name.endswith("clip") else None)])
    for record, params in results[name]:
        assert record == ONE_SKIPPED
        # halves of a batch are added in another order
        torch.testing.assert_close(torch.cat([p.flatten() for p in params]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PARTS)
def test_ranks_share_a_scale(name: str, results: ranks.Results) -> None:
    assert results[name] == [[scale for _, scale in ONE_SKIPPED]] * WORLD
