"""Formulas compiled into kernels of torch's C++ compiler, inductor, on request.

A formula is a dozen operators, each of which reads and writes its pieces; compiled it is one pass over whole tensors. A
kernel is made for each rule, variant, dtypes and way through the branches of the formula; lengths and hyperparameters
are data. It is called as the C function that it is: torch's own way to it takes longer than the update of a small
tensor.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Sequence
from functools import cache, lru_cache
from operator import itemgetter
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _compat
from ..layout import flat
from ..rule import Row, UpdateRule
from . import traced
from .traced import MOST_NUMBERS, Kinds, Traced

#: Elements of a row: those of all roles stay in the first cache (measured from 2**8 to 2**14).
ROW = 1 << 9
#: Elements of the tensors a formula is traced with; rows, and elements of a row: sizes by which no others are known.
LENGTH, N_ROWS, OF_ROW = 4111, 67, 521
#: Blocks of rows, likewise; and rows of a block, whose columns are summed while they are in the second cache.
N_BLOCKS, BLOCK = 71, 16

_Numbers = ctypes.c_double * MOST_NUMBERS
_lock = RLock()
_asked = os.environ.get("OPTIMX_COMPILE", "0") == "1"


def compile_formulas(enabled: bool = True) -> None:
    """Let optimizers update CPU tensors with compiled kernels where torch has no fused operator of its own.

    This holds for all optimizers, from their next step on. The environment variable ``OPTIMX_COMPILE=1`` asks for the
    same; then a missing compiler is a warning, and steps go on as without it. A kernel takes seconds to compile, once:
    it is kept in ``$TORCHINDUCTOR_CACHE_DIR/optimx``, or in ``optimx`` in the user's directory of caches.

    Args:
        enabled: False: steps go back to torch's operators.

    Raises:
        RuntimeError: There is no C++ compiler (``CXX``, or the system's).
    """
    global _asked
    if enabled and not _compiler():
        raise RuntimeError(_NO_COMPILER)
    _asked = bool(enabled)


_NO_COMPILER = "formulas are compiled with a C++ compiler, and there is none: set CXX, or put one on PATH"


def _compiler() -> str | None:
    name = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX", name))


@cache
def _warn_of_compiler() -> None:
    warnings.warn(f"OPTIMX_COMPILE=1 has no effect: {_NO_COMPILER}", RuntimeWarning, stacklevel=2)


def is_asked() -> bool:
    """Whether formulas are to be compiled, and can be."""
    if not _asked:
        return False
    if not _compiler():
        _warn_of_compiler()
        return False
    return True


class Kernel:
    """A compiled way through a formula.

    Args:
        way: Which one.
        calls: What to call, see :class:`optimx._compat.KernelCall`.
        n_tensors: The vector of numbers, the tensors of the way, and its outputs.
        sizes: Of the tensors it was traced with.
    """

    def __init__(self, way: Traced, calls: Sequence[_compat.KernelCall], n_tensors: int, sizes: Sequence[int]) -> None:
        self.suits, self._numbers = way.suits, way.numbers
        arguments = {argument for call in calls for argument in call.arguments}
        own = sorted(argument for argument in arguments if argument[0] == "scratch")
        self._scratch = ctypes.c_byte * (len(own) * _compat.LARGEST_SCRATCH)
        self._offsets = [i * _compat.LARGEST_SCRATCH for i in range(len(own))]
        order = [*[("tensor", i) for i in range(n_tensors)], *[("size", size) for size in sizes], *own]
        where = {argument: i for i, argument in enumerate(order)}
        self._calls = []
        for call in calls:
            function = ctypes.CDLL(call.library).kernel
            function.restype = None
            function.argtypes = [ctypes.c_int64 if kind == "size" else ctypes.c_void_p for kind, _ in call.arguments]
            self._calls.append((function, itemgetter(*[where[argument] for argument in call.arguments])))

    def __call__(self, row: Row, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
        """Update tensors whose dimensions have these sizes, in place; outputs come after them, and are written."""
        numbers = _Numbers(*self._numbers(row))
        places = [ctypes.addressof(numbers), *map(Tensor.data_ptr, tensors), *sizes]
        if self._offsets:
            scratch = self._scratch()
            begin = ctypes.addressof(scratch)
            places += [begin + offset for offset in self._offsets]
        for function, pick in self._calls:
            function(*pick(places))


class Formula:
    """A step of tensors of some dtypes, which is compiled for each way through its branches.

    Args:
        name: Of the algorithm.
        step: Called with a row and tensors, see :class:`~.traced.Traced`.
        dtype: To compute in.
        kinds: Dtypes and shapes of the tensors.
        sizes: The sizes among these that may be others.
    """

    def __init__(
        self, name: str, step: Callable[..., Any], dtype: torch.dtype, kinds: Kinds, sizes: Sequence[int] = (LENGTH,)
    ) -> None:
        self._name, self._step, self._dtype, self._kinds, self._sizes = name, step, dtype, kinds, sizes
        self._kernels: list[Kernel] = []
        self._is_refused = False

    def kernel(self, row: Row) -> Kernel | None:
        """The kernel of a row; None where there is none yet."""
        return next((kernel for kernel in self._kernels if kernel.suits(row)), None)

    def is_ready(self, row: Row) -> bool:
        """Whether there is a kernel of a row, which is made first; where that fails, a warning says why."""
        if self.kernel(row) is None and not self._is_refused:
            with _lock:
                try:
                    self._kernels.append(self._made(row))
                except Exception as error:
                    self._is_refused = True
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
                    warnings.warn(f"{self._name} goes on without a compiled formula: {reason}", RuntimeWarning, 2)
        return not self._is_refused

    def _made(self, row: Row) -> Kernel:
        way = Traced(self._step, row, self._dtype, self._kinds)
        store = Store(way.text)
        n_tensors = 1 + len(self._kinds) + way.n_outputs
        try:
            return Kernel(way, store.read(), n_tensors, self._sizes)
        except (OSError, ValueError, KeyError):
            # what torch's compiler deprecates of torch is not the user's concern
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                calls = way.compile()
        store.write(calls)
        return Kernel(way, calls, n_tensors, self._sizes)

    def __call__(self, row: Row, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
        """Update tensors and write outputs, after :meth:`is_ready`."""
        kernel = self.kernel(row)
        assert kernel is not None
        kernel(row, tensors, sizes)


@cache
def _environment() -> str:
    """What kernels depend on besides the formula."""
    sources = [Path(module.__file__ or "").read_bytes() for module in (traced, _compat)]
    found = hashlib.sha256(b"".join(sources)).hexdigest()
    return f"{torch.__version__} {_compat.cpu_features()} {sys.platform} {found}"


class Store:
    """Kernels on disk, for other processes.

    Args:
        text: Tells the formula from others.
    """

    def __init__(self, text: str) -> None:
        self._key = hashlib.sha256(f"{_environment()}\n{text}".encode()).hexdigest()[:40]
        torchs = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        users = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self._folder = Path(torchs or users) / "optimx"

    def read(self) -> list[_compat.KernelCall]:
        """What to call. Raises OSError, ValueError or KeyError where it is not there."""
        calls = json.loads((self._folder / f"{self._key}.json").read_text())
        return [
            _compat.KernelCall(str(self._folder / name), [(kind, i) for kind, i in arguments])
            for name, arguments in calls
        ]

    def write(self, calls: Sequence[_compat.KernelCall]) -> None:
        """Keep kernels, if the folder can be written."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            kept = []
            for i, call in enumerate(calls):
                name = f"{self._key}-{i}.so"
                self._put(name, Path(call.library).read_bytes())
                kept.append((name, call.arguments))
            self._put(f"{self._key}.json", json.dumps(kept).encode())
        except OSError:
            pass

    def _put(self, name: str, content: bytes) -> None:
        """Write a file at once: other processes may look for it."""
        with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
            file.write(content)
        os.replace(file.name, self._folder / name)


Roles = tuple[torch.dtype, ...]


def _kinds(dtypes: Roles, shape: tuple[int, ...]) -> Kinds:
    return [(kind, shape) for kind in dtypes]


@lru_cache(maxsize=512)
def elementwise(
    rule: UpdateRule, variant: Any, make_row: Callable[..., Any], dtype: torch.dtype, roles: Roles
) -> Formula:
    """The formula of a rule's variant: of parameter, gradient and states, with the gradient's factor after the row.

    Args:
        rule, variant: Whose.
        make_row: Makes the row of its numbers.
        dtype: To compute in.
        roles: Dtypes of the tensors.
    """

    def step(numbers: Sequence[Any], *stored: Tensor) -> None:
        *row, factor = numbers
        p, g, *states = (tensor.to(dtype) for tensor in stored)
        rule.formula(variant, make_row(row), p, g * factor, states, _scratch(rule, p))
        _store([stored[0], *stored[2:]], [p, *states])

    return Formula(type(rule).__name__, step, dtype, _kinds(roles, (LENGTH,)))


def _scratch(rule: UpdateRule, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(like) for _ in range(rule.temporaries))


def _store(stored: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(stored, values, strict=True):
        if tensor is not value:
            tensor.copy_(value)


@lru_cache(maxsize=512)
def measured(
    rule: UpdateRule, variant: Any, make_row: Callable[..., Any], dtype: torch.dtype, roles: Roles, moves_first: bool
) -> tuple[Formula, Formula]:
    """The two walks of a rule's variant: one measures, and one takes the step.

    Two numbers come after the row: the gradient's factor, and the step's. The first walk sees elements in rows, and
    gives the squared lengths of each row: few sums of many elements would be less exact, and depend on the number of
    threads. Behind its tensors comes a column of ones: states that are multiplied by it are written row by row, while
    they are in the cache, and not in a loop of their own.

    Args:
        rule, variant, make_row, dtype, roles: See :func:`elementwise`.
        moves_first: The first one moves the states.
    """

    def measure(numbers: Sequence[Any], *tensors: Tensor) -> tuple[Tensor, ...]:
        *row, factor, _ = numbers
        *stored, ones = tensors
        p, g, *states = (tensor.to(dtype) for tensor in stored)
        if not moves_first:
            states = [state.clone() for state in states]
        _, *found = rule.advance(variant, make_row(row), p, g * factor, states, _scratch(rule, p))
        if moves_first:
            _store(stored[2:], [state * ones for state in states])
        return tuple(torch.zeros_like(p[:, 0]) if of is None else of.square().sum(-1) for of in found)

    def take(numbers: Sequence[Any], *stored: Tensor) -> None:
        *row, factor, size = numbers
        p, g, *states = (tensor.to(dtype) for tensor in stored)
        row, scratch = make_row(row), _scratch(rule, p)
        if moves_first:
            step = rule.step_of_moved(variant, row, p, states, scratch)
        else:
            step, *_ = rule.advance(variant, row, p, g * factor, states, scratch)
        rule.take(variant, row, p, step, size, scratch)
        _store([stored[0], *stored[2:]], [p, *states])

    name = type(rule).__name__
    in_rows = [*_kinds(roles, (N_ROWS, OF_ROW)), (dtype, (N_ROWS, 1))]
    first = Formula(name, measure, dtype, in_rows, (N_ROWS, OF_ROW))
    return first, Formula(name, take, dtype, _kinds(roles, (LENGTH,)))


class _Compiled:
    """Compiled formulas of a bucket.

    Args:
        rule, variant: The bucket's.
        dtype: To compute in.
        roles: Dtypes of parameter, gradient and states, as they are stored.
    """

    def __init__(self, rule: UpdateRule, variant: Any, dtype: torch.dtype, roles: Roles) -> None:
        self._of = rule, variant
        self._dtype = dtype
        self._roles = {True: roles, False: (dtype,) * len(roles)}

    def _key(self, row: Row, stored: bool) -> tuple[Any, ...]:
        """What :func:`elementwise` takes, for tensors as they are stored, or in the dtype to compute in."""
        return *self._of, getattr(type(row), "_make", tuple), self._dtype, self._roles[stored]


class CompiledUpdates(_Compiled):
    """The compiled formula of a bucket's updates."""

    def is_ready(self, rows: Sequence[Row], kinds: Collection[bool]) -> bool:
        """Whether there are kernels of rows, for tensors as they are stored (True) or in the dtype to compute in."""
        return all(elementwise(*self._key(row, stored)).is_ready((*row, 1.0)) for row in rows for stored in kinds)

    def update(self, row: Row, tensors: Sequence[Tensor], factor: float, *, stored: bool) -> None:
        """Update parameter and states by a gradient times ``factor``: tensors of as many elements, without gaps."""
        elementwise(*self._key(row, stored))((*row, factor), tensors, (tensors[0].numel(),))


class CompiledWalks(_Compiled):
    """The compiled walks of a bucket whose updates are measured.

    Args:
        moves_first: See :func:`measured`.
    """

    def __init__(self, *args: Any, moves_first: bool) -> None:
        super().__init__(*args)
        self._moves_first = moves_first

    def _walks(self, row: Row, stored: bool) -> tuple[Formula, Formula]:
        return measured(*self._key(row, stored), self._moves_first)

    def is_ready(self, rows: Sequence[Row], stored: bool) -> bool:
        """Whether there are kernels of rows, see :meth:`CompiledUpdates.is_ready`."""
        return all(walk.is_ready((*row, 1.0, 1.0)) for row in rows for walk in self._walks(row, stored))

    def measure(self, row: Row, tensors: Sequence[Tensor], factor: float, *, stored: bool) -> Tensor:
        """The two squared lengths, float64 ``[2]``; states move, or are about to."""
        walk, _ = self._walks(row, stored)
        numel = tensors[0].numel()
        n_rows, left = divmod(numel, ROW)
        sums = torch.empty(2, n_rows + bool(left), dtype=self._dtype, device="cpu")
        ones = torch.ones(sums.shape[1], dtype=self._dtype, device="cpu")
        if n_rows:
            walk((*row, factor, 1.0), (*tensors, ones, *sums), (n_rows, ROW))
        if left:
            ends = [flat(tensor)[n_rows * ROW :] for tensor in tensors]
            walk((*row, factor, 1.0), (*ends, ones, *sums[:, n_rows:]), (1, left))
        return sums.sum(-1, dtype=torch.float64)

    def take(self, row: Row, tensors: Sequence[Tensor], factor: float, size: float, *, stored: bool) -> None:
        """Take the step times ``size``."""
        _, walk = self._walks(row, stored)
        walk((*row, factor, size), tensors, (tensors[0].numel(),))


class Matrices(NamedTuple):
    """The walks of :class:`~.factored.Stack` over a matrix.

    The first takes gradients, in blocks of rows, and gives the sums of squares of rows, and those of columns of each
    block; with ones, a number a block, for the reason of :func:`measured`. The others take parameter, gradient, the
    roots ``r`` of rows and ``c`` of columns, and the first moment, if there is one: two give sums of squares of rows,
    of the update, or of update and parameter; the last one takes the step. Their row is
    ``(eps, factor, decay, size, beta1_c)``.
    """

    measure: Formula
    lengths: Formula
    scaled_lengths: Formula
    take: Formula


@lru_cache(maxsize=64)
def factored(dtype: torch.dtype, roles: Roles, separable: bool) -> Matrices:
    """Compiled walks over matrices.

    Args:
        dtype: To compute in.
        roles: Dtypes of parameter, gradient and first moment, as they are stored.
        separable: See :class:`~.factored.Divisor`.
    """

    def measure(numbers: Sequence[Any], grad: Tensor, ones: Tensor) -> tuple[Tensor, ...]:
        g = grad.to(dtype)
        return (g * ones).square().sum(-1), g.square().sum(-2)

    def direction(numbers: Sequence[Any], grad: Tensor, r: Tensor, c: Tensor) -> Tensor:
        eps, factor, *_ = numbers
        if separable:
            return grad.to(dtype) * c * r
        return grad.to(dtype) / (r * c).clamp_(min=eps) * factor

    def lengths(numbers: Sequence[Any], param: Tensor, grad: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return (direction(numbers, grad, r, c).square().sum(-1),)

    def scaled_lengths(numbers: Sequence[Any], param: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return *lengths(numbers, param, *others), param.to(dtype).square().sum(-1)

    def take(numbers: Sequence[Any], param: Tensor, grad: Tensor, r: Tensor, c: Tensor, *moments: Tensor) -> None:
        _, _, decay, size, beta1_c = numbers
        u, p = direction(numbers, grad, r, c) * size, param.to(dtype) * decay
        for moment in moments:
            u = torch.lerp(moment.to(dtype), u, beta1_c)
            moment.copy_(u)
        param.copy_(p - u)

    sizes = N_ROWS, OF_ROW
    blocks = [(roles[1], (N_BLOCKS, *sizes)), (dtype, (N_BLOCKS, 1, 1))]
    both = [*_kinds(roles[:2], sizes), (dtype, (N_ROWS, 1)), (dtype, (OF_ROW,))]
    return Matrices(
        Formula("Adafactor", measure, dtype, blocks, (N_BLOCKS, *sizes)),
        Formula("Adafactor", lengths, dtype, both, sizes),
        Formula("Adafactor", scaled_lengths, dtype, both, sizes),
        Formula("Adafactor", take, dtype, [*both, *_kinds(roles[2:], sizes)], sizes),
    )


class CompiledMatrices:
    """The compiled walks of a bucket of matrices, see :func:`factored`.

    Args:
        dtype: To compute in.
        roles: Dtypes of parameter, gradient and first moment, if there is one.
    """

    def __init__(self, dtype: torch.dtype, roles: Roles) -> None:
        self._dtype, self._roles = dtype, roles

    def is_ready(self, rows: Collection[tuple[bool, float]]) -> bool:
        """Whether there are kernels; of each row tells whether squares of parameters are of use, and ``beta1_c``."""
        return all(self._has_kernels(*row, separable) for row in rows for separable in (True, False))

    def _has_kernels(self, scaled: bool, beta1_c: float, separable: bool) -> bool:
        walks = factored(self._dtype, self._roles, separable)
        used = walks.measure, walks.scaled_lengths if scaled else walks.lengths, walks.take
        return all(walk.is_ready((1.0, 1.0, 1.0, 1.0, beta1_c)) for walk in used)

    def measure(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of squares of a matrix' rows, and of its columns."""
        walk, row = factored(self._dtype, self._roles, True).measure, (1.0,) * 5
        n_rows, n_columns = grad.shape
        n_blocks, left = divmod(n_rows, BLOCK)
        of_rows = torch.empty(n_rows, dtype=self._dtype, device="cpu")
        of_columns = torch.empty(n_blocks + bool(left), n_columns, dtype=self._dtype, device="cpu")
        ones = torch.ones(len(of_columns), dtype=self._dtype, device="cpu")
        if n_blocks:
            walk(row, (grad, ones, of_rows, of_columns), (n_blocks, BLOCK, n_columns))
        if left:
            first = n_rows - left
            walk(row, (grad[first:], ones, of_rows[first:], of_columns[n_blocks:]), (1, left, n_columns))
        return of_rows, of_columns.sum(0)

    def lengths(self, row: Row, tensors: Sequence[Tensor], *, scaled: bool, separable: bool) -> Tensor:
        """Squared lengths of parameter (0 if not ``scaled``) and update, float64 ``[2]``."""
        walks = factored(self._dtype, self._roles, separable)
        n_rows, n_columns = tensors[0].shape
        sums = torch.zeros(2, n_rows, dtype=self._dtype, device="cpu")
        walk = walks.scaled_lengths if scaled else walks.lengths
        walk(row, (*tensors, sums[1], *sums[: int(scaled)]), (n_rows, n_columns))
        return sums.sum(-1, dtype=torch.float64)

    def take(self, row: Row, tensors: Sequence[Tensor], *, separable: bool) -> None:
        """Take the step."""
        factored(self._dtype, self._roles, separable).take(row, tensors, (*tensors[0].shape,))
