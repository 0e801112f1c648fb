"""What ranks do with checkpoints: train one half, save it, load it, train the other half."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import optimx
from tests.distributed import ranks
from tests.distributed.engines import ENGINES, Make, Trained, fsdp2, named_states, one_process
from tests.distributed.test_engines import BY_PARTS, params_of

HALF, STEPS = 2, 4
PACKAGES = {"optimx": optimx, "torch": torch.optim}
#: Who saves, and who loads.
BOTH_WAYS = (("optimx", "optimx"), ("optimx", "torch"), ("torch", "optimx"))


class Place(NamedTuple):
    """An engine on so many ranks."""

    engine: str
    world: int

    def __str__(self) -> str:
        return f"{self.engine}x{self.world}"

    def begin(self, rank: int, make: Make) -> Trained:
        return (one_process if self.engine == "one_process" else ENGINES[self.engine])(rank, make)


def make_of(package: str, optimizer: str) -> Make:
    return partial(getattr(PACKAGES[package], optimizer), **BY_PARTS[optimizer])


class Half(NamedTuple):
    """Half of a training."""

    package: str
    optimizer: str
    place: Place

    def __str__(self) -> str:
        return f"{self.package}-{self.optimizer}-{self.place}"

    def begin(self, rank: int) -> Trained:
        return self.place.begin(rank, make_of(self.package, self.optimizer))


ALONE, DDP, OFFLOADED = Place("one_process", 1), Place("ddp", 2), Place("fsdp2_offloaded", 2)
FSDP2, FSDP4, FSDP2_OF_TP = Place("fsdp2", 2), Place("fsdp2", 4), Place("fsdp2_tensor_parallel", 4)
RESHARDINGS = [
    (FSDP2, FSDP4),
    (FSDP4, FSDP2),
    (FSDP4, ALONE),
    (ALONE, FSDP4),
    (DDP, FSDP4),
    (FSDP4, DDP),
    (FSDP4, FSDP2_OF_TP),
    (FSDP2_OF_TP, FSDP2),
    (FSDP4, OFFLOADED),
    (OFFLOADED, FSDP4),
]
HALVES = [
    *((Half(a, "AdamW", there), Half(b, "AdamW", here)) for there, here in RESHARDINGS for a, b in BOTH_WAYS),
    *(
        (Half(package, name, FSDP4), Half("optimx", name, place))
        for name in BY_PARTS for package, place in (("optimx", FSDP4), ("optimx", FSDP2), ("torch", FSDP2))
        # torch's Rprop and Adafactor take no DTensors
        if name != "AdamW" and hasattr(PACKAGES[package], name)
        and not (package == "torch" and name in ("Rprop", "Adafactor"))
    ),
]  # fmt: skip
#: How a state dict is asked for, and how it is set.
OPTIONS: dict[str, tuple[dict[str, bool], dict[str, bool]]] = {
    "by_default": ({}, {}),
    "flattened": ({"flatten_optimizer_state_dict": True}, {"flatten_optimizer_state_dict": True}),
    "full": ({"full_state_dict": True}, {"full_state_dict": True}),
    "full_on_rank_0": (
        {"full_state_dict": True, "cpu_offload": True},
        {"full_state_dict": True, "broadcast_from_rank0": True},
    ),
}
#: Where :func:`optimx.build` has its optimizer, in the first half and in the second.
BUILT = [(FSDP2, FSDP4), (FSDP4, FSDP2), (FSDP4, FSDP2_OF_TP), (FSDP4, ALONE), (ALONE, FSDP4), (DDP, FSDP4)]
CONFIG: dict[str, Any] = {
    "optimizer": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5},
    "groups": {"no_decay": "auto"},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {"name": "cosine", "total": STEPS + 1, "warmup": 1},
    "torchs": {"name": "StepLR", "step_size": 3, "warmup": 1},
}


def train(trained: Trained, steps: range, scheduler: Any = None) -> list[list[float]]:
    """Returns the learning rates."""
    rates = []
    for step in steps:
        for param in params_of(trained.optimizer):
            param.grad = None
        trained.loss(step).backward()
        rates.append([float(group["lr"]) for group in trained.optimizer.param_groups])
        trained.optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return rates


def ended(trained: Trained) -> dict[str, Any]:
    return {"params": trained.params(), "states": named_states(trained.optimizer, params_of(trained.optimizer))}


def state_of(trained: Trained, options: StateDictOptions | None = None) -> dict[str, Any]:
    """By the names of parameters."""
    model, optimizer = get_state_dict(trained.model, trained.optimizer, options=options)
    return {"model": model, "optimizer": optimizer}


def set_state(trained: Trained, state: dict[str, Any], options: StateDictOptions | None = None) -> None:
    # set_state_dict would take a rank that has nothing for one that wants no model
    set_model_state_dict(trained.model, state["model"], options=options)
    set_optimizer_state_dict(trained.model, trained.optimizer, state["optimizer"], options=options)


def load(trained: Trained, path: Path, options: StateDictOptions | None = None) -> None:
    state = state_of(trained, options)
    dcp.load(state, checkpoint_id=path)
    set_state(trained, state, options)


def save_half(rank: int, half: Half, folder: Path) -> None:
    trained = half.begin(rank)
    train(trained, range(HALF))
    dcp.save(state_of(trained), checkpoint_id=folder / str(half))


def resume(rank: int, first: Half, second: Half, folder: Path) -> dict[str, Any]:
    trained = second.begin(rank)
    load(trained, folder / str(first))
    train(trained, range(HALF, STEPS))
    return ended(trained)


def hand_over(rank: int, options: str, packages: tuple[str, str]) -> dict[str, Any]:
    """From one optimizer to another in the same process."""
    first, second = (FSDP4.begin(rank, make_of(package, "AdamW")) for package in packages)
    train(first, range(HALF))
    get, put = (StateDictOptions(**kwargs) for kwargs in OPTIONS[options])
    state = state_of(first, get)
    if options == "full_on_rank_0":
        assert bool(state["model"]) is bool(state["optimizer"]) is (rank == 0)
    set_state(second, state, put)
    train(second, range(HALF, STEPS))
    return ended(second)


def flattened_in_files(rank: int, folder: Path) -> dict[str, Any]:
    first, second = (fsdp2(rank, make_of("optimx", "AdamW")) for _ in range(2))
    train(first, range(HALF))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    dcp.save(state_of(first, options), checkpoint_id=folder / "flattened")
    load(second, folder / "flattened", options)
    train(second, range(HALF, STEPS))
    return ended(second)


def moved(rank: int) -> dict[str, Any]:
    """States go elsewhere after each step and come back before the next, into other memory."""
    trained = fsdp2(rank, make_of("optimx", "AdamW"))
    for step in range(STEPS):
        train(trained, range(step, step + 1))
        for state in trained.optimizer.state.values():
            for name, value in state.items():
                state[name] = value.clone()
                value.fill_(torch.nan)
    return ended(trained)


def asynchronous(rank: int, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The training goes on while its state is written, and from what was written another one."""
    trained, other = (fsdp2(rank, make_of("optimx", "AdamW")) for _ in range(2))
    train(trained, range(HALF))
    group = dist.new_group(backend="gloo")
    written = dcp.async_save(state_of(trained), checkpoint_id=folder / "asynchronous", process_group=group)
    train(trained, range(HALF, STEPS))
    written.result()
    load(other, folder / "asynchronous")
    train(other, range(HALF, STEPS))
    return ended(trained), ended(other)


