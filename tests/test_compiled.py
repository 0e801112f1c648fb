"""Compiled formulas: the numbers of those that are not, whatever is compiled and whatever changes."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import optimx
from optimx import _compat
from optimx._engine.cpu import compiled
from optimx._engine.cpu.traced import MOST_NUMBERS, Number, Trace, Traced
from optimx._engine.rule import UpdateRule
from tests.cases import BY_NAME, VARIANTS, Case, Variant, assert_same, make_params, set_grads, train
from tests.engine import each, params_of, pick

pytestmark = pytest.mark.skipif(compiled._compiler() is None, reason="there is no C++ compiler")

#: Large ones, also of an odd length, and batches of small ones.
SHAPES = [(63, 71), (4097,), (), (1,), (0,), (5, 3), (129,)]
#: One rounding a step, where the sum of several terms is small.
ONE_ROUNDING = {"rtol": 1e-6, "atol": 1e-6}


def _is_compiled(variant: Variant) -> bool:
    rule, (chosen, _) = variant.case.cls.rule, variant._of_group()
    has_operator = rule.operator(chosen, torch.float32) is not None
    return variant.is_formula and not has_operator and rule.walk_of(chosen) == "elementwise"


ELEMENTWISE = [*filter(_is_compiled, VARIANTS)]


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.fixture(autouse=True)
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_asked", True)
    monkeypatch.setattr(warnings, "filters", [("error", None, RuntimeWarning, None, 0), *warnings.filters])


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Calls a function while nothing is compiled."""

    def call(function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "_asked", False)
            function(*args, **kwargs)

    return call


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of elements of each launch."""
    found: list[int] = []
    call = compiled.Kernel.__call__

    def recorded(self, row, tensors, sizes):
        found.append(sizes[0])
        return call(self, row, tensors, sizes)

    monkeypatch.setattr(compiled.Kernel, "__call__", recorded)
    return found


def twins(case: Case, dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[Optimizer, Optimizer]:
    return tuple(case.cls(make_params(SHAPES, dtype=dtype), **kwargs) for _ in range(2))  # type: ignore[return-value]


@each(ELEMENTWISE, ())
def test_trace(case: Case, kwargs: dict[str, Any]) -> None:
    """What is traced, run by torch's operators, is the formula: for the row of another step, too."""
    rule: UpdateRule = case.cls.rule
    (group,) = case.cls([Parameter(torch.zeros(3))], **kwargs).param_groups
    variant = rule.group_variant(group)
    values = tuple(map(float, rule.values_for(rule.values(group), torch.float32, False)))
    row, scalars = rule.prepare(values, tuple(rule.new_scalar(name, group) for name in rule.scalars))
    later = row
    for _ in range(9):
        later, scalars = rule.prepare(values, scalars)
    n_roles = 2 + len(rule.state_names(variant))

    def step(numbers, p, g, *states):
        make_row = getattr(type(row), "_make", tuple)
        scratch = tuple(torch.full_like(p, torch.nan) for _ in range(rule.temporaries))
        rule.formula(variant, make_row(numbers), p, g, states, scratch)

    for traced_row in (row, later):
        way = Traced(step, traced_row, torch.float32, [(torch.float32, (9,))] * n_roles)
        for used in (row, later):
            if not way.suits(used):
                continue
            generator = torch.Generator().manual_seed(3)
            tensors = [torch.rand(9, generator=generator) for _ in range(n_roles)]
            # averages of squares are above squares of averages
            tensors[2] += 1.0
            expected = [tensor.clone() for tensor in tensors]
            step(used, *expected)
            vector = torch.full((MOST_NUMBERS,), torch.nan, dtype=torch.float64)
            vector[: len(way.numbers(used))] = torch.tensor(way.numbers(used), dtype=torch.float64)
            way._run(vector, *tensors)
            torch.testing.assert_close(tensors, expected, **ONE_ROUNDING)


