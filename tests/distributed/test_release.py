"""Released gradients of two gloo ranks: with fully_shard the numbers of the same ranks without; DDP is refused."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import optimx
from tests.distributed import ranks
from tests.distributed.engines import fsdp1, full, local, loss_of, net, tensor_parallel

pytestmark = pytest.mark.filterwarnings("ignore")

WORLD, STEPS = 2, 4
#: Of the network's 700 bytes: parts of some parameters.
BUCKET_MB = 0.00015


def model_of(**kwargs: Any) -> nn.Module:
    """A network whose layers are sharded one by one."""
    model, mesh = net(), init_device_mesh("cpu", (WORLD,))
    for layer in (model.a, model.b, model.c):
        fully_shard(layer, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def trained(
    rank: int, make: Any, how: str | None, model: nn.Module, accumulates: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters, and a state of each, after some steps; gradients are released in some way, or not."""
    optimizer = make(model.parameters())
    release = None
    if how is not None:
        norm = "previous" if how == "previous" else "exact"
        release = optimx.release_gradients(optimizer, BUCKET_MB, norm=norm)
    for step in range(STEPS):
        if how == "measured":
            with release.measure():
                loss_of(model, step, rank).backward()
        if accumulates:
            with nullcontext() if release is None else release.accumulate():
                loss_of(model, step + 10, rank).backward()
        loss_of(model, step, rank).backward()
        n_grads = sum(param.grad is not None for param in model.parameters())
        if release is not None and how != "kept" and (how != "previous" or step):
            # only those of which no bucket is complete
            assert n_grads < len([*model.parameters()]) / 2
        optimizer.step()
        optimizer.zero_grad()
    params = [*model.parameters()]
    states = [full(next(v for v in optimizer.state[p].values() if v.dim())) for p in params if p in optimizer.state]
    return [full(p) for p in params], states


ADAMW = partial(optimx.AdamW, lr=1e-2)
MAKERS: dict[str, Any] = {
    "adamw": ADAMW,
    "adamw-stochastic": partial(optimx.AdamW, lr=1e-2, state_dtype="stochastic"),
    "lamb": partial(optimx.LAMB, lr=1e-2),
    "adafactor": partial(optimx.Adafactor, lr=1e-2),
    "clipped": partial(optimx.AdamW, lr=1e-2, max_grad_norm=0.1),
}
#: How gradients of each are released.
WAYS = {
    "adamw": ["released", "accumulated"], "adamw-stochastic": ["released"], "lamb": ["released"],
    "adafactor": ["released"], "clipped": ["kept", "measured", "previous"],
}  # fmt: skip


def both(rank: int, name: str, how: str) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    accumulates = how == "accumulated"
    return (
        *trained(rank, MAKERS[name], how, model_of(), accumulates),
        *trained(rank, MAKERS[name], None, model_of(), accumulates),
    )


def offloaded(rank: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    policy = CPUOffloadPolicy(pin_memory=False)
    return (
        *trained(rank, ADAMW, "released", model_of(offload_policy=policy)),
        *trained(rank, ADAMW, None, model_of(offload_policy=policy)),
    )


def refused(rank: int, engine: Any) -> str:
    """What is said where hooks would see a part of a gradient."""
    optimizer = engine(rank, ADAMW).optimizer
    with pytest.raises(ValueError, match="parameters should be DTensors") as error:
        optimx.release_gradients(optimizer)
    assert optimizer._release is None
    return str(error.value)


def ddp(rank: int) -> str:
    model = DDP(net())
    with pytest.raises(ValueError, match="DistributedDataParallel") as error:
        optimx.release_gradients(ADAMW(model.parameters()))
    return str(error.value)


def own_parameters(rank: int) -> list[Tensor]:
    """A stage of a pipeline: nobody else has these gradients."""
    model = net()
    optimizer = ADAMW(model.parameters())
    optimx.release_gradients(optimizer, BUCKET_MB, local=True)
    for step in range(STEPS):
        loss_of(model, step, None).backward()
        assert model.d.weight.grad is None or model.c.weight.grad is None
        optimizer.step()
    return [local(p).detach() for p in model.parameters()]


CHECKS: dict[str, ranks.Check] = {
    **{f"{name}-{how}": partial(both, name=name, how=how) for name, ways in WAYS.items() for how in ways},
    "offloaded": offloaded,
}
REFUSED: dict[str, ranks.Check] = {
    "ddp": ddp, "fsdp1": partial(refused, engine=fsdp1), "tensor_parallel": partial(refused, engine=tensor_parallel),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> ranks.Results:
    return ranks.run({**CHECKS, **REFUSED, "own": own_parameters}, WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_fully_shard(name: str, results: ranks.Results) -> None:
    """Bit by bit, where no sum over several tensors is in another order."""
    for params, states, plain_params, plain_states in results[name]:
        for mine, theirs in zip([*params, *states], [*plain_params, *plain_states], strict=True):
            if name == "clipped-previous":
                assert mine.isfinite().all()
            elif name.startswith(("lamb", "adafactor", "clipped-measured")):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
            else:
                assert torch.equal(mine, theirs)


def test_the_previous_norm_clips_otherwise(results: ranks.Results) -> None:
    for params, _, plain, _ in results["clipped-previous"]:
        assert not all(map(torch.equal, params, plain))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, results: ranks.Results) -> None:
    assert all("DTensors" in text for text in results[name])


def test_own_parameters(results: ranks.Results) -> None:
    model = net()
    optimizer = ADAMW(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    for params in results["own"]:
        # ranks have one thread
        torch.testing.assert_close(params, [p.detach() for p in model.parameters()], rtol=1e-5, atol=1e-6)
