"""Storage: how the numbers of a parameter or of a state are kept in memory, which no algorithm knows.

A *role* of an update is the parameter or one of the states. Kernels read and write roles in float32; how a role's bytes
are to be understood is its :class:`Format`. Some formats need a *companion*, a second tensor: what a 16-bit parameter
lacks of float32, or the scales of 8-bit codes. All of them lie in ``optimizer.state``, under :func:`names`.

Formats follow from a parameter's *global* shape and its group, never from a shard's: a mesh must not change numbers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import one_of, told
from .rule import StateKind, UpdateRule

#: Values of ``state_dtype``.
StateDtype = torch.dtype | str | Mapping[str, torch.dtype | str | None] | None

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
#: What ``state_dtype`` may be besides a dtype.
STATES = ("8bit", "stochastic")
#: Kinds of 8 bits.
CODED = (SIGNED8, UNSIGNED8)
#: Elements that a scale of 8-bit codes is for.
GROUP = 128
#: Roles of a parameter that have random bits of their own.
MOST_ROLES = 16
#: Elements below which a parameter's states stay float32.
LEAST = 4096


#: Names of a parameter's companions in ``optimizer.state``.
REMAINDER_NAME, MASTER_NAME = "param_remainder", "param_master"
PARAM_COMPANIONS = {REMAINDER_NAME, MASTER_NAME}


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
        return *own, REMAINDER_NAME
    return (*own, MASTER_NAME) if kind == MASTER else own


def state_of(name: str) -> str:
    """The state that a tensor of ``optimizer.state`` has the numbers of; of companions, their own name."""
    return name.removesuffix("_codes")


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


def check(group: Mapping[str, Any]) -> None:
    """Raise where a group's settings cannot be.

    Raises:
        ValueError: A setting is none that there is.
        TypeError: It is of another type.
    """
    one_of("param_rounding", group.get("param_rounding", "nearest"), ROUNDINGS)
    seed = group.get("rounding_seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise ValueError(told("rounding_seed", "should be a whole number in [0, 2**63)", seed))
    asked = group.get("state_dtype")
    for name, kept in asked.items() if isinstance(asked, Mapping) else [("", asked)]:
        what = f"state_dtype[{name!r}]" if name else "state_dtype"
        if isinstance(kept, str):
            one_of(what, kept, (*STATES, *_NAMES))
        elif kept is not None and kept not in DTYPES:
            choices = ", ".join([*map(str, DTYPES), *map(repr, STATES)])
            raise ValueError(told(what, f"should be one of {choices}", kept))


def warn_of_freezing(rule: UpdateRule, group: Mapping[str, Any], found: Iterable[Kept]) -> None:
    """Warn where averages of squares are rounded so coarsely that they stand still.

    Args:
        rule: Its optimizer's.
        group: The group.
        found: What its parameters have.
    """
    beta = group["betas"][1] if "betas" in group else group.get("alpha", group.get("rho"))
    if not isinstance(beta, (int, float)) or beta <= 0.99:
        return
    # a state that is not coded has its own name
    coarse = dict.fromkeys(
        name
        for of_param in found
        for i, (name, kind) in enumerate(of_param.kinds.items(), 1)
        if rule.codes.get(name) and kind.dtype is torch.bfloat16
        and (not of_param.formats or of_param.formats[i].is_plain)
    )  # fmt: skip
    for name in coarse:
        warnings.warn(
            f"{name} in bfloat16, rounded to the nearest, stands still where a step changes it by less than 0.2 to "
            f"0.4 %, and with an average of {beta} one changes it by {100 * (1 - beta):.2g} % at most: it may end "
            "1.6 times too high, or more; state_dtype='stochastic' and '8bit' do not",
            stacklevel=6,
        )


#: Dtypes of states.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: As configs name them.
_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def named(asked: StateDtype) -> StateDtype:
    """``state_dtype`` with names in place of dtypes."""
    if isinstance(asked, Mapping):
        return {name: str(kept).removeprefix("torch.") if kept in DTYPES else kept for name, kept in asked.items()}
    return str(asked).removeprefix("torch.") if asked in DTYPES else asked


def _formats(
    rule: UpdateRule, whole: Tensor, variant: Any, group: dict[str, Any], kinds: Mapping[str, StateKind]
) -> tuple[Format, ...]:
    """Of the parameter, then of its states, which are of these kinds where nobody asks for something else."""
    asked = group.get("state_dtype")
    if isinstance(asked, Mapping):
        for name in asked:
            if not kinds:
                raise ValueError(told("state_dtype", "should name no state where there is none", name))
            one_of("state_dtype", name, kinds)
    kind = NEAREST
    if whole.dtype in (torch.bfloat16, torch.float16):
        rounding = group.get("param_rounding", "nearest")
        kind = ROUNDINGS[rounding]
        if kind in (REMAINDER8, REMAINDER16) and whole.dtype is torch.float16:
            raise ValueError(
                told("param_rounding", "should be 'stochastic' or 'master' for float16 parameters", rounding)
            )
    formats = [Format(kind, whole.dtype)]
    for name, default in kinds.items():
        wanted = asked.get(name) if isinstance(asked, Mapping) else asked
        wanted = _NAMES.get(wanted, wanted) if isinstance(wanted, str) else wanted
        if wanted is None:
            formats.append(Format(NEAREST, default.dtype or whole.dtype))
        elif isinstance(wanted, torch.dtype):
            formats.append(Format(NEAREST, wanted))
        elif name in rule.averages:
            # it takes no memory to speak of
            formats.append(Format(NEAREST, torch.float32))
        elif wanted == "stochastic":
            formats.append(Format(STOCHASTIC, torch.bfloat16))
        elif name in rule.codes and whole.numel() >= LEAST and rule.has_whole_groups(whole.shape, variant, GROUP):
            formats.append(Format(UNSIGNED8, torch.uint8) if rule.codes[name] else Format(SIGNED8, torch.int8))
        else:
            formats.append(Format(NEAREST, torch.float32))
    return (*formats,)


class Kept(NamedTuple):
    """What a parameter has in ``optimizer.state``.

    Attributes:
        formats: Of its roles; empty: all tensors are plain ones.
        kinds: What each tensor is, by its name, in the order of a bucket: those of states, then companions.
    """

    formats: tuple[Format, ...]
    kinds: dict[str, StateKind]


def kept(rule: UpdateRule, whole: Tensor, part: Tensor, group: dict[str, Any], defaults: dict[str, Any]) -> Kept:
    """What a parameter has in ``optimizer.state``, by its group's settings.

    Args:
        rule: Its optimizer's.
        whole: The parameter.
        part: What of it lies in this process.
        group: Its group.
        defaults: The optimizer's.

    Raises:
        ValueError: A state that is named does not exist, or float16 parameters are to have remainders.
    """
    variant = rule.variant_for(group, whole, part)
    states = rule.state_names(variant)
    kinds = {name: rule.kind_of(name, part, group, defaults) for name in states}
    if not is_set(group):
        return Kept((), kinds)
    formats = _formats(rule, whole, variant, group, kinds)
    tensors = {
        names(name, of_role.kind)[0]: kinds[name]._replace(dtype=of_role.dtype)
        for name, of_role in zip(states, formats[1:], strict=True)
    }
    for role in companions(formats):
        kind, name = formats[role].kind, ("", *states)[role]
        scale = kinds[name].value if role else 0.0
        if scale:
            # all elements are the largest of their group
            codes = names(name, kind)[0]
            tensors[codes] = tensors[codes]._replace(value=255.0 if kind == UNSIGNED8 else 127.0)
        scale = math.sqrt(scale) if kind == UNSIGNED8 else scale
        tensors[names(name, kind)[-1]] = StateKind(scale, formats[role].companion, each=GROUP if role else 1)
    return Kept(() if are_plain(formats) else formats, tensors)


def is_set(group: Mapping[str, Any]) -> bool:
    """Whether a group says how something is kept."""
    return any(group.get(name, default) != default for name, default in SETTINGS.items() if name != "rounding_seed")


def are_plain(formats: Sequence[Format]) -> bool:
    """Whether all that is kept is plain tensors, rounded to the nearest number."""
    return all(kept.is_plain for kept in formats)
