"""What an optimizer's step costs on a model: ours beside torch's implementations and other packages'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._checks import as_steps, check_instance
from .._preserve import random_states
from ..build import build
from ..config.loading import load
from ..presets import TREES
from ..registry import OPTIMIZERS
from .contest import Contest
from .cost import StepCost

__all__ = ["step_cost"]

#: Of parameters, as models begin.
_STD = 0.02


def step_cost(
    model: nn.Module,
    cfg: Any = "adamw",
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    compiled: bool = False,
    peers: bool = True,
    rounds: int = 20,
) -> StepCost:
    """Time an optimizer's step on the parameters of a model, ours beside torch's and other packages'.

    Parameters and gradients are random tensors of the same shapes and strides, which all contestants share; each has
    states of its own. Contestants take turns of up to five calls, with a new gradient tensor for every parameter before
    every call, which is not timed. The model is not changed, nothing of it is run, and random generators are put back.
    Where there are several optimizers in one, as Muon with AdamW, stock takes its step with one after the other.

    Args:
        model: Whose parameters that require gradients count; it may be on the device ``meta``.
        cfg: The name of one of optimx's optimizers, for one group of all parameters (default: ``"adamw"``), or what
            :func:`optimx.build` takes. Its schedule is left out.
        overrides: Set over it, as in :func:`optimx.build`: ``{"optimizer.max_grad_norm": 1.0}``. Where something clips,
            stock calls ``clip_grad_norm_`` before its step; gradients have twice the norm that is allowed.
        device: Of the measurement (default: that of each parameter; the CPU for ``meta``).
        dtype: Of floating-point parameters (default: their own).
        compiled: Also measure torch's foreach step under ``torch.compile``, which takes seconds to minutes to compile,
            and is not done for more than 200 tensors; and packages that compile (default: False).
        peers: Also measure those of other packages that are installed (default: True).
        rounds: How many turns each contestant has, >= 1 (default: 20). Who needs more than a second for a step is timed
            twice.

    Returns:
        A :class:`StepCost`; ``print`` it.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: The model has no parameters that require gradients, or some that have no shape yet; the optimizer is
            none of optimx's; ``rounds`` is below 1.
        ConfigError: The config is wrong.
    """
    check_instance("model", model, nn.Module, "a torch.nn.Module")
    count = as_steps("rounds", rounds, least=1)
    named: dict[str, Tensor] = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if not named:
        raise ValueError("model should have parameters that require gradients but has none")
    lazy = next((name for name, param in named.items() if is_lazy(param)), None)
    if lazy is not None:
        raise ValueError(f"model should have parameters with shapes but {lazy!r} gets its own in the forward pass")
    tree = _tree(cfg, overrides)
    with ExitStack() as stack:
        stack.callback(random_states())
        torch.manual_seed(0)
        copies = {param: _random_like(param, device, dtype) for param in named.values()}
        with _standing_in(model, copies):
            optimizer = build(model, tree).optimizer
        contest = Contest(optimizer, {name: copies[param] for name, param in named.items()})
        return contest.held(compiled, peers, count)


def _tree(cfg: Any, overrides: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """The config as a tree, of what a step depends on."""
    if isinstance(cfg, str) and cfg in OPTIMIZERS:
        cfg = {"optimizer": {"name": cfg}}
    tree = load(cfg, overrides, TREES)
    return {key: value for key, value in tree.items() if key not in ("schedule", "search")}


def _random_like(param: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter:
    where = "cpu" if device is None and param.is_meta else device
    empty = torch.empty_like(param.detach(), device=where, dtype=dtype if param.is_floating_point() else None)
    return nn.Parameter(empty.normal_(std=_STD))


@contextmanager
def _standing_in(model: nn.Module, copies: Mapping[Tensor, nn.Parameter]) -> Iterator[None]:
    """Within, the model's modules have the copies for parameters."""
    with ExitStack() as stack:
        for module in model.modules():
            for name, param in module._parameters.items():
                if param is not None and param in copies:
                    stack.callback(module._parameters.__setitem__, name, param)
                    module._parameters[name] = copies[param]
        yield
