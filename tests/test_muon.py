"""Muon: torch's numbers where these are right, many matrices at once, and what torch's class does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.testing._internal.common_optimizers import optim_db

import optimx
from optimx._engine.newton_schulz import NAMED, Iterations, first_dtype, orthogonalize_
from tests.cases import make_params, set_grads
from tests.conftest import INTERPRETED
from tests.reference.muon import muon, polynomial

pytestmark = pytest.mark.interpreted

#: Several matrices of a shape, wide and tall ones, vectors in disguise, and some of one shape alone.
SHAPES = [(16, 16)] * 3 + [(8, 24)] * 2 + [(24, 8)] * 2 + [(1, 5), (5, 1), (2, 40)]
if not INTERPRETED:
    SHAPES += [(64, 128), (100, 300), (300, 100)]
#: All of optim_db, and what it lacks.
STOCK: dict[str, dict[str, Any]] = {
    **{
        test.desc: test.kwargs
        for info in optim_db
        if info.optim_cls is torch.optim.Muon
        for test in info.optim_inputs_func("cpu")
    },
    "momentum alone": {"nesterov": False, "momentum": 0.9, "lr": 0.1},
    "of AdamW's size": {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0},
    "eps": {"eps": 0.5},
    "four iterations": {"ns_steps": 4},
}
#: Roundings of an iteration in 16 bits add up otherwise on other machines.
CLOSE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 0, "atol": 4e-4},
    torch.float64: {"rtol": 0, "atol": 4e-4},
    # kernels round a parameter once, where stock rounds the decay, too
    torch.bfloat16: {"rtol": 4 * 2**-7, "atol": 1e-2},
}


def train(optimizer: torch.optim.Optimizer, steps: int = 4, scale: float = 1.0) -> None:
    for step in range(steps):
        set_grads([p for group in optimizer.param_groups for p in group["params"]], step, scale)
        optimizer.step()


def twins(
    device: torch.device, kwargs: dict[str, Any], groups: Callable[[Any], Any] = list, **params: Any
) -> tuple[Any, Any]:
    """Ours and stock's on equal parameters."""
    made = [
        cls(groups(make_params(SHAPES, device, **params)), **deepcopy(kwargs))
        for cls in (optimx.Muon, torch.optim.Muon)
    ]
    return made[0], made[1]


