"""An optimizer whose parts step during backward, as soon as their gradients are complete, and free these.

Between two calls of ``step`` gradients arrive, in the order of backward, in hooks of the parameters. Those that belong
to no part yet make a new one, once they are as large as a bucket; in later steps a part waits for all of its members.
What has not stepped when ``step`` is called steps then.

Where something has to be known of all gradients before the first update, they are kept until ``step``, which then is
the optimizer's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from threading import RLock
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from . import _compat
from ._engine.bad_gradients import check_skips
from ._engine.grad_norm import combine, result_dtype, widest
from ._engine.grad_transforms import asked_for
from ._engine.guards import SETTINGS, Guarded
from ._engine.parts import Part, counts_of
from ._engine.plan import StepInputs
from ._engine.sharding import local
from ._engine.step import MultiTensorStep
from .clip_grad import norm_of

#: By which norm the gradients of a step are clipped.
EXACT, PREVIOUS = "exact", "previous"


@dataclass
class Settings:
    """What a release is asked for, and what it does just now.

    Attributes:
        bucket_bytes: Gradients that make a part.
        norm: :data:`EXACT` or :data:`PREVIOUS`.
        scaler: A GradScaler by which losses are multiplied, if any.
        local: Gradients of parameters that are no DTensors need nothing of other ranks.
        whole: A reference to the optimizer, or the composite, that the user steps.
        accumulates: Gradients of the backward at hand are not complete.
        measures: Gradients of the backward at hand are measured and freed, and nothing is updated.
        has_warned: The user has been told that gradients are kept.
    """

    bucket_bytes: float
    norm: str
    scaler: Any
    local: bool
    whole: Callable[[], Any]
    accumulates: bool = False
    measures: bool = False
    has_warned: bool = False


@dataclass
class _Backward:
    """What has happened since the last step.

    Attributes:
        has_begun: A complete gradient has arrived.
        reason: Why gradients are kept; None: they are not.
        counts: What groups had counted before the step.
        counted: And after it.
        seen: Ids of parameters whose gradients have arrived.
        n_arrived: How many of each part, by its id.
        done: Ids of parts that have stepped, or were measured.
        open: Parameters that are to become parts.
        norms: Of the gradients of each part.
    """

    has_begun: bool = False
    reason: str | None = None
    counts: dict[str, Any] = field(default_factory=dict)
    counted: dict[str, Any] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    n_arrived: dict[int, int] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    open: dict[torch.device, list[Tensor]] = field(default_factory=dict)
    norms: list[Tensor] = field(default_factory=list)


class Released:
    """Takes the steps of an optimizer in parts.

    Args:
        optimizer: Whose; it holds this, not the other way round.
        settings: Of the release.

    Attributes:
        previous_norm: Of the gradients of the last step, before clipping; None: not known.
        kept_because: Why the gradients of the last step were kept until ``step``; None: they were not.
        has_measured: Gradients have been measured for the coming step.

    Raises:
        ValueError: Hooks would see gradients that are not complete, or the optimizer's settings need all of them.
    """

    def __init__(self, optimizer: MultiTensorStep, settings: Settings) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._settings = settings
        # gradients on several devices arrive in several threads
        self._lock = RLock()
        self._handles: dict[int, tuple[Tensor, Any]] = {}
        self._everything: list[Tensor] = []
        self._params: list[Tensor] = []
        self._trained: set[int] = set()
        #: Ids of all parameters, whether they are trained, and sizes of groups.
        self._layout: tuple[list[int], list[bool], list[int]] = [], [], []
        self._parts: list[Part] = []
        self._part_of: dict[int, Part] = {}
        self.previous_norm: Tensor | None = None
        self.kept_because: str | None = None
        self._backward = _Backward()
        self._forget_measurement()
        for found in (_unseen(optimizer, settings.local), self._conflict(optimizer)):
            if found is not None:
                raise ValueError(found)
        self._follow_groups(optimizer)

    @property
    def needs_norm(self) -> bool:
        """Whether steps of the optimizer, or of its composite, need the norm of all gradients."""
        return any(isinstance(one, Guarded) and one.needs_norm for one in (self._optimizer(), self._settings.whole()))

    def remove(self) -> None:
        """Take the hooks away, and let the optimizer step by itself."""
        for _, handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        optimizer = self._optimizer()
        if optimizer is not None:
            vars(optimizer).pop("_release", None)

    def step(self, optimizer: MultiTensorStep) -> None:
        """Finish a step: update what has not been updated yet, count, and free all gradients."""
        with self._lock:
            backward = self._backward
            try:
                self._check_scaler(optimizer)
                if not backward.has_begun:
                    self._begin(optimizer)
                self.kept_because = backward.reason
                if backward.reason is None and backward.seen:
                    self._finish(optimizer)
                else:
                    optimizer._engine.step(optimizer)
                self._note_norm(optimizer)
            finally:
                self._backward = _Backward()
                self._forget_measurement()
            _free([*chain.from_iterable(group["params"] for group in optimizer.param_groups)])
            self._drop_old_hooks()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """A context in which gradients are measured and freed.

        Raises:
            RuntimeError: There are gradients, or parts have stepped; nobody asks for the norm, or it is not all that
                has to be known.
        """
        optimizer = self._optimizer()
        if optimizer is None:
            yield
            return
        if self.has_measured or self._backward.seen or any(param.grad is not None for param in self._params):
            raise RuntimeError(
                "measure() should be entered once a step, before there are gradients, but some are there or were "
                "measured: what has accumulated would be lost"
            )
        reason = self._reason(optimizer, measured=True)
        if reason is not None:
            raise RuntimeError(f"gradients should not have to be kept to be measured but are kept: {reason}")
        self._follow_groups(optimizer)
        self._backward = _Backward(has_begun=True)
        try:
            yield
            self._run_rest(optimizer)
            self._decide(optimizer)
        finally:
            _free(self._params)
            self._backward = _Backward()

    def arrived(self, param: Tensor) -> None:
        """The gradient of a parameter is there; called by its hook."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        with self._lock:
            if self._settings.accumulates:
                return
            backward = self._backward
            if not backward.has_begun:
                self._begin(optimizer)
            if backward.reason is not None or id(param) not in self._trained:
                return
            if id(param) in backward.seen:
                raise RuntimeError(
                    "optimizer.step() should be called after each backward, and all but the last of several should "
                    "be in `with release.accumulate():`, but a second gradient came, of a parameter of shape "
                    f"{tuple(param.shape)}"
                )
            backward.seen.add(id(param))
            self._take(optimizer, param)

    def _take(self, optimizer: MultiTensorStep, param: Tensor) -> None:
        """A gradient is there: its part may be complete, or one may be made."""
        backward = self._backward
        part = self._part_of.get(id(param))
        if part is not None:
            n = backward.n_arrived[id(part)] = backward.n_arrived.get(id(part), 0) + 1
            if n == len(part.params):
                self._run(optimizer, part)
            return
        members = backward.open.setdefault(param.device, [])
        members.append(param)
        if sum(map(_grad_bytes, members)) >= self._settings.bucket_bytes:
            del backward.open[param.device]
            self._run(optimizer, self._new_part(optimizer, members))

    def _new_part(self, optimizer: MultiTensorStep, members: Sequence[Tensor]) -> Part:
        part = Part(optimizer, members)
        self._parts.append(part)
        self._part_of.update((id(param), part) for param in members)
        return part

    def _begin(self, optimizer: MultiTensorStep) -> None:
        """The first complete gradient of a step is there, or none is, and the step is called."""
        conflict = self._conflict(optimizer)
        if conflict is not None:
            raise RuntimeError(conflict)
        self._follow_groups(optimizer)
        backward = self._backward
        backward.has_begun = True
        backward.reason = self._reason(optimizer, measured=self.has_measured)
        backward.counts = counts_of(optimizer)

    def _follow_groups(self, optimizer: MultiTensorStep) -> None:
        """Know the optimizer's parameters, and have hooks on them."""
        groups = optimizer.param_groups
        everything = [*chain.from_iterable(group["params"] for group in groups)]
        layout = (
            [*map(id, everything)],
            [param.requires_grad for param in everything],
            [len(g["params"]) for g in groups],
        )
        if layout == self._layout:
            return
        unseen = _unseen(optimizer, self._settings.local)
        if unseen is not None:
            raise RuntimeError(unseen)
        # whose ids are known stay alive
        self._layout, self._everything = layout, everything
        self._params = [param for param in everything if param.requires_grad]
        for param in self._params:
            if id(param) not in self._handles:
                self._handles[id(param)] = param, param.register_post_accumulate_grad_hook(_hook_to(self))
        trained = self._trained = {*map(id, self._params)}
        before, self._parts, self._part_of = self._parts, [], {}
        for part in before:
            members = [param for param in part.params if id(param) in trained]
            if members:
                self._new_part(optimizer, members)

    def _drop_old_hooks(self) -> None:
        """Not while hooks run, whose list would change under their feet."""
        if len(self._handles) != len(self._params):
            for key in self._handles.keys() - self._trained:
                _, handle = self._handles.pop(key)
                handle.remove()

    def _conflict(self, optimizer: MultiTensorStep) -> str | None:
        """Why the previous norm cannot stand for that of a step, if so."""
        if self._settings.norm != PREVIOUS:
            return None
        for guarded in {id(one): one for one in (self._settings.whole(), optimizer) if one is not None}.values():
            if (
                guarded.rules is not None
                or guarded.normalize_grads
                or (guarded.needs_norm and guarded is not optimizer)
            ):
                return f"norm should be '{EXACT}' with {_setting_of(guarded)} but is: '{PREVIOUS}'"
        return None

    def _reason(self, optimizer: MultiTensorStep, *, measured: bool) -> str | None:
        """Why the gradients of the coming step have to be kept until it is called, if so; the user is told once."""
        whole, scaler = self._settings.whole(), self._settings.scaler
        if scaler is not None and scaler.is_enabled():
            return "a GradScaler looks at all of them first"
        if optimizer._recorder is not None and optimizer._recorder.is_due:
            return "the step is watched"
        if optimizer.needs_norm and not measured and self._settings.norm == PREVIOUS and self.previous_norm is None:
            return "no norm of a step before is known"
        reason = _needing_all(optimizer, whole)
        if reason is None and optimizer.needs_norm and not measured and self._settings.norm != PREVIOUS:
            reason = f"{_setting_of(optimizer)} needs the norm of all"
        if reason is not None and not measured and not self._settings.has_warned:
            self._settings.has_warned = True
            warn(
                f"gradients are kept until optimizer.step(), and no memory is saved, because {reason}; see "
                "optimx.release_gradients for what frees them",
                stacklevel=2,
            )
        return reason

    def _run(self, optimizer: MultiTensorStep, part: Part) -> None:
        """Update a part, or measure it, and free its gradients."""
        backward = self._backward
        if self._settings.measures:
            backward.norms.append(_norm_of(part, optimizer))
        else:
            optimizer._check_may_step()
            needs_norm, norm = optimizer.needs_norm, self._measured
            if needs_norm and norm is None:
                backward.norms.append(_norm_of(part, optimizer))
                norm = self.previous_norm
            total_norm = norm if needs_norm and self._verdict is None else None
            backward.counted |= part.step(optimizer, backward.counts, total_norm=total_norm, verdict=self._verdict)
        backward.done.add(id(part))
        _free(part.params)

    def _run_rest(self, optimizer: MultiTensorStep) -> None:
        """Do the same with all gradients that are still there."""
        backward = self._backward
        for part in self._parts:
            if id(part) not in backward.done and any(param.grad is not None for param in part.params):
                self._run(optimizer, part)
        opened, backward.open = backward.open, {}
        for members in opened.values():
            self._run(optimizer, self._new_part(optimizer, members))
        rest = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if rest:
            self._run(optimizer, Part(optimizer, rest))

    def _check_scaler(self, optimizer: MultiTensorStep) -> None:
        """Raise RuntimeError where a GradScaler calls the step that nobody has told of."""
        if self._settings.scaler is not None:
            return
        found, optimizer._engine.deferred_found_inf = optimizer._engine.deferred_found_inf is not None, None
        for one in (optimizer, self._settings.whole()):
            for name in ("found_inf", "grad_scale") if one is not None else ():
                found = found or name in vars(one)
        if found:
            raise RuntimeError(
                "a GradScaler should be told to release_gradients(optimizer, scaler=...) but was not: it would unscale "
                "gradients that are released already"
            )

    def _finish(self, optimizer: MultiTensorStep) -> None:
        if vars(optimizer).pop("total_norm", None) is not None:
            raise RuntimeError("total_norm should be None, as gradients were released before it was set")
        self._run_rest(optimizer)
        for group in optimizer.param_groups:
            group.update(self._backward.counted)
        if optimizer._recorder is not None:
            optimizer._recorder.begin()
        optimizer._engine.control = self._verdict
        if optimizer.needs_norm:
            norm = self._measured
            optimizer.grad_norm = _combined(self._backward.norms, self._params) if norm is None else norm
        elif optimizer.grad_norm is not None:
            optimizer.grad_norm = None

    def _note_norm(self, optimizer: MultiTensorStep) -> None:
        """Keep the norm for the next step, which is clipped by none that is infinite or NaN."""
        norm, previous = optimizer.grad_norm, self.previous_norm
        if norm is not None and previous is not None:
            norm = torch.where(norm.isfinite(), norm, previous.to(norm.device, norm.dtype))
        self.previous_norm = norm

    def _forget_measurement(self) -> None:
        self.has_measured = False
        self._measured: Tensor | None = None
        self._verdict: Tensor | None = None

    def _decide(self, optimizer: MultiTensorStep) -> None:
        """All gradients were measured: clip by their norm, and let the rules decide about the step."""
        self._measured = _combined(self._backward.norms, self._params)
        self.has_measured = True
        if optimizer.rules is not None:
            if optimizer.max_skips is not None:
                check_skips(optimizer, optimizer._engine.bad)
            norm = self._measured.to(widest(self._measured.device))
            self._verdict = torch.stack([norm, torch.ones_like(norm), torch.zeros_like(norm)])
            optimizer._judge(self._verdict)


