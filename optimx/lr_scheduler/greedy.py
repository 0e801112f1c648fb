"""GreedyLR: a learning rate that follows a metric both ways (https://arxiv.org/abs/2512.14527)."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any, Literal, SupportsFloat

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .._checks import as_steps, at_least, check_instance, within
from .field import current_lrs, per_group, write
from .metric_follower import MetricFollower


class GreedyLR(MetricFollower, LRScheduler):
    """Raises the learning rate while a metric improves, lowers it while it does not; Hugging Face's "greedy".

    Args:
        optimizer: Any torch optimizer.
        mode: Whether a lower metric is better, ``"min"`` (default), or a higher one, ``"max"``.
        factor: What the learning rate is multiplied by to lower it and divided by to raise it, in (0, 1)
            (default: 0.95).
        patience: How many metrics in a row may be better, or not, before it is changed (default: 10).
        threshold: By how much a metric has to be better (default: 1e-6).
        threshold_mode: The threshold is a difference, ``"abs"`` (default), or a share of the best metric, ``"rel"``.
            A share is meant for metrics above 0: with one below, Hugging Face takes slightly worse ones for better.
        cooldown: Metrics that do not count after it was lowered (default: 0).
        warmup: Metrics that do not count after it was raised (default: 0).
        min_lr, max_lr: Bounds, a number or one for each group (default: 1e-3 and 1). A group that is added later has
            the number; of those that have one each, append its own to ``min_lrs`` and ``max_lrs``.
        eps: Smaller changes are not made (default: 1e-8).
        verbose: Print every change (default: False).
        smooth: Take the mean of the last ``window_size`` metrics (default: False).
        window_size: Default: 50.
        reset_start: How often it is to be lowered at ``min_lr`` before all begins anew with the first learning rate
            (default: 500).
        ignore_nan: A metric that is NaN does not count (default: False, it is one that is not better, as for Hugging
            Face; with ``smooth`` so are the next ``window_size``).

    Raises:
        TypeError: ``optimizer`` is no optimizer.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        mode: Literal["min", "max"] = "min",
        factor: float = 0.95,
        patience: int = 10,
        threshold: float = 1e-6,
        threshold_mode: Literal["abs", "rel"] = "abs",
        cooldown: int = 0,
        warmup: int = 0,
        min_lr: float | list[float] = 1e-3,
        max_lr: float | list[float] = 1.0,
        eps: float = 1e-8,
        verbose: bool = False,
        smooth: bool = False,
        window_size: int = 50,
        reset_start: int = 500,
        *,
        ignore_nan: bool = False,
    ) -> None:
        # not super().__init__(): its first step has no metric
        check_instance("optimizer", optimizer, Optimizer, "a torch.optim.Optimizer")
        within("(0, 1)").check("factor", factor)
        at_least(0).check("eps", eps)
        MetricFollower.__init__(self, mode, patience, threshold, threshold_mode)
        groups = optimizer.param_groups
        self.optimizer = optimizer
        self.factor = factor
        self.cooldown = as_steps("cooldown", cooldown)
        self.warmup = as_steps("warmup", warmup)
        self.min_lr, self.max_lr = min_lr, max_lr
        self.min_lrs: list[float] = []
        self.max_lrs: list[float] = []
        #: The learning rates with which all begins anew.
        self.initial_lrs: list[float] = []
        self._take_groups()
        self.eps = eps
        self.verbose = verbose
        self.smooth = smooth
        self.window_size = as_steps("window_size", window_size, least=1)
        self.reset_start = as_steps("reset_start", reset_start)
        self.ignore_nan = ignore_nan
        self.last_epoch = 0
        self._begin()
        self._last_lr = current_lrs(groups)

    def _begin(self) -> None:
        self._forget()
        self.resets_in = self.reset_start
        self.window: list[float] = []

    def step(self, metrics: SupportsFloat, epoch: int | None = None) -> None:  # type: ignore[override]
        """Change the learning rates if the metric says so.

        Args:
            metrics: What is to improve, such as the validation loss.
            epoch: Which epoch it is of (default: None, the next one). It is only counted.

        Raises:
            ValueError: A group was added, and ``min_lr`` or ``max_lr`` are one for each of those before.
        """
        current = float(metrics)
        self._take_groups()
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        if not (self.ignore_nan and math.isnan(current)):
            self._follow(current)
        before, self._last_lr = self._last_lr, current_lrs(self.optimizer.param_groups)
        for i, (old, new) in enumerate(zip(before, self._last_lr, strict=False)):
            if self.verbose and new != old:
                print(f"Epoch {self.last_epoch}: learning rate of group {i} from {old:.4e} to {new:.4e}.")

    @property
    def base_lrs(self) -> list[Any]:
        """The learning rates with which all begins anew, under the name that torch's schedulers have for them."""
        return self.initial_lrs

    @base_lrs.setter
    def base_lrs(self, values: Any) -> None:
        self.initial_lrs = per_group("base_lrs", values, len(self.optimizer.param_groups))

    def _take_groups(self) -> None:
        """Know each group's bounds and first learning rate, also of one that was added later."""
        groups = self.optimizer.param_groups
        if len(self.initial_lrs) > len(groups):
            raise ValueError(f"param_groups should be {len(self.initial_lrs)}, or more, but are: {len(groups)}")
        for name, bounds in (("min_lr", self.min_lrs), ("max_lr", self.max_lrs)):
            if len(bounds) < len(groups):
                bounds += per_group(name, getattr(self, name), len(groups))[len(bounds) :]
        self.initial_lrs += [float(group["lr"]) for group in groups[len(self.initial_lrs) :]]

    def _follow(self, current: float) -> None:
        if self.smooth:
            self.window = [*self.window, current][-self.window_size :]
            current = sum(self.window) / len(self.window)
        if self.waiting:
            self._pass_over()
            return
        self._count(current)
        if self.num_good_epochs > self.patience:
            self._raise_lrs()
            self.resets_in = self.reset_start
            self._wait(self.warmup)
        elif self.num_bad_epochs > self.patience:
            self._lower_lrs()
            self._wait(self.cooldown)

    def _bound(self, step: float) -> float:
        return self.best * (1.0 + step) if self.threshold_mode == "rel" else self.best + step

    def _raise_lrs(self) -> None:
        for group, bound in zip(self.optimizer.param_groups, self.max_lrs, strict=True):
            old = float(group["lr"])
            new = min(old / self.factor, bound)
            if new - old > self.eps:
                write(group, "lr", new)

    def _lower_lrs(self) -> None:
        groups = self.optimizer.param_groups
        for group, bound in zip(groups, self.min_lrs, strict=True):
            old = float(group["lr"])
            new = max(old * self.factor, bound)
            if old - new > self.eps:
                write(group, "lr", new)
        if all(group["lr"] <= bound for group, bound in zip(groups, self.min_lrs, strict=True)):
            self.resets_in -= 1
            if self.resets_in <= 0:
                self._begin()
                for group, lr in zip(groups, self.initial_lrs, strict=True):
                    write(group, "lr", lr)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was made, with its learning rates and settings.

        Groups that the checkpoint does not know were added later.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: It has more groups than the optimizer. Nothing is changed.
        """
        groups, lrs = self.optimizer.param_groups, state_dict["_last_lr"]
        if len(lrs) > len(groups):
            raise ValueError(f"param_groups should be {len(lrs)}, as in the checkpoint, but are: {len(groups)}")
        # the lists grow with the groups: the checkpoint's are its own
        super().load_state_dict(deepcopy(state_dict))
        for group, lr in zip(groups, lrs, strict=False):
            write(group, "lr", lr)

    def state_dict(self) -> dict[str, Any]:
        """All but the optimizer; later steps do not change it."""
        return deepcopy(super().state_dict())
