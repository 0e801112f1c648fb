"""Sections ``optimizer`` and ``groups``: the class, its arguments, the parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
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
from .checks import attempt, refusal

__all__ = ["OptimizerPlan", "plan_groups", "plan_optimizer"]


@dataclass(frozen=True)
class OptimizerPlan:
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


def plan_optimizer(section: OptimizerConfig, model: nn.Module, scale: float) -> OptimizerPlan:
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
    return OptimizerPlan(factory, arguments, made.defaults, config, like, isinstance(made, MultiTensorStep))


def plan_groups(
    section: GroupsConfig, model: nn.Module, plan: OptimizerPlan | None, scale: float
) -> tuple[list[dict[str, Any]], GroupsConfig]:
    """The parameter groups of the model and the resolved section.

    Args:
        section: Of the config.
        model: Whose parameters.
        plan: Of the optimizer, None if that has problems: what groups it can have is not checked then.
        scale: Factor of learning rates.

    Raises:
        ConfigError: Everything that is wrong with it.
    """
    problems = Problems()
    defaults = {"lr": 1.0, "weight_decay": 1.0} if plan is None else plan.defaults
    rules: dict[int, Rule] = {}
    for i, table in enumerate(section.rules):
        with problems.collected():
            rules[i] = _rule(table, plan, scale, f"groups.rules[{i}]")
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
    groups: list[dict[str, Any]] = []
    try:
        groups = param_groups(model, **base, rules=tuple(rules.values()), freeze=section.freeze)
    # a model's hints and layers may be anything
    except Exception as error:
        problems.extend(_blamed(model, base, rules, section.freeze) or refusal("groups", MISSING, error).problems)
    problems.raise_if_any()
    return groups, replace(section, rules=tuple(_table(rule) for rule in rules.values()))


def _blamed(model: nn.Module, base: Mapping[str, Any], rules: Mapping[int, Rule], freeze: Sequence[str]) -> Problems:
    """Those rules and patterns that are refused by themselves."""
    problems = Problems()
    parts: list[tuple[str, Any, dict[str, Any]]] = [
        *((f"groups.rules[{i}]", MISSING, {"rules": (rule,)}) for i, rule in rules.items()),
        *((f"groups.freeze[{i}]", pattern, {"freeze": (pattern,)}) for i, pattern in enumerate(freeze)),
    ]
    try:
        param_groups(model, **base)
    # it is neither of them
    except Exception:
        return problems
    for path, value, part in parts:
        try:
            param_groups(model, **base, **part)
        except Exception as error:
            # alone it was the first, and the path tells which it is
            text = str(error).removeprefix("rules[0].")
            problems.extend(refusal(path, value, ValueError(text) if type(error) is ValueError else error).problems)
    return problems


def _rule(table: Mapping[str, Any], plan: OptimizerPlan | None, scale: float, path: str) -> Rule:
    """The rule of a table; its other options are those that a group of this optimizer can have."""
    problems = Problems()
    arguments = check_arguments(Rule, table, path, problems, skip=0)
    if isinstance(arguments.get("lr"), (int, float, Tensor)):
        arguments["lr"] = arguments["lr"] * scale
    if plan is not None:
        settings, _ = parameters_of(Rule, skip=0)
        others = {key: value for key, value in arguments.items() if key not in settings}
        with problems.collected():
            arguments |= _options(others, settings, plan, path)
        for key in ("weight_decay", "wd_mult"):
            if key in arguments and "weight_decay" not in plan.defaults:
                problems.add(join(path, key), f"is refused: {plan.name} has no weight decay", arguments[key])
    problems.raise_if_any()
    return attempt(lambda: Rule(**arguments), {}, path)


def _options(others: Mapping[str, Any], settings: Collection[str], plan: OptimizerPlan, path: str) -> dict[str, Any]:
    """A rule's options beside its settings, as the optimizer wants them."""
    problems = Problems()
    own, takes_any = parameters_of(plan.factory)
    options = {key for key in plan.defaults if takes_any or key in own}
    for key, value in others.items():
        if key not in options:
            problems.unknown(path, f"a rule for {plan.name}", key, value, {*settings, *options})
    known = {key: value for key, value in others.items() if key in options}
    known = check_arguments(plan.factory, known, path, problems, complete=False)
    if known:
        with problems.collected():
            attempt(lambda **some: plan.factory([_small(plan.like)], **{**plan.arguments, **some}), known, path)
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
