"""One hyperparameter of all parameter groups, and the schedules that set it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from operator import is_
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .._checks import at_least, one_of
from .schedule import Schedule, check_schedules

Group = dict[str, Any]


class Field:
    """A number that every group has: ``"lr"``, ``"weight_decay"``, ``"betas[0]"``.

    What the factor 1 stands for is each group's ``initial_lr`` (``initial_weight_decay``, ...), as for torch's
    schedulers: it travels with the optimizer's checkpoint, and a group added later brings its own.
    """

    def __init__(self, name: str, schedules: Schedule | Sequence[Schedule], optimizer: Optimizer) -> None:
        groups = optimizer.param_groups
        # torch's OneCycleLR calls Adam's first beta its momentum
        alias = "betas[0]" if name == "momentum" and "momentum" not in groups[0] else name
        self.name = one_of("field", alias, set.intersection(*(set(field_names(group)) for group in groups)))
        match = re.fullmatch(r"(\w+)\[(\d+)\]", self.name)
        self.key = match[1] if match else self.name
        self.index = int(match[2]) if match else None
        self._initial_key = f"initial_{self.key}"
        self.schedules: Schedule | tuple[Schedule, ...] = (
            schedules if isinstance(schedules, Schedule) else check_schedules(f"schedules of {name}", schedules)
        )
        self._check_number(len(groups))
        each = (self.schedules,) if isinstance(self.schedules, Schedule) else self.schedules
        self._absolutes = [schedule.absolutes for schedule in each]
        self._initials: list[Any] = []
        self.bases: list[float] = []

    def check(self, groups: Sequence[Group], bases: Sequence[float] | None = None) -> None:
        """ValueError for a group whose own value is below an absolute floor. Nothing is changed."""
        own = self.read(groups) if bases is None else bases
        for i, base in enumerate(own):
            for absolute in self._absolutes[0 if isinstance(self.schedules, Schedule) else i]:
                if absolute.value > base:
                    raise ValueError(
                        f"an absolute floor or start should be <= {base}, the {self.name} of param_groups[{i}], "
                        f"but is: {absolute.value}"
                    )

    def update(self, groups: Sequence[Group], step: int) -> None:
        """Write the values of a step into the groups; tensors keep their identity."""
        for group, value in zip(groups, self.values(step, self.refresh(groups)), strict=True):
            # 26 groups are stepped as fast as torch's: no call for what is nearly always a float
            if type(group[self.key]) is float:
                group[self.key] = value
            else:
                write(group, self.key, value, self.index)

    def values(self, step: int, bases: Sequence[float]) -> list[float]:
        """The values of a step, a group each."""
        if not isinstance(self.schedules, Schedule):
            self._check_number(len(bases))
            return [schedule.value(step, base) for schedule, base in zip(self.schedules, bases, strict=True)]
        if self._absolutes[0]:
            return [self.schedules.value(step, base) for base in bases]
        factor = self.schedules(step)
        return [base * factor for base in bases]

    def refresh(self, groups: Sequence[Group]) -> list[float]:
        """Each group's own value; read anew where a checkpoint or a new group brought another.

        Raises:
            ValueError: A new value is below an absolute floor, or a new group has no schedule.
        """
        key = self._initial_key
        # the same objects: to compare tensors would wait for their device
        now = [group.get(key) for group in groups]
        if len(now) == len(self._initials) and all(map(is_, now, self._initials)):
            return self.bases
        self._check_number(len(groups))
        bases = []
        for i, group in enumerate(groups):
            known = i < len(self._initials)
            if now[i] is None:
                # a loaded checkpoint may not have it
                now[i] = self._initials[i] if known else _copy(group[self.key])
            bases.append(self.bases[i] if known and now[i] is self._initials[i] else self._number(now[i]))
        self.check(groups, bases)
        for group, own in zip(groups, now, strict=True):
            group[key] = own
        self._initials, self.bases = now, bases
        return self.bases

    def set_bases(self, groups: Sequence[Group], bases: Iterable[float]) -> None:
        """Give the first groups other values of their own."""
        for group, base in zip(groups, bases, strict=False):
            own: Any = group.get(self._initial_key, group[self.key])
            if self.index is None:
                group[self._initial_key] = base
            else:
                group[self._initial_key] = type(own)((*own[: self.index], base, *own[self.index + 1 :]))
        self.refresh(groups)

    def read(self, groups: Sequence[Group]) -> list[float]:
        """Each group's own value, as :meth:`refresh` would find it. Nothing is changed."""
        return [self._number(group.get(self._initial_key, group[self.key])) for group in groups]

    def _number(self, value: Any) -> float:
        return float(value if self.index is None else value[self.index])

    def _check_number(self, groups: int) -> None:
        if isinstance(self.schedules, tuple) and len(self.schedules) != groups:
            raise ValueError(
                f"schedules of {self.name} should be one, or one for each of the {groups} param_groups, "
                f"but are: {len(self.schedules)}"
            )


class BaseLRs(list[float]):
    """What a scheduler's ``base_lrs`` are: what is written into the list is set on the scheduler, or refused.

    Args:
        values: The learning rates.
        assign: Sets them all.
    """

    def __init__(self, values: Iterable[float], assign: Callable[[list[float]], None]) -> None:
        super().__init__(values)
        self._assign = assign

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy belongs to no scheduler
        return list, ([*self],)


def _assigning(name: str) -> Callable[..., Any]:
    change = getattr(list, name)

    def changed(self: BaseLRs, *args: Any, **options: Any) -> Any:
        values = [*self]
        result = change(values, *args, **options)
        self._assign(values)
        list.__setitem__(self, slice(None), values)
        return self if result is values else result

    return changed


for _name in ("append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort",
              "__delitem__", "__iadd__", "__imul__", "__setitem__"):  # fmt: skip
    setattr(BaseLRs, _name, _assigning(_name))


def write(group: Group, key: str, value: Any, index: int | None = None) -> None:
    """Set a number of a group, or one of a pair; a tensor keeps its identity."""
    current = group[key]
    part = current if index is None else current[index]
    if isinstance(part, Tensor):
        part.fill_(value)
    elif index is None:
        group[key] = value
    else:
        group[key] = type(current)((*current[:index], value, *current[index + 1 :]))


def current_lrs(groups: Sequence[Group]) -> list[Any]:
    """The groups' learning rates; of tensors, copies."""
    return [lr if type(lr) is float else _copy(lr) for lr in [group["lr"] for group in groups]]


def per_group(name: str, value: float | Sequence[float], number: int) -> list[float]:
    """A number for each group, >= 0, from one for all or one for each."""
    values = [float(item) for item in value] if isinstance(value, Sequence) else [float(value)] * number
    if len(values) != number:
        raise ValueError(f"{name} should be one, or one for each of the {number} param_groups, but are: {values}")
    for i, item in enumerate(values):
        at_least(0).check(f"{name}[{i}]", item)
    return values


def _copy(value: Any) -> Any:
    """A tensor's value of now: the group's own one is updated in place."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_copy, value))
    return value.clone() if isinstance(value, Tensor) else value


def field_names(group: Group) -> list[str]:
    """What can be scheduled: the numbers of a group, and those in its pairs."""
    names = []
    for key, value in group.items():
        if key == "params" or key.startswith("initial_"):
            continue
        if _is_number(value):
            names.append(key)
        elif isinstance(value, (tuple, list)):
            names += [f"{key}[{i}]" for i, item in enumerate(value) if _is_number(item)]
    return names


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)
