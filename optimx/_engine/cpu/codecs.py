"""Codecs of storage formats on a CPU: what is kept in 8 or 16 bits, as float32 and back, by torch's operators.

All tensors have one dimension: a role's own tensor, its companion, and values in float32, an entry each an element (but
for scales, one a group). Values are never written by :func:`encode`. What is needed besides is scratch memory, and no
pass over elements is there for NaN alone: a sum tells whether there may be any.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..storage import GROUP, MASTER, NEAREST, REMAINDER8, REMAINDER16, SIGNED8, STOCHASTIC, UNSIGNED8, Format
from .noise import Memory

_HALF = 1 << 15
#: Where float16 begins to have fewer bits, and what its numbers are multiples of there.
_SMALLEST_NORMAL, _GRID = 2.0**-14, 2.0**-24


def elements_each(kept: Format) -> int:
    """Elements that an entry of a format's companion is for."""
    return GROUP if kept.kind in (SIGNED8, UNSIGNED8) else 1


def decode(kept: Format, own: Tensor, companion: Tensor | None, out: Tensor, memory: Memory) -> Tensor:
    """The values of elements, which may be written.

    Args:
        kept: Their format.
        own, companion: What is kept.
        out: float32, of as many elements.
        memory: See :data:`~.noise.Memory`.

    Returns:
        ``out``; or one of the tensors, where this has the values.
    """
    return _DECODE[kept.kind](own, companion, out, memory)


def encode(
    kept: Format, values: Tensor, own: Tensor, companion: Tensor | None, noise: Tensor | None, memory: Memory
) -> None:
    """Keep values.

    Args:
        kept: Their format.
        values: float32.
        own, companion: Where they are kept.
        noise: uint16, one an element, where the format is rounded stochastically.
        memory: See :data:`~.noise.Memory`.
    """
    _ENCODE[kept.kind](values, own, companion, noise, memory)


