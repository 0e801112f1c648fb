"""What rows warn of, once for each parameter or layer: updates far from a thousandth, gradients that vanish."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .parts import Part

__all__ = ["FAR", "ROWS", "USUAL_RATIO", "VANISHING", "Rules"]

#: What the update of a matrix is to the matrix once the learning rate is warmed up: about this, and far from it if it
#: is so many times more or less.
USUAL_RATIO, FAR = 1e-3, 100.0
#: A layer's root mean square gradient vanishes below this share of the whole model's.
VANISHING = 1e-5
#: How many rows in succession have to say so.
ROWS = 3


class Rules:
    """Reads rows and warns, with :class:`RuntimeWarning`.

    Vectors are not judged: the update of a bias or of a norm's weight may be anything beside it. An update is not
    called small while the learning rate is a tenth of what it was set to or less, as in a warmup or at the end of a
    schedule, nor where only a device knows the learning rate.

    Args:
        optimizer: Whose groups have the learning rates.
        params: The watched parameters.
        parts: Those that rows tell of, and the whole.
        warmup_steps: Ratios are not judged up to this step.
    """

    def __init__(
        self, optimizer: Optimizer, params: Sequence[Tensor], parts: Sequence[Part], warmup_steps: int
    ) -> None:
        self._optimizer = optimizer
        group_of = [i for i, group in enumerate(optimizer.param_groups) for _ in group["params"]]
        single = [(part.name, part.members[0]) for part in parts if part.is_parameter]
        self._matrices = [(name, group_of[i]) for name, i in single if params[i].dim() >= 2]
        self._layers = {part.name: sum(params[i].numel() for i in part.members) for part in parts if part.is_layer}
        self._elements = sum(param.numel() for param in params)
        self._warmup_steps = warmup_steps
        self._in_succession: dict[str, int] = {}

    def read(self, step: int, row: Mapping[str, float]) -> None:
        """Warn of what a row and those before it tell; of skipped steps and NaN they tell nothing."""
        if row["skipped"] or not math.isfinite(row["grad_norm"]):
            return
        if step > self._warmup_steps:
            self._read_ratios(step, row)
        self._read_layers(step, row)

    def _read_ratios(self, step: int, row: Mapping[str, float]) -> None:
        at_full_lr = [_at_full_lr(group) for group in self._optimizer.param_groups]
        for name, group in self._matrices:
            ratio = row.get(f"update_ratio/{name}", USUAL_RATIO)
            text = f"{name} is updated by {ratio:.1e} of its norm a step, far from the usual {USUAL_RATIO:.0e}: "
            self._count(f"{name} above", ratio > USUAL_RATIO * FAR, step, text + "its learning rate may be too large")
            small = ratio < USUAL_RATIO / FAR and at_full_lr[group]
            self._count(f"{name} below", small, step, text + "it hardly learns")

    def _read_layers(self, step: int, row: Mapping[str, float]) -> None:
        usual = row["grad_norm"] / math.sqrt(max(1, self._elements))
        for name, elements in self._layers.items():
            norm = row.get(f"grad_norm/{name}")
            share = norm / math.sqrt(elements) / usual if norm is not None and elements and usual else 1.0
            text = f"the gradient of {name} vanishes: its root mean square is {share:.1e} of the whole model's"
            self._count(f"{name} vanishes", share < VANISHING, step, text)

    def _count(self, what: str, holds: bool, step: int, text: str) -> None:
        """Warn when it holds for the last of the rows that it takes, and never again."""
        times = self._in_succession.get(what, 0)
        if times == ROWS:
            return
        self._in_succession[what] = times + 1 if holds else 0
        if self._in_succession[what] == ROWS:
            warnings.warn(f"step {step}: {text}", RuntimeWarning, stacklevel=2)


def _at_full_lr(group: Mapping[str, Any]) -> bool:
    """Whether a group's learning rate is known, without waiting, to be near what it was set to."""
    lr = group.get("lr")
    initial = group.get("initial_lr", lr)
    return isinstance(lr, Real) and isinstance(initial, Real) and float(lr) > 0.1 * float(initial)
