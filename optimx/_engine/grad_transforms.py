"""Gradients that a step changes before it takes their norm: copies by torch's operators, ``param.grad`` stays.

A transform is a function ``(params, grads, groups) -> grads``: of whole parameters, of their gradients in this process
(a DTensor's local tensor; never None), and of the group of each. A group asks for it with a setting of its name in
:data:`TRANSFORMS`. It may raise; nothing has been changed then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .. import _compat
from .sharding import cutting

Transform = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Mapping[str, Any]]], Sequence[Tensor]]


def centralized(
    params: Sequence[Tensor], grads: Sequence[Tensor], groups: Sequence[Mapping[str, Any]]
) -> Sequence[Tensor]:
    """Gradients less their means over all dimensions but the first; those of fewer than two dimensions as they are.

    Gradient centralization, https://arxiv.org/abs/2004.01461. Means are float32 at least, and are rounded once.

    Raises:
        RuntimeError: A gradient is sparse, or parts of its rows lie on other ranks.
    """
    return [_centralized(param, grad) for param, grad in zip(params, grads, strict=True)]


def _centralized(param: Tensor, grad: Tensor) -> Tensor:
    in_rows = range(1 - param.dim(), 0)
    if _compat.is_flat_shard(param) or (in_rows and _compat.is_dtensor(param) and cutting(param, *in_rows)):
        raise RuntimeError(
            "rows of a parameter should be whole on each rank for centralize_grads=True but are cut: "
            f"{tuple(param.shape)}"
        )
    if grad.layout is not torch.strided:
        raise RuntimeError("gradients should be dense for centralize_grads=True but one is sparse")
    if grad.dim() < 2:
        return grad
    dtype = torch.promote_types(grad.dtype, torch.float32)
    means = grad.mean(dim=(*range(1, grad.dim()),), keepdim=True, dtype=dtype)
    return torch.sub(grad, means).to(grad.dtype)


#: Each transform by the setting that asks for it, in the order in which they are applied.
TRANSFORMS: dict[str, Transform] = {"centralize_grads": centralized}


def asked_for(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The transforms that some group asks for."""
    return [name for name in TRANSFORMS if any(group.get(name) for group in groups)]


def transformed(
    groups: Sequence[Mapping[str, Any]], params: Sequence[Tensor], grads: Sequence[Any], names: Sequence[str]
) -> list[Any]:
    """The gradients of a step after the transforms that groups ask for.

    Args:
        groups: Parameter groups.
        params: Group after group.
        grads: Of each parameter, in this process; None where it has none.
        names: Of transforms, from :func:`asked_for`.
    """
    group_of = [*chain.from_iterable([group] * len(group["params"]) for group in groups)]
    new = [*grads]
    for name in names:
        members = [i for i, group in enumerate(group_of) if group.get(name) and new[i] is not None]
        done = TRANSFORMS[name]([params[i] for i in members], [new[i] for i in members], [group_of[i] for i in members])
        for i, grad in zip(members, done, strict=True):
            new[i] = grad
    return new
