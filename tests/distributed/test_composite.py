"""A composite over ranks ends where one process with the whole batch does: one norm over all of it, one skip."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import optimx
from tests.distributed import ranks
from tests.distributed.engines import ENGINES, full, loss_of, net
from tests.distributed.test_engines import BAD_STEP, CLIP, STEPS, train

pytestmark = pytest.mark.filterwarnings("ignore")

#: Engine, and whether one rank finds an infinite gradient in one step; not where the others have the same.
ON_ENGINES = [
    ("ddp", False), ("fsdp2", False), ("fsdp2", True), ("hsdp", False), ("tensor_parallel", False), ("pipeline", True),
]  # fmt: skip


def compose(params: Iterable[Tensor], norm_group: Any = None) -> optimx.Composite:
    """Members of ours, and one of stock, whose gradients are rewritten."""
    return optimx.Composite(members(params, optimx.AdamW), max_grad_norm=CLIP, norm_group=norm_group)


def members(params: Iterable[Tensor], adamw: Any) -> dict[str, torch.optim.Optimizer]:
    """Those that have parameters: a stage of a pipeline has none for some."""
    makes: dict[str, Any] = {
        "muon": partial(optimx.Muon, lr=0.02, ns_dtype=torch.float32),
        "adamw": partial(adamw, lr=1e-2),
        "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    }
    owned: dict[str, list[Tensor]] = {}
    for param in params:
        name = "adamw" if param.dim() != 2 else "muon" if len(param) == 8 else "sgd"
        owned.setdefault(name, []).append(param)
    return {name: makes[name](of_name) for name, of_name in owned.items()}


def engine(rank: int, name: str, is_bad: bool) -> dict[str, Any]:
    return train(ENGINES[name](rank, compose), amp=is_bad, is_bad=is_bad and rank == dist.get_world_size() - 1)


def resumed(rank: int, folder: str, flatten: bool) -> list[Tensor]:
    """FSDP2, saved in the middle, and loaded into a fresh model and composite."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    trained = ENGINES["fsdp2"](rank, compose)
    for step in range(STEPS):
        if step == STEPS // 2:
            trained.optimizer.zero_grad()
            of_model, of_optimizer = get_state_dict(trained.model, trained.optimizer, options=options)
            dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
            trained = ENGINES["fsdp2"](rank, compose)
            of_model, of_optimizer = get_state_dict(trained.model, trained.optimizer, options=options)
            state = {"model": of_model, "optimizer": of_optimizer}
            dcp.load(state, checkpoint_id=folder)
            set_state_dict(
                trained.model, trained.optimizer, model_state_dict=state["model"],
                optim_state_dict=state["optimizer"], options=options,
            )  # fmt: skip
        trained.optimizer.zero_grad()
        trained.loss(step).backward()
        trained.optimizer.step()
    return trained.params()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> ranks.Results:
    folder = tmp_path_factory.mktemp("ranks")
    checks: dict[str, ranks.Check] = {
        **{f"{name}-{is_bad}": partial(engine, name=name, is_bad=is_bad) for name, is_bad in ON_ENGINES},
        **{
            f"resumed-{flatten}": partial(resumed, folder=str(folder / f"checkpoint-{flatten}"), flatten=flatten)
            for flatten in (False, True)
        },
    }
    return ranks.run(checks, 2, folder)


def in_one_process(steps: list[int]) -> tuple[list[Tensor], list[float]]:
    """Members apart, AdamW stock's, clipped by torch's function: parameters and norms."""
    model = net()
    params = [*model.parameters()]
    optimizers = [*members(params, torch.optim.AdamW).values()]
    norms = []
    for step in steps:
        model.zero_grad()
        loss_of(model, step).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(params, CLIP)))
        for optimizer in optimizers:
            optimizer.step()
    return [*map(full, params)], norms


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    # gradients are added in another order
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "is_bad"), ON_ENGINES)
def test_ends_where_one_process_does(name: str, is_bad: bool, two: ranks.Results) -> None:
    taken = [step for step in range(STEPS) if not (is_bad and step == BAD_STEP)]
    params, norms = in_one_process(taken)
    assert min(norms) > CLIP
    for result in two[f"{name}-{is_bad}"]:
        assert_close(result["params"], params)
        assert [result["norms"][step] for step in taken] == pytest.approx(norms, rel=1e-4)
        assert result["moves"] == [step in taken for step in range(STEPS)]


@pytest.mark.parametrize("flatten", [False, True], ids=["groups", "flattened"])
def test_distributed_checkpoint(flatten: bool, two: ranks.Results) -> None:
    params, _ = in_one_process([*range(STEPS)])
    for found in two[f"resumed-{flatten}"]:
        assert_close(found, params)
