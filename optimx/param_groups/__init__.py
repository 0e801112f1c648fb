"""Parameter groups from a model: who decays, which layer gets which learning rate, rules by name.

Pure functions ``model -> list of group dicts`` for any :mod:`torch.optim` optimizer; ``requires_grad`` is never touched.
"""

from .groups import param_groups
from .rules import Rule

__all__ = ["Rule", "param_groups"]
