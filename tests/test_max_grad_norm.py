"""Clipping inside the step: torch's clip_grad_norm_ and then stock's loop, except that no gradient is written."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_, get_total_norm

import optimx
from optimx._engine.cpu import batch as _batch
from optimx._engine.cpu import elementwise as _native
from tests.cases import (
    BY_NAME,
    CASES,
    CLOSE,
    HALF,
    SHAPES,
    Case,
    assert_same,
    loop,
    make_leftovers,
    make_params,
    set_grad,
    set_grads,
    twins,
)
from tests.conftest import INTERPRETED
from tests.engine import BESIDE_STOCK, PLANS, each, each_case, each_case_thinly, interpreted, params_of, usual

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")


#: Adafactor steps by averages as they are stored: squares of 16 bits must not matter.
STORED = {"adafactor": {"eps": (0.1, 1e-3)}}

#: The norm is a float32 sum in another order.
NORM = {"rtol": 1e-5, "atol": 0.0}


def clipped_step(
    ours: torch.optim.Optimizer,
    stock: torch.optim.Optimizer,
    step: int,
    scale: float = 1.0,
    skip: Sequence[int] = (),
    edit: Callable[[list[Tensor]], None] = lambda params: None,
) -> Tensor:
    """One step of each on the same gradients, stock's after torch's clipping; compares and returns the norm.

    What a float64 stand-in for 16 bits stores is rounded, as in `tests.cases.train_rounded`.
    """
    params, copies = params_of(ours), params_of(stock)
    for optimizer in (ours, stock):
        set_grads(params_of(optimizer), step, scale, skip)
        edit(params_of(optimizer))
    for param, twin in zip(params, copies, strict=True):
        if param.dtype in HALF and twin.grad is not None:
            twin.grad = twin.grad.to(param.dtype).to(twin.dtype)
    grads = [param.grad for param in params]
    ours.step()
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True)), "a gradient was replaced"
    norm = (normalize_ if ours.normalize_grads else clip_)(copies, ours.max_grad_norm)
    stock.step()
    for param, twin in zip(params, copies, strict=True):
        if param.dtype in HALF:
            for tensor in (twin.data, *(v for k, v in stock.state[twin].items() if k not in ours.rule.scalars)):
                tensor.copy_(tensor.to(param.dtype))
    if ours.max_grad_norm is not None or ours.normalize_grads:
        torch.testing.assert_close(ours.grad_norm.double(), norm.double(), **NORM, equal_nan=True)
    return norm


def clip_(params: list[Tensor], limit: float | None) -> Tensor:
    return clip_grad_norm_(params, limit or INF, foreach=False)


def normalize_(params: list[Tensor], limit: float | None) -> Tensor:
    grads = [param.grad for param in params if param.grad is not None]
    norm = get_total_norm(grads, foreach=False)
    for grad in grads:
        grad.mul_((1.0 / (norm + 1e-6)).to(grad.device))
    return norm


def single(case: Case, dtype: torch.dtype) -> dict[str, float] | None:
    """Stock keeps NAdam's mu_product in float32, also for float64 parameters."""
    return CLOSE[torch.float32] if case.name == "nadam" and dtype is torch.float64 else None


def turn(params: list[Tensor]) -> None:
    """Give complex gradients an imaginary part."""
    for param in params:
        if param.is_complex() and param.grad is not None:
            param.grad = param.grad * (1 - 2j)


def three_groups(params: list[Tensor]) -> list[dict]:
    return [{"params": params[:3]}, {"params": params[3:5], "lr": 0.05, "weight_decay": 0.3}, {"params": params[5:]}]


