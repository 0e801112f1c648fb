"""The recipes of docs/sharding.md end where one process with the whole batch does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP

import optimx
from tests.distributed import ranks
from tests.distributed.engines import full
from tests.distributed.transformer import Transformer, apply_tensor_parallel, in_two_parts, loss_of, shard, transformer

pytestmark = pytest.mark.filterwarnings("ignore")

WORLD, STEPS, CLIP = 4, 4, 0.5
ADAMW: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}


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
        get = partial(get_optimizer_state_dict, options=StateDictOptions(flatten_optimizer_state_dict=True))
        return dict(chain.from_iterable(map(dict.items, map(get, self.model_parts, self.optimizers))))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        for part, optimizer in zip(self.model_parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, optimizer, optim_state_dict=state_dict, options=options)


def titan(parts: list[Transformer]) -> tuple[list[nn.Module], int, int]:
    """Parts over two data-parallel ranks of two tensor-parallel ones, and whose rows are this rank's."""
    mesh = init_device_mesh("cpu", (WORLD // 2, 2), mesh_dim_names=("dp", "tp"))
    for part in parts:
        apply_tensor_parallel(part, mesh["tp"])
        shard(part, mesh["dp"])
    return [*parts], mesh.get_local_rank("dp"), mesh.size(0)


def in_the_step(rank: int) -> dict[str, Any]:
    (model,), rank, world = titan([transformer()])
    optimizer = optimx.AdamW(model.parameters(), **ADAMW, max_grad_norm=CLIP)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of([model], step, rank, world).backward()
        optimizer.step()
        norms.append(float(optimizer.grad_norm))
    return {"params": [*map(full, model.parameters())], "norms": norms}


def with_the_function(rank: int) -> dict[str, Any]:
    """Torchtitan's loop with optimx's function: the norm is a plain tensor already."""
    (model,), rank, world = titan([transformer()])
    container = OptimizersContainer([model], optimx.AdamW, **ADAMW)
    norms = []
    for step in range(STEPS):
        container.zero_grad()
        loss_of([model], step, rank, world).backward()
        norms.append(float(optimx.clip_grad_norm_(model.parameters(), CLIP)))
        container.step()
    return {"params": [*map(full, model.parameters())], "norms": norms}


def of_parts(rank: int) -> dict[str, Any]:
    """Two parts, one norm; after half of the steps others go on with their state dict."""
    parts, rank, world = titan(in_two_parts())
    container = OptimizersContainer(parts, optimx.AdamW, **ADAMW, max_grad_norm=CLIP)
    norms, state = [], {}
    for step in range(STEPS):
        if step == STEPS // 2:
            state = {name: full(v) if isinstance(v, Tensor) else v for name, v in container.state_dict().items()}
            container, old = OptimizersContainer(parts, optimx.AdamW, lr=1.0, max_grad_norm=CLIP), container
            container.load_state_dict(old.state_dict())
        container.zero_grad()
        loss_of(parts, step, rank, world).backward()
        norm = optimx.get_total_norm([p.grad for part in parts for p in part.parameters()])
        for optimizer in container.optimizers:
            optimizer.total_norm = norm
        container.step()
        norms.append(float(norm))
    params = {name: full(p) for part in parts for name, p in part.named_parameters()}
    # in the order of the whole model
    return {"params": [params[name] for name, _ in transformer().named_parameters()], "norms": norms, "state": state}


def hsdp(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, WORLD // 2), mesh_dim_names=("replicate", "shard"))
    model = shard(transformer(), mesh)
    optimizer = optimx.AdamW(model.parameters(), **ADAMW, max_grad_norm=CLIP)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of([model], step, rank, WORLD).backward()
        optimizer.step()
        norms.append(float(optimizer.grad_norm))
    return {"params": [*map(full, model.parameters())], "norms": norms}


class DistributedOptimizer:
    """Megatron's: a rank updates a float32 shard of the flat parameters, which all gather again."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.params = [*params]
        numel = sum(p.numel() for p in self.params)
        # of equal shards, the last of which end in padding
        size = -(-numel // WORLD)
        self.flat, self.flat_grad = torch.zeros(2, WORLD * size)
        offset = 0
        for param in self.params:
            at = slice(offset, offset := offset + param.numel())
            self.flat[at] = param.detach().flatten()
            # parameters and their gradients are views
            param.data = self.flat[at].view_as(param)
            param.grad = self.flat_grad[at].view_as(param)
        self.shard = nn.Parameter(self.flat.view(WORLD, -1)[dist.get_rank()].clone())
        self.shard.grad = torch.empty_like(self.shard)
        self.optimizer = optimx.AdamW([self.shard], **ADAMW, max_grad_norm=CLIP)

    def step(self) -> float:
        """Update all parameters, and return the norm."""
        dist.reduce_scatter_tensor(self.shard.grad, self.flat_grad / WORLD)
        square = self.shard.grad.square().sum()
        dist.all_reduce(square)
        self.optimizer.total_norm = square.sqrt()
        self.optimizer.step()
        dist.all_gather_into_tensor(self.flat, self.shard.detach())
        self.flat_grad.zero_()
        return float(self.optimizer.grad_norm)


def megatron(rank: int) -> dict[str, Any]:
    model = transformer()
    optimizer = DistributedOptimizer(model.parameters())
    norms = []
    for step in range(STEPS):
        loss_of([model], step, rank, WORLD).backward()
        norms.append(optimizer.step())
    return {"params": [*map(full, model.parameters())], "norms": norms}


def zero(rank: int) -> dict[str, Any]:
    model = DDP(transformer())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimx.AdamW, **ADAMW, max_grad_norm=CLIP, norm_group=dist.group.WORLD
    )
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of([model], step, rank, WORLD).backward()
        optimizer.step()
        norms.append(float(optimizer.optim.grad_norm))
    return {"params": [*map(full, model.parameters())], "norms": norms}


def after_the_step(rank: int) -> dict[str, Any]:
    """All-gathers wait for an event of each step's; what waits for which, in order."""
    model = shard(transformer(), init_device_mesh("cpu", (WORLD,)))
    optimizer = optimx.AdamW(model.parameters(), **ADAMW, max_grad_norm=CLIP)
    seen: list[str] = []

    class Event(torch.cpu.Event):
        """Says which step it was recorded after."""

    def record(*_: Any) -> None:
        event = Event()
        event.step = int(next(iter(optimizer.state.values()))["step"])
        seen.append(f"recorded {event.step}")
        model.set_post_optim_event(event)

    def wait(stream: Any, event: Any) -> None:
        if isinstance(event, Event):
            seen.append(f"waited for {event.step}")

    optimizer.register_step_post_hook(record)
    original, torch.cpu.Stream.wait_event = torch.cpu.Stream.wait_event, wait
    norms = []
    try:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of([model], step, rank, WORLD).backward()
            optimizer.step()
            norms.append(float(optimizer.grad_norm))
    finally:
        torch.cpu.Stream.wait_event = original
    return {"params": [*map(full, model.parameters())], "norms": norms, "seen": seen}


RECIPES: dict[str, Callable[[int], dict[str, Any]]] = {
    "torchtitan_step": in_the_step,
    "torchtitan_function": with_the_function,
    "torchtitan_parts": of_parts,
    "hsdp": hsdp,
    "megatron": megatron,
    "zero": zero,
    "event": after_the_step,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> ranks.Results:
    return ranks.run(RECIPES, WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    """Stock on all rows: parameters, norms, and states after half of the steps by names of DCP."""
    model = transformer()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    norms, state = [], {}
    for step in range(STEPS):
        if step == STEPS // 2:
            options = StateDictOptions(flatten_optimizer_state_dict=True)
            state = get_optimizer_state_dict(model, optimizer, options=options)
            state = {name: full(v) if isinstance(v, Tensor) else v for name, v in state.items()}
        optimizer.zero_grad()
        loss_of([model], step).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
    assert min(norms) > CLIP
    return {"params": [*map(full, model.parameters())], "norms": norms, "state": state}


@pytest.mark.parametrize("name", RECIPES)
def test_ends_where_one_process_does(name: str, results: ranks.Results, one_process: dict[str, Any]) -> None:
    for result in results[name]:
        assert result["norms"] == pytest.approx(one_process["norms"], rel=1e-4)
        # gradients are added in another order
        torch.testing.assert_close(result["params"], one_process["params"], rtol=1e-4, atol=1e-5)


def test_flat_state_dict_of_parts_is_that_of_the_model(results: ranks.Results, one_process: dict[str, Any]) -> None:
    expected = one_process["state"]
    for result in results["torchtitan_parts"]:
        assert result["state"].keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(result["state"][name], value, rtol=1e-4, atol=1e-6)
            else:
                assert result["state"][name] == value, name


def test_all_gathers_wait_for_the_event_of_the_step_before(results: ranks.Results) -> None:
    # two streams wait for an event
    waits = [[f"recorded {step}", *[f"waited for {step}"] * 2] for step in range(1, STEPS)]
    for result in results["event"]:
        assert result["seen"] == [*chain(*waits), f"recorded {STEPS}"]
