"""Statistics of training, per parameter, layer and group: what :func:`optimx.watch` returns.

A step's sums (``_engine.watched_step``) become statistics (``statistics``) of parts of the model (``parts``), a row of
which goes to the history (``history``), to the rules that warn (``rules``) and to the sinks.
"""

from .source import Source
from .statistics import NEEDS, STATISTICS, Statistic
from .watcher import Watcher, watch

__all__ = ["NEEDS", "STATISTICS", "Source", "Statistic", "Watcher", "watch"]
