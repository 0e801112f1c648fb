"""Torch's own step for what no bucket takes: for these parameters alone, with gradients unscaled and clipped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .. import _compat
from . import sharding
from .grad_norm import FACTOR, SKIP
from .optimizer import EngineOptimizer
from .placement import Placement


def run_stock(
    optimizer: EngineOptimizer,
    leftovers: Sequence[tuple[int, Placement]],
    grads: Sequence[Any],
    control: Tensor | None,
    *,
    may_skip: bool,
) -> None:
    """Torch's own step, for these parameters only, with gradients unscaled and clipped as ``control`` says.

    Args:
        optimizer: Whose step it is.
        leftovers: Where parameters are among all, and their placements.
        grads: Of these, which may be others than the parameters' own.
        control: See :mod:`optimx._engine.grad_norm`; None: gradients as they are.
        may_skip: Whether ``control`` may say that the step is skipped; this waits to see.
    """
    if control is not None and may_skip and bool(control[SKIP] != 0):
        return
    positions = [position for position, _ in leftovers]
    with _grads_in_place(optimizer, positions, grads, None if control is None else control[FACTOR]):
        for in_turn in (False, True):
            chosen = [position for position, placement in leftovers if placement.in_turn is in_turn]
            if chosen:
                with _only(optimizer, chosen), _in_turn(optimizer) if in_turn else nullcontext():
                    optimizer._stock_step()


@contextmanager
def _only(optimizer: Optimizer, positions: Sequence[int]) -> Iterator[None]:
    """Let torch's step see the parameters at these positions alone, and nothing of GradScaler's."""
    wanted = {*positions}
    everything = [group["params"] for group in optimizer.param_groups]
    attributes = vars(optimizer)
    handed_over: dict[str, Any] = {
        name: attributes.pop(name) for name in ("grad_scale", "found_inf") if name in attributes
    }
    try:
        position = 0
        for group in optimizer.param_groups:
            chosen = [param for i, param in enumerate(group["params"], position) if i in wanted]
            position += len(group["params"])
            group["params"] = chosen
        yield
    finally:
        for group, all_params in zip(optimizer.param_groups, everything, strict=True):
            group["params"] = all_params
        attributes.update(handed_over)


@contextmanager
def _in_turn(optimizer: Optimizer) -> Iterator[None]:
    """Let torch's step be its loop over parameters."""
    names = ("foreach", "fused")
    chosen: list[dict[str, Any]] = [
        {name: group[name] for name in names if name in group} for group in optimizer.param_groups
    ]
    try:
        for group, settings in zip(optimizer.param_groups, chosen, strict=True):
            group.update(dict.fromkeys(settings, False))
        yield
    finally:
        for group, settings in zip(optimizer.param_groups, chosen, strict=True):
            group.update(settings)


@contextmanager
def _grads_in_place(
    optimizer: Optimizer, positions: Sequence[int], grads: Sequence[Tensor], scale: Tensor | None
) -> Iterator[None]:
    """Gradients, times ``scale``, in place of the parameters' own, which stay as they are."""
    all_params = [*chain.from_iterable(group["params"] for group in optimizer.param_groups)]
    # of a parameter that is listed twice, the gradient is scaled once
    params = [all_params[i] for i in positions]
    own = [param.grad for param in params]
    if scale is None and all(map(is_, own, grads)):
        yield
        return
    try:
        for param, grad in zip(params, grads, strict=True):
            if scale is None:
                param.grad = grad
                continue
            if _compat.is_dtensor(grad):
                part = sharding.local(grad)
                param.grad = sharding.like(grad, (part * scale.to(part.device)).to(part.dtype))
                continue
            factor = scale.to(grad.device) if _compat.is_plain(grad) else float(scale)
            param.grad = (grad * factor).to(grad.dtype)
        yield
    finally:
        for param, grad in zip(params, own, strict=True):
            param.grad = grad
