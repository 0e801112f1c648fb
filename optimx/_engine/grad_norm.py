"""The gradient norm of a whole step, and what follows from it: the one place where partial results are combined.

What was found lies in ``control``, float64 ``[3]``: the norm, the factor for the gradients, and a mark that is not 0 if
the step must be skipped. On the Triton backend nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _compat
from . import backends
from .cpu.batch import split_by_size
from .sharding import Cut, Reduction

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
            # what a tensor subclass makes of it, only a number tells
            norm = torch.linalg.vector_norm(tensor, norm_type)
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


@dataclass(frozen=True)
class Found:
    """What the norm of a step is of.

    Attributes:
        buckets: Bound to the step's tensors, and sent.
        others: Gradients that torch's own step will use; this process's parts of them.
        cuts: How these are spread over ranks.
        reduction: Where ranks combine what they have found.
        total_norm: The norm of all gradients on all ranks, where somebody else has measured it.
    """

    buckets: Sequence[Any]
    others: Sequence[Tensor]
    cuts: Sequence[Cut | None]
    reduction: Reduction
    total_norm: Tensor | float | None = None

    def on(self, backend: str) -> list[Any]:
        """The buckets of a backend."""
        return [bucket for bucket in self.buckets if bucket.key.backend == backend]

    @property
    def grads(self) -> list[Tensor]:
        """All gradients."""
        return [*self.others, *chain.from_iterable(bucket.members.grads for bucket in self.buckets)]

    def torch_norms(self, *, wide: bool = False) -> dict[Cut | None, list[Tensor]]:
        """Norms of what torch's operators measure, by how it is spread over ranks."""
        alike: dict[Cut | None, list[Tensor]] = {}
        for cut, grad in zip(self.cuts, self.others, strict=True):
            alike.setdefault(cut, []).append(grad)
        norms = {cut: tensor_norms(grads, wide=wide) for cut, grads in alike.items()}
        for bucket in self.on(backends.NATIVE):
            bucket.wait()
            norms.setdefault(bucket.key.cut, []).extend(bucket.norms(wide))
        return norms


class Measurement(NamedTuple):
    """What was measured of the gradients of a step, on the device of the first Triton bucket, else of the first one.

    Attributes:
        norm: Before clipping, a scalar.
        control: See above.
        partials: For each Triton bucket that was measured its partial results, float64 ``[2, n_chunks]``, or
            ``[4, n_chunks]`` of a watched step.
    """

    norm: Tensor
    control: Tensor
    partials: Sequence[tuple[Any, Tensor]] = ()


def measure(
    found: Found,
    max_norm: float | None,
    amp: Amp,
    device: torch.device,
    *,
    needed: bool,
    clamp: bool = True,
    watched: bool = False,
) -> Measurement:
    """Norm and ``control`` of a step.

    Args:
        found: What there is in this process.
        max_norm: Clip to this 2-norm; None: do not.
        amp: From GradScaler.
        device: Of the results, where there is no gradient.
        needed: Somebody wants to know the norm.
        clamp: Leave gradients below ``max_norm`` as they are; False: scale them up to it.
        watched: Kernels find more than the norm needs, where they can.
    """
    needed = needed or max_norm is not None or amp.check
    if found.on(backends.TRITON):
        return _measure_triton(found, max_norm, amp, clamp, needed, watched)
    grads = found.grads
    device = grads[0].device if grads else device
    inverse = None if amp.grad_scale is None else amp.grad_scale.to(device, widest(device)).reciprocal()
    norm, bad = _measure_with_torch(found, needed, amp, device, inverse)
    if amp.check and amp.found_inf is not None and bad is not None:
        amp.found_inf.copy_(bad)
    scale = torch.ones((), dtype=widest(device), device=device)
    skip = torch.zeros((), dtype=widest(device), device=device)
    if inverse is not None:
        scale = scale * inverse
    if max_norm is not None and norm is not None:
        factor = max_norm / (norm + 1e-6)
        scale = scale * (factor.clamp(max=1.0) if clamp else factor)
    if amp.found_inf is not None:
        skip = (amp.found_inf if bad is None else bad).to(device, widest(device))
    control = torch.stack([skip if norm is None else norm, scale, skip])
    return Measurement(control[NORM].to(result_dtype(grad.dtype for grad in grads)), control)


