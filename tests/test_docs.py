"""What the documentation site takes from the code is all there."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import optimx
from optimx.config import BatchScalingConfig, Config, GroupsConfig, OptimizerConfig, ScheduleConfig

pytest.importorskip("mkdocstrings_handlers.python")

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
    assert pages == {"optimizers/index.md", *(f"optimizers/{name.lower()}.md" for name in hooks.optimizers())}
    for name in hooks.optimizers():
        page = PAGES[f"optimizers/{name.lower()}.md"]
        assert f"<!-- cost {name} -->" in page
        assert f"::: optimx.{name}\n" in page


@pytest.mark.parametrize(
    ("name", "expected"),
    [("AdamW", (8, 28, 32)), ("SGD", (0, 12, 16)), ("Lion", (4, 20, 24)), ("LAMB", (8, 44, 48))],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_cost(name: str, expected: tuple[float, float, float]) -> None:
    assert hooks.cost_of(name, {}) == expected


def test_adafactor_keeps_a_row_and_a_column() -> None:
    state, moved, clipped = hooks.cost_of("Adafactor", {})
    assert state == 2 * 4 / 1024
    assert moved == clipped == pytest.approx(24, abs=0.1)


@pytest.mark.parametrize("section", [Config, OptimizerConfig, GroupsConfig, ScheduleConfig, BatchScalingConfig])
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
