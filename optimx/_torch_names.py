"""Names of torch's modules that other projects import, from ours too: ``from optimx.optimizer import required``.

Torch's functional forms and helpers are not ours, and not in our modules; whoever replaces ``torch.optim`` by
``optimx`` in an import finds torch's own there.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from types import ModuleType
from typing import Any

import torch.optim


def stand_in(package: str) -> None:
    """Make every module of ``torch.optim``, and every name in it, importable from ``package``."""
    ours = {info.name for info in pkgutil.iter_modules(sys.modules[package].__path__)}
    for info in pkgutil.iter_modules(torch.optim.__path__):
        theirs = importlib.import_module(f"torch.optim.{info.name}")
        name = f"{package}.{info.name}"
        if info.name in ours:
            _fall_back(importlib.import_module(name), theirs)
        else:
            sys.modules[name] = theirs


def _fall_back(ours: ModuleType, theirs: ModuleType) -> None:
    """Let a name that our module does not have be torch's."""

    def __getattr__(name: str) -> Any:
        if not name.startswith("__") and hasattr(theirs, name):
            return getattr(theirs, name)
        raise AttributeError(f"module {ours.__name__!r} has no attribute {name!r}")

    ours.__getattr__ = __getattr__  # type: ignore[method-assign]
