"""Norms and clipping beside torch.nn.utils: the same results, and in 16 bits closer to the truth than torch's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import utils as stock

import optimx
from optimx._engine.backends import interpreted
from tests.cases import HALF, SHAPES, make_params, set_grads

pytestmark = [pytest.mark.interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FUNCTIONS = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]

#: float32: thousands of terms summed in another order, and squared for p = 0.5. 16 bits: the norm and the factor are
#: float32, so what is stored is rounded once, to the nearest.
CLOSE = {
    torch.float64: {"rtol": 1e-11, "atol": 0.0},
    torch.float32: {"rtol": 1e-5, "atol": 0.0},
    torch.bfloat16: {"rtol": 1.01 * 2**-8, "atol": 0.0},
    torch.float16: {"rtol": 1.01 * 2**-11, "atol": 1.01 * 2**-25},
}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def with_grads(
    device: torch.device | str, dtype: torch.dtype = torch.float32, shapes: Iterable = SHAPES, step: int = 0
) -> list[Parameter]:
    params = make_params(shapes, device=device, dtype=dtype)
    set_grads(params, step)
    return params


def copies(params: Iterable[Tensor], dtype: torch.dtype | None = None) -> list[Parameter]:
    """The same parameters and gradients again."""
    twins = []
    for param in params:
        twin = Parameter(param.detach().to(dtype or param.dtype, copy=True))
        twin.grad = None if param.grad is None else param.grad.to(dtype or param.dtype, copy=True)
        twins.append(twin)
    return twins


def truth(params: Iterable[Tensor]) -> list[Parameter]:
    """Copies on which torch's functions are exact enough to be compared with: float64 where torch rounds to 16 bits.

    Without the empty ones, at which torch's infinity norm raises.
    """
    return [copy for p in params if p.numel() for copy in copies([p], torch.float64 if p.dtype in HALF else None)]


def assert_grads(ours: Iterable[Tensor], theirs: Iterable[Tensor], **tolerance: float) -> None:
    pairs = zip([p for p in ours if p.numel()], [p for p in theirs if p.numel()], strict=True)
    for i, (a, b) in enumerate(pairs):
        close = tolerance or CLOSE.get(a.dtype, CLOSE[torch.float32])
        torch.testing.assert_close(
            a.grad, b.grad, **close, equal_nan=True, check_dtype=a.dtype not in HALF, msg=lambda m, i=i: f"{i}: {m}"
        )


def assert_untouched(params: Iterable[Tensor], before: Iterable[Tensor]) -> None:
    assert_grads(params, before, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature_is_torchs(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)).parameters.values() for module in (optimx, stock))
    expected = [(p.name, p.kind, p.default) for p in theirs]
    if name in ("clip_grad_norm_", "get_total_norm"):
        expected.append(("group", inspect.Parameter.KEYWORD_ONLY, None))
    assert [(p.name, p.kind, p.default) for p in ours] == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, INF, "inf", 3, 0.5])
def test_clip_grad_norm(norm_type: float | str, dtype: torch.dtype, device: torch.device) -> None:
    params = with_grads(device, dtype)
    exact = truth(params)
    max_norm = 0.3 * stock.get_total_norm([p.grad for p in exact], norm_type).item()
    norm = optimx.clip_grad_norm_(params, max_norm, norm_type)
    expected = stock.clip_grad_norm_(exact, max_norm, norm_type)
    assert norm.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert (norm.shape, norm.device.type, norm.requires_grad) == ((), device.type, False)
    torch.testing.assert_close(norm.double(), expected.double(), **CLOSE[norm.dtype])
    assert_grads(params, exact)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, INF, 3.0, 0.5, 0.0, -1.0, -INF])
def test_get_total_norm(norm_type: float, device: torch.device) -> None:
    tensors = [p.detach() for p in make_params([(5,), (7, 3), (130,), (5000,)], device=device)]
    # torch's norm of order 0 counts the tensors that are not all zero
    tensors += [torch.zeros(4, device=device)] if norm_type >= 0 else []
    norm, expected = (module.get_total_norm(tensors, norm_type) for module in (optimx, stock))
    assert norm.dtype is expected.dtype
    torch.testing.assert_close(norm, expected, **CLOSE[torch.float32])


def test_infinity_norm_passes_over_empty_tensors(device: torch.device) -> None:
    """Torch raises: a maximum over nothing. A model with an empty parameter has gradients to clip all the same."""
    grads = [torch.tensor([1.0, -3.0, 2.0], device=device), torch.empty(0, 3, device=device)]
    assert optimx.get_total_norm(grads, INF).item() == 3.0


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_norm_in_16_bits_is_not_rounded(dtype: torch.dtype, device: torch.device) -> None:
    params = with_grads(device, dtype, shapes=[(100 + i,) for i in range(20)])
    grads = [p.grad for p in params]
    exact = stock.get_total_norm([g.double() for g in grads])
    ours, torchs = optimx.get_total_norm(grads), stock.get_total_norm(grads)
    assert ours.dtype is torch.float32
    assert abs(ours - exact) / exact < 1e-5
    assert abs(ours - exact) * 10 < abs(torchs - exact)


def test_norm_beyond_float16(device: torch.device) -> None:
    """Torch's norm is infinite there, and clipping with it zeroes the gradients. The factor is subnormal in float16."""
    params = make_params([(100,), (4, 5)], device=device, dtype=torch.float16)
    for param in params:
        param.grad = torch.full_like(param, 3e4)
    exact = truth(params)
    norm, expected = (m.clip_grad_norm_(p, 1.0) for m, p in ((optimx, params), (stock, exact)))
    torch.testing.assert_close(norm.double(), expected, **CLOSE[torch.float32])
    assert_grads(params, exact)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float64, torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float64),
    ],
    ids=lambda dtypes: "-".join(map(name_of, dtypes)),
)
def test_mixed_dtypes(dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    shapes = [(3,), (200,), (16, 9)]
    params = [p for i, dtype in enumerate(dtypes) for p in with_grads(device, dtype, shapes, step=i)]
    exact = truth(params)
    norm, expected = optimx.clip_grad_norm_(params, 2.5), stock.clip_grad_norm_(exact, 2.5)
    assert norm.dtype is (torch.float64 if torch.float64 in dtypes else torch.float32)
    torch.testing.assert_close(norm.double(), expected.double(), **CLOSE[torch.float32])
    # one factor for all: no better than the float32 part of the norm
    for param, twin in zip(params, exact, strict=True):
        close = CLOSE[torch.float32 if param.dtype is torch.float64 else param.dtype]
        torch.testing.assert_close(param.grad.double(), twin.grad.double(), **close)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, INF, 3.0])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=name_of)
