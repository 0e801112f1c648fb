"""The learning-rate range test: train a little with a rate that rises, see where the loss falls, and undo it all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from . import _compat
from ._checks import above, as_steps, check_instance, check_number, one_of, told
from ._engine.optimizer import needs_closure
from ._preserve import check_restorable, preserved
from ._table import aligned
from .lr_rules import RULES, diverges_at, smoothed
from .lr_scheduler import ScheduleLR, Warmup
from .lr_scheduler._plot import plot_sweep

__all__ = ["LRCurve", "lr_find"]

#: Losses that come to the host in one transfer.
_TOGETHER = 10
#: Steps in a row that a scaler may skip: from the highest scale that anybody begins with down to nearly none.
_SKIPS = 40


@dataclass(frozen=True)
class LRCurve:
    """What :func:`lr_find` found; prints as a table of all suggestions.

    Attributes:
        lrs: Learning rate of each step, of the group that has the greatest.
        losses: Of each step, before its update, as they were measured. The last one may be where the sweep has stopped.
        steps: How many the sweep was to have.
        ratios: Of each group's learning rate to ``lrs``.
        stopped: Why there are fewer; None if there are not.
    """

    lrs: list[float]
    losses: list[float]
    steps: int
    ratios: list[float]
    stopped: str | None = None

    @property
    def smoothed(self) -> list[float]:
        """The losses as they are drawn, an average over some 50 steps."""
        return smoothed(self.losses)

    @property
    def suggestions(self) -> dict[str, float | None]:
        """What each rule of ``optimx.lr_rules.RULES`` suggests for ``lrs``; None where it has too few steps."""
        return {name: rule.suggest(self.lrs, self.losses, self.steps) for name, rule in RULES.items()}

    def group_lrs(self, lr: float) -> list[float]:
        """The learning rate of each group where the greatest one is ``lr``."""
        return [lr * ratio for ratio in self.ratios]

    @property
    def table(self) -> list[tuple[str, ...]]:
        """The suggestions as texts, after a row with the names of the columns."""
        rows = [
            (name, "-" if lr is None else f"{lr:.3g}", RULES[name].meaning) for name, lr in self.suggestions.items()
        ]
        return [("rule", "lr", "where"), *rows]

    @property
    def summary(self) -> str:
        """How far the sweep came."""
        text = f"{len(self.lrs)} of {self.steps} steps"
        if self.lrs:
            best = min(range(len(self.lrs)), key=self.smoothed.__getitem__)
            text += f", lr {self.lrs[0]:.3g} to {self.lrs[-1]:.3g}, least smoothed loss {self.smoothed[best]:.4g}"
        return text + (f"; stopped: {self.stopped}" if self.stopped else "")

    def __str__(self) -> str:
        return "\n".join([self.summary, *aligned(self.table, [1])])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts, with the suggestions."""
        return {**asdict(self), "suggestions": self.suggestions}

    def plot(self, where: Any) -> None:
        """Draw losses, smoothed losses and suggestions over the learning rate.

        Args:
            where: Axes of matplotlib, or the path of an image file, whose suffix is the format (without one: PNG).
        """
        plot_sweep(where, self.lrs, self.losses, self.smoothed, self.suggestions)