def assert_close(ours: torch.optim.Optimizer, stock: torch.optim.Optimizer, **close: Any) -> None:
    pairs = zip(*([p for g in each.param_groups for p in g["params"]] for each in (ours, stock)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, **close)
        assert ours.state[mine].keys() == stock.state[theirs].keys() == {"momentum_buffer"}
        torch.testing.assert_close(ours.state[mine]["momentum_buffer"], stock.state[theirs]["momentum_buffer"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kwargs", STOCK.values(), ids=STOCK.keys())
def test_as_stock(device: torch.device, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and not kwargs.get("nesterov", True):
        # what stock makes of them is wrong: see below
        dtype = torch.float16
    ours, stock = twins(device, kwargs, dtype=dtype)
    train(ours)
    train(stock)
    assert_close(ours, stock, **CLOSE.get(dtype, CLOSE[torch.bfloat16]))
    assert not any(row.reason for row in optimx.explain(ours).rows)


def each_its_own(params: Sequence[Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": [p], "lr": 0.01 * (i + 1), "momentum": 0.9 - 0.1 * (i % 3), "nesterov": i % 2 == 0, "eps": 1e-7 * i}
        for i, p in enumerate(params)
    ]


def test_groups_are_orthogonalized_together(device: torch.device) -> None:
    ours, stock = twins(device, {}, each_its_own)
    train(ours)
    train(stock)
    assert_close(ours, stock, **CLOSE[torch.float32])
    assert len(optimx.explain(ours).rows) == len({*SHAPES})


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_a_batch_changes_no_bit(device: torch.device, shape: tuple[int, int]) -> None:
    """In any company and any order, each ends as it would alone."""
    alone = []
    for i in range(5):
        optimizer = optimx.Muon(make_params([shape], device, seed=i))
        train(optimizer, 2)
        alone.append(optimizer.param_groups[0]["params"][0])
    for order in (range(5), reversed(range(5)), (3, 1)):
        seeds = [*order]
        params = [make_params([shape], device, seed=i)[0] for i in seeds]
        optimizer = optimx.Muon(params)
        for step in range(2):
            for param in params:
                set_grads([param], step)
            optimizer.step()
        assert all(torch.equal(param, alone[i]) for param, i in zip(params, seeds, strict=True))


@pytest.mark.parametrize("scale", [0.0, 2.0**-60, 2.0**66, float("nan")])
def test_what_float32_has_no_squares_of_changes_no_other(device: torch.device, scale: float) -> None:
    """Nor do such matrices, in a batch, change how the norms of others are worked out."""
    ends = []
    for n in (1, 2):
        params = make_params([(8, 40)] * n, device)
        optimizer = optimx.Muon(params, ns_dtype=torch.float32, eps=0.0)
        for step in range(2):
            set_grads(params, step)
            for other in params[1:]:
                other.grad.mul_(scale)
            optimizer.step()
        ends.append(params[0].detach())
    assert torch.equal(*ends)


def test_bfloat16_without_nesterov(device: torch.device) -> None:
    """Stock divides the momentum buffer itself by its norm."""
    (param,) = make_params([(8, 16)], device, torch.bfloat16)
    grad = torch.ones_like(param)
    param.grad = grad
    optimizer = optimx.Muon([param], nesterov=False)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["momentum_buffer"], grad * 0.05, rtol=2**-8, atol=0)


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_matrices_without_elements(device: torch.device, shape: tuple[int, int], adjust: str | None) -> None:
    params = make_params([shape, (4, 4)], device)
    optimizer = optimx.Muon(params, adjust_lr_fn=adjust)
    train(optimizer, 2)
    assert params[0].shape == shape


def test_norms_beyond_float32(device: torch.device) -> None:
    """The sum of squares overflows float32; stock's step is zero then."""
    params = make_params([(8, 16), (8, 16)], device)
    optimizer = optimx.Muon(params, weight_decay=0.0, lr=1.0)
    grad = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(device)
    before = [param.detach().clone() for param in params]
    params[0].grad, params[1].grad = grad * 2.0**66, grad
    optimizer.step()
    first, second = (param.detach() - old for param, old in zip(params, before, strict=True))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    assert float(second.norm()) > 1.0


def test_nothing_and_nan(device: torch.device) -> None:
    params = make_params([(8, 16)] * 3, device)
    optimizer = optimx.Muon(params, weight_decay=0.0)
    before = [param.detach().clone() for param in params]
    for i, param in enumerate(params):
        param.grad = torch.zeros_like(param) if i else torch.randn_like(param)
    params[2].grad[1, 1] = torch.nan
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert bool(params[0].isfinite().all())
    assert torch.equal(params[1], before[1])
    assert bool(params[2].isnan().all())


@pytest.mark.parametrize("kwargs", [{}, {"fused": True}, {"foreach": True}, {"maximize": True}])
def test_arguments_are_stocks(kwargs: dict[str, Any]) -> None:
    params = make_params([(2, 3)])
    for cls in (torch.optim.Muon, optimx.Muon):
        if kwargs:
            with pytest.raises(TypeError):
                cls(params, **kwargs)
    assert optimx.Muon(params).defaults == torch.optim.Muon(params).defaults


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"lr": -1.0}, "Learning rate should be >= 0 but is: -1.0"),
        ({"momentum": -0.5}, "momentum should be >= 0 but is: -0.5"),
        ({"weight_decay": -0.5}, "weight decay should be >= 0 but is: -0.5"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        ({"adjust_lr_fn": "arbitrary"}, "Adjust learning rate function arbitrary is not supported"),
        ({"params": [(2,)]}, "Muon only supports 2D parameters whereas we found a parameter with size"),
    ],
)
def test_errors_are_stocks(kwargs: dict[str, Any], told: str) -> None:
    shapes = kwargs.pop("params", [(2, 3)])
    for cls in (torch.optim.Muon, optimx.Muon):
        with pytest.raises(ValueError, match=told):
            cls(make_params(shapes), **kwargs)


def test_errors_of_ours() -> None:
    params = make_params([(2, 3)])
    with pytest.raises(ValueError, match=r"coefficients should be one of .*standart.*standard"):
        optimx.Muon(params, coefficients="standart")
    with pytest.raises(ValueError, match=r"ns_dtype should be one of .* but is: torch.float64"):
        optimx.Muon(params, ns_dtype=torch.float64)
    optimizer = optimx.Muon(params)
    with pytest.raises(ValueError, match="2D parameters"):
        optimizer.add_param_group({"params": make_params([(3,)])})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["adjust_lr_fn"] = "arbitrary"
    set_grads(params, 0)
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match="adjust_lr_fn should be one of match_rms_adamw, original"):
        optimizer.step()
    assert torch.equal(params[0], before)


