"""The recipes of docs/sharding.md that need torch alone, as four ranks run them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel as DDP

import optimx
from tests.distributed.engines import full
from tests.distributed.transformer import (
    Transformer,
    apply_tensor_parallel,
    batch,
    cross_entropy,
    in_two_parts,
    loss_of,
    shard,
    transformer,
)

STEPS, CLIP = 4, 0.5
ADAMW: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class OptimizersContainer(torch.optim.Optimizer):
    """Torchtitan's: an optimizer for each part of the model, one flat state dict of all."""

    def __init__(self, model_parts: list[nn.Module], cls: Any, **kwargs: Any) -> None:
        self.model_parts = model_parts
        self.optimizers = [cls(part.parameters(), **kwargs) for part in model_parts]
        super().__init__([param for part in model_parts for param in part.parameters()], kwargs)

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        get = partial(get_optimizer_state_dict, options=FLAT)
        return dict(chain.from_iterable(map(dict.items, map(get, self.model_parts, self.optimizers))))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, optimizer in zip(self.model_parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, optimizer, optim_state_dict=state_dict, options=FLAT)


def train(
    parts: Sequence[nn.Module], rank: int, world: int, step: Callable[[], Any], which: Iterable[int] = range(STEPS)
) -> list[float]:
    """Steps of the model on a rank's rows, and the norms that ``step`` returned."""
    norms = []
    for i in which:
        loss_of(parts, i, rank, world).backward()
        norms.append(float(step()))
    return norms


def stepped(optimizer: Any) -> Tensor:
    """The norm of a step, after which no gradient is left."""
    optimizer.step()
    optimizer.zero_grad()
    return optimizer.grad_norm


