"""Whether a metric gets better: the one count that early stopping and the schedulers of a metric share."""

from __future__ import annotations

import math

from .._checks import as_steps, at_least, one_of

__all__ = ["MetricFollower"]


class MetricFollower:
    """Counts how many metrics in a row were better than the best one before, or were not.

    What is better by the threshold becomes the best. NaN is never better.

    Attributes:
        mode: Whether a lower metric is better, ``"min"``, or a higher one, ``"max"``.
        patience: How many metrics in a row are waited for.
        threshold: By how much a metric has to be better.
        threshold_mode: The threshold is a difference, ``"abs"``, or a share of the best metric, ``"rel"``.
        best: The best metric; before the first one, the worst that there is.
        num_good_epochs: How many in a row were better.
        num_bad_epochs: How many in a row were not.
        waiting: So many metrics more do not count.

    Raises:
        TypeError: ``patience`` is no whole number.
        ValueError: An argument is out of range.
    """

    def __init__(
        self, mode: str, patience: int, threshold: float, threshold_mode: str, least_patience: int = 0
    ) -> None:
        at_least(0).check("threshold", threshold)
        self.mode = one_of("mode", mode, ("min", "max"))
        self.patience = as_steps("patience", patience, least_patience)
        self.threshold = threshold
        self.threshold_mode = one_of("threshold_mode", threshold_mode, ("abs", "rel"))
        self._forget()

    def _forget(self) -> None:
        """Begin anew, as if there had been no metric."""
        self.best = math.inf if self.mode == "min" else -math.inf
        self.num_good_epochs = 0
        self.num_bad_epochs = 0
        self.waiting = 0

    def _wait(self, metrics: int) -> None:
        """Begin to count anew after so many metrics; the best one stays."""
        self.num_good_epochs = self.num_bad_epochs = 0
        self.waiting = metrics

    def _pass_over(self) -> None:
        """Go on by a metric that does not count."""
        self._wait(self.waiting - 1)

    def _count(self, metric: float) -> bool:
        """Go on by a metric that counts; whether it is better."""
        better = self._is_better(metric)
        if better:
            self.best = metric
        self.num_good_epochs = self.num_good_epochs + 1 if better else 0
        self.num_bad_epochs = 0 if better else self.num_bad_epochs + 1
        return better

    def _is_better(self, metric: float) -> bool:
        sign = 1.0 if self.mode == "max" else -1.0
        return sign * metric > sign * self._bound(sign * self.threshold)

    def _bound(self, step: float) -> float:
        """What a metric has to be beyond; ``step`` is the threshold in the direction of what is better."""
        # a share of infinity is infinite, too, and their difference NaN
        share = abs(self.best) if self.threshold_mode == "rel" and math.isfinite(self.best) else 1.0
        return self.best + step * share
