"""Algorithms whose step of a tensor depends on all of it, where its parts lie on several ranks, in all layouts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import optimx
from tests.conftest import INTERPRETED
from tests.distributed import ranks
from tests.distributed.engines import fsdp2_of_tensor_parallel, full, local, loss_of, net

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.interpreted]

WORLD, STEPS = 4, 3
OPTIMIZERS: dict[str, Any] = {
    "lamb": partial(optimx.LAMB, lr=0.1),
    "lamb-bfloat16_states": partial(optimx.LAMB, lr=0.1),
    "lamb-cautious": partial(optimx.LAMB, lr=0.1, weight_decay=0.5, cautious_weight_decay=True),
    "adamw-cautious": partial(optimx.AdamW, lr=0.1, betas=(0.9, 0.8), cautious=True, update_clipping=True),
    "lion-cautious": partial(optimx.Lion, lr=0.1, weight_decay=0.5, cautious=True, cautious_weight_decay=True),
    "nadam-last_mean": partial(optimx.NAdam, lr=0.1, weight_decay=0.1, cautious="last_mean"),
    "lion-last_mean": partial(optimx.Lion, lr=0.1, weight_decay=0.5, cautious="last_mean"),
    "adafactor": partial(optimx.Adafactor, lr=0.1, weight_decay=0.1),
    "adafactor-moment": partial(optimx.Adafactor, lr=0.1, beta1=0.9),
    "adafactor-hf": partial(optimx.Adafactor, lr=None, variant="hf", weight_decay=0.1),
}
MUON = partial(optimx.Muon, lr=0.1)
STRIDED = {"muon": partial(MUON, ns_dtype=torch.float32), **{name: OPTIMIZERS[name] for name in ("lamb", "adafactor")}}
#: Shards are even, uneven and empty; of matrices, kernels of convolutions, vectors.
SHAPES = [(8, 6), (5, 7), (1, 4), (3, 1), (6, 2, 3, 3), (5,), (1,)]
R, ROWS, COLUMNS = Replicate(), Shard(0), Shard(1)
#: Of Muon: those of the last line gather what others exchange.
SETTINGS: dict[str, dict[str, Any]] = {
    "clipped": {"max_grad_norm": 1.0}, "plain": {}, "float16": {"ns_dtype": torch.float16}, "split": {"split": 2},
    "cautious": {"cautious_weight_decay": True, "weight_decay": 0.5},
    "unequal": {"split": (2, 4), "adjust_lr_fn": "match_rms_adamw"}, "neuron": {"normalize": "neuron"},
}  # fmt: skip
#: Over the two dimensions of a mesh.
LAYOUTS = [(ROWS, R), (R, COLUMNS), (ROWS, COLUMNS), (ROWS, ROWS)]
TRIED: list[tuple[str, float | None]]
if INTERPRETED:
    # a millisecond a program
    SHAPES, TRIED = (
        [(5, 7), (1, 4), (3, 2, 3, 3), (5,)],
        [("lamb", None), ("adamw-cautious", 1.0), ("lion-last_mean", 1.0), ("adafactor-moment", 1.0)],
    )
    SETTINGS = {"clipped": SETTINGS["clipped"]}
else:
    LAYOUTS += [(R, ROWS), (COLUMNS, ROWS), (COLUMNS, COLUMNS), (R, R)]
    TRIED = [*product(OPTIMIZERS, (None, 1.0))]


def cases() -> Iterator[tuple[Tensor, tuple[Any, ...]]]:
    """A tensor, and how it is laid out."""
    generator = torch.Generator().manual_seed(0)
    for shape, layout in product(SHAPES, LAYOUTS):
        if len(shape) > 1 or COLUMNS not in layout:
            tensor = torch.randn(shape, generator=generator)
            yield tensor, layout
    yield torch.randn(6, 8, generator=generator).t(), (ROWS, COLUMNS)
    yield torch.randn(6, 8, generator=generator).t(), (ROWS, R)


def grads(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1 + step)
    return [torch.randn(tensor.shape, generator=generator) * 10 ** (i % 3 - 1) for i, (tensor, _) in enumerate(cases())]


def trained(
    name: str, mesh: DeviceMesh | None, clip: float | None
) -> tuple[list[Tensor], list[dict[str, Tensor]], Any]:
    """Parameters and states after some steps, on a mesh or in one process."""

    def laid_out(tensor: Tensor, layout: tuple[Any, ...]) -> Tensor:
        return tensor.clone() if mesh is None else distribute_tensor(tensor, mesh, layout)

    params = [nn.Parameter(laid_out(tensor, layout)) for tensor, layout in cases()]
    optimizer = OPTIMIZERS[name](params, max_grad_norm=clip)
    for step in range(STEPS):
        for i, (param, grad, (_, layout)) in enumerate(zip(params, grads(step), cases(), strict=True)):
            # of some there is none in a step, on all ranks
            param.grad = None if step == 1 and i % 5 == 0 else laid_out(grad, layout)
        optimizer.step()
        if name.endswith("bfloat16_states") and not step:
            for state in optimizer.state.values():
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = state[key].bfloat16()
    assert not any(row.reason for row in optimx.explain(optimizer).rows), optimx.explain(optimizer)
    states = [{key: full(value) for key, value in optimizer.state[param].items()} for param in params]
    return [*map(full, params)], states, optimizer


def layouts(rank: int, name: str, clip: float | None) -> Any:
    params, states, _ = trained(name, init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")), clip)
    return params, states


def counted(rank: int, name: str, layout: tuple[Any, ...], clip: float | None) -> list[int]:
    """Lengths of the vectors that meet in a step of two parameters, one of which has no gradient."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    params = [nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, layout)) for _ in range(2)]
    optimizer = OPTIMIZERS[name](params, max_grad_norm=clip)
    lengths: list[int] = []
    original = dist.all_reduce

    def record(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    params[0].grad = distribute_tensor(torch.ones(8, 4), mesh, layout)
    dist.all_reduce = record
    try:
        optimizer.step()
    finally:
        dist.all_reduce = original
    assert bool(torch.isfinite(local(params[0])).all())
    return lengths


def replicas(rank: int, name: str) -> Tensor:
    """What a rank has of a matrix of one row, of which the first two of four ranks have a copy of a part each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    param = nn.Parameter(distribute_tensor(torch.ones(1, 4), mesh, (ROWS, R)))
    optimizer = OPTIMIZERS[name]([param])
    for step in range(STEPS):
        param.grad = distribute_tensor(torch.arange(1.0, 5.0)[None] + step, mesh, (ROWS, R))
        optimizer.step()
    return local(optimizer.state[param]["col_var"])


def matrices(mesh: DeviceMesh | None, name: str) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Parameters and states after some steps of Muon, whose matrices are put together."""
    settings = SETTINGS[name]
    made = [case for case in cases() if case[0].dim() > 1 and (len(case[0]) == 6 or "split" not in settings)]
    params = [nn.Parameter(t.clone() if mesh is None else distribute_tensor(t, mesh, layout)) for t, layout in made]
    optimizer = optimx.Muon(params, **{"lr": 0.1, "ns_dtype": torch.float32, **settings})
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for i, (param, (tensor, layout)) in enumerate(zip(params, made, strict=True)):
            grad = torch.randn(tensor.shape, generator=generator)
            grad = grad if mesh is None else distribute_tensor(grad, mesh, layout)
            param.grad = None if step == 1 and i % 5 == 0 else grad
        optimizer.step()
    states = [{name: full(value) for name, value in optimizer.state[param].items()} for param in params]
    if mesh is not None:
        reasons = [row.reason for row in optimx.explain(optimizer).rows]
        gathers = {"several dimensions": True, "strided": False, "rows are normalized": name == "neuron"}
        for text, is_there in gathers.items():
            assert any(text in reason for reason in reasons) is is_there, reasons
    return [*map(full, params)], states


def whole_matrices(rank: int, name: str) -> Any:
    return matrices(init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")), name)


def collectives(rank: int, n_matrices: int) -> dict[str, int]:
    """How often a step calls which collective, after the first."""
    mesh = init_device_mesh("cpu", (WORLD,))
    params = [nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [ROWS])) for _ in range(n_matrices)]
    optimizer = optimx.Muon(params, max_grad_norm=1.0)
    for param in params:
        param.grad = distribute_tensor(torch.ones(8, 4), mesh, [ROWS])
    optimizer.step()
    with CommDebugMode() as counted:
        optimizer.step()
    return {str(name): n for name, n in counted.get_comm_counts().items()}


