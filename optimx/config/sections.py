"""What a config can say: one dataclass a section, the same names in every format."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from .._checks import FINITE, Condition, above, at_least, within
from .._engine.averages import EMA, SWA, Average, PowerEMA
from .._engine.guards import AutoClip, Clipping, Spikes, ZClip
from ..lr_scheduler import Absolute
from .values import Named

__all__ = [
    "EPOCHS",
    "AdamWConfig",
    "BatchScalingConfig",
    "Config",
    "Duration",
    "GroupsConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "SearchRange",
]

#: ``"2ep"``, ``"0.5 epochs"``, ``"30ep-1"``: a step less
EPOCHS = re.compile(r"(\d{1,9}(?:\.\d+)?) ?ep(?:ochs?)?(?: ?([-+] ?\d{1,9}))?")


def _is_duration(value: int | float | str) -> bool:
    if isinstance(value, str):
        return EPOCHS.fullmatch(value) is not None
    # 1.0 might be one step or all of them
    return 0 <= value < 1 or (value >= 1 and isinstance(value, int)) or (value > 1 and float(value).is_integer())


#: 50 steps, a fraction of the total such as 0.05, or epochs such as "2ep" (needs ``steps_per_epoch``).
Duration = Annotated[
    int | float | str,
    Condition('should be whole steps >= 0, a fraction of the total < 1, or epochs such as "2ep"', _is_duration),
]

#: Rules that files write as tables, ``{name = "autoclip", percentile = 10}``.
CLIPPING = Named((("autoclip", AutoClip), ("zclip", ZClip)))
AVERAGES = Named((("ema", EMA), ("swa", SWA), ("power_ema", PowerEMA)))
#: Names of rules in files, by class.
RULE_NAMES = {cls: name for name, cls in (*CLIPPING.classes, *AVERAGES.classes)}


@dataclass
class AdamWConfig:
    """Table ``optimizer.adamw``: :class:`optimx.AdamW` trains what is not for the optimizer itself, which is Muon.

    Attributes:
        lr: Its learning rate (default: the class's own).
        weight_decay: Of its parameters that decay (default: the class's own).
        args: Its other arguments, in files keys beside these: ``betas``, ``eps``, ...
    """

    lr: Annotated[float, FINITE] | Tensor | None = None
    weight_decay: Annotated[float, FINITE] | Tensor | None = None
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class OptimizerConfig:
    """Section ``optimizer``. In files its ``args`` are keys beside the others.

    Attributes:
        name: A name of :func:`optimx.list_optimizers`, ``"package.module:Class"``, or the class itself.
        lr: Learning rate (default: the class's own).
        weight_decay: Of parameters that decay (default: the class's own).
        max_grad_norm: Clip the gradients of all groups to this norm inside the step, or to one that a rule finds, a
            table of its ``name``, ``"autoclip"`` or ``"zclip"``, and what :class:`optimx.AutoClip` or
            :class:`optimx.ZClip` takes (default: no clipping).
        skip_nonfinite: Skip steps with infinite or NaN gradients (default: the class's own, false).
        skip_spikes: Skip steps whose gradient norm is far above those before: true, or a table of what
            :class:`optimx.Spikes` takes (default: none is).
        max_skips: A step raises an error once so many before it were skipped in a row (default: none does).
        average: Average the parameters in the step: a table of a ``name``, ``"ema"``, ``"swa"`` or ``"power_ema"``, and
            what :class:`optimx.EMA`, :class:`optimx.SWA` or :class:`optimx.PowerEMA` takes (default: no average).
        adamw: Table of an AdamW that trains with it: ``name`` is ``"muon"``, say, and gets the parameters that
            ``groups.muon`` tells, AdamW the rest, in one :class:`optimx.Composite` (default: none).
        args: Other arguments of the class: ``betas``, ``momentum``, ...
    """

    name: str | Callable[..., Any] = "adamw"
    lr: Annotated[float, FINITE] | Tensor | None = None
    weight_decay: Annotated[float, FINITE] | Tensor | None = None
    max_grad_norm: Annotated[float, above(0)] | Annotated[Clipping, CLIPPING] | None = None
    skip_nonfinite: bool | None = None
    skip_spikes: bool | Spikes | None = None
    max_skips: Annotated[int, at_least(1)] | None = None
    average: Annotated[Average, AVERAGES] | None = None
    adamw: AdamWConfig | None = None
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class GroupsConfig:
    """Section ``groups``: the arguments of :func:`optimx.param_groups.param_groups`.

    Attributes:
        no_decay: Who gets no weight decay: ``"auto"`` (norms, biases, 0-D and 1-D parameters, the model's own hints),
            patterns of names, of which none is nobody (default: ``"auto"``).
        layer_decay: The lr of a layer over that of the next layer up, in (0, 1] (default: None, all the same).
        layers: Which layer a parameter is in, where the model's structure does not say it: a function of its name, or
            ordered patterns.
        layer_preset: How layers are numbered: ``"beit"``, ``"timm"`` or ``"electra"`` (default: ``"beit"``).
        min_lr_scale: Least factor that ``layer_decay`` gives (default: 0).
        rules: Settings by name, in order: tables of ``match`` and ``lr``, ``lr_mult``, ``weight_decay``, ``wd_mult``,
            ``freeze``, ``optimizer`` (``"muon"`` or ``"adamw"`` where there are both) or an argument of the optimizer
            that groups can have.
        freeze: Patterns of names that are left out of the optimizer.
        include_frozen: Parameters that do not require gradients get groups too (default: False).
        muon: Beside a table ``optimizer.adamw``, what is not AdamW's: ``"auto"`` (the hidden matrices) or patterns of
            names, of which none is nothing (default: ``"auto"`` beside that table).
    """

    no_decay: str | tuple[str, ...] | None = "auto"
    layer_decay: Annotated[float, within("(0, 1]")] | None = None
    layers: Any = None
    layer_preset: str = "beit"
    min_lr_scale: Annotated[float, within("[0, 1]")] = 0.0
    rules: tuple[dict[str, Any], ...] = ()
    freeze: tuple[str, ...] = ()
    include_frozen: bool = False
    muon: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        # no file but YAML and JSON has a null
        self.no_decay = () if self.no_decay is None else self.no_decay


@dataclass
class ScheduleConfig:
    """Section ``schedule``. In files its ``args`` are keys beside the others.

    Attributes:
        name: A name of :func:`optimx.list_schedulers`, ``"package.module:Class"``, or the class itself.
        phases: Instead of a name, tables of ``name``, ``steps`` and what else the schedule of that name takes, one
            after the other. One of them may leave its ``steps`` out and gets what is left of ``total``.
        total: Optimizer steps of the whole training, or epochs: ``"3ep"``.
        warmup: Steps of a linear warmup before it, within ``total``; or a table, ``{steps = 50, ...}``, of what
            :class:`optimx.lr_scheduler.Warmup` takes (default: none).
        floor: Where it ends, a ratio of each group's lr, or ``{value = 1e-6}``, a learning rate (default: the
            schedule's own).
        interval: The learning rate changes on every so many steps: ``"1ep"`` (default: on every step).
        steps_per_epoch: Optimizer steps of an epoch, for what is given in epochs.
        convention: Where warmup and decay lie on the steps, a name of :data:`optimx.lr_scheduler.CONVENTIONS`
            (default: ``"every-step"``).
        args: Other arguments of the schedule.
    """

    name: str | Callable[..., Any] | None = None
    phases: tuple[dict[str, Any], ...] = ()
    total: Duration | None = None
    warmup: Duration | dict[str, Any] | None = None
    floor: Annotated[float, within("[0, 1]")] | Absolute | None = None
    interval: Duration | None = None
    steps_per_epoch: Annotated[int, at_least(1)] | None = None
    convention: str | None = None
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class BatchScalingConfig:
    """Section ``batch_scaling``: ``lr`` was found with one batch size and is used with another.

    It multiplies the optimizer's lr, that of ``optimizer.adamw`` and every lr of ``groups.rules`` before anything reads
    them.

    Attributes:
        batch: Samples of an optimizer step: batch size x accumulation x processes.
        reference: Those for which the config's learning rates are meant.
        rule: ``"linear"``: by ``batch / reference`` (https://arxiv.org/abs/1706.02677, SGD); ``"sqrt"``: by its square
            root (https://arxiv.org/abs/2205.10287, adaptive optimizers).
    """

    batch: Annotated[int, at_least(1)]
    reference: Annotated[int, at_least(1)]
    rule: Literal["linear", "sqrt"] = "linear"

    @property
    def factor(self) -> float:
        """What multiplies the learning rates."""
        return (self.batch / self.reference) ** (0.5 if self.rule == "sqrt" else 1.0)


#: A bound; an int that no float can hold is none.
Bound = Annotated[int | float, Condition("should be finite", lambda value: abs(value) <= sys.float_info.max)]


@dataclass
class SearchRange:
    """In section ``search``, what a key that is a number may be. Whole numbers alone, where the key takes no others.

    Attributes:
        low: The least number.
        high: The greatest one.
        log: Numbers lie at equal factors, not at equal differences; ``low`` is above 0 then.
    """

    low: Bound
    high: Bound
    log: bool = False


@dataclass
class Config:
    """What :func:`optimx.build` needs, or part of it. The same names are the keys of TOML, YAML and JSON files.

    Attributes:
        optimizer: Which one, and its arguments.
        groups: Parameter groups (default: no weight decay for norms and biases, nothing else).
        schedule: Of the learning rate (default: none).
        batch_scaling: Of the learning rate with the batch size (default: none).
        search: What to try instead of single values, for :mod:`optimx.search`: keys such as ``optimizer.lr``, and for
            each a list of values or a range, ``{low = 1e-5, high = 1e-2, log = true}``. A build checks them, and is
            made of the other sections alone (default: none).
        preset: Name of a preset that this is laid over: ``"bert-finetune"``, ... (:mod:`optimx.presets`).
    """

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    groups: GroupsConfig = field(default_factory=GroupsConfig)
    schedule: ScheduleConfig | None = None
    batch_scaling: BatchScalingConfig | None = None
    search: dict[str, SearchRange | tuple[Any, ...]] | None = None
    preset: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain tables that a file can hold: without what is not given, ``args`` beside the other keys.

        A class is written as ``"package.module:Class"``, a dtype as ``"bfloat16"``; a function that has no such name
        stays one.
        """
        return _to_dict(self)


def _to_dict(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = _table_of(value)
    if isinstance(value, Mapping):
        return {key: _to_dict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_dict(item) for item in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if inspect.isclass(value) or (inspect.isfunction(value) and "<" not in value.__qualname__):
        return f"{value.__module__}:{value.__qualname__}"
    return value


def _table_of(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that say something, after the name that files have for its class, if they have one."""
    fields = dataclasses.fields(value)
    table = {field.name: getattr(value, field.name) for field in fields}
    # of what is empty only the exceptional is said: nobody is without decay, nothing is Muon's, no norm is the most
    empty = {name for name, item in table.items() if item == () and name not in ("no_decay", "muon")}
    empty |= {field.name for field in fields if table[field.name] is None and field.default is None}
    table |= table.pop("args", {})
    named = {"name": RULE_NAMES[type(value)]} if type(value) in RULE_NAMES else {}
    return named | {key: item for key, item in table.items() if key not in empty}
