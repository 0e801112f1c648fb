"""Codecs of storage formats, and random bits: what is kept in 8 or 16 bits, as float32 and back.

A *role* of an update, the parameter or a state, is kept in one of the kinds below; some have a *companion*, a second
tensor: what a 16-bit parameter lacks of float32, or a scale for each :data:`GROUP` codes of 8 bits. No algorithm knows.

Functions here work on values. A group is neighbours in memory, and lies in a block as a whole.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Kinds: rounded to the nearest number, or stochastically; a bfloat16 parameter beside 8 or 16 bits that it lacks; a
#: 16-bit parameter that is but a copy of a float32 one; codes of 8 bits with a sign, and without.
NEAREST, STOCHASTIC, REMAINDER8, REMAINDER16, MASTER, SIGNED8, UNSIGNED8 = (tl.constexpr(i) for i in range(7))
#: Elements that a scale is for.
GROUP = tl.constexpr(128)

#: Rounds of Philox4x32 (https://doi.org/10.1145/2063384.2063405).
_ROUNDS = tl.constexpr(7)
#: Added to a number below 2**22, leaves its nearest whole number in the lowest bits.
_TO_WHOLE = tl.constexpr(1.5 * 2**23)
_NAN = tl.constexpr(0x7FC00000)
#: What a group's numbers are divided by is no smaller than this: a reciprocal is not infinite.
_SMALLEST = tl.constexpr(2.0**-120)


@triton.jit
def random_bits(noise, role: tl.constexpr, offsets, runs):
    """Uniform random numbers of 16 bits, uint32, for the elements of a block.

    Those of an element follow from seed, step, parameter, role and place in the whole parameter alone. A counter serves
    eight neighbours.

    Args:
        noise: What :func:`~.device.load_noise` returns.
        role: 0 for the parameter, then its states.
        offsets: Of the elements, from where ``noise`` begins.
        runs: In a tuple, offsets of every fourth or eighth element of the block, one dimension: the others are their
            neighbours also in the whole parameter, and a thread has them in a row. Empty: nothing is known.
    """
    seed, step, stream, start, place = noise
    if len(runs):
        elements = place[0] + start + runs[0]
        w0, w1, w2, w3 = _philox(seed, step, stream + role, elements)
        if offsets.numel == 8 * elements.numel:
            words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        else:
            is_second = (elements & 4) != 0
            words = tl.join(tl.where(is_second, w2, w0), tl.where(is_second, w3, w1))
        return tl.reshape(tl.join(words & 0xFFFF, words >> 16), offsets.shape)
    else:
        whole, row, gap = place
        elements = start + offsets
        if gap != 0:
            elements += elements // row * gap
        elements += whole
        w0, w1, w2, w3 = _philox(seed, step, stream + role, elements)
        is_odd = (elements & 2) != 0
        word = tl.where((elements & 4) != 0, tl.where(is_odd, w3, w2), tl.where(is_odd, w1, w0))
        return tl.where((elements & 1) != 0, word >> 16, word & 0xFFFF)


@triton.jit
def _philox(seed, step, stream, elements):
    counters = elements >> 3
    zeros = tl.zeros_like(counters).to(tl.uint32)
    return tl.philox_impl(
        counters.to(tl.uint32), (counters >> 32).to(tl.uint32), zeros + step, zeros + stream, seed[0], seed[1], _ROUNDS
    )


@triton.jit
def _bits(values):
    return values.to(tl.uint32, bitcast=True)


@triton.jit
def _from_bits(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _bits_to_round(values):
    """Bits of values; of NaN those that no sum carries into another number."""
    return tl.where(values == values, _bits(values), _NAN)


@triton.jit
def _upper_half(bits):
    """A bfloat16."""
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def stochastic(values, noise, DTYPE: tl.constexpr):
    """Values rounded up as often as they are near, to bfloat16 or float16."""
    if tl.bfloat16 == DTYPE:
        return _upper_half(_bits_to_round(values) + noise)
    else:
        size = tl.abs(values)
        # where the grid no longer gets finer, its multiples are counted
        multiples = tl.floor(size * 2.0**24 + noise.to(tl.float32) * 2.0**-16) * 2.0**-24
        multiples = _from_bits(_bits(multiples) | (_bits(values) & 0x80000000))
        rounded = _from_bits((_bits_to_round(values) + (noise & 0x1FFF)) & 0xFFFFE000)
        return tl.where(size < 2.0**-14, multiples, rounded).to(tl.float16)


@triton.jit
def join_remainder(visible, remainder):
    """The float32 of a bfloat16 and what it lacks."""
    upper = visible.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    lower = remainder.to(tl.int32)
    if remainder.dtype == tl.int8:
        lower = lower << 8
    values = _from_bits(upper + lower.to(tl.uint32, bitcast=True))
    # a zero or an infinity that somebody else wrote, beside what was lacking before
    return tl.where(values == values, values, _from_bits(upper))


@triton.jit
def split_remainder(values, DTYPE: tl.constexpr):
    """What is visible of float32, and what that lacks, of ``DTYPE``: int8 or int16."""
    bits = _bits_to_round(values)
    if tl.int8 == DTYPE:
        bits += 0x80
        lower = bits >> 8
    else:
        lower = bits
    return _upper_half(bits + 0x8000), lower.to(DTYPE)


@triton.jit
def decode8(codes, scales, SIGNED: tl.constexpr):
    """Values of codes, of any shape, and a scale each :data:`GROUP` of them, one dimension."""
    numbers = _grouped(codes.to(tl.float32))
    if SIGNED:
        # t / (2 - |t|) of t = code / 127
        numbers = numbers * _reciprocal(254.0 - tl.abs(numbers)) * scales[:, None]
    else:
        roots = numbers * (scales / 255.0)[:, None]
        numbers = roots * roots
    return tl.reshape(numbers, codes.shape)


@triton.jit
def encode8(values, SIGNED: tl.constexpr):
    """Codes of values, as int32 of which the lowest 8 bits count, and a scale each :data:`GROUP`, one dimension.

    A group with a NaN or an infinity has a scale of NaN. Without a sign only zero is zero: a step is divided by it.
    """
    grouped = _grouped(values)
    if SIGNED:
        sizes = tl.abs(grouped)
    else:
        # the update takes the same root
        sizes = _grouped(tl.sqrt_rn(values))
    largest = tl.reduce(sizes, 1, _larger)
    # also an infinite one becomes NaN
    scales = largest + largest * 0.0
    divisors = tl.maximum(scales, _SMALLEST)[:, None]
    if SIGNED:
        # halves: no sum is infinite
        numbers = grouped * _reciprocal(0.5 * sizes + 0.5 * divisors) * 127.0
    else:
        numbers = tl.maximum(sizes * (255.0 / divisors), tl.minimum(sizes * 2.0**100, 1.0))
    return tl.reshape((numbers + _TO_WHOLE).to(tl.int32, bitcast=True), values.shape), scales


@triton.jit
def _grouped(values):
    return tl.reshape(values, (values.numel // GROUP, GROUP))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _reciprocal(x):
    """``1 / x`` of what is positive and not tiny, wrong by a few units in the last place: codes are coarser."""
    root = tl.rsqrt(x)
    return root * root