def test_complex(dtype: torch.dtype, norm_type: float, device: torch.device) -> None:
    params = with_grads(device, dtype, [(), (5, 3), (200,)]) + with_grads(device, torch.float32, [(7,)], step=1)
    for param in params[:3]:
        param.grad *= 1 - 2j
    theirs = copies(params)
    norm, expected = (m.clip_grad_norm_(p, 1.0, norm_type) for m, p in ((optimx, params), (stock, theirs)))
    torch.testing.assert_close(norm, expected, **CLOSE[torch.float32])
    assert_grads(params, theirs, **CLOSE[torch.float32])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse(device: torch.device) -> None:
    """Torch has no norm of a sparse tensor; duplicate entries count as their sum, as in the dense gradient."""
    params = make_params([(5, 2), (6,)], device=device)
    set_grads(params, 0)
    sparse = torch.sparse_coo_tensor([[0, 3, 3]], torch.ones(3, 2), (5, 2), device=device, check_invariants=True)
    params[0].grad = sparse
    dense = copies(params)
    dense[0].grad = sparse.to_dense()
    norm, expected = optimx.clip_grad_norm_(params, 0.5), stock.clip_grad_norm_(dense, 0.5)
    torch.testing.assert_close(norm, expected, **CLOSE[torch.float32])
    assert params[0].grad is sparse
    params[0].grad = sparse.to_dense()
    assert_grads(params, dense)


def _gaps(randn: Callable[..., Tensor]) -> Tensor:
    return randn(12, 60)[:, ::2]


