"""The engine of an optimizer: what it keeps between steps, and one step.

A step: read the groups, gather parameters, gradients and states; take the plan of last time or make one; send addresses
and hyperparameters; measure the norm; compile; update. Everything before the update may fail and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, repeat
from operator import is_, itemgetter
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .. import _compat
from . import backends
from .averager import Averager, is_due
from .bad_gradients import BadGradients, check_skips
from .bucket import Bucket
from .fallback import run_stock
from .grad_norm import NORM, SKIP, Amp, Found, Measurement, measure
from .guards import SETTINGS as GUARDS
from .guards import Clipping
from .optimizer import EngineOptimizer
from .plan import StepInputs, StepPlan
from .recorder import Row
from .sharding import gathered
from .storage import SETTINGS, STOCHASTIC
from .twins import on_host, send_

_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, tuple)

#: Patterns of gradients (which are None) for which a plan is kept.
_PLANS_KEPT = 4

#: Settings of the whole optimizer; in a group they would mean something else.
WHOLE = (*GUARDS, "norm_group", "average")


def check_group(group: Any, optimizer: EngineOptimizer, loaded: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Raise ValueError where a parameter group has a setting of the whole optimizer, and not the optimizer's.

    ZeroRedundancyOptimizer writes all arguments of the optimizer into its groups.

    Args:
        group: The group.
        optimizer: Whose it is going to be.
        loaded: Attributes that the optimizer is going to have.
    """
    for name in WHOLE:
        if isinstance(group, dict) and name in group and group[name] != loaded.get(name, getattr(optimizer, name)):
            raise ValueError(
                f"{name} should be an argument of the optimizer, for all groups together, but a parameter group has: "
                f"{group[name]}"
            )


