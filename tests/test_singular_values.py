"""The picture of Muon's coefficients: what it shows is what a step does, and the page has it."""

import re
from pathlib import Path

import pytest
import torch

# `make gpu` uses the Python on PATH, which need not have what only the pictures want
pytest.importorskip("matplotlib")

from bench import singular_values
from bench.plots import PICTURES
from bench.singular_values import COEFFICIENTS, draw, orthogonalized
from optimx._engine.newton_schulz import NAMED

ROOT = Path(singular_values.__file__).parents[1]


def test_every_set_is_shown():
    assert {name: len(iterations.coefficients) for name, iterations in NAMED.items()} == COEFFICIENTS


def test_what_is_shown_is_the_polynomial_of_the_singular_values():
    left, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    values = torch.tensor([0.9, 0.4, 0.1, 0.02])
    matrix = torch.cat([left @ values.diag(), torch.zeros(4, 4)], 1) / values.norm()
    expected = values / values.norm()
    for a, b, c in NAMED["standard"].coefficients:
        expected = a * expected + b * expected**3 + c * expected**5
    found = torch.linalg.svdvals(orthogonalized(matrix, "standard"))
    assert found.sort().values == pytest.approx(expected.sort().values, abs=0.02)
    # in no other scale, and in no other direction
    assert (orthogonalized(matrix, "deepseek-v4")[:, :4] - left).abs().max() < 0.02


def test_momentum_is_that_of_training(monkeypatch):
    monkeypatch.setattr(singular_values, "STEPS", 2)
    matrix = singular_values.momentum()
    assert matrix.shape == (128, 512)
    assert matrix.norm() == pytest.approx(1)


def test_every_bar_is_in_the_picture(monkeypatch, tmp_path):
    matrix = torch.eye(16, 32) / 4
    matrix[0] /= 50
    monkeypatch.setattr(singular_values, "momentum", lambda: matrix)
    counts = []
    save = singular_values.save
    monkeypatch.setattr(
        singular_values,
        "save",
        lambda chart, path: (
            counts.extend(sum(bar.get_height() for bar in axes.patches) for axes in chart.axes),
            save(chart, path),
        ),
    )
    draw(tmp_path / "picture.png")
    assert counts == [16] * 5
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", PICTURES)
def test_pictures_are_there_and_on_a_page_with_words(path):
    picture = ROOT / path
    assert picture.read_bytes().startswith(b"\x89PNG")
    pages = "\n".join(page.read_text() for page in picture.parent.glob("*.md"))
    (alt,) = re.findall(rf"!\[([^\]]+)\]\({picture.name}\)", pages)
    assert len(alt) > 20
