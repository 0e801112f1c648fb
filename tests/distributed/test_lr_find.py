"""The learning-rate finder on two gloo ranks: one curve, one end, and every rank's part is put back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import optimx
from tests.distributed import ranks
from tests.distributed.engines import local

pytestmark = pytest.mark.filterwarnings("ignore")

WORLD, STEPS = 2, 20
#: The step in which the loss of one rank explodes.
BAD_STEP = 12


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def data_parallel(rank: int) -> tuple[list[float], float]:
    """Losses of the sweep, and this rank's first loss."""
    model = DDP(net())
    optimizer = optimx.AdamW(model.parameters(), lr=1e-3)
    own: list[float] = []

    def closure() -> Tensor:
        factor = 1e4 if len(own) == BAD_STEP and rank == 1 else 1.0
        loss = (1 + model(torch.full((3, 4), rank + 1.0)).square().mean()) * factor
        own.append(loss.item())
        return loss

    curve = optimx.lr_find(model, optimizer, closure, steps=STEPS, process_group=dist.group.WORLD)
    assert curve.stopped is not None
    return curve.losses, own[0]


def sharded(rank: int) -> bool:
    """Whether training ends where it ends without a sweep, in every rank's part."""
    ends = []
    for swept in (False, True):
        model = fully_shard(net(), mesh=init_device_mesh("cpu", (WORLD,)))
        optimizer = optimx.AdamW(model.parameters(), lr=1e-2, max_grad_norm=0.1)

        def closure(model: nn.Module = model) -> Tensor:
            return model(torch.ones(3, 4)).square().mean()

        for step in range(4):
            if swept and step in (0, 2):
                optimx.lr_find(model, optimizer, closure, steps=STEPS, process_group=dist.group.WORLD)
            optimizer.zero_grad()
            closure().backward()
            optimizer.step()
        ends.append([local(p).detach().clone() for p in model.parameters()])
    return all(map(torch.equal, *ends))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> ranks.Results:
    folder: Path = tmp_path_factory.mktemp("lr_find")
    return ranks.run({"ddp": data_parallel, "fsdp2": sharded}, WORLD, folder)


def test_losses_are_means_over_the_ranks(results: ranks.Results) -> None:
    (first, own), (second, other) = results["ddp"]
    assert first == second
    assert own != other
    assert first[0] == pytest.approx((own + other) / 2)


def test_all_ranks_stop_where_one_explodes(results: ranks.Results) -> None:
    assert [len(losses) for losses, _ in results["ddp"]] == [BAD_STEP + 1] * WORLD


def test_shards_are_put_back(results: ranks.Results) -> None:
    assert results["fsdp2"] == [True, True]
