"""Random bits and storage formats, on Python's whole numbers.

Philox4x32 is that of Salmon et al. (https://doi.org/10.1145/2063384.2063405) with 7 rounds. ``bits`` of a float32 are a
whole number of 32 bits, those of a bfloat16 or float16 of 16 bits; a remainder is a number with a sign.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

NAN16 = 0x7FC0
_LOW = 0xFFFFFFFF


def philox(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Four words of 32 bits, of four and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(7):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _LOW, (a >> 32) ^ c3 ^ k1, a & _LOW
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return c0, c1, c2, c3


def noise(seed: int, step: int, parameter: int, role: int, element: int) -> int:
    """The 16 random bits of an element."""
    block = element // 8
    words = philox((block & _LOW, block >> 32, step, parameter * 16 + role), (seed & _LOW, seed >> 32 & _LOW))
    return words[element % 8 // 2] >> 16 * (element % 2) & 0xFFFF


def bits_of(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def value_of(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits & _LOW))[0]


def _is_nan(bits: int) -> bool:
    return bits & 0x7FFFFFFF > 0x7F800000


def _signed(number: int, width: int) -> int:
    """The lowest bits of a number, as one with a sign."""
    number &= (1 << width) - 1
    return number - (1 << width) if number >> (width - 1) else number


def stochastic_bfloat16(bits: int, random: int) -> int:
    """Bits of the bfloat16."""
    return NAN16 if _is_nan(bits) else bits + random >> 16


def stochastic_float16(value: float, random: int) -> float:
    """A number of float16, or one that is too large for it."""
    size = abs(value)
    if size >= 2.0**-14:
        return value_of(bits_of(value) + (random & 0x1FFF) & ~0x1FFF)
    # float32 has 24 bits of the sum
    total = value_of(bits_of(size * 2.0**24 + random * 2.0**-16))
    return int(total) * 2.0**-24 * (-1.0 if bits_of(value) >> 31 else 1.0)


def split16(bits: int) -> tuple[int, int]:
    """What is visible of a float32, and the remainder of 16 bits."""
    return (NAN16, 0) if _is_nan(bits) else (bits + 0x8000 >> 16 & 0xFFFF, _signed(bits, 16))


def split8(bits: int) -> tuple[int, int]:
    """What is visible, and the remainder of 8 bits."""
    b = bits + 0x80
    return (NAN16, 0) if _is_nan(bits) else (b + 0x8000 >> 16 & 0xFFFF, _signed(b >> 8, 8))


def join(visible: int, remainder: int, width: int) -> int:
    """Bits of the float32, of a remainder of ``width`` bits."""
    bits = (visible << 16) + (remainder << 16 - width) & _LOW
    return visible << 16 if _is_nan(bits) else bits


def signed_value(code: int, scale: float) -> float:
    """What a code of 8 bits with a sign stands for."""
    t = code / 127
    return t / (2 - abs(t)) * scale


def unsigned_value(code: int, scale: float) -> float:
    """What a code of 8 bits without a sign stands for."""
    return (code / 255 * scale) ** 2