class Engine:
    """What an optimizer keeps between steps. It is no part of checkpoints and copies.

    Attributes:
        plans: The last one used comes first.
        values: The hyperparameters of each group; a new list where one has changed.
        device_counts: Steps are counted on the device: whether one counts, only it knows (GradScaler).
        control: Of the last step, see :mod:`optimx._engine.grad_norm`; None without clipping and GradScaler.
        deferred_found_inf: Left by GradScaler, to be written by the coming step.
        verdict: The ``control`` of the coming step, where a composite has decided about it.
        bad: Which gradients were infinite or NaN, where rules look for them.
    """

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []
        self.values: list[tuple[Any, ...]] = []
        self.device_counts = False
        self.control: Tensor | None = None
        self.deferred_found_inf: Tensor | None = None
        self.verdict: Tensor | None = None
        self.bad = BadGradients()
        self._row: Row | None = None
        self._settings: list[Any] = []
        self._n_group_keys = 0

    def step(self, optimizer: EngineOptimizer) -> None:
        """Update all parameters that have a gradient."""
        records = torch.is_grad_enabled()
        _compat.set_grad_enabled(False)
        try:
            self._step(optimizer)
        finally:
            _compat.set_grad_enabled(records)

    def _step(self, optimizer: EngineOptimizer) -> None:
        if optimizer.max_skips is not None:
            check_skips(optimizer, self.bad)
        self.read_groups(optimizer)
        inputs = StepInputs(optimizer, self.values, self.device_counts)
        amp = self._amp(optimizer)
        inputs.transform_grads(optimizer, amp.grad_scale)
        total_norm = self._given_norm(optimizer)
        found_inf = amp.found_inf
        if optimizer._twins is not None:
            inputs.to_host(optimizer, optimizer._twins)
            amp = Amp(on_host(amp.grad_scale), on_host(amp.found_inf), amp.check)
            total_norm, self.verdict = on_host(total_norm), on_host(self.verdict)
        plan = self._plan(optimizer, inputs)
        rules = optimizer.rules
        may_skip = amp.found_inf is not None or self.verdict is not None or (rules is not None and rules.skips)
        if may_skip and optimizer.rule.scalars and not self.device_counts and plan.on_triton:
            plan.release()
            self.device_counts = inputs.device_counts = True
            self._forget_plans()
            plan = self._plan(optimizer, inputs)
        is_watched = optimizer._recorder is not None and optimizer._recorder.begin()
        averages = is_due(optimizer)
        is_measured = False
        while True:
            try:
                plan.lay_out_grads(inputs)
                noise_step = _number_noise(optimizer, plan.buckets)
                for bucket in plan.buckets:
                    bucket.send(self.values)
                if not is_measured:
                    # once: other ranks may have nothing to compile again
                    self._measure(optimizer, plan, inputs, amp, total_norm, is_watched=is_watched)
                    is_measured = True
                    if amp.check and found_inf is not None and amp.found_inf is not None:
                        send_(amp.found_inf, found_inf)
                self._update(optimizer, plan, inputs, noise_step, may_skip=may_skip, averages=averages)
                return
            except backends.CompileError as failed:
                backends.give_up(failed, _described(failed, optimizer, plan))
            finally:
                plan.release()
            # without the variants that failed; others may
            self._forget_plans()
            plan = self._plan(optimizer, inputs)

    def read_groups(self, optimizer: EngineOptimizer) -> None:
        """Bring ``values``, the hyperparameters of each group, up to date.

        Most steps change nothing, and hundreds of groups take longer to read than to update: settings that are the very
        objects of the last step, and cannot change in place, are not looked into.
        """
        groups, rule = optimizer.param_groups, optimizer.rule
        n_keys = sum(map(len, groups))
        if n_keys != self._n_group_keys:
            for group in groups:
                check_group(group, optimizer)
            self._n_group_keys = n_keys
        names = optimizer.defaults
        try:
            # of one name alone, itemgetter makes no tuple
            settings = [*chain.from_iterable(map(itemgetter(*names, "params"), groups))]
            del settings[len(names) :: len(names) + 1]
        except KeyError:  # a subclass's default that groups lack
            settings = [group.get(name) for group in groups for name in names]
        optional = (*SETTINGS, *rule.optional_settings)
        settings += [group.get(name) for group in groups for name in optional]
        if len(settings) == len(self._settings) and all(map(is_, settings, self._settings)):
            return
        values = [*map(rule.values, groups)]
        if not _are_constants(chain.from_iterable(values)):
            values = [tuple(map(_readable, group)) for group in values]
        self._settings = settings if _are_constants(settings) else []
        self.values = values

    def note_found_inf(self, optimizer: EngineOptimizer, found_inf: Sequence[Tensor]) -> None:
        """GradScaler has looked for infinite gradients, and may not call the step."""
        found = torch.stack([found.to(found_inf[0].device, torch.float32) for found in found_inf]).sum()
        unknown = torch.full_like(found, torch.nan)
        self.control = torch.stack([unknown, torch.ones_like(found), found])
        if optimizer.needs_norm:
            optimizer.grad_norm = unknown

    def _amp(self, optimizer: EngineOptimizer) -> Amp:
        """What GradScaler left on the optimizer before it called the step."""
        found_inf, self.deferred_found_inf = self.deferred_found_inf, None
        if found_inf is not None:
            return Amp(getattr(optimizer, "grad_scale", None), found_inf, check=True)
        found_inf = getattr(optimizer, "found_inf", None)
        # torch's is the number 0 where it saw no gradient
        found_inf = found_inf if isinstance(found_inf, Tensor) else None
        return Amp(getattr(optimizer, "grad_scale", None), found_inf)

    def _given_norm(self, optimizer: EngineOptimizer) -> Any:
        """The norm that somebody else has measured for this step."""
        norm = gathered(vars(optimizer).pop("total_norm", None))
        if norm is not None and not optimizer.needs_norm:
            raise RuntimeError(f"total_norm should be None without max_grad_norm but is: {norm}")
        return norm

    def _plan(self, optimizer: EngineOptimizer, inputs: StepInputs) -> StepPlan:
        """The plan for a step, bound to its tensors."""
        for i, plan in enumerate(self.plans):
            if plan.is_for(inputs) and plan.holds(optimizer, inputs):
                plan.bind(inputs)
                if plan.fits(inputs):
                    if i:
                        self.plans.insert(0, self.plans.pop(i))
                    return plan
                plan.release()
        # plans for other patterns of gradients stay
        kept = [plan for plan in self.plans if plan.is_captured or not plan.is_for(inputs)]
        plan = StepPlan(optimizer, inputs)
        if not plan.is_of_graph:
            others = [p for p in kept if not p.is_captured and p.holds(optimizer, inputs)]
            captured = [p for p in kept if p.is_captured and not p.has_dead_states()]
            self.plans = [plan, *others[: _PLANS_KEPT - 1], *captured]
        return plan

    def _forget_plans(self) -> None:
        """Plan the coming steps anew. A graph goes on reading the tables of the plan that it recorded."""
        self.plans = [plan for plan in self.plans if plan.is_captured]
        for plan in self.plans:
            plan.is_retired = True

    def _measure(
        self,
        optimizer: EngineOptimizer,
        plan: StepPlan,
        inputs: StepInputs,
        amp: Amp,
        total_norm: Any,
        *,
        is_watched: bool,
    ) -> None:
        """Find out the norm, and whether to skip the step, if that matters; ranks find it out together."""
        needs_norm = optimizer.needs_norm
        if needs_norm and plan.has_flat_shards and optimizer.norm_group is None and total_norm is None:
            raise RuntimeError(flat_shards_message(optimizer.max_grad_norm))
        plan.rounds.check(inputs.grads, optimizer.param_groups)
        others: list[Any] = [inputs.grads[position] for position, _ in plan.leftovers]
        # what other ranks have counts, too, and all of them have to come together
        found = Found(plan.buckets, others, plan.cuts_of_leftovers, plan.reduction, total_norm)
        takes_part = bool(plan.buckets or others or plan.reduction or total_norm is not None)
        self.control, self.verdict = self.verdict, None
        self._row = None
        if is_watched and takes_part and optimizer._recorder is not None:
            self._row = Row(optimizer._recorder, plan, inputs, optimizer.state)
        if needs_norm or optimizer.grad_norm is not None:
            optimizer.grad_norm = None
        measured = None if self.control is None else Measurement(self.control[NORM], self.control)
        if needs_norm and not takes_part:
            optimizer.grad_norm = torch.zeros((), device="cpu")
        elif measured is None and takes_part and (needs_norm or is_watched or amp != Amp()):
            rules = optimizer.rules
            # normalizing is clipping to 1 that also lengthens
            max_norm = 1.0 if optimizer.normalize_grads else optimizer.max_grad_norm
            if rules is not None or isinstance(max_norm, Clipping):
                max_norm = None
            device = inputs.shards[0].device
            needed = needs_norm
            if self._row is not None and not needs_norm:
                needed = not self._row.find_norm()
            measured = measure(
                found, max_norm, amp, device, needed=needed, clamp=not optimizer.normalize_grads, watched=is_watched
            )
            self.control = measured.control
            optimizer.grad_norm = measured.norm if needs_norm else None
            if rules is not None:
                with backends.compiling(*(bucket.kernel_key for bucket, _ in measured.partials)):
                    optimizer._judge(self.control)
                self.bad.note(optimizer, inputs.grads, measured)
        if self._row is not None and measured is not None:
            self._row.of_grads(measured, amp)
        if isinstance(amp.found_inf, Tensor) and not takes_part:
            # nothing to update here, but a rank may tell what the others have found
            self.control = torch.stack([torch.zeros_like(amp.found_inf), torch.ones_like(amp.found_inf), amp.found_inf])

    def _update(
        self,
        optimizer: EngineOptimizer,
        plan: StepPlan,
        inputs: StepInputs,
        noise_step: int | None,
        *,
        may_skip: bool,
        averages: bool,
    ) -> None:
        """Compile, and update: with torch's step what is left to it, the buckets together."""
        control, buckets = self.control, plan.buckets
        if self._row is not None:
            self._row.before_update()
        averager = None
        if averages and optimizer.average is not None and inputs.shards:
            averager = Averager(optimizer, optimizer.average, plan, inputs)
            averager.before_update()
        # towards the host a copy that nobody waits for would be read too early
        on_device = [
            None if control is None else control.to(b.key.device, non_blocking=b.key.device.type != "cpu")
            for b in buckets
        ]
        _compile(buckets, on_device)
        if plan.on_triton and _compat.is_capturing():
            plan.keep_for_graph()
        # torch's step goes first: where it raises, nothing has been changed
        if plan.leftovers:
            whole_grads = [inputs.whole_grads[position] for position, _ in plan.leftovers]
            run_stock(optimizer, plan.leftovers, whole_grads, control, may_skip=may_skip)
        for group in optimizer.param_groups if noise_step is not None else ():
            group["rounding_step"] = noise_step
        updates = [bucket.update(there) for bucket, there in zip(buckets, on_device, strict=True)]
        if optimizer._twins is not None:
            skips = control is not None and bool(control[SKIP] != 0)
            updates = [*map(optimizer._twins.update, buckets, updates, repeat(skips))]
        device = inputs.shards[0].device if inputs.shards else torch.device("cpu")
        plan.rounds.run(updates, self.values, device)
        for bucket in buckets:
            # autograd has to notice that what it saved for backward is gone
            torch.autograd.graph.increment_version(bucket.updated(bucket.members.params))
            if bucket.key.cut is not None:
                torch.autograd.graph.increment_version([inputs.params[i] for i in bucket.updated(bucket.positions)])
        if averager is not None:
            averager.after_update(control)
        if self._row is not None and optimizer._recorder is not None and control is not None:
            self._row.after_update(control)
            capturable = any(group.get("capturable", optimizer.capturable) for group in optimizer.param_groups)
            optimizer._recorder.send(self._row, control, capturable)
            self._row = None
        if plan.is_first and control is not None and may_skip:
            plan.take_back_first(inputs.params, optimizer.state, control)