def test_checkpoints_go_both_ways(device: torch.device) -> None:
    ours, stock = twins(device, {"lr": 0.01})
    for first, second in ((ours, stock), (stock, ours)):
        train(first, 2)
        second.load_state_dict(deepcopy(first.state_dict()))
        assert second.state_dict()["param_groups"] == first.state_dict()["param_groups"]
    _, uninterrupted = twins(device, {"lr": 0.01})
    for other in (ours, stock):
        for mine, theirs in zip(other.param_groups[0]["params"], uninterrupted.param_groups[0]["params"], strict=True):
            mine.data.copy_(theirs)
        other.state.clear()
    train(ours, 2)
    stock.load_state_dict(deepcopy(ours.state_dict()))
    for mine, theirs in zip(ours.param_groups[0]["params"], stock.param_groups[0]["params"], strict=True):
        theirs.data.copy_(mine)
    train(ours, 2)
    train(stock, 2)
    assert_close(ours, stock, **CLOSE[torch.float32])


def matrices(count: int, rows: int, columns: int) -> Tensor:
    return torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(0))


def fresh(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


#: Of singular values of 0.01 and more; polynomials have lower bounds of their own below.
BANDS = {
    "standard": (0.682, 1.134),
    "quintic5": (0.978, 1.032),
    "polar-express": (0.859, 1.141),
    "deepseek-v4": (1.000, 1.001),
}


@pytest.mark.parametrize("name", NAMED)
def test_bands(name: str) -> None:
    low, high = BANDS[name]
    iterations = NAMED[name]
    singular = polynomial(
        torch.logspace(-2, 0, 10_000, dtype=torch.float64) / iterations.safety, iterations.coefficients
    )
    assert float(singular.min()) == pytest.approx(low, abs=2e-3)
    assert float(singular.max()) == pytest.approx(high, abs=2e-3)
    for dtype, slack in ((torch.float32, 2e-3), (torch.bfloat16, 2e-2)):
        for rows, columns in ((32, 96), (96, 32)):
            x = orthogonalize_(matrices(3, rows, columns).to(dtype), iterations, dtype, 1e-7, fresh)
            found = torch.linalg.svdvals(x.double())
            assert low - slack <= float(found.min()) <= float(found.max()) <= high + slack, (dtype, rows)


def test_errors_of_dtypes() -> None:
    """What the page of Muon says of them, within a half."""
    exact = orthogonalize_(matrices(4, 256, 1024).double(), NAMED["standard"], torch.float64, 1e-7, fresh)
    for dtype, error in ((torch.bfloat16, 1.2e-2), (torch.float16, 1.4e-3), (torch.float32, 2e-6)):
        x = matrices(4, 256, 1024).to(first_dtype(dtype))
        found = orthogonalize_(x, NAMED["standard"], dtype, 1e-7, fresh).double()
        assert 0.5 * error < float((found - exact).norm() / exact.norm()) < 1.5 * error, dtype


#: Dtypes of the Gram form, and its error on Gaussian matrices of 256 x 1024, and on those of singular values from 1 to
#: 0.001: what the page of Muon says of them, within a half.
GRAM_ERRORS = {torch.float16: (1.7e-3, 1.8e-2), torch.float32: (2.1e-6, 1.4e-5)}


@pytest.mark.parametrize("dtype", GRAM_ERRORS)
def test_errors_of_the_gram_form(dtype: torch.dtype) -> None:
    gaussian = matrices(1, 256, 1024).double()
    u, _, vh = torch.linalg.svd(gaussian, full_matrices=False)
    graded = u * torch.logspace(0, -3, 256, dtype=torch.float64) @ vh
    for x, error in zip((gaussian, graded), GRAM_ERRORS[dtype], strict=True):
        exact = orthogonalize_(x.clone(), NAMED["standard"], torch.float64, 1e-7, fresh)
        gram = NAMED["standard"]._replace(gram=True)
        found = orthogonalize_(x.to(first_dtype(dtype)), gram, dtype, 1e-7, fresh).double()
        assert 0.5 * error < float((found - exact).norm() / exact.norm()) < 1.5 * error


@pytest.mark.parametrize("name", NAMED)
def test_gram_form(name: str) -> None:
    """The same polynomials, exact in float64, in the same bands; on matrices near to squares the usual form."""
    low, high = BANDS[name]
    iterations = NAMED[name]
    for rows, columns in ((32, 96), (96, 32), (32, 64), (32, 63)):
        x = matrices(2, rows, columns)
        exact, found = (
            orthogonalize_(x.double(), iterations._replace(gram=gram), torch.float64, 1e-7, fresh)
            for gram in (False, True)
        )
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
        assert torch.equal(found, exact) is (columns == 63)
        for dtype, slack in ((torch.float32, 2e-3), (torch.float16, 1e-2)):
            found = orthogonalize_(x.to(first_dtype(dtype)), iterations._replace(gram=True), dtype, 1e-7, fresh)
            singular = torch.linalg.svdvals(found.double())
            # of a square, some are below 0.01
            assert columns == 63 or float(singular.min()) >= low - slack
            assert float(singular.max()) <= high + slack


@pytest.mark.parametrize("n_iterations", range(9))
def test_gram_form_of_any_number_of_iterations(n_iterations: int) -> None:
    x, coefficients = matrices(2, 8, 20).double(), NAMED["quintic5"].coefficients * 2
    exact, found = (
        orthogonalize_(x.clone(), Iterations(coefficients[:n_iterations], gram=gram), torch.float64, 1e-7, fresh)
        for gram in (False, True)
    )
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("foreign", [False, True], ids=["buckets", "loop"])
@pytest.mark.parametrize("dtype", GRAM_ERRORS)
def test_gram_form_of_a_group(device: torch.device, dtype: torch.dtype, foreign: bool) -> None:
    shapes = [(8, 24)] * 2 + [(24, 8), (8, 10)]
    params = [make_params(shapes, device) for _ in range(2)]
    for each in params if foreign else ():
        # rows that do not follow each other are the loop's
        each[:] = [Parameter(p.detach().t().contiguous().t()) for p in each]
    plain = optimx.Muon([{"params": params[0]}], lr=0.1, ns_dtype=dtype)
    gram = optimx.Muon([{"params": params[1], "gram": True}], lr=0.1, ns_dtype=dtype)
    train(plain, 3)
    train(gram, 3)
    for param, other, shape in zip(*params, shapes, strict=True):
        torch.testing.assert_close(param, other, rtol=0, atol=3e-3 if dtype is torch.float16 else 1e-5)
        assert torch.equal(param, other) is (shape == (8, 10))


def test_gram_form_in_bfloat16() -> None:
    params, told = make_params([(2, 4)]), "ns_dtype should be torch.float16 or torch.float32 with gram=True but is"
    with pytest.raises(ValueError, match=told):
        optimx.Muon(params, gram=True)
    optimizer = optimx.Muon(params)
    assert "gram" not in optimizer.param_groups[0]
    with pytest.raises(ValueError, match=told):
        optimizer.add_param_group({"params": make_params([(2, 4)]), "gram": True})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": make_params([(2, 4)]), "gram": True, "ns_dtype": torch.float16})
    optimizer.param_groups[0]["gram"] = True
    set_grads(params, 0)
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match=told):
        optimizer.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("name", NAMED)
