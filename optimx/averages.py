"""Averages of parameters: evaluated in a context, exchanged with torch's ``AveragedModel``, and their batch norms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ._checks import check_instance
from ._engine.averager import N_AVERAGED
from ._engine.averages import AVERAGE, EMA, SWA, Average, PowerEMA
from ._engine.sharding import like, local
from ._engine.step import MultiTensorStep
from ._schedule_free import ScheduleFree
from .composite import Composite

__all__ = ["EMA", "SWA", "Average", "PowerEMA", "averaged", "load_state_dict", "state_dict", "update_bn"]


@contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """A context in which parameters hold the averages that are to be evaluated: of ``average=``, or schedule-free ones.

    It is the optimizer's own ``averaged()``, found where wrappers have none.

    Args:
        optimizer: An optimizer with averages; a composite with one; or what has one, or a wrapper of one, as its
            ``optimizer``: those of accelerate and Lightning, a :class:`~optimx.build.Build`.

    Raises:
        TypeError: There is none.
    """
    found = [*_averaging(optimizer)]
    if not found:
        raise TypeError(
            f"optimizer should average, or be schedule-free, or wrap one that does, but is: {type(optimizer).__name__}"
        )
    with ExitStack() as stack:
        for each in found:
            stack.enter_context(each.averaged())
        yield


def _averaging(optimizer: Any) -> Iterator[MultiTensorStep]:
    if isinstance(optimizer, MultiTensorStep):
        if optimizer.average is not None or isinstance(optimizer, ScheduleFree):
            yield optimizer
    elif isinstance(optimizer, Composite):
        for member in optimizer.optimizers.values():
            yield from _averaging(member)
    elif hasattr(optimizer, "optimizer"):
        yield from _averaging(optimizer.optimizer)


def state_dict(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """The averages as ``torch.optim.swa_utils.AveragedModel(model).state_dict()`` has them.

    Buffers, and parameters that have no average, are the model's own.

    Args:
        optimizer: Whose averages.
        model: Whose parameters they are of.

    Returns:
        ``"n_averaged"``, an int64 scalar, and ``"module."`` with each name of the model's state dict.
    """
    found = {id(param): state[AVERAGE] for param, state in optimizer.state.items() if AVERAGE in state}
    named = model.named_parameters(remove_duplicate=False)
    names: dict[str, Tensor] = {name: found[id(param)] for name, param in named if id(param) in found}
    saved = {
        f"module.{name}": (names[name].to(value.dtype) if name in names else value).detach().clone()
        for name, value in model.state_dict().items()
    }
    return {"n_averaged": torch.tensor(int(_count(optimizer)), device="cpu"), **saved}


def load_state_dict(optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Take the averages of what an ``AveragedModel``, or :func:`state_dict`, has saved; the model stays as it is.

    Args:
        optimizer: Which has an ``average``.
        model: Whose parameters are averaged.
        saved: The state dict.

    Raises:
        TypeError: ``optimizer`` is not optimx's.
        RuntimeError: It averages nothing.
        ValueError: A parameter is missing, or has another shape; nothing is changed then.
    """
    check_instance("optimizer", optimizer, MultiTensorStep, "an optimizer of optimx")
    assert isinstance(optimizer, MultiTensorStep)
    if optimizer.average is None:
        raise RuntimeError("average should be an optimx.EMA, SWA or PowerEMA of the optimizer but is: None")
    of_optimizer: set[Tensor] = {param for group in optimizer.param_groups for param in group["params"]}
    found: dict[Tensor, Tensor] = {}
    for name, param in model.named_parameters():
        if param not in of_optimizer:
            continue
        value = saved.get(f"module.{name}")
        if not isinstance(value, Tensor) or value.shape != param.shape:
            told = "nothing" if value is None else str(tuple(getattr(value, "shape", ())))
            raise ValueError(f"module.{name} should be of shape {tuple(param.shape)} but is: {told}")
        found[param] = value
    for owner, value in found.items():
        shard, dtype = local(owner), optimizer.average.dtype_of(local(owner))
        average = like(owner, torch.empty_like(shard, dtype=dtype))
        optimizer.state[owner][AVERAGE] = average.copy_(value)
    for group in optimizer.param_groups:
        group[N_AVERAGED] = torch.tensor(float(saved.get("n_averaged", 1)), dtype=torch.float64, device="cpu")


def _count(optimizer: Optimizer) -> float:
    return float(optimizer.param_groups[0].get(N_AVERAGED, 0.0))


@torch.no_grad()
def update_bn(
    loader: Iterable[Any],
    model: nn.Module,
    device: torch.device | str | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> None:
    """Estimate running means and variances of batch norms anew, as :func:`torch.optim.swa_utils.update_bn`.

    Averaged parameters have other activations than those of which the running averages are. Call it inside
    :func:`averaged`.

    Args:
        loader: Batches: tensors, lists or tuples of which the first is the input, or dicts of keyword arguments.
        model: The model.
        device: Where tensors of a batch are sent (default: None: they stay).
        forward: ``forward(model, batch)`` in place of all that (default: None).
    """
    momenta = {
        module: module.momentum
        for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }  # fmt: skip
    if not momenta:
        return
    modes = {module: module.training for module in model.modules()}
    for norm in momenta:
        norm.reset_running_stats()
        # a cumulative mean
        norm.momentum = None
    model.train()
    try:
        for batch in loader:
            _forward(model, _to(batch, device), forward)
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def _forward(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None) -> None:
    if forward is not None:
        forward(model, batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    else:
        model(batch[0] if isinstance(batch, (list, tuple)) else batch)


def _to(batch: Any, device: torch.device | str | None) -> Any:
    if device is None:
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    return type(batch)(_to(value, device) for value in batch) if isinstance(batch, (list, tuple)) else batch
