"""Section ``groups``: the parameter groups, with the settings that their optimizers can have."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..config import GroupsConfig
from ..config.errors import MISSING, Problems, join
from ..config.values import check_arguments, parameters_of
from ..param_groups import Rule, param_groups
from ..param_groups.muon import ADAMW, MUON
from ..param_groups.names import module_tree, named_parameters
from ..param_groups.no_decay import AUTO
from ..param_groups.rules import select_all
from .checks import attempt
from .optimizer import Recipe

__all__ = ["resolve_groups"]


def resolve_groups(
    section: GroupsConfig, model: nn.Module, recipe: Recipe | None, scale: float
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
    rules: dict[int, Rule] = {}
    for i, table in enumerate(section.rules):
        with problems.collected():
            rules[i] = _rule(table, recipe, scale, f"groups.rules[{i}]")
    base: dict[str, Any] = {
        **_base(section, recipe),
        "layer_decay": section.layer_decay,
        "layers": section.layers,
        "layer_preset": section.layer_preset,
        "min_lr_scale": section.min_lr_scale,
        "include_frozen": section.include_frozen,
    }
    if "muon" not in base and section.muon is not None:
        problems.add("groups.muon", "is refused: there is no table optimizer.adamw", section.muon)

    def make(**parts: Any) -> list[dict[str, Any]]:
        chosen = [rule for i, rule in rules.items() if f"rules[{i}]" in parts]
        frozen = [pattern for i, pattern in enumerate(section.freeze) if f"freeze[{i}]" in parts]
        given = {**base, "muon": parts["muon"]} if "muon" in parts else base
        try:
            return param_groups(model, **given, rules=chosen, freeze=frozen)
        except ValueError as error:
            # alone it is the first, and the path tells which it is
            text = str(error).removeprefix("rules[0].")
            raise (ValueError(text) if len(chosen) == 1 and type(error) is ValueError else error) from error

    # a rule is shown by its path alone
    parts: dict[str, Any] = {f"rules[{i}]": MISSING for i in rules}
    parts |= {f"freeze[{i}]": item for i, item in enumerate(section.freeze)}
    if "muon" in base and section.muon is not None:
        parts["muon"] = section.muon
    groups: list[dict[str, Any]] = []
    with problems.collected():
        groups = attempt(make, parts, "groups")
    if recipe is not None and "muon" in base:
        _check_effects(model, groups, rules, recipe, problems)
        groups = [_fitting(group, recipe) for group in groups]
    problems.raise_if_any()
    muon = section.muon if "muon" not in base or section.muon is not None else AUTO
    return groups, replace(section, rules=tuple(_table(rule) for rule in rules.values()), muon=muon)


def _base(section: GroupsConfig, recipe: Recipe | None) -> dict[str, Any]:
    """Arguments of ``param_groups`` that depend on the optimizer, or on the two."""
    defaults: dict[str | None, Mapping[str, Any]]
    if recipe is not None:
        defaults = {name: member.defaults for name, member in recipe.members.items()}
    else:
        two = section.muon is not None or any("optimizer" in table for table in section.rules)
        owners = [MUON, ADAMW] if two else [None]
        defaults = {name: {"lr": 1.0, "weight_decay": 1.0} for name in owners}
    first = next(iter(defaults.values()))
    base: dict[str, Any] = {
        "lr": first.get("lr"),
        "weight_decay": first.get("weight_decay"),
        "no_decay": section.no_decay if any("weight_decay" in each for each in defaults.values()) else None,
    }
    if ADAMW in defaults:
        second = defaults[ADAMW]
        base |= {"muon": AUTO, "adamw_lr": second.get("lr"), "adamw_weight_decay": second.get("weight_decay")}
    return base


def _check_effects(
    model: nn.Module, groups: list[dict[str, Any]], rules: Mapping[int, Rule], recipe: Recipe, problems: Problems
) -> None:
    """An option that no optimizer of what its rule matches has is a problem."""
    params = named_parameters(module_tree(model))
    owners = {param: group["optimizer"] for group in groups for param in group["params"]}
    for i, rule in rules.items():
        matched = {owners[named.param] for named in select_all(rule.match, params, "match") if named.param in owners}
        for key, value in rule.others.items():
            if matched and not any(key in recipe.members[name].options for name in matched):
                names = " and ".join(sorted(recipe.members[name].name for name in matched))
                rule_text = f"is no option of {names}, whose are all that the rule matches"
                problems.add(join(f"groups.rules[{i}]", key), rule_text, value)


def _fitting(group: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The group without what only the other optimizer has: a rule may match parameters of both."""
    own = recipe.members[group["optimizer"]].options
    others = {key for member in recipe.members.values() for key in member.options} - own
    return {key: value for key, value in group.items() if key not in others}


def _rule(table: Mapping[str, Any], recipe: Recipe | None, scale: float, path: str) -> Rule:
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
        decays = any("weight_decay" in member.defaults for member in recipe.members.values())
        for key in ("weight_decay", "wd_mult"):
            if key in arguments and not decays:
                problems.add(join(path, key), f"is refused: {recipe.name} has no weight decay", arguments[key])
        if "optimizer" in arguments and len(recipe.members) == 1:
            rule = "is refused: there is no table optimizer.adamw"
            problems.add(join(path, "optimizer"), rule, arguments["optimizer"])
    problems.raise_if_any()
    return attempt(lambda: Rule(**arguments), {}, path)


def _options(others: Mapping[str, Any], settings: Collection[str], recipe: Recipe, path: str) -> dict[str, Any]:
    """A rule's options beside its settings, as the optimizer wants them; of two, as each that has them does."""
    problems = Problems()
    options = set().union(*(member.options for member in recipe.members.values()))
    for key, value in others.items():
        if key not in options:
            problems.unknown(path, f"a rule for {recipe.name}", key, value, {*settings, *options})
    wanted: dict[str, Any] = {}
    for member in recipe.members.values():
        of_member = Problems()
        known = {key: value for key, value in others.items() if key in member.options}
        known = check_arguments(member.factory, known, path, of_member, complete=False)
        if known:
            with of_member.collected():
                member.check(known, path)
        wanted = {**known, **wanted}
        told = {problem.path for problem in problems}
        problems.extend(problem for problem in of_member if problem.path not in told)
    problems.raise_if_any()
    return wanted


def _table(rule: Rule) -> dict[str, Any]:
    """What makes the rule again."""
    settings = {key: getattr(rule, key) for key in ("match", "lr", "lr_mult", "weight_decay", "wd_mult", "optimizer")}
    given = {key: value for key, value in settings.items() if value is not None}
    return {**given, **({"freeze": True} if rule.freeze else {}), **rule.others}
