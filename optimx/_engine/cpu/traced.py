"""Formulas traced into graphs, in which hyperparameters are data.

A formula is traced with numbers that stand for the entries of its row. What it computes of them, and what it asks of
them, is written down: before a launch the first is computed on the host, and the second tells whether the graph is
the one of a row.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ... import _compat
from ..rule import Row

#: Numbers of a row, or made of it, that a graph can use.
MOST_NUMBERS = 32


class Trace:
    """What is found out while a formula is traced.

    Args:
        row: Of one step.
        dtype: To compute in.

    Attributes:
        sources: What the graph uses, as expressions of the row ``r``: a place in the vector of numbers each.
        decisions: What the formula asked of the row, and the answers.
    """

    def __init__(self, row: Row, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.numbers = [Number(self, f"r[{i}]", float(value)) for i, value in enumerate(row)]
        self.sources: dict[str, Tensor] = {}
        self.decisions: dict[str, bool] = {}
        #: The vector of numbers, float64, while the formula runs.
        self.vector = torch.empty(0, device="cpu")

    def begin(self, vector: Tensor) -> None:
        """The formula runs, with numbers out of a vector."""
        self.vector = vector
        self.sources.clear()

    def tensor(self, number: Number) -> Tensor:
        """A number as a tensor without dimensions, in the dtype to compute in."""
        if number.source not in self.sources:
            if len(self.sources) == MOST_NUMBERS:
                raise NotImplementedError(f"a formula should use at most {MOST_NUMBERS} numbers of its row")
            self.sources[number.source] = self.vector[len(self.sources)].to(self.dtype)
        return self.sources[number.source]


class Number:
    """A hyperparameter of a formula that is traced, or what the formula makes of some."""

    def __init__(self, trace: Trace, source: str, value: float) -> None:
        self._trace = trace
        self.source = source
        self._value = value

    def _of(self, form: str, function: Callable[..., float], *operands: Any) -> Any:
        if not all(isinstance(operand, (Number, int, float)) for operand in operands):
            return NotImplemented
        sources = [operand.source if isinstance(operand, Number) else repr(operand) for operand in operands]
        values = [operand._value if isinstance(operand, Number) else operand for operand in operands]
        return Number(self._trace, f"({form.format(*sources)})", function(*values))

    def _ask(self, form: str, compare: Callable[..., bool], *operands: Any) -> Any:
        asked = self._of(form, compare, *operands)
        if asked is NotImplemented:
            return asked
        return self._trace.decisions.setdefault(asked.source, bool(asked._value))

    def __add__(self, other: Any) -> Any:
        return self._of("{} + {}", operator.add, self, other)

    def __radd__(self, other: Any) -> Any:
        return self._of("{} + {}", operator.add, other, self)

    def __sub__(self, other: Any) -> Any:
        return self._of("{} - {}", operator.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return self._of("{} - {}", operator.sub, other, self)

    def __mul__(self, other: Any) -> Any:
        return self._of("{} * {}", operator.mul, self, other)

    def __rmul__(self, other: Any) -> Any:
        return self._of("{} * {}", operator.mul, other, self)

    def __truediv__(self, other: Any) -> Any:
        return self._of("{} / {}", operator.truediv, self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._of("{} / {}", operator.truediv, other, self)

    def __pow__(self, other: Any) -> Any:
        return self._of("{} ** {}", operator.pow, self, other)

    def __rpow__(self, other: Any) -> Any:
        return self._of("{} ** {}", operator.pow, other, self)

    def __neg__(self) -> Any:
        return self._of("-{}", operator.neg, self)

    def __abs__(self) -> Any:
        return self._of("abs({})", abs, self)

    def __bool__(self) -> bool:
        return self._ask("{} != 0.0", operator.ne, self, 0.0)

    def __eq__(self, other: object) -> Any:
        return self._ask("{} == {}", operator.eq, self, other)

    def __ne__(self, other: object) -> Any:
        return self._ask("{} != {}", operator.ne, self, other)

    def __lt__(self, other: Any) -> Any:
        return self._ask("{} < {}", operator.lt, self, other)

    def __le__(self, other: Any) -> Any:
        return self._ask("{} <= {}", operator.le, self, other)

    def __gt__(self, other: Any) -> Any:
        return self._ask("{} > {}", operator.gt, self, other)

    def __ge__(self, other: Any) -> Any:
        return self._ask("{} >= {}", operator.ge, self, other)

    __hash__ = object.__hash__

    @property
    def tensor(self) -> Tensor:
        """Itself as a tensor without dimensions."""
        return self._trace.tensor(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.sym_sqrt:
            (number,) = args
            return number._of("math.sqrt({})", math.sqrt, number)
        if func in _FUSED:
            return _FUSED[func](*args, **kwargs)
        name, out = func.__name__, kwargs.pop("out", None)
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place:
            name, func, out = name[:-1], getattr(torch, name[:-1], None), args[0]
        if name in _WITH_NUMBERS:
            result = _WITH_NUMBERS[name](*args, **kwargs)
        else:
            result = func(*map(_tensor, args), **{key: _tensor(value) for key, value in kwargs.items()})
        return result if out is None else out.copy_(result)


def _tensor(value: Any) -> Any:
    return value.tensor if isinstance(value, Number) else value


# torch's operators on a CPU, as they order and round


def _add(a: Any, b: Any, *, alpha: Any = 1.0) -> Tensor:
    a, b = _tensor(a), _tensor(b)
    return a + (b if isinstance(alpha, float) and alpha == 1.0 else _tensor(alpha) * b)


def _sub(a: Any, b: Any, *, alpha: Any = 1.0) -> Tensor:
    return _add(a, b, alpha=-alpha)


def _lerp(start: Tensor, end: Tensor, weight: Any) -> Tensor:
    if isinstance(weight, Number):
        near = abs(weight) < 0.5
        return start + _tensor(weight) * (end - start) if near else end - (end - start) * _tensor(1.0 - weight)
    return torch.lerp(start, end, weight)


def _addcmul(start: Tensor, a: Tensor, b: Tensor, *, value: Any = 1.0) -> Tensor:
    return start + _tensor(value) * a * b


def _addcdiv(start: Tensor, a: Tensor, b: Tensor, *, value: Any = 1.0) -> Tensor:
    return start + _tensor(value) * a / b


def _clamp(values: Tensor, min: Any = None, max: Any = None) -> Tensor:
    return torch.clamp(values, *(bound if bound is None else _like(bound, values) for bound in (min, max)))


def _like(bound: Any, values: Tensor) -> Tensor:
    return torch.as_tensor(_tensor(bound), dtype=values.dtype, device="cpu")


def _of_elements(name: str) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = getattr(torch, name)
    return lambda *args: function(*map(_tensor, args))


#: Operators with an argument that should be a number, and no tensor.
_WITH_NUMBERS: dict[str, Callable[..., Tensor]] = {
    "add": _add,
    "sub": _sub,
    "lerp": _lerp,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "clamp": _clamp,
    "clamp_min": lambda values, min: _clamp(values, min),
    "clamp_max": lambda values, max: _clamp(values, None, max),
    **{name: _of_elements(name) for name in ("mul", "div")},
}
for _name in ("add", "sub", "mul"):
    _WITH_NUMBERS[f"__{_name}__"] = _WITH_NUMBERS[_name]
_WITH_NUMBERS["__truediv__"] = _WITH_NUMBERS["div"]
_WITH_NUMBERS["__radd__"] = _WITH_NUMBERS["add"]
_WITH_NUMBERS["__rmul__"] = _WITH_NUMBERS["mul"]
_WITH_NUMBERS["__rsub__"] = lambda a, b: _sub(b, a)
_WITH_NUMBERS["__rdiv__"] = _WITH_NUMBERS["__rtruediv__"] = lambda a, b: _WITH_NUMBERS["div"](b, a)


def _adam_(params: Any, grads: Any, averages: Any, squares: Any, *others: Any, **numbers: Any) -> None:
    """Torch's operator after :func:`optimx._compat.uncorrected_adam_`."""
    (p,), (g,), (m,), (v,) = params, grads, averages, squares
    beta1, beta2, weight_decay = numbers["beta1"], numbers["beta2"], numbers["weight_decay"]
    if weight_decay:
        g = _add(g, p, alpha=weight_decay)
    m.copy_(_lerp(m, g, 1.0 - beta1) if isinstance(beta1, Number) else torch.lerp(m, g, 1.0 - beta1))
    v.copy_(_addcmul(_tensor(beta2) * v, g, g, value=1.0 - beta2))
    p.copy_(_addcdiv(p, m, _add(v.sqrt(), numbers["eps"]), value=-numbers["lr"]))