def _hook_to(released: Released) -> Callable[[Tensor], None]:
    """A hook that keeps nothing alive."""
    reference = weakref.ref(released)

    def hook(param: Tensor) -> None:
        there = reference()
        if there is not None:
            there.arrived(param)

    return hook


def _unseen(optimizer: MultiTensorStep, is_local: bool) -> str | None:
    """Why hooks would see gradients of one rank alone, if so."""
    params = [*chain.from_iterable(group["params"] for group in optimizer.param_groups)]
    if any(map(_compat.is_flat_shard, params)):
        return "parameters should be DTensors (fully_shard) but are FullyShardedDataParallel's flat ones"
    if is_local or not _compat.is_distributed() or torch.distributed.get_world_size() == 1:
        return None
    n_plain = sum(param.requires_grad and not _compat.is_dtensor(param) for param in params)
    if not n_plain:
        return None
    return (
        "with several ranks parameters should be DTensors (fully_shard), because hooks run before "
        f"DistributedDataParallel has averaged gradients, but {n_plain} of {len(params)} are not; local=True says that "
        "gradients of these are complete without other ranks"
    )


def _needing_all(optimizer: MultiTensorStep, whole: Any) -> str | None:
    """What needs all gradients of a step before its first update, beside the optimizer's own norm."""
    if whole is not optimizer and isinstance(whole, Guarded) and whole.needs_norm:
        return f"{_setting_of(whole)} of the composite needs the norm of all"
    if "max_group_norm" in asked_for(optimizer.param_groups):
        return "max_group_norm needs the norms of whole groups"
    if any(_compat.has_step_pre_hooks(one) for one in (optimizer, whole) if one is not None):
        return "hooks run before the step"
    return None


