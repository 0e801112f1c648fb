"""What every schedule is: a frozen dataclass, a pure function of the step, a plain dict when asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, TypeVar, get_type_hints

from .._checks import Condition, as_number, as_steps, at_least, one_of

_Class = TypeVar("_Class", bound=type)

#: Classes that a plain dict may name.
_VALUES: dict[str, Any] = {}


def serialisable(cls: _Class) -> _Class:
    """Let :meth:`Schedule.from_dict` build this dataclass by its name."""
    _VALUES[cls.__name__] = cls
    return cls


@serialisable
@dataclass(frozen=True)
class Absolute:
    """A learning rate as it is, where a plain number would be a ratio of each group's own.

    ``Cosine(1000, floor=Absolute(1e-6))`` ends every group at 1e-6, ``floor=0.1`` at a tenth of its own.

    Args:
        value: The learning rate, >= 0. A scheduler refuses one above a group's own learning rate.
    """

    value: float

    def __post_init__(self) -> None:
        at_least(0).check("value", self.value)


#: What a floor or a start is: at most the peak.
RATIO = Condition(
    "should be in [0, 1], a ratio of each group's own lr (or Absolute),",
    lambda value: isinstance(value, Absolute) or bool(0 <= value <= 1),
)
#: A floor or a start.
Ratio = Annotated[float | Absolute, RATIO]


class Schedule:
    """A function of the step: ``schedule(step)`` is the factor on a group's own learning rate.

    Schedules are frozen dataclasses of plain numbers: equal if their fields are, picklable, and pure, so that any step
    may be asked for in any order. Below step 0 they have their first value, past their end their last one.
    ``a >> b`` puts them in sequence (:class:`~optimx.lr_scheduler.Phases`), ``a * b`` multiplies them.

    To write your own, make a frozen dataclass with ``steps`` (its length, None without one) and the method :meth:`at`.
    """

    steps: int | None
    #: Its first value is the peak, which a warmup before it has applied already; so it goes on from there.
    overlaps: bool = True

    def __init_subclass__(cls, abstract: bool = False) -> None:
        if not abstract:
            serialisable(cls)

    def __post_init__(self) -> None:
        """Check what the fields' annotations say: ``Annotated[float, above(0)]``."""
        for name, condition in _conditions(type(self)):  # type: ignore[arg-type]
            condition.check(name, getattr(self, name))

    def __call__(self, step: float) -> float:
        """The factor at a step, counted from 0. (:class:`Absolute` values count as those of a group whose lr is 1.)"""
        return self.value(step, 1.0)

    def value(self, step: float, base: float) -> float:
        """The learning rate at a step of a group whose own learning rate is ``base``."""
        return self.at(max(step, 0), base, base)

    def at(self, step: float, peak: float, base: float, lead: int = 0, tail: int = 0) -> float:
        """The value at a step of this phase; what subclasses define.

        Args:
            step: Counted from the phase's own beginning.
            peak: The value where the shape is 1: ``base``, unless another schedule around this one lowered it.
            base: The group's own value, which ratios refer to.
            lead: By how many steps the clock is ahead: progress 0 lies that many steps before the phase.
            tail: By how many steps before the phase's end progress reaches 1.
        """
        raise NotImplementedError

    def resized(self, steps: int) -> Schedule:
        """This schedule over another number of steps."""
        if "steps" not in getattr(self, "__dataclass_fields__", ()):
            raise TypeError(f"a schedule to be repeated should have a length of its own but is: {self}")
        return replace(self, steps=steps)  # type: ignore[type-var]

    def __rshift__(self, after: Schedule) -> Schedule:
        # by name, as from_dict() finds it: the classes of composites know this one, not the other way round
        return _VALUES["Phases"].in_sequence(self, after)

    def __mul__(self, other: Schedule) -> Schedule:
        return _VALUES["Product"]((self, other))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings: for JSON, YAML and ``torch.load(weights_only=True)``."""
        return _encode(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Schedule:
        """The schedule that :meth:`to_dict` described.

        Raises:
            ValueError: ``type`` names no schedule, or a field is not one of its fields, missing or out of range.
            TypeError: A field has the wrong type.
        """
        schedule = _decode(values)
        if not isinstance(schedule, Schedule):
            raise ValueError(f"a schedule should have a 'type' but is: {values}")
        return schedule

    @property
    def absolutes(self) -> list[Absolute]:
        """Every :class:`Absolute` within."""
        return [value for value in _walk(self) if isinstance(value, Absolute)]


@lru_cache
def _conditions(cls: type) -> list[tuple[str, Condition]]:
    try:
        hints = get_type_hints(cls, include_extras=True)
    # one of somebody's own may be annotated for type checkers only
    except NameError:
        return []
    told = [(name, item) for name, hint in hints.items() for item in getattr(hint, "__metadata__", ())]
    return [(name, item) for name, item in told if isinstance(item, Condition)]


def _walk(value: Any) -> Iterator[Any]:
    yield value
    if is_dataclass(value):
        for field in fields(value):
            yield from _walk(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _walk(item)


def _encode(value: Any) -> Any:
    if is_dataclass(value):
        own = {f.name: _encode(getattr(value, f.name)) for f in fields(value) if f.init}
        return {"type": type(value).__name__, **own}
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    # numpy's and torch's numbers are no plain ones
    return value if value is None or isinstance(value, (int, float, str)) else float(value)


def _decode(value: Any) -> Any:
    if isinstance(value, Mapping):
        arguments = {name: _decode(item) for name, item in value.items()}
        cls = _VALUES[one_of("type", arguments.pop("type", None), _VALUES)]
        for name in arguments:
            one_of(f"field of {cls.__name__}", name, [field.name for field in fields(cls) if field.init])
        try:
            return cls(**arguments)
        except TypeError as error:
            missing = "missing" in str(error)
            raise (ValueError if missing else TypeError)(f"{cls.__name__}: {error}") from None
    return tuple(map(_decode, value)) if isinstance(value, (list, tuple)) else value


def resolve(value: float | Absolute, base: float) -> float:
    """A ratio of ``base``, or an absolute value."""
    return value.value if isinstance(value, Absolute) else value * base


def check_steps(schedule: Any, *names: str, least: int = 0) -> None:
    """Make these fields ints of at least ``least``; None stays None."""
    for name in names:
        value = getattr(schedule, name)
        if value is not None:
            object.__setattr__(schedule, name, as_steps(name, value, least))


_LENGTH = Condition("should be 0 or >= 1 (they are steps, not a part of the training)", lambda steps: not 0 < steps < 1)


def check_length(schedule: Any) -> None:
    """Make ``steps`` an int, or a float if it is no whole number; None stays None.

    Raises:
        ValueError: It is < 0, or a part of a step, by which people mean a part of the training.
        TypeError: It is no number.
    """
    if schedule.steps is None:
        return
    steps = as_number("steps", schedule.steps)
    at_least(0).check("steps", steps)
    _LENGTH.check("steps", steps)
    object.__setattr__(schedule, "steps", steps)


def check_milestones(schedule: Any) -> None:
    """Make ``milestones`` a tuple of increasing ints >= 0."""
    milestones = tuple(as_steps(f"milestones[{i}]", value) for i, value in enumerate(schedule.milestones))
    if list(milestones) != sorted(set(milestones)):
        raise ValueError(f"milestones should be increasing but is: {list(milestones)}")
    object.__setattr__(schedule, "milestones", milestones)


def check_schedules(name: str, values: Iterable[Any]) -> tuple[Schedule, ...]:
    """The values as a tuple; ValueError if there is none, TypeError for one that is no schedule."""
    if not isinstance(values, Iterable):
        raise TypeError(f"{name} should be a Schedule, or several, but is: {values!r}")
    schedules = tuple(values)
    if not schedules:
        raise ValueError(f"{name} should be one or more schedules but is: ()")
    for i, schedule in enumerate(schedules):
        if not isinstance(schedule, Schedule):
            raise TypeError(f"{name}[{i}] should be a Schedule but is: {schedule!r}")
    return schedules
