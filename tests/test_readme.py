"""The examples of README and documentation run, and what the pages name exists."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

# makes torchvision importable, which timm and transformers load
from tests import models  # noqa: F401

ROOT = Path(__file__).parents[1]
FILES = (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES}
# blocks in a tab are indented
BLOCKS = {
    f"{page}-{i}": textwrap.dedent(code)
    for page, text in PAGES.items()
    for i, (_, code) in enumerate(re.findall(r"^( *)```python\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE))
}
(CONFIG,) = re.findall(r"```toml\n(.*?)```", PAGES["docs/config.md"], re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)")


@pytest.mark.parametrize("code", BLOCKS.values(), ids=BLOCKS)
def test_python_blocks_run(
    code: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in re.findall(r"^import (timm|transformers)$", code, re.MULTILINE):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.toml").write_text(CONFIG)
    exec(compile(code, "page.md", "exec"), {})
    assert capsys.readouterr().out


def anchors(text: str) -> set[str]:
    """What a link can name in a page: its headings, as GitHub and mkdocs write them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "bench/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for path, anchor in LINK.findall(text):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text()), f"{path}#{anchor}"


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len(PAGES["README.md"].split()) <= 1300


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in (*PAGES.values(), (ROOT / "CONTRIBUTING.md").read_text()):
        assert set(re.findall(r"(?:`|^)make ([a-z-]+)(?=`| +#)", text, re.MULTILINE)) <= targets