@each(pick("rmsprop-default", "nadam-decoupled", "adamax-default", "lion-decay", "radam-default"), ())
def test_numbers(case: Case, kwargs: dict[str, Any], plainly, launches: list[int]) -> None:
    ours, plain = twins(case, **kwargs)
    for step in range(8):
        train([ours], 1, first=step)
        plainly(train, [plain], 1, first=step)
    assert_same(ours, plain, ONE_ROUNDING)
    n_small = sum(p.numel() for p in params_of(ours) if p.numel() <= 4096)
    assert launches == [n_small, 63 * 71, 4097] * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each(pick("lamb-default", "adamw-clipped_cautious"), ())
def test_measured(case: Case, kwargs: dict[str, Any], dtype: torch.dtype, plainly) -> None:
    """Updates whose size follows from all of a tensor: of whole rows of elements, and what is left of them."""
    shapes = [(8 * compiled.ROW,), (8 * compiled.ROW + 1,), (63, 71), (5,)]
    ours, plain = (case.cls(make_params(shapes, dtype=dtype), **kwargs, max_grad_norm=0.5) for _ in range(2))
    train([ours], 3)
    plainly(train, [plain], 3)
    assert_same(ours, plain, ONE_ROUNDING if dtype is torch.float32 else {"rtol": 2**-7, "atol": 1e-6})


@each(pick("adafactor-default", "adafactor-eps"), (), beta1=0.9)
def test_matrices(case: Case, kwargs: dict[str, Any], plainly) -> None:
    """Rows in whole blocks and what is left of them; columns that are contiguous; small ones and vectors as before."""
    shapes = [(compiled.BLOCK * 2, 65), (compiled.BLOCK + 1, 64), (7, 5000), (9,), (5, 4), (5, 4)]

    def make() -> Optimizer:
        params = make_params(shapes)
        params.append(Parameter(make_params([(300, 200)])[0].detach().t()))
        return case.cls(params, **kwargs)

    ours, plain = make(), make()
    train([ours], 3)
    plainly(train, [plain], 3)
    # norms are sums of float32, in another order
    assert_same(ours, plain, {"rtol": 1e-5, "atol": 1e-6})


@each(pick("rmsprop-default"), ())
def test_half_precision(case: Case, kwargs: dict[str, Any], plainly) -> None:
    """Tensors of 16 bits are computed in float32 and rounded once."""
    ours, plain = twins(case, torch.bfloat16, **kwargs)
    train([ours], 3)
    plainly(train, [plain], 3)
    # where a sum of float32 lies between two numbers of 16 bits, one rounding decides
    assert_same(ours, plain, {"rtol": 2**-7, "atol": 1e-6})


def test_schedule_and_branches(plainly) -> None:
    """Hyperparameters are data; another branch is another kernel."""
    ours, plain = twins(BY_NAME["rmsprop"])
    n_kernels = len(_kernels(ours))
    for step in range(4):
        for optimizer in (ours, plain):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (1 + step)
                group["weight_decay"] = 0.1 * (step > 1)
        train([ours], 1, first=step)
        plainly(train, [plain], 1, first=step)
    # of which one was there before, if other tests came first
    assert n_kernels <= 1
    assert len(_kernels(ours)) == 2
    assert_same(ours, plain, ONE_ROUNDING)


def _kernels(optimizer: Optimizer) -> list[compiled.Kernel]:
    rule: Any = optimizer.rule  # type: ignore[attr-defined]
    row, _ = rule.prepare(rule.values(optimizer.param_groups[0]), (0.0,))
    variant = rule.group_variant(optimizer.param_groups[0])
    n = 2 + len(rule.state_names(variant))
    return compiled.elementwise(rule, variant, type(row)._make, torch.float32, (torch.float32,) * n)._kernels


def test_groups_and_clipping(plainly) -> None:
    """Rows that differ, gradients times a factor, and none at all."""

    def make() -> Optimizer:
        params = make_params(SHAPES)
        return optimx.RMSprop([{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.2}], max_grad_norm=0.5)

    ours, plain = make(), make()
    train([ours], 3, skip=[1])
    plainly(train, [plain], 3, skip=[1])
    assert_same(ours, plain, ONE_ROUNDING)


