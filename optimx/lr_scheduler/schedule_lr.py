"""ScheduleLR: a schedule applied to an optimizer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .._checks import as_number, as_steps, at_least, check_instance, one_of
from ._plot import plot_groups
from .field import BaseLRs, Field, current_lrs, per_group
from .schedule import Schedule

#: What may be scheduled, and by what: one schedule, or one for each group.
Schedules = Schedule | Sequence[Schedule]


class ScheduleLR(LRScheduler):
    """Sets hyperparameters to what schedules say, in closed form: every value is a function of the step alone.

    So it resumes right in whichever order optimizer and scheduler are built and loaded, also where the optimizer's
    state was not saved; ``step(n)`` goes to any step; a group added later joins at its own learning rate; tensors are
    updated in place; and as a member of :class:`~torch.optim.lr_scheduler.SequentialLR` it does what it says.

    It does not touch ``optimizer.step``, so unlike torch's it does not warn when it is stepped first.

    A group's factor 1 is its ``initial_lr``, which torch's schedulers share: the learning rate that it had when the
    first scheduler came. To begin anew with others on a used optimizer, give ``base_lrs``; to go on with others, set
    the attribute of that name.

    Args:
        optimizer: Any torch optimizer; its ``step`` may have been replaced or compiled.
        schedule: A schedule, or one for each group; or a dict of them by field: ``"lr"``, ``"weight_decay"``,
            ``"momentum"`` (for Adam and its kin the first beta), ``"betas[0]"``, or another number of the groups.
        last_epoch: The step before the one to begin with, as in torch (default: -1, at the beginning).
        base_lrs: Learning rate of each group, or of all, at factor 1 (default: None, ``initial_lr``, else ``lr``).
        on_mismatch: What :meth:`load_state_dict` does with a checkpoint of another schedule or other learning rates:
            ``"error"`` (default) raises, ``"use_new"`` keeps those given here, ``"use_checkpoint"`` takes the
            checkpoint's.

    Raises:
        TypeError: ``optimizer`` is no optimizer, or a schedule no :class:`Schedule`.
        ValueError: An unknown field or policy, not one schedule (or base) a group, ``last_epoch`` < -1, or an
            :class:`Absolute` above a group's own learning rate.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedules | Mapping[str, Schedules],
        last_epoch: int = -1,
        *,
        base_lrs: float | Sequence[float] | None = None,
        on_mismatch: Literal["error", "use_new", "use_checkpoint"] = "error",
    ) -> None:
        # not super().__init__(): to warn of calls in the wrong order it replaces optimizer.step by one that counts,
        # which fails where step is no method any more, and warns falsely where a GradScaler skipped the first step
        check_instance("optimizer", optimizer, Optimizer, "a torch.optim.Optimizer")
        groups = optimizer.param_groups
        self.on_mismatch = one_of("on_mismatch", on_mismatch, ("error", "use_new", "use_checkpoint"))
        self.last_epoch = as_steps("last_epoch", last_epoch, least=-1)
        self.optimizer = optimizer
        self._fields = _fields(schedule if isinstance(schedule, Mapping) else {"lr": schedule}, optimizer)
        bases = None if base_lrs is None else per_group("base_lrs", base_lrs, len(groups))
        for name, field in self._fields.items():
            field.check(groups, bases if name == "lr" else None)
        for name, field in self._fields.items():
            if name == "lr" and bases is not None:
                field.set_bases(groups, bases)
            else:
                field.refresh(groups)
        self._step_count = 0
        self.step()

    def _set_schedules(self, by_field: Mapping[str, Schedules]) -> None:
        """Take other schedules, whose values come with the next step."""
        fields = _fields(by_field, self.optimizer)
        for field in fields.values():
            field.check(self.optimizer.param_groups)
        self._fields = fields

    @property
    def schedule(self) -> Any:
        """What was given: a schedule, a tuple of them, or a dict by field."""
        by_field = {name: field.schedules for name, field in self._fields.items()}
        return by_field["lr"] if list(by_field) == ["lr"] else by_field

    @property
    def base_lrs(self) -> list[Any]:
        """Learning rate of each group at factor 1; set others, all or one, and they count from the next step on."""
        return BaseLRs(self._fields["lr"].bases if "lr" in self._fields else [], self._set_base_lrs)

    @base_lrs.setter
    def base_lrs(self, values: Any) -> None:
        self._set_base_lrs(values)

    def _set_base_lrs(self, values: float | Sequence[float]) -> None:
        if "lr" not in self._fields:
            raise ValueError(f"base_lrs should be set of a scheduler of lr, but scheduled are: {[*self._fields]}")
        field, groups = self._fields["lr"], self.optimizer.param_groups
        # groups that have joined since the last step may have theirs or not
        known = isinstance(values, Sequence) and len(field.bases) <= len(values) <= len(groups)
        bases = per_group("base_lrs", values, len(values) if known else len(groups))  # type: ignore[arg-type]
        field.check(groups, bases)
        field.set_bases(groups, bases)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates of the current step, a group each."""
        if "lr" not in self._fields:
            return current_lrs(self.optimizer.param_groups)
        scheduled = self._fields["lr"]
        return [*scheduled.values(self.last_epoch, scheduled.read(self.optimizer.param_groups))]

    def step(self, epoch: float | None = None) -> None:
        """Go on to the next step, or to any step, also between two: where a step is an epoch, ``epoch + i / iters``.

        Args:
            epoch: The step (default: None, the next one).
        """
        self._update_lr(epoch)
        self._step_count += 1

    def _update_lr(self, epoch: float | None = None) -> None:
        """What torch's SequentialLR calls at a milestone."""
        then = self.last_epoch + 1 if epoch is None else as_number("epoch", epoch)
        at_least(0).check("epoch", then)
        before, self.last_epoch = self.last_epoch, then  # type: ignore[assignment]
        try:
            self._write()
        except BaseException:
            # a group that has joined was refused: no step was taken
            self.last_epoch = before
            raise

    def _write(self) -> None:
        groups = self.optimizer.param_groups
        for field in self._fields.values():
            field.update(groups, self.last_epoch)
        self._last_lr = current_lrs(groups)

    def preview(self, n: int, start: int = 0, field: str = "lr") -> list[list[float]]:
        """The values of ``n`` steps from ``start``: for each step a list of each group's. Nothing is changed.

        Args:
            n: Number of steps.
            start: The first (default: 0).
            field: Which hyperparameter (default: ``"lr"``).
        """
        first = as_steps("start", start)
        scheduled = self._fields[one_of("field", field, self._fields)]
        bases = scheduled.read(self.optimizer.param_groups)
        return [scheduled.values(step, bases) for step in range(first, first + as_steps("n", n))]

    def plot(self, path: str | os.PathLike[str], n: int | None = None, field: str = "lr") -> None:
        """Draw the values of the first ``n`` steps into an image file (needs matplotlib).

        Args:
            path: The file; its suffix is the format, such as ``.svg`` (without one: PNG).
            n: Number of steps (default: None, to just past the schedule's end, which it has to have).
            field: Which hyperparameter (default: ``"lr"``).
        """
        if n is None:
            schedules = self._fields[one_of("field", field, self._fields)].schedules
            each = (schedules,) if isinstance(schedules, Schedule) else schedules
            lengths = [schedule.steps for schedule in each if schedule.steps is not None]
            if not lengths:
                raise ValueError("n should be given, as the schedule has no end, but is: None")
            n = math.ceil(max(lengths)) + 1
        plot_groups(path, self.preview(n, field=field), self.optimizer.param_groups, field)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts; loads under ``torch.load(weights_only=True)``."""
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "_last_lr": [float(lr) for lr in self._last_lr],
            # as a member of a SequentialLR that has passed it, or not begun it, the learning rates are another's
            "in_force": current_lrs(self.optimizer.param_groups) == self._last_lr,
            "bases": {name: [*field.bases] for name, field in self._fields.items()},
            "schedules": {name: _plain(field.schedules) for name, field in self._fields.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go to the checkpoint's step and set the groups to its values.

        Args:
            state_dict: What :meth:`state_dict` returned; with ``on_mismatch="use_new"`` any torch scheduler's, of
                which the step is used.

        Raises:
            ValueError: The checkpoint's schedule or base values are not those of this scheduler (see
                ``on_mismatch``), or it is no scheduler's. Nothing is changed.
        """
        if "last_epoch" not in state_dict:
            raise ValueError(f"state_dict should have 'last_epoch' but has: {sorted(state_dict)}")
        differences = [*self._differences(state_dict)]
        if differences and self.on_mismatch == "error":
            raise ValueError(
                f"the checkpoint should be of this schedule but differs: {'; '.join(differences)} "
                "(on_mismatch='use_new' keeps this scheduler's, 'use_checkpoint' takes the checkpoint's)"
            )
        if differences and self.on_mismatch == "use_checkpoint":
            self._take(state_dict)
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = int(self.last_epoch) + 1
        if state_dict.get("in_force", True) and self.last_epoch >= 0:
            self._write()

    def _differences(self, state: Mapping[str, Any]) -> Iterator[str]:
        for name in state.get("schedules", {}):
            if name not in self._fields:
                yield f"schedule of {name}: {_brief(state['schedules'][name])} in the checkpoint, none here"
        for name, field in self._fields.items():
            saved = state.get("schedules", {}).get(name)
            yield from _differences(f"schedule of {name}", saved, _plain(field.schedules))
            bases = state.get("bases", {}).get(name, [])
            own = field.refresh(self.optimizer.param_groups)
            if len(bases) > len(own):
                yield f"param_groups: {len(bases)} in the checkpoint, {len(own)} here"
            for i, (there, here) in enumerate(zip(bases, own, strict=False)):
                # one of them may have been rounded to float32
                if not math.isclose(there, here, rel_tol=1e-6):
                    yield f"base {name} of param_groups[{i}]: {there} in the checkpoint, {here} here"

    def _take(self, state: Mapping[str, Any]) -> None:
        if not state.get("schedules"):
            raise ValueError(f"state_dict should have 'schedules' for 'use_checkpoint' but has: {sorted(state)}")
        fields = _fields({name: _from_plain(plain) for name, plain in state["schedules"].items()}, self.optimizer)
        groups = self.optimizer.param_groups
        for name, field in fields.items():
            field.check(groups, state["bases"][name])
        for name, field in fields.items():
            field.set_bases(groups, state["bases"][name])
        self._fields = fields


