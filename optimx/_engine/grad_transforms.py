"""Gradients that a step changes before it takes their norm: copies by torch's operators, ``param.grad`` stays.

A transform is a function ``(params, grads, groups, grad_scale) -> grads``: of whole parameters, of their gradients in
this process (a DTensor's local tensor; never None), of the group of each, and of what GradScaler multiplied the
gradients by (a float32 scalar; None: they are as they should be). What it returns is still multiplied by that. A group
asks for it with a setting of its name in :data:`TRANSFORMS`. It may raise; nothing has been changed then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _compat
from .._checks import above, check_number
from .sharding import cutting, is_here, local

Group = Mapping[str, Any]
Apply = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Group], Tensor | None], Sequence[Tensor]]

#: What norms of units of a parameter are at least for AGC, and those of their gradients.
_LEAST_PARAM, _LEAST_GRAD = 1e-3, 1e-6


def centralized(
    params: Sequence[Tensor], grads: Sequence[Tensor], groups: Sequence[Group], grad_scale: Tensor | None
) -> Sequence[Tensor]:
    """Gradients less their means over all dimensions but the first; those of fewer than two dimensions as they are.

    Gradient centralization, https://arxiv.org/abs/2004.01461. Means are float32 at least, and are rounded once.

    Raises:
        RuntimeError: A gradient is sparse, or parts of its rows lie on other ranks.
    """
    return [_centralized(param, grad) for param, grad in zip(params, grads, strict=True)]


def _centralized(param: Tensor, grad: Tensor) -> Tensor:
    _check_units("centralize_grads", param, grad, vectors=False)
    if grad.dim() < 2:
        return grad
    dtype = torch.promote_types(grad.dtype, torch.float32)
    means = grad.mean(dim=(*range(1, grad.dim()),), keepdim=True, dtype=dtype)
    return torch.sub(grad, means).to(grad.dtype)


def adaptively_clipped(
    params: Sequence[Tensor], grads: Sequence[Tensor], groups: Sequence[Group], grad_scale: Tensor | None
) -> Sequence[Tensor]:
    """Gradients of which no unit is longer than ``agc`` times its unit of the parameter, which counts as 1e-3 at least.

    Adaptive gradient clipping, https://arxiv.org/abs/2102.06171, with the units of timm: entries of the first
    dimension, and tensors of fewer than two dimensions as a whole. Norms are float32 at least.

    Raises:
        RuntimeError: A gradient is sparse, or parts of its units lie on other ranks.
    """
    return [
        _adaptively_clipped(param, grad, group["agc"], grad_scale)
        for param, grad, group in zip(params, grads, groups, strict=True)
    ]


def _adaptively_clipped(param: Tensor, grad: Tensor, clip_factor: float, grad_scale: Tensor | None) -> Tensor:
    _check_units("agc", param, grad, vectors=True)
    longest = _unit_norms(local(param.detach())).clamp(min=_LEAST_PARAM).mul(clip_factor)
    norms = _unscaled(_unit_norms(grad), grad_scale)
    # as in timm: a norm that is NaN is below nothing, and makes its unit NaN
    return _times(grad, torch.where(norms < longest, 1.0, longest / norms.clamp(min=_LEAST_GRAD)))


def _unit_norms(tensor: Tensor) -> Tensor:
    """The 2-norms of a tensor's units, of as many dimensions as the tensor."""
    dims = (*range(min(1, tensor.dim() - 1), tensor.dim()),)
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor, dim=dims, keepdim=True, dtype=dtype)


def clipped_alone(
    params: Sequence[Tensor], grads: Sequence[Tensor], groups: Sequence[Group], grad_scale: Tensor | None
) -> Sequence[Tensor]:
    """Gradients each of which is clipped to the 2-norm ``max_param_norm``, as torch clips all together.

    Raises:
        RuntimeError: A gradient is sparse, or parts of it lie on other ranks.
    """
    for param in params:
        _check_whole("max_param_norm", param)
    norms = _norms("max_param_norm", grads)
    return [
        _clipped(grad, norm, group["max_param_norm"], grad_scale)
        for grad, norm, group in zip(grads, norms, groups, strict=True)
    ]


def clipped_by_group(
    params: Sequence[Tensor], grads: Sequence[Tensor], groups: Sequence[Group], grad_scale: Tensor | None
) -> Sequence[Tensor]:
    """Gradients that are clipped to the 2-norm ``max_group_norm``, those of each group together.

    Raises:
        RuntimeError: A gradient is sparse, or parts of the group lie on other ranks.
    """
    norms = _norms("max_group_norm", grads)
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(id(group), []).append(i)
    clipped = [*grads]
    for indices in members.values():
        group = groups[indices[0]]
        for param in group["params"]:
            _check_whole("max_group_norm", param)
        total = _together([norms[i] for i in indices])
        for i in indices:
            clipped[i] = _clipped(grads[i], total, group["max_group_norm"], grad_scale)
    return clipped


