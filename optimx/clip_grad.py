"""Gradient clipping with the signatures and results of :mod:`torch.nn.utils`.

What differs: norms are accumulated in float32 where torch rounds every tensor's norm to 16 bits, and gradients are
written only when they are really clipped, decided on their device.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import utils as _torch

from . import _compat
from ._engine import backends
from ._engine.grad_norm import combine, result_dtype, tensor_norms, widest
from ._engine.layout import is_dense
from ._engine.placement import FLOATS
from ._engine.sharding import Cut, Reduction, cut_of, gathered, local, with_sums_met

__all__ = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]

Tensors = Tensor | Iterable[Tensor]


def get_total_norm(
    tensors: Tensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: Any = None,
) -> Tensor:
    """The norm of tensors as if they were one vector; :func:`torch.nn.utils.get_total_norm`.

    Args:
        tensors: Tensors on any devices, of any floating or complex dtypes; a tensor, or an iterable of them. DTensors
            may be among them: one reduction for those on the same ranks, and the norm is that of all of their parts,
            a plain tensor on every rank (torch: a DTensor).
        norm_type: The p of the p-norm; ``float("inf")`` for the largest absolute value.
        error_if_nonfinite: Raise where the norm is NaN or infinite. This waits for the device.
        foreach: True, False: torch's implementation, also of DTensors; None: the fastest.
        group: A process group, each rank of which has other tensors that are no DTensors (default: None: they are
            alike on all ranks).

    Returns:
        A scalar on the first tensor's device: float64 where a tensor is, else float32 (torch: the tensors' dtype).

    Raises:
        RuntimeError: The norm is not finite and ``error_if_nonfinite`` is set.
        ValueError: ``foreach`` is given together with ``group``, which torch's implementation does not know; or
            ``norm_type`` is not > 0 for tensors that several ranks have.
    """
    listed = _listed(tensors)
    return norm_of(listed, listed, norm_type, error_if_nonfinite, foreach, group)


def norm_of(
    tensors: list[Tensor],
    owners: Sequence[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    group: Any = None,
) -> Tensor:
    """The norm of tensors; ranks meet where ``owners``, which all of them have, lie."""
    norm_type = float(norm_type)
    if foreach is not None and group is not None:
        raise ValueError(f"foreach should be None with a group but is: {foreach}")
    # a compiler fuses torch's formulas, and does not look into ours
    if foreach is not None or (torch.compiler.is_compiling() and group is None):
        return _torch.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
    reduction = Reduction(owners, group)
    # a norm of order 0 is a count of tensors in torch, and only torch's own division into tensors gives it
    if not reduction and (not tensors or norm_type <= 0):
        return _torch.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
    with torch.no_grad():
        norm = _norm_of_ranks(tensors, norm_type, reduction) if reduction else _total_norm(tensors, norm_type)
    if error_if_nonfinite and bool(norm.isnan() | norm.isinf()):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    return norm


def clip_grads_with_norm_(
    parameters: Tensors, max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """Scale gradients by ``min(max_norm / (total_norm + 1e-6), 1)``; :func:`torch.nn.utils.clip_grads_with_norm_`.

    Args:
        parameters: Parameters whose gradients are scaled in place; where the factor is 1 they are not written.
        max_norm: Largest norm.
        total_norm: Norm of the gradients; a scalar, or a DTensor as torch's :func:`get_total_norm` returns it.
        foreach: True, False: torch's implementation; None: the fastest.
    """
    listed = _listed(parameters)
    if foreach is not None or torch.compiler.is_compiling():
        return _torch.clip_grads_with_norm_(listed, max_norm, total_norm, foreach)
    # a factor on each part is one on the whole, also of parts that are sums
    grads = _compat.local_tensors(param.grad for param in listed if param.grad is not None)
    with torch.no_grad():
        total_norm = gathered(total_norm)
        scale = torch.clamp(float(max_norm) / (total_norm.to(widest(total_norm.device)) + 1e-6), max=1.0)
        for backend, device, same in _by_backend(grads):
            if backend == backends.TRITON and _on_triton(_scale_triton_, same, scale.to(device, non_blocking=True)):
                continue
            if device.type != "cpu":
                # not in the gradients' dtype: 16 bits would round the factor first
                _compat.foreach_mul_(same, scale.to(device, result_dtype([same[0].dtype]), non_blocking=True))
            elif float(scale) != 1.0 and same[0].dtype.itemsize > 2:
                _compat.foreach_mul_(same, float(scale))
            elif float(scale) != 1.0:
                # multiplied in 16 bits, the factor would be rounded first
                for grad in same:
                    grad.copy_(grad.float() * scale)


def clip_grad_norm_(
    parameters: Tensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: Any = None,
) -> Tensor:
    """Clip the norm of all gradients together; :func:`torch.nn.utils.clip_grad_norm_`.

    Args:
        parameters: Parameters whose gradients are clipped in place; a tensor, or an iterable of them.
        max_norm: Largest norm.
        norm_type: The p of the p-norm; ``float("inf")`` for the largest absolute value.
        error_if_nonfinite: Raise where the norm is NaN or infinite. This waits for the device.
        foreach: True, False: torch's implementation; None: the fastest.
        group: As for :func:`get_total_norm`.

    Returns:
        The norm before clipping, a scalar on the first gradient's device (see :func:`get_total_norm`).

    Raises:
        RuntimeError: The norm is not finite and ``error_if_nonfinite`` is set; no gradient was changed.
    """
    if isinstance(parameters, types.GeneratorType):
        parameters = list(parameters)
        if not parameters:
            message = "`parameters` is an empty generator, no gradient clipping will occur."
            warnings.warn(message, stacklevel=2)
    listed = _listed(parameters)
    grads = [param.grad for param in listed if param.grad is not None]
    norm = norm_of(grads, listed, norm_type, error_if_nonfinite, foreach, group)
    clip_grads_with_norm_(listed, max_norm, norm, foreach)
    return norm


def clip_grad_value_(parameters: Tensors, clip_value: float, foreach: bool | None = None) -> None:
    """Clip every gradient element to ``[-clip_value, clip_value]``: :func:`torch.nn.utils.clip_grad_value_` itself.

    It reads and writes the gradients twice; no kernel of ours would be used by a step, where clipping by value has no
    counterpart to ``max_grad_norm``.
    """
    listed = _listed(parameters)
    if any(param.grad is not None for param in listed):
        _torch.clip_grad_value_(listed, clip_value, foreach)


def _listed(tensors: Tensors) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _by_backend(tensors: Sequence[Tensor]) -> list[tuple[str, torch.device, list[Tensor]]]:
    """Tensors by backend, device and dtype; what a launch does not take is torch's."""
    grouped: dict[tuple[str, torch.device, torch.dtype], list[Tensor]] = {}
    capturable = _compat.graphs_keep_pinned_memory() or not _compat.is_capturing()
    for tensor in tensors:
        backend, _ = backends.choose(tensor.device)
        if backend == backends.TRITON and not (
            capturable
            and tensor.dtype in FLOATS
            and _compat.is_plain(tensor)
            and tensor.layout is torch.strided
            and is_dense(tensor)
            and not backends.given_up(_variant(tensor))
        ):
            backend = backends.TORCH
        grouped.setdefault((backend, tensor.device, tensor.dtype), []).append(tensor)
    return [(backend, device, same) for (backend, device, _), same in grouped.items()]


