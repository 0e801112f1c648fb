"""The learning rates that Adafactor works out for itself, where training loops look for them."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .field import BaseLRs


class AdafactorSchedule(LRScheduler):
    """Reports each group's own step size as a scheduler would, transformers' class of this name.

    The optimizer needs no schedule, but loggers and trainers ask one. :meth:`get_last_lr` gives
    :meth:`optimx.Adafactor.step_sizes`, which waits for the device. Unlike transformers' this never writes
    ``group["lr"]``, which bounds a relative step size here.

    Args:
        optimizer: An :class:`optimx.Adafactor`.
        initial_lr: What is reported before the first step (default: 0).

    Raises:
        TypeError: ``optimizer`` does not tell its step sizes.
    """

    def __init__(self, optimizer: Optimizer, initial_lr: float = 0.0) -> None:
        if not hasattr(optimizer, "step_sizes"):
            raise TypeError(f"optimizer should be an optimx.Adafactor but is: {type(optimizer).__name__}")
        # not super().__init__(), which writes into groups
        self.optimizer = optimizer
        self.initial_lr = initial_lr
        self.last_epoch = 0

    @property
    def base_lrs(self) -> list[Any]:
        """What is reported before the first step; refuses to be set."""
        return BaseLRs([self.initial_lr] * len(self.optimizer.param_groups), self._set_base_lrs)

    @base_lrs.setter
    def base_lrs(self, values: Any) -> None:
        self._set_base_lrs(values)

    def _set_base_lrs(self, values: Any) -> None:
        raise TypeError(f"base_lrs should not be set, as Adafactor works out its step sizes itself, but are: {values}")

    def get_last_lr(self) -> list[Any]:
        """One a group."""
        if self.last_epoch == 0:
            return [self.initial_lr] * len(self.optimizer.param_groups)
        return self.optimizer.step_sizes()  # type: ignore[attr-defined]

    def get_lr(self) -> list[Any]:
        """The same, under the name that torch's schedulers compute by."""
        return self.get_last_lr()

    def step(self, epoch: int | None = None) -> None:
        """A step was taken; ``epoch`` says of how many it was the last."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch, "initial_lr": self.initial_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch, self.initial_lr = state_dict["last_epoch"], state_dict["initial_lr"]