def _norms(name: str, grads: Sequence[Tensor]) -> list[Tensor]:
    """The 2-norm of each gradient, float32 at least, without waiting."""
    norms = [*grads]
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, grad in enumerate(grads):
        _check_dense(name, grad)
        alike.setdefault((grad.device, grad.dtype), []).append(i)
    for (_, dtype), indices in alike.items():
        wide = torch.promote_types(dtype, torch.float32)
        found = _compat.foreach_norm([grads[i] for i in indices], 2, dtype=None if wide is dtype else wide)
        for i, norm in zip(indices, found, strict=True):
            norms[i] = norm
    return norms


def _together(norms: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all from those of parts, which may be on several devices."""
    dtype = max((norm.dtype for norm in norms), key=lambda dtype: dtype.itemsize)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device, dtype) for norm in norms]))


def _clipped(grad: Tensor, norm: Tensor, max_norm: float, grad_scale: Tensor | None) -> Tensor:
    factor = torch.clamp(max_norm / (_unscaled(norm, grad_scale) + 1e-6), max=1.0)
    return _times(grad, factor.to(grad.device).reshape([1] * grad.dim()))


def _unscaled(norm: Tensor, grad_scale: Tensor | None) -> Tensor:
    return norm if grad_scale is None else norm / grad_scale.to(norm)


def _times(grad: Tensor, factor: Tensor) -> Tensor:
    """A product that is rounded once: torch would round a factor of fewer dimensions to the gradient's dtype."""
    return (grad * factor).to(grad.dtype)


def _check_units(name: str, param: Tensor, grad: Tensor, *, vectors: bool) -> None:
    """Raise RuntimeError where a gradient is sparse, or parts of its rows (of ``vectors``: of all) are elsewhere."""
    if param.dim() > 1 or vectors:
        _check_whole(name, param, *range(1 - param.dim(), 0))
    elif _compat.is_flat_shard(param):
        _check_whole(name, param)
    _check_dense(name, grad)


def _check_whole(name: str, param: Tensor, *dims: int) -> None:
    """Raise RuntimeError where a parameter is cut over ranks; given ``dims``, along one of these, from the end."""
    if _compat.is_flat_shard(param) or (_compat.is_dtensor(param) and (cutting(param, *dims) or not is_here(param))):
        what = "rows of a parameter" if dims else "parameters"
        raise RuntimeError(f"{what} should be whole on each rank for {name} but are cut: {tuple(param.shape)}")


def _check_dense(name: str, grad: Tensor) -> None:
    if grad.layout is not torch.strided:
        raise RuntimeError(f"gradients should be dense for {name} but one is sparse")


class Transform(NamedTuple):
    """What a setting asks for.

    Attributes:
        apply: As in the module's docstring.
        off: The setting where nothing is asked for: False of a flag, None of a number > 0.
    """

    apply: Apply
    off: bool | None = None

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError or TypeError where a setting of this name is of no use."""
        if self.off is None:
            if value is not None:
                check_number(name, value, above(0))
        elif value and value is not True:
            raise ValueError(f"{name} should be True or False but is: {value!r}")


#: Each transform by the setting that asks for it, in the order in which they are applied.
TRANSFORMS = {
    "centralize_grads": Transform(centralized, off=False),
    "agc": Transform(adaptively_clipped),
    "max_param_norm": Transform(clipped_alone),
    "max_group_norm": Transform(clipped_by_group),
}


def asked_for(groups: Sequence[Group]) -> list[str]:
    """The transforms that some group asks for."""
    return [name for name in TRANSFORMS if any(_asks(group, name) for group in groups)]


def _asks(group: Group, name: str) -> bool:
    value = group.get(name)
    return value is not None if TRANSFORMS[name].off is None else bool(value)


def transformed(
    groups: Sequence[Group],
    params: Sequence[Tensor],
    grads: Sequence[Any],
    names: Sequence[str],
    grad_scale: Tensor | None = None,
) -> list[Any]:
    """The gradients of a step after the transforms that groups ask for.

    Args:
        groups: Parameter groups.
        params: Group after group.
        grads: Of each parameter, in this process; None where it has none.
        names: Of transforms, from :func:`asked_for`.
        grad_scale: float32 scalar, the factor that is on the gradients, and stays (default: None).
    """
    for group in groups:
        for name in names:
            TRANSFORMS[name].check(name, group.get(name))
    group_of = [*chain.from_iterable([group] * len(group["params"]) for group in groups)]
    new = [*grads]
    for name in names:
        members = [i for i, group in enumerate(group_of) if _asks(group, name) and new[i] is not None]
        done = TRANSFORMS[name].apply(
            [params[i] for i in members], [new[i] for i in members], [group_of[i] for i in members], grad_scale
        )
        for i, grad in zip(members, done, strict=True):
            new[i] = grad
    return new
