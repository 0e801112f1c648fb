"""What does a step of sharded parameters cost the host? DTensors of a process group that only pretends to communicate.

Every parameter has 16 x 16 elements on this rank, as many as a thousandth of a layer of a large model has on thousands
of ranks: time is the host's, of one thread. ``-clip``: clipped, by a norm of all ranks. ``plain``: the same tensors,
and no DTensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist

import optimx
from bench.case import FOREACH, FUSED, OURS, Case, Target
from bench.contestants import MAX_NORM, Model, Run, optimizer_of
from bench.suite import contests

PLAIN_FUSED, PLAIN_OURS = f"{FUSED}, plain", f"{OURS}, plain"


@cache
def _mesh(world: int) -> Any:
    """The mesh of a process group of ``world`` ranks, the first of which this process is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        _mesh.cache_clear()
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    return init_device_mesh("cpu", (world,))


class ShardedModel(Model):
    """Rows of every parameter are spread over the ranks; gradients have the specs of their parameters, as FSDP2's."""

    def __init__(self, case: Case, world: int) -> None:
        from torch.distributed.tensor import DTensor, Shard

        super().__init__(case)
        shards = [DTensor.from_local(p.detach(), _mesh(world), [Shard(0)], run_check=False) for p in self.params]
        self.params = [torch.nn.Parameter(shard) for shard in shards]

    def backward(self) -> None:
        from torch.distributed.tensor import DTensor

        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = DTensor(g.clone(), p._spec, requires_grad=False)


def torchs(case: Case, *, model: Callable[[Case], Model], clip: bool, **options: Any) -> Run:
    built = model(case)
    optimizer = optimizer_of(case, torch.optim, built, **options)

    def step() -> None:
        if clip:
            torch.nn.utils.clip_grad_norm_(built.params, MAX_NORM)
        optimizer.step()

    return Run(built.backward, step, optimizer)


def ours(case: Case, *, model: Callable[[Case], Model], clip: bool) -> Run:
    built = model(case)
    optimizer = optimizer_of(case, optimx, built, **({"max_grad_norm": MAX_NORM} if clip else {}))
    return Run(built.backward, optimizer.step, optimizer)


def sharded(count: int, world: int, clip: bool) -> Case:
    of_shards = {"model": partial(ShardedModel, world=world), "clip": clip}
    plain: dict[str, Any] = {"model": Model, "clip": clip}
    targets = [Target(OURS, "speed", 0.5, PLAIN_OURS)]
    if clip:
        targets.append(Target(OURS, "speed", 4, FUSED))
    return Case(
        f"dtensor-{count}{'-clip' * clip}-{world}-ranks",
        [(16, 16)] * count,
        {
            FOREACH: partial(torchs, foreach=True, **of_shards),
            FUSED: partial(torchs, fused=True, **of_shards),
            OURS: partial(ours, **of_shards),
            PLAIN_FUSED: partial(torchs, fused=True, **plain),
            PLAIN_OURS: partial(ours, **plain),
        },
        FUSED,
        clock="cpu",
        targets=tuple(targets),
    )


CASES = [
    *(sharded(count, 8, clip) for count in (300, 723, 3000) for clip in (False, True)),
    sharded(723, 4096, clip=True),
]


@contests(CASES)
def test_dtensor(enter, case: Case, contestant: str) -> None:
    enter(case, contestant)
