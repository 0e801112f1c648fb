"""Buckets on a CPU whose members are kept in formats of their own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from optimx._engine.cpu import batch as _batch
from optimx._engine.cpu import elementwise as _native
from optimx._engine.cpu import factored as _factored
from optimx._engine.storage import (
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
from tests.reference import codecs as reference
from tests.storing import Stored, format_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PLAIN = Format(NEAREST, FP32)
#: Optimizers with what each of their states may be kept as: a number that takes both signs, or a square.
SIGNED, SQUARE = SIGNED8, UNSIGNED8
OPTIMIZERS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "adamw": ((SIGNED, SQUARE), {"lr": 1e-2, "weight_decay": 0.1}),
    "sgd": ((SIGNED,), {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
    "lion": ((SIGNED,), {"lr": 1e-3, "weight_decay": 0.1}),
    "lamb": ((SIGNED, SQUARE), {"lr": 1e-2, "weight_decay": 0.1}),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
#: Of one element and more, for batches and beyond; groups of 128 from 4096 elements on.
SHAPES = [(), (3,), (5, 7), (129,), (32, 128), (4097,), (3, 3, 1024)]
GROUPED = [(32, 128), (33, 128), (4, 2048), (128, 256)]


def values_of(shapes: list[tuple[int, ...]], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def formats_of(name: str, param: Format, states: str = "float32") -> list[Format]:
    """With states in float32, in a dtype and rounded stochastically, or in 8 bits."""
    kinds, _ = OPTIMIZERS[name]
    if states == "8bit":
        return [param, *(format_of(kind, FP32) for kind in kinds)]
    dtype = getattr(torch, states)
    return [param, *(PLAIN if dtype is FP32 else Format(STOCHASTIC, dtype) for _ in kinds)]


def trained(name: str, formats: list[Format], params: list[Tensor], steps: int, **more: Any) -> Stored:
    _, kwargs = OPTIMIZERS[name]
    stored = Stored(name, formats, params, **more, **kwargs)
    for step in range(steps):
        stored.step(values_of([param.shape for param in params], step + 1))
    return stored


@pytest.mark.parametrize("kept", [Format(REMAINDER16, BF16), Format(MASTER, BF16), Format(MASTER, FP16)], ids=str)
@each_optimizer
def test_equals_float32(name: str, kept: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand steps, as float32 takes them; in pieces, where formulas of both are cut alike."""
    monkeypatch.setattr(_native, "PIECE", 1 << 14)
    params = [param.to(kept.dtype).float() for param in values_of([*SHAPES, (40000,)], 0)]
    ours = trained(name, formats_of(name, kept), params, 1000)
    plain = trained(name, formats_of(name, PLAIN), params, 1000)
    for i, param in enumerate(params):
        for role in range(len(ours.formats)):
            assert torch.equal(ours.role(i, role), plain.role(i, role)), (param.shape, role)
        assert not torch.equal(ours.role(i, 0), param.flatten())
        # what a user sees is the number next to it
        error = (ours.params[i].float() - plain.params[i]).abs()
        assert (error <= torch.finfo(kept.dtype).eps / 2 * plain.params[i].abs() + 2.0**-25).all()


@each_optimizer
def test_remainder8(name: str) -> None:
    """Numbers of 24 bits lose at most half of their last one a step."""
    params = [param.bfloat16().float() for param in values_of(SHAPES, 0)]
    ours = trained(name, formats_of(name, Format(REMAINDER8, BF16)), params, 100)
    plain = trained(name, formats_of(name, PLAIN), params, 100)
    for i in range(len(params)):
        largest = max(params[i].abs().max(), plain.role(i, 0).abs().max())
        assert (ours.role(i, 0) - plain.role(i, 0)).abs().max() <= 100 * 2.0**-16 * largest