def lr_find(
    model: nn.Module,
    optimizer: Optimizer,
    closure: Callable[[], Tensor] | None = None,
    *,
    loader: Iterable[Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    shape: str = "exponential",
    accumulate: int = 1,
    scaler: Any = None,
    stop: float = 4.0,
    also: Iterable[Any] = (),
    process_group: Any = None,
) -> LRCurve:
    """Train with a learning rate that rises from step to step, and put everything back (https://arxiv.org/abs/1506.01186).

    The learning rates of all groups rise together and keep their ratios, those of ``initial_lr`` where a scheduler has
    left it. Nothing waits for the losses but every tenth step, and a scaler for its own. Afterwards, also after an
    exception, all is as it was: parameters, gradients, buffers, the optimizer's state, groups and attributes, the mode
    of modules, and the random generators of python, numpy and torch. The modules train in the mode that they are in.

    Args:
        model: What is trained.
        optimizer: Any torch optimizer of its parameters, but those whose step needs a closure.
        closure: Returns the loss of the next batch; the finder calls ``backward``. It has batches and autocast of its
            own, and is called ``steps * accumulate`` times.
        loader: In place of a closure, batches: a DataLoader, a list. An iterator of its own starts over at the end.
        loss_fn: Of a loader; called with the model and a batch, it returns the loss.
        low, high: Learning rates of the first and the last step, of the group that has the greatest (default: 1e-7 and
            10; a step of Adam is nearly as long as its learning rate, so there is nothing to see above 1).
        steps: >= 2 (default: 100).
        shape: ``"exponential"`` (default) or ``"linear"``.
        accumulate: Batches of a step, whose mean is its loss (default: 1).
        scaler: A gradient scaler, a copy of which is used (default: None). A step that it skips is taken again, with
            the next batch.
        stop: The sweep ends where the smoothed loss is above this multiple of its best, or the loss is not finite
            (default: 4; infinity: only there).
        also: What else has a state that training changes, and ``state_dict`` and ``load_state_dict``: averages of
            the parameters, metrics, schedulers that the closure steps, a scaler that it uses; or a
            :class:`torch.Generator`.
        process_group: Ranks that sweep together, in DistributedDataParallel say, and see the mean of their losses
            (default: None, this rank sees its own).

    Raises:
        ValueError: Neither a closure nor a loader with its loss function, or both; ``low`` not in (0, ``high``), or
            another number that is not as above; a step that needs a closure; no group that has a learning rate; a
            loader that has no batches or is an iterator, which cannot start over; a loss of several elements.
        TypeError: The model is no module, the optimizer no optimizer, the loss no tensor that needs gradients, or one
            of ``also`` has no such methods.
    """
    check_instance("model", model, nn.Module, "a torch.nn.Module")
    check_instance("optimizer", optimizer, Optimizer, "a torch.optim.Optimizer")
    if needs_closure(optimizer):
        raise ValueError(f"optimizer should need no closure to step but is: {type(optimizer).__name__}")
    schedule, ratios = _schedule_of(optimizer, low, high, steps, shape)
    accumulate = as_steps("accumulate", accumulate, least=1)
    above(1).check("stop", stop)
    others = [*also, *_generators_of(loader)]
    for i, other in enumerate(others):
        check_restorable(f"also[{i}]", other)
    scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else _compat.copied_scaler(scaler)
    with preserved(model, optimizer, others), torch.enable_grad():
        step = _Step(model, optimizer, _closure_of(model, closure, loader, loss_fn), accumulate, scaler)
        sweep = ScheduleLR(optimizer, schedule, base_lrs=[high * ratio for ratio in ratios])
        lrs = [max(of_groups) for of_groups in sweep.preview(steps)]
        losses, stopped = _sweep(step, sweep, steps, stop, process_group)
    return LRCurve(lrs[: len(losses)], losses, steps, ratios, stopped)


def _schedule_of(optimizer: Optimizer, low: float, high: float, steps: int, shape: str) -> tuple[Warmup, list[float]]:
    """The rise to ``high``, and the ratio of each group."""
    check_number("high", high)
    check_number("low", low, above(0))
    if low >= high:
        raise ValueError(told("low", f"should be < {high}, which is high,", low))
    own = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    for i, lr in enumerate(own):
        check_number(f"lr of param_groups[{i}]", lr, tensor=True)
    greatest = max(map(float, own))
    if greatest == 0:
        raise ValueError("lr of one of param_groups should be > 0 but all are: 0")
    length, curve = as_steps("steps", steps, least=2), one_of("shape", shape, ("exponential", "linear"))
    return Warmup(length, curve, start=low / high), [float(lr) / greatest for lr in own]


def _generators_of(loader: Any) -> list[torch.Generator]:
    """What the order of a DataLoader's batches is drawn from, if that is not torch's own."""
    owners = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return [*{id(one): one for one in found if isinstance(one, torch.Generator)}.values()]


def _closure_of(
    model: nn.Module, closure: Any, loader: Iterable[Any] | None, loss_fn: Callable[[nn.Module, Any], Any] | None
) -> Callable[[], Any]:
    """What returns the loss of the next batch."""
    if (closure is None) == (loader is None) or (loader is None) != (loss_fn is None):
        given = {"closure": closure, "loader": loader, "loss_fn": loss_fn}
        names = [name for name, value in given.items() if value is not None]
        raise ValueError(f"lr_find should have closure, or loader and loss_fn, but has: {', '.join(names) or 'none'}")
    if loader is None or loss_fn is None:
        return closure
    if isinstance(loader, Iterator):
        raise ValueError(told("loader", "should start over when it ends", loader))
    batches = _endless(loader)
    return lambda: loss_fn(model, next(batches))


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    # of workers that persist all iterators are one, and somebody may be in the middle of it
    own = _compat.copied_loader(loader) if isinstance(loader, DataLoader) else loader
    while True:
        empty = True
        for batch in own:
            empty = False
            yield batch
        if empty:
            raise ValueError("loader should have one batch or more but has none")


@dataclass(frozen=True)
class _Step:
    """A training step."""

    model: nn.Module
    optimizer: Optimizer
    closure: Callable[[], Any]
    accumulate: int
    scaler: Any

    def take(self) -> tuple[Tensor, bool]:
        """The mean loss of its batches, and whether the scaler let the optimizer step."""
        self.model.zero_grad()
        self.optimizer.zero_grad()
        losses = []
        for _ in range(self.accumulate):
            loss = self.closure()
            _check_loss(loss)
            self.scaler.scale(loss / self.accumulate).backward()
            # a graph that is replayed writes every loss to the same place
            losses.append(loss.detach().reshape(()).clone())
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return torch.stack(losses).mean(), self.scaler.get_scale() >= scale


def _check_loss(loss: Any) -> None:
    if not (isinstance(loss, Tensor) and loss.requires_grad):
        raise TypeError(told("the loss", "should be a tensor that needs gradients", loss))
    if loss.numel() != 1:
        raise ValueError(f"the loss should have one element but has: {loss.numel()}")


def _sweep(
    step: _Step, sweep: ScheduleLR, steps: int, stop: float, process_group: Any
) -> tuple[list[float], str | None]:
    """Losses on the host, up to where the sweep has to stop, and why."""
    losses: list[float] = []
    waiting: list[Tensor] = []
    for left in reversed(range(steps)):
        loss, taken = step.take()
        for _ in range(_SKIPS):
            if taken:
                break
            loss, taken = step.take()
        waiting.append(loss)
        sweep.step()
        if taken and left and len(waiting) < _TOGETHER:
            continue
        losses += _on_host(waiting, process_group)
        waiting.clear()
        end = diverges_at(losses, stop)
        if end is not None and not math.isfinite(losses[end]):
            return losses[:end], "the loss is not finite"
        if end is not None:
            return losses[: end + 1], f"the smoothed loss is above {stop:g} times its best"
        if not taken:
            return losses[:-1], "no scale makes the gradients finite"
    return losses, None


def _on_host(losses: Sequence[Tensor], process_group: Any) -> list[float]:
    """The losses, or their means over the ranks, in one transfer."""
    together = torch.stack([*losses])
    if process_group is not None:
        torch.distributed.all_reduce(together, group=process_group)
        together /= torch.distributed.get_world_size(process_group)
    return together.tolist()
