"""Storage formats on a CPU: every code, every visible half beside edges of the remainder, and the bits of noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from optimx._engine.cpu import noise
from optimx._engine.cpu.codecs import decode, elements_each, encode
from optimx._engine.storage import (
    GROUP,
    MASTER,
    REMAINDER8,
    REMAINDER16,
    SIGNED8,
    STOCHASTIC,
    UNSIGNED8,
    Format,
    Geometry,
)
from tests.reference import codecs as reference

#: Edges of 16 bits, and of the part that rounding looks at.
EDGES = [0, 1, 2, 0x7E, 0x7F, 0x80, 0x81, 0xFF, 0x100, 0x7F7F, 0x7F80, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFF7F, 0xFFFF]
SIGNED = Format(SIGNED8, torch.int8)
UNSIGNED = Format(UNSIGNED8, torch.uint8)
NAN = float("nan")


def memory(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Scratch memory, in which there is nothing of use."""
    poison = NAN if dtype.is_floating_point else -1
    return torch.full(shape, poison, dtype=dtype)


def kept(kind: Format, values: Tensor, bits: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """What is kept of values, whose memory stays what it is."""
    own = memory("", (len(values),), kind.dtype)
    companion = None
    if kind.companion is not None:
        companion = memory("", (len(values) // elements_each(kind),), kind.companion)
    before = values.clone()
    encode(kind, values, own, companion, bits, memory)
    assert torch.equal(values.view(torch.int32), before.view(torch.int32))
    return own, companion


def read(kind: Format, own: Tensor, companion: Tensor | None) -> Tensor:
    return decode(kind, own, companion, memory("", (len(own),), torch.float32), memory)


def as_bits(values: Tensor) -> list[int]:
    """Bits of numbers, without a sign."""
    dtype = {2: torch.int16, 4: torch.int32}[values.itemsize]
    return (values.view(dtype).long() & (1 << 8 * values.itemsize) - 1).tolist()


def all_bits() -> Tensor:
    """Every upper half of a float32 beside edges of the lower one."""
    bits = (torch.arange(1 << 16).unsqueeze(1) << 16) + torch.tensor(EDGES)
    return bits.view(-1).to(torch.int32).view(torch.float32)


def numbers(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


#: Of Random123: counter, key, and the words that 7 rounds make of them.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
]


@pytest.mark.parametrize("known", KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_known_answers(known: tuple[str, ...]) -> None:
    counter, key, answer = ([int(word, 16) for word in words.split()] for words in known)
    assert [*reference.philox(counter, key)] == answer
    block = torch.tensor(counter[:2]).to(torch.int32).view(torch.int64)
    seed = (key[1] << 32) + key[0]
    drawn = noise.draw(noise.Places(block, None, slice(0, 8)), seed, counter[2], counter[3], memory)
    assert [word & 0xFFFFFFFF for word in drawn.view(torch.int32).tolist()] == answer


@pytest.mark.parametrize(
    "geometry",
    [Geometry(), Geometry(13), Geometry(2**35 - 8), Geometry(16, 24, 40), Geometry(5, 7, 6), Geometry(3, 1, 2)],
    ids=str,
)
def test_noise(geometry: Geometry) -> None:
    """Bits are those of the element in the whole parameter, whatever the piece, and its neighbours in a batch."""
    first, row, gap = geometry
    n, seed, step = 100, 0xFEDCBA9876543210, 77
    expected = [reference.noise(seed, step, 3, 2, first + i + i // row * gap) for i in range(n)]
    for size in (n, 64, 33, 7):
        for begin in range(0, n, size):
            part = noise.Part(geometry, begin, min(size, n - begin))
            for where in (noise.places([part]), noise.places([part], memory)):
                drawn = noise.draw(where, seed, step, 3 * 16 + 2, memory)
                assert drawn.tolist() == expected[begin : begin + size]
    seeds, steps, streams = [seed - (1 << 64), 5], [step, 2], [3 * 16 + 2, 16]
    parts = [noise.Part(geometry, 0, n), noise.Part(Geometry(), 0, 9)]
    for order in ([0, 1], [1, 0]):
        where = noise.places([parts[i] for i in order])
        of_counters = [torch.tensor([of[i] for i in order])[where.parts] for of in (seeds, steps, streams)]
        drawn = noise.draw(where, *of_counters, memory).tolist()
        other = [reference.noise(5, 2, 1, 0, i) for i in range(9)]
        assert drawn == (expected + other if order[0] == 0 else other + expected)


def test_noise_is_uniform() -> None:
    n = 1 << 16
    drawn = noise.draw(noise.places([noise.Part(Geometry(), 0, n)]), 1, 1, 0, memory).double()
    # of the mean, and of each bit's
    assert abs(drawn.mean() - 32767.5) < 3 * 65536 / math.sqrt(12 * n)
    for bit in range(16):
        assert abs((drawn.long() >> bit & 1).double().mean() - 0.5) < 4 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("kind", [REMAINDER16, REMAINDER8])
def test_remainders_of_all_numbers(kind: int) -> None:
    of = Format(kind, torch.bfloat16)
    values = all_bits()
    own, companion = kept(of, values)
    split, width = (reference.split16, 16) if kind == REMAINDER16 else (reference.split8, 8)
    expected = [split(bits) for bits in as_bits(values)]
    assert [*zip(as_bits(own), companion.tolist(), strict=True)] == expected
    back = read(of, own, companion)
    assert as_bits(back) == [reference.join(*pair, width) for pair in expected]
    nans = values.isnan()
    assert torch.equal(own.isnan(), nans)
    assert torch.equal(back.isnan(), nans)
    if kind == REMAINDER16:
        assert torch.equal(back[~nans].view(torch.int32), values[~nans].view(torch.int32))
    else:
        # a float of 24 bits; what is larger than the largest of these is infinite
        normal = values.isfinite() & (values.abs() >= 2.0**-126) & back.isfinite()
        assert ((back - values)[normal].abs() <= 2.0**-16 * values[normal].abs()).all()


@pytest.mark.parametrize("kind", [REMAINDER16, REMAINDER8])
def test_zeros_written_beside_a_remainder(kind: int) -> None:
    """A zero that a pruning has written stays zero, and what is alike elsewhere is read as ever."""
    of = Format(kind, torch.bfloat16)
    width = 16 if kind == REMAINDER16 else 8
    visible = torch.arange(1 << 16).repeat_interleave(len(EDGES)).to(torch.int16)
    lost = torch.tensor(EDGES).repeat(1 << 16).to(of.companion)
    back = read(of, visible.view(torch.bfloat16), lost)
    pairs = zip(as_bits(visible), lost.tolist(), strict=True)
    assert as_bits(back) == [reference.join(*pair, width) for pair in pairs]


@pytest.mark.parametrize("random", [0, 1, 0x7FFF, 0x8000, 0xFFFF])
def test_stochastic_bfloat16_of_all_numbers(random: int) -> None:
    values = all_bits()
    bits = torch.full((len(values),), random, dtype=torch.int32).to(torch.uint16)
    own, _ = kept(Format(STOCHASTIC, torch.bfloat16), values, bits)
    expected = [reference.stochastic_bfloat16(bits, random) for bits in as_bits(values)]
    assert as_bits(own) == expected


@pytest.mark.parametrize("random", [0, 1, 0x1FFF, 0x2000, 0xFFFF])
def test_stochastic_float16_of_all_numbers(random: int) -> None:
    values = all_bits()[::3]
    values = values[values.isfinite()]
    bits = torch.full((len(values),), random, dtype=torch.int32).to(torch.uint16)
    own, _ = kept(Format(STOCHASTIC, torch.float16), values, bits)
    expected = torch.tensor([reference.stochastic_float16(value, random) for value in values.tolist()]).half()
    assert torch.equal(own.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding(dtype: torch.dtype) -> None:
    """What a 16-bit number can be stays, NaN and infinities do; the mean of the others is the number itself."""
    of = Format(STOCHASTIC, dtype)
    own = torch.arange(1 << 16).to(torch.int16).view(dtype)
    bits = noise.draw(noise.places([noise.Part(Geometry(), 0, len(own))]), 1, 1, 0, memory)
    again, _ = kept(of, own.float(), bits.clone())
    nans = own.isnan()
    assert torch.equal(again[~nans].view(torch.int16), own[~nans].view(torch.int16))
    assert again[nans].isnan().all()
    n = 1 << 14
    ulp = torch.finfo(dtype).eps
    for value in (0.3, -0.3, 1.00001, 1e-3, 3.3e-7 if dtype is torch.float16 else 2e-38):
        for seed in range(3):
            bits = noise.draw(noise.places([noise.Part(Geometry(), 0, n)]), seed, 1, 0, memory)
            rounded, _ = kept(of, torch.full((n,), value), bits)
            low, high = rounded.double().aminmax()
            exact = torch.tensor(value).double()
            assert low <= exact <= high
            assert high - low <= max(ulp * abs(value), 2.0**-24 if dtype is torch.float16 else 0.0)
            # of one that takes but two values
            deviation = math.sqrt(float((exact - low) * (high - exact)) / n)
            assert abs(rounded.double().mean() - exact) <= 3 * deviation


def test_master() -> None:
    of = Format(MASTER, torch.float16)
    values = numbers(1000)
    own, companion = kept(of, values)
    assert torch.equal(companion, values)
    assert torch.equal(own, values.half())
    # the parameter is written only
    assert torch.equal(read(of, torch.full_like(own, NAN), companion), values)


CODES: list[tuple[Format, Tensor, Callable[[int, float], float]]] = [
    (SIGNED, torch.arange(-127, 128, dtype=torch.int8), reference.signed_value),
    (UNSIGNED, torch.arange(256, dtype=torch.int32).to(torch.uint8), reference.unsigned_value),
]


@pytest.mark.parametrize(("of", "codes", "value"), CODES, ids=["signed", "unsigned"])
def test_codes(of: Format, codes: Tensor, value: Callable[[int, float], float]) -> None:
    """Every code, at many scales, stands for what it should, and what is read is kept as the same codes and scale."""
    # the scale of a group belongs to the largest code
    groups = torch.full((3, GROUP), int(codes.max()), dtype=codes.dtype)
    for group, some in zip(groups, codes.chunk(3), strict=True):
        group[: len(some)] = some
    # squares of the smallest and the largest scales have to be numbers
    exponents = torch.arange(-120.0, 121.0) if of is SIGNED else torch.arange(-54.0, 61.0)
    fractions = torch.rand(len(exponents), generator=torch.Generator().manual_seed(0))
    scales = torch.exp2(exponents) * (1 + fractions)
    for scale in scales.tolist():
        own, companion = groups.view(-1), torch.full((3,), scale)
        values = read(of, own, companion)
        expected = torch.tensor([value(code, scale) for code in own.tolist()], dtype=torch.float64)
        torch.testing.assert_close(values.double(), expected, rtol=4e-7, atol=0.0)
        again, scales_again = kept(of, values)
        assert torch.equal(again, own)
        assert torch.equal(scales_again, companion)


@pytest.mark.parametrize("of", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_groups(of: Format) -> None:
    """Groups of zeros, of NaN, of an infinity, and of tiny numbers beside others."""
    values = numbers(6 * GROUP).abs_()
    rows = values.view(6, GROUP)
    rows[1] = 0.0
    rows[2, 5] = NAN
    rows[3, 7] = math.inf
    rows[4] *= 1e-30
    rows[5, 0], rows[5, 1] = 1e4, 1e-38
    own, companion = kept(of, values)
    codes, back = own.view(6, GROUP), read(of, own, companion).view(6, GROUP)
    assert companion[1] == 0
    assert not codes[1].any()
    assert not back[1].any()
    assert companion[[2, 3]].isnan().all()
    assert back[2:4].isnan().all()
    assert not codes[2:4].any()
    whole = rows[[0, 4]]
    # half a step of the widest cells: 2/127 with a sign; of the root, and twice that of its square, 1/255
    widest = whole.amax(1, keepdim=True) * (1 / 127 if of is SIGNED else 1 / 255)
    assert ((back[[0, 4]] - whole).abs() <= 1.001 * widest).all()
    # what is not zero does not become zero where steps are divided by it
    assert (codes[5, 1] == 1) if of is UNSIGNED else (codes[5, 1] == 0)
    assert torch.equal(read(of, *kept(of, torch.zeros(GROUP))), torch.zeros(GROUP))


def test_signs_of_codes() -> None:
    values = numbers(4 * GROUP)
    minus, plus = (kept(SIGNED, sign * values) for sign in (-1.0, 1.0))
    assert torch.equal(minus[1], plus[1])
    # halves are rounded up, which no number here is
    assert torch.equal(minus[0], -plus[0])
    back = read(SIGNED, *plus)
    assert ((back - values).abs() <= 0.0081 * values.view(-1, GROUP).abs().amax(1).repeat_interleave(GROUP)).all()
