"""The gradient norm of a whole step, and what follows from it: the one place where partial results are combined.

What was found lies in ``control``, float64 ``[3]``: the norm, the factor for the gradients, and a mark that is not 0 if
the step must be skipped. On the Triton backend nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .. import _compat
from . import backends
from .bucket import Bucket
from .cpu.batch import split_by_size

#: Places in ``control``.
NORM, FACTOR, SKIP = range(3)


@dataclass(frozen=True)
class Amp:
    """What GradScaler hands over.

    Attributes:
        grad_scale: float32 scalar, the factor on the gradients; None: they are unscaled already.
        found_inf: float32 scalar, not 0 if a gradient is infinite or NaN; None: not looked for.
        check: Look for such gradients in this step, and write ``found_inf``.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    check: bool = False


def tensor_norms(tensors: Sequence[Tensor], norm_type: float = 2.0, *, wide: bool = False) -> list[Tensor]:
    """Norms whose norm is the norm of ``tensors``: one a large tensor, one for many small ones together.

    float32 where a tensor is of 16 bits, where torch rounds each norm to 16 bits; else the tensor's real dtype;
    float64 with ``wide``.
    """
    norms: list[Tensor] = []
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if not _compat.is_plain(tensor):
            norm = torch.linalg.vector_norm(tensor, norm_type)
            # a DTensor's norm is a partial result until it is asked for; what others make of it, only a number tells
            if hasattr(norm, "full_tensor"):
                norms.append(norm.full_tensor())
            else:
                norms.append(torch.full((), float(norm), dtype=torch.float64, device="cpu"))
            continue
        tensor = _elements(tensor)
        if tensor.numel() or norm_type > 0:
            alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for (_, dtype), same in alike.items():
        accumulate = torch.float32 if dtype in (torch.bfloat16, torch.float16) else None
        if wide:
            accumulate = torch.complex128 if dtype.is_complex else widest(same[0].device)
        small, large = split_by_size(same)
        for batch in small:
            together = _compat.flatten_dense_tensors([same[i] for i in batch])
            norms.append(torch.linalg.vector_norm(together, norm_type, dtype=accumulate))
        if large:
            norms += _compat.foreach_norm([same[i] for i in large], norm_type, dtype=accumulate)
    return norms


def _elements(tensor: Tensor) -> Tensor:
    """What a sparse tensor stores; duplicate entries count as their sum."""
    return tensor if tensor.layout is torch.strided else tensor.coalesce().values()


