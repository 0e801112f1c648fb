"""What a step allocates beside parameters, gradients and states stays below the bound that ``optimx.memory`` tells."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import optimx
from bench.contestants import Run
from bench.counting import traced
from tests.cases import make_params, set_grads
from tests.conftest import INTERPRETED

BF16 = torch.bfloat16

#: Pieces, batches, and both, with shapes that codes do not take.
SHAPES = {
    "large": [(1024, 1024)],
    "small": [(40,)] * 300 + [(16, 16)] * 50 + [(32, 128)] * 20,
    "mixed": [(2048, 640), (8, 512), (300,), (33, 700)],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"max_grad_norm": 1e-3},
    "stochastic": {"param_rounding": "stochastic", "state_dtype": "stochastic"},
    "master-8bit-clip": {"param_rounding": "master", "state_dtype": "8bit", "max_grad_norm": 1e-3},
    "remainder8-8bit": {"param_rounding": "remainder8", "state_dtype": "8bit"},
    "remainder16-float32": {"param_rounding": "remainder16", "state_dtype": torch.float32},
}
ARGUMENTS: dict[str, dict[str, Any]] = {"Adafactor": {"beta1": 0.9}}
#: An operator's, a formula's, and walks of other kinds.
NAMES = ["AdamW", "NAdam", "LAMB", "Adafactor"]


def allocated(optimizer: Any) -> tuple[int, int]:
    """Bytes of a step: at most at one time beyond those before it, and those that stay."""
    now = peak = 0
    events = [event for event in traced(Run(lambda: None, optimizer.step), memory=True) if event["name"] == "[memory]"]
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak, now


def measured(optimizer: Any) -> int:
    """The most that two steps have of the machine's memory, beside the states that the first one makes."""
    before = states_bytes(optimizer)
    # what other tests have left behind must not be freed in between
    gc.collect()
    gc.disable()
    try:
        first, stays = allocated(optimizer)
        states = states_bytes(optimizer) - before
        later, _ = allocated(optimizer)
    finally:
        gc.enable()
    return max(first - states, stays - states + later)


def states_bytes(optimizer: Any) -> int:
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))


def make(name: str, dtype: torch.dtype, shapes: str, settings: dict[str, Any]) -> Any:
    params = make_params(SHAPES[shapes], dtype=dtype)
    optimizer = getattr(optimx, name)(params, **ARGUMENTS.get(name, {}), **settings)
    set_grads(params, 0)
    return optimizer


@pytest.mark.filterwarnings("ignore:.*stands still:UserWarning")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("shapes", ["small", "mixed"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.skipif(INTERPRETED, reason="pieces are a CPU's")
def test_a_step_stays_below_the_bound(name: str, shapes: str, settings: dict[str, Any]) -> None:
    optimizer = make(name, BF16, shapes, settings)
    bound = optimx.memory(optimizer).scratch
    assert bound is not None
    assert measured(optimizer) <= bound


@pytest.mark.parametrize("cautious", [True, "last_mean"])
@pytest.mark.parametrize("shapes", ["large", "small", "mixed"])
@pytest.mark.parametrize("name", ["AdamW", "NAdam", "Lion"])
@pytest.mark.skipif(INTERPRETED, reason="pieces are a CPU's")
def test_cautious_steps_stay_below_the_bound(name: str, shapes: str, cautious: bool | str) -> None:
    optimizer = make(name, torch.float32, shapes, {"cautious": cautious})
    bound = optimx.memory(optimizer).scratch
    assert bound is not None
    assert measured(optimizer) <= bound


@pytest.mark.parametrize("settings", ["stochastic", "master-8bit-clip", "remainder8-8bit", "remainder16-float32"])
@pytest.mark.skipif(INTERPRETED, reason="pieces are a CPU's")
def test_the_bound_is_what_pieces_take(settings: str) -> None:
    """Of a large tensor nothing is told that is not taken."""
    optimizer = make("AdamW", BF16, "large", SETTINGS[settings])
    bound = optimx.memory(optimizer).scratch
    assert bound is not None
    assert measured(optimizer) > 0.99 * bound


#: Stacks of small tensors; a vector, whose averages are as long as it is; a row that is longer than a piece.
FACTORED = {"stacks": SHAPES["small"], "vector": [(1 << 22,)], "row": [(2, 1 << 20)]}


@pytest.mark.parametrize("shapes", FACTORED.values(), ids=FACTORED)
@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 1e-3}], ids=["plain", "clip"])
@pytest.mark.skipif(INTERPRETED, reason="pieces are a CPU's")
def test_averages_and_stacks_stay_below_the_bound(shapes: list[tuple[int, ...]], settings: dict[str, Any]) -> None:
    """And most of it is taken, so that nothing is left out."""
    params = make_params(shapes)
    optimizer = optimx.Adafactor(params, beta1=0.9, **settings)
    set_grads(params, 0)
    bound = optimx.memory(optimizer).scratch
    assert bound is not None
    taken = measured(optimizer)
    assert 0.4 * bound < taken <= bound


@pytest.mark.skipif(INTERPRETED, reason="pieces are a CPU's")
def test_the_bound_does_not_grow_with_large_tensors() -> None:
    bounds = []
    for rows in (1024, 8192):
        params = make_params([(rows, 1024)], dtype=BF16)
        memory = optimx.memory(optimx.AdamW(params, param_rounding="remainder16", state_dtype="8bit"))
        assert memory.scratch is not None
        bounds.append(memory.scratch)
    assert bounds[0] == bounds[1]


def tensors_in(thing: Any) -> list[Tensor]:
    """Those that a bucket, or a table of it, keeps between steps."""
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, (list, tuple)):
        return [tensor for part in thing for tensor in tensors_in(part)]
    if type(thing).__name__.endswith(("Bucket", "Table")):
        return tensors_in([*vars(thing).values()])
    return []


#: Of which one counts steps, and makes rows, on the device.
TABLES = [
    *((name, settings) for name in NAMES for settings in ({}, {"max_grad_norm": 1e-3})),
    ("AdamW", {"fused": True}),
]


@pytest.mark.parametrize(("name", "settings"), TABLES, ids=str)
@pytest.mark.interpreted
@pytest.mark.skipif(not INTERPRETED, reason="tables are the kernels'")
def test_tables_stay_below_the_bound(name: str, settings: dict[str, Any]) -> None:
    """The interpreter copies tensors, so only what stays is compared, which is most of it."""
    params = make_params([(9,)] * 40 + [(150, 120), (8, 4)])
    optimizer = getattr(optimx, name)(params, **ARGUMENTS.get(name, {}), **settings)
    bound = optimx.memory(optimizer).scratch
    assert bound is not None
    set_grads(params, 0)
    optimizer.step()
    storages = [tensor.untyped_storage() for tensor in tensors_in(optimizer._engine.plans[0].buckets)]
    tables = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert bound / 8 < sum(tables.values()) <= bound


def test_nothing_is_told_of_others() -> None:
    """Not of torch's own step, nor of what Muon orthogonalizes."""
    matrix = make_params([(64, 128)])
    assert optimx.memory(optimx.AdamW(matrix, foreach=True)).scratch is None
    muon = optimx.memory(optimx.Muon(matrix))
    assert muon.scratch is None
    assert "scratch memory of a step: not told" in str(muon)
