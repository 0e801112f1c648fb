"""A warmup around schedulers that are no functions of the step: torch's own, and ReduceLROnPlateau."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal, SupportsFloat

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .._checks import as_steps
from .conventions import Convention
from .field import current_lrs, write
from .greedy import GreedyLR
from .phases import Hold, Phases, Warmup
from .schedule import Schedule
from .schedule_lr import ScheduleLR


def as_warmup(warmup_steps: int | Warmup) -> Warmup:
    """A number of steps stands for a linear warmup from 0."""
    return warmup_steps if isinstance(warmup_steps, Warmup) else Warmup(as_steps("warmup_steps", warmup_steps))


class WarmupLR(ScheduleLR):
    """A warmup before any schedule or any torch scheduler.

    A torch scheduler is built first, on the same optimizer, and from then on stepped by this one alone. The warmup
    rises to the learning rates that it set when it was built. What is made is a :class:`WarmupAroundLR` then.

    Args:
        optimizer: Any torch optimizer.
        after: A schedule, or a torch scheduler of this optimizer (not ReduceLROnPlateau, see
            :class:`PlateauWithWarmup`).
        warmup_steps: Length of a linear warmup from zero, or a :class:`Warmup`.
        convention: See :class:`Convention` (default: ``"every-step"``: the scheduler's first value is applied once,
            on the last step of the warmup).
        options: ``last_epoch`` (with a schedule), ``base_lrs`` (with a schedule) and ``on_mismatch`` of
            :class:`ScheduleLR`.

    Raises:
        TypeError: ``after`` is neither schedule nor scheduler.
        ValueError: ``after`` is of another optimizer, or the convention lets it run ahead of the warmup's end.
    """

    #: The scheduler that the warmup is around; None around a schedule.
    after: Any = None

    def __new__(cls, optimizer: Any = None, after: Any = None, *args: Any, **options: Any) -> WarmupLR:
        # a copy comes without arguments
        return super().__new__(WarmupAroundLR if cls is WarmupLR and isinstance(after, LRScheduler) else cls)

    def __init__(
        self,
        optimizer: Optimizer,
        after: Schedule | LRScheduler,
        warmup_steps: int | Warmup,
        *,
        convention: str | Convention = "every-step",
        **options: Any,
    ) -> None:
        if not isinstance(after, Schedule):
            # a subclass that is to take torch's is one of WarmupAroundLR
            kinds = "a Schedule or a torch scheduler" if type(self) is WarmupLR else "a Schedule"
            raise TypeError(f"after should be {kinds} but is: {type(after).__name__}")
        super().__init__(optimizer, Phases((as_warmup(warmup_steps), after), convention), **options)

    @property
    def warmup_steps(self) -> int:
        """Length of the warmup."""
        return self.schedule.phases[0].steps or 0


class WarmupAroundLR(WarmupLR):
    """A warmup around a torch scheduler, which is no function of the step: what :class:`WarmupLR` makes for one.

    :attr:`schedule` is the warmup alone, a factor on what the scheduler says. Arguments and errors of
    :class:`WarmupLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        after: LRScheduler,
        warmup_steps: int | Warmup,
        *,
        convention: str | Convention = "every-step",
        **options: Any,
    ) -> None:
        if isinstance(after, (ReduceLROnPlateau, GreedyLR)):
            raise ValueError(
                "after should be a scheduler that needs no metric (for ReduceLROnPlateau write PlateauWithWarmup) "
                f"but is: {type(after).__name__}"
            )
        if after.optimizer is not optimizer:
            raise ValueError("after should be a scheduler of this optimizer but is one of another")
        for name in options:
            if name != "on_mismatch":
                raise TypeError(f"{name} should be given to the torch scheduler, as it is not taken with one")
        self._wrap(optimizer, after, warmup_steps, convention, **options)

    def _wrap(
        self, optimizer: Optimizer, after: Any, warmup_steps: int | Warmup, convention: str | Convention, **options: Any
    ) -> None:
        ramp = Phases((as_warmup(warmup_steps), Hold()), convention)
        if ramp.resolved.decay_from == "start" and ramp.resolved.target != "product":
            raise ValueError(
                "convention should begin the scheduler after the warmup, or be a product, as it cannot be asked for "
                f"later values, but is: {convention}"
            )
        self.after = after
        self._after_epoch = 0
        self._first_groups = len(optimizer.param_groups)
        self._after_lrs = current_lrs(optimizer.param_groups)
        ScheduleLR.__init__(self, optimizer, ramp, **options)

    def get_lr(self) -> list[float | Tensor]:
        return [*self._last_lr]

    def preview(self, n: int, start: int = 0, field: str = "lr") -> list[list[float]]:
        raise TypeError(f"preview should be of a schedule, which {type(self.after).__name__} is not")

    def _set_base_lrs(self, values: float | Sequence[float]) -> None:
        after = type(self.after).__name__
        raise TypeError(f"base_lrs should not be set here: the learning rates are those of {after} (see .after)")

    def _update_lr(self, epoch: float | None = None) -> None:
        if epoch is not None:
            # it is stepped one by one, and forwards only
            epoch, after = as_steps("epoch", epoch), type(self.after).__name__
            if self._due(epoch) < self._after_epoch:
                raise ValueError(f"epoch should be >= {self.last_epoch}, as {after} does not go back, but is: {epoch}")
        super()._update_lr(epoch)

    def _write(self) -> None:
        while self._after_epoch < self._due(self.last_epoch):
            self._step_after()
        self._write_product()

    def _due(self, step: int) -> int:
        """The step that the wrapped scheduler should be at."""
        convention = self.schedule.resolved
        if convention.decay_from == "start":
            return step
        early = convention.decay_from == "before" or (convention.decay_from == "last" and self.warmup_steps > 0)
        return max(step - self.warmup_steps + early, 0)

    def _step_after(self, *metrics: Any) -> None:
        """Step the wrapped scheduler as if there were no warmup."""
        self._set_lrs(self._after_lrs)
        groups = self.optimizer.param_groups
        try:
            self.after.step(*metrics)
        except (KeyError, ValueError) as error:
            if len(groups) == self._first_groups:
                raise
            raise RuntimeError(
                f"param_groups should be {self._first_groups}, as torch's {type(self.after).__name__} takes up none "
                f"that is added later (a Schedule does), but are: {len(groups)}"
            ) from error
        self._after_lrs = current_lrs(groups)
        self._after_epoch += 1

    def _write_product(self) -> None:
        ramp = self.schedule
        # of a group that was added later
        self._after_lrs += current_lrs(self.optimizer.param_groups[len(self._after_lrs) :])
        if ramp.absolutes:
            self._set_lrs([ramp.value(self.last_epoch, float(lr)) for lr in self._after_lrs])
        else:
            factor = ramp(self.last_epoch)
            self._set_lrs([lr * factor for lr in self._after_lrs])
        self._last_lr = current_lrs(self.optimizer.param_groups)

    def _set_lrs(self, lrs: Sequence[float | Tensor]) -> None:
        if len(self.optimizer.param_groups) < len(lrs):
            raise ValueError(f"param_groups should be {len(lrs)}, or more, but are: {len(self.optimizer.param_groups)}")
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=False):
            write(group, "lr", lr)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "after_type": type(self.after).__name__,
            "after": self.after.state_dict(),
            "after_epoch": self._after_epoch,
            "after_lrs": [float(lr) for lr in self._after_lrs],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if state_dict.get("after_type") != type(self.after).__name__:
            raise ValueError(
                f"state_dict should be of a warmup around {type(self.after).__name__} "
                f"but is of one around: {state_dict.get('after_type')}"
            )
        super().load_state_dict({**state_dict, "in_force": False})
        # some of torch's schedulers take keys out of what they load
        self.after.load_state_dict(deepcopy(state_dict["after"]))
        self._after_epoch = state_dict["after_epoch"]
        self._after_lrs = [*state_dict["after_lrs"]]
        if state_dict["in_force"]:
            self._write_product()


class PlateauWithWarmup(WarmupAroundLR):
    """ReduceLROnPlateau after, or inside, a warmup; checkpointed as a whole.

    ``step()`` after every optimizer step counts the warmup; ``step(metric)`` or, if the steps are counted elsewhere,
    ``report(metric)`` also hands the metric on. The learning rate is the product of both.

    Which metric is better, and what the threshold, patience and cooldown count, is all torch's: its class does that.
    It takes NaN for a metric that is not better, and lowers the learning rate for it.

    Args:
        optimizer: Any torch optimizer.
        warmup_steps: Length of a linear warmup from zero, or a :class:`Warmup`.
        during_warmup: Metrics count before the warmup is over, too (default: False).
        ignore_nan: A metric that is NaN is not handed on (default: False, as in torch).
        convention: See :class:`Convention` (default: ``"every-step"``).
        on_mismatch: See :class:`ScheduleLR` (default: ``"error"``).
        plateau: Arguments of :class:`torch.optim.lr_scheduler.ReduceLROnPlateau`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int | Warmup,
        *,
        during_warmup: bool = False,
        ignore_nan: bool = False,
        convention: str | Convention = "every-step",
        on_mismatch: Literal["error", "use_new", "use_checkpoint"] = "error",
        **plateau: Any,
    ) -> None:
        self.during_warmup = during_warmup
        self.ignore_nan = ignore_nan
        after = ReduceLROnPlateau(optimizer, **plateau)
        self._wrap(optimizer, after, warmup_steps, convention, on_mismatch=on_mismatch)

    def _due(self, step: int) -> int:
        """Metrics are what steps it."""
        return self._after_epoch

    def report(self, metrics: SupportsFloat) -> None:
        """Hand a metric on without counting a step.

        Args:
            metrics: What the plateau is looked for in, such as the validation loss.
        """
        if self.ignore_nan and math.isnan(metrics):
            return
        if self.during_warmup or self.last_epoch >= self.warmup_steps:
            self._step_after(metrics)
            self._write_product()

    def step(self, metrics: SupportsFloat | None = None) -> None:  # type: ignore[override]
        """Go on to the next step.

        Args:
            metrics: What the plateau is looked for in (default: None, only the warmup goes on).
        """
        if metrics is not None:
            self.report(metrics)
        super().step()
