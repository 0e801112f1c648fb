"""Section ``schedule``: steps, fractions and epochs become steps, names become a schedule or a scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..config import ScheduleConfig
from ..config.errors import MISSING, ConfigError, Problems, join
from ..config.sections import Duration
from ..config.values import check_arguments, hints_of, parameters_of
from ..lr_scheduler import Absolute, Cooldown, Hold, InverseSqrt, Phases, Schedule, ScheduleLR, Staircase, WarmupLR
from ..registry import SCHEDULERS
from .checks import attempt
from .lengths import ROUNDING, Clock, in_steps

__all__ = ["ScheduleRecipe", "resolve_schedule"]

#: Keys of the section under the names that scheduler classes have for them.
_NAMES: dict[str, tuple[str, ...]] = {
    "total": ("total_steps",), "warmup": ("warmup_steps",), "floor": ("floor", "min_lr_ratio"), "interval": (),
    "convention": ("convention",),
}  # fmt: skip


@dataclass(frozen=True)
class ScheduleRecipe:
    """A scheduler that can be made.

    Attributes:
        make: Of an optimizer.
        config: The resolved section.
    """

    make: Callable[[Optimizer], LRScheduler]
    config: ScheduleConfig


def resolve_schedule(
    section: ScheduleConfig, rehearse: Callable[[], Optimizer] | None, bad: Collection[str] = ()
) -> ScheduleRecipe | None:
    """What makes the scheduler, and the section in whole steps.

    Args:
        section: Of the config.
        rehearse: Makes an optimizer to try schedulers on, if there is one.
        bad: Paths that the config has, but with values that could not be read.

    Returns:
        None if what lengths are measured by is bad, and nothing else is to be told.

    Raises:
        ConfigError: Everything that is wrong with it.
    """
    problems = Problems()
    clock = Clock(section.steps_per_epoch, bad={"schedule.total", "schedule.steps_per_epoch"} & {*bad})
    clock.rounding = ROUNDING.get(section.convention, round)
    if section.total is not None:
        clock.total = clock.steps(section.total, "schedule.total", problems)
        if clock.total is None:
            clock.bad.add("schedule.total")
        if clock.total is not None and clock.total < 1:
            problems.add("schedule.total", "should be >= 1 step", section.total)
    resolved = replace(
        section,
        total=clock.total,
        warmup=_warmup(section, clock, problems),
        interval=None if section.interval is None else clock.steps(section.interval, "schedule.interval", problems),
        args=in_steps(section.args, "schedule", clock, problems),
        phases=tuple(in_steps(section.phases, "schedule.phases", clock, problems)),
    )
    if (section.name is None) == (not section.phases):
        problems.add("schedule", "should have either name or phases", section.name or MISSING)
    thing = None
    if section.name is not None:
        with problems.collected():
            thing = _named(section.name, "schedule.name")
    if (problems or clock.bad) and thing is not None:
        _check_keys(thing, resolved.args, problems)
    problems.raise_if_any()
    if clock.bad:
        return None
    if thing is None or _gives_schedule(thing):
        return _schedule(resolved, thing, clock, rehearse)
    return _scheduler(resolved, thing, clock, rehearse)


def _warmup(section: ScheduleConfig, clock: Clock, problems: Problems) -> int | dict[str, Any] | None:
    if not isinstance(section.warmup, dict):
        return None if section.warmup is None else clock.steps(section.warmup, "schedule.warmup", problems)
    steps = clock.length(section.warmup.get("steps"), "schedule.warmup.steps", problems)
    return {**section.warmup, "steps": steps}


def _check_keys(thing: Callable[..., Any], arguments: Mapping[str, Any], problems: Problems) -> None:
    """What can be told of arguments when the lengths around them are wrong."""
    skip = 0 if _gives_schedule(thing) else 1
    plain = {k: v for k, v in arguments.items() if v is not None and not isinstance(v, (Mapping, list))}
    check_arguments(thing, plain, "schedule", problems, skip=skip, complete=False)


def _named(name: Any, path: str) -> Callable[..., Any]:
    if isinstance(name, str):
        return SCHEDULERS.get(name, path)
    if not callable(name):
        raise ConfigError.of(path, "should be a name or a class", name)
    return name


def _gives_schedule(thing: Callable[..., Any]) -> bool:
    """Whether it makes a pure function of the step; else it takes an optimizer first and makes a scheduler."""
    if inspect.isclass(thing):
        return issubclass(thing, Schedule)
    return "optimizer" not in parameters_of(thing, skip=0)[0]


def wsd(steps: int, decay: Duration = 0.1, shape: str = "1-sqrt", floor: float | Absolute = 0.0) -> Schedule:
    """Warmup-stable-decay (https://arxiv.org/abs/2404.06395) after its warmup, which is the section's own.

    Args:
        steps: Of the stable phase and the decay together.
        decay: Steps of the decay (default: a tenth of the section's total).
        shape: Of the decay, as for :class:`~optimx.lr_scheduler.Cooldown` (default: ``"1-sqrt"``).
        floor: Where it ends, a ratio of each group's lr, or :class:`~optimx.lr_scheduler.Absolute` (default: 0).
    """
    if decay > steps:  # type: ignore[operator]
        raise ValueError(f"decay should be <= {steps}, the steps without the warmup, but is: {decay}")
    return Hold(steps - decay) >> Cooldown(decay, shape, floor)  # type: ignore[operator, arg-type]


def inverse_sqrt(steps: int | None = None, timescale: Duration = 10_000, floor: float | Absolute = 0.0) -> InverseSqrt:
    """:class:`~optimx.lr_scheduler.InverseSqrt` with a timescale that, as every length, may be a part of the total.

    Args:
        steps: Its length, after which the value stays (default: None, endless).
        timescale: > 0 steps; after three of them the value is a half (default: 10000).
        floor: Where it stops, a ratio of each group's lr, or :class:`~optimx.lr_scheduler.Absolute` (default: 0).
    """
    return InverseSqrt(timescale, steps=steps, floor=floor)  # type: ignore[arg-type]


# schedules


def _schedule(
    section: ScheduleConfig,
    thing: Callable[..., Any] | None,
    clock: Clock,
    rehearse: Callable[[], Optimizer] | None,
) -> ScheduleRecipe:
    """Of schedules one after the other: a warmup, and the one that is named or the phases."""
    problems = Problems()
    tables: dict[str, dict[str, Any]] = {}
    warmup: Any = section.warmup
    if thing is None:
        keys = [field.name for field in fields(section) if field.name not in ("name", "floor", "args")]
        for key, value in section.args.items():
            problems.unknown("schedule", "a schedule of phases", key, value, keys)
        if section.floor is not None:
            problems.add("schedule.floor", "should be given in the phases that it is for,", section.floor)
        tables = {f"schedule.phases[{i}]": dict(table) for i, table in enumerate(section.phases)}
    else:
        floor = {} if section.floor is None else {"floor": section.floor}
        tables["schedule"] = {"name": section.name, **floor, **section.args}
        if isinstance(warmup, int) and "warmup_steps" in parameters_of(thing, skip=0)[0]:
            # Noam's own
            tables["schedule"].setdefault("warmup_steps", warmup)
            warmup = None
    if warmup is not None:
        table = warmup if isinstance(warmup, dict) else {"steps": warmup}
        tables = {"schedule.warmup": {"name": "warmup", **table}, **tables}
    for path, table in tables.items():
        if "steps" in table:
            table["steps"] = clock.length(table["steps"], f"{path}.steps", problems)
    problems.raise_if_any()
    _fill(tables, clock)
    made: list[Schedule] = []
    for path, table in tables.items():
        with problems.collected():
            phase = _phase(table, path, clock)
            # phases within have the convention of those around, unless they have one of their own
            common = isinstance(phase, Phases) and phase.convention == "every-step"
            made += phase.phases if common else (phase,)  # type: ignore[attr-defined]
    problems.raise_if_any()
    convention = {} if section.convention is None else {"convention": section.convention}
    schedule: Schedule = attempt(lambda **some: Phases(tuple(made), **some), convention, "schedule")
    if section.interval is not None:
        schedule = attempt(lambda interval: Staircase(schedule, interval), {"interval": section.interval}, "schedule")
    if rehearse is not None:
        attempt(lambda: ScheduleLR(rehearse(), schedule), {}, "schedule")
    if thing is None:
        section = replace(section, phases=tuple(table for path, table in tables.items() if path != "schedule.warmup"))
    else:
        # what the section's other keys tell
        told = {"name", "floor"} | ({"steps"} if section.total is not None else set())
        told |= {"warmup_steps"} if section.warmup is not None and warmup is None else set()
        section = replace(section, args={k: v for k, v in tables["schedule"].items() if k not in told})
    return ScheduleRecipe(lambda optimizer: ScheduleLR(optimizer, schedule), section)


def _fill(tables: Mapping[str, dict[str, Any]], clock: Clock) -> None:
    """The phase without steps gets what the others leave of the total."""
    open_ = [path for path, table in tables.items() if "steps" not in table]
    taken = sum(table["steps"] for table in tables.values() if "steps" in table)
    # a warmup may be all of a short training; that a decay never comes is a mistake
    warmup = all(table.get("name") == "warmup" for path, table in tables.items() if path not in open_)
    problems = Problems()
    if clock.total is None:
        for path in open_:
            steps = _steps_of(tables[path])
            if steps is not None and steps.default is steps.empty:
                problems.add("schedule.total", f"is missing, the length of {tables[path]['name']!r}", MISSING)
    elif len(open_) > 1:
        problems.add(f"{open_[1]}.steps", "is missing: only one phase gets what is left of the total", MISSING)
    elif not open_ and taken != clock.total:
        problems.add("schedule.total", f"should be {taken}, what the phases have together,", clock.total)
    elif open_ and warmup and taken > clock.total:
        problems.add("schedule.total", f"should be >= {taken}, the steps of the warmup,", clock.total)
    elif open_ and not warmup and taken >= clock.total:
        problems.add("schedule.total", f"should be > {taken}, the steps of the other phases,", clock.total)
    elif open_ and _steps_of(tables[open_[0]]) is not None:
        tables[open_[0]]["steps"] = clock.total - taken
    problems.raise_if_any()


def _steps_of(table: Mapping[str, Any]) -> inspect.Parameter | None:
    """The argument ``steps`` of a phase; None if it has none, or no name that is known."""
    unknown = Problems()
    with unknown.collected():
        return parameters_of(_named(table.get("name"), ""), skip=0)[0].get("steps")
    return None


def _phase(table: dict[str, Any], path: str, clock: Clock) -> Schedule:
    """A schedule from its table, with tables of schedules within it. Fractions in the table become steps."""
    if "name" not in table:
        raise ConfigError.of(f"{path}.name", "is missing", MISSING)
    thing = _named(table["name"], f"{path}.name")
    if not _gives_schedule(thing):
        raise ConfigError.of(f"{path}.name", "should be a schedule, not a scheduler,", table["name"])
    problems = Problems()
    named, _ = parameters_of(thing, skip=0)
    lengths = [key for key, hint in hints_of(thing).items() if hint == Duration]
    for key in lengths:
        table[key] = clock.length(table.get(key, named[key].default), join(path, key), problems)
    arguments = {k: _nested(v, join(path, k), clock, problems) for k, v in table.items() if k != "name"}
    problems.raise_if_any()
    arguments = check_arguments(thing, arguments, path, problems, skip=0)
    problems.raise_if_any()
    required = [key for key, parameter in named.items() if parameter.default is parameter.empty]
    made = attempt(thing, arguments, path, [*required, *lengths])
    if not isinstance(made, Schedule):
        raise ConfigError.of(f"{path}.name", "should make a schedule", table["name"])
    return made


def _nested(value: Any, path: str, clock: Clock, problems: Problems) -> Any:
    """Tables that have a name as schedules."""
    if isinstance(value, dict) and "name" in value:
        with problems.collected():
            return _phase(value, path, clock)
        return None
    if isinstance(value, list):
        return [_nested(item, f"{path}[{i}]", clock, problems) for i, item in enumerate(value)]
    return value


# schedulers


def _scheduler(
    section: ScheduleConfig, thing: Callable[..., Any], clock: Clock, rehearse: Callable[[], Optimizer] | None
) -> ScheduleRecipe:
    """Of a scheduler class, torch's for one, or of a function ``(optimizer, **arguments)``."""
    problems = Problems()
    name = getattr(thing, "__name__", str(thing))
    named, _ = parameters_of(thing)
    arguments = dict(section.args)
    # of a warmup around the scheduler, which has none or not one like this
    around: dict[str, Any] = {}
    for key, names in _NAMES.items():
        value = getattr(section, key)
        if value is None:
            continue
        own = next((name for name in names if name in named), None)
        if key == "warmup" and (own is None or isinstance(value, dict)):
            table = value if isinstance(value, dict) else {"steps": value}
            with problems.collected():
                value = _phase({"name": "warmup", **table}, "schedule.warmup", clock)
        if (key == "warmup" and own is None) or (key == "convention" and around):
            around[names[0]] = value
        elif own is not None:
            arguments.setdefault(own, value)
        # a total that a fraction was taken of has been used
        elif key != "total" or not clock.used:
            problems.unknown("schedule", name, key, value, named)
    arguments = check_arguments(thing, arguments, "schedule", problems)
    problems.raise_if_any()

    def make(optimizer: Optimizer, **some: Any) -> LRScheduler:
        scheduler = thing(optimizer, **some)
        if not isinstance(scheduler, LRScheduler):
            raise TypeError(f"{name} should make an LRScheduler but made: {type(scheduler).__name__}")
        return WarmupLR(optimizer, scheduler, **around) if around else scheduler

    if rehearse is not None:
        required = [key for key, parameter in named.items() if parameter.default is parameter.empty]
        attempt(lambda **some: make(rehearse(), **some), arguments, "schedule", required)
    return ScheduleRecipe(lambda optimizer: make(optimizer, **arguments), section)
