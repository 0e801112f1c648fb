"""Rules: settings for the parameters whose names match."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, init=False)
class Rule:
    """Settings for the parameters that ``match``."""

    match: str | re.Pattern[str] | Sequence[str | re.Pattern[str]]
    lr: float | None
    lr_mult: float | None
    weight_decay: float | None
    wd_mult: float | None
    freeze: bool
    others: dict[str, Any]

    def __init__(
        self,
        match: str | re.Pattern[str] | Sequence[str | re.Pattern[str]],
        lr: float | None = None,
        lr_mult: float | None = None,
        weight_decay: float | None = None,
        wd_mult: float | None = None,
        freeze: bool = False,
        **others: Any,
    ) -> None:
        raise NotImplementedError
