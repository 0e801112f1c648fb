"""Sections ``optimizer`` and ``groups``: the class, its arguments, the parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._engine.step import MultiTensorStep
from ..config import GroupsConfig, OptimizerConfig
from ..config.errors import MISSING, Problems, join
from ..config.values import check_arguments, parameters_of
from ..param_groups import Rule, param_groups
from ..registry import OPTIMIZERS
from .checks import attempt

__all__ = ["OptimizerRecipe", "resolve_groups", "resolve_optimizer"]


@dataclass(frozen=True)
class OptimizerRecipe:
    """An optimizer that can be made.

    Attributes:
        factory: The class, or a function like one.
        arguments: All of the factory's, but for the parameters.
        defaults: Of its groups.
        config: The resolved section.
        like: A parameter of the model.
        mixes_names: Whether groups with names and groups without may be mixed.
    """

    factory: Callable[..., Optimizer]
    arguments: dict[str, Any]
    defaults: dict[str, Any]
    config: OptimizerConfig
    like: Tensor
    mixes_names: bool

    @property
    def name(self) -> str:
        """For messages."""
        return getattr(self.factory, "__name__", "the optimizer")

    def make(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The optimizer. Where names would keep groups without them from joining later, it gets none."""
        hidden = () if self.mixes_names else ("param_names",)
        return self.factory([{k: v for k, v in group.items() if k not in hidden} for group in groups], **self.arguments)

    def rehearse(self, groups: list[dict[str, Any]]) -> Optimizer:
        """One with the same groups, each of one small parameter: to try out on it what takes an optimizer."""
        # schedulers write into a tensor lr
        copies = [
            {
                k: v.clone() if isinstance(v, Tensor) else v
                for k, v in group.items()
                if k not in ("params", "param_names")
            }
            for group in groups
        ]
        return self.factory([{**group, "params": [_small(self.like)]} for group in copies], **self.arguments)


def resolve_optimizer(section: OptimizerConfig, model: nn.Module, scale: float) -> OptimizerRecipe:
    """The class and its arguments, checked by the class itself on a small parameter.

    Args:
        section: Of the config.
        model: Whose parameters' device and dtype count.
        scale: Factor of the learning rate.

    Raises:
        ConfigError: Everything that is wrong with it.
    """
    factory = section.name
    if isinstance(factory, str):
        factory = OPTIMIZERS.get(factory, "optimizer.name")
    problems = Problems()
    given = {"lr": section.lr, "weight_decay": section.weight_decay, "max_grad_norm": section.max_grad_norm}
    given = {key: value for key, value in given.items() if value is not None} | section.args
    named, _ = parameters_of(factory)
    defaults = {key: p.default for key, p in named.items() if p.default is not p.empty}
    arguments = check_arguments(factory, given, "optimizer", problems)
    if scale != 1.0:
        lr = arguments.get("lr", defaults.get("lr"))
        if isinstance(lr, (int, float, Tensor)):
            arguments["lr"] = lr * scale
        else:
            problems.add("batch_scaling", "is refused: the optimizer has no lr that is a number", lr)
    required = [key for key in named if key not in defaults]
    made = None
    if arguments.keys() >= set(required):
        like = next((p for p in model.parameters() if p.requires_grad), torch.zeros(1))
        with problems.collected():
            made = attempt(lambda **some: factory([_small(like)], **some), arguments, "optimizer", required)
            if not isinstance(made, Optimizer):
                problems.add("optimizer.name", "should make a torch.optim.Optimizer", section.name)
    problems.raise_if_any()
    assert made is not None
    complete = {key: value for key, value in {**defaults, **arguments}.items() if value is not None}
    own = {key: complete.pop(key, None) for key in ("lr", "weight_decay", "max_grad_norm")}
    config = OptimizerConfig(section.name, **own, args=complete)
    return OptimizerRecipe(factory, arguments, made.defaults, config, like, isinstance(made, MultiTensorStep))