@pytest.mark.parametrize("kept", [{"state_dtype": "8bit"}, {"param_rounding": "stochastic"}], ids=["codes", "noise"])
def test_formats(kept: dict[str, Any], plainly) -> None:
    """What is decoded goes through the kernel, and is encoded."""
    dtype = torch.bfloat16 if "param_rounding" in kept else torch.float32
    params = [[Parameter(p.detach().to(dtype)) for p in make_params([(64, 128), (256,)])] for _ in range(2)]
    ours, plain = (optimx.RMSprop(p, **kept) for p in params)
    train([ours], 1)
    plainly(train, [plain], 1)
    for a, b in zip(*params, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)


def test_watched(plainly) -> None:
    """A step that is measured goes piece by piece, and through the kernel."""
    norms = []
    for call in (lambda function, *args: function(*args), plainly):
        optimizer = optimx.RMSprop(make_params(SHAPES))
        with optimx.watch(optimizer, every=1) as watcher:
            call(train, [optimizer], 2)
            norms.append([p.detach().clone() for p in params_of(optimizer)])
        del watcher
    torch.testing.assert_close(*norms, **ONE_ROUNDING)


@pytest.mark.parametrize("name", ["rmsprop", "nadam", "lamb", "adafactor"])
def test_watching_changes_no_bit(name: str) -> None:
    watched, plain = twins(BY_NAME[name])
    with optimx.watch(watched, every=1):
        train([watched, plain], 4)
    assert all(map(torch.equal, params_of(watched), params_of(plain)))


def test_small_ones_that_are_not_contiguous(plainly) -> None:
    """Which no batch takes."""
    ours, plain = (
        optimx.LAMB([Parameter(make_params([shape])[0].detach().mT) for shape in ((7, 5), (80, 70))]) for _ in range(2)
    )
    train([ours], 3)
    plainly(train, [plain], 3)
    assert_same(ours, plain, ONE_ROUNDING)


@pytest.mark.parametrize("name", ["rmsprop", "lamb", "adafactor"])
def test_repeats_bit_by_bit(name: str) -> None:
    a, b = twins(BY_NAME[name])
    train([a, b], 4)
    assert all(map(torch.equal, params_of(a), params_of(b)))


def test_copies_and_pickles() -> None:
    optimizer = optimx.RMSprop(make_params(SHAPES))
    train([optimizer], 2)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        first = copy.deepcopy(optimizer)
        train([first, twin], 2, first=2)
        assert all(map(torch.equal, params_of(first), params_of(twin)))


class TooClever(UpdateRule):
    """A rule whose formula wants a hyperparameter as a number of Python's."""

    module = "tests.none"
    scalars = ()

    def values(self, group):
        return (group["lr"],)

    def state_names(self, variant):
        return ()

    def prepare(self, values, scalars):
        return (1.0, *values), ()

    def formula(self, variant, row, p, g, states, scratch):
        p.add_(g, alpha=-float(row[1]))


def test_what_does_not_compile(monkeypatch: pytest.MonkeyPatch, launches: list[int]) -> None:
    """The step goes on as without compilation, and a warning tells why."""

    class Own(optimx.MultiTensorStep, optimx.FormulaLoop):
        rule = TooClever()

        def __init__(self, params, lr=0.1):
            super().__init__(params, {"lr": lr, "maximize": False})

    params = make_params([(5000,)])
    before = params[0].detach().clone()
    optimizer = Own(params)
    set_grads(params, 0)
    with pytest.warns(RuntimeWarning, match="TooClever goes on without a compiled formula: TypeError: .*float"):
        optimizer.step()
    torch.testing.assert_close(params[0], before - 0.1 * params[0].grad)
    optimizer.step()
    assert not launches


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, launches: list[int]) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="and there is none"):
        optimx.compile_formulas()
    compiled._warn_of_compiler.cache_clear()
    optimizer = optimx.RMSprop(make_params(SHAPES))
    with pytest.warns(RuntimeWarning, match="OPTIMX_COMPILE=1 has no effect"):
        train([optimizer], 1)
    train([optimizer], 1, first=1)
    assert not launches
    optimx.compile_formulas(False)
    assert not compiled.is_asked()


