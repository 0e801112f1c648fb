"""Averages of parameters, which move in the step that reads these anyway where a kernel can, and after it elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import _compat
from .averages import AVERAGE, Average
from .grad_norm import SKIP
from .optimizer import EngineOptimizer
from .plan import StepInputs, StepPlan
from .recode import master_weight, set_master_weight
from .sharding import like, local
from .states import AVERAGES, side_by_side
from .storage import PARAM_COMPANIONS

#: What groups keep: steps that have begun, and how many parameters were averaged, a float64 scalar on their device.
STEPS, N_AVERAGED = "average_steps", "n_averaged"


class Averager:
    """Moves the averages of an optimizer in one of its steps.

    Args:
        optimizer: Whose.
        rule: Its :attr:`average`.
        plan: Of the step.
        inputs: Of the step.
    """

    def __init__(self, optimizer: EngineOptimizer, rule: Average, plan: StepPlan, inputs: StepInputs) -> None:
        self._optimizer, self._rule = optimizer, rule
        self._plan, self._inputs = plan, inputs
        self._count = _count_of(optimizer, inputs.shards[0].device)
        first = self._count == 0
        weight = torch.where(first, 1.0, rule.weight(torch.where(first, 1.0, self._count)))
        self._weight = weight.to(torch.float64)
        self._riding: set[int] = set()

    def before_update(self) -> None:
        """Let averages ride along with updates where all members of a bucket have one and a gradient."""
        for bucket in self._plan.buckets:
            if bucket.averages and bucket.carry_averages(self._weight):
                self._riding.update(bucket.positions)

    def after_update(self, control: Tensor | None) -> None:
        """Move the others, begin those that are missing, and count."""
        taken = None if control is None else (control[SKIP] == 0).to(self._count.device, torch.float64)
        averages = {i: self._inputs.values[where] for i, where in self._plan.averages.items()}
        rest = averages.keys() - self._riding
        weight = self._weight if taken is None else self._weight * taken
        alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i in sorted(rest):
            alike.setdefault((averages[i].device, averages[i].dtype), []).append(i)
        for (device, _), positions in alike.items():
            values = [self._value(i, averages[i]) for i in positions]
            _move([averages[i] for i in positions], values, weight.to(device, non_blocking=True))
        self._begin(averages)
        self._count.add_(1.0 if taken is None else taken)

    def _begin(self, averages: dict[int, Tensor]) -> None:
        """Copies of parameters that have taken a step and have no average yet."""
        new = [i for i, grad in enumerate(self._inputs.grads) if grad is not None and i not in averages]
        copies = []
        for i in new:
            shard = self._inputs.shards[i]
            copy = torch.empty_like(shard, dtype=self._rule.dtype_of(shard))
            copies.append(copy.copy_(self._value(i, copy)))
        if all(copy.device.type == "cpu" for copy in copies):
            copies = side_by_side(copies, AVERAGES)
        for i, copy in zip(new, copies, strict=True):
            param = self._inputs.params[i]
            self._optimizer.state[param][AVERAGE] = like(param, copy)

    def _value(self, position: int, average: Tensor) -> Tensor:
        """A parameter as exactly as it is known, in its average's dtype."""
        param, shard = self._inputs.params[position], self._inputs.shards[position]
        state = self._optimizer.state.get(param, {})
        exact = shard.detach() if PARAM_COMPANIONS.isdisjoint(state) else local(master_weight(param, state, shard))
        return exact.to(average.dtype)


def is_due(optimizer: EngineOptimizer) -> bool:
    """A step begins: count it, and say whether its parameters are averaged."""
    rule, groups = optimizer.average, optimizer.param_groups
    if rule is None:
        return False
    if _compat.is_capturing():
        if rule.every != 1 or groups[0].get(STEPS, 0) < rule.start:
            raise RuntimeError(
                "a CUDA graph would average the parameters at every replay: average should have every=1, and its start "
                f"should be over, but is: {rule}"
            )
        return True
    step = groups[0].get(STEPS, 0) + 1
    for group in groups:
        group[STEPS] = step
    return rule.is_due(step)


def _count_of(optimizer: EngineOptimizer, device: torch.device) -> Tensor:
    """How many parameters were averaged; all groups have it."""
    found = optimizer.param_groups[0].get(N_AVERAGED)
    if not (isinstance(found, Tensor) and found.device == device):
        value = 0.0 if found is None else float(found)
        found = torch.full((), value, dtype=torch.float64, device=device)
    for group in optimizer.param_groups:
        group[N_AVERAGED] = found
    return found


def _move(averages: Sequence[Tensor], values: Sequence[Tensor], weight: Tensor) -> None:
    """Move averages towards values, as ``torch.lerp``; without waiting for a device that has the weight."""
    if weight.device.type == "cpu":
        _compat.foreach_lerp_([*averages], [*values], float(weight))
        return
    away = _compat.foreach_sub([*values], [*averages])
    _compat.foreach_mul_(away, weight.to(averages[0].dtype))
    _compat.foreach_add_([*averages], away)


@contextmanager
def swapped(optimizer: EngineOptimizer) -> Iterator[None]:
    """A context in which parameters hold their averages, where they have some; after it they have their bits again."""
    kept: list[tuple[dict[str, Any], Tensor, Tensor]] = []
    with torch.inference_mode(False), torch.no_grad():
        for group in optimizer.param_groups:
            for param in group["params"]:
                state = optimizer.state.get(param, {})
                if AVERAGE in state:
                    exact = PARAM_COMPANIONS.isdisjoint(state)
                    kept.append((group, param, param.detach().clone() if exact else master_weight(param, state)))
                    set_master_weight(optimizer, param, group, state[AVERAGE].to(kept[-1][2].dtype))
    try:
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            for group, param, before in kept:
                set_master_weight(optimizer, param, group, before)
