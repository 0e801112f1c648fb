"""Hugging Face's schedulers by its names and arguments, with its numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .._checks import as_number, at_least, one_of, within
from .conventions import CONVENTIONS, Convention
from .endless import Constant, InverseSqrt
from .greedy import GreedyLR
from .phases import Phases, Warmup
from .schedule import Schedule
from .schedule_lr import ScheduleLR
from .shapes import Cosine, CosineWithHardRestarts, Decay, Linear, OneMinusSqrt, Polynomial


@dataclass(frozen=True)
class Begun(Schedule):
    """A schedule that begins with a later step than its first, as its clock has run before.

    Args:
        schedule: The schedule.
        done: Its steps, also parts of one, that are over.
    """

    schedule: Schedule
    done: float

    @property
    def steps(self) -> int | None:  # type: ignore[override]
        return None if self.schedule.steps is None else max(self.schedule.steps - self.done, 0)  # type: ignore[return-value]

    @property
    def overlaps(self) -> bool:  # type: ignore[override]
        return self.schedule.overlaps

    def at(self, step: float, peak: float, base: float, lead: int = 0, tail: int = 0) -> float:
        return self.schedule.at(step + self.done, peak, base, lead, tail)


# Hugging Face's numbers of steps may be fractional, and a warmup longer than the training. What it divides by is never
# below 1, so that a phase of less than a step has begun before.


def _length(steps: Any) -> tuple[Any, float]:
    """0 or at least 1, and how much that is more than ``steps``, which may be negative."""
    length = max(steps, 1) if steps > 0 else 0
    return length, length - steps


def _phases(
    warmup: Any, *after: Schedule, done: float = 0.0, convention: str | Convention = "hf", **ramp: Any
) -> Phases:
    """A warmup and the phases after it, of which ``done`` steps are over when it ends."""
    length, more = _length(warmup)
    done += more
    if done:
        after = (Begun(Phases(after, "hf") if len(after) > 1 else after[0], done),)
    phases = Phases((Warmup(length, **ramp), *after), convention)
    # what has begun is past the peak
    return phases.with_convention(replace(phases.resolved, target="peak")) if done else phases


# Each function makes the schedule of one name. `warmup` and `training` are numbers of steps, `lr` is the optimizer's
# default learning rate, to which Hugging Face relates absolute floors; the rest are its scheduler_specific_kwargs.


def _constant() -> Schedule:
    return Constant()


def _constant_with_warmup(warmup: Any) -> Schedule:
    return _phases(warmup, Constant())


def _linear(warmup: Any, training: Any) -> Schedule:
    length, done = _length(training - warmup)
    return _phases(warmup, Linear(length), done=done)


def _cosine(warmup: Any, training: Any, num_cycles: float = 0.5) -> Schedule:
    return _phases(warmup, Cosine(max(training - warmup, 1), num_cycles=num_cycles))


def _cosine_with_restarts(warmup: Any, training: Any, num_cycles: float = 1) -> Schedule:
    return _phases(warmup, CosineWithHardRestarts(max(training - warmup, 1), cycles=num_cycles))


def _polynomial(warmup: Any, training: Any, lr: float, lr_end: float = 1e-7, power: float = 1.0) -> Schedule:
    # below the optimizer's own
    within(f"[0, {lr})").check("lr_end", lr_end)
    left = max(training - warmup, 0)
    if 0 < left < 1:
        raise ValueError(f"num_training_steps - num_warmup_steps should be <= 0 or >= 1 but is: {left}")
    return _phases(warmup, Polynomial(left, lr_end / lr, power=power))


def _inverse_sqrt(warmup: Any, timescale: float | None = None) -> Schedule:
    return _phases(warmup, InverseSqrt((warmup or 10_000) if timescale is None else timescale))


def _min_lr_ratio(lr: float, min_lr: float | None, min_lr_rate: float | None) -> float:
    if (min_lr is None) == (min_lr_rate is None):
        raise ValueError(
            f"one of min_lr and min_lr_rate should be given but are: min_lr={min_lr}, min_lr_rate={min_lr_rate}"
        )
    return min_lr / lr if min_lr is not None else float(min_lr_rate or 0.0)


def _cosine_with_min_lr(
    warmup: Any,
    training: Any,
    lr: float,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> Schedule:
    floor = _min_lr_ratio(lr, min_lr, min_lr_rate)
    return _phases(warmup, Cosine(max(training - warmup, 1), floor, num_cycles=num_cycles))


def _cosine_warmup_with_min_lr(
    warmup: Any,
    training: Any,
    lr: float,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> Schedule:
    floor = _min_lr_ratio(lr, min_lr, min_lr_rate)
    cosine = Cosine(max(training - warmup, 1), floor, num_cycles=num_cycles)
    # from 1/N without a start, else from the start; the floor falls on the last step
    convention = Convention("one" if warmup_lr_rate is None else "zero", "last", "before", "last")
    return _phases(warmup, cosine, convention=convention, start=warmup_lr_rate or 0.0)


_WSD_DECAYS: dict[str, Callable[..., Decay]] = {"linear": Linear, "cosine": Cosine, "1-sqrt": OneMinusSqrt}


def _warmup_stable_decay(
    warmup: Any,
    training: Any,
    num_decay_steps: Any,
    num_stable_steps: Any = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> Schedule:
    one_of("warmup_type", warmup_type, _WSD_DECAYS)
    decay = _WSD_DECAYS[one_of("decay_type", decay_type, _WSD_DECAYS)]
    steps = _number("num_decay_steps", num_decay_steps)
    if num_stable_steps is not None:
        stable = _number("num_stable_steps", num_stable_steps)
    elif training is not None:
        stable = training - warmup - steps
    else:
        raise ValueError("num_training_steps or num_stable_steps should be given but both are: None")
    length, done = _length(stable)
    shape = {"num_cycles": num_cycles} if decay_type == "cosine" else {}
    return _phases(
        warmup,
        Constant(steps=length),
        decay(steps, min_lr_ratio, **shape),
        # a cosine of other than half a wave ends elsewhere
        Constant(min_lr_ratio),
        done=done,
        # whatever is left of the phases after it
        convention=replace(CONVENTIONS["hf"], target="peak"),
        shape=warmup_type,
        start=min_lr_ratio,
    )


def _number(name: str, value: Any) -> Any:
    number = as_number(name, value)
    at_least(0).check(name, number)
    return number


_SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": _constant,
    "constant_with_warmup": _constant_with_warmup,
    "cosine": _cosine,
    "cosine_warmup_with_min_lr": _cosine_warmup_with_min_lr,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "cosine_with_restarts": _cosine_with_restarts,
    "inverse_sqrt": _inverse_sqrt,
    "linear": _linear,
    "polynomial": _polynomial,
    "warmup_stable_decay": _warmup_stable_decay,
}
_BY_METRIC: dict[str, Callable[..., LRScheduler]] = {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": GreedyLR}


def get_scheduler(
    name: str | Enum,
    optimizer: Optimizer,
    num_warmup_steps: int | None = None,
    num_training_steps: int | None = None,
    scheduler_specific_kwargs: Mapping[str, Any] | None = None,
    *,
    on_mismatch: Literal["error", "use_new", "use_checkpoint"] = "error",
) -> LRScheduler:
    """What ``transformers.get_scheduler`` returns for the same arguments: the same numbers, up to the end.

    Numbers of steps may be fractional, and the warmup longer than the training, which then ends while it rises. After
    ``num_training_steps``, where "cosine" and its kin rise again there, the last value stays.

    Args:
        name: "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
            "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
            "warmup_stable_decay" or "greedy"; or a ``SchedulerType``.
        optimizer: Any torch optimizer. Absolute floors are relative to its default learning rate: a group with a
            tenth of that ends at a tenth of the floor.
        num_warmup_steps: All but "constant", "reduce_lr_on_plateau" and "greedy" need it.
        num_training_steps: So do these, but for "constant_with_warmup", "inverse_sqrt" and "warmup_stable_decay".
        scheduler_specific_kwargs: The other arguments of that schedule, such as ``{"num_cycles": 3}``.
        on_mismatch: See :class:`ScheduleLR` (default: ``"error"``).

    Returns:
        A :class:`ScheduleLR`; a torch ReduceLROnPlateau or a :class:`GreedyLR` for those, whose ``step`` takes a
        metric.

    Raises:
        ValueError: The name or one of the arguments is unknown, out of range or missing.
    """
    known = one_of("name", name.value if isinstance(name, Enum) else name, [*_SCHEDULES, *_BY_METRIC])
    specific = dict(scheduler_specific_kwargs or {})
    if known in _BY_METRIC:
        by_metric = _BY_METRIC[known]
        _check_names(known, specific, {*inspect.signature(by_metric).parameters} - {"optimizer"})
        return by_metric(optimizer, **specific)
    last_epoch = specific.pop("last_epoch", -1)
    schedule = _SCHEDULES[known]
    parameters = inspect.signature(schedule).parameters
    given: dict[str, Any] = {
        "warmup": num_warmup_steps,
        "training": num_training_steps,
        "lr": float(optimizer.defaults["lr"]),
    }
    _check_names(known, specific, {*parameters} - {*given})
    for parameter, name_there in (("warmup", "num_warmup_steps"), ("training", "num_training_steps")):
        if parameter in parameters:
            optional = parameter == "training" and known == "warmup_stable_decay"
            if given[parameter] is None and not optional:
                raise ValueError(f"{name_there} should be given for {known!r} but is: None")
            if given[parameter] is not None:
                given[parameter] = _number(name_there, given[parameter])
    arguments = {key: value for key, value in given.items() if key in parameters}
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in {*arguments, *specific}]
    if missing:
        raise ValueError(
            f"scheduler_specific_kwargs of {known!r} should have {missing[0]!r} but has: {sorted(specific)}"
        )
    return ScheduleLR(optimizer, schedule(**arguments, **specific), last_epoch, on_mismatch=on_mismatch)


def _check_names(scheduler: str, given: Mapping[str, Any], accepted: set[str]) -> None:
    for name in given:
        one_of(f"scheduler_specific_kwargs of {scheduler!r}", name, accepted)
