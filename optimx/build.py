"""From a model and a config to an optimizer and a scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ._checks import check_instance
from ._table import aligned
from .composite import Composite, all_or_none
from .config import Config, ScheduleConfig
from .config.errors import Problems
from .config.loading import load
from .config.values import read
from .explain import Explanation, explain
from .lr_scheduler import ScheduleLR
from .lr_scheduler.warmup_lr import WarmupAroundLR
from .param_groups import GroupsDescription, describe
from .presets import TREES
from .resolve import attempt, resolve, resolve_search

if TYPE_CHECKING:
    from torch.distributed.checkpoint.state_dict import StateDictOptions
    from torch.distributed.checkpoint.stateful import Stateful

__all__ = ["Build", "BuildExplanation", "build", "is_function_of_step"]


@dataclass(frozen=True)
class BuildExplanation:
    """What :meth:`Build.explain` found; prints as tables.

    Attributes:
        groups: The parameter groups; the learning rates are those that the schedule's factors are of.
        backends: What their steps run on.
        scheduler: Its class, empty if there is none.
        rates: Step, least and greatest learning rate of the groups: at the beginning, at the end of the warmup, in
            the middle, on the last step and after it. Empty for a scheduler that is no function of the step.
    """

    groups: GroupsDescription
    backends: Explanation
    scheduler: str
    rates: tuple[tuple[int, float, float], ...]

    @property
    def table(self) -> list[tuple[str, ...]]:
        """The learning rates as texts, after a row with the names of the columns."""
        rows = [(f"{step:,}", f"{least:.4g}", f"{greatest:.4g}") for step, least, greatest in self.rates]
        return [("step", "least lr", "greatest lr"), *rows]

    def __str__(self) -> str:
        parts = [str(self.groups), str(self.backends)]
        if self.scheduler:
            parts.append("\n".join([self.scheduler, *(aligned(self.table, range(3)) if self.rates else ())]))
        return "\n\n".join(parts)


@dataclass(frozen=True, eq=False)
class Build:
    """What :func:`build` made. ``optimizer, scheduler = optimx.build(model, cfg)`` works too.

    Attributes:
        optimizer: A :class:`torch.optim.Optimizer`, to which groups may be added later. Its groups have names
            (``param_names``) if it is one of optimx, which takes groups without names too; other classes refuse to mix
            them, so theirs have none.
        scheduler: A :class:`torch.optim.lr_scheduler.LRScheduler`, to be stepped after every optimizer step; None if
            the config has no schedule.
        config: Fully resolved: learning rates scaled with the batch size, lengths in steps, all of the optimizer's
            arguments. It builds the same again.
        model: The model.
    """

    optimizer: Optimizer
    scheduler: LRScheduler | None
    config: Config
    model: nn.Module

    def __iter__(self) -> Iterator[Any]:
        return iter((self.optimizer, self.scheduler))

    def explain(self) -> BuildExplanation:
        """Parameter groups, what their steps run on, and learning rates over the schedule; ``print`` it."""
        groups = [_before_any_schedule(group) for group in _with_owners(self.optimizer)]
        name = "" if self.scheduler is None else type(self.scheduler).__name__
        rates: tuple[tuple[int, float, float], ...] = ()
        if self.config.schedule is not None and is_function_of_step(self.scheduler):
            steps = _milestones(self.scheduler, self.config.schedule)
            rates = tuple(_rate(self.scheduler, step) for step in steps)
        return BuildExplanation(describe(self.model, groups), explain(self.optimizer), name, rates)

    def state_dict(self) -> dict[str, Any]:
        """Of optimizer and scheduler (None without one) together. Sharded checkpoints: :meth:`as_stateful`."""
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "scheduler": scheduler}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Raises:
            ValueError: It has other keys, or a scheduler's state where there is no scheduler or none where there is
                one; or the optimizer or the scheduler refuses its part.
        """
        if set(state_dict) != {"optimizer", "scheduler"}:
            raise ValueError(f"state_dict should have 'optimizer' and 'scheduler' but has: {sorted(state_dict)}")
        self._check_scheduler(state_dict)
        with all_or_none(self.optimizer):
            self.optimizer.load_state_dict(dict(state_dict["optimizer"]))
            if self.scheduler is not None:
                self.scheduler.load_state_dict(dict(state_dict["scheduler"]))

    def _check_scheduler(self, state_dict: Mapping[str, Any]) -> None:
        has, needs = state_dict["scheduler"] is not None, self.scheduler is not None
        if has != needs:
            words = {True: "a scheduler's state", False: "none"}
            raise ValueError(f"state_dict['scheduler'] should be {words[needs]} but is: {words[has]}")

    def as_stateful(self, options: StateDictOptions | None = None) -> Stateful:
        """Model, optimizer and scheduler for ``torch.distributed.checkpoint``, by the names of parameters.

        ``dcp.save({"train": build.as_stateful()}, checkpoint_id=folder)`` writes them, and ``dcp.load`` with the same
        dict of a fresh build reads them, also on another number of ranks or with a model that is sharded otherwise.
        (A :class:`Build` itself could be given to both, but a fresh optimizer has no states yet, and what has no place
        is not read.)

        Args:
            options: What :func:`torch.distributed.checkpoint.state_dict.get_state_dict` takes (default: None).

        Returns:
            An object with ``state_dict`` and ``load_state_dict``, which raises ValueError for a scheduler's state
            where there is no scheduler, for none where there is one, and for what the scheduler refuses.
        """
        return _Stateful(self, options)

    def as_lightning(self, **lr_scheduler: Any) -> dict[str, Any]:
        """What ``LightningModule.configure_optimizers`` returns: the scheduler goes on every step, not every epoch.

        Args:
            lr_scheduler: More keys of Lightning's ``lr_scheduler``, such as ``monitor="val_loss"`` and
                ``interval="epoch"`` for a scheduler that follows a metric.
        """
        if self.scheduler is None:
            return {"optimizer": self.optimizer}
        return {
            "optimizer": self.optimizer,
            "lr_scheduler": {"scheduler": self.scheduler, "interval": "step", "frequency": 1, **lr_scheduler},
        }


