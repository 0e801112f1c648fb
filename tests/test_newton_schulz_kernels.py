"""Triton's products of Newton-Schulz iterations, one by one and in iterations; interpreted, or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import optimx
from optimx._engine.newton_schulz import NAMED, TORCH, Products, first_dtype, orthogonalize_
from optimx.muon import MuonLoop
from tests.cases import make_params, set_grads

pytestmark = pytest.mark.interpreted
pytest.importorskip("triton")

from optimx.triton_kernels import newton_schulz  # noqa: E402
from optimx.triton_kernels.newton_schulz import Blocks, blocks_for, multiply_  # noqa: E402

from optimx._engine.triton import products as triton_products  # noqa: E402

#: A program takes the interpreter milliseconds: small tiles, of which no side is that of another's.
SMALL = Blocks(size=32, inner=16, num_warps=4, num_stages=2)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Of a result to one in float64 whose operands are rounded alike: half a unit in the last place, and float32's sums.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch, triton_backend: torch.device) -> None:
    monkeypatch.setattr(newton_schulz, "blocks_for", lambda n_rows, dtype: SMALL)


@pytest.fixture(params=[True, False], ids=["kernels", "torch"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Products:
    """Products of the Triton backend are these, whatever the shape."""
    monkeypatch.setattr(triton_products, "use_kernels", request.param)
    return triton_products.KERNELS if request.param else TORCH


def random(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0, tall: bool = False) -> Tensor:
    """Matrices, as those in iterations, of singular values below 1; ``tall`` ones lie in memory as their transposes."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / sum(shape[-2:]) ** 0.5 / 2
    values = values.mT.contiguous() if tall else values
    values = values.to(device, dtype)
    return values.mT if tall else values


def poisoned(device: torch.device, dtype: torch.dtype, *shape: int, tall: bool = False) -> Tensor:
    *others, rows, columns = shape
    memory = torch.full((*others, columns, rows) if tall else shape, torch.nan, dtype=dtype, device=device)
    return memory.mT if tall else memory


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Element by element, but for the sums' size: what is small may be a difference of large ones."""
    worst = (found.double() - expected).abs().amax() / expected.abs().amax()
    assert float(worst) <= CLOSE[found.dtype]


@pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [(16, 16), (32, 64), (48, 80), (80, 112)])
def test_products(device: torch.device, dtype: torch.dtype, m: int, n: int, tall: bool) -> None:
    """The three of an iteration, and the one without an addend, on tiles that are whole and cut."""
    x = random(device, dtype, 2, m, n, tall=tall)
    gram = poisoned(device, dtype, 2, m, m)
    multiply_(x, x.mT, gram, symmetric=True)
    assert torch.equal(gram, gram.mT)
    assert_close(gram, x.double() @ x.double().mT)
    polynomial = poisoned(device, dtype, 2, m, m)
    multiply_(gram, gram, polynomial, gram, -4.775, 2.0315, symmetric=True)
    assert torch.equal(polynomial, polynomial.mT)
    r = gram.double()
    assert_close(polynomial, -4.775 * r + 2.0315 * r @ r)
    p = polynomial.double()
    for addend in (x, None):
        result = poisoned(device, dtype, 2, m, n, tall=tall)
        assert multiply_(polynomial, x, result, addend, 3.4445) is result
        assert_close(result, p @ x.double() + (0 if addend is None else 3.4445 * x.double()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lower_half_is_mirrored(device: torch.device, dtype: torch.dtype) -> None:
    """Within tiles of the diagonal too, in whatever order sums meet there: here both halves differ."""
    left, right = random(device, dtype, 2, 80, 48), random(device, dtype, 2, 48, 80, seed=1)
    whole, mirrored = poisoned(device, dtype, 2, 80, 80), poisoned(device, dtype, 2, 80, 80)
    multiply_(left, right, whole)
    multiply_(left, right, mirrored, symmetric=True)
    assert torch.equal(mirrored.tril(), whole.tril())
    assert torch.equal(mirrored, mirrored.mT)


def test_rounds_once(device: torch.device) -> None:
    """A sum that bfloat16 holds, of products that it does not."""
    x = torch.full((1, 16, 16), 1 + 2**-7, dtype=torch.bfloat16, device=device)
    out = poisoned(device, torch.bfloat16, 1, 16, 16)
    multiply_(x, x, out, x, beta=-16 * (1 + 2**-7))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_changes_no_bit(device: torch.device, dtype: torch.dtype) -> None:
    x = random(device, dtype, 4, 48, 64)
    alone = []
    for matrix in x:
        gram, result = poisoned(device, dtype, 1, 48, 48), poisoned(device, dtype, 1, 48, 64)
        multiply_(matrix[None], matrix[None].mT, gram, symmetric=True)
        alone.append((gram, multiply_(gram, matrix[None], result, matrix[None], 2.0)))
    for order in ((0, 1, 2, 3), (3, 0), (2, 1, 0)):
        picked = x[[*order]]
        grams, results = (poisoned(device, dtype, len(order), 48, columns) for columns in (48, 64))
        multiply_(picked, picked.mT, grams, symmetric=True)
        multiply_(grams, picked, results, picked, 2.0)
        for i, gram, result in zip(order, grams, results, strict=True):
            assert torch.equal(gram, alone[i][0][0])
            assert torch.equal(result, alone[i][1][0])


def test_nan_stays_in_its_matrix(device: torch.device) -> None:
    x = random(device, torch.float32, 3, 32, 32)
    x[1, 5, 5] = torch.nan
    out = multiply_(x, x.mT, poisoned(device, torch.float32, 3, 32, 32), symmetric=True)
    assert out.isnan().flatten(1).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        (((2, 16, 32), (2, 16, 16), (2, 16, 16)), "shapes should fit but are: "),
        (((2, 16, 32), (1, 32, 16), (2, 16, 16)), "shapes should fit but are: "),
        (((2, 16, 8), (2, 8, 16), (2, 16, 16)), "should be multiples of 16 but are: 16, 8, 16"),
        (((2, 16, 16), (2, 16, 32), (2, 16, 32)), "a symmetric result should be square but is: 16 x 32"),
    ],
)
def test_errors(device: torch.device, shapes: Sequence[tuple[int, ...]], told: str) -> None:
    left, right, out = (torch.zeros(shape, device=device) for shape in shapes)
    with pytest.raises(ValueError, match=told):
        multiply_(left, right, out, symmetric=True)


def test_errors_of_memory(device: torch.device) -> None:
    x, cut = torch.zeros(1, 16, 16, device=device), torch.zeros(1, 16, 32, device=device)[:, :, ::2]
    with pytest.raises(ValueError, match="should be contiguous or transposed but have strides"):
        multiply_(cut, x, torch.zeros_like(x))
    with pytest.raises(ValueError, match="addend should have the shape of out"):
        multiply_(x, x, torch.zeros_like(x), x.mT)
    with pytest.raises(ValueError, match=r"dtypes should be one but are: .*float16"):
        multiply_(x, x, x.half())


class Scratch:
    """Memory that stays between calls, NaN at first."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kept: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        numel = torch.Size(shape).numel()
        if name not in self.kept or len(self.kept[name]) < numel:
            self.kept[name] = torch.full((numel,), torch.nan, dtype=dtype, device=self.device)
        return self.kept[name][:numel].view(shape)


#: Square, wide and tall ones, whose sides are multiples of 16, or not.
MATRICES = [(16, 16), (17, 17), (16, 48), (48, 16), (7, 60), (60, 7), (1, 20), (20, 1), (1, 1)]


@pytest.mark.parametrize("gram", [False, True], ids=["plain", "gram"])
@pytest.mark.parametrize(("rows", "columns"), MATRICES)
def test_iterations(device: torch.device, rows: int, columns: int, gram: bool) -> None:
    """As torch's products do it, in memory that a matrix of NaN has been in."""
    iterations = NAMED["standard"]._replace(gram=gram)
    x = random(device, torch.float32, 2, rows, columns)
    exact = orthogonalize_(x.double().cpu(), NAMED["standard"], torch.float64, 1e-7, Scratch(torch.device("cpu")))
    for dtype, error in ((torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)):
        if gram and dtype is torch.bfloat16:
            continue
        scratch = Scratch(device)
        for poison in (True, False):
            given = x.to(first_dtype(dtype), copy=True)
            if poison:
                given[:1] = torch.nan
            found = orthogonalize_(given, iterations, dtype, 1e-7, scratch, triton_products.KERNELS)
        assert found.shape == x.shape
        assert found.dtype is dtype
        assert float((found.double().cpu() - exact).norm() / exact.norm()) <= error, dtype


