"""`make gpu-smoke` has to work when a GPU is there at last: here it runs on the fake one, with one optimizer."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from tests import gpu_smoke

pytest.importorskip("_fake_device", reason="about the fake GPU: make fake-gpu")
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def small_tiles() -> None:
    """None here: the script runs without pytest."""


def test_one_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    # fewer elements, as the interpreter is slow
    monkeypatch.setattr(gpu_smoke, "SHAPES", [(), (3, 3), (30, 77)])
    with warnings.catch_warnings():
        assert gpu_smoke.main(["--only", "adamw", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "smoke.json").read_text())
    assert len(report["results"]) == len(gpu_smoke.DTYPES) * len(gpu_smoke.WAYS)
    assert "16 steps beside float64, 0 failed" in capsys.readouterr().out


def test_numbers_that_are_off_are_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_smoke, "DTYPES", (torch.float32,))
    monkeypatch.setattr(gpu_smoke, "WAYS", {"plain": gpu_smoke.WAYS["plain"]})
    monkeypatch.setattr(gpu_smoke, "TOLERANCE", {torch.float32: 1e-9})
    with warnings.catch_warnings():
        assert gpu_smoke.main(["--only", "sgd", "--out", str(tmp_path)]) == 1
