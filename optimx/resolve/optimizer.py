"""Section ``optimizer``: the class and its arguments, or those of two optimizers that train together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._engine.grad_transforms import TRANSFORMS
from .._engine.rule import UpdateRule
from .._engine.step import MultiTensorStep
from .._engine.storage import SETTINGS as STORAGE
from ..composite import Composite
from ..config import AdamWConfig, OptimizerConfig
from ..config.errors import Problems, join
from ..config.values import check_arguments, parameters_of
from ..param_groups import by_optimizer
from ..param_groups.muon import ADAMW, MUON
from ..registry import OPTIMIZERS
from .checks import attempt

__all__ = ["CompositeRecipe", "OptimizerRecipe", "Recipe", "resolve_optimizer"]

#: Keys of the section that are a composite's own, and none of its members'.
OF_ALL = ("max_grad_norm", "skip_nonfinite", "skip_spikes", "max_skips")
#: Keys that hold for both optimizers of a config.
SHARED = (*OF_ALL, "average")
#: Keys of the section that are arguments of the class.
ARGUMENTS = ("lr", "weight_decay", *SHARED)


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

    @property
    def members(self) -> dict[str | None, OptimizerRecipe]:
        """By what groups say of whose they are, which is nothing."""
        return {None: self}

    @property
    def options(self) -> set[str]:
        """What a group can have of its own."""
        named, takes_any = parameters_of(self.factory)
        rule = getattr(self.factory, "rule", None)
        # some are in no group where nobody chooses them
        more = (*STORAGE, *rule.optional_settings, *TRANSFORMS) if isinstance(rule, UpdateRule) else ()
        return {key for key in (*self.defaults, *more) if takes_any or key in named}

    def check(self, options: dict[str, Any], path: str) -> None:
        """ConfigError if the optimizer refuses these as a group's.

        Args:
            options: Some of :attr:`options`.
            path: Of the table that they are in.
        """
        attempt(lambda **some: self.factory([small_like(self.like)], **{**self.arguments, **some}), options, path)

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
        return self.factory([{**group, "params": [small_like(self.like)]} for group in copies], **self.arguments)


@dataclass(frozen=True)
class CompositeRecipe:
    """Two optimizers that can be made as one.

    Attributes:
        members: By what groups say of whose they are.
        rules: Arguments of the composite: the norm that clips both, and which steps both skip.
        config: The resolved section.
    """

    members: dict[str | None, OptimizerRecipe]
    rules: dict[str, Any]
    config: OptimizerConfig

    @property
    def name(self) -> str:
        """For messages."""
        return " and ".join(member.name for member in self.members.values())

    def make(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The optimizer, of the members that have groups."""
        return self._composed(groups, OptimizerRecipe.make)

    def rehearse(self, groups: list[dict[str, Any]]) -> Optimizer:
        """As :meth:`OptimizerRecipe.rehearse`."""
        return self._composed(groups, OptimizerRecipe.rehearse)

    def _composed(
        self, groups: list[dict[str, Any]], make: Callable[[OptimizerRecipe, list[dict[str, Any]]], Optimizer]
    ) -> Composite:
        theirs = by_optimizer(groups)
        made = {name: make(member, theirs[name]) for name, member in self.members.items() if name in theirs}
        return Composite(made, **self.rules)

    def check_rules(self) -> None:
        """ConfigError if the composite refuses its rules."""
        members = {str(name): member.factory([small_like(member.like)], **member.arguments)
                   for name, member in self.members.items()}  # fmt: skip
        attempt(lambda **some: Composite(members, **some), self.rules, "optimizer")


Recipe = OptimizerRecipe | CompositeRecipe


def resolve_optimizer(section: OptimizerConfig, model: nn.Module, scale: float) -> Recipe:
    """The class and its arguments, checked by the class itself on a small parameter.

    Args:
        section: Of the config.
        model: Whose parameters' device and dtype count.
        scale: Factor of the learning rate.

    Raises:
        ConfigError: Everything that is wrong with it.
    """
    if section.adamw is None:
        return _resolve(section, model, scale, "optimizer")
    problems = Problems()
    first = second = None
    rules = {key: value for key in OF_ALL if (value := getattr(section, key)) is not None}
    none: dict[str, Any] = dict.fromkeys(OF_ALL)
    alone = replace(section, **none, adamw=None)
    with problems.collected():
        first = _resolve(alone, model, scale, "optimizer")
    table = section.adamw
    for key in SHARED:
        if key in table.args:
            rule = f"should be given as optimizer.{key}, which holds for both,"
            problems.add(join("optimizer.adamw", key), rule, table.args[key])
    args = {key: value for key, value in table.args.items() if key not in SHARED}
    other = replace(alone, name=ADAMW, lr=table.lr, weight_decay=table.weight_decay, args=args)
    with problems.collected():
        second = _resolve(other, model, scale, "optimizer.adamw")
    problems.raise_if_any()
    assert first is not None
    assert second is not None
    resolved = AdamWConfig(second.config.lr, second.config.weight_decay, second.config.args)
    recipe = CompositeRecipe({MUON: first, ADAMW: second}, rules, replace(first.config, **rules, adamw=resolved))
    recipe.check_rules()
    return recipe


def _resolve(section: OptimizerConfig, model: nn.Module, scale: float, path: str) -> OptimizerRecipe:
    """The recipe of one optimizer, which is described under ``path``."""
    factory = section.name
    if isinstance(factory, str):
        factory = OPTIMIZERS.get(factory, join(path, "name"))
    problems = Problems()
    given = {key: value for key in ARGUMENTS if (value := getattr(section, key)) is not None} | section.args
    named, _ = parameters_of(factory)
    defaults = {key: p.default for key, p in named.items() if p.default is not p.empty}
    arguments = check_arguments(factory, given, path, problems)
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
            made = attempt(lambda **some: factory([small_like(like)], **some), arguments, path, required)
            if not isinstance(made, Optimizer):
                problems.add(join(path, "name"), "should make a torch.optim.Optimizer", section.name)
    problems.raise_if_any()
    assert made is not None
    complete = {key: value for key, value in {**defaults, **arguments}.items() if value is not None}
    own = {key: complete.pop(key, None) for key in ARGUMENTS}
    config = OptimizerConfig(section.name, **own, args=complete)
    return OptimizerRecipe(factory, arguments, made.defaults, config, like, isinstance(made, MultiTensorStep))


def small_like(like: Tensor) -> Tensor:
    """A parameter of the same kind that costs nothing: a matrix, which Muon wants, of no rows, which suit any split."""
    dtype = like.dtype if like.is_floating_point() or like.is_complex() else torch.float32
    return torch.zeros(0, 1, dtype=dtype, device=like.device, requires_grad=True)
