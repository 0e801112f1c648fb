"""From a model and a config to an optimizer and a scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..config import Config, ScheduleConfig
from ..config.errors import Problems
from ..config.loading import load
from ..config.values import read
from ..presets import TREES
from .checks import attempt
from .explanation import BuildExplanation, explain_build
from .optimizer import plan_groups, plan_optimizer
from .schedule import plan_schedule

__all__ = ["Build", "build"]


@dataclass(frozen=True, eq=False)
class Build:
    """What :func:`build` made. ``optimizer, scheduler = optimx.build(model, cfg)`` works too.

    Attributes:
        optimizer: A :class:`torch.optim.Optimizer`.
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
        return explain_build(self.model, self.optimizer, self.scheduler, self.config.schedule)

    def state_dict(self) -> dict[str, Any]:
        """Of optimizer and scheduler (None without one) together."""
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
        has, needs = state_dict["scheduler"] is not None, self.scheduler is not None
        if has != needs:
            words = {True: "a scheduler's state", False: "none"}
            raise ValueError(f"state_dict['scheduler'] should be {words[needs]} but is: {words[has]}")
        before = self.optimizer.state_dict()
        self.optimizer.load_state_dict(dict(state_dict["optimizer"]))
        if self.scheduler is not None:
            try:
                self.scheduler.load_state_dict(dict(state_dict["scheduler"]))
            # both or none
            except BaseException:
                self.optimizer.load_state_dict(before)
                raise

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


def build(model: nn.Module, cfg: Any, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Build:
    """An optimizer with parameter groups and a schedule, from a model and a config.

    The config is checked as a whole before anything is built; it and the model are not changed.

    Args:
        model: The model; its parameters on the device and of the dtype that they are trained in.
        cfg: A :class:`~optimx.Config` (which says what there is), a dict or dataclass of the same names, the path of a
            TOML, YAML or JSON file, the name of a preset, an :class:`argparse.Namespace`, or an OmegaConf object.
        overrides: Set over it: ``{"schedule.steps_per_epoch": len(loader)}`` or ``["optimizer.lr=3e-4"]``.

    Returns:
        A :class:`Build`.

    Raises:
        ConfigError: Everything that is wrong with the config, a line each.
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be a torch.nn.Module but is: {type(model).__name__}")
    problems = Problems()
    config: Config = read(Config, load(cfg, overrides, TREES), "", problems)
    scale = 1.0 if config.batch_scaling is None else config.batch_scaling.factor
    optimizer = groups = schedule = None
    with problems.collected():
        optimizer = plan_optimizer(config.optimizer, model, scale)
    with problems.collected():
        groups = plan_groups(config.groups, model, optimizer, scale)
    rehearse = None
    if optimizer is not None and groups is not None:
        rehearse = partial(optimizer.rehearse, groups[0])
    # how long an epoch is, is no schedule yet
    section = config.schedule
    if section is not None and section != ScheduleConfig(steps_per_epoch=section.steps_per_epoch):
        with problems.collected():
            schedule = plan_schedule(section, rehearse)
    problems.raise_if_any()
    assert optimizer is not None
    assert groups is not None
    made = attempt(lambda: optimizer.factory(groups[0], **optimizer.arguments), {}, "optimizer")
    resolved = Config(optimizer.config, groups[1])
    if schedule is None:
        return Build(made, None, resolved, model)
    scheduler = attempt(lambda: schedule.make(made), {}, "schedule")
    return Build(made, scheduler, replace(resolved, schedule=schedule.config), model)