def combine(norms: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """The norm of norms on ``device``, in its widest dtype."""
    if not norms:
        return torch.zeros((), dtype=widest(device), device=device)
    stacked = torch.stack([norm.to(device, widest(device)) for norm in norms])
    return torch.linalg.vector_norm(stacked, norm_type)


def widest(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def result_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Of a norm of such gradients: float32, or float64 where one is."""
    return torch.float32 if {torch.float64, torch.complex128}.isdisjoint(dtypes) else torch.float64


def measure(
    buckets: Sequence[Bucket],
    others: Sequence[Tensor],
    max_norm: float | None,
    amp: Amp,
    *,
    clamp: bool = True,
) -> tuple[Tensor, Tensor]:
    """Norm and ``control`` of a step.

    Args:
        buckets: Bound to the step's tensors, and sent.
        others: Gradients that torch's own step will use.
        max_norm: Clip to this 2-norm; None: do not.
        amp: From GradScaler.
        clamp: Leave gradients below ``max_norm`` as they are; False: scale them up to it.

    Returns:
        The norm before clipping, a scalar, and ``control``. Both on the device of the first Triton bucket, else of
        the first gradient.
    """
    triton: list[Any] = [bucket for bucket in buckets if bucket.key.backend == backends.TRITON]
    native: list[Any] = [bucket for bucket in buckets if bucket.key.backend == backends.NATIVE]
    dtype = result_dtype([bucket.key.dtypes[1] for bucket in buckets] + [grad.dtype for grad in others])
    scaled = amp.grad_scale is not None
    needed = max_norm is not None or amp.check
    if triton:
        norms = _torch_norms(native, others, wide=scaled) if needed else []
        return _measure_triton(triton, norms, max_norm, amp, dtype, clamp)
    all_grads = [*others, *chain.from_iterable(bucket.members.grads for bucket in buckets)]
    device = all_grads[0].device
    norm = None
    if needed:
        norm = combine(_torch_norms(native, others), 2.0, device)
        if scaled and _maybe_infinite(norm):
            # squares of scaled gradients overflow float32 long before those of the gradients would
            norm = combine(_torch_norms(native, others, wide=True), 2.0, device)
    scale = torch.ones((), dtype=widest(device), device=device)
    skip = torch.zeros((), dtype=widest(device), device=device)
    if amp.check and amp.found_inf is not None and norm is not None and _maybe_infinite(norm):
        amp.found_inf.copy_(torch.stack([(~_elements(grad).isfinite()).any().to(device) for grad in all_grads]).any())
    if amp.grad_scale is not None:
        inverse = amp.grad_scale.to(device, widest(device)).reciprocal()
        norm = None if norm is None else norm * inverse
        scale = scale * inverse
    if max_norm is not None and norm is not None:
        factor = max_norm / (norm + 1e-6)
        scale = scale * (factor.clamp(max=1.0) if clamp else factor)
    if amp.found_inf is not None:
        skip = amp.found_inf.to(device, widest(device))
    control = torch.stack([skip if norm is None else norm, scale, skip])
    return control[NORM].to(dtype), control


def _torch_norms(native: Sequence[Any], others: Sequence[Tensor], wide: bool = False) -> list[Tensor]:
    return [norm for bucket in native for norm in bucket.norms(wide)] + tensor_norms(others, wide=wide)


def _maybe_infinite(norm: Tensor) -> bool:
    """Whether gradients have to be looked at: a finite norm has finite terms, an infinite sum may have overflowed."""
    return norm.device.type != "cpu" or not bool(norm.isfinite())


def _measure_triton(
    buckets: Sequence[Any],
    norms: Sequence[Tensor],
    max_norm: float | None,
    amp: Amp,
    dtype: torch.dtype,
    clamp: bool,
) -> tuple[Tensor, Tensor]:
    from ..triton_kernels.grad_norm import finish_

    home = buckets[0].key.device
    needed = max_norm is not None or amp.check
    here = [bucket for bucket in buckets if needed and bucket.key.device == home]
    away = [bucket for bucket in buckets if needed and bucket.key.device != home]
    columns = sum(bucket.n_partials for bucket in here) + (len(away) + len(norms) if needed else 0)
    partials = torch.empty(2, columns, dtype=torch.float64, device=home)
    offset = 0
    for bucket in here:
        bucket.measure(partials, offset, _on(amp.grad_scale, home))
        offset += bucket.n_partials
    for bucket in away:
        there = torch.empty(2, bucket.n_partials, dtype=torch.float64, device=bucket.key.device)
        bucket.measure(there, 0, _on(amp.grad_scale, bucket.key.device))
        partials[:, offset] = there.sum(1).to(home, non_blocking=True)
        offset += 1
    if needed:
        for norm in norms:
            norm = norm.to(home, torch.float64)
            partials[1, offset] = ~torch.isfinite(norm)
            if amp.grad_scale is not None:
                norm = norm / amp.grad_scale.to(home, torch.float64)
            partials[0, offset] = norm * norm
            offset += 1
    norm = torch.empty((), dtype=dtype, device=home)
    control = torch.empty(3, dtype=torch.float64, device=home)
    found_inf = _on(amp.found_inf, home)
    with backends.compiling(*(bucket.kernel_key for bucket in buckets)):
        finish_(
            partials, norm, control, norm_type=2.0, max_norm=max_norm, clamp=clamp,
            grad_scale=_on(amp.grad_scale, home), found_inf=found_inf, check_finite=amp.check,
        )  # fmt: skip
    if amp.check and amp.found_inf is not None and found_inf is not None and found_inf is not amp.found_inf:
        amp.found_inf.copy_(found_inf, non_blocking=True)
    return norm, control


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, torch.float32, non_blocking=True)