def built(rank: int, place: Place, schedule: str) -> tuple[optimx.build.Build, Trained]:
    trained = place.begin(rank, partial(optimx.SGD, lr=0.0))
    build = optimx.build(trained.model, {**CONFIG, "schedule": SCHEDULES[schedule]})
    return build, replace(trained, optimizer=build.optimizer)


def save_build(rank: int, place: Place, schedule: str, folder: Path) -> None:
    build, trained = built(rank, place, schedule)
    train(trained, range(HALF), build.scheduler)
    dcp.save({"train": build.as_stateful()}, checkpoint_id=folder / f"{schedule}-{place}")


def hand_over_build(rank: int) -> dict[str, Any]:
    """The first rank has the whole state."""
    get, put = (StateDictOptions(**kwargs) for kwargs in OPTIONS["full_on_rank_0"])
    (first, trained), (second, other) = (built(rank, FSDP4, "cosine") for _ in range(2))
    train(trained, range(HALF), first.scheduler)
    second.as_stateful(put).load_state_dict(first.as_stateful(get).state_dict())
    rates = train(other, range(HALF, STEPS), second.scheduler)
    return {**ended(other), "rates": rates}


def resume_build(rank: int, first: Place, second: Place, schedule: str, folder: Path) -> dict[str, Any]:
    build, trained = built(rank, second, schedule)
    dcp.load({"train": build.as_stateful()}, checkpoint_id=folder / f"{schedule}-{first}")
    rates = train(trained, range(HALF, STEPS), build.scheduler)
    return {**ended(trained), "rates": rates}


def of_world(world: int, folder: Path) -> tuple[dict[str, ranks.Check], dict[str, ranks.Check]]:
    """What so many ranks save, and what they load."""
    first: dict[str, ranks.Check] = {
        **{str(half): partial(save_half, half=half, folder=folder) for half, _ in HALVES if half.place.world == world},
        **{
            f"{schedule}-{place}": partial(save_build, place=place, schedule=schedule, folder=folder)
            for place, _ in BUILT
            for schedule in SCHEDULES
            if place.world == world
        },
    }
    second: dict[str, ranks.Check] = {
        **{
            f"{a} to {b}": partial(resume, first=a, second=b, folder=folder)
            for a, b in HALVES if b.place.world == world
        },
        **{
            f"{schedule}-{a} to {b}": partial(resume_build, first=a, second=b, schedule=schedule, folder=folder)
            for a, b in BUILT for schedule in SCHEDULES if b.world == world
        },
    }  # fmt: skip
    return first, second


def on_four(folder: Path) -> dict[str, ranks.Check]:
    """What is no matter of the number of ranks."""
    return {
        **{
            f"{options}-{a}-{b}": partial(hand_over, options=options, packages=(a, b))
            for options in OPTIONS for a, b in BOTH_WAYS
        },
        "flattened_in_files": partial(flattened_in_files, folder=folder),
        "moved": moved,
        "asynchronous": partial(asynchronous, folder=folder),
        "hand_over_build": hand_over_build,
    }  # fmt: skip
