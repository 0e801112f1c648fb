"""Storage: how the numbers of a parameter or of a state are kept in memory, which no algorithm knows.

A *role* of an update is the parameter or one of the states. Kernels read and write roles in float32; how a role's bytes
are to be understood is its :class:`Format`. Some formats need a *companion*, a second tensor: what a 16-bit parameter
lacks of float32, or the scales of 8-bit codes. All of them lie in ``optimizer.state``, under :func:`names`.

Formats follow from a parameter's *global* shape and its group, never from a shard's: a mesh must not change numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

#: Settings, which are in no group where they are these.
SETTINGS: dict[str, Any] = {"param_rounding": "nearest", "state_dtype": None, "rounding_seed": 0}

#: Kinds of formats: a plain tensor, rounded to the nearest number or stochastically; a bfloat16 parameter with 8 or 16
#: bits that it lacks of float32; a 16-bit parameter that is but a copy of a float32 one; codes of 8 bits with a sign,
#: and without.
NEAREST, STOCHASTIC, REMAINDER8, REMAINDER16, MASTER, SIGNED8, UNSIGNED8 = range(7)

#: Values of ``param_rounding``.
ROUNDINGS = {
    "nearest": NEAREST,
    "stochastic": STOCHASTIC,
    "remainder8": REMAINDER8,
    "remainder16": REMAINDER16,
    "master": MASTER,
}
#: Elements that a scale of 8-bit codes is for.
GROUP = 128
#: Elements below which a parameter's states stay float32.
LEAST = 4096


class Format(NamedTuple):
    """How the numbers of a role are kept.

    Attributes:
        kind: One of :data:`NEAREST` and those after it.
        dtype: Of its tensor.
    """

    kind: int
    dtype: torch.dtype

    @property
    def companion(self) -> torch.dtype | None:
        """The dtype of its companion, if it has one."""
        return _COMPANIONS.get(self.kind)

    @property
    def is_plain(self) -> bool:
        """Whether storing is rounding to the nearest number, which is all that most code knows."""
        return self.kind == NEAREST


_COMPANIONS = {
    REMAINDER8: torch.int8,
    REMAINDER16: torch.int16,
    MASTER: torch.float32,
    SIGNED8: torch.float32,
    UNSIGNED8: torch.float32,
}


def names(role: str, kind: int) -> tuple[str, ...]:
    """Names in ``optimizer.state`` of a role's tensors, of which the parameter (``""``) has but its companion."""
    if kind in (SIGNED8, UNSIGNED8):
        return f"{role}_codes", f"{role}_scales"
    own = (role,) if role else ()
    if kind in (REMAINDER8, REMAINDER16):
        return *own, "param_remainder"
    return (*own, "param_master") if kind == MASTER else own


def companions(formats: tuple[Format, ...]) -> list[int]:
    """Roles, the parameter (0) and then the states, that have a companion, in the order of these."""
    return [role for role, kept in enumerate(formats) if kept.companion is not None]


def tensor_names(states: tuple[str, ...], formats: tuple[Format, ...]) -> tuple[str, ...]:
    """Names of the tensors of a parameter's states, then of all companions, the parameter's first."""
    both = [names(role, kept.kind) for role, kept in zip(("", *states), formats, strict=True)]
    own = [of_role[0] for of_role in both[1:]]
    return (*own, *(both[role][-1] for role in companions(formats)))


class Geometry(NamedTuple):
    """Where the elements of a part of a parameter are among all of its elements, in the order of memory.

    Element ``i`` of the part is ``first + i + i // row * gap`` of all.

    Attributes:
        first: Of the part's first element.
        row: Elements that follow each other in the whole, too.
        gap: Elements of other parts after each of the part's rows.
    """

    first: int = 0
    row: int = 1
    gap: int = 0
