"""GreedyLR: a learning rate that follows a metric both ways (https://arxiv.org/abs/2512.14527)."""

from __future__ import annotations

from typing import Any, Literal, SupportsFloat

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ._field import current_lrs, per_group, write
from ._schedule import as_steps, check_at_least, one_of


class GreedyLR(LRScheduler):
    """Raises the learning rate while a metric improves, lowers it while it does not; Hugging Face's "greedy".

    Args:
        optimizer: Any torch optimizer.
        mode: Whether a lower metric is better, ``"min"`` (default), or a higher one, ``"max"``.
        factor: What the learning rate is multiplied by to lower it and divided by to raise it, in (0, 1)
            (default: 0.95).
        patience: How many metrics in a row may be better, or not, before it is changed (default: 10).
        threshold: By how much a metric has to be better (default: 1e-6).
        threshold_mode: The threshold is a difference, ``"abs"`` (default), or a ratio, ``"rel"``.
        cooldown: Metrics that do not count after it was lowered (default: 0).
        warmup: Metrics that do not count after it was raised (default: 0).
        min_lr, max_lr: Bounds, a number or one for each group (default: 1e-3 and 1).
        eps: Smaller changes are not made (default: 1e-8).
        smooth: Take the mean of the last ``window_size`` metrics (default: False).
        window_size: Default: 50.
        reset_start: How often it is to be lowered at ``min_lr`` before all begins anew with the first learning rate
            (default: 500).

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
        smooth: bool = False,
        window_size: int = 50,
        reset_start: int = 500,
    ) -> None:
        # not super().__init__(): its first step has no metric
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer should be an Optimizer but is: {type(optimizer).__name__}")
        if not 0 < factor < 1:
            raise ValueError(f"factor should be in (0, 1) but is: {factor}")
        check_at_least("threshold", threshold, 0)
        check_at_least("eps", eps, 0)
        groups = optimizer.param_groups
        self.optimizer = optimizer
        self.mode = one_of("mode", mode, ("min", "max"))
        self.factor = factor
        self.patience = as_steps("patience", patience)
        self.threshold = threshold
        self.threshold_mode = one_of("threshold_mode", threshold_mode, ("abs", "rel"))
        self.cooldown = as_steps("cooldown", cooldown)
        self.warmup = as_steps("warmup", warmup)
        self.min_lr, self.max_lr = min_lr, max_lr
        self.min_lrs: list[float] = []
        self.max_lrs: list[float] = []
        self.initial_lrs: list[float] = []
        self._take_groups()
        self.eps = eps
        self.smooth = smooth
        self.window_size = as_steps("window_size", window_size, least=1)
        self.reset_start = as_steps("reset_start", reset_start)
        self.last_epoch = 0
        self._begin()
        self._last_lr = current_lrs(groups)

    def _begin(self) -> None:
        self.best = float("inf") if self.mode == "min" else float("-inf")
        self.num_good_epochs = 0
        self.num_bad_epochs = 0
        self.waiting = 0
        self.resets_in = self.reset_start
        self.window: list[float] = []

    def _take_groups(self) -> None:
        """Know each group's bounds and first learning rate, also of one that was added later."""
        groups = self.optimizer.param_groups
        self.initial_lrs += [float(group["lr"]) for group in groups[len(self.initial_lrs) :]]
        for name, bounds in (("min_lr", self.min_lrs), ("max_lr", self.max_lrs)):
            if len(bounds) < len(groups):
                bounds += per_group(name, getattr(self, name), len(groups))[len(bounds) :]

    def step(self, metrics: SupportsFloat) -> None:  # type: ignore[override]
        """Change the learning rates if the metric says so.

        Args:
            metrics: What is to improve, such as the validation loss.

        Raises:
            ValueError: A group was added, and ``min_lr`` or ``max_lr`` are one for each of those before.
        """
        current = float(metrics)
        self._take_groups()
        if self.smooth:
            self.window = [*self.window, current][-self.window_size :]
            current = sum(self.window) / len(self.window)
        self.last_epoch += 1
        if self.waiting:
            self.waiting -= 1
            self.num_good_epochs = self.num_bad_epochs = 0
        else:
            self._count(current)
        self._last_lr = current_lrs(self.optimizer.param_groups)

    def _count(self, current: float) -> None:
        if self._is_better(current):
            self.best = current
            self.num_good_epochs += 1
            self.num_bad_epochs = 0
        else:
            self.num_good_epochs = 0
            self.num_bad_epochs += 1
        if self.num_good_epochs > self.patience:
            self._raise_lrs()
            self.waiting, self.num_good_epochs, self.resets_in = self.warmup, 0, self.reset_start
        elif self.num_bad_epochs > self.patience:
            self._lower_lrs()
            self.waiting, self.num_bad_epochs = self.cooldown, 0

    def _is_better(self, current: float) -> bool:
        sign = 1.0 if self.mode == "max" else -1.0
        step = sign * self.threshold
        bound = self.best * (1.0 + step) if self.threshold_mode == "rel" else self.best + step
        return sign * current > sign * bound

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

        Args:
            state_dict: What :meth:`state_dict` returned.
        """
        super().load_state_dict(state_dict)
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            write(group, "lr", lr)
