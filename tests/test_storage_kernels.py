"""Storage formats in kernels: interpreted on CPU tensors, or on a GPU. What a CPU does is held to be right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from optimx._engine import backends, storage
from optimx._engine.cpu.codecs import decode, encode
from optimx._engine.storage import (
    GROUP,
    MASTER,
    NEAREST,
    REMAINDER8,
    REMAINDER16,
    SIGNED8,
    STOCHASTIC,
    UNSIGNED8,
    Format,
    Geometry,
)
from tests.conftest import INTERPRETED
from tests.reference import codecs as reference
from tests.storing import Stored, format_of

pytestmark = pytest.mark.interpreted
codecs = pytest.importorskip("optimx.triton_kernels.codecs")
elementwise = pytest.importorskip("optimx._engine.triton.elementwise")
LaunchSize = pytest.importorskip("optimx.triton_kernels.tensor_table").LaunchSize

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PLAIN = Format(NEAREST, FP32)
#: One chunk and several, of one block and several.
SIZES = [LaunchSize(1024, 256), LaunchSize(4096, 1024)]
#: Edges of what a remainder has.
EDGES = [0, 1, 2, 0x7E, 0x7F, 0x80, 0x81, 0xFF, 0x100, 0x7F80, 0x7FFF, 0x8000, 0x8001, 0xFF7F, 0xFFFF]


def memory(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def on_triton(name: str, formats: list[Format], params: list[Tensor], **kwargs: Any) -> Stored:
    return Stored(name, formats, params, backend=backends.TRITON, **kwargs)


def values_of(shapes: list[tuple[int, ...]], seed: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


@pytest.fixture(params=SIZES, ids=lambda size: f"{size.chunk_size}-{size.block_size}")
def size(request: pytest.FixtureRequest, small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> LaunchSize:
    monkeypatch.setattr(elementwise, "launch_size", request.param)
    return request.param


@pytest.fixture
def large_tiles(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "launch_size", LaunchSize())


def test_kinds_are_the_engines() -> None:
    names = ("NEAREST", "STOCHASTIC", "REMAINDER8", "REMAINDER16", "MASTER", "SIGNED8", "UNSIGNED8", "GROUP")
    for name in names:
        assert getattr(codecs, name).value == getattr(storage, name)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    "geometry", [Geometry(), Geometry(13), Geometry((1 << 35) + 24), Geometry(16, 8, 8), Geometry(5, 7, 3)], ids=str
)
def test_bits_are_those_of_the_reference(
    triton_backend: torch.device, size: LaunchSize, dtype: torch.dtype, geometry: Geometry
) -> None:
    """Of whole chunks and of tails, of parts that are whole runs of the whole parameter, and of others."""
    shapes = [(1300,), (4096,)]
    params = [param.to(dtype).float() for param in values_of(shapes, 0, triton_backend)]
    # some where float16 begins to have fewer bits
    params[0][:300] *= 2.0**-16
    seed = 0x1234_5678_9ABC_DEF0 >> 1
    ours = on_triton(
        "sgd", [Format(STOCHASTIC, dtype)], params, lr=1.0, positions=[3, 1], seeds=[seed, 7], geometries=[geometry] * 2
    )
    before = [[p.float().cpu() for p in ours.params]]
    for step in (1, 2):
        grads = [grad * 1e-3 for grad in values_of(shapes, step, triton_backend)]
        ours.step(grads)
        for i, (position, of_seed) in enumerate([(3, seed), (1, 7)]):
            exact = before[-1][i] - grads[i].cpu()
            expected = []
            for e, value in enumerate(exact.tolist()):
                place = geometry.first + e + e // geometry.row * geometry.gap
                random = reference.noise(of_seed, step, position, 0, place)
                if dtype is BF16:
                    bits = reference.stochastic_bfloat16(reference.bits_of(value), random)
                    expected.append(reference.value_of(bits << 16))
                else:
                    expected.append(reference.stochastic_float16(value, random))
            assert ours.params[i].float().tolist() == expected
        before.append([p.float().cpu() for p in ours.params])


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("param", [Format(STOCHASTIC, BF16), Format(REMAINDER8, BF16), PLAIN], ids=str)
@pytest.mark.parametrize("states", ["stochastic", "8bit"])
def test_tiles_change_no_byte(
    triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch, param: Format, states: str, shift: int
) -> None:
    """Nor does where a tensor lies, by which it is walked in other steps."""
    kinds = (
        [Format(STOCHASTIC, BF16)] * 2
        if states == "stochastic"
        else [format_of(SIGNED8, FP32), format_of(UNSIGNED8, FP32)]
    )
    shapes = [(33, 128), (4, 2048)]
    results = []
    for launch_size in (*SIZES, LaunchSize(512, 512)) if not INTERPRETED else SIZES:
        monkeypatch.setattr(elementwise, "launch_size", launch_size)
        ours = on_triton("adamw", [param, *kinds], values_of(shapes, 0, triton_backend), lr=1e-2)
        if shift:
            # of what is beside the first result's
            ours.params = [
                torch.empty(p.numel() + 1, dtype=p.dtype, device=p.device)[1:].view(p.shape).copy_(p)
                for p in ours.params
            ]
        for step in (1, 2):
            ours.step(values_of(shapes, step, triton_backend))
        results.append(ours.bytes())
    assert all(result == results[0] for result in results[1:])


@pytest.mark.parametrize("kind", [REMAINDER8, REMAINDER16])
def test_every_remainder(triton_backend: torch.device, large_tiles: None, kind: int) -> None:
    """Every visible half beside edges of what it lacks is read, and written, as on a CPU; a step of length 0."""
    kept = Format(kind, BF16)
    visible = torch.arange(1 << 16).repeat_interleave(len(EDGES)).to(torch.int16).view(BF16)
    lacking = torch.tensor(EDGES).to(kept.companion).repeat(1 << 16)
    ours = on_triton("sgd", [kept], [visible.float().to(triton_backend)], lr=0.0)
    ours.params[0].copy_(visible)
    ours.states[0]["param_remainder"].copy_(lacking)
    ours.step([torch.ones(len(visible), device=triton_backend)])
    values = decode(kept, visible, lacking, torch.empty(len(visible)), memory)
    expected = torch.empty_like(visible), torch.empty_like(lacking)
    encode(kept, values - 0.0, *expected, None, memory)
    assert torch.equal(ours.params[0].cpu().view(torch.int16), expected[0].view(torch.int16))
    assert torch.equal(ours.states[0]["param_remainder"].cpu(), expected[1])


@pytest.mark.parametrize(
    ("kind", "name", "state", "kwargs"),
    [
        (SIGNED8, "sgd", "momentum_buffer", {"momentum": 1.0, "dampening": 1.0, "lr": 0.0}),
        (UNSIGNED8, "rmsprop", "square_avg", {"alpha": 1.0, "lr": 0.0}),
    ],
)
def test_every_code(
    triton_backend: torch.device, size: LaunchSize, kind: int, name: str, state: str, kwargs: dict[str, Any]
) -> None:
    """What is read is written again, at scales from the smallest to the largest; and zero is zero."""
    kept = format_of(kind, FP32)
    codes = torch.arange(-127, 128) if kind == SIGNED8 else torch.arange(256)
    # a group that has its largest, which the scale is
    half = GROUP - 1
    groups = [torch.cat([part, codes[-1:].repeat(GROUP - len(part))]) for part in codes.split(half)]
    groups.append(torch.zeros(GROUP, dtype=torch.int64))
    exponents = torch.arange(-60, 60, 20) if kind == UNSIGNED8 else torch.arange(-100, 120, 20)
    own = torch.stack(groups).repeat(len(exponents), 1).to(kept.dtype)
    scales = 1.37 * 2.0 ** exponents.repeat_interleave(len(groups)).float()
    scales[len(groups) - 1 :: len(groups)] = 0.0
    param = torch.zeros(own.shape, device=triton_backend)
    ours = on_triton(name, [PLAIN, kept], [param], **kwargs)
    ours.step([param])
    ours.states[0][f"{state}_codes"].copy_(own)
    ours.states[0][f"{state}_scales"].copy_(scales)
    ours.step([param])
    assert torch.equal(ours.states[0][f"{state}_codes"].cpu(), own)
    torch.testing.assert_close(ours.states[0][f"{state}_scales"].cpu(), scales, rtol=2.0**-22, atol=0.0)


def test_codes_are_those_of_a_cpu(triton_backend: torch.device, size: LaunchSize) -> None:
    """But for numbers in the middle between two, because divisions are approximate; and no square becomes zero."""
    shapes = [(64, GROUP)]
    formats = [PLAIN, format_of(SIGNED8, FP32), format_of(UNSIGNED8, FP32)]
    (grad,) = values_of(shapes, 1, triton_backend)
    # squares of many sizes
    grad *= 10.0 ** -(6.0 * torch.rand(shapes[0], generator=torch.Generator().manual_seed(2)).to(grad.device))
    ours = on_triton("adamw", formats, values_of(shapes, 0, triton_backend))
    theirs = Stored("adamw", formats, values_of(shapes, 0, torch.device("cpu")))
    for _ in range(3):
        ours.step([grad])
        theirs.step([grad.cpu()])
    for name in ("exp_avg_codes", "exp_avg_sq_codes"):
        apart = (ours.states[0][name].cpu().int() - theirs.states[0][name].int()).abs()
        assert apart.max() <= 1
        assert (apart != 0).double().mean() < 0.01
    assert ours.states[0]["exp_avg_sq_codes"].min() == 1
    torch.testing.assert_close(
        ours.role(0, 2), theirs.role(0, 2), rtol=0.02, atol=1e-12 + float(theirs.role(0, 2).max()) / 255**2
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_group(triton_backend: torch.device, size: LaunchSize, bad: float) -> None:
    formats = [Format(STOCHASTIC, BF16), format_of(SIGNED8, FP32), format_of(UNSIGNED8, FP32)]
    (param,) = values_of([(33, GROUP)], 0, triton_backend)
    ours = on_triton("adamw", formats, [param], lr=1e-2)
    for step in range(3):
        (grad,) = values_of([(33, GROUP)], step, triton_backend)
        if step == 1:
            grad[7, 5] = bad
        ours.step([grad])
    for role in range(3):
        is_nan = ours.role(0, role).view(33, GROUP).isnan()
        assert is_nan[7].all()
        assert is_nan.sum() == GROUP


@pytest.mark.parametrize("kind", [STOCHASTIC, REMAINDER8, REMAINDER16, MASTER])
def test_nan_is_nan(triton_backend: torch.device, size: LaunchSize, kind: int) -> None:
    """Whatever its bits, to the last of which a carry would reach; zeros keep their sign, and infinities stay."""
    special = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 3.4e38, 1e-45]).repeat(80)
    bits = torch.full((640,), -1, dtype=torch.int32).view(FP32)
    bits[::2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(FP32)
    ours = on_triton("sgd", [Format(kind, BF16)], [torch.zeros(640, device=triton_backend)] * 2, lr=1.0)
    ours.step([(-special).to(triton_backend), (-bits).to(triton_backend)])
    found = ours.params[0].cpu()
    assert torch.equal(found.isnan(), special.isnan())
    # the largest numbers may be rounded to an infinity
    assert torch.equal(found.isinf() & (special != 3.4e38), special.isinf())
    assert ((found < 0) == (special < 0)).all()
    assert ours.params[1].isnan().all()


@pytest.mark.parametrize("dim", [0, 1])
def test_bits_of_shards(triton_backend: torch.device, size: LaunchSize, dim: int) -> None:
    """Parts have the bits of the whole, along rows and along columns."""
    (param,) = values_of([(24, 200)], 0, triton_backend)
    (grad,) = values_of([(24, 200)], 1, triton_backend)
    whole = on_triton("sgd", [Format(STOCHASTIC, BF16)], [param], lr=1e-3)
    whole.step([grad])
    for first, length in ((0, 8), (8, 8), (16, 8)) if dim == 0 else ((0, 72), (72, 72), (144, 56)):
        geometry = Geometry(first * 200) if dim == 0 else Geometry(first, length, 200 - length)
        part, of_grad = (tensor.narrow(dim, first, length).contiguous() for tensor in (param, grad))
        ours = on_triton("sgd", [Format(STOCHASTIC, BF16)], [part], lr=1e-3, geometries=[geometry])
        ours.step([of_grad])
        assert torch.equal(ours.params[0], whole.params[0].narrow(dim, first, length))


def test_unbiased(triton_backend: torch.device, large_tiles: None) -> None:
    """Over elements and steps a number is rounded up as often as it is near."""
    value, n = 1.0 + 0.3 * 2.0**-7, 1 << (14 if INTERPRETED else 20)
    ours = on_triton("sgd", [Format(STOCHASTIC, BF16)], [torch.ones(n, device=triton_backend)], lr=1.0)
    counts = []
    for _ in range(4):
        ours.params[0].fill_(1.0)
        ours.step([torch.full((n,), 1.0 - value, device=triton_backend)])
        counts.append((ours.params[0] > 1.0).double().mean().item())
    assert len({*counts}) > 1
    assert abs(sum(counts) / 4 - 0.3) < 3 * math.sqrt(0.21 / (4 * n))