def _number_noise(optimizer: EngineOptimizer, buckets: Sequence[Bucket]) -> int | None:
    """The number of the step for random bits, where the algorithm itself counts none; groups keep it."""
    if optimizer.rule.scalars:
        return None
    rounded = [bucket for bucket in buckets if any(kept.kind == STOCHASTIC for kept in bucket.key.formats)]
    if not rounded:
        return None
    if _compat.is_capturing():
        raise RuntimeError(
            f"a CUDA graph would repeat the random bits of the step that it records: {type(optimizer).__name__} counts "
            "no steps on the device, so param_rounding and state_dtype should not be 'stochastic' there"
        )
    step: int = 1 + max(group.get("rounding_step", 0) for group in optimizer.param_groups)
    for bucket in rounded:
        bucket.noise_step = step
    return step


def _compile(buckets: Sequence[Bucket], controls: Sequence[Tensor | None]) -> None:
    """Compile what the buckets will launch; the error, if any, is of all that do not compile."""
    failed: list[backends.CompileError] = []
    for bucket, control in zip(buckets, controls, strict=True):
        try:
            bucket.compile(control)
        except backends.CompileError as error:
            failed.append(error)
    if failed:
        variants = chain.from_iterable(error.variants for error in failed)
        raise backends.CompileError((*variants,), failed[0].cause)