def _measure_with_torch(
    found: Found, needed: bool, amp: Amp, device: torch.device, inverse: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The norm of unscaled gradients if it is needed, and whether one is bad if that was looked for; of all ranks."""
    if found.total_norm is not None:
        norm = torch.as_tensor(found.total_norm).to(device, widest(device))
        return norm if inverse is None else norm * inverse, ~norm.isfinite() if amp.check else None
    norms: dict[Cut | None, Tensor] = {}
    bad = None
    if needed:
        norms = _combined(found.torch_norms(), device)
        infinite = any(map(_maybe_infinite, norms.values()))
        if inverse is not None and infinite:
            # squares of scaled gradients overflow float32 long before those of the gradients would
            norms = _combined(found.torch_norms(wide=True), device)
        if amp.check and infinite:
            bad = torch.stack([(~_elements(grad).isfinite()).any().to(device) for grad in found.grads]).any()
        if inverse is not None:
            norms = {cut: norm * inverse for cut, norm in norms.items()}
    if not found.reduction:
        return combine([*norms.values()], 2.0, device) if needed else None, bad
    sums = found.reduction.new(device, widest(device))
    for cut, norm in norms.items():
        found.reduction.add(sums, cut, norm * norm)
    if not amp.check and amp.found_inf is not None:
        bad = amp.found_inf.to(device, widest(device))
    if bad is not None:
        sums[0, 1] += bad
    squares, marks = found.reduction.total(sums)
    return squares.sqrt() if needed else None, None if amp.found_inf is None else marks != 0


def _combined(norms: dict[Cut | None, list[Tensor]], device: torch.device) -> dict[Cut | None, Tensor]:
    return {cut: combine(same, 2.0, device) for cut, same in norms.items()}


def _maybe_infinite(norm: Tensor) -> bool:
    """Whether gradients have to be looked at: a finite norm has finite terms, an infinite sum may have overflowed."""
    return norm.device.type != "cpu" or not bool(norm.isfinite())


def _measure_triton(
    found: Found, max_norm: float | None, amp: Amp, clamp: bool, needed: bool, watched: bool
) -> Measurement:
    from ..triton_kernels.grad_norm import finish_

    buckets, reduction = found.on(backends.TRITON), found.reduction
    home = buckets[0].key.device
    found_inf = _on(amp.found_inf, home)
    of_buckets: list[tuple[Any, Tensor]] = []
    if found.total_norm is not None:
        partials = _as_partials(torch.as_tensor(found.total_norm), amp, home)[:, None]
    else:
        partials, cuts, of_buckets = _partials(found, buckets, amp, home, needed=needed, watched=watched)
        if reduction:
            sums = reduction.new(home, torch.float64)
            for cut, first, end in cuts:
                squares, bad = partials[:2, first:end].sum(1)
                reduction.add(sums, cut, squares, bad)
            if not amp.check and found_inf is not None:
                sums[0, 1] += found_inf
            partials = reduction.total(sums)[:, None]
            if not amp.check and found_inf is not None:
                found_inf = (partials[1, 0] != 0).to(torch.float32)
    norm = torch.empty((), dtype=result_dtype(grad.dtype for grad in found.grads), device=home)
    control = torch.empty(3, dtype=torch.float64, device=home)
    with backends.compiling(*(bucket.kernel_key for bucket in buckets)):
        finish_(
            partials, norm, control, norm_type=2.0, max_norm=max_norm, clamp=clamp,
            grad_scale=_on(amp.grad_scale, home), found_inf=found_inf, check_finite=amp.check,
        )  # fmt: skip
    if amp.check and amp.found_inf is not None and found_inf is not None and found_inf is not amp.found_inf:
        amp.found_inf.copy_(found_inf, non_blocking=True)
    return Measurement(norm, control, of_buckets)


def _partials(
    found: Found, buckets: Sequence[Any], amp: Amp, home: torch.device, *, needed: bool, watched: bool
) -> tuple[Tensor, list[tuple[Cut | None, int, int]], list[tuple[Any, Tensor]]]:
    """Squares of unscaled gradients and marks of bad ones, float64 ``[2, n]``, which columns are spread how, and what
    is each bucket's."""
    if not needed:
        return torch.empty(2, 0, dtype=torch.float64, device=home), [], []
    others = found.torch_norms(wide=amp.grad_scale is not None)
    here = [bucket for bucket in buckets if bucket.key.device == home]
    away = [bucket for bucket in buckets if bucket.key.device != home]
    columns = sum(bucket.n_partials for bucket in here) + len(away) + sum(map(len, others.values()))
    rows = 4 if watched else 2
    partials = torch.empty(rows, columns, dtype=torch.float64, device=home)
    cuts: list[tuple[Cut | None, int, int]] = []
    of_buckets: list[tuple[Any, Tensor]] = []
    offset = 0
    for bucket in here:
        bucket.measure(partials, offset, _on(amp.grad_scale, home))
        of_buckets.append((bucket, partials[:, offset : offset + bucket.n_partials]))
        cuts.append((bucket.key.cut, offset, offset + bucket.n_partials))
        offset += bucket.n_partials
    for bucket in away:
        there = torch.empty(rows, bucket.n_partials, dtype=torch.float64, device=bucket.key.device)
        bucket.measure(there, 0, _on(amp.grad_scale, bucket.key.device))
        of_buckets.append((bucket, there))
        partials[:2, offset] = there[:2].sum(1).to(home, non_blocking=True)
        cuts.append((bucket.key.cut, offset, offset + 1))
        offset += 1
    for cut, norms in others.items():
        cuts.append((cut, offset, offset + len(norms)))
        for norm in norms:
            partials[:2, offset] = _as_partials(norm, amp, home)
            offset += 1
    return partials, cuts, of_buckets


def _as_partials(norm: Tensor, amp: Amp, home: torch.device) -> Tensor:
    """A norm of gradients as they are, in the form in which kernels leave it."""
    norm = norm.to(home, torch.float64)
    bad = (~torch.isfinite(norm)).to(torch.float64)
    if amp.grad_scale is not None:
        norm = norm / amp.grad_scale.to(home, torch.float64)
    return torch.stack([norm * norm, bad])


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, torch.float32, non_blocking=True)