@dataclass(frozen=True)
class _Stateful:
    """What :meth:`Build.as_stateful` returns."""

    build: Build
    options: StateDictOptions | None

    def state_dict(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.build.model, self.build.optimizer, options=self.options)
        scheduler = self.build.scheduler
        # of lists and dicts DCP would read what this scheduler's has, too, and hide that the checkpoint's has more
        state = None if scheduler is None else (scheduler.state_dict(),)
        return {"model": model, "optimizer": optimizer, "scheduler": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

        build, options = self.build, self.options
        build._check_scheduler(state_dict)
        # set_state_dict would take a rank that has nothing, as the first has all, for one that wants no model
        set_model_state_dict(build.model, state_dict["model"], options=options)
        set_optimizer_state_dict(build.model, build.optimizer, state_dict["optimizer"], options=options)
        if build.scheduler is not None:
            build.scheduler.load_state_dict(state_dict["scheduler"][0])


def build(model: nn.Module, cfg: Any, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Build:
    """An optimizer with parameter groups and a schedule, from a model and a config.

    The config is checked as a whole before anything is built; it and the model are not changed. What its section
    ``search`` would have tried is checked, too, but is not built: for that, see :mod:`optimx.search`.

    Args:
        model: The model; its parameters on the device and of the dtype that they are trained in.
        cfg: A :class:`~optimx.Config` (which says what there is), a dict or dataclass of the same names, the path of a
            TOML, YAML or JSON file, the name of a preset, an :class:`argparse.Namespace`, or an OmegaConf object. Of a
            namespace, these are read, and others are the program's own: dotted attributes of a section
            (``--optimizer.lr``); sections that are tables; ``optimizer`` (a name), ``lr``, ``weight_decay``,
            ``max_grad_norm`` and ``layer_decay``; ``betas`` and ``momentum`` if the optimizer has them; ``preset`` if
            it is one of ours; ``schedule`` (a name), ``total``, ``warmup``, ``floor`` and ``steps_per_epoch`` if
            ``schedule`` and ``total`` are both there, or a preset, or a dotted attribute or override of ``schedule``.
        overrides: Set over it: ``{"schedule.steps_per_epoch": len(loader)}`` or ``["optimizer.lr=3e-4"]``.

    Returns:
        A :class:`Build`.

    Raises:
        ConfigError: Everything that is wrong with the config, a line each.
        TypeError: ``model`` is no module.
    """
    check_instance("model", model, nn.Module, "a torch.nn.Module")
    problems = Problems()
    config: Config = read(Config, load(cfg, overrides, TREES), "", problems)
    recipes = None
    with problems.collected():
        recipes = resolve(config, model, [problem.path for problem in problems])
    if config.search:
        with problems.collected():
            resolve_search(config.search, cfg, overrides, model)
    problems.raise_if_any()
    assert recipes is not None
    made = attempt(lambda: recipes.optimizer.make(recipes.groups), {}, "optimizer")
    resolved = Config(recipes.optimizer.config, recipes.groups_config)
    schedule = recipes.schedule
    if schedule is None:
        return Build(made, None, resolved, model)
    scheduler = attempt(lambda: schedule.make(made), {}, "schedule")
    return Build(made, scheduler, replace(resolved, schedule=schedule.config), model)


def is_function_of_step(scheduler: LRScheduler | None) -> TypeGuard[ScheduleLR]:
    """Whether its values can be foretold: :class:`ScheduleLR`, but around no scheduler of torch's."""
    return isinstance(scheduler, ScheduleLR) and not isinstance(scheduler, WarmupAroundLR)


def _with_owners(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The groups; those of a composite say whose they are."""
    if not isinstance(optimizer, Composite):
        return optimizer.param_groups
    owners = {id(group): name for name, member in optimizer.optimizers.items() for group in member.param_groups}
    return [{**group, "optimizer": owners[id(group)]} for group in optimizer.param_groups]


def _before_any_schedule(group: Mapping[str, Any]) -> dict[str, Any]:
    """The group at the learning rate that the schedule's factors are of."""
    told = dict(group)
    told["lr"] = told.pop("initial_lr", told.get("lr"))
    return told


def _milestones(scheduler: Any, section: ScheduleConfig) -> list[int]:
    warmup = section.warmup["steps"] if isinstance(section.warmup, dict) else int(section.warmup or 0)
    total = scheduler.schedule.steps if section.total is None else int(section.total)
    return sorted({0, warmup, *(() if not total else (total // 2, total - 1, total))})


def _rate(scheduler: Any, step: int) -> tuple[int, float, float]:
    (rates,) = scheduler.preview(1, step)
    return step, min(rates), max(rates)
