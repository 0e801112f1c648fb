"""Docstrings as the site's generator reads them: Google sections, and Markdown where Sphinx has roles."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")


def as_markdown(text: str) -> str:
    """A docstring without Sphinx roles, and with a section of arguments where it says "Args beyond torch's:"."""
    return ROLE.sub(r"`\1`", text.replace("Args beyond torch's:", "Keyword Args: Beyond torch's"))


class SphinxRoles(griffe.Extension):
    """Rewrites the docstring of everything that is documented."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