def _sgd_(params: Any, grads: Any, *others: Any, **numbers: Any) -> None:
    """Torch's operator after :func:`optimx._compat.plain_sgd_`."""
    (p,), (g,) = params, grads
    weight_decay = numbers["weight_decay"]
    if weight_decay:
        g = _add(g, p, alpha=weight_decay)
    p.copy_(_add(p, g, alpha=-numbers["lr"]))


_FUSED: dict[Any, Callable[..., None]] = {_compat.fused_adam_: _adam_, _compat.fused_sgd_: _sgd_}


class Recorder(TorchFunctionMode):
    """Writes down which functions of torch are called with what."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._names: dict[int, tuple[str, Any]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.lines.append(f"{self.name(result)} = {func.__name__}{self.name(args)}{self.name(kwargs)}")
        return result

    def name(self, value: Any) -> str:
        """What a value is called: equal for the same tensor, or the same number of a row."""
        if isinstance(value, Number):
            return value.source
        if isinstance(value, Tensor):
            # kept, or another tensor may get its address
            return self._names.setdefault(id(value), (f"t{len(self._names)}", value))[0]
        if isinstance(value, (tuple, list)):
            return f"({', '.join(map(self.name, value))})"
        if isinstance(value, dict):
            return self.name([*value.items()])
        return repr(value)


Kinds = Sequence[tuple[torch.dtype, tuple[int, ...]]]


class Traced:
    """A step's way through its branches.

    Args:
        step: Called with the numbers of a row and with tensors, which it may write. It returns a tuple of outputs, or
            None.
        row: One that goes this way.
        dtype: To compute in.
        kinds: Dtypes and shapes of the tensors; dimensions of 2 elements or more may have any number of them, and those
            that are equal stay so.

    Attributes:
        text: Tells it from others.
        n_outputs: How many tensors the step returns.
        numbers: Makes what is in the vector of numbers, of a row.
        suits: Tells whether a row goes this way.
    """

    def __init__(self, step: Callable[..., Any], row: Row, dtype: torch.dtype, kinds: Kinds) -> None:
        self._step, self._kinds = step, kinds
        self._trace = found = Trace(row, dtype)
        tensors = [torch.ones(shape, dtype=kind, device="cpu") for kind, shape in kinds]
        # no graph: that takes a hundred times as long, and is needed only to compile
        with Recorder() as recorder:
            recorder.lines += [f"{recorder.name(tensor)}: {kind}" for tensor, kind in zip(tensors, kinds, strict=True)]
            outputs = self._run(torch.ones(MOST_NUMBERS, dtype=torch.float64, device="cpu"), *tensors)
            recorder.lines.append(recorder.name(outputs))
        self.n_outputs = len(outputs)
        names = {"math": math, "inf": math.inf, "nan": math.nan}
        conditions = [source if answer else f"not {source}" for source, answer in found.decisions.items()]
        programs = f"({''.join(f'{source}, ' for source in found.sources)})", " and ".join(conditions) or "True"
        self.text = "\n".join([*recorder.lines, *programs])
        self.numbers, self.suits = (eval(f"lambda r: {program}", names) for program in programs)

    def _run(self, vector: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        self._trace.begin(vector)
        return self._step(self._trace.numbers, *tensors) or ()

    def compile(self) -> list[_compat.KernelCall]:
        """Compile it; what comes first among inputs is the vector of numbers."""
        kinds = [(torch.float64, (MOST_NUMBERS,)), *self._kinds]
        return _compat.compiled(*_compat.traced(self._run, kinds, constant=[0]))