def _fields(by_field: Mapping[str, Schedules], optimizer: Optimizer) -> dict[str, Field]:
    if not by_field:
        raise ValueError("schedule should be of one field or more but is: {}")
    fields = [Field(name, schedules, optimizer) for name, schedules in by_field.items()]
    names = [field.name for field in fields]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"a field should have one schedule but {name} has: {names.count(name)}")
    return dict(zip(names, fields, strict=True))


def _plain(schedules: Schedule | tuple[Schedule, ...]) -> Any:
    return schedules.to_dict() if isinstance(schedules, Schedule) else [item.to_dict() for item in schedules]


def _from_plain(values: Any) -> Schedule | list[Schedule]:
    return Schedule.from_dict(values) if isinstance(values, Mapping) else [Schedule.from_dict(item) for item in values]


def _differences(what: str, there: Any, here: Any) -> Iterator[str]:
    """Where two plain values differ, in words."""
    if isinstance(there, Mapping) and isinstance(here, Mapping) and there.get("type") == here.get("type"):
        for key in here:
            # a field that the checkpoint does not know yet had its default
            if key in there:
                yield from _differences(f"{what}.{key}", there[key], here[key])
    elif isinstance(there, (list, tuple)) and isinstance(here, list) and len(there) == len(here):
        for i, (a, b) in enumerate(zip(there, here, strict=True)):
            yield from _differences(f"{what}[{i}]", a, b)
    elif there != here:
        yield f"{what}: {_brief(there)} in the checkpoint, {_brief(here)} here"


def _brief(value: Any) -> str:
    return "none" if value is None else str(value.get("type")) if isinstance(value, Mapping) else str(value)
