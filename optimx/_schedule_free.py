"""What schedule-free optimizers (https://arxiv.org/abs/2405.15682) share: their averages, and how to evaluate these.

There are three sequences: ``z`` takes the steps, ``x`` is an average of it, and gradients are taken between them, at
``y = (1 - beta) * z + beta * x``. A parameter holds ``y`` while it is trained, ``z`` is a state, and ``x`` follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._checks import as_steps, check_number, within
from ._engine.averages import Average
from ._engine.recode import master_weight, set_master_weight
from ._engine.rule import StateKind, UpdateRule
from ._engine.sharding import local
from ._engine.step import MultiTensorStep
from ._engine.storage import PARAM_COMPANIONS

#: The state that a parameter has besides while it holds x: the very bits to go on with.
KEPT = "y"


class ScheduleFreeRule(UpdateRule):
    """What rules of schedule-free optimizers share: their counts, and where ``z`` begins."""

    scalars = ("step", "weight_sum", "lr_max")

    def beta(self, group: dict[str, Any]) -> Any:
        """How near to ``x`` the gradients of a group are taken."""
        raise NotImplementedError

    def kind_of(self, name: str, param: Tensor, group: dict[str, Any], defaults: dict[str, Any]) -> StateKind:
        return StateKind(copies_param=name == "z")


def averaging(
    lr: float, beta: float, warmup_steps: float, r: float, weight_lr_power: float, scalars: tuple[float, ...]
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """One step of the counts.

    Returns:
        The learning rate after warmup, the share of the last ``z`` in ``x``, and how far ``y`` moves along a step; and
        the counts ``step``, ``weight_sum`` and ``lr_max``.
    """
    step, weight_sum, lr_max = scalars
    step += 1
    if step < warmup_steps:
        lr *= step / warmup_steps
    lr_max = max(lr, lr_max)
    weight = step**r * lr_max**weight_lr_power
    weight_sum += weight
    share = weight / weight_sum if weight_sum > 0 else 0.0
    return (lr, share, lr * (1.0 - beta * (1.0 - share))), (step, weight_sum, lr_max)


def check_averaging(beta_name: str, beta: Any, warmup_steps: int, r: float, weight_lr_power: float) -> None:
    """Raise ValueError or TypeError where an argument that all schedule-free optimizers have is out of range."""
    # with 0 nothing would tell what x is
    within("(0, 1)").check(beta_name, beta)
    as_steps("warmup_steps", warmup_steps)
    check_number("r", r)
    check_number("weight_lr_power", weight_lr_power)


class ScheduleFree(MultiTensorStep):
    """An optimizer whose parameters are other ones in training (``y``) than in evaluation (``x``).

    It begins in training. Each group tells in ``"train_mode"``, also in checkpoints, what its parameters hold.
    """

    rule: ClassVar[ScheduleFreeRule]

    def _init_step(self, max_grad_norm: Any, *, average: Average | None = None, **settings: Any) -> None:
        if average is not None:
            raise ValueError(f"average should be None, as a schedule-free optimizer has one, but is: {average}")
        super()._init_step(max_grad_norm, **settings)

    def eval(self) -> None:
        """Let the parameters hold ``x``, to be evaluated, exported or sampled from; no step can be taken.

        They are written in place. What they held stays in their states, as ``"y"``, until :meth:`train`; so
        evaluation takes a copy of the parameters more. In evaluation already, nothing is done.
        """
        with torch.inference_mode(False), torch.no_grad():
            for group in self.param_groups:
                weight = 1.0 - 1.0 / float(self.rule.beta(group))
                for param in group["params"] if group["train_mode"] else ():
                    state = self.state.get(param, {})
                    if "z" in state and KEPT not in state:
                        x = master_weight(param, state)
                        is_exact = PARAM_COMPANIONS.isdisjoint(state)
                        state[KEPT] = param.detach().clone() if is_exact else x.clone()
                        _lerp_(x, state["z"], weight)
                        set_master_weight(self, param, group, x)
                group["train_mode"] = False

    def train(self) -> None:
        """Let the parameters hold ``y`` again, to be trained: the very bits of before :meth:`eval`.

        Where a checkpoint has lost these (DCP loads only what a new optimizer would have), ``y`` is computed from ``x``
        and ``z``. In training already, nothing is done.
        """
        with torch.inference_mode(False), torch.no_grad():
            for group in self.param_groups:
                weight = 1.0 - float(self.rule.beta(group))
                for param in () if group["train_mode"] else group["params"]:
                    state = self.state.get(param, {})
                    y = state.pop(KEPT, None)
                    if y is None and "z" in state:
                        y = master_weight(param, state)
                        _lerp_(y, state["z"], weight)
                    if y is not None:
                        set_master_weight(self, param, group, y)
                group["train_mode"] = True

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the parameters hold ``x``; after it they have the bits that they had before it.

        In evaluation already, it changes nothing.
        """
        was_training = self._is_training()
        self.eval()
        try:
            yield
        finally:
            if was_training:
                self.train()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict) and not self._is_training():
            param_group.setdefault("train_mode", False)
        super().add_param_group(param_group)

    def _is_training(self) -> bool:
        return all(group["train_mode"] for group in self.param_groups)

    def _check_may_step(self) -> None:
        if not self._is_training():
            raise RuntimeError(
                f"{type(self).__name__}.step() should be called in training but is called in evaluation: the "
                "parameters are averages; call optimizer.train() first, or leave optimizer.averaged()"
            )


def _lerp_(tensor: Tensor, end: Tensor, weight: float) -> None:
    """Of DTensors, what lies in this process."""
    local(tensor).lerp_(local(end).to(tensor.device, tensor.dtype), weight)