def test_compiler_of_torch_fails(monkeypatch: pytest.MonkeyPatch, tmp_path, plainly) -> None:
    """Names of torch that are not what they were are a reason to go on without."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_compat, "compiled", lambda *args: _compat.no_such_name)
    compiled.elementwise.cache_clear()
    ours, plain = twins(BY_NAME["adamax"])
    with pytest.warns(RuntimeWarning, match="Adamax.* goes on without a compiled formula: AttributeError"):
        train([ours], 2)
    plainly(train, [plain], 2)
    assert_same(ours, plain, {"rtol": 0, "atol": 0})
    compiled.elementwise.cache_clear()


def test_kept_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process compiles nothing that is there, and what was cut off anew."""
    a, b = twins(BY_NAME["rmsprop"])
    train([a], 2)
    compiled.elementwise.cache_clear()
    monkeypatch.setattr(_compat, "compiled", None)
    train([b], 2)
    assert all(map(torch.equal, params_of(a), params_of(b)))


def test_a_forked_process_steps() -> None:
    """With one thread, as workers of a DataLoader have: more would wait for threads of the parent."""
    code = """if True:
        import os, torch, optimx
        optimx.compile_formulas()
        def train(n):
            p = torch.nn.Parameter(torch.ones(5000)); p.grad = torch.ones(5000)
            optimizer = optimx.RMSprop([p])
            for _ in range(n):
                optimizer.step()
            return p.detach()
        expected = train(3)
        if (pid := os.fork()) == 0:
            torch.set_num_threads(1)
            os._exit(0 if torch.equal(train(3), expected) else 1)
        raise SystemExit(os.waitpid(pid, 0)[1])
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=os.environ)


def test_threads() -> None:
    """As many as torch has at the time, with the same numbers."""
    a, b = twins(BY_NAME["rmsprop"])
    n = torch.get_num_threads()
    train([a], 2)
    try:
        torch.set_num_threads(1 if n > 1 else 2)
        train([b], 2)
    finally:
        torch.set_num_threads(n)
    assert all(map(torch.equal, params_of(a), params_of(b)))


def test_denormals_stay() -> None:
    """A library that is loaded does not let small numbers be 0."""
    train([optimx.RMSprop(make_params(SHAPES))], 1)
    assert torch.tensor([1e-40]).mul(0.5).item() != 0.0


def test_numbers_tell_what_they_are_of() -> None:
    trace = Trace((2.0, 0.25), torch.float32)
    a, b = trace.numbers
    made = -(1.0 - a) / b**2 + 3 * a - (b + 1) * (2 / a) + torch.sym_sqrt(b) - abs(-a)
    assert isinstance(made, Number)
    r = (2.0, 0.25)
    expected = -(1.0 - 2.0) / 0.25**2 + 6.0 - 1.25 + 0.5 - 2.0
    assert eval(made.source, {"r": r, "math": math}) == made._value == expected
    assert [a > 1.0, b >= 1.0, bool(b), b != 0.5] == [True, False, True, True]
    assert trace.decisions == {
        "(r[0] > 1.0)": True, "(r[1] >= 1.0)": False, "(r[1] != 0.0)": True, "(r[1] != 0.5)": True
    }  # fmt: skip
    with pytest.raises(TypeError):
        float(a)  # type: ignore[arg-type]


def test_many_numbers() -> None:
    def step(numbers, p):
        for i in range(MOST_NUMBERS + 1):
            p.mul_(numbers[0] + i)

    with pytest.raises(NotImplementedError, match=f"at most {MOST_NUMBERS}"):
        Traced(step, (1.0,), torch.float32, [(torch.float32, (5,))])