@each(BESIDE_STOCK, PLANS)
def test_equals_clipping_before_the_step(case: Case, kwargs: dict, device: torch.device) -> None:
    shapes = [(), (130,)] if INTERPRETED else [(), (0,), (129,), (3, 5, 7)]
    ours, stock, _ = twins(case, make_params(shapes, device), kwargs, max_grad_norm=1.0)
    norms = [clipped_step(ours, stock, step, scale).item() for step, scale in enumerate([1.0, 1e-3, 100.0])]
    assert [norm > 1.0 for norm in norms] == [True, False, True]
    assert_same(ours, stock)


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e4], ids=["clipped", "not_clipped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@each_case
def test_dtypes(case: Case, dtype: torch.dtype, max_grad_norm: float, device: torch.device) -> None:
    kwargs = {**case.rounded(usual(case, lr=0.01), dtype), **STORED.get(case.name, {})}
    ours, stock, _ = twins(
        case, make_params([(), (129,), (10, 12)], device, dtype), kwargs, max_grad_norm=max_grad_norm
    )
    for step in range(3):
        clipped_step(ours, stock, step)
    assert ours.grad_norm.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert_same(ours, stock, single(case, dtype))


@each_case
def test_one_norm_for_all_groups(case: Case, device: torch.device) -> None:
    """Also of parameters that have a gradient on some steps only, whose step counts therefore differ."""
    ours, stock, _ = twins(case, make_params(device=device), usual(case, lr=0.01), three_groups, max_grad_norm=0.7)
    for step, skip in enumerate([(), (0, 4), (3, 8), (0, 1, 2), ()]):
        clipped_step(ours, stock, step, skip=skip)
    assert_same(ours, stock)


@interpreted
@pytest.mark.parametrize(
    "case", [case for case in CASES if not (case.is_torchs and case.has("capturable"))], ids=lambda case: case.name
)
def test_capturable(case: Case, device: torch.device) -> None:
    """Where it is ours, and rows are made on the device."""
    kwargs = usual(case, lr=0.01, dampening=0.5)
    ours, stock, _ = twins(case, make_params([(), (130,)], device), kwargs, max_grad_norm=1.0, capturable=True)
    for step, skip in enumerate([(), (0,), ()]):
        clipped_step(ours, stock, step, skip=skip)
    assert_same(ours, stock)


@each_case_thinly
def test_mixed_dtypes(case: Case, device: torch.device) -> None:
    shapes = [(5, 7), (130,), ()]
    params = [p for dtype in DTYPES for p in make_params(shapes, device, dtype)]
    # a power of two: Rprop's state begins with it
    ours, stock, _ = twins(case, params, {**usual(case, lr=2**-7), **STORED.get(case.name, {})}, max_grad_norm=0.7)
    for step in range(3):
        clipped_step(ours, stock, step)
    assert ours.grad_norm.dtype is torch.float64
    # the norm's float32 part is in every factor, so float64 parameters are as close as float32 ones
    pairs = zip(params, params_of(stock), strict=True)
    for param, twin in pairs:
        close = CLOSE[torch.float32 if param.dtype is torch.float64 else param.dtype]
        torch.testing.assert_close(param.double(), twin.double(), **close)


@pytest.mark.parametrize(
    ("dtype", "of_grad"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float64, torch.float32)],
    ids=["float32-bf16_grad", "bf16-float32_grad", "float64-float32_grad"],
)
@each_case_thinly
def test_gradients_of_another_dtype(case: Case, dtype: torch.dtype, of_grad: torch.dtype, device: torch.device) -> None:
    params = make_params([(), (129,), (10, 12)], device, dtype)
    ours, stock, _ = twins(case, params, usual(case, lr=2**-7), max_grad_norm=0.5)
    mine = set(params)

    def round_grads(some: list[Tensor]) -> None:
        for param in some:
            grad = param.grad.to(of_grad)
            set_grad(param, grad if param in mine else grad.to(param.dtype))

    for step in range(3):
        clipped_step(ours, stock, step, edit=round_grads)
    assert ours.grad_norm.dtype is torch.float32
    assert_same(ours, stock, CLOSE[torch.float32] if dtype is torch.float64 else None)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the native backend takes at once, small enough that small tensors are large."""
    monkeypatch.setattr(_native, "PIECE", 1000)
    monkeypatch.setattr(_batch, "BATCH", 300)
    monkeypatch.setattr(_batch, "SMALL", 60)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bf16"])
@each_case_thinly
def test_large_tensors(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Several pieces or chunks, the last one short, in memory orders that pairing by offset must respect."""
    if INTERPRETED:
        shapes, (n, c, h, w), (rows, columns) = [(257,)], (2, 3, 5, 7), (12, 13)
    else:
        shapes, (n, c, h, w), (rows, columns) = [(3001,), (2000,)], (2, 8, 15, 16), (31, 71)
    params = make_params([*shapes, (n, c, h, w), (columns, rows)], device, dtype)
    params[-2] = Parameter(params[-2].detach().to(memory_format=torch.channels_last))
    params[-1] = Parameter(params[-1].detach().t())
    # a small lr: an ulp of a bf16 state moves a parameter by lr * 2**-7, which must stay below the tolerance
    ours, stock, _ = twins(case, params, usual(case, lr=2**-10), max_grad_norm=1.0)

    def contiguous_grads(some: list[Tensor]) -> None:
        for param in some[-2:]:
            param.grad = param.grad.contiguous()

    for step in range(3):
        clipped_step(ours, stock, step, edit=contiguous_grads if step % 2 else lambda some: None)
    assert_same(ours, stock, single(case, dtype))


