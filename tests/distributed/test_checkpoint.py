"""A training that goes on from a checkpoint, on other ranks and with stock's class, ends where one process does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import optimx
from tests.distributed import ranks
from tests.distributed.engines import ENGINES, Trained, fsdp2, named_states, one_process
from tests.distributed.test_engines import BY_PARTS, in_one_process, params_of

pytestmark = pytest.mark.filterwarnings("ignore")

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


class Half(NamedTuple):
    """Half of a training."""

    package: str
    optimizer: str
    place: Place

    def __str__(self) -> str:
        return f"{self.package}-{self.optimizer}-{self.place}"

    def begin(self, rank: int) -> Trained:
        engine = one_process if self.place.engine == "one_process" else ENGINES[self.place.engine]
        cls = getattr(PACKAGES[self.package], self.optimizer)
        return engine(rank, partial(cls, **BY_PARTS[self.optimizer]))


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
        for name in BY_PARTS for package in PACKAGES for place in (FSDP4, FSDP2)
        if name != "AdamW" and hasattr(PACKAGES[package], name)
    ),
]  # fmt: skip


def train(trained: Trained, steps: range) -> None:
    for step in steps:
        for param in params_of(trained.optimizer):
            param.grad = None
        trained.loss(step).backward()
        trained.optimizer.step()


def ended(trained: Trained) -> dict[str, Any]:
    return {"params": trained.params(), "states": named_states(trained.optimizer, params_of(trained.optimizer))}


def state_of(trained: Trained, options: StateDictOptions | None = None) -> dict[str, Any]:
    """By the names of parameters."""
    model, optimizer = get_state_dict(trained.model, trained.optimizer, options=options)
    return {"model": model, "optimizer": optimizer}


def set_state(trained: Trained, state: dict[str, Any], options: StateDictOptions | None = None) -> None:
    set_state_dict(
        trained.model, trained.optimizer, options=options,
        model_state_dict=state["model"], optim_state_dict=state["optimizer"],
    )  # fmt: skip


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


def of_world(world: int, folder: Path) -> tuple[dict[str, ranks.Check], dict[str, ranks.Check]]:
    """What so many ranks save, and what they load."""
    first = {str(half): partial(save_half, half=half, folder=folder) for half, _ in HALVES if half.place.world == world}
    second = {
        f"{a} to {b}": partial(resume, first=a, second=b, folder=folder) for a, b in HALVES if b.place.world == world
    }
    return first, second


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def resumed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, ranks.Results]:
    """What the ranks found that loaded the checkpoints of others, by their number."""
    save_half(0, Half("optimx", "AdamW", ALONE), folder)
    save_half(0, Half("torch", "AdamW", ALONE), folder)
    saved, loaded = of_world(2, folder)
    ranks.run(saved, 2, tmp_path_factory.mktemp("ranks"))
    four = {name: check for checks in of_world(4, folder) for name, check in checks.items()}
    return {
        4: ranks.run(four, 4, tmp_path_factory.mktemp("ranks")),
        2: ranks.run(loaded, 2, tmp_path_factory.mktemp("ranks")),
    }


def assert_ended(result: dict[str, Any], name: str) -> None:
    """Where stock in one process ends, which nothing interrupts."""
    params, states, _ = in_one_process(name, BY_PARTS[name], None, [*range(STEPS)])
    # gradients are added in another order
    torch.testing.assert_close(result["params"], params, rtol=1e-4, atol=1e-5)
    assert len(result["states"]) == len(states)
    for mine, expected in zip(result["states"], states, strict=True):
        assert mine.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(("first", "second"), HALVES, ids=lambda half: str(half))
def test_resumes(first: Half, second: Half, folder: Path, resumed: dict[int, ranks.Results]) -> None:
    alone = second.place == ALONE
    results = [resume(0, first, second, folder)] if alone else resumed[second.place.world][f"{first} to {second}"]
    for result in results:
        assert_ended(result, second.optimizer)