def _setting_of(guarded: Guarded) -> str:
    """The setting for which the norm is needed."""
    return next(f"{name}={getattr(guarded, name)}" for name in SETTINGS if getattr(guarded, name))


def _norm_of(part: Part, optimizer: MultiTensorStep) -> Tensor:
    """The norm of a part's gradients, as the step takes it."""
    twin = part.twin(optimizer, {})
    inputs = StepInputs(twin, [], device_counts=False)
    inputs.transform_grads(twin, None)
    grads = [grad for grad in inputs.whole_grads if grad is not None]
    return norm_of(grads, part.params, group=optimizer.norm_group)


def _combined(norms: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """The norm of parts, of which each rank has the norms of whole tensors."""
    device = norms[0].device if norms else local(params[0]).device if params else torch.device("cpu")
    return combine(norms, 2.0, device).to(result_dtype(norm.dtype for norm in norms))


def _free(params: Sequence[Tensor]) -> None:
    for param in params:
        grad = param.grad
        if grad is not None and grad.is_cuda and _compat.is_dtensor(grad):
            # of a stream of fully_shard's, and maybe read in another one
            local(grad).record_stream(torch.cuda.current_stream(grad.device))
        param.grad = None


def _grad_bytes(param: Tensor) -> int:
    part = local(param)
    return part.numel() * part.element_size()