def test_coefficients_of_ones_own_are_scaled(name: str) -> None:
    """As much as those of the same name, or refused where nothing helps."""
    (group,) = optimx.Muon(make_params([(2, 3)]), coefficients=NAMED[name].coefficients).param_groups
    safety = optimx.Muon.rule.group_variant(group).iterations.safety
    assert 1.0 <= safety <= NAMED[name].safety
    with pytest.raises(ValueError, match="coefficients should bring singular values from 0 to 1 between 0 and 2"):
        optimx.Muon(make_params([(2, 3)]), coefficients=[(4.0, -1.0, 1.0)] * 3)


@pytest.mark.parametrize("name", NAMED)
def test_coefficients(device: torch.device, name: str) -> None:
    """In float32, as the float64 reference does it."""
    iterations = NAMED[name]
    shapes = [(6, 20), (20, 6), (6, 20)]
    params = make_params(shapes, device)
    expected = []
    for i, shape in enumerate(shapes):
        grads = []
        for step in range(3):
            doubles = make_params(shapes)
            set_grads(doubles, step)
            grads.append(doubles[i].grad)
        theta = make_params(shapes)[i].detach()
        assert theta.shape == shape
        options: dict[str, Any] = {"coefficients": iterations.coefficients, "safety": iterations.safety}
        expected.append(muon(theta, grads, lr=0.1, **options))
    optimizer = optimx.Muon(params, lr=0.1, coefficients=name, ns_dtype=torch.float32)
    train(optimizer, 3)
    for param, value in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach().double().cpu(), value, rtol=1e-4, atol=1e-4)


