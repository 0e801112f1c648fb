"""Rules: settings for the parameters whose names match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_number, nearest, one_of, told
from .muon import OPTIMIZERS
from .names import NamedParameter, PatternLike, compile_pattern, select

#: What no rule may set, and what does what was meant.
RESERVED = {"params": "match", "param_names": "match", "lr_scale": "lr_mult", "others": "**others"}


@dataclass(frozen=True, init=False)
class Rule:
    """Settings for the parameters whose names match.

    Args:
        match: A pattern or several: a glob for the whole name (``"blocks.*.bias"``, ``*`` crosses dots), or a
            regular expression searched for in it, compiled or after ``re:`` (``r"re:^blocks\\.[0-3]\\."``). All names
            of a tied parameter count.
        lr: Learning rate; layer decay does not scale it.
        lr_mult: Factor of the learning rate that layer decay leaves.
        weight_decay: Weight decay of the parameters that ``no_decay`` does not exempt.
        wd_mult: Factor of the weight decay.
        freeze: Leave them out of the groups, so that no optimizer updates them; a later rule does not bring them
            back.
        optimizer: ``"muon"`` or ``"adamw"``, where :func:`~optimx.param_groups.param_groups` has ``muon``.
        others: Other options of a group, such as ``betas``, ``eps`` or ``momentum``.

    Raises:
        ValueError: A number is negative or not finite, two settings exclude each other, nothing is set, or an option
            looks like a misspelled setting.
        TypeError: A setting has another type.
    """

    match: PatternLike | Sequence[PatternLike]
    lr: float | Tensor | None
    lr_mult: float | None
    weight_decay: float | None
    wd_mult: float | None
    freeze: bool
    optimizer: str | None
    others: dict[str, Any]

    def __init__(
        self,
        match: PatternLike | Sequence[PatternLike],
        lr: float | Tensor | None = None,
        lr_mult: float | None = None,
        weight_decay: float | None = None,
        wd_mult: float | None = None,
        freeze: bool = False,
        optimizer: str | None = None,
        **others: Any,
    ) -> None:
        numbers = {"lr": lr, "lr_mult": lr_mult, "weight_decay": weight_decay, "wd_mult": wd_mult}
        patterns = as_patterns(match)
        for pattern in patterns:
            compile_pattern(pattern, "match")
        if not patterns:
            raise ValueError("match should not be empty")
        values = {"match": match, **numbers, "freeze": freeze, "optimizer": optimizer, "others": others}
        for name, value in numbers.items():
            if value is not None:
                check_number(name, value, tensor=name == "lr")
        if not isinstance(freeze, bool):
            raise TypeError(f"freeze should be True or False but is: {freeze!r}")
        if optimizer is not None:
            one_of("optimizer", optimizer, OPTIMIZERS)
        for one, other in (("lr", "lr_mult"), ("weight_decay", "wd_mult")):
            if numbers[one] is not None and numbers[other] is not None:
                raise ValueError(f"{one} and {other} should not both be set but are: {numbers[one]}, {numbers[other]}")
        _check_others(others, list(values))
        given = {**numbers, "optimizer": optimizer}
        settings = [name for name, value in given.items() if value is not None] + list(others)
        if freeze and settings:
            raise ValueError(f"a rule that freezes should set nothing else but sets: {', '.join(settings)}")
        if not freeze and not settings:
            raise ValueError(f"the rule for {match!r} should set something")
        for name, setting in values.items():
            object.__setattr__(self, name, setting)


def as_patterns(match: PatternLike | Sequence[PatternLike]) -> Sequence[PatternLike]:
    """One pattern is a list of one."""
    return match if isinstance(match, Sequence) and not isinstance(match, str) else [match]  # type: ignore[list-item]


def _check_others(others: Mapping[str, Any], known: Sequence[str]) -> None:
    settings = [name for name in known if name != "others"]
    for name in others:
        # what is less like a setting of ours is an option of the optimizer
        near = RESERVED.get(name) or nearest(name, settings, 0.8)
        if near:
            raise ValueError(told(name, "is no setting of a rule", others[name], near))


def as_rules(rules: Sequence[Rule | Mapping[str, Any]]) -> list[Rule]:
    """Rules, and mappings of their arguments, as rules; an error says which one it is about."""
    if isinstance(rules, (str, Mapping)) or not isinstance(rules, Sequence):
        raise TypeError(f"rules should be a list but is: {rules!r}")
    made = []
    for i, rule in enumerate(rules):
        if isinstance(rule, Mapping):
            if "match" not in rule:
                raise ValueError(f"rules[{i}] should have 'match' but has: {', '.join(map(str, rule))}")
            try:
                rule = Rule(**rule)
            except (TypeError, ValueError) as error:
                raise type(error)(f"rules[{i}]: {error}") from error
        elif not isinstance(rule, Rule):
            raise TypeError(f"rules[{i}] should be a Rule or a mapping but is: {rule!r}")
        made.append(rule)
    return made


def select_all(
    match: PatternLike | Sequence[PatternLike], params: Sequence[NamedParameter], what: str
) -> set[NamedParameter]:
    """The parameters that any of the patterns matches; each pattern has to match one."""
    return {param for pattern in as_patterns(match) for param in select(pattern, params, what)}


def same(one: Any, other: Any) -> bool:
    """Equality of settings, tensors by value."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return one == other
