"""A GradScaler that leaves the search for infinite gradients to the step, which reads them anyway."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from . import _compat
from ._engine.placement import asks_for_torch
from ._engine.step import MultiTensorStep

__all__ = ["GradScaler"]


class GradScaler(torch.amp.GradScaler):
    """A drop-in for :class:`torch.amp.GradScaler` that leaves unscaling, and the search for inf, to optimx's step.

    Torch's scaler reads and writes all gradients before it calls the step. Here unscaling, inf check, clipping and
    step read the gradients twice and write them never (fp32: 32 bytes a parameter against 48), and nothing waits for
    the result of the check. Gradients are therefore still scaled after ``scaler.step(optimizer)``.

    This holds where nobody can notice: the optimizer is optimx's, its ``step`` is the class's own (no subclass, wrapper
    or trainer has replaced it), there are no step hooks and no closure, and no scheduler waits to be told whether the
    first step was taken. Everywhere else torch's scaler does its work: gradients are unscaled in place, and a step with
    an infinite one is not called. After ``scaler.unscale_(optimizer)`` by hand the step only skips itself.

    Args beyond torch's:
        process_group: Ranks that skip together: if one of them finds an infinite gradient, all do (default: None: the
            default group where FullyShardedDataParallel keeps flat parameters, as its ``ShardedGradScaler`` does;
            DTensors agree by themselves). For ZeRO partitions and pipeline stages, which nobody can tell from other
            parameters.
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        process_group: Any = None,
    ) -> None:
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self._process_group = process_group

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step, unless a gradient is infinite or NaN; as in torch.

        Returns:
            What ``optimizer.step`` returned; None where the step was skipped.
        """
        has_closure = any(arg is not None for arg in (*args, *kwargs.values()))
        if self.is_enabled() and not has_closure and self._steps_within(optimizer):
            with _compat.amp_scaling_support(optimizer, True):
                return super().step(optimizer, *args, **kwargs)
        if _compat.delegates_amp_scaling_support(optimizer):
            # what torch would leave on a wrapper, the optimizer inside does not see
            with _compat.amp_scaling_support(optimizer, False):
                return super().step(optimizer, *args, **kwargs)
        return super().step(optimizer, *args, **kwargs)

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale, and look for infinite ones; as in torch."""
        super().unscale_(optimizer)
        if self.is_enabled():
            self._agree(optimizer)

    def _agree(self, optimizer: Optimizer) -> None:
        """Let every rank know what one has found: one reduction, whatever gradients and devices this one has."""
        if not self._is_sharded(optimizer):
            return
        scale, _ = self._check_scale_growth_tracker("unscale_")
        found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        # a rank without gradients skips with the others
        if not found:
            found[scale.device] = torch.zeros((), dtype=torch.float32, device=scale.device)
        together = torch.stack([found_inf.to(scale.device).reshape(()) for found_inf in found.values()]).amax()
        torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX, self._process_group)
        for found_inf in found.values():
            found_inf.copy_(together)

    def _is_sharded(self, optimizer: Optimizer) -> bool:
        """Whether other ranks may find what this one does not, and torch does not ask them."""
        if not _compat.is_distributed():
            return False
        params = (param for group in optimizer.param_groups for param in group["params"])
        return self._process_group is not None or any(map(_compat.is_flat_shard, params))

    def _steps_within(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer's step may unscale, look for infinite gradients, and skip itself."""
        if not (
            isinstance(optimizer, MultiTensorStep) and _compat.is_called_unnoticed(optimizer, MultiTensorStep.step)
        ):
            return False
        if any(map(asks_for_torch, optimizer.param_groups)) or self._is_sharded(optimizer):
            return False
        # what one rank finds in its part of a DTensor, the step tells the others
        known = torch.Tensor, torch.nn.Parameter, _compat.dtensor_class()
        return not _compat.is_distributed() or all(
            type(param) in known for group in optimizer.param_groups for param in group["params"]
        )

    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[str, Any]:
        if not (isinstance(optimizer, MultiTensorStep) and self._steps_within(optimizer)):
            found = super()._check_inf_per_device(optimizer)
            self._agree(optimizer)
            return found
        scale, _ = self._check_scale_growth_tracker("_check_inf_per_device")
        # written by the step that follows, before update() reads it
        found_inf = torch.zeros((), dtype=torch.float32, device=scale.device)
        optimizer._engine.deferred_found_inf = found_inf
        # torch's annotation says str, its keys are devices
        per_device: Any = {scale.device: found_inf}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = per_device
        return per_device

    def _maybe_opt_step(self, optimizer: Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # who asks whether the step was skipped is told, although it will not be called; also through a wrapper
        note = getattr(optimizer, "_note_found_inf", None)
        if note is not None:
            note([*optimizer_state["found_inf_per_device"].values()])
        return super()._maybe_opt_step(optimizer, optimizer_state, *args, **kwargs)
