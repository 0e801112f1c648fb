"""Formats over ranks: a mesh changes no bit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import optimx
from tests.distributed import ranks
from tests.distributed.engines import full

pytestmark = pytest.mark.filterwarnings("ignore")

WORLD, STEPS = 2, 4
SHAPES = [(40, 128), (33, 256), (5, 7), (1, 8192)]
FORMATS: dict[str, dict[str, Any]] = {
    "stochastic": {"param_rounding": "stochastic", "state_dtype": "stochastic", "rounding_seed": 3},
    "remainder16": {"param_rounding": "remainder16", "state_dtype": torch.float32},
    "8bit": {"param_rounding": "stochastic", "state_dtype": "8bit"},
}
#: Along the second dimension there are scales of groups that are cut.
CASES = [("stochastic", 0), ("stochastic", 1), ("remainder16", 0), ("remainder16", 1), ("8bit", 0)]


def trained(mesh: DeviceMesh | None, name: str, dim: int) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and exact weights after some steps, with a checkpoint in the middle."""

    def laid_out(tensor: Tensor) -> Tensor:
        return tensor.clone() if mesh is None else distribute_tensor(tensor, mesh, [Shard(dim)])

    def random(shape: tuple[int, ...], seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()

    params = [nn.Parameter(laid_out(random(shape, i))) for i, shape in enumerate(SHAPES)]
    optimizer = optimx.AdamW(params, lr=1e-3, **FORMATS[name])
    for step in range(STEPS):
        for i, param in enumerate(params):
            param.grad = laid_out(random(SHAPES[i], 10 * step + i))
        optimizer.step()
        if step == 1:
            saved = optimizer.state_dict(compressed=True)
            optimizer = optimx.AdamW(params, **FORMATS[name])
            optimizer.load_state_dict(saved)
    return [*map(full, params)], [*map(full, optimx.master_weights(optimizer))]


def on_ranks(rank: int, name: str, dim: int) -> Any:
    return trained(init_device_mesh("cpu", (WORLD,)), name, dim)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> ranks.Results:
    checks: dict[str, ranks.Check] = {f"{n}-{dim}": partial(on_ranks, name=n, dim=dim) for n, dim in CASES}
    checks["refused"] = refused
    return ranks.run(checks, WORLD, tmp_path_factory.mktemp("ranks"))


def refused(rank: int) -> str:
    with pytest.raises(RuntimeError) as raised:
        trained(init_device_mesh("cpu", (WORLD,)), "8bit", 1)
    return str(raised.value)


@pytest.mark.parametrize(("name", "dim"), CASES)
def test_as_in_one_process(name: str, dim: int, results: ranks.Results) -> None:
    expected = trained(None, name, dim)
    for found in results[f"{name}-{dim}"]:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_cut_groups_are_refused(results: ranks.Results) -> None:
    for told in results["refused"]:
        assert "its rows, which 8-bit states have scales for, are cut" in told
