"""The blocks of docs/sharding.md that need torch alone, as four ranks run them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import optimx
from tests.distributed.engines import full
from tests.distributed.transformer import (
    PLAN,
    PLAN_OF_BLOCK,
    batch_of,
    cross_entropy,
    in_two_parts,
    loss_of_rows,
    transformer,
)

STEPS, CLIP = 4, 1.0
ADAMW: dict[str, Any] = {"lr": 3e-4, "weight_decay": 0.1}
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)

PAGE = Path(__file__).parents[2] / "docs" / "sharding.md"
BLOCKS = {
    name: compile(code, f"{PAGE.name}: {name}", "exec")
    for name, code in re.findall(r'^```python title="(\w+)\.py"\n(.*?)^```', PAGE.read_text(), re.DOTALL | re.MULTILINE)
}


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


class Recipe:
    """Names that a block of the page uses, and what it prints: the norms.

    Args:
        copies: How many ranks in a row have the same rows of a batch.
        names: Names beyond those of all blocks.
    """

    def __init__(self, copies: int = 1, **names: Any) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        self.norms: list[float] = []
        self.names: dict[str, Any] = {
            "torch": torch, "dist": dist, "nn": nn, "optimx": optimx, "init_device_mesh": init_device_mesh,
            "fully_shard": fully_shard, "device": "cpu", "rank": rank, "world": world, "model": transformer(),
            "batches": range(STEPS), "loss_of": partial(loss_of_rows, rank=rank // copies, world=world // copies),
            "print": lambda norm: self.norms.append(float(norm)), **names,
        }  # fmt: skip

    def __getitem__(self, name: str) -> Any:
        return self.names[name]

    def run(self, block: str, **names: Any) -> None:
        """Run a block after the ones before it, with these names replaced."""
        self.names.update(names)
        exec(BLOCKS[block], self.names)

    def train(self, step: Callable[[], Any]) -> None:
        """Go through the batches, where a block has no loop of its own."""
        for batch in self["batches"]:
            self["loss_of"](self["model"], batch).backward()
            self.norms.append(float(step()))

    def results(self, *parts: nn.Module, **others: Any) -> dict[str, Any]:
        return {"params": whole(parts or [self["model"]]), "norms": self.norms, **others}


def whole(parts: Iterable[nn.Module]) -> list[Tensor]:
    """The whole parameters, in the order of the model of one process."""
    params = {name.removeprefix("module."): full(p) for part in parts for name, p in part.named_parameters()}
    return [params[name] for name, _ in transformer().named_parameters()]


def whole_state(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A copy of a state dict with whole tensors."""
    return {name: full(value) if isinstance(value, Tensor) else value for name, value in state_dict.items()}


def stepped(optimizer: Any, inner: Any = None) -> Tensor:
    """The norm of a step, after which no gradient is left. ``inner`` is the optimizer that clips, if it is another."""
    optimizer.step()
    optimizer.zero_grad()
    return (inner or optimizer).grad_norm


def of_tensor_parallel() -> Recipe:
    return Recipe(copies=2, parallelize_module=parallelize_module, plan=PLAN, plan_of_block=PLAN_OF_BLOCK)


def tensor_parallel(rank: int) -> dict[str, Any]:
    recipe = of_tensor_parallel()
    recipe.run("tensor_parallel")
    return recipe.results()


def clipped_by_the_function(rank: int) -> dict[str, Any]:
    """Torchtitan's loop with optimx's function."""
    recipe = of_tensor_parallel()
    recipe.run("tensor_parallel", batches=())
    recipe.names["batches"] = range(STEPS)
    container = OptimizersContainer([recipe["model"]], optimx.AdamW, **ADAMW)

    def step() -> Tensor:
        norm = optimx.clip_grad_norm_(recipe["model"].parameters(), CLIP)
        assert type(norm) is Tensor
        container.step()
        container.zero_grad()
        return norm

    recipe.train(step)
    return recipe.results()