ROUNDED = [
    pytest.param(Format(STOCHASTIC, BF16), "float32", id="bfloat16"),
    pytest.param(Format(STOCHASTIC, FP16), "float16", id="float16-float16"),
    pytest.param(Format(STOCHASTIC, BF16), "bfloat16", id="bfloat16-bfloat16"),
    pytest.param(PLAIN, "bfloat16", id="float32-bfloat16"),
]


@pytest.mark.parametrize(("param", "states"), ROUNDED)
@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_bits_of_pieces_and_batches(name: str, param: Format, states: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where a tensor is cut nor what is updated beside it changes a bit."""
    params, n = values_of(SHAPES, 0), len(SHAPES)
    formats, seeds = formats_of(name, param, states), [1, *[2] * (n - 1)]
    whole = trained(name, formats, params, 4, seeds=seeds)

    def step_each(stored: list[Stored], order: list[list[int]]) -> None:
        for step in range(4):
            grads = values_of(SHAPES, step + 1)
            for one, members in zip(stored, order, strict=True):
                one.step([grads[i] for i in members])

    monkeypatch.setattr(_native, "PIECE", 1008)
    monkeypatch.setattr(_batch, "SMALL", 300)
    orders = [[[i] for i in range(n)], [[*reversed(range(n))]], [[0, 2, 4, 6], [5, 3, 1]]]
    for order in orders:
        stored = [
            Stored(
                name, formats, [params[i] for i in members], positions=members, seeds=[seeds[i] for i in members],
                **OPTIMIZERS[name][1],
            )
            for members in order
        ]  # fmt: skip
        step_each(stored, order)
        kept = whole.bytes()
        for one, members in zip(stored, order, strict=True):
            for i, of_member in zip(members, one.bytes(), strict=True):
                assert of_member == kept[i], (order, SHAPES[i])
    # of another seed, or beside other parameters, other bits
    assert trained(name, formats, params, 4, seeds=[3] * n).bytes()[-1] != kept[-1]
    assert trained(name, formats, params, 4, seeds=seeds, positions=[*range(1, n + 1)]).bytes()[-1] != kept[-1]


@pytest.mark.parametrize("states", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("kind", [STOCHASTIC, REMAINDER8, REMAINDER16, MASTER])
@each_optimizer
def test_bits_of_neighbours(name: str, kind: int, states: str) -> None:
    """Small states that lie beside each other are updated where they are."""
    params = values_of([(32, 128)] * 3 if states == "8bit" else [(), (3,), (5, 7), (129,)], 0)
    formats = formats_of(name, Format(kind, BF16), states)
    apart, neighbours = (trained(name, formats, params, 3, neighbours=lie) for lie in (False, True))
    assert apart.bytes() == neighbours.bytes()


@pytest.mark.parametrize("shape", [(24, 40), (17, 13), (96, 64)], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_bits_of_shards(dim: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a parameter get the bits of those elements."""
    monkeypatch.setattr(_native, "PIECE", 1 << 10)
    (param,) = values_of([shape], 0)
    formats = formats_of("adamw", Format(STOCHASTIC, BF16), "bfloat16")
    whole = trained("adamw", formats, [param], 3)
    size = -(-shape[dim] // 3)
    for rank, part in enumerate(param.split(size, dim)):
        columns = shape[1]
        if dim == 0:
            geometry = Geometry(rank * size * columns)
        else:
            geometry = Geometry(rank * size, part.shape[1], columns - part.shape[1])
        stored = Stored("adamw", formats, [part.contiguous()], geometries=[geometry], **OPTIMIZERS["adamw"][1])
        for step in range(3):
            (grad,) = values_of([shape], step + 1)
            stored.step([grad.split(size, dim)[rank].contiguous()])
        assert torch.equal(stored.params[0], whole.params[0].split(size, dim)[rank])
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(stored.states[0][name], whole.states[0][name].split(size, dim)[rank])


@pytest.mark.parametrize("piece", [1 << 19, 1 << 10])
def test_bits_are_those_of_the_reference(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a parameter and its state, by seed, step, index, role and element: what a GPU has, too."""
    monkeypatch.setattr(_native, "PIECE", piece)
    shapes, positions, seeds = [(5, 7), (12,), (4100,)], [4, 1, 7], [9, 9, 3]
    params = [param.bfloat16().float() for param in values_of(shapes, 0)]
    ours = Stored("sgd", [Format(STOCHASTIC, BF16)] * 2, params, positions=positions, seeds=seeds, lr=0.1, momentum=0.9)
    for step in (1, 2):
        grads = values_of(shapes, step)
        plain = Stored(
            "sgd", [PLAIN] * 2, [ours.role(i, 0).view(shape) for i, shape in enumerate(shapes)], lr=0.1, momentum=0.9
        )
        for i, shape in enumerate(shapes):
            plain.states[i]["momentum_buffer"].copy_(ours.role(i, 1).view(shape))
        plain.step(grads)
        ours.step(grads)
        for i, (position, seed) in enumerate(zip(positions, seeds, strict=True)):
            for role, tensor in enumerate((ours.params[i], ours.states[i]["momentum_buffer"])):
                exact = plain.role(i, role).view(torch.int32).long() & 0xFFFFFFFF
                noise = [reference.noise(seed, step, position, role, element) for element in range(len(exact))]
                expected = [*map(reference.stochastic_bfloat16, exact.tolist(), noise)]
                assert (tensor.view(torch.int16).flatten().long() & 0xFFFF).tolist() == expected


def test_steps_of_members() -> None:
    """Members of one batch may have taken different numbers of steps."""
    params = values_of([(10,), (12,)], 0)
    formats, kwargs = formats_of("adamw", Format(STOCHASTIC, BF16), "bfloat16"), OPTIMIZERS["adamw"][1]
    together = Stored("adamw", formats, params, **kwargs)
    alone = [Stored("adamw", formats, [param], positions=[i], **kwargs) for i, param in enumerate(params)]
    for stored in (together, alone[1]):
        stored.states[-1]["step"].fill_(41.0)
    for step in range(3):
        grads = values_of([(10,), (12,)], step)
        together.step(grads)
        for one, grad in zip(alone, grads, strict=True):
            one.step([grad])
    assert together.bytes() == [*alone[0].bytes(), *alone[1].bytes()]


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_groups_of_pieces_and_batches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = values_of(GROUPED, 0)
    formats = formats_of(name, Format(STOCHASTIC, BF16), "8bit")
    whole = trained(name, formats, params, 4).bytes()
    monkeypatch.setattr(_native, "PIECE", 8192)
    monkeypatch.setattr(_batch, "SMALL", 0)
    assert trained(name, formats, params, 4).bytes() == whole


@pytest.mark.parametrize("states", ["float32", "bfloat16", "8bit"])
@each_optimizer
def test_first_step_is_exact(name: str, states: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update takes what has just been computed, not what is kept of it; also where it walks twice."""
    monkeypatch.setattr(_native, "PIECE", 8192)
    params = values_of(GROUPED, 0)
    ours = trained(name, formats_of(name, PLAIN, states), params, 1)
    plain = trained(name, formats_of(name, PLAIN), params, 1)
    for ours_param, param in zip(ours.params, plain.params, strict=True):
        # what is rounded makes LAMB work its step out anew, by another operator
        torch.testing.assert_close(ours_param, param, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("states", ["float32", "8bit"])
@each_optimizer
def test_skipped_steps_leave_every_byte(name: str, states: str) -> None:
    stored = trained(name, formats_of(name, Format(STOCHASTIC, BF16), states), values_of(GROUPED, 0), 2)
    before = stored.bytes()
    stored.step(values_of(GROUPED, 9), torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))
    assert stored.bytes() == before
    stored.step(values_of(GROUPED, 9), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    assert stored.bytes() != before


def test_scaled_gradients() -> None:
    """A factor of the gradient is what it is for float32."""
    control = torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64)
    params = values_of(SHAPES, 0)
    for name, (_, kwargs) in OPTIMIZERS.items():
        formats = formats_of(name, Format(MASTER, BF16))
        params = [param.bfloat16().float() for param in params]
        scaled, halves = Stored(name, formats, params, **kwargs), Stored(name, formats, params, **kwargs)
        for step in range(3):
            grads = values_of(SHAPES, step + 1)
            scaled.step(grads, control)
            halves.step([grad * 0.5 for grad in grads])
        assert scaled.bytes() == halves.bytes()


def alike(shape: tuple[int, ...], transposed: bool) -> list[Tensor]:
    """Three tensors of one shape, whose matrices lie in memory by columns with ``transposed``."""
    tensors = values_of([shape] * 3, 0)
    return [tensor.mT.contiguous().mT for tensor in tensors] if transposed else tensors


@pytest.mark.parametrize("kept", [Format(REMAINDER16, BF16), Format(MASTER, BF16)], ids=str)
@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("piece", [1 << 19, 1 << 12])
@pytest.mark.parametrize(
    ("shape", "transposed"),
    [((40,), False), ((12, 20), False), ((12, 20), True), ((3, 40, 64), False), ((96, 200), True)],
)
def test_adafactor_equals_float32(
    shape: tuple[int, ...],
    transposed: bool,
    piece: int,
    beta1: float | None,
    kept: Format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Averages of rows and columns are float32; small tensors of one shape are updated together."""
    for module, size in ((_native, "PIECE"), (_factored, "PIECE"), (_factored, "TOGETHER")):
        monkeypatch.setattr(module, size, piece)
    params = [param.to(kept.dtype).float() for param in alike(shape, transposed)]
    states = [PLAIN] * (min(2, len(shape)) + (beta1 is not None))
    ours, plain = (
        # where eps is not given it is the parameters' dtype's
        Stored("adafactor", [of_param, *states], params, lr=1e-2, weight_decay=0.1, beta1=beta1, eps=(1e-7, 1e-3))
        for of_param in (kept, PLAIN)
    )
    for step in range(30):
        grads = [param + step for param in alike(shape, transposed)]
        ours.step(grads)
        plain.step(grads)
    for i, param in enumerate(params):
        assert not torch.equal(plain.params[i], param)
        for role in range(1 + len(states)):
            assert torch.equal(ours.role(i, role), plain.role(i, role))


def test_adafactor_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups and random bits are those of the elements, whatever the piece; alone and beside others."""
    kwargs: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9}
    formats = [Format(STOCHASTIC, BF16), PLAIN, PLAIN, format_of(SIGNED8, FP32)]
    shape = (6, 40, 64)
    together = Stored("adafactor", formats, alike(shape, False), **kwargs)
    alone = []
    for i, param in enumerate(alike(shape, False)):
        monkeypatch.setattr(_factored, "PIECE", (1 << 19, 6000, 1100)[i])
        alone.append(Stored("adafactor", formats, [param], positions=[i], **kwargs))
        for step in range(3):
            alone[i].step([alike(shape, False)[i] + step])
    monkeypatch.undo()
    for step in range(3):
        together.step([param + step for param in alike(shape, False)])
    for i in range(3):
        # sums of squares are cut as pieces are
        for role in (0, 3):
            torch.testing.assert_close(together.role(i, role), alone[i].role(0, role), rtol=2.0**-6, atol=1e-3)
        same = together.params[i] == alone[i].params[0]
        assert same.double().mean() > 0.999


def test_nan_stays_in_its_group() -> None:
    (param,) = values_of([(33, 128)], 0)
    stored = Stored("adamw", formats_of("adamw", Format(REMAINDER16, BF16), "8bit"), [param], lr=1e-2)
    for step in range(3):
        (grad,) = values_of([(33, 128)], step)
        if step == 1:
            grad[7, 5] = math.nan
        stored.step([grad])
    # a scale of NaN is its whole group's
    for role in range(3):
        nans = stored.role(0, role).view(33, 128).isnan()
        assert nans[7].all()
        assert nans.sum() == 128


def squares(formats: list[Format], sizes: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Roots of the second moment after gradients of given sizes, the last rows' a tenth from the middle on.

    Returns:
        As kept, and exact, in three parts: of equal sizes, of others, of those that become smaller.
    """
    stored = Stored("adamw", formats, [torch.zeros_like(sizes)], lr=1e-3)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    exact = torch.zeros(sizes.shape, dtype=torch.float64)
    third = len(sizes) // 3
    for step in range(steps):
        grad = torch.cat([torch.randn(third, *sizes.shape[1:], generator=each) for each in generators]) * sizes
        if step >= steps // 2:
            grad[2 * third :] *= 0.1
        exact.lerp_(grad.double().square(), 1e-3)
        stored.step([grad])
    return stored.role(0, 2).double().sqrt().view(3, -1), exact.sqrt().view(3, -1)


@pytest.mark.parametrize(
    ("states", "limits"), [("bfloat16", (0.03, 0.03, 0.06)), ("8bit", (0.05, 0.16, 0.13)), ("nearest", (math.inf,) * 3)]
)
def test_second_moments_do_not_freeze(states: str, limits: tuple[float, float, float]) -> None:
    """Averages that move by less than half a unit a step follow all the same.

    Limits are those of others' formats with as many bits, measured on the same; where sizes differ within a group, 8
    bits have few for the small ones.
    """
    if states == "nearest":
        formats = [PLAIN, PLAIN, Format(NEAREST, BF16)]
    else:
        formats = formats_of("adamw", PLAIN, states)
    sizes = torch.ones(3, 32, 128)
    sizes[1] = torch.randn(32, 128, generator=torch.Generator().manual_seed(1)).exp()
    kept, exact = squares(formats, sizes.view(96, 128), 5000)
    errors = (kept / exact - 1).square().mean(1).sqrt()
    assert (errors <= torch.tensor(limits)).all(), errors
    # what is tested is something that can go wrong
    assert (errors > 0.2).tolist() == [states == "nearest"] * 3


def test_ten_thousand_steps() -> None:
    """A remainder of 16 bits loses nothing, however long."""
    params = [param.bfloat16().float() for param in values_of([(64,)], 0)]
    ours = trained("adamw", formats_of("adamw", Format(REMAINDER16, BF16)), params, 10_000)
    plain = trained("adamw", formats_of("adamw", PLAIN), params, 10_000)
    assert torch.equal(ours.role(0, 0), plain.role(0, 0))
    assert not torch.equal(ours.params[0].float(), plain.params[0])


@pytest.mark.parametrize("states", ["bfloat16", "8bit"])
def test_steps_of_an_embedding(states: str) -> None:
    """Rows that come rarely take no longer steps than in float32: no second moment is zero beside a first one."""
    rows, generator = 256, torch.Generator().manual_seed(0)
    frequency = 1.0 / torch.arange(1.0, rows + 1)
    kinds = {"ours": formats_of("adamw", PLAIN, states), "plain": formats_of("adamw", PLAIN)}
    both = {
        key: Stored("adamw", formats, [torch.zeros(rows, 128)], lr=1.0, weight_decay=0.0)
        for key, formats in kinds.items()
    }
    longest = dict.fromkeys(both, 0.0)
    for _ in range(600):
        seen = torch.multinomial(frequency, 8, replacement=True, generator=generator)
        grad = torch.zeros(rows, 128)
        grad[seen] = torch.randn(len(seen), 128, generator=generator)
        for key, stored in both.items():
            stored.params[0].zero_()
            stored.step([grad])
            longest[key] = max(longest[key], float(stored.params[0].abs().max()))
    assert longest["ours"] == pytest.approx(longest["plain"], rel=0.05)
