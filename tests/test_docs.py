"""What the documentation site takes from the code is all there."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import optimx
from bench.catalogue import optimizers
from optimx.config import AdamWConfig, BatchScalingConfig, Config, GroupsConfig, OptimizerConfig, ScheduleConfig

pytest.importorskip("mkdocstrings_handlers.python")

from mkdocs.config import load_config

from docs import hooks
from docs.docstrings import as_markdown

DOCS = Path(hooks.__file__).parent
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in DOCS.glob("**/*.md")}


@pytest.mark.parametrize("page", PAGES)
def test_every_directive_becomes_something(page: str) -> None:
    for directive in hooks.DIRECTIVE.findall(PAGES[page]):
        made = hooks.expand(f"<!-- {directive} -->")
        assert made.strip()
        assert "<!--" not in made


@pytest.mark.parametrize("directive", ["cots AdamW", "cost AdanW", "section Nowhere", "fields GroupConfig"])
def test_unknown_names_are_errors(directive: str) -> None:
    with pytest.raises((KeyError, AttributeError)):
        hooks.expand(f"<!-- {directive} -->")


def test_every_optimizer_has_a_page() -> None:
    pages = {page for page in PAGES if page.startswith("optimizers/")}
    assert pages == {"optimizers/index.md", *(f"optimizers/{hooks.page_of(name)}" for name in optimizers())}
    for name in optimizers():
        page = PAGES[f"optimizers/{hooks.page_of(name)}"]
        assert f"<!-- cost {name} -->" in page
        assert f"::: optimx.{name}\n" in page


def test_every_page_is_in_the_navigation() -> None:
    """Of mkdocs.yml, or added by the hook for an optimizer."""
    config = hooks.on_config(load_config(str(DOCS.parent / "mkdocs.yml")))
    found: list[str] = []

    def collect(entry: object) -> None:
        if isinstance(entry, str):
            found.append(entry)
        else:
            for part in entry.values() if isinstance(entry, dict) else entry:  # type: ignore[attr-defined]
                collect(part)

    collect(config.nav)
    assert sorted(found) == sorted(PAGES)


def classes_in(text: str, row: str) -> set[str]:
    """The names in the first cell of the row of a table that has this one."""
    (cell,) = re.findall(rf"^\| ([^|]*`{row}`[^|]*) \|", text, re.MULTILINE)
    return {*re.findall(r"`(\w+)`", cell)}


@pytest.mark.parametrize("page", ["README.md", "docs/migration.md"])
def test_pages_name_every_class_that_torch_has(page: str) -> None:
    """Optimizers that torch lacks are in the catalogue, docs/optimizers/index.md; a page names some of them."""
    text = (DOCS.parent / page).read_text()
    torchs = {name for name in optimizers() if hasattr(torch.optim, name)}
    named = classes_in(text, "AdamW") | classes_in(text, "Adafactor")
    assert named >= torchs, f"{page} should name in the row of AdamW: {sorted(torchs - named)}"
    assert classes_in(text, "Lion") <= {*optimizers()} - torchs, f"{page}: the row of Lion has what torch has"


@pytest.mark.parametrize("page", ["README.md", "docs/optimizers/index.md"])
def test_what_is_torchs_own_is_named(page: str) -> None:
    theirs = {
        name for name in torch.optim.__all__
        if isinstance(thing := getattr(torch.optim, name), type) and issubclass(thing, torch.optim.Optimizer)
        and thing is not torch.optim.Optimizer and getattr(optimx, name) is thing
    }  # fmt: skip
    (line,) = re.findall(r"^.*are torch's own classes\.$", (DOCS.parent / page).read_text(), re.MULTILINE)
    assert {*re.findall(r"`(\w+)`", line)} == theirs, f"{page} should name {sorted(theirs)}"


def test_counts_of_the_convergence_check_are_those_of_its_results() -> None:
    text = " ".join(PAGES["benchmarks.md"].split())
    (said,) = re.findall(r"for (\w+) optimizers, (\w+) tasks and (\w+) seeds, all (\d+) final losses", text)
    runs = json.loads((hooks.RESULTS / "cpu-amd-epyc-2-threads" / "convergence.json").read_text())["runs"]
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
             "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"]  # fmt: skip
    measured = [len({run[key] for run in runs}) for key in ("optimizer", "task")]
    (seeds,) = {run["seeds"] for run in runs}
    expected = (*(words[count] for count in (*measured, seeds)), str(len(runs)))
    assert said == expected, f"docs/benchmarks.md should say {expected}, which is what was measured"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("AdamW", (8, 28, 32)), ("SGD", (0, 12, 16)), ("Lion", (4, 20, 24)), ("LAMB", (8, 44, 48))],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_cost(name: str, expected: tuple[float, float, float]) -> None:
    assert hooks.cost_of(name, {}) == expected


def test_muons_costs_are_those_of_the_models() -> None:
    rows = [re.split(r" \| ", line.strip("| ")) for line in hooks.muon_costs().splitlines()[2:]]
    models = {"GPT-2 124M": ("84.9M", "2.38"), "Llama 3 8B": ("6979.3M", "195")}
    assert [row[:3] for row in rows] == [
        [model, params, form] for model, (params, _) in models.items() for form in ("standard", "symmetric", "gram")
    ]
    # 20 m^2 n + 10 m^3 of a matrix: 12 blocks of 768 x (768, 2304, 3072, 3072)
    flops = 12 * 768**3 * (20 * (1 + 3 + 4 + 4) + 10 * 4)
    assert float(rows[0][3]) == pytest.approx(flops / 1e12, rel=5e-3)
    for row in rows:
        assert row[-1] == models[row[0]][1]
    assert float(rows[0][3]) > float(rows[1][3]) > float(rows[2][3])


def test_adafactor_keeps_a_row_and_a_column() -> None:
    state, moved, clipped = hooks.cost_of("Adafactor", {})
    assert state == 2 * 4 / 1024
    assert moved == clipped == pytest.approx(24, abs=0.1)


@pytest.mark.parametrize(
    "section", [Config, OptimizerConfig, AdamWConfig, GroupsConfig, ScheduleConfig, BatchScalingConfig]
)
def test_every_key_of_the_config_has_a_row(section: type) -> None:
    text = hooks.expand(f"<!-- fields {section.__name__} -->")
    assert f"<!-- fields {section.__name__} -->" in PAGES["config.md"]
    rows = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in text.splitlines()[2:]]
    assert [row[0] for row in rows] == [f"`{f.name}`" for f in dataclasses.fields(section) if f.name != "args"]
    for key, what, default, meaning in rows:
        field = next(f for f in dataclasses.fields(section) if f"`{f.name}`" == key)
        assert what
        assert meaning
        if field.default not in (None, (), dataclasses.MISSING):
            assert default == f"`{field.default!r}`"


def test_every_public_class_and_function_is_somewhere() -> None:
    text = "\n".join(PAGES.values())
    ours = {
        name for name in optimx.__all__
        if getattr(getattr(optimx, name), "__module__", "").startswith("optimx.") and name not in ("Config",)
    }  # fmt: skip
    documented = {entry.rpartition(".")[2] for entry in re.findall(r"^::: (\S+)", text, re.MULTILINE)}
    assert ours - documented == set()


def test_links_to_results_are_those_of_the_site() -> None:
    page = """![p](p.png) [r](../bench/results/m/r.md) ![q](../bench/results/m/q.png)
<!-- bench m models -->
[page](page.md) [out](https://example.org)
<!-- bench end -->
"""
    assert hooks.expand(page) == page.replace("../bench/results/", "benchmarks/")
    assert hooks.expand("[r](../../bench/results/m/r.md)") == "[r](../benchmarks/m/r.md)"


def test_contributing_has_no_links_that_the_site_lacks() -> None:
    for directive in hooks.DIRECTIVE.findall(PAGES["contributing.md"]):
        assert "](" not in hooks.expand(f"<!-- {directive} -->")


def test_docstrings_as_markdown() -> None:
    docstring = """Like :class:`torch.optim.SGD`, see :meth:`~optimx.build.Build.explain`.

Args beyond torch's:
    x: More.

======= ====
theirs  ours
======= ====
``a``   ``b``
``c=1`` ``d``
======= ====
"""
    assert (
        as_markdown(docstring)
        == """Like `torch.optim.SGD`, see `optimx.build.Build.explain`.

Keyword Args: Beyond torch's
    x: More.

| theirs | ours |
| --- | --- |
| ``a`` | ``b`` |
| ``c=1`` | ``d`` |
"""
    )
