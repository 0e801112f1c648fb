"""Tile sizes that are measured on a GPU: which are kept, and that launches read them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from optimx.triton_kernels import tensor_table
from optimx.triton_kernels.tensor_table import LaunchSize, launch_size

from bench import tune

DEFAULT, OTHER = LaunchSize(), tune.SIZES[0]


def measured(**medians: float | None) -> dict[str, SimpleNamespace]:
    """Rows in which the default size and another one have these medians, and all others need longer."""
    names = {tune.name_of(DEFAULT): medians["default"], tune.name_of(OTHER): medians["other"]}
    return {tune.name_of(size): SimpleNamespace(median_ms=names.get(tune.name_of(size), 9.0)) for size in tune.SIZES}


def test_the_default_size_is_one_of_those_measured() -> None:
    assert DEFAULT in tune.SIZES
    assert OTHER != DEFAULT


@pytest.mark.parametrize(
    ("first", "second", "best"),
    [
        ({"default": 1.0, "other": 0.8}, {"default": 1.0, "other": 1.0}, OTHER),
        ({"default": 1.0, "other": 0.5}, {"default": 1.0, "other": 3.0}, None),
        ({"default": 1.0, "other": 0.99}, {"default": 1.0, "other": 0.99}, None),
        ({"default": 1.0, "other": 0.5}, {"default": 1.0, "other": None}, None),
    ],
    ids=["faster", "slower-in-one", "hardly-faster", "failed-in-one"],
)
def test_a_size_is_kept_where_it_is_faster_on_average(first, second, best) -> None:
    assert tune.best([measured(**first), measured(**second)]) == best


def test_launches_read_what_was_kept(tmp_path, monkeypatch) -> None:
    path = tmp_path / "launch_sizes.json"
    monkeypatch.setattr(tensor_table, "TUNED", path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "some GPU")
    tensor_table._tuned.cache_clear()
    gpu = torch.device("cuda", 0)
    try:
        assert launch_size(gpu, 10) == DEFAULT
        tune.keep("another GPU", [tune.entry(2**40, DEFAULT)], path)
        tune.keep("some GPU", [tune.entry(100, OTHER)], path)
        tensor_table._tuned.cache_clear()
        assert launch_size(gpu, 99) == OTHER
        assert launch_size(gpu, 100) == launch_size(torch.device("cpu"), 10) == DEFAULT
        assert [*json.loads(path.read_text())] == ["another GPU", "some GPU"]
    finally:
        tensor_table._tuned.cache_clear()
