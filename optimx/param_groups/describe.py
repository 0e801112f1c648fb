"""What is in the groups of a model, and what is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .._table import aligned
from .muon import BY_HAND, routes
from .names import NamedParameter, module_tree, named_parameters
from .rules import same

#: The settings that have a column of their own.
NUMBERS = ("lr", "lr_scale", "weight_decay")


@dataclass(frozen=True)
class GroupDescription:
    """A group.

    Attributes:
        names: Of its parameters in the model, without wrappers.
        elements: Of all of them.
        settings: The group without ``params`` and ``param_names``.
        reasons: Why each parameter is the group's optimizer's, in words, where the group says whose it is; else empty.
    """

    names: tuple[str, ...]
    elements: int
    settings: Mapping[str, Any]
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class GroupsDescription:
    """What :func:`describe` found; prints as a table.

    Attributes:
        groups: In the order given.
        frozen: Names of the parameters with ``requires_grad=False``, in a group or not.
        left_out: Names of the trainable parameters in no group.
        tied: All names of each parameter that has several.
    """

    groups: tuple[GroupDescription, ...]
    frozen: tuple[str, ...]
    left_out: tuple[str, ...]
    tied: tuple[tuple[str, ...], ...]

    @property
    def table(self) -> list[tuple[str, ...]]:
        """A row for each group, after one with the names of the columns."""
        routed = any(group.reasons for group in self.groups)
        whose = ("optimizer", "why") if routed else ()
        rows: list[tuple[str, ...]] = [("group", "tensors", "elements", *NUMBERS, *whose, "others", "names")]
        for i, group in enumerate(self.groups):
            counts = (str(i), f"{len(group.names):,}", f"{group.elements:,}")
            numbers = (_number(group.settings.get(name)) for name in NUMBERS)
            whose = (str(group.settings.get("optimizer", "-")), _counted(group.reasons)) if routed else ()
            common = self._common(group.settings.get("optimizer"))
            others = {k: v for k, v in group.settings.items() if k not in (*NUMBERS, *common, "optimizer")}
            rows.append((*counts, *numbers, *whose, _settings(others) or "-", _few(group.names)))
        return rows

    @property
    def notes(self) -> list[str]:
        """What the table does not say, a line each."""
        lines = []
        for owner in dict.fromkeys(group.settings.get("optimizer") for group in self.groups):
            if common := self._common(owner):
                lines.append(f"in every group{'' if owner is None else f' of {owner}'}: {_settings(common)}")
        lines += [f"tied: {' = '.join(names)}" for names in self.tied]
        for what, names in (("frozen", self.frozen), ("trainable, in no group", self.left_out)):
            if names:
                lines.append(f"{what}: {len(names):,} ({_few(names)})")
        return lines

    def __str__(self) -> str:
        return "\n".join([*aligned(self.table, numbers=range(6)), *self.notes])

    def _common(self, owner: str | None) -> dict[str, Any]:
        """Settings without a column that are the same in all groups of an optimizer; of all, where they do not say."""
        settings = [group.settings for group in self.groups if group.settings.get("optimizer") == owner]
        if not settings:
            return {}
        first, *rest = settings
        return {
            name: value
            for name, value in first.items()
            if name not in (*NUMBERS, "optimizer") and all(name in other and same(other[name], value) for other in rest)
        }


def describe(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> GroupsDescription:
    """Show which parameters of a model are in which group, which in none, which are frozen, which tied.

    Of groups that say whose they are, Muon's or AdamW's, it tells why their parameters are.

    Args:
        model: The model, wrapped or not.
        groups: From :func:`param_groups`, written by hand, or an optimizer's ``param_groups``.

    Returns:
        A :class:`GroupsDescription`; ``print`` it.

    Raises:
        ValueError: A group has a parameter that is not the model's.
    """
    root = module_tree(model)
    found = named_parameters(root)
    params: dict[Tensor, NamedParameter] = {named.param: named for named in found}
    groups = list(groups)
    shown = routes(root, found) if any("optimizer" in group for group in groups) else {}
    rows = []
    for i, group in enumerate(groups):
        members: list[Tensor] = list(group["params"])
        strange = sum(param not in params for param in members)
        if strange:
            raise ValueError(f"groups[{i}] should have parameters of the model only but has {strange} others")
        settings = {name: value for name, value in group.items() if name not in ("params", "param_names")}
        names = tuple(params[param].name for param in members)
        reasons: tuple[str, ...] = ()
        if "optimizer" in group:
            its = (shown[params[param]] for param in members)
            reasons = tuple(route.reason if route.optimizer == group["optimizer"] else BY_HAND for route in its)
        elements = sum(param.numel() for param in members)
        rows.append((set(members), GroupDescription(names, elements, settings, reasons)))
    grouped = set().union(*(members for members, _ in rows))
    return GroupsDescription(
        tuple(row for _, row in rows),
        tuple(named.name for param, named in params.items() if not param.requires_grad),
        tuple(named.name for param, named in params.items() if param.requires_grad and param not in grouped),
        tuple(named.names for named in params.values() if len(named.names) > 1),
    )


def _number(value: Any) -> str:
    return "-" if value is None else f"{float(value):.4g}"


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def _counted(reasons: tuple[str, ...]) -> str:
    """The reasons with how many parameters have each, the most frequent first."""
    return ", ".join(f"{reason} ({count:,})" for reason, count in Counter(reasons).most_common()) or "-"


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
