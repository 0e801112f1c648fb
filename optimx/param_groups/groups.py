"""The groups of a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .rules import Rule


def param_groups(
    model: nn.Module,
    *,
    lr: float | Tensor | None = None,
    weight_decay: float | None = None,
    no_decay: str | Sequence[str | re.Pattern[str]] | None = "auto",
    layer_decay: float | None = None,
    layers: Callable[[str], int] | Sequence[Any] | Mapping[str, Any] | None = None,
    layer_preset: str = "beit",
    min_lr_scale: float = 0.0,
    rules: Sequence[Rule | Mapping[str, Any]] = (),
    freeze: Sequence[str | re.Pattern[str]] = (),
    include_frozen: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups of a model."""
    raise NotImplementedError
