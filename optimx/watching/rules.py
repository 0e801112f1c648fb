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
#: How many names a warning has.
_NAMES = 3


class Rules:
    """Reads rows and warns, with :class:`RuntimeWarning`.

    Vectors are not judged: the update of a bias or of a norm's weight may be anything beside it. An update is not
    called small while the learning rate is a tenth of its peak or less, as in a warmup or at the end of a schedule, nor
    where only a device knows the learning rate. What comes true of several at once is one warning.

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
        self._peaks = [0.0] * len(optimizer.param_groups)
        self._in_succession: dict[tuple[str, str], int] = {}

    def read(self, step: int, row: Mapping[str, float]) -> None:
        """Warn of what a row and those before it tell; of skipped steps and NaN they tell nothing."""
        at_peak = [self._at_peak(g, group) for g, group in enumerate(self._optimizer.param_groups[: len(self._peaks)])]
        if row["skipped"] or not math.isfinite(row["grad_norm"]):
            return
        if step > self._warmup_steps:
            ratios = {name: row.get(f"update_ratio/{name}", USUAL_RATIO) for name, _ in self._matrices}
            large = [name for name, ratio in ratios.items() if ratio > USUAL_RATIO * FAR]
            text = f"updated by more than {USUAL_RATIO * FAR:g} of its norm a step: a learning rate may be too large"
            self._judge(step, text, large)
            small = [name for name, group in self._matrices if ratios[name] < USUAL_RATIO / FAR and at_peak[group]]
            self._judge(step, f"updated by less than {USUAL_RATIO / FAR:g} of its norm a step: it hardly learns", small)
        usual = row["grad_norm"] / math.sqrt(max(1, self._elements))
        vanishing = [
            name for name, elements in self._layers.items()
            if elements and row.get(f"grad_norm/{name}", math.inf) < VANISHING * usual * math.sqrt(elements)
        ]  # fmt: skip
        text = f"a gradient that vanishes: its root mean square is below {VANISHING:g} of the whole model's"
        self._judge(step, text, vanishing)

    def _judge(self, step: int, text: str, names: Sequence[str]) -> None:
        """Warn of those that it holds of for the last of the rows that it takes, and never again."""
        times = self._in_succession
        for key in [key for key, count in times.items() if key[0] == text and count < ROWS and key[1] not in names]:
            del times[key]
        told = []
        for name in names:
            times[text, name] = times.get((text, name), 0) + 1
            if times[text, name] == ROWS:
                told.append(name)
        if told:
            few = ", ".join(told[:_NAMES]) + (f" and {len(told) - _NAMES} more" if len(told) > _NAMES else "")
            warnings.warn(f"step {step}: {few}: {text}", RuntimeWarning, stacklevel=2)

    def _at_peak(self, g: int, group: Mapping[str, Any]) -> bool:
        """Whether a group's learning rate is known, without waiting, to be near the largest that it had."""
        lr, initial = group.get("lr"), group.get("initial_lr", 0.0)
        if not isinstance(lr, Real) or not isinstance(initial, Real):
            return False
        self._peaks[g] = max(self._peaks[g], float(lr), float(initial))
        return float(lr) > 0.1 * self._peaks[g]