def test_float16_keeps_small_and_large_gradients(device: torch.device) -> None:
    """Cast before its norm is known, a gradient of 1e-8 would lose most of it, and one of 1e5 be infinite."""
    params = make_params([(16, 40)] * 3, device)
    optimizer = optimx.Muon(params, lr=1.0, weight_decay=0.0, ns_dtype=torch.float16)
    grad = matrices(1, 16, 40)[0].to(device)
    before = [param.detach().clone() for param in params]
    for param, scale in zip(params, (1.0, 2.0**-26, 2.0**17), strict=True):
        param.grad = grad * scale
    optimizer.param_groups[0]["eps"] = 1e-30
    optimizer.step()
    first, *others = (param.detach() - old for param, old in zip(params, before, strict=True))
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-5)


def test_kernels_of_convolutions(device: torch.device) -> None:
    """Output channels and all else, whose step size is that of the matrix."""
    kernels, flat = make_params([(8, 3, 3, 3)], device), make_params([(8, 27)], device)
    flat[0].data.copy_(kernels[0].detach().view(8, 27))
    ours, stock = optimx.Muon(kernels, lr=0.1), torch.optim.Muon(flat, lr=0.1)
    for step in range(3):
        set_grads(kernels, step)
        flat[0].grad = kernels[0].grad.view(8, 27).clone()
        ours.step()
        stock.step()
    torch.testing.assert_close(kernels[0].view(8, 27), flat[0], **CLOSE[torch.float32])


def test_stacks(device: torch.device) -> None:
    """Each expert's matrix by itself, in groups with an eps of their own."""
    stacks = make_params([(3, 8, 16), (3, 8, 16), (2, 2, 16, 8)], device)
    ours = optimx.Muon([{"params": [p], "eps": 1e-7 * 10**i} for i, p in enumerate(stacks)], lr=0.1, stacked=True)
    apart = [Parameter(m.detach().clone()) for p in stacks for m in p.reshape(-1, *p.shape[-2:])]
    counts = [3, 3, 4]
    eps = [1e-7 * 10**i for i, count in enumerate(counts) for _ in range(count)]
    stock = torch.optim.Muon([{"params": [p], "eps": e} for p, e in zip(apart, eps, strict=True)], lr=0.1)
    for step in range(3):
        set_grads(stacks, step)
        grads = [g for p in stacks for g in p.grad.reshape(-1, *p.shape[-2:])]
        for param, grad in zip(apart, grads, strict=True):
            param.grad = grad.clone()
        ours.step()
        stock.step()
    matrices = [m for p in stacks for m in p.detach().reshape(-1, *p.shape[-2:])]
    for mine, theirs in zip(matrices, apart, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=0, atol=4e-3)
    assert not any(row.reason for row in optimx.explain(ours).rows)


def transposed(params: Iterable[Parameter]) -> list[Parameter]:
    """The same, of rows that are not contiguous, which are the loop's."""
    return [Parameter(p.detach().mT.contiguous().mT) for p in params]


