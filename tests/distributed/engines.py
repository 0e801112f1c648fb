"""Ways to spread a model over ranks, each of which trains as one process does on the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel as DDP

ROWS = 4

Make = Callable[..., Any]


class Net(nn.Module):
    """Rows of 8, 3 and 1: shards of two or four ranks are even, uneven and empty."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(10, 8)
        self.norm = nn.LayerNorm(8)
        self.b = nn.Linear(8, 8)
        self.c = nn.Linear(8, 3)
        self.d = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.a(x)))
        return self.d(torch.tanh(self.c(torch.tanh(self.b(x)))))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def loss_of(model: nn.Module, step: int, rank: int | None = None, world: int | None = None) -> Tensor:
    """Loss of a rank's rows; None: of all rows. There are as many for any number of ranks, which is all by default."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(4 * ROWS, 10, generator=generator), torch.randn(4 * ROWS, 1, generator=generator) * 5
    own = slice(None) if rank is None else slice(rank, None, world or dist.get_world_size())
    return (model(x[own]) - y[own]).square().mean()


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@dataclass
class Trained:
    """A model over ranks.

    Attributes:
        optimizer: Of optimx.
        loss: Of a step, in this process.
        params: The whole parameters at the end.
        stepped: What the loop calls ``step`` of, where it is not the optimizer.
        model: Whose state dict torch's engines make.
    """

    optimizer: Any
    loss: Callable[[int], Tensor]
    params: Callable[[], list[Tensor]]
    stepped: Any = None
    model: Any = None


def of_model(model: nn.Module, make: Make, rank: int | None, **kwargs: Any) -> Trained:
    optimizer, params = make(model.parameters(), **kwargs), model.parameters
    return Trained(optimizer, lambda step: loss_of(model, step, rank), lambda: [*map(full, params())], model=model)


def one_process(rank: int, make: Make) -> Trained:
    """The whole batch, and no process group."""
    return of_model(net(), make, None)


def ddp(rank: int, make: Make) -> Trained:
    return of_model(DDP(net()), make, rank)


def fsdp2(rank: int, make: Make) -> Trained:
    model = net()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.a, mesh=mesh)
    return of_model(fully_shard(model, mesh=mesh), make, rank)


def fsdp2_offloaded(rank: int, make: Make) -> Trained:
    """Parameters, gradients and states are on the CPU, wherever the layers are computed."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return of_model(fully_shard(net(), mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False)), make, rank)


def hsdp(rank: int, make: Make) -> Trained:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return of_model(fully_shard(net(), mesh=mesh), make, rank)


def tensor_parallel(rank: int, make: Make) -> Trained:
    """Two layers are cut, the others are plain parameters that all ranks have."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(net(), mesh, {"b": ColwiseParallel(), "c": RowwiseParallel()})
    return of_model(model, make, None)


def sequence_parallel(rank: int, make: Make) -> Trained:
    """Gradients of the norm are partial sums on replicated parameters."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {
        "a": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0), use_local_output=False),
        "norm": SequenceParallel(sequence_dim=0),
        "b": ColwiseParallel(input_layouts=Shard(0)),
        "c": RowwiseParallel(),
    }
    return of_model(parallelize_module(net(), mesh, plan), make, None)


def fsdp2_of_tensor_parallel(rank: int, make: Make) -> Trained:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(net(), mesh["tensor"], {"b": ColwiseParallel(), "c": RowwiseParallel()})
    model = fully_shard(model, mesh=mesh["data"])
    rank, world = mesh.get_local_rank("data"), mesh.size(0)
    params = [*model.parameters()]
    loss, whole = (lambda step: loss_of(model, step, rank, world)), (lambda: [*map(full, params)])
    return Trained(make(params), loss, whole, model=model)


def fsdp1(rank: int, make: Make) -> Trained:
    model = FSDP(net(), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = make(model.parameters(), norm_group=dist.group.WORLD)

    def params() -> list[Tensor]:
        with FSDP.summon_full_params(model):
            return [p.detach().clone() for p in model.parameters()]

    return Trained(optimizer, lambda step: loss_of(model, step, rank), params)


def zero(rank: int, make: Make) -> Trained:
    """Every rank updates some of the parameters."""
    model = DDP(net())
    stepped = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=make.func, norm_group=dist.group.WORLD, **make.keywords
    )  # fmt: skip
    return Trained(
        stepped.optim, lambda step: loss_of(model, step, rank), lambda: [*map(full, model.parameters())], stepped
    )


def pipeline(rank: int, make: Make) -> Trained:
    """Every rank has layers of its own; here it computes those of others, too, and does not train them."""
    model = net()
    params = [*model.parameters()]
    own = [p for i, p in enumerate(params) if i % dist.get_world_size() == rank]

    def loss(step: int) -> Tensor:
        # what the other stages have become
        for i, param in enumerate(params):
            dist.broadcast(param.detach(), src=i % dist.get_world_size())
        return loss_of(model, step)

    def whole() -> list[Tensor]:
        loss(0)
        return [*map(full, params)]

    return Trained(make(own, norm_group=dist.group.WORLD), loss, whole)


def told_the_norm(rank: int, make: Make) -> Trained:
    """Flat shards whose norm somebody else has measured."""
    trained = pipeline(rank, lambda own, norm_group: make(own))
    params = [p for group in trained.optimizer.param_groups for p in group["params"]]

    def loss(step: int) -> Tensor:
        value = trained.loss(step)
        if trained.optimizer.max_grad_norm is not None:
            # the scale of this loss is 1
            grads = torch.autograd.grad(value, params, retain_graph=True)
            square = sum(grad.double().square().sum() for grad in grads)
            dist.all_reduce(square)
            trained.optimizer.total_norm = square.sqrt()
        return value

    return Trained(trained.optimizer, loss, trained.params)


#: All of them.
ENGINES: dict[str, Callable[[int, Make], Trained]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "fsdp2_offloaded": fsdp2_offloaded,
    "hsdp": hsdp,
    "tensor_parallel": tensor_parallel,
    "sequence_parallel": sequence_parallel,
    "fsdp2_tensor_parallel": fsdp2_of_tensor_parallel,
    "fsdp1": fsdp1,
    "zero": zero,
    "pipeline": pipeline,
    "total_norm": told_the_norm,
}


def named_states(optimizer: Any, params: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    return [{name: full(value) for name, value in optimizer.state[p].items()} for p in params]