def resolve_groups(
    section: GroupsConfig, model: nn.Module, recipe: OptimizerRecipe | None, scale: float
) -> tuple[list[dict[str, Any]], GroupsConfig]:
    """The parameter groups of the model and the resolved section.

    Args:
        section: Of the config.
        model: Whose parameters.
        recipe: Of the optimizer, None if that has problems: what groups it can have is not checked then.
        scale: Factor of learning rates.

    Raises:
        ConfigError: Everything that is wrong with it.
    """
    problems = Problems()
    defaults = {"lr": 1.0, "weight_decay": 1.0} if recipe is None else recipe.defaults
    rules: dict[int, Rule] = {}
    for i, table in enumerate(section.rules):
        with problems.collected():
            rules[i] = _rule(table, recipe, scale, f"groups.rules[{i}]")
    base: dict[str, Any] = {
        "lr": defaults.get("lr"),
        "weight_decay": defaults.get("weight_decay"),
        "no_decay": section.no_decay if "weight_decay" in defaults else None,
        "layer_decay": section.layer_decay,
        "layers": section.layers,
        "layer_preset": section.layer_preset,
        "min_lr_scale": section.min_lr_scale,
        "include_frozen": section.include_frozen,
    }

    def make(**parts: Any) -> list[dict[str, Any]]:
        chosen = [rule for i, rule in rules.items() if f"rules[{i}]" in parts]
        frozen = [pattern for i, pattern in enumerate(section.freeze) if f"freeze[{i}]" in parts]
        try:
            return param_groups(model, **base, rules=chosen, freeze=frozen)
        except ValueError as error:
            # alone it is the first, and the path tells which it is
            text = str(error).removeprefix("rules[0].")
            raise (ValueError(text) if len(chosen) == 1 and type(error) is ValueError else error) from error

    # a rule is shown by its path alone
    parts = {f"rules[{i}]": MISSING for i in rules} | {f"freeze[{i}]": item for i, item in enumerate(section.freeze)}
    groups: list[dict[str, Any]] = []
    with problems.collected():
        groups = attempt(make, parts, "groups")
    problems.raise_if_any()
    return groups, replace(section, rules=tuple(_table(rule) for rule in rules.values()))


def _rule(table: Mapping[str, Any], recipe: OptimizerRecipe | None, scale: float, path: str) -> Rule:
    """The rule of a table; its other options are those that a group of this optimizer can have."""
    problems = Problems()
    arguments = check_arguments(Rule, table, path, problems, skip=0)
    if isinstance(arguments.get("lr"), (int, float, Tensor)):
        arguments["lr"] = arguments["lr"] * scale
    if recipe is not None:
        settings, _ = parameters_of(Rule, skip=0)
        others = {key: value for key, value in arguments.items() if key not in settings}
        with problems.collected():
            arguments |= _options(others, settings, recipe, path)
        for key in ("weight_decay", "wd_mult"):
            if key in arguments and "weight_decay" not in recipe.defaults:
                problems.add(join(path, key), f"is refused: {recipe.name} has no weight decay", arguments[key])
    problems.raise_if_any()
    return attempt(lambda: Rule(**arguments), {}, path)


def _options(
    others: Mapping[str, Any], settings: Collection[str], recipe: OptimizerRecipe, path: str
) -> dict[str, Any]:
    """A rule's options beside its settings, as the optimizer wants them."""
    problems = Problems()
    own, takes_any = parameters_of(recipe.factory)
    options = {key for key in recipe.defaults if takes_any or key in own}
    for key, value in others.items():
        if key not in options:
            problems.unknown(path, f"a rule for {recipe.name}", key, value, {*settings, *options})
    known = {key: value for key, value in others.items() if key in options}
    known = check_arguments(recipe.factory, known, path, problems, complete=False)
    if known:
        with problems.collected():
            attempt(lambda **some: recipe.factory([_small(recipe.like)], **{**recipe.arguments, **some}), known, path)
    problems.raise_if_any()
    return known


def _table(rule: Rule) -> dict[str, Any]:
    """What makes the rule again."""
    settings = {key: getattr(rule, key) for key in ("match", "lr", "lr_mult", "weight_decay", "wd_mult")}
    given = {key: value for key, value in settings.items() if value is not None}
    return {**given, **({"freeze": True} if rule.freeze else {}), **rule.others}


def _small(like: Tensor) -> Tensor:
    """A parameter of the same kind that costs nothing; a matrix, which Muon wants."""
    dtype = like.dtype if like.is_floating_point() or like.is_complex() else torch.float32
    return torch.zeros(1, 1, dtype=dtype, device=like.device, requires_grad=True)