@pytest.mark.parametrize("layout", [list, transposed], ids=["buckets", "loop"])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize(
    ("shape", "split", "heights"),
    [
        ((24, 16), 3, [8] * 3),
        ((24, 16), (12, 6, 6), [12, 6, 6]),
        ((20, 6), (2, 4, 4, 10), [2, 4, 4, 10]),
        ((2, 12, 8), 2, [6] * 4),
        ((2, 12, 8), (8, 4), [8, 4] * 2),
        ((6, 3, 2, 2), 2, [3, 3]),
    ],
)
def test_split(
    device: torch.device, shape: tuple[int, ...], split: Any, heights: list[int], adjust: str, layout: Any
) -> None:
    """As if each part were a parameter: also the step sizes, which follow from its shape."""
    params = layout(make_params([shape] * 3, device))
    stacked = len(shape) == 3
    ours = optimx.Muon(params, lr=0.1, split=split, stacked=stacked, adjust_lr_fn=adjust, max_grad_norm=1e9)

    def parts(tensor: Tensor) -> list[Tensor]:
        columns = shape[-1] if stacked else tensor.numel() // shape[0]
        return [part.detach().clone() for part in tensor.reshape(-1, columns).split(heights)]

    apart = [Parameter(part) for p in params for part in parts(p)]
    stock = torch.optim.Muon(apart, lr=0.1, adjust_lr_fn=adjust)
    for step in range(3):
        set_grads(params, step, skip=(1,) if step == 1 else ())
        grads = [grad for p in params for grad in (parts(p.grad) if p.grad is not None else [None] * len(heights))]
        for param, grad in zip(apart, grads, strict=True):
            param.grad = grad
        ours.step()
        stock.step()
    for mine, theirs in zip([part for p in params for part in parts(p)], apart, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=0, atol=4e-3)
    assert bool(optimx.explain(ours).rows[0].reason) is (layout is transposed)


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"split": 5}, r"split should divide the rows but is 5 for 24 rows of shape \[24, 16\]"),
        ({"split": 0}, "split should be >= 1 but is: 0"),
        ({"split": (8, 8)}, r"split should add up to the rows but is \[8, 8\] for 24 rows"),
        ({"split": (32, -8)}, r"split\[1\] should be >= 1 but is: -8"),
        ({"split": ()}, r"split should be a whole number or several but is: \(\)"),
        ({"split": "3"}, "split should be a whole number or several but is: '3'"),
        ({"split": 1.5}, "split should be a whole number but is: 1.5"),
        ({"normalize": "neurons"}, "normalize should be one of neuron but is: 'neurons'; did you mean 'neuron'"),
        ({"beta2": 1.0}, r"beta2 should be in \[0, 1\) but is: 1.0"),
    ],
)
def test_errors_of_extras(kwargs: dict[str, Any], told: str) -> None:
    params = make_params([(24, 16)])
    with pytest.raises((ValueError, TypeError), match=told):
        optimx.Muon(params, **kwargs)


def test_a_split_that_does_not_suit_a_group_is_refused() -> None:
    optimizer = optimx.Muon(make_params([(6, 4)]), split=3)
    with pytest.raises(ValueError, match="split should divide the rows but is 3 for 8 rows"):
        optimizer.add_param_group({"params": make_params([(8, 4)])})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": make_params([(8, 4)]), "split": (2, 6)})


@pytest.mark.parametrize("layout", [list, transposed], ids=["buckets", "loop"])
@pytest.mark.parametrize("extra", ["normalize", "cautious", "both"])
def test_normalized_rows_and_cautious_decay(device: torch.device, extra: str, layout: Any) -> None:
    """In float32, as the float64 reference does it."""
    shapes = [(6, 20), (20, 6), (6, 20), (5, 5)]
    kwargs: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if extra != "cautious":
        kwargs |= {"normalize": "neuron", "beta2": 0.8}
        options["beta2"] = 0.8
    if extra != "normalize":
        kwargs["cautious_weight_decay"] = options["cautious"] = True
    params = layout(make_params(shapes, device))
    optimizer = optimx.Muon(params, lr=0.1, weight_decay=0.5, ns_dtype=torch.float32, **kwargs)
    grads: list[list[Tensor]] = [[] for _ in shapes]
    for step in range(3):
        set_grads(params, step)
        for param, of_param in zip(params, grads, strict=True):
            of_param.append(param.grad.cpu())
        optimizer.step()
    for param, start, of_param in zip(params, make_params(shapes), grads, strict=True):
        expected = muon(start.detach(), of_param, lr=0.1, weight_decay=0.5, **options)
        torch.testing.assert_close(param.detach().double().cpu(), expected, rtol=1e-4, atol=1e-4)
        if extra != "cautious":
            assert optimizer.state[param]["second_momentum_buffer"].shape == (len(param), 1)