def in_steps(model: nn.Module, optimizer: Any, loss: Any) -> list[Tensor]:
    """The optimizer's parameters after some steps."""
    for step in range(STEPS):
        model.zero_grad()
        loss(step).backward()
        optimizer.step()
    return [full(param) for group in optimizer.param_groups for param in group["params"]]


def of_matrices(params: Iterable[Tensor], name: str) -> Any:
    return STRIDED[name]([param for param in params if param.dim() > 1], max_grad_norm=0.5)


def strided(rank: int, name: str) -> list[Tensor]:
    """FSDP2 of tensor parallelism along the same dimension leaves strided shards."""
    trained = fsdp2_of_tensor_parallel(rank, partial(of_matrices, name=name))
    assert "_StridedShard" in str([param.placements for param in trained.model.parameters()])
    return in_steps(trained.model, trained.optimizer, trained.loss)


def apart(rank: int, name: str) -> str:
    """What a rank is told when a gradient is missing on another one; nothing changes."""
    mesh = init_device_mesh("cpu", (WORLD,))
    params = [nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [ROWS])) for _ in range(2)]
    make = {**OPTIMIZERS, "muon": MUON}[name]
    optimizer = make([{"params": params[:1]}, {"params": params[1:]}], max_grad_norm=1.0)
    for param in params:
        param.grad = distribute_tensor(torch.ones(8, 4), mesh, [ROWS])
    if rank == 1:
        params[1].grad = None
    with pytest.raises(RuntimeError) as raised:
        optimizer.step()
    assert all(torch.equal(full(param), torch.ones(8, 4)) for param in params)
    params[1].grad = None
    optimizer.step()
    assert not torch.equal(local(params[0]), torch.ones(2, 4))
    return str(raised.value)


