"""Hugging Face's schedulers by its names and arguments, with its numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ._schedule import Schedule, as_steps, check_at_least, one_of
from .endless import Constant, InverseSqrt
from .greedy import GreedyLR
from .phases import Convention, Phases, Warmup
from .schedule_lr import ScheduleLR
from .schedules import Cosine, CosineWithHardRestarts, Decay, Linear, OneMinusSqrt, Polynomial

# Each function makes the schedule of one name. `warmup` and `training` are numbers of steps, `lr` is the optimizer's
# default learning rate, to which Hugging Face relates absolute floors; the rest are its scheduler_specific_kwargs.


def _phases(*phases: Schedule, convention: str | Convention = "hf") -> Phases:
    return Phases(phases, convention)


def _left(warmup: int, training: int) -> int:
    if warmup > training:
        raise ValueError(f"num_warmup_steps should be <= num_training_steps, {training}, but is: {warmup}")
    return training - warmup


def _constant() -> Schedule:
    return Constant()


def _constant_with_warmup(warmup: int) -> Schedule:
    return _phases(Warmup(warmup), Constant())


def _linear(warmup: int, training: int) -> Schedule:
    return _phases(Warmup(warmup), Linear(_left(warmup, training)))


def _cosine(warmup: int, training: int, num_cycles: float = 0.5) -> Schedule:
    return _phases(Warmup(warmup), Cosine(_left(warmup, training), num_cycles=num_cycles))


def _cosine_with_restarts(warmup: int, training: int, num_cycles: int = 1) -> Schedule:
    return _phases(Warmup(warmup), CosineWithHardRestarts(_left(warmup, training), cycles=num_cycles))


def _polynomial(warmup: int, training: int, lr: float, lr_end: float = 1e-7, power: float = 1.0) -> Schedule:
    if not 0 <= lr_end < lr:
        raise ValueError(f"lr_end should be in [0, {lr}), below the optimizer's lr, but is: {lr_end}")
    return _phases(Warmup(warmup), Polynomial(_left(warmup, training), lr_end / lr, power=power))


def _inverse_sqrt(warmup: int, timescale: int | None = None) -> Schedule:
    return _phases(Warmup(warmup), InverseSqrt((warmup or 10_000) if timescale is None else timescale))


def _min_lr_ratio(lr: float, min_lr: float | None, min_lr_rate: float | None) -> float:
    if (min_lr is None) == (min_lr_rate is None):
        raise ValueError(
            f"one of min_lr and min_lr_rate should be given but are: min_lr={min_lr}, min_lr_rate={min_lr_rate}"
        )
    return min_lr / lr if min_lr is not None else float(min_lr_rate or 0.0)


def _cosine_with_min_lr(
    warmup: int,
    training: int,
    lr: float,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> Schedule:
    floor = _min_lr_ratio(lr, min_lr, min_lr_rate)
    return _phases(Warmup(warmup), Cosine(_left(warmup, training), floor, num_cycles=num_cycles))


def _cosine_warmup_with_min_lr(
    warmup: int,
    training: int,
    lr: float,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> Schedule:
    cosine = Cosine(_left(warmup, training), _min_lr_ratio(lr, min_lr, min_lr_rate), num_cycles=num_cycles)
    # from 1/N without a start, else from the start; the floor falls on the last step
    convention = Convention("one" if warmup_lr_rate is None else "zero", "last", "before", "last")
    return _phases(Warmup(warmup, start=warmup_lr_rate or 0.0), cosine, convention=convention)


_WSD_DECAYS: dict[str, Callable[..., Decay]] = {"linear": Linear, "cosine": Cosine, "1-sqrt": OneMinusSqrt}


def _warmup_stable_decay(
    warmup: int,
    training: int | None,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> Schedule:
    one_of("warmup_type", warmup_type, _WSD_DECAYS)
    decay = _WSD_DECAYS[one_of("decay_type", decay_type, _WSD_DECAYS)]
    steps = as_steps("num_decay_steps", num_decay_steps)
    if num_stable_steps is None:
        if training is None:
            raise ValueError("num_training_steps or num_stable_steps should be given but both are: None")
        num_stable_steps = training - warmup - steps
        check_at_least("num_training_steps - num_warmup_steps - num_decay_steps", num_stable_steps, 0)
    shape = {"num_cycles": num_cycles} if decay_type == "cosine" else {}
    return _phases(
        Warmup(warmup, warmup_type, min_lr_ratio),
        Constant(steps=num_stable_steps),
        decay(steps, min_lr_ratio, **shape),
        # a cosine of other than half a wave ends elsewhere
        Constant(min_lr_ratio),
    )


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

    After ``num_training_steps``, where "cosine" and its kin rise again there, the last value stays.

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
    given = {"warmup": num_warmup_steps, "training": num_training_steps, "lr": float(optimizer.defaults["lr"])}
    _check_names(known, specific, {*parameters} - {*given})
    for parameter, name_there in (("warmup", "num_warmup_steps"), ("training", "num_training_steps")):
        if parameter in parameters:
            optional = parameter == "training" and known == "warmup_stable_decay"
            if given[parameter] is None and not optional:
                raise ValueError(f"{name_there} should be given for {known!r} but is: None")
            if given[parameter] is not None:
                as_steps(name_there, given[parameter])
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
