"""Flags: settings of groups that torch's classes have not, and that change what an update does. Off, nothing is.

A group has one only where it is set, so groups of which nothing is asked have torch's keys alone. Those of an update
choose its variant; those of gradients are :mod:`.grad_transforms`'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import nearest, told
from .grad_transforms import TRANSFORMS
from .rule import UpdateRule

#: Flags of updates: which of them an algorithm has, its rule tells.
OF_UPDATES = ("cautious_weight_decay", "cautious", "update_clipping")
#: Value of ``cautious`` for steps that are divided by their tensor's share at the step before.
LAST_MEAN = "last_mean"
#: The state that has that share: one float32 number a tensor.
MASK_MEAN = "mask_mean"
#: All flags, and their values in groups that do not have them.
FLAGS: dict[str, Any] = {
    **dict.fromkeys(OF_UPDATES, False),
    **{name: transform.off for name, transform in TRANSFORMS.items()},
}


def of_update(rule: UpdateRule, group: Mapping[str, Any]) -> list[str]:
    """The flags that a group sets for updates, which torch's own step does not know."""
    return [name for name in rule.flags if group.get(name)]


def variant(rule: UpdateRule, group: Mapping[str, Any]) -> tuple[bool, ...]:
    """What a group's flags add to its variant: nothing where none is set.

    Else all of :data:`OF_UPDATES` in order, and whether cautious steps are divided by the share of the step before.

    Raises:
        ValueError: A flag has another value than it may have.
    """
    found = of_update(rule, group)
    if not found:
        return ()
    for name in found:
        _check_value(name, group[name])
    is_lagged = group.get("cautious") == LAST_MEAN
    if is_lagged and group.get("update_clipping"):
        raise ValueError(f"update_clipping should be False with cautious={LAST_MEAN!r} but is: True")
    return (*(bool(group.get(name)) for name in OF_UPDATES), is_lagged)


def walk_of(variant: Sequence[bool]) -> str:
    """The walk of an update with these flags, from :func:`variant`."""
    _, cautious, clipped, is_lagged = variant or (False,) * 4
    if is_lagged:
        return "lagged"
    return "measured" if cautious or clipped else "elementwise"


def cautious(step: Tensor, g: Tensor, out: Tensor) -> Tensor:
    """1 where a step goes against the gradient, which is where its signs are those of the gradient; elsewhere 0."""
    # signs, because products may underflow
    return torch.sign(g, out=out).mul_(step).gt_(0)


def divisor(mean: Tensor) -> Tensor:
    """What cautious steps are divided by: their share of the tensor, at least 1e-3."""
    return mean.clamp(min=1e-3)


def factors(variant: Sequence[bool], squares: Tensor, numels: Tensor) -> Tensor:
    """What the steps of tensors are multiplied by.

    Args:
        variant: From :func:`variant`.
        squares: float64 ``[2, n]``: how many elements take a cautious step, and squared lengths of gradients divided by
            the roots of their average squares.
        numels: Elements of the whole tensors.
    """
    taken, sizes = squares / numels.clamp(min=1)
    _, is_cautious, is_clipped, _ = variant
    result = divisor(taken).reciprocal() if is_cautious else torch.ones_like(taken)
    return result / sizes.sqrt().clamp(min=1.0) if is_clipped else result


def check_decay(group: Mapping[str, Any]) -> None:
    """Raise ValueError where a flag of decoupled weight decay is set and decay is not decoupled."""
    if group.get("cautious_weight_decay") and not group["decoupled_weight_decay"]:
        raise ValueError("cautious_weight_decay should be False without decoupled_weight_decay=True but is: True")


def _check_value(name: str, value: Any) -> None:
    """Raise ValueError where a flag that is set has none of its values."""
    if value is True or (name == "cautious" and value == LAST_MEAN):
        return
    choices, near = "True or False", None
    if name == "cautious":
        choices, near = f"True, False or {LAST_MEAN!r}", nearest(value, [LAST_MEAN])
    raise ValueError(told(name, f"should be {choices}", value, near))


def check(rule: UpdateRule, group: dict[str, Any]) -> None:
    """Raise where a group's flags are not the algorithm's, do not suit its settings, or have values of no use.

    Raises:
        ValueError: That is so.
        TypeError: What should be a number is none.
    """
    for name, transform in TRANSFORMS.items():
        transform.check(name, group.get(name))
    found = [name for name in OF_UPDATES if group.get(name)]
    for name in found:
        if name not in rule.optional_settings:
            raise ValueError(f"{name} is no flag of {type(rule).__name__}'s updates but a group has: {group[name]}")
        _check_value(name, group[name])
    if found:
        rule.group_variant(group)