@pytest.mark.parametrize(
    ("shape", "stacked", "of_rows"),
    [
        ((4, 3, 2, 2), False, (4, 1, 1, 1)),
        ((3, 4, 5), True, (3, 4, 1)),
        ((0, 4), False, (0, 1)),
        ((4, 0), False, (4, 1)),
    ],
)
def test_averages_of_rows(device: torch.device, shape: Any, stacked: bool, of_rows: Any) -> None:
    """One entry a row of each matrix; a batch changes no bit; checkpoints go on; a bad gradient changes nothing."""
    kwargs = {"normalize": "neuron", "stacked": stacked, "lr": 0.1}
    params, alone = make_params([shape] * 3, device), make_params([shape] * 3, device)
    together, apart = optimx.Muon(params, **kwargs), [optimx.Muon([p], **kwargs) for p in alone]
    for step in range(4):
        if step == 2:
            state = deepcopy(together.state_dict())
            together = optimx.Muon(params, **kwargs)
            together.load_state_dict(state)
        for each in (params, alone):
            set_grads(each, step)
        for optimizer in (together, *apart):
            optimizer.step()
    for a, b, optimizer in zip(params, alone, apart, strict=True):
        assert torch.equal(a, b)
        assert bool(a.isfinite().all())
        mine, other = (each["second_momentum_buffer"] for each in (together.state[a], optimizer.state[b]))
        assert mine.shape == of_rows
        assert torch.equal(mine, other)
        assert bool(mine.isfinite().all())


@pytest.mark.parametrize("layout", [list, transposed], ids=["buckets", "loop"])
def test_clipping(device: torch.device, layout: Any) -> None:
    """Momentum mixes gradients of different steps, so clipping changes the step."""

    ours, stock = twins(device, {"lr": 0.1}, layout)
    ours.max_grad_norm = 1.0
    params = [p for group in stock.param_groups for p in group["params"]]
    mine = [p for group in ours.param_groups for p in group["params"]]
    for step in range(3):
        set_grads(mine, step, 3.0**step)
        set_grads(params, step, 3.0**step)
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        ours.step()
        stock.step()
        torch.testing.assert_close(ours.grad_norm, norm)
    for param, theirs in zip(mine, params, strict=True):
        # steps ten times as long as others here
        torch.testing.assert_close(param, theirs, rtol=0, atol=4e-3)


@pytest.mark.parametrize("scaler_cls", [torch.amp.GradScaler, optimx.GradScaler])
def test_amp(device: torch.device, scaler_cls: Callable[..., Any]) -> None:
    """A step with an infinite gradient changes nothing, the averages least of all."""
    params = make_params([(8, 16), (8, 16), (16, 8)], device)
    optimizer = optimx.Muon(params, max_grad_norm=1.0, normalize="neuron")
    scaler = scaler_cls(device.type, init_scale=1024.0)
    for step in range(3):
        before = [(p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}) for p in params]
        set_grads(params, step, 1024.0)
        if step == 1:
            params[1].grad[0, 0] = torch.inf
        scaler.scale(torch.zeros((), device=device))
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(p, old) for p, (old, _) in zip(params, before, strict=True)]
        assert same == [step == 1] * 3
        if step == 1:
            for p, (_, state) in zip(params, before, strict=True):
                for name in ("momentum_buffer", "second_momentum_buffer"):
                    assert torch.equal(optimizer.state[p][name], state[name])
    assert scaler.get_scale() == 512.0


def test_some_without_gradients(device: torch.device) -> None:
    ours, stock = twins(device, {})
    params = [[p for group in each.param_groups for p in group["params"]] for each in (ours, stock)]
    for step in range(3):
        before = params[0][1].detach().clone()
        for each, optimizer in zip(params, (ours, stock), strict=True):
            set_grads(each, step, skip=(1, 4) if step == 1 else ())
            optimizer.step()
        assert torch.equal(params[0][1], before) is (step == 1)
    assert_close(ours, stock, **CLOSE[torch.float32])


def test_lr_on_the_device_is_not_read(device: torch.device) -> None:
    ours, stock = twins(device, {"lr": torch.tensor(0.05, device=device)})
    train(ours)
    train(stock)
    assert_close(ours, stock, **CLOSE[torch.float32])
