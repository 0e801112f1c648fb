"""Schedule-free optimizers of DTensors: a mesh changes no bit of what is trained, and none of what is evaluated."""

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

WORLD, STEPS = 2, 3
# a rank without a part, and parts of other sizes
SHAPES = [(40, 128), (33, 16), (1, 64)]
MAKERS: dict[str, Any] = {
    "adamw": partial(optimx.ScheduleFreeAdamW, lr=1e-2),
    "adamw-remainder16": partial(
        optimx.ScheduleFreeAdamW, lr=1e-2, param_rounding="remainder16", state_dtype=torch.float32
    ),
    "sgd": partial(optimx.ScheduleFreeSGD, lr=0.1),
}


def trained(mesh: DeviceMesh | None, name: str) -> list[list[Tensor]]:
    """Parameters in each evaluation, and after it; the last one is saved and loaded."""

    def laid_out(tensor: Tensor) -> Tensor:
        return tensor.clone() if mesh is None else distribute_tensor(tensor, mesh, [Shard(0)])

    def random(shape: tuple[int, ...], seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()

    params = [nn.Parameter(laid_out(random(shape, i))) for i, shape in enumerate(SHAPES)]
    optimizer = MAKERS[name](params)
    seen = []
    for step in range(STEPS):
        for i, param in enumerate(params):
            param.grad = laid_out(random(SHAPES[i], 10 * step + i))
        optimizer.step()
        before = [*map(full, params)]
        with optimizer.averaged():
            seen.append([*map(full, params)])
        assert all(map(torch.equal, before, map(full, params)))
        seen.append(before)
    optimizer.eval()
    saved = optimizer.state_dict(compressed=True)
    other = MAKERS[name](params)
    other.load_state_dict(saved)
    other.train()
    return [*seen, [*map(full, params)]]


def on_ranks(rank: int, name: str) -> Any:
    return trained(init_device_mesh("cpu", (WORLD,)), name)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> ranks.Results:
    checks: dict[str, ranks.Check] = {name: partial(on_ranks, name=name) for name in MAKERS}
    return ranks.run(checks, WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", MAKERS)
def test_as_in_one_process(name: str, results: ranks.Results) -> None:
    expected = trained(None, name)
    # the last evaluation changed nothing either
    assert all(map(torch.equal, expected[-1], expected[-2]))
    assert not torch.equal(expected[-2][0], expected[-3][0])
    for found in results[name]:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
