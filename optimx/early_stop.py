"""Early stopping: whether a training should end, as its metric no longer gets better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, SupportsFloat

import torch
import torch.distributed as dist
from torch import Tensor

from . import _compat
from ._checks import as_steps
from ._engine.sharding import reachable
from .lr_scheduler.metric_follower import MetricFollower

__all__ = ["EarlyStop"]


class EarlyStop(MetricFollower):
    """Tells a training loop when to stop: ``if stop(val_loss): break``.

    In distributed training every rank calls it. The metric of the group's first rank counts, and all decide the same.

    Args:
        mode: Whether a lower metric is better, ``"min"`` (default), or a higher one, ``"max"``.
        patience: After how many metrics in a row that are not better it stops, at least 1 (default: 3).
        threshold: By how much a metric has to be better, other libraries' ``min_delta`` (default: 0).
        threshold_mode: The threshold is a difference, ``"abs"`` (default), or a share of the best metric, ``"rel"``.
        cooldown: How many metrics are not counted against it after :meth:`start_cooldown` (default: 0).
        min_steps: The first step that it may stop at for want of a better metric (default: 0).
        check_finite: Stop at once for a metric that is NaN or infinite (default: True). Without this, one that is NaN
            is a metric that is not better.
        late: Each metric is looked at on the next call only, when a tensor has long arrived from its device, so that
            no call waits for the device (default: False). :meth:`flush` looks at the last one.
        process_group: The ranks that stop together (default: None, all there are).

    Attributes:
        best: The best metric; before the first one, the worst that there is.
        best_step: Which step it is of; None before the first one.
        reason: Why the last call said to stop; None if it did not.

    Raises:
        TypeError: A number of metrics or steps is no whole number.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        threshold: float = 0.0,
        threshold_mode: Literal["abs", "rel"] = "abs",
        cooldown: int = 0,
        min_steps: int = 0,
        check_finite: bool = True,
        *,
        late: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__(mode, patience, threshold, threshold_mode, least_patience=1)
        self.cooldown = as_steps("cooldown", cooldown)
        self.min_steps = as_steps("min_steps", min_steps)
        self.check_finite = check_finite
        self.late = late
        self.process_group = process_group
        self.best_step: int | None = None
        self.reason: str | None = None
        self._next_step = 0
        self._waiting_metric: _Late | None = None

    def __call__(self, metric: SupportsFloat, step: int | None = None) -> bool:
        """Whether to stop.

        Args:
            metric: What is to improve, such as the validation loss: a number, or a tensor of one element. A tensor on
                a device is waited for, unless it is looked at late.
            step: Which step it is of (default: None, the next one, from 0).

        Raises:
            TypeError: The metric is no number.
            ValueError: It is a tensor of several, or the step is negative.
        """
        if isinstance(metric, Tensor) and metric.numel() != 1:
            raise ValueError(f"metric should have one element but has: {metric.numel()}")
        if not isinstance(metric, SupportsFloat):
            raise TypeError(f"metric should be a number but is: {metric!r}")
        step = self._next_step if step is None else as_steps("step", step)
        shared = self._of_first_rank(metric)
        self._next_step = step + 1
        if not self.late:
            return self._decide(float(shared), step)
        stop = self.flush()
        self._waiting_metric = _Late.of(shared, step)
        return stop

    def flush(self) -> bool:
        """Whether to stop, by the metric that was given last and has not been looked at, if there is one."""
        late, self._waiting_metric = self._waiting_metric, None
        return self.reason is not None if late is None else self._decide(late.read(), late.step)

    def start_cooldown(self) -> None:
        """Count none of the next ``cooldown`` metrics against it, nor those before.

        This is for what makes a metric worse for a while, such as another learning rate or other data. A better metric
        still becomes the best.
        """
        self._wait(self.cooldown)

    def _decide(self, metric: float, step: int) -> bool:
        if self.check_finite and not math.isfinite(metric):
            self.reason = f"the metric of step {step} is {metric}"
            return True
        if self._count(metric):
            self.best_step = step
        if self.waiting:
            self._pass_over()
        self.reason = None
        if self.num_bad_epochs >= self.patience and step >= self.min_steps:
            of_step = "" if self.best_step is None else f", that of step {self.best_step}"
            self.reason = f"{self.num_bad_epochs} metrics in a row are not better than {self.best:g}{of_step}"
        return self.reason is not None

    def _of_first_rank(self, metric: Any) -> Any:
        if not _compat.is_distributed():
            return metric
        number = _as_tensor(metric)
        # ranks may have metrics of other types, and the broadcast writes into the copy
        sent = number.to(reachable(number.device, self.process_group), torch.float64, copy=True)
        dist.broadcast(sent, group=self.process_group, group_src=0)
        return sent

    def state_dict(self) -> dict[str, Any]:
        """What has been seen so far; the arguments are not in it. A metric that is on its way is waited for."""
        late = self._waiting_metric
        return {
            "mode": self.mode,
            "best": self.best,
            "best_step": self.best_step,
            "num_good_epochs": self.num_good_epochs,
            "num_bad_epochs": self.num_bad_epochs,
            "waiting": self.waiting,
            "next_step": self._next_step,
            "reason": self.reason,
            "late": None if late is None else (late.read(), late.step),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the checkpoint was made, with the arguments that this one has.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: It has other keys, or is of another ``mode``. Nothing is changed.
        """
        if state_dict.keys() != self.state_dict().keys():
            raise ValueError(f"state_dict should be that of an EarlyStop but has the keys: {sorted(state_dict)}")
        if state_dict["mode"] != self.mode:
            raise ValueError(f"mode should be {state_dict['mode']!r}, as in the checkpoint, but is: {self.mode!r}")
        seen = {**state_dict}
        late = seen.pop("late")
        self._next_step = seen.pop("next_step")
        self._waiting_metric = None if late is None else _Late.of(*late)
        for name, value in seen.items():
            setattr(self, name, value)


class _Late(NamedTuple):
    """A metric on its way from a device.

    Attributes:
        number: In the host's memory, once the copy is done.
        copied: The event after the copy; None if there is nothing to wait for.
        step: Which step it is of.
    """

    number: Tensor
    copied: Any
    step: int

    @classmethod
    def of(cls, metric: Any, step: int) -> _Late:
        number = _as_tensor(metric)
        on_host = number.device.type == "cpu"
        # what comes from a device so lands in pinned memory, without a wait
        copy = number.to("cpu", non_blocking=True, copy=True)
        return cls(copy, None if on_host else torch.accelerator.current_stream(number.device).record_event(), step)

    def read(self) -> float:
        """The number; the copy alone is waited for, not what the device was given after it."""
        if self.copied is not None and not self.copied.query():
            self.copied.synchronize()
        return float(self.number)


def _as_tensor(metric: Any) -> Tensor:
    number = metric.detach() if isinstance(metric, Tensor) else torch.tensor(float(metric), dtype=torch.float64)
    return number.reshape(())