#: Gradients that are not contiguous from an aligned address on.
LAYOUTS: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "transposed": lambda randn: randn(20, 30).t(),
    "channels_last": lambda randn: randn(2, 5, 6, 7).to(memory_format=torch.channels_last),
    "misaligned": lambda randn: randn(301)[1:],
    "gaps": _gaps,
    "row_of_a_matrix": lambda randn: randn(20, 30)[3:4].t(),
    "stride_of_size_1": lambda randn: randn(400).as_strided((1, 300), (7, 1)),
    "scalar_within": lambda randn: randn(9)[5],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_layouts(layout: str, norm_type: float, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    storage = []

    def randn(*shape: int) -> Tensor:
        storage.append(torch.randn(shape, generator=generator).to(device))
        return storage[0]

    params = with_grads(device, shapes=[(130,)])
    grad = LAYOUTS[layout](randn)
    params.append(Parameter(torch.zeros(grad.shape, device=device)))
    params[1].grad = grad
    theirs = copies(params)
    base, strides = storage[0].clone(), grad.stride()
    norm, expected = (m.clip_grad_norm_(p, 0.5, norm_type) for m, p in ((optimx, params), (stock, theirs)))
    torch.testing.assert_close(norm, expected, **CLOSE[torch.float32])
    assert params[1].grad is grad
    assert grad.stride() == strides
    assert_grads(params, theirs)
    if grad.untyped_storage().data_ptr() == storage[0].untyped_storage().data_ptr():
        grad.zero_()
        around = storage[0] != 0
        assert torch.equal(storage[0][around], base[around]), "memory beside the gradient was written"
        assert int(around.sum()) == base.numel() - grad.numel()


def test_expanded(device: torch.device) -> None:
    """A factor must not reach one element several times: refused as by torch, unless the host knows that it is 1."""
    params = with_grads(device, shapes=[(5,), (4, 300)])
    params[1].grad = torch.tensor([[0.5], [-2.0], [1.0], [0.1]], device=device).expand(4, 300)
    before = copies(params)
    if device.type == "cpu":
        norm = optimx.clip_grad_norm_(params, 1e3)
        torch.testing.assert_close(norm, stock.get_total_norm([p.grad for p in params]), **CLOSE[torch.float32])
        assert_untouched(params, before)
    for module in (optimx, stock):
        with pytest.raises(RuntimeError, match="single memory location"):
            module.clip_grad_norm_(params[1], 0.1)
    assert_untouched(params, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_gradients_below_the_limit_are_not_written(dtype: torch.dtype, device: torch.device) -> None:
    params = with_grads(device, dtype)
    before = copies(params)
    versions = [p.grad._version for p in params]
    # the factor is max_norm / (norm + 1e-6): just above the norm still clips nothing
    norm = optimx.get_total_norm([p.grad for p in params]).item()
    for max_norm in (norm * 1.0001, 1e9, INF):
        optimx.clip_grad_norm_(params, max_norm)
        optimx.clip_grads_with_norm_(params, max_norm, torch.tensor(norm, device=device))
    assert_untouched(params, before)
    if device.type == "cpu" and not interpreted():
        # a kernel decides on the device, after the host had to say whether it will write
        assert [p.grad._version for p in params] == versions


def test_autograd_knows_of_the_clipping(device: torch.device) -> None:
    """What was saved for a backward and then changed in place is refused there, if the version tells."""
    params = with_grads(device, shapes=[(3,), (130,)])
    versions = [p.grad._version for p in params]
    optimx.clip_grad_norm_(params, 0.1)
    assert all(p.grad._version > version for p, version in zip(params, versions, strict=True))


@pytest.mark.parametrize("max_norm", [0, 1, 0.25, -1.0, torch.tensor(0.5)], ids=str)
def test_kinds_of_max_norm(max_norm: float | Tensor, device: torch.device) -> None:
    params = with_grads(device, shapes=[(), (130,)])
    theirs = copies(params)
    for module, p in ((optimx, params), (stock, theirs)):
        module.clip_grad_norm_(p, max_norm)
    assert_grads(params, theirs)


@pytest.mark.parametrize(
    ("max_norm", "total_norm"),
    [(0.7, 0.0), (0.7, 0.1), (0.7, 3.0), (7e-7, 3e-7), (0.7, 1e30), (0.7, INF), (0.7, NAN)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name_of)
def test_clip_grads_with_norm(max_norm: float, total_norm: float, dtype: torch.dtype, device: torch.device) -> None:
    params = with_grads(device, dtype, shapes=[(), (130,), (4, 5)])
    exact = truth(params)
    for p, norm in ((params, torch.tensor(total_norm)), (exact, torch.tensor(total_norm, dtype=torch.float64))):
        module = optimx if p is params else stock
        assert module.clip_grads_with_norm_(p, max_norm, norm.to(device)) is None
    assert_grads(params, exact, **(CLOSE[torch.float32] if dtype is torch.float64 else {}))


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_foreach_asks_for_torchs_implementation(foreach: bool, dtype: torch.dtype, device: torch.device) -> None:
    params = with_grads(device, dtype)
    theirs = copies(params)
    grads = [p.grad for p in params]
    ours, expected = (module.get_total_norm(grads, 2.0, False, foreach) for module in (optimx, stock))
    assert (ours.dtype, ours.item()) == (expected.dtype, expected.item())
    for module, p in ((optimx, params), (stock, theirs)):
        module.clip_grad_norm_(p, 3.0, foreach=foreach)
        module.clip_grads_with_norm_(p, 3.0, torch.tensor(3.5, device=device), foreach=foreach)
        module.clip_grad_value_(p, 0.5, foreach=foreach)
    assert_untouched(params, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_clip_grad_value(dtype: torch.dtype, device: torch.device) -> None:
    params = with_grads(device, dtype)
    params[0].grad = None
    theirs = copies(params)
    for module, p in ((optimx, params), (stock, theirs)):
        assert module.clip_grad_value_(iter(p), 0.5) is None
    assert max(p.grad.abs().max() for p in params if p.grad is not None and p.numel()) == 0.5
    assert_untouched(params[1:], theirs[1:])


@pytest.mark.parametrize("params", [[], [(3,), (4, 5)]], ids=["no_parameters", "no_gradients"])
def test_nothing_to_clip(params: list, device: torch.device) -> None:
    params = make_params(params, device=device)
    ours, expected = (module.clip_grad_norm_(params, 1.0) for module in (optimx, stock))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    torch.testing.assert_close(optimx.get_total_norm([]), stock.get_total_norm([]), rtol=0, atol=0)
    optimx.clip_grads_with_norm_(params, 1.0, torch.tensor(5.0))
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, INF, 3.0])
def test_only_empty_or_zero_gradients(norm_type: float, device: torch.device) -> None:
    params = make_params([(0,), (0, 5)], device=device)
    set_grads(params, 0)
    assert optimx.clip_grad_norm_(params, 1.0, norm_type).item() == 0.0
    zero = make_params([(130,)], device=device)
    zero[0].grad = torch.zeros_like(zero[0])
    assert optimx.clip_grad_norm_(params + zero, 1.0, norm_type).item() == 0.0
    assert not zero[0].grad.any()


def test_parameters_without_gradient(device: torch.device) -> None:
    params = make_params([(3,), (130,), (4, 5)], device=device)
    set_grads(params, 0, skip=(1,))
    theirs = copies(params)
    norm, expected = (m.clip_grad_norm_(p, 0.5) for m, p in ((optimx, params), (stock, theirs)))
    torch.testing.assert_close(norm, expected, **CLOSE[torch.float32])
    assert params[1].grad is None
    assert_grads(params[::2], theirs[::2])


@pytest.mark.parametrize(
    "container",
    [list, tuple, iter, lambda ps: (p for p in ps), lambda ps: dict(enumerate(ps)).values(), torch.nn.ParameterList],
    ids=["list", "tuple", "iterator", "generator", "values_of_a_dict", "parameter_list"],
)
def test_any_iterable(container: Callable, device: torch.device) -> None:
    params = with_grads(device, shapes=[(3,), (130,)])
    theirs = copies(params)
    for module, p in ((optimx, params), (stock, theirs)):
        total = module.clip_grad_norm_(container(p), 0.5)
        module.clip_grads_with_norm_(container(p), 0.5, total)
        module.clip_grad_value_(container(p), 0.02)
    assert_grads(params, theirs)
    ours, expected = (m.get_total_norm(container([p.grad for p in theirs])) for m in (optimx, stock))
    torch.testing.assert_close(ours, expected, **CLOSE[torch.float32])


def test_a_single_tensor(device: torch.device) -> None:
    (param,) = with_grads(device, shapes=[(2, 130)])
    theirs = copies([param])
    for module, p in ((optimx, param), (stock, theirs[0])):
        total = module.clip_grad_norm_(p, 0.5)
        module.clip_grads_with_norm_(p, 0.5, total)
        module.clip_grad_value_(p, 0.02)
    assert_grads([param], theirs)
    # one norm, not one per row
    torch.testing.assert_close(optimx.get_total_norm(param.grad), stock.get_total_norm(param.grad), rtol=1e-6, atol=0)
    assert not optimx.get_total_norm(param).requires_grad


@pytest.mark.parametrize("module", [optimx, stock], ids=["optimx", "torch"])
def test_empty_generator_warns(module) -> None:
    with pytest.warns(UserWarning, match="`parameters` is an empty generator, no gradient clipping") as caught:
        assert module.clip_grad_norm_((p for p in []), 1.0).item() == 0.0
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, INF, 3.0])
def test_error_if_nonfinite(value: float, norm_type: float, device: torch.device) -> None:
    params = with_grads(device, shapes=[(3,), (130,)])
    params[1].grad[129] = value
    before = copies(params)
    grads = [p.grad for p in params]
    messages = []
    for module in (optimx, stock):
        for call in (
            lambda module=module: module.clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True),
            lambda module=module: module.get_total_norm(grads, norm_type, error_if_nonfinite=True),
        ):
            with pytest.raises(RuntimeError) as error:
                call()
            messages.append(str(error.value))
    assert len(set(messages)) == 1
    assert_untouched(params, before)
    params[1].grad[129] = 0.0
    assert optimx.clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True).isfinite()


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, INF, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("position", [0, 128, 199], ids=["first", "chunk_2", "last"])
def test_nonfinite_gradients(
    value: float, norm_type: float, dtype: torch.dtype, position: int, device: torch.device
) -> None:
    """As torch: an infinite norm zeroes what is finite, NaN spreads."""
    params = with_grads(device, dtype, shapes=[(3,), (200,)])
    params[1].grad[position] = value
    exact = truth(params)
    norm, expected = (m.clip_grad_norm_(p, 1.0, norm_type) for m, p in ((optimx, params), (stock, exact)))
    torch.testing.assert_close(norm.double(), expected.double(), equal_nan=True)
    assert_grads(params, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_large_and_many(dtype: torch.dtype, device: torch.device) -> None:
    """Several pieces of one tensor, and more small tensors than one copy takes together."""
    unit = 300 if interpreted() else 70_001
    small = 8 if interpreted() else 100
    params = with_grads(device, dtype, [(unit,), (3, unit // 3 + 1), *[(i,) for i in range(1, 40 * small, small)]])
    params[1].grad = params[1].grad.t().contiguous().t()
    exact = truth(params)
    norm, expected = (m.clip_grad_norm_(p, 1.0) for m, p in ((optimx, params), (stock, exact)))
    torch.testing.assert_close(norm.double(), expected.double(), **CLOSE[norm.dtype])
    assert_grads(params, exact)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, INF])
def test_repeatable(norm_type: float, device: torch.device) -> None:
    """Bitwise, wherever the gradients lie."""
    params = with_grads(device, shapes=[*SHAPES, (1000,) if interpreted() else (200_003,)])
    again = copies(params)
    norms = [optimx.clip_grad_norm_(p, 0.5, norm_type) for p in (params, again)]
    assert torch.equal(*norms)
    assert_untouched(params, again)
    grads = [p.grad for p in params]
    assert torch.equal(optimx.get_total_norm(grads), optimx.get_total_norm(grads))
