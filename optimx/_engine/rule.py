"""What an algorithm tells the engine: an :class:`UpdateRule`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

Row = tuple[float, ...]
Operator = Callable[..., None]


class StateKind(NamedTuple):
    """What a state tensor is before a parameter's first step.

    Attributes:
        value: Of all its elements.
        dtype: None: the parameter's. Loading a checkpoint does not round a state of another one.
        reduced: Dimensions, counted from the parameter's end, of which it has one entry; it is contiguous then.
            Empty: it has the parameter's shape, and is laid out in memory as the parameter is.
        each: It is a matrix with an entry for so many elements of a row of the parameter; 1: it is not.
        copies_param: It begins as a copy of the parameter, and ``value`` does not matter.
    """

    value: float = 0.0
    dtype: torch.dtype | None = None
    reduced: tuple[int, ...] = ()
    each: int = 1
    copies_param: bool = False

    @property
    def is_like_param(self) -> bool:
        """Whether it has the parameter's shape."""
        return not self.reduced and self.each == 1

    def shape(self, param: Tensor) -> torch.Size:
        """Of the state of a parameter, or of a part of it."""
        if self.each > 1:
            return torch.Size([len(param), prod(param.shape[1:]) // self.each])
        reduced = {param.dim() + dim for dim in self.reduced}
        return torch.Size([1 if i in reduced else n for i, n in enumerate(param.shape)])


def new_state(kind: StateKind, param: Tensor) -> Tensor:
    """A state tensor before the first step of a parameter, or of a part of it."""
    if kind.copies_param:
        return torch.empty_like(param, dtype=kind.dtype, memory_format=torch.preserve_format).copy_(param.detach())
    if kind.is_like_param:
        return torch.full_like(param, kind.value, dtype=kind.dtype, memory_format=torch.preserve_format)
    return param.new_full(kind.shape(param), kind.value, dtype=kind.dtype)


class UpdateRule:
    """What the engine has to know of an algorithm.

    The same step exists twice: as kernels in a module of ``triton_kernels`` (see ``triton_kernels/update.py``), and
    here for a CPU, as :meth:`operator` or :meth:`formula`. :meth:`prepare` is for both.

    Attributes:
        module: Name of the kernels' module: of one in ``triton_kernels``, or a name with a dot of one of your own.
        scalars: Scalar states, the step count first; may be empty.
        scalars_on_device: They are where the parameter is, also without ``capturable``.
        walk: How an update moves over its tensors: ``"elementwise"``, in one pass; ``"measured"``, a pass
            that measures, a reduction of each tensor, a pass; ``"lagged"``, in one pass, of a size that follows from
            the step before; ``"factored"``, over matrices with averages of rows and
            columns; ``"orthogonal"``, a pass, products of matrices, a pass. Each backend has a class of buckets for it.
        optional_settings: Of groups, also where the optimizer has no default for them.
        temporaries: How many tensors of scratch :meth:`advance` and :meth:`take` need.
        knows_moved: There is :meth:`step_of_moved`.
        flags: Those of :data:`optimx._engine.flags.OF_UPDATES` that :meth:`group_variant` knows, and torch's step does
            not; they are among the optional settings.
        of_wholes: Variants follow from whole parameters, also where parts of these are updated.
        codes: States that 8-bit codes may keep, and whether these are never negative. Not what is added up for ever or
            must never become less.
        averages: States that are averages over many elements, or stand for such: float32 where others have fewer bits.
        by_element: Which of the values may be vectors, with an entry an element: :meth:`prepare` then makes a row of
            them that :meth:`formula` takes, also where there is an operator. Empty where there is no such thing.
    """

    module: ClassVar[str]
    scalars: ClassVar[tuple[str, ...]] = ("step",)
    scalars_on_device: ClassVar[bool] = False
    walk: ClassVar[str] = "elementwise"
    optional_settings: ClassVar[tuple[str, ...]] = ()
    flags: ClassVar[tuple[str, ...]] = ()
    temporaries: ClassVar[int] = 3
    knows_moved: ClassVar[bool] = False
    of_wholes: ClassVar[bool] = False
    codes: ClassVar[dict[str, bool]] = {}
    averages: ClassVar[tuple[str, ...]] = ()
    by_element: ClassVar[tuple[int, ...]] = ()

    def group_variant(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """The settings of a group that choose other arithmetic, such as AMSGrad: a kernel is compiled for each."""
        return ()

    def values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """The hyperparameters, ``RAW`` in the kernel's module: numbers, or tensors of one element if given as such."""
        raise NotImplementedError

    def values_for(self, values: tuple[Any, ...], dtype: torch.dtype, first: bool) -> tuple[Any, ...]:
        """A group's values for parameters of ``dtype``, where a default depends on it.

        Args:
            first: The coming step differs from those after it, see :meth:`is_first`.
        """
        return values

    def unsuitable(self, param: Tensor) -> str | None:
        """Why the kernels cannot update a parameter that most could; None if they can."""
        return None

    def variant_of(self, variant: Any, param: Tensor) -> Any:
        """The kernel variant of one parameter of a group whose variant is ``variant``."""
        return variant

    def variant_for(self, group: dict[str, Any], whole: Tensor, part: Tensor) -> Any:
        """The kernel variant of a parameter of a group, of which ``part`` lies in this process."""
        return self.variant_of(self.group_variant(group), whole if self.of_wholes else part)

    def walk_of(self, variant: Any) -> str:
        """The walk of a variant, where flags of a group ask for another one than :attr:`walk`."""
        return self.walk

    def state_names(self, variant: Any) -> tuple[str, ...]:
        """State tensors, in the order the kernel has them; of the parameter's shape, mostly."""
        raise NotImplementedError

    def kind_of(self, name: str, param: Tensor, group: dict[str, Any], defaults: dict[str, Any]) -> StateKind:
        """What a state tensor is before the first step: of zeros, and like the parameter, mostly."""
        return StateKind()

    def has_whole_groups(self, shape: torch.Size, variant: Any, group: int) -> bool:
        """Whether no part of a parameter along its first dimension, and no piece of a walk, cuts a group of codes."""
        return prod(shape[1:]) % group == 0

    def new_state(self, name: str, param: Tensor, group: dict[str, Any], defaults: dict[str, Any]) -> Tensor:
        """A state tensor before the first step."""
        return new_state(self.kind_of(name, param, group, defaults), param)

    def new_scalar(self, name: str, group: dict[str, Any]) -> float:
        """A scalar state before the first step."""
        return 0.0

    def is_first(self, state: dict[str, Any], values: tuple[Any, ...]) -> bool:
        """Whether a parameter's coming step differs from those after it; :meth:`values_for` makes the difference."""
        return False

    def prepare(self, values: tuple[float, ...], scalars: tuple[float, ...]) -> tuple[Row, tuple[float, ...]]:
        """One step of the scalars.

        Returns:
            The row ``HYPER`` of the kernel's module, hyperparameters in the form that kernel and :meth:`formula` use;
            the first is the factor of the gradient, 1 or -1. And the scalars after the step.
        """
        raise NotImplementedError

    def treat_wholes_(self, wholes: Tensor, variant: Any, values: Sequence[tuple[Any, ...]]) -> None:
        """What happens to tensors in one piece, parts of which lie on several ranks, where the walk is "orthogonal".

        Args:
            wholes: ``[n, ...]``, tensors of a variant, which are overwritten.
            variant: See :meth:`variant_of`.
            values: The hyperparameters of each one's group.
        """
        raise NotImplementedError

    def operator(self, variant: tuple[bool, ...], dtype: torch.dtype) -> Operator | None:
        """Torch's own fused CPU operator for this variant, where there is one and it is right in this dtype.

        It is called with ``(values, params, grads, states, steps)``: lists of tensors of one dtype, the states by name,
        and step counts that count the present step already.
        """
        return None

    def rounds_once(self, values: tuple[Any, ...], dtype: torch.dtype) -> bool:
        """Whether the operator, on tensors of ``dtype``, rounds nothing but results; else it gets wider ones."""
        return True

    def formula(
        self,
        variant: tuple[bool, ...],
        row: Row,
        p: Tensor,
        g: Tensor,
        states: Sequence[Tensor],
        scratch: tuple[Tensor, ...],
    ) -> None:
        """Update one piece in place, where there is no operator.

        All tensors are one-dimensional, float32 or float64, and fit the cache together. ``g`` is multiplied by the
        row's factor already and must not be written; the three tensors of ``scratch`` may.
        """
        raise NotImplementedError

    def advance(
        self, variant: Any, row: Row, p: Tensor, g: Tensor, states: Sequence[Tensor], scratch: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Move the states of one piece, where the walk is "measured" or "lagged"; arguments are :meth:`formula`'s.

        Returns:
            The step before it has its size, and two tensors whose squared lengths, over a whole parameter, tell that;
            None where one is not needed.
        """
        raise NotImplementedError

    def step_of_moved(
        self, variant: Any, row: Row, p: Tensor, states: Sequence[Tensor], scratch: tuple[Tensor, ...]
    ) -> Tensor:
        """The step again, from states that have moved; for less work than :meth:`advance`."""
        raise NotImplementedError

    def factors(self, variant: Any, row: Row, squares: Tensor, numels: Tensor) -> Tensor:
        """What the steps of tensors are multiplied by, float64 ``[n]``.

        Args:
            variant, row: Theirs.
            squares: Squared lengths of what :meth:`advance` has told, float64 ``[2, n]``.
            numels: Elements of the whole tensors.
        """
        raise NotImplementedError

    def take(
        self, variant: Any, row: Row, p: Tensor, step: Tensor, factor: float | Tensor, scratch: tuple[Tensor, ...]
    ) -> None:
        """Take a step times a factor, a number or one an element; ``scratch`` is as :meth:`advance` has left it."""
        raise NotImplementedError

    @functools.cached_property
    def kernels(self) -> Any:
        """The module; imports triton."""
        own = "." in self.module
        return importlib.import_module(self.module if own else f"optimx.triton_kernels.{self.module}")


def decay_cautiously_(p: Tensor, decay: float, step: Tensor, scratch: Tensor) -> None:
    """Multiply by ``decay`` what a step, which is subtracted, does not move away from zero."""
    # signs, because products may underflow
    agrees = torch.sign(p, out=scratch).mul_(step) >= 0
    p.copy_(torch.where(agrees, torch.mul(p, decay, out=scratch), p))


def subtract_(p: Tensor, step: Tensor, size: float, factor: float | Tensor) -> None:
    """Subtract a step times its size and a factor, which may have an entry an element."""
    if isinstance(factor, Tensor):
        p.addcmul_(step, factor, value=-size)
    else:
        p.add_(step, alpha=-size * factor)


def l2_gradient(g: Tensor, p: Tensor, l2: float, out: Tensor) -> Tensor:
    """The gradient with the L2 penalty's, in ``out``; the gradient itself where there is none."""
    return torch.add(g, p, alpha=l2, out=out) if l2 else g