def _total_norm(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    norms: list[Tensor] = []
    for backend, _, same in _by_backend(tensors):
        norm = None
        if backend == backends.TRITON and norm_type in (1.0, 2.0, float("inf")):
            norm = _on_triton(_norm_triton, same, norm_type)
        norms += tensor_norms(same, norm_type) if norm is None else [norm]
    return combine(norms, norm_type, tensors[0].device).to(result_dtype(tensor.dtype for tensor in tensors))


def _norm_of_ranks(tensors: Sequence[Tensor], norm_type: float, reduction: Reduction) -> Tensor:
    """The norm of tensors whose parts lie on several ranks."""
    if norm_type <= 0:
        raise ValueError(f"norm_type should be > 0 for DTensors, or with a group, but is: {norm_type}")
    alike: dict[Cut | None, list[Tensor]] = {}
    for tensor in tensors:
        whole = with_sums_met(tensor)
        alike.setdefault(cut_of(whole), []).append(local(whole))
    device = local(tensors[0]).device if tensors else torch.device("cpu")
    sums = reduction.new(device, widest(device))
    is_max = norm_type == float("inf")
    for cut, parts in alike.items():
        # the largest of nothing is no number in torch; here it is that of other ranks
        parts = [part for part in parts if part.numel()]
        if parts:
            norm = _total_norm(parts, norm_type).to(device, widest(device))
            reduction.add(sums, cut, norm if is_max else norm**norm_type, largest=is_max)
    total = reduction.total(sums, largest=is_max)[0]
    return (total if is_max else total ** (1.0 / norm_type)).to(result_dtype(tensor.dtype for tensor in tensors))


def _variant(grad: Tensor) -> tuple[Any, ...]:
    """What tells the kernels for a gradient from others; see :func:`optimx._engine.backends.given_up`."""
    return "grad_norm", grad.device, grad.dtype


def _on_triton(launch: Callable[..., Any], grads: Sequence[Tensor], *args: Any) -> Any:
    """What ``launch(grads, *args)`` returns; None, with nothing done, where its kernel does not compile."""
    try:
        with backends.compiling(_variant(grads[0])):
            return launch(grads, *args)
    except backends.CompileError as failed:
        backends.give_up(failed, f"the norm of {len(grads)} gradients on {grads[0].device}")
        return None


def _norm_triton(grads: Sequence[Tensor], norm_type: float) -> Tensor:
    from .triton_kernels.grad_norm import finish_, norm_

    table, addresses = _table(grads)
    device = grads[0].device
    partials = torch.empty(2, table.n_chunks, dtype=torch.float64, device=device)
    norm_(table, addresses, None, partials, 0, dtype=grads[0].dtype, norm_type=norm_type)
    norm = torch.empty((), dtype=torch.float64, device=device)
    control = torch.empty(3, dtype=torch.float64, device=device)
    finish_(partials, norm, control, norm_type=norm_type, max_norm=None)
    return norm


def _scale_triton_(grads: Sequence[Tensor], scale: Tensor) -> bool:
    from .triton_kernels.grad_norm import scale_

    table, addresses = _table(grads)
    scale_(table, addresses, scale, dtype=grads[0].dtype)
    torch.autograd.graph.increment_version(grads)
    return True


def _table(grads: Sequence[Tensor]) -> tuple[Any, Tensor]:
    from ._engine.triton.elementwise import launch_size
    from .triton_kernels.tensor_table import upload

    addresses = torch.tensor([*map(Tensor.data_ptr, grads)], dtype=torch.int64, device="cpu")
    # what is made under capture is the graph's, and holds nothing until a replay; what was made before might be given
    # up while the graph still reads it
    sizes = _sizes.__wrapped__ if _compat.is_capturing() else _sizes
    table = sizes(tuple(map(Tensor.numel, grads)), grads[0].device, launch_size)
    return table, upload(addresses, table.device)


@lru_cache(maxsize=8)
def _sizes(numels: tuple[int, ...], device: torch.device, size: Any) -> Any:
    """A table without addresses: gradients move from step to step, their sizes do not."""
    from .triton_kernels.tensor_table import TensorTable

    return TensorTable(numels, [], [], device, size)
