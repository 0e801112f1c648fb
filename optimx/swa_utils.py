"""Stochastic weight averaging: :mod:`torch.optim.swa_utils`, re-exported."""

from torch.optim import swa_utils as _torch
from torch.optim.swa_utils import *  # noqa: F403

__all__ = sorted(_torch.__all__)
