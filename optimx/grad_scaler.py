"""A GradScaler that leaves the search for infinite gradients to the step, which reads them anyway."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from ._step import MultiTensorStep

__all__ = ["GradScaler"]


class GradScaler(torch.amp.GradScaler):
    """A drop-in for :class:`torch.amp.GradScaler`, which also drives optimx optimizers correctly, at one pass more.

    Torch's scaler reads and writes all gradients to look for inf and NaN before it calls an optimizer that unscales
    by itself. This one lets an optimx optimizer look while it measures the gradient norm: unscaling, inf check,
    clipping and step read the gradients twice and write them never (fp32: 32 bytes a parameter against 48).

    Other optimizers, and ``scaler.unscale_(optimizer)`` by hand, get torch's behaviour. Arguments are torch's.
    """

    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[str, Any]:
        if not isinstance(optimizer, MultiTensorStep):
            return super()._check_inf_per_device(optimizer)
        scale, _ = self._check_scale_growth_tracker("_check_inf_per_device")
        # written by the step that follows, before update() reads it
        found_inf = torch.zeros((), dtype=torch.float32, device=scale.device)
        optimizer._deferred_found_inf = found_inf
        # torch's annotation says str, its keys are devices
        per_device: Any = {scale.device: found_inf}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = per_device
        return per_device