#: Lengths of vectors, after those of who has a gradient, and of how many, and that of the norm.
COUNTED = {
    # lengths of two parameters and their steps
    ("lamb", (ROWS, R)): [4],
    ("lamb", (ROWS, COLUMNS)): [4, 4],
    # how many elements took a step
    ("lion-last_mean", (ROWS, R)): [2],
    # sums of columns with the sum of rows' averages; lengths
    ("adafactor", (ROWS, R)): [2 * (4 + 1), 4],
    # sums of rows
    ("adafactor", (R, COLUMNS)): [2 * 8, 4],
    # sums of rows over ranks with other columns, of columns over those with other rows; averages; lengths
    ("adafactor", (ROWS, COLUMNS)): [2 * 4, 2 * 2, 2, 4, 4],
}

CHECKS: dict[str, ranks.Check] = {
    **{f"{name}-{clip}": partial(layouts, name=name, clip=clip) for name, clip in TRIED},
    **{
        f"{name}-{layout}-{clip}": partial(counted, name=name, layout=layout, clip=clip)
        for name, layout in COUNTED for clip in (None, 1.0)
    },
    "replicas": partial(replicas, name="adafactor"),
    **{f"apart-{name}": partial(apart, name=name) for name in ("lamb", "adafactor", "muon")},
    **{f"strided-{name}": partial(strided, name=name) for name in STRIDED},
    **{f"matrices-{name}": partial(whole_matrices, name=name) for name in SETTINGS},
    **{f"collectives-{n}": partial(collectives, n_matrices=n) for n in (1, 20)},
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> ranks.Results:
    return ranks.run(CHECKS, WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("name", "clip"), TRIED)
def test_as_whole_tensors(name: str, clip: float | None, results: ranks.Results) -> None:
    params, states, _ = trained(name, None, clip)
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
    if name.endswith("bfloat16_states"):
        close = {"rtol": 1e-2, "atol": 1e-2}
    for of_rank, of_states in results[f"{name}-{clip}"]:
        for i, (tensor, layout) in enumerate(cases()):
            told = f"{tuple(tensor.shape)}, {layout}"
            torch.testing.assert_close(of_rank[i], params[i], **close, msg=lambda m, told=told: f"{told}: {m}")
            assert of_states[i].keys() == states[i].keys()
            for key, value in states[i].items():
                torch.testing.assert_close(
                    of_states[i][key], value, **close, msg=lambda m, told=told, key=key: f"{key} of {told}: {m}"
                )


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize(("name", "layout"), COUNTED)
def test_vectors_that_meet(name: str, layout: tuple[Any, ...], clip: float | None, results: ranks.Results) -> None:
    before = [4] * (2 - layout.count(R)) + [2] * bool(clip)
    assert results[f"{name}-{layout}-{clip}"] == [before + COUNTED[name, layout]] * WORLD


def test_ranks_without_elements_have_the_averages(results: ranks.Results) -> None:
    first, *others = results["replicas"]
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


@pytest.mark.parametrize("name", SETTINGS)
def test_matrices_that_are_put_together(name: str, results: ranks.Results) -> None:
    close = {"rtol": 1e-2, "atol": 1e-3} if name == "float16" else {"rtol": 1e-4, "atol": 1e-5}
    for found in results[f"matrices-{name}"]:
        torch.testing.assert_close(found, matrices(None, name), **close)


def test_collectives_do_not_depend_on_how_many_matrices_there_are(results: ranks.Results) -> None:
    # who has a gradient, the norm; there, and back
    assert results["collectives-1"] == results["collectives-20"]
    assert [*results["collectives-20"][0].values()] == [2, 2]


@pytest.mark.parametrize("name", STRIDED)
def test_strided_shards(name: str, results: ranks.Results) -> None:
    model = net()
    expected = in_steps(model, of_matrices(model.parameters(), name), partial(loss_of, model))
    for found in results[f"strided-{name}"]:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lamb", "adafactor", "muon"])
def test_gradients_on_some_ranks_alone(name: str, results: ranks.Results) -> None:
    for told in results[f"apart-{name}"]:
        assert "gradients should be on all ranks or on none but parameter 0 of group 1 has one on 3 of 4" in told