def _is_finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor infinity; may be wrong about large numbers, and where asking would wait."""
    return values.device.type == "cpu" and math.isfinite(values.sum().item())


def _nans(values: Tensor) -> Tensor | None:
    """Which are NaN; None where none is known to be."""
    return None if _is_finite(values) else values.isnan()


def _bits(name: str, like: Tensor, memory: Memory) -> Tensor:
    return memory(name, (len(like),), torch.int32)


def _floats(name: str, like: Tensor, memory: Memory) -> Tensor:
    return memory(name, (len(like),), torch.float32)


def _copy(values: Tensor, to: Tensor) -> None:
    """Copy values, unless they lie there."""
    if values.data_ptr() != to.data_ptr():
        to.copy_(values)


def _decode_plain(own, companion, out, memory):
    return own if own.dtype is out.dtype else out.copy_(own)


def _encode_nearest(values, own, companion, noise, memory):
    _copy(values, own)


def _encode_stochastic(values, own, companion, noise, memory):
    if own.dtype is torch.float16:
        own.copy_(_on_grid_of_float16(values, noise, memory))
    else:
        bits = _bits("bits", values, memory).copy_(noise).add_(values.view(torch.int32))
        own.copy_(bits.bitwise_and_(-1 << 16).view(torch.float32))
    nans = _nans(values)
    if nans is not None:
        # the sum may have carried into the sign
        own.masked_fill_(nans, math.nan)


def _on_grid_of_float16(values: Tensor, noise: Tensor, memory: Memory) -> Tensor:
    """Numbers of float16, or larger than these, by random bits."""
    bits = _bits("bits", values, memory).copy_(noise)
    # where the grid no longer gets finer, its multiples are counted
    multiples = _floats("multiples", values, memory).copy_(bits).mul_(2.0**-16)
    sizes = torch.abs(values, out=_floats("sizes", values, memory))
    multiples.add_(sizes, alpha=1.0 / _GRID).floor_().mul_(_GRID).copysign_(values)
    rounded = bits.bitwise_and_(0x1FFF).add_(values.view(torch.int32)).bitwise_and_(-1 << 13).view(torch.float32)
    return torch.where(sizes < _SMALLEST_NORMAL, multiples, rounded, out=rounded)


def _decode_remainder(own, companion, out, memory):
    bits, visible = out.view(torch.int32), own.view(torch.int16)
    remainder = _bits("remainder", own, memory).copy_(companion)
    bits.copy_(visible).bitwise_left_shift_(16)
    bits.add_(remainder, alpha=1 if companion.dtype is torch.int16 else 1 << 8)
    nans = _nans(out)
    if nans is not None:
        # a zero or an infinity that somebody else wrote, beside what was lacking before
        out.copy_(torch.where(nans, own, out))
    return out


def _encode_remainder16(values, own, companion, noise, memory):
    bits = values.view(torch.int32)
    # the lower half, as a number with a sign
    companion.copy_(bits)
    upper = torch.add(bits, _HALF, out=_bits("bits", values, memory))
    own.view(torch.int16).copy_(upper.bitwise_right_shift_(16))
    _keep_nans(values, own, companion)


def _encode_remainder8(values, own, companion, noise, memory):
    upper = torch.add(values.view(torch.int32), 1 << 7, out=_bits("bits", values, memory))
    companion.copy_(torch.bitwise_right_shift(upper, 8, out=_bits("remainder", values, memory)))
    own.view(torch.int16).copy_(upper.add_(_HALF).bitwise_right_shift_(16))
    _keep_nans(values, own, companion)


def _keep_nans(values: Tensor, own: Tensor, remainder: Tensor) -> None:
    """Put right what the carry has made of NaN."""
    nans = _nans(values)
    if nans is not None:
        own.masked_fill_(nans, math.nan)
        remainder.masked_fill_(nans, 0)


def _decode_master(own, companion, out, memory):
    return companion


def _encode_master(values, own, companion, noise, memory):
    own.copy_(values)
    _copy(values, companion)


def _grouped(values: Tensor) -> Tensor:
    return values.view(-1, GROUP)


def _keep_scales(sizes: Tensor, scales: Tensor) -> Tensor:
    """Keep the largest of each group; returns divisors, ``[groups, 1]``, with which no group is divided by zero."""
    largest = _grouped(sizes).amax(1)
    # a group with an infinity becomes NaN
    scales.copy_(largest.add_(largest * 0.0))
    return torch.where(scales == 0, 1.0, scales).unsqueeze(1)


def _keep_codes(codes: Tensor, numbers: Tensor, scales: Tensor) -> None:
    if not _is_finite(scales):
        numbers.nan_to_num_(0.0)
    codes.copy_(numbers)


def _decode_signed8(codes, scales, out, memory):
    # t / (2 - |t|) of t = code / 127, both times minus one
    divisors = torch.abs(out.copy_(codes), out=_floats("sizes", codes, memory)).sub_(254.0)
    _grouped(out.div_(divisors)).mul_(scales.neg().unsqueeze(1))
    return out


def _encode_signed8(values, codes, scales, noise, memory):
    numbers, sizes = _floats("numbers", values, memory), _floats("sizes", values, memory)
    divisors = _keep_scales(torch.abs(values, out=sizes), scales)
    torch.div(_grouped(values), divisors, out=_grouped(numbers))
    torch.abs(numbers, out=sizes).add_(1.0)
    numbers.mul_(254.0).div_(sizes).round_()
    _keep_codes(codes, numbers, scales)


def _decode_unsigned8(codes, scales, out, memory):
    # divided first: what had the largest code is the scale again
    _grouped(out.copy_(codes).div_(255.0)).mul_(scales.unsqueeze(1))
    return out.square_()


def _encode_unsigned8(values, codes, scales, noise, memory):
    numbers = torch.sqrt(values, out=_floats("numbers", values, memory))
    least = torch.sign(numbers, out=_floats("sizes", values, memory))
    divisors = _keep_scales(numbers, scales)
    _grouped(numbers).div_(divisors)
    # only zero is zero: a step is divided by it
    torch.maximum(numbers.mul_(255.0).round_(), least, out=numbers)
    _keep_codes(codes, numbers, scales)


_DECODE: dict[int, Callable[..., Tensor]] = {
    NEAREST: _decode_plain,
    STOCHASTIC: _decode_plain,
    REMAINDER8: _decode_remainder,
    REMAINDER16: _decode_remainder,
    MASTER: _decode_master,
    SIGNED8: _decode_signed8,
    UNSIGNED8: _decode_unsigned8,
}
_ENCODE: dict[int, Callable[..., None]] = {
    NEAREST: _encode_nearest,
    STOCHASTIC: _encode_stochastic,
    REMAINDER8: _encode_remainder8,
    REMAINDER16: _encode_remainder16,
    MASTER: _encode_master,
    SIGNED8: _encode_signed8,
    UNSIGNED8: _encode_unsigned8,
}