@pytest.mark.parametrize(("rows", "columns"), [(48, 16), (16, 48)])
def test_whole_matrices_are_not_copied(device: torch.device, rows: int, columns: int) -> None:
    found = orthogonalize_(
        random(device, torch.bfloat16, 2, rows, columns), NAMED["standard"], torch.bfloat16, 1e-7, Scratch(device),
        triton_products.KERNELS,
    )  # fmt: skip
    assert found.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_optimizer(
    device: torch.device, dtype: torch.dtype, products: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Muon with products of either kind as the plain loop, on whole and padded matrices, several of a shape and one."""
    launched: list[bool] = []
    launch = newton_schulz.launch

    def noted(*args: Any, warmup: bool) -> None:
        launched.append(warmup)
        launch(*args, warmup=warmup)

    monkeypatch.setattr(newton_schulz, "launch", noted)
    shapes = [(16, 16)] * 2 + [(7, 20), (20, 7), (16, 32)]
    mine, expected = make_params(shapes, device), make_params(shapes, device)
    ours, loop = optimx.Muon(mine, lr=0.1, ns_dtype=dtype), MuonLoop(expected, lr=0.1)
    loop.param_groups[0]["ns_dtype"] = dtype
    for step in range(2):
        for params, optimizer in ((mine, ours), (expected, loop)):
            set_grads(params, step)
            optimizer.step()
    # as far as rounding leads singular values of two steps of 0.1
    close = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for param, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(param, other, rtol=0, atol=close)
    # compiled before anything is changed
    assert launched.count(True) * 2 == launched.count(False) == (products is not TORCH) * 2 * 4 * 15


@pytest.mark.parametrize(
    ("about", "n", "shape", "dtype", "fills"),
    [
        # 21 lower tiles of 128 x 128 each, for 132 multiprocessors
        ((9, 132), 7, (768, 768), torch.bfloat16, True),
        ((9, 132), 6, (768, 768), torch.bfloat16, False),
        ((9, 132), 7, (768, 3072), torch.bfloat16, True),
        ((9, 132), 7, (3072, 768), torch.float32, True),
        ((9, 132), 1, (4096, 4096), torch.bfloat16, True),
        # 36 of 64 x 64
        ((9, 132), 4, (512, 512), torch.bfloat16, True),
        ((9, 132), 3, (512, 512), torch.bfloat16, False),
        ((9, 132), 1000, (256, 4096), torch.bfloat16, False),
        ((7, 80), 100, (4096, 4096), torch.bfloat16, False),
        ((9, 132), 1, (50_000, 30_000), torch.bfloat16, False),
    ],
)
def test_which_matrices_fill_a_device(
    monkeypatch: pytest.MonkeyPatch, about: tuple[int, int], n: int, shape: tuple[int, int], dtype: Any, fills: bool
) -> None:
    major, multiprocessors = about
    properties = SimpleNamespace(major=major, multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(newton_schulz, "blocks_for", blocks_for)
    monkeypatch.setattr(torch.version, "hip", None)
    device = torch.device("cuda")
    assert triton_products.fills_device(device, n, *shape, dtype) is fills
    assert not triton_products.fills_device(torch.device("cpu"), n, *shape, dtype)
    # kernels have no TF32
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    assert triton_products.fills_device(device, n, *shape, dtype) is (fills and dtype is not torch.float32)
