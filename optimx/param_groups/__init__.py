"""Parameter groups from a model: who decays, which layer gets which learning rate, rules by name, who is
trained by Muon.

Pure functions ``model -> list of group dicts`` for any :mod:`torch.optim` optimizer; the model is never changed.
"""

from .describe import GroupsDescription, describe
from .groups import by_optimizer, layer_decay_groups, no_decay_groups, param_groups
from .layers import layer_ids
from .rules import Rule

__all__ = [
    "GroupsDescription",
    "Rule",
    "by_optimizer",
    "describe",
    "layer_decay_groups",
    "layer_ids",
    "no_decay_groups",
    "param_groups",
]