@pytest.mark.usefixtures("small_pieces")
@each_case_thinly
def test_many_small_tensors(case: Case, device: torch.device) -> None:
    count, unit = (8, 40) if INTERPRETED else (80, 2)
    ours, stock, _ = twins(
        case, make_params([(i * unit,) for i in range(count)], device), usual(case, lr=0.01), max_grad_norm=2.0
    )
    for step in range(2):
        clipped_step(ours, stock, step)
    assert_same(ours, stock)


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e4], ids=["clipped", "not_clipped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@each_case_thinly
def test_gradients_are_left_alone(case: Case, dtype: torch.dtype, max_grad_norm: float, device: torch.device) -> None:
    params = make_params([*SHAPES, (20, 30)], device=device, dtype=dtype)
    (leftover,) = make_leftovers(case, [(5,)], device)
    optimizer = case.cls([*params, leftover], **usual(case), max_grad_norm=max_grad_norm)
    for step in range(2):
        set_grads([*params, leftover], step)
        params[-1].grad = params[-1].grad.t().contiguous().t()
        params[1].grad = torch.ones((), device=device, dtype=dtype).expand(params[1].shape)
        grads = [p.grad for p in [*params, leftover]]
        before = [(grad.clone(), grad.stride(), grad._version) for grad in grads]
        optimizer.step()
        assert all(p.grad is grad for p, grad in zip([*params, leftover], grads, strict=True))
        for grad, (values, strides, version) in zip(grads, before, strict=True):
            assert torch.equal(grad, values)
            assert (grad.stride(), grad._version) == (strides, version)


@each_case_thinly
def test_grad_norm(case: Case, device: torch.device) -> None:
    params = make_params([(), (129,), (3, 5)], device)
    optimizer = case.cls(params, **usual(case))
    assert optimizer.grad_norm is None
    set_grads(params, 0)
    optimizer.step()
    assert optimizer.grad_norm is None

    optimizer.max_grad_norm = 1.0
    norms, expected = [], []
    for step in range(3):
        set_grads(params, step, scale=10.0**step)
        optimizer.step()
        norms.append(optimizer.grad_norm)
        expected.append(torch.nn.utils.get_total_norm([p.grad for p in params]))
    for norm in norms:
        assert (norm.shape, norm.dtype, norm.device.type) == ((), torch.float32, device.type)
        assert not norm.requires_grad
    # a tensor of its own each step: what a training loop has kept for its log does not change
    torch.testing.assert_close(torch.stack(norms), torch.stack(expected), **NORM)

    optimizer.max_grad_norm = None
    optimizer.step()
    assert optimizer.grad_norm is None


@each_case_thinly
def test_grad_norm_without_gradients_is_0(case: Case, device: torch.device) -> None:
    """What clip_grad_norm_ returns, so that a loop can log it without asking."""
    params = make_params([(3,), (0,)], device=device)
    optimizer = case.cls(params, max_grad_norm=1.0)
    before = [p.clone() for p in params]
    for _ in range(2):
        optimizer.step()
        assert torch.is_tensor(optimizer.grad_norm)
        assert optimizer.grad_norm.item() == 0.0
        # only an empty one
        set_grads(params, 0, skip=(0,))
    assert all(map(torch.equal, params, before))


@each_case_thinly
def test_limit_may_change_between_steps(case: Case, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params([(), (129,)], device), usual(case, lr=0.01), max_grad_norm=1.0)
    for step, limit in enumerate([1.0, 0.1, None, 5, INF, torch.tensor(0.5)]):
        ours.max_grad_norm = limit
        clipped_step(ours, stock, step)
    assert_same(ours, stock)


@pytest.mark.parametrize(
    ("value", "shown"), [(-1, "-1"), (0, "0"), (-0.5, "-0.5"), (NAN, "nan"), (-INF, "-inf")], ids=str
)
@each_case_thinly
def test_invalid(case: Case, value: float, shown: str) -> None:
    with pytest.raises(ValueError) as error:
        case.cls(make_params([(3,)]), max_grad_norm=value)
    assert str(error.value) == f"max_grad_norm should be > 0 but is: {shown}"


@each_case_thinly
def test_not_in_groups_nor_checkpoints(case: Case, device: torch.device) -> None:
    """A key of ours there would break torch.optim's checkpoints, in both directions."""
    params = make_params([(3,), (130,)], device=device)
    ours, stock, _ = twins(case, params, usual(case), max_grad_norm=0.5)
    clipped_step(ours, stock, 0)
    assert ours.param_groups[0].keys() == stock.param_groups[0].keys()
    assert ours.defaults.keys() == stock.defaults.keys()
    saved, torchs = ours.state_dict(), stock.state_dict()
    assert saved.keys() == torchs.keys()
    assert saved["param_groups"][0].keys() == torchs["param_groups"][0].keys()

    # loading says nothing about the limit
    other = case.cls(params, **usual(case), max_grad_norm=0.25)
    other.load_state_dict(torchs)
    assert other.max_grad_norm == 0.25
    stock.load_state_dict(saved)
    clipped_step(other, stock, 1)
    assert_same(other, stock)


def _deepcopy(thing):
    return copy.deepcopy(thing)


def _pickle(thing):
    return pickle.loads(pickle.dumps(thing))


def _torch_save(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [_deepcopy, _pickle, _torch_save], ids=lambda f: f.__name__.strip("_"))
@each_case_thinly
def test_survives(duplicate: Callable, case: Case, device: torch.device) -> None:
    ours, stock, _ = twins(case, make_params([(3,), (130,)], device), usual(case, lr=0.01), max_grad_norm=0.5)
    clipped_step(ours, stock, 0)
    twin = duplicate(ours)
    assert twin.max_grad_norm == 0.5
    clipped_step(twin, stock, 1)
    assert_same(twin, stock)
    assert not torch.equal(params_of(twin)[1], params_of(ours)[1])


@interpreted
@pytest.mark.parametrize(
    ("index", "value"),
    [(0, INF), (1, -INF), (1, NAN), (3, NAN)],
    ids=["scalar-inf", "large--inf", "large-nan", "torchs_own_step-nan"],
)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_nonfinite_gradients(case: Case, value: float, index: int, device: torch.device) -> None:
    """Nobody looks for them: an infinite norm makes the factor 0 (and 0 * inf NaN), NaN makes all NaN."""
    params = make_params([(), (130,), (5, 7)], device)
    params += make_leftovers(case, [(5,)], device)
    ours, stock, _ = twins(case, params, usual(case, lr=0.01), max_grad_norm=0.5)
    clipped_step(ours, stock, 0)

    def spoil(some: list[Tensor]) -> None:
        some[index].grad.view(-1)[-1] = value

    clipped_step(ours, stock, 1, edit=spoil)
    for a, b in zip(params, params_of(stock), strict=True):
        torch.testing.assert_close(a, b, **CLOSE[torch.float32], equal_nan=True)
        for key, expected in stock.state[b].items():
            torch.testing.assert_close(ours.state[a][key], expected, **CLOSE[torch.float32], equal_nan=True)
    assert not ours.grad_norm.isfinite()


#: Parameters of which some or all go to torch's own step.
MIXTURES: dict[str, Callable[[list[Tensor]], list[dict]]] = {
    "complex": lambda p: [{"params": p}],
    "foreach_group": lambda p: [{"params": p[:2]}, {"params": p[2:], "foreach": True}],
    "loop_group": lambda p: [{"params": p[:2], "foreach": False, "lr": 0.05}, {"params": p[2:]}],
    "differentiable_group": lambda p: [{"params": p[:1]}, {"params": p[1:], "differentiable": True}],
    "all_foreach": lambda p: [{"params": p, "foreach": True}],
    "all_differentiable": lambda p: [{"params": p, "differentiable": True}],
}


def takes(case: Case, mixture: str) -> bool:
    flags = {key for group in MIXTURES[mixture]([torch.zeros(0)] * 5) for key in group} - {"params"}
    return all(map(case.has, flags))


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("max_grad_norm", [0.5, 1e4], ids=["clipped", "not_clipped"])
@each_case_thinly
def test_with_parameters_on_torchs_step(case: Case, mixture: str, max_grad_norm: float, device: torch.device) -> None:
    """One norm over all of them, of this step's gradients, and all are clipped."""
    if not takes(case, mixture):
        pytest.skip("there is no such argument")
    params = make_params([(3,), (130,), (5, 7)], device)
    params += make_leftovers(case, [(4,), (2, 3)], device)
    ours, stock, _ = twins(case, params, usual(case, lr=0.01), MIXTURES[mixture], max_grad_norm=max_grad_norm)
    for step in range(4):
        clipped_step(ours, stock, step, scale=1.0 + step, edit=turn)
    assert_same(ours, stock, CLOSE[torch.float32])


@pytest.mark.parametrize("asked", [{"foreach": True}, {"foreach": False}, {"fused": False}], ids=str)
@each_case_thinly
def test_optimizer_on_torchs_step(case: Case, asked: dict, device: torch.device) -> None:
    if not all(map(case.has, asked)):
        pytest.skip("there is no such argument")
    params = make_params([(), (129,), (3, 5)], device)
    stock = loop(case, [Parameter(p.detach().clone()) for p in params], **usual(case, lr=0.01))
    ours = case.cls(params, **usual(case, lr=0.01), **asked, max_grad_norm=0.5)
    for step in range(3):
        clipped_step(ours, stock, step)
    assert_same(ours, stock)


@interpreted
@pytest.mark.parametrize("case", [case for case in CASES if case.has("differentiable")], ids=lambda c: c.name)
def test_differentiable(case: Case, device: torch.device) -> None:
    """Parameters that are results of a computation, through which a later backward goes."""
    leaves = make_params([(3,), (5, 7)], device)
    results = []
    for cls, limit in ((case.cls, {"max_grad_norm": 0.5}), (case.stock, {})):
        params = [leaf.clone() for leaf in leaves]
        set_grads(params, 0)
        optimizer = cls(params, **usual(case, lr=0.01), differentiable=True, **limit)
        if not limit:
            clip_grad_norm_(params, 0.5)
        optimizer.step()
        results.append([*params, *torch.autograd.grad(sum(p.pow(2).sum() for p in params), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **CLOSE[torch.float32])


#: Torch's that take sparse gradients.
SPARSE = ("sgd", "adagrad")


def sparse_grad(device: torch.device) -> Tensor:
    return torch.sparse_coo_tensor(
        [[0, 3, 0]], torch.tensor([[1.0, 2.0]] * 3), (6, 2), device=device, check_invariants=True
    )


@interpreted
@pytest.mark.parametrize("case", [case for case in CASES if case.name not in SPARSE], ids=lambda c: c.name)
def test_sparse_gradient_is_refused_before_anything_changes(case: Case, device: torch.device) -> None:
    params = make_params([(3,), (6, 2)], device)
    optimizer = case.cls(params, max_grad_norm=0.5)
    set_grads(params, 0)
    optimizer.step()
    params[1].grad = sparse = sparse_grad(device)
    before = [p.clone() for p in params]
    states = copy.deepcopy([optimizer.state[p] for p in params])
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert params[1].grad is sparse
    assert all(map(torch.equal, params, before))
    for param, state in zip(params, states, strict=True):
        assert all(torch.equal(optimizer.state[param][key], value) for key, value in state.items())
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]


@interpreted
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("max_grad_norm", [0.5, 1e4], ids=["clipped", "not_clipped"])
@pytest.mark.parametrize("case", [case for case in CASES if case.name in SPARSE], ids=lambda c: c.name)
def test_sparse_gradients(case: Case, max_grad_norm: float, device: torch.device) -> None:
    """Of entries that are there twice, the sum counts. Torch's clipping has no kernel for them."""
    ours, stock, _ = twins(case, make_params([(3,), (6, 2)], device), {"lr": 0.1}, max_grad_norm=max_grad_norm)
    for step in range(3):
        for optimizer in (ours, stock):
            set_grads(params_of(optimizer), step)
            params_of(optimizer)[1].grad = sparse_grad(device)
        ours.step()
        dense, sparse = (param.grad for param in params_of(stock))
        norm = torch.cat([dense, sparse.to_dense().flatten()]).norm()
        for param in params_of(stock):
            param.grad = param.grad * (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        stock.step()
        torch.testing.assert_close(ours.grad_norm, norm, **NORM)
    assert_same(ours, stock)


@each_case_thinly
def test_closure(case: Case, device: torch.device) -> None:
    """The gradients that count are those the closure made."""
    params = make_params([(3,), (130,)], device)
    ours, stock, copies = twins(case, params, usual(case, lr=0.01), max_grad_norm=0.5)

    def closure_of(some: list[Tensor], clip: bool) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss = sum((p * p).sum() for p in some)
            for param, grad in zip(some, torch.autograd.grad(loss, some), strict=True):
                param.grad = grad
            if clip:
                clip_grad_norm_(some, 0.5)
            return loss

        return closure

    for _ in range(3):
        loss, expected = ours.step(closure_of(params, clip=False)), stock.step(closure_of(copies, clip=True))
        torch.testing.assert_close(loss, expected)
    assert_same(ours, stock)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@each_case_thinly
def test_repeatable(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Bitwise: sums are met in a fixed order, wherever the tensors lie."""
    shapes = [(), (300,)] if INTERPRETED else [*SHAPES, (3001,)]
    runs = []
    for _ in range(2):
        params = make_params(shapes, device, dtype)
        optimizer = case.cls(params, **usual(case, lr=0.01), max_grad_norm=0.5)
        norms = []
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
            norms.append(optimizer.grad_norm)
        states = [value for param in params for value in optimizer.state[param].values()]
        runs.append([*norms, *params, *states])
    assert all(map(torch.equal, *runs))


# LAMB's other way: gradients of length 1


LAMB = BY_NAME["lamb"]


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_normalizing(dtype: torch.dtype, device: torch.device) -> None:
    """Short gradients become longer; for very short ones, the 1e-6 that keeps 0 from dividing shows."""
    # normalized gradients are small enough that their squares vanish in float16
    kwargs = {"lr": 0.01, "eps": 1e-3 if dtype is torch.float16 else 1e-6}
    params = make_params([(), (129,), (5, 7)], device, dtype)
    ours, stock, _ = twins(LAMB, params, kwargs, three_groups, normalize_grads=True)
    tiny = 1.0 if dtype is torch.float16 else 1e-8
    norms = [clipped_step(ours, stock, step, scale).item() for step, scale in enumerate([1.0, 1e-3, 100.0, tiny])]
    assert [norm > 1.0 for norm in norms] == [True, False, True, dtype is torch.float16]
    assert_same(ours, stock)


@interpreted
def test_normalizing_with_parameters_on_the_loop(device: torch.device) -> None:
    """Complex ones, memory with gaps, some without a gradient: all divided by the norm of all."""
    params = make_params([(3,), (130,), (5, 7)], device)
    params += make_params([(4,), (2, 3)], device, torch.complex64)
    params[2] = Parameter(params[2].detach()[:, ::2])
    ours, stock, _ = twins(LAMB, params, {"lr": 0.01}, three_groups, normalize_grads=True)
    for step, skip in enumerate([(), (0, 3), (), (2, 4)]):
        clipped_step(ours, stock, step, scale=10.0 ** (1 - step), skip=skip, edit=turn)
    assert_same(ours, stock, CLOSE[torch.float32])


@interpreted
def test_normalizing_nothing(device: torch.device) -> None:
    """Gradients of zeros stay zeros."""
    ours, stock, _ = twins(LAMB, make_params([(), (129,)], device), {"lr": 0.01}, normalize_grads=True)
    ours.step()
    assert ours.grad_norm.item() == 0.0
    for step, scale in enumerate([0.0, 1.0, 0.0]):
        norm = clipped_step(ours, stock, step, scale)
        assert (norm == 0.0) == (scale == 0.0)
    assert_same(ours, stock)
    assert all(param.isfinite().all() for param in params_of(ours))


@interpreted
@pytest.mark.parametrize("max_grad_norm", [None, 1.0], ids=["normalized", "clipped"])
def test_normalizing_leaves_gradients_alone(max_grad_norm: float | None, device: torch.device) -> None:
    params = make_params([(), (129,), (5, 7)], device)
    optimizer = optimx.LAMB(params, normalize_grads=max_grad_norm is None, max_grad_norm=max_grad_norm)
    for step in range(2):
        set_grads(params, step, scale=0.1)
        before = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
        optimizer.step()
        for param, (grad, values, version) in zip(params, before, strict=True):
            assert param.grad is grad
            assert torch.equal(grad, values)
            assert grad._version == version


@interpreted
def test_normalizing_may_change_between_steps(device: torch.device) -> None:
    ours, stock, _ = twins(LAMB, make_params([(), (129,)], device), {"lr": 0.01})
    for step, (normalize, limit) in enumerate([(False, None), (True, None), (False, 0.5), (True, None), (False, None)]):
        ours.normalize_grads, ours.max_grad_norm = normalize, limit
        clipped_step(ours, stock, step, scale=0.1)
        assert (ours.grad_norm is None) == (not normalize and limit is None)
    assert_same(ours, stock)


@interpreted
@pytest.mark.parametrize("duplicate", [_deepcopy, _pickle, _torch_save], ids=lambda f: f.__name__.strip("_"))
def test_normalizing_survives(duplicate: Callable, device: torch.device) -> None:
    ours, stock, _ = twins(LAMB, make_params([(3,), (130,)], device), {"lr": 0.01}, normalize_grads=True)
    clipped_step(ours, stock, 0)
    twin = duplicate(ours)
    assert twin.normalize_grads is True
    clipped_step(twin, stock, 1)
    assert_same(twin, stock)


def test_normalizing_and_clipping() -> None:
    with pytest.raises(ValueError) as error:
        optimx.LAMB(make_params([(3,)]), normalize_grads=True, max_grad_norm=1.0)
    assert str(error.value) == "max_grad_norm should be None with normalize_grads=True but is: 1.0"
