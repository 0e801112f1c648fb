"""A question put to several contestants: what they have in common, and what their answers are held against."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.contestants import MAX_NORM, Run
from bench.shapes import Shape
from optimx.measuring.stock import COMPILED, COPY, DEFAULT, FOREACH, FUSED, LOOP, OURS, STOCK

__all__ = ["BELOW", "BEST_STOCK", "CLIPPED", "COMPILED", "COPY", "DEFAULT", "FOREACH", "FUSED", "KEPT_ERROR", "LOOP",
           "NO_SYNC", "OURS", "STOCK", "Case", "Target", "at_least"]  # fmt: skip

#: The fastest of :data:`STOCK` in a run.
BEST_STOCK = "fastest stock"

#: The quantity of a target: how far bytes a parameter are from those that were counted by hand.
KEPT_ERROR = "kept_error"

BELOW, CLIPPED = 0.5 * MAX_NORM, 10 * MAX_NORM


@dataclass(frozen=True)
class Target:
    """A promise about one contestant of a case.

    With ``against``, its speed or bandwidth is at least ``bound`` times the other contestant's; without,
    the quantity (a column of the results) is at most ``bound``. ``BEST_STOCK`` is whoever of ``STOCK`` has the
    shortest median in that run.
    """

    contestant: str
    quantity: str
    bound: float
    against: str | None = None

    def __str__(self) -> str:
        if self.against is None:
            return f"{self.quantity} <= {self.bound:g}"
        return f"{self.quantity} >= {self.bound:g}x {self.against}"


@dataclass(frozen=True)
class Case:
    """Contestants that do the same work on tensors of the same shapes.

    Args:
        name: Unique; also the id in pytest.
        shapes: One a parameter.
        contestants: Name -> function that builds tensors and optimizer for the case.
        baseline: The contestant that ratios are against.
        model: What the shapes are, where they are those of a model.
        device, dtype: Of parameters, gradients and state.
        grad_norm: 2-norm of all gradients together.
        loss_scale: What the gradients are multiplied with, for GradScaler to take out again.
        clock: What a call is charged with (see ``optimx.measuring.timing``): "wall", "device", "host" or "cpu" time.
        traffic: Contestant -> bytes of memory traffic a parameter, counted from its algorithm, where bandwidth matters.
        kept: Contestant -> bytes a parameter that parameters and states should take, where that is the question.
        targets: What the results are held against.
        notes: Contestant -> what one must know to read its times.
        optimizer, kwargs: The optimizer's class by name, and its arguments where they are not the defaults.
        groups: How many parameter groups the contestants make.
        repeat: What is called how often in one timed call, for work of microseconds.
        stub: It is for the stub driver, where there is no GPU (``--stub``).
    """

    name: str
    shapes: Sequence[Shape]
    contestants: dict[str, Callable[[Case], Run]]
    baseline: str
    model: str = ""
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    grad_norm: float = BELOW
    loss_scale: float = 1.0
    clock: str = "wall"
    traffic: dict[str, float] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)
    optimizer: str = "AdamW"
    kwargs: dict[str, Any] = field(default_factory=dict)
    groups: int = 1
    repeat: int = 1
    stub: bool = False

    @property
    def call(self) -> str:
        """The optimizer as it is called: "AdamW", "SGD(momentum=0.9)"."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.kwargs.items())
        return f"{self.optimizer}({arguments})" if arguments else self.optimizer

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


def at_least(bound: float, contestant: str = OURS, against: str = FUSED) -> Target:
    """A promise of speed."""
    return Target(contestant, "speed", bound, against)


#: The step never makes the host wait for the device.
NO_SYNC = Target(OURS, "syncs", 0)
