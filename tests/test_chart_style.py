"""The charts' style: readable on white and on dark pages, for color-blind readers too; equal charts are equal files."""

from itertools import combinations

import pytest

# `make gpu` uses the Python on PATH, which need not have what only the charts want
pytest.importorskip("matplotlib")

from matplotlib import rcParams
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from bench.chart_style import CYCLE, INK, PAGES, STYLE, figure, save

#: Color blindness, on linear RGB (https://doi.org/10.1109/TVCG.2009.113, severity 1).
SIGHT = {
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "deuteranopia": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
}
#: From linear RGB to cone responses, and from their cube roots to Oklab (https://bottosson.github.io/posts/oklab/).
CONES = ((0.4122, 0.5363, 0.0514), (0.2119, 0.6807, 0.1074), (0.0883, 0.2817, 0.6300))
OKLAB = ((0.2105, 0.7936, -0.0041), (1.9780, -2.4286, 0.4506), (0.0259, 0.7828, -0.8087))


def times(matrix, vector):
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def linear(color):
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]


def contrast(a, b):
    """Of WCAG 2: 3 is its limit for graphics."""
    dark, light = sorted(times([(0.2126, 0.7152, 0.0722)], linear(color))[0] for color in (a, b))
    return (light + 0.05) / (dark + 0.05)


def distance(a, b, sight):
    """In Oklab, where 0.02 is just visible side by side."""
    seen = ([min(max(c, 0), 1) for c in times(SIGHT[sight], linear(color))] for color in (a, b))
    labs = [times(OKLAB, [c ** (1 / 3) for c in times(CONES, rgb)]) for rgb in seen]
    return sum((x - y) ** 2 for x, y in zip(*labs, strict=True)) ** 0.5


@pytest.mark.parametrize("page", PAGES)
def test_every_color_has_contrast_on_every_page(page):
    assert contrast(INK, page) >= 3.5
    assert min(contrast(color, page) for color in CYCLE) >= 3


@pytest.mark.parametrize("sight", SIGHT)
def test_series_stay_apart(sight):
    assert min(distance(a, b, sight) for a, b in combinations(CYCLE, 2)) > 0.1


def test_equal_charts_are_equal_transparent_files_and_nothing_else_changes(tmp_path):
    before = {name: rcParams[name] for name in STYLE}
    for name in ("one", "two"):
        with figure(2, 1) as chart:
            axes = chart.subplots()
            axes.plot([1, 3, 2])
            axes.set_title("title")
            save(chart, tmp_path / name / "chart.png")
    assert {name: rcParams[name] for name in STYLE} == before
    assert axes.lines[0].get_color() == CYCLE[0]
    assert {axes.title.get_color(), axes.xaxis.get_ticklabels()[0].get_color()} == {INK}
    one, two = ((tmp_path / name / "chart.png").read_bytes() for name in ("one", "two"))
    assert one == two
    pixels = imread(tmp_path / "one" / "chart.png")
    assert pixels.shape == (110, 220, 4)
    assert pixels[0, 0, 3] == 0