def _described(failed: backends.CompileError, optimizer: EngineOptimizer, plan: StepPlan) -> str:
    """The tensors of a plan that kernels which do not compile were for."""
    concerned = [bucket for bucket in plan.buckets if bucket.kernel_key in failed.variants]
    n_tensors = sum(len(bucket.positions) for bucket in concerned)
    where = sorted({f"{str(b.key.dtypes[0]).removeprefix('torch.')} on {b.key.device}" for b in concerned})
    return f"{n_tensors} tensor{'s' * (n_tensors != 1)} of {type(optimizer).__name__} ({', '.join(where)})"


def flat_shards_message(max_grad_norm: float | Clipping | None) -> str:
    """Why gradients cannot be clipped in the step where FSDP1 keeps flat shards, and how they can."""
    return (
        "norm_group should be the process group over which FullyShardedDataParallel keeps flat parameters, for "
        f"max_grad_norm={max_grad_norm} (or call model.clip_grad_norm_(max_norm) before the step), but is: None"
    )


def _are_constants(settings: Iterable[Any]) -> bool:
    """Whether settings that are the same objects are the same values. They are many, their types few."""
    settings = [*settings]
    if not all(issubclass(cls, _CONSTANTS) for cls in {*map(type, settings)}):
        return False
    tuples = [value for value in settings if isinstance(value, tuple)]
    return not tuples or _are_constants(chain.from_iterable(tuples))


def _readable(value: Any) -> Any:
    """Numbers as they are, also those in an array; a tensor on a device as it is, for the kernels to read."""
    if isinstance(value, Tensor):
        return value.item() if value.device.type == "cpu" else value.to(torch.float32)
    return value.item() if hasattr(value, "__array__") else value
