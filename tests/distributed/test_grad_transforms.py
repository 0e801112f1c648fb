"""Clipping of rows, parameters and groups of DTensors: as of whole tensors where they are whole, and else refused."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import optimx
from tests.distributed import ranks
from tests.distributed.engines import full, local

pytestmark = pytest.mark.filterwarnings("ignore")

WORLD = 2
SETTINGS: dict[str, Any] = {"centralize_grads": True, "agc": 0.01, "max_param_norm": 0.5, "max_group_norm": 0.5}
SHAPES = {"matrix": (5, 6), "vector": (7,)}
LAYOUTS = {"whole": Replicate(), "rows": Shard(0), "columns": Shard(1)}
CASES = [
    (name, shape, layout) for name, shape, layout in product(SETTINGS, SHAPES, LAYOUTS)
    if (shape, layout) != ("vector", "columns")
]  # fmt: skip
#: Where a unit, which may be all, is in one piece.
TAKEN = {
    *((name, shape, "whole") for name, shape in product(SETTINGS, SHAPES)),
    ("centralize_grads", "matrix", "rows"), ("centralize_grads", "vector", "rows"), ("agc", "matrix", "rows"),
}  # fmt: skip


def tensors(shape: str) -> tuple[Tensor, Tensor]:
    """A parameter and its gradient."""
    generator = torch.Generator().manual_seed(0)
    param, grad = torch.randn(2, *SHAPES[shape], generator=generator)
    return param, grad


def stepped(rank: int | None, name: str, shape: str, layout: str) -> Tensor | str:
    """A parameter after a step, or what is said in place of one; a rank of None is no rank."""
    mesh = None if rank is None else init_device_mesh("cpu", (WORLD,))
    before, grad = (t if mesh is None else distribute_tensor(t, mesh, [LAYOUTS[layout]]) for t in tensors(shape))
    param = nn.Parameter(before.clone())
    param.grad = grad
    optimizer = optimx.SGD([{"params": [param], name: SETTINGS[name]}], lr=0.1)
    try:
        optimizer.step()
    except RuntimeError as error:
        assert torch.equal(local(param), local(before))
        return str(error)
    return full(param)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> ranks.Results:
    checks: dict[str, ranks.Check] = {
        "-".join(case): partial(stepped, name=case[0], shape=case[1], layout=case[2]) for case in CASES
    }
    return ranks.run(checks, WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("name", "shape", "layout"), CASES)
def test_as_whole_tensors_or_refused(name: str, shape: str, layout: str, results: ranks.Results) -> None:
    for found in results[f"{name}-{shape}-{layout}"]:
        if (name, shape, layout) in TAKEN:
            torch.testing.assert_close(found, stepped(None, name, shape, layout))
        else:
            assert f"should be whole on each rank for {name} but are cut: {SHAPES[shape]}" in found
