"""Learning-rate schedulers: every name of :mod:`torch.optim.lr_scheduler`."""

from torch.optim import lr_scheduler as _torch
from torch.optim.lr_scheduler import *  # noqa: F403

__all__ = sorted(_torch.__all__)
