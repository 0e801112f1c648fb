"""optimx: a drop-in plugin for :mod:`torch.optim`.

``import optimx as optim`` has every public name of :mod:`torch.optim`: optimx's own class where there is one, torch's
object elsewhere. Importing it loads neither triton nor CUDA.
"""

from torch import optim as _torch
from torch.optim import *  # noqa: F403

from . import lr_scheduler, swa_utils  # type: ignore[no-redef]
from .adam import Adam
from .adamw import AdamW
from .clip_grad import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from .explain import explain
from .grad_scaler import GradScaler

__version__ = "0.1.0"

__all__ = sorted(
    {
        *_torch.__all__,
        "Adam",
        "AdamW",
        "GradScaler",
        "clip_grad_norm_",
        "clip_grad_value_",
        "clip_grads_with_norm_",
        "explain",
        "get_total_norm",
        "lr_scheduler",
        "swa_utils",
    }
)
