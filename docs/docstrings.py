"""Docstrings as the site's generator reads them: Google sections, and Markdown where Sphinx has roles."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")


TABLE = re.compile(r"^(=+) =+\n(.+)\n=+ =+\n((?:.+\n)+?)=+ =+$", re.MULTILINE)


def as_markdown(text: str) -> str:
    """A docstring without Sphinx's roles and tables, and with a section of arguments for "Args beyond torch's:"."""
    text = TABLE.sub(_table, text.replace("Args beyond torch's:", "Keyword Args: Beyond torch's"))
    return ROLE.sub(r"`\1`", text)


def _table(match: re.Match[str]) -> str:
    width = len(match[1])
    lines = [match[2], *match[3].splitlines()]
    head, *rows = (f"| {line[:width].strip()} | {line[width:].strip()} |" for line in lines)
    return "\n".join([head, "| --- | --- |", *rows])


class SphinxRoles(griffe.Extension):
    """Rewrites the docstring of everything that is documented."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