def model_parts(rank: int) -> dict[str, Any]:
    """Two parts over ranks; other optimizers go on with the state dict in the middle."""
    recipe, parts = of_tensor_parallel(), in_two_parts()
    for part in parts:
        has = dict(part.named_children())
        plan = {name: style for name, style in PLAN.items() if has.get(name) is not None}
        recipe.run("tensor_parallel", model=part, plan=plan, batches=())
    make = partial(OptimizersContainer, [*parts], optimx.AdamW, max_grad_norm=CLIP)
    recipe.run("model_parts", model_parts=parts, container=make(**ADAMW), batches=range(STEPS // 2))
    recipe["container"].zero_grad()
    state, container = recipe["container"].state_dict(), make(lr=1.0)
    container.load_state_dict(state)
    state = whole_state(state)
    recipe.run("model_parts", container=container, batches=range(STEPS // 2, STEPS))
    return recipe.results(*parts, state=state)


def pipeline(rank: int) -> dict[str, Any]:
    ways = dist.get_world_size() // 2
    recipe = Recipe(
        model_parts=in_two_parts(), PipelineStage=PipelineStage, ScheduleGPipe=ScheduleGPipe,
        cross_entropy=cross_entropy, batches=[batch_of(step, rank % ways, ways) for step in range(STEPS)],
    )  # fmt: skip
    recipe.run("pipeline")
    own = {name: full(param) for name, param in recipe["part"].named_parameters()}
    of_ranks: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    params = dict(chain.from_iterable(map(dict.items, of_ranks)))
    return {"params": [params[name] for name, _ in transformer().named_parameters()], "norms": recipe.norms}


def hsdp(rank: int) -> dict[str, Any]:
    recipe = Recipe()
    recipe.run("hsdp")
    recipe.train(lambda: stepped(recipe["optimizer"]))
    return recipe.results()


def flat_shards(rank: int) -> dict[str, Any]:
    recipe = Recipe()
    params, world = [*recipe["model"].parameters()], dist.get_world_size()
    # shards are equal, and padding is at the end of the last
    size = -(-sum(p.numel() for p in params) // world)
    flat, flat_grad = torch.zeros(2, world * size)
    offset = 0
    for param in params:
        at = slice(offset, offset := offset + param.numel())
        flat[at] = param.detach().flatten()
        param.data, param.grad = flat[at].view_as(param), flat_grad[at].view_as(param)
    recipe.run("flat_shards", flat=flat, flat_grad=flat_grad)

    def step() -> Tensor:
        recipe["step"]()
        flat_grad.zero_()
        return recipe["optimizer"].grad_norm

    recipe.train(step)
    return recipe.results()


def zero(rank: int) -> dict[str, Any]:
    recipe = Recipe(DistributedDataParallel=DistributedDataParallel, ZeroRedundancyOptimizer=ZeroRedundancyOptimizer)
    recipe.run("zero")
    recipe.train(lambda: stepped(recipe["optimizer"], recipe["optimizer"].optim))
    return recipe.results()


class Recorded(torch.cpu.Event):
    """An event that knows after which step it was recorded."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step


def event(rank: int) -> dict[str, Any]:
    """Which event is recorded or waited for, in order."""
    recipe = Recipe()
    recipe.run("hsdp")
    recipe.run("event")
    seen: list[str] = []

    class Stream(torch.cpu.Stream):
        def record_event(self) -> Recorded:
            (step,) = {int(state["step"]) for state in recipe["optimizer"].state.values()}
            seen.append(f"recorded {step}")
            return Recorded(step)

    def wait_event(stream: torch.cpu.Stream, event: Any) -> None:
        if isinstance(event, Recorded):
            seen.append(f"waited for {event.step}")

    current = mock.patch.object(torch.accelerator, "current_stream", Stream)
    with current, mock.patch.object(torch.cpu.Stream, "wait_event", wait_event):
        recipe.train(lambda: stepped(recipe["optimizer"]))
    return recipe.results(seen=seen)


RECIPES: dict[str, Callable[[int], dict[str, Any]]] = {
    "tensor_parallel": tensor_parallel,
    "clip_grad_norm_": clipped_by_the_function,
    "model_parts": model_parts,
    "pipeline": pipeline,
    "hsdp": hsdp,
    "flat_shards": flat_shards,
    "zero": zero,
    "event": event,
}
