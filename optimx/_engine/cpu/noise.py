"""Random bits on a CPU: Philox4x32 with 7 rounds (https://doi.org/10.1145/2063384.2063405), from torch's operators.

The bits of an element follow from a seed, the step, the parameter, the role and the element's place in the whole
parameter, and from nothing else: neither pieces nor batches nor ranks change them, and a GPU has the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..storage import Geometry

#: Gives scratch memory: of a name, a shape, a dtype.
Memory = Callable[[str, tuple[int, ...], torch.dtype], Tensor]

_ROUNDS = 7
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
#: Numbers as tensors, because making one takes longer than an operator on a few elements.
_MULTIPLIER0, _MULTIPLIER1, _LOW, _SHIFT = torch.tensor([*_MULTIPLIERS, _WORD, 32], device="cpu").unbind()
#: Elements that one counter serves, 16 bits each.
PER_COUNTER = 8


class Part(NamedTuple):
    """Elements that follow each other in the memory of a member of a bucket.

    Attributes:
        geometry: Of the member.
        first, numel: Of its elements.
    """

    geometry: Geometry
    first: int
    numel: int


class Places(NamedTuple):
    """Where the bits of some elements come from.

    Attributes:
        counters: int64, each of which serves :data:`PER_COUNTER` neighbours in a whole parameter.
        parts: int64, the part whose elements each counter serves; None where there is one part.
        elements: Of all that the counters serve, those that are meant.
    """

    counters: Tensor
    parts: Tensor | None
    elements: slice | Tensor


def places(parts: Sequence[Part], memory: Memory | None = None) -> Places:
    """Where the bits of the elements of parts, one part after the other, come from.

    Args:
        parts: One or more, none of which is empty.
        memory: May hold what is returned, until the next call.
    """
    if memory is not None and len(parts) == 1 and not parts[0].geometry.gap:
        start = parts[0].geometry.first + parts[0].first
        first, last = start // PER_COUNTER, (start + parts[0].numel - 1) // PER_COUNTER
        counters = memory("counters", (last - first + 1,), torch.int64)
        torch.arange(first, last + 1, out=counters)
        offset = start % PER_COUNTER
        return Places(counters, None, slice(offset, offset + parts[0].numel))
    runs = [*map(_runs, parts)]
    starts, lengths = (torch.cat([*of_parts]) for of_parts in zip(*runs, strict=True))
    first_counters = starts // PER_COUNTER
    n_counters = (starts + lengths - 1) // PER_COUNTER - first_counters + 1
    offsets = PER_COUNTER * (n_counters.cumsum(0) - n_counters) + starts % PER_COUNTER
    elements: slice | Tensor
    if torch.equal(offsets[1:], (offsets + lengths)[:-1]):
        elements = slice(int(offsets[0]), int(offsets[-1] + lengths[-1]))
    else:
        elements = _ranges(offsets, lengths)
    owners = None
    if len(parts) > 1:
        n_runs = torch.tensor([len(of_part) for of_part, _ in runs], device="cpu")
        owners = torch.arange(len(parts), device="cpu").repeat_interleave(n_runs).repeat_interleave(n_counters)
    return Places(_ranges(first_counters, n_counters), owners, elements)


def _runs(part: Part) -> tuple[Tensor, Tensor]:
    """Starts and lengths of what follows each other in the whole parameter, too."""
    (first, row, gap), begin, end = part.geometry, part.first, part.first + part.numel
    if not gap:
        return torch.tensor([first + begin], device="cpu"), torch.tensor([part.numel], device="cpu")
    rows = torch.arange(begin // row, (end - 1) // row + 1, device="cpu")
    begins = (rows * row).clamp_(min=begin)
    return first + begins + rows * gap, (rows * row + row).clamp_(max=end) - begins


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """The numbers from each of ``starts`` on, as many as ``lengths`` says."""
    before = lengths.cumsum(0) - lengths
    ranges = (starts - before).repeat_interleave(lengths)
    return ranges.add_(torch.arange(len(ranges), device="cpu"))


def draw(where: Places, seed: int | Tensor, step: int | Tensor, stream: int | Tensor, memory: Memory) -> Tensor:
    """Uniform random numbers of 16 bits.

    Args:
        where: Of which elements.
        seed: 64 bits. This and the next ones are numbers, or int64 tensors with an entry a counter.
        step: 1 for the first one.
        stream: The parameter's index times 16, and the role.
        memory: Holds what is returned, until the next draw.

    Returns:
        uint16, one an element.
    """
    n = len(where.counters)
    c0, c1, c2, c3, product0, product1 = memory("philox", (6, n), torch.int64).unbind()
    torch.bitwise_and(where.counters, _LOW, out=c0)
    torch.bitwise_right_shift(where.counters, _SHIFT, out=c1)
    c2[:], c3[:] = step, stream
    for key0, key1 in _keys_of(seed) if isinstance(seed, int) else _keys(seed):
        torch.mul(c0, _MULTIPLIER0, out=product0)
        torch.mul(c2, _MULTIPLIER1, out=product1)
        # words are multiplied as 32 bits without a sign; those that are only combined may have more
        torch.bitwise_right_shift(product1, _SHIFT, out=c0).bitwise_xor_(c1).bitwise_xor_(key0).bitwise_and_(_LOW)
        torch.bitwise_right_shift(product0, _SHIFT, out=c2).bitwise_xor_(c3).bitwise_xor_(key1).bitwise_and_(_LOW)
        c1, c3, product0, product1 = product1, product0, c1, c3
    words = memory("words", (n, 4), torch.int32)
    for of_words, word in zip(words.unbind(1), (c0, c1, c2, c3), strict=True):
        of_words.copy_(word)
    return words.view(torch.int16).view(-1)[where.elements].view(torch.uint16)


def _keys(seed: Any) -> list[tuple[Any, Any]]:
    """The two keys of each round."""
    first, second = seed & _WORD, seed >> 32 & _WORD
    return [(first + i * _WEYL[0] & _WORD, second + i * _WEYL[1] & _WORD) for i in range(_ROUNDS)]


@cache
def _keys_of(seed: int) -> list[tuple[Tensor, Tensor]]:
    """The same of one number for all."""
    return [(first, second) for first, second in torch.tensor(_keys(seed), dtype=torch.int64, device="cpu")]
