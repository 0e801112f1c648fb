"""Torchvision beside a CPU build of torch, where scripts beside the benchmarks have always looked for it."""

from optimx.measuring.packages import import_torchvision

__all__ = ["import_torchvision"]