def whole(parts: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters in the order of the model of one process."""
    params = {name: full(param) for part in parts for name, param in part.named_parameters()}
    return [params[name] for name, _ in transformer().named_parameters()]


def whole_state(state_dict: dict[str, Any]) -> dict[str, Any]:
    return {name: full(value) if isinstance(value, Tensor) else value for name, value in state_dict.items()}


def spread(parts: list[Transformer]) -> tuple[int, int]:
    """Spread parts over pairs of tensor-parallel ranks, and tell whose of how many ranks' rows are this rank's."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    for part in parts:
        apply_tensor_parallel(part, mesh["tp"])
        shard(part, mesh["dp"])
    return mesh.get_local_rank("dp"), mesh.size(0)


def clipped_in_the_step(rank: int) -> dict[str, Any]:
    model = transformer()
    rank, world = spread([model])
    optimizer = optimx.AdamW(model.parameters(), **ADAMW, max_grad_norm=CLIP)
    norms = train([model], rank, world, lambda: stepped(optimizer))
    return {"params": whole([model]), "norms": norms}


def clipped_by_the_function(rank: int) -> dict[str, Any]:
    """Torchtitan's loop with optimx's function, whose norm is a plain tensor."""
    model = transformer()
    rank, world = spread([model])
    container = OptimizersContainer([model], optimx.AdamW, **ADAMW)

    def step() -> Tensor:
        norm = optimx.clip_grad_norm_(model.parameters(), CLIP)
        assert type(norm) is Tensor
        container.step()
        container.zero_grad()
        return norm

    return {"norms": train([model], rank, world, step), "params": whole([model])}


def parts_of_a_model(rank: int) -> dict[str, Any]:
    """Two parts have one norm; other optimizers go on with the state dict in the middle."""
    parts = in_two_parts()
    rank, world = spread(parts)

    def step() -> Tensor:
        norm = optimx.get_total_norm([p.grad for part in parts for p in part.parameters()])
        for optimizer in container.optimizers:
            optimizer.total_norm = norm
        container.step()
        container.zero_grad()
        return norm

    container = OptimizersContainer([*parts], optimx.AdamW, **ADAMW, max_grad_norm=CLIP)
    norms = train(parts, rank, world, step, range(STEPS // 2))
    state = container.state_dict()
    container = OptimizersContainer([*parts], optimx.AdamW, lr=1.0, max_grad_norm=CLIP)
    container.load_state_dict(state)
    state = whole_state(state)
    norms += train(parts, rank, world, step, range(STEPS // 2, STEPS))
    return {"params": whole(parts), "norms": norms, "state": state}


def hsdp(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    model = shard(transformer(), mesh)
    optimizer = optimx.AdamW(model.parameters(), **ADAMW, max_grad_norm=CLIP)
    norms = train([model], rank, dist.get_world_size(), lambda: stepped(optimizer))
    return {"params": whole([model]), "norms": norms}


def pipeline(rank: int) -> dict[str, Any]:
    """Two stages, each of which two data-parallel ranks have: the norm goes over these, then over the stages."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("pp", "dp"))
    index, stages = mesh.get_local_rank("pp"), mesh.get_group("pp")
    part = shard(in_two_parts()[index], mesh["dp"])
    stage = PipelineStage(part, index, 2, torch.device("cpu"), group=stages)
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=cross_entropy)
    optimizer = optimx.AdamW(part.parameters(), **ADAMW, max_grad_norm=CLIP, norm_group=stages)
    norms = []
    for step in range(STEPS):
        inputs, targets = batch(step, mesh.get_local_rank("dp"), mesh.size(1))
        schedule.step(*[inputs] if index == 0 else [], target=targets if index == 1 else None)
        norms.append(float(stepped(optimizer)))
    own = {name: full(param) for name, param in part.named_parameters()}
    of_ranks: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    params = dict(chain.from_iterable(map(dict.items, of_ranks)))
    return {"params": [params[name] for name, _ in transformer().named_parameters()], "norms": norms}


class DistributedOptimizer:
    """Megatron's: a rank updates a float32 shard of the flat parameters, which all gather again."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        params, world = [*params], dist.get_world_size()
        # shards are equal, and padding is at the end of the last
        size = -(-sum(p.numel() for p in params) // world)
        self.flat, self.flat_grad = torch.zeros(2, world * size)
        offset = 0
        for param in params:
            at = slice(offset, offset := offset + param.numel())
            self.flat[at] = param.detach().flatten()
            param.data, param.grad = self.flat[at].view_as(param), self.flat_grad[at].view_as(param)
        self.shard = nn.Parameter(self.flat.view(world, size)[dist.get_rank()].clone())
        self.shard.grad = torch.empty_like(self.shard)
        self.optimizer = optimx.AdamW([self.shard], **ADAMW, max_grad_norm=CLIP)

    def step(self) -> Tensor:
        """Update all parameters, and return the norm."""
        dist.reduce_scatter_tensor(self.shard.grad, self.flat_grad / dist.get_world_size())
        square = self.shard.grad.square().sum()
        dist.all_reduce(square)
        self.optimizer.total_norm = square.sqrt()
        self.optimizer.step()
        dist.all_gather_into_tensor(self.flat, self.shard.detach())
        self.flat_grad.zero_()
        return self.optimizer.grad_norm


def flat_shards(rank: int) -> dict[str, Any]:
    model = transformer()
    norms = train([model], rank, dist.get_world_size(), DistributedOptimizer(model.parameters()).step)
    return {"params": whole([model]), "norms": norms}


def zero(rank: int) -> dict[str, Any]:
    model = transformer()
    of_all = DDP(model)
    optimizer = ZeroRedundancyOptimizer(
        of_all.parameters(), optimx.AdamW, **ADAMW, max_grad_norm=CLIP, norm_group=dist.group.WORLD
    )

    def step() -> Tensor:
        optimizer.step()
        optimizer.zero_grad()
        return optimizer.optim.grad_norm

    norms = train([of_all], rank, dist.get_world_size(), step)
    return {"params": whole([model]), "norms": norms}


def event_of_the_step(rank: int) -> dict[str, Any]:
    """All-gathers wait for an event that is recorded after each step; which waits for what, in order."""
    model = shard(transformer(), init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = optimx.AdamW(model.parameters(), **ADAMW, max_grad_norm=CLIP)
    events: list[torch.cpu.Event] = []
    seen: list[str] = []

    def record(*_: Any) -> None:
        events.append(torch.cpu.Event())
        model.set_post_optim_event(events[-1])
        steps = {int(state["step"]) for state in optimizer.state.values()}
        seen.append(f"recorded {len(events)} after {steps}")

    def wait(stream: Any, event: Any) -> None:
        if event in events:
            seen.append(f"waited for {events.index(event) + 1}")

    optimizer.register_step_post_hook(record)
    original, torch.cpu.Stream.wait_event = torch.cpu.Stream.wait_event, wait
    try:
        norms = train([model], rank, dist.get_world_size(), lambda: stepped(optimizer))
    finally:
        torch.cpu.Stream.wait_event = original
    return {"params": whole([model]), "norms": norms, "seen": seen}


RECIPES: dict[str, Callable[[int], dict[str, Any]]] = {
    "tensor_parallel_step": clipped_in_the_step,
    "tensor_parallel_function": clipped_by_the_function,
    "model_parts": parts_of_a_model,
    "hsdp": hsdp,
    "pipeline": pipeline,
    "flat_shards": flat_shards,
    "zero": zero,
    "event": event_of_the_step,
}
