"""The engine: a ``step()`` that gathers the gradients of all groups, plans once, and launches.

:class:`MultiTensorStep` goes before a torch optimizer class among the bases; torch's class keeps validation, defaults,
``param_groups``, checkpoints, hooks and the step for whatever the kernels do not do exactly. What an algorithm adds is
an :class:`UpdateRule`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from operator import is_, itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _backend, _compat
from ._counts import Counts
from ._grad_norm import Amp, measure
from ._layout import is_part_of_memory
from ._plan import Leftover, StepPlan, asks_for_torch
from ._rule import UpdateRule

_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, tuple)

#: Patterns of gradients (which are None) for which a plan is kept.
_PLANS_KEPT = 4


class MultiTensorStep(Optimizer):
    """Mixin with the step. The torch class comes after it: ``class AdamW(MultiTensorStep, torch.optim.AdamW)``."""

    rule: ClassVar[UpdateRule]

    #: Clip the gradients of all groups to this 2-norm inside the step; None: do not. May be changed between steps.
    max_grad_norm: float | None = None
    #: Norm of all gradients before clipping in the last step, a scalar tensor on their device that nobody waits for
    #: (float32; float64 where a gradient is); None without ``max_grad_norm``. Under GradScaler it is of the unscaled
    #: gradients, and not finite where the step was skipped.
    grad_norm: Tensor | None = None
    #: Divide the gradients of all groups by their common 2-norm inside the step.
    normalize_grads: bool = False
    #: The step may be recorded in a CUDA graph. A group's own ``capturable``, where torch has one, overrides it.
    capturable: bool = False

    _plans: list[StepPlan]
    _counts: Counts
    _device_counts: bool
    _control: Tensor | None
    _deferred_found_inf: Tensor | None

    def _init_step(self, max_grad_norm: float | None, *, capturable: bool = False) -> None:
        """To be called at the end of a subclass's ``__init__``."""
        if max_grad_norm is not None and not max_grad_norm > 0.0:
            raise ValueError(f"max_grad_norm should be > 0 but is: {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        self.capturable = capturable
        self._reset_step()

    def _reset_step(self) -> None:
        self._plans = []
        self._counts = Counts()
        self._captured_plans: list[StepPlan] = []
        self._device_counts = False
        self._control = None
        self._deferred_found_inf = None
        self._settings: list[Any] = []
        self._values: list[tuple[Any, ...]] = []
        #: GradScaler hands scale and found_inf over instead of unscaling; as in torch, not where torch's step is used
        self._step_supports_amp_scaling = not any(map(asks_for_torch, self.param_groups))

    def __getstate__(self) -> dict[str, Any]:
        ours = {name: getattr(self, name) for name in ("max_grad_norm", "capturable", "normalize_grads")}
        return {**super().__getstate__(), **ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not all("differentiable" in group for group in self.param_groups):
            # torch adds this default to any optimizer; Lion and LAMB have no such setting
            self.defaults.pop("differentiable", None)
        for values in self.state.values():
            for name, value in values.items() if isinstance(values, dict) else ():
                if isinstance(value, Tensor) and is_part_of_memory(value):
                    # in another optimizer states of small tensors lie together; here they are to do so anew
                    values[name] = value.clone()
        self._reset_step()

    @_compat.disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, but groups with ``param_names`` and groups without may be mixed."""
        _compat.add_param_group(self, param_group, super().add_param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what torch's or our :meth:`state_dict` gave. Nothing of it is changed by later steps."""
        # hooks may load something else than was given
        loaded: list[dict[str, Any]] = []
        hook = self.register_load_state_dict_pre_hook(lambda _, final: loaded.append(final))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        state_dict = loaded[0]
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = ((param, group) for group in self.param_groups for param in group["params"])
        for (param, group), saved_id in zip(params, saved_ids, strict=False):
            state: Any = self.state.get(param, {})
            saved = state_dict["state"].get(saved_id, {})
            for name in self.rule.counts:
                if isinstance(state.get(name), Tensor):
                    # torch takes the step counts over as they are, and two optimizers would count with one tensor;
                    # the other scalars it rounds to the parameter's dtype
                    exact = state[name] if name == "step" else saved.get(name)
                    source = exact if isinstance(exact, Tensor) else state[name]
                    state[name] = source.detach().to(state[name].device, copy=True)
            for name in self.rule.unrounded(group):
                if isinstance(saved.get(name), Tensor):
                    dtype = self.rule.state_dtype(param, group)
                    state[name] = saved[name].detach().to(param.device, dtype, copy=True)

    def state_dict(self) -> dict[str, Any]:
        """Torch's state dict. Step counts are where torch would have them, also after steps under GradScaler."""
        names = self.rule.counts
        if not names or self.rule.counts_on_device:
            return super().state_dict()
        away = [
            state
            for group in self.param_groups
            if not (group.get("capturable", self.capturable) or group.get("fused"))
            for state in map(self.state.get, group["params"])
            if state and all(isinstance(state.get(name), Tensor) for name in names)
            and any(state[name].device.type != "cpu" for name in names)
        ]  # fmt: skip
        if away:
            self._counts.home(names, away, torch.device("cpu"))
        return super().state_dict()

    @property
    def step_was_skipped(self) -> Tensor:
        """Whether the last step changed nothing because GradScaler found an infinite or NaN gradient: a bool scalar.

        It is on the gradients' device; only looking at its value (``if opt.step_was_skipped``) waits. Where torch's
        implementation was asked for, GradScaler does not call a skipped step, and this tells of the last one called.
        """
        return torch.tensor(False, device="cpu") if self._control is None else self._control[2] != 0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: Sparse gradients where the algorithm takes none, or ``fused=True`` where it cannot hold.
        """
        _compat.check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not torch.compiler.is_compiling():
            self._step()
        elif not self._needs_norm:
            # under torch.compile the stock formulas become one graph
            _compat.stock_step(self, MultiTensorStep)
        else:
            _step_outside_of_the_graph(self)
        return loss

    @torch.no_grad()
    def _step(self) -> None:
        params = [*chain.from_iterable(map(itemgetter("params"), self.param_groups))]
        grads = [param.grad for param in params]
        self._read_groups()
        amp = self._amp()
        plan = self._plan(params, grads)
        if amp.found_inf is not None and self.rule.counts and not self._device_counts and plan.on_triton:
            # whether this step counts, only the device will know
            self._device_counts = True
            self._plans.clear()
            plan = self._plan(params, grads)
        if plan.is_captured():
            # the graph reads the plan's tables at every replay
            self._captured_plans.append(plan)
        try:
            self._run(plan, grads, amp)
        except _TritonError as error:
            _backend.give_up_on_triton(error.cause)
            self._plans.clear()
            self._run(self._plan(params, grads), grads, amp)

    @property
    def _needs_norm(self) -> bool:
        return self.max_grad_norm is not None or self.normalize_grads

    def _read_groups(self) -> None:
        """Bring ``_values``, the hyperparameters of each group, up to date; it is a new list where one has changed.

        Most steps change nothing, and hundreds of groups take longer to read than to update: settings that are the very
        objects of the last step, and cannot change in place, are not looked into.
        """
        read = itemgetter(*self.defaults)
        settings = [*chain.from_iterable(map(read, self.param_groups))]
        if self.rule.optional_settings:
            settings += [group.get(name) for group in self.param_groups for name in self.rule.optional_settings]
        if len(settings) == len(self._settings) and all(map(is_, settings, self._settings)):
            return
        values = [*map(self.rule.values, self.param_groups)]
        if not _are_constants(chain.from_iterable(values)):
            values = [tuple(map(_readable, group)) for group in values]
        self._settings = settings if _are_constants(settings) else []
        self._values = values

    def _amp(self) -> Amp:
        """What GradScaler left on the optimizer before it called the step."""
        found_inf, self._deferred_found_inf = self._deferred_found_inf, None
        if found_inf is not None:
            return Amp(getattr(self, "grad_scale", None), found_inf, check=True)
        return Amp(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))

    def _plan(self, params: list[Tensor], grads: list[Tensor | None]) -> StepPlan:
        for i, plan in enumerate(self._plans):
            if plan.is_for(grads) and plan.holds(self, params) and plan.fits(params, grads):
                if i:
                    self._plans.insert(0, self._plans.pop(i))
                return plan
        # plans for other patterns of gradients stay; a stale one would keep alive what was replaced
        kept = [plan for plan in self._plans if not plan.is_for(grads)]
        plan = StepPlan(self, params, grads)
        kept = [plan for plan in kept[: _PLANS_KEPT - 1] if plan.holds(self, params)]
        plan.inherit([gone for gone in self._plans if gone not in kept])
        self._plans = [plan, *kept]
        return plan

    def _run(self, plan: StepPlan, grads: list[Tensor | None], amp: Amp) -> None:
        values = self._values
        gathered = [*plan.gather(grads)]
        others: list[Any] = [grads[leftover.position] for leftover in plan.leftovers]
        self._control = control = None
        self.grad_norm = None
        with _triton_errors(plan.on_triton and not _backend.interpreted()):
            for bucket, bucket_grads in gathered:
                bucket.send(bucket_grads, values)
            if self._needs_norm and not (gathered or others):
                self.grad_norm = torch.zeros((), device="cpu")
            elif (self._needs_norm or amp != Amp()) and (gathered or others):
                # normalizing is clipping to 1 that also lengthens
                max_norm = 1.0 if self.normalize_grads else self.max_grad_norm
                norm, control = measure(gathered, others, max_norm, amp, clamp=not self.normalize_grads)
                self._control = control
                self.grad_norm = norm if self._needs_norm else None
            on_device = [None if control is None else control.to(b.key.device, non_blocking=True) for b, _ in gathered]
            for (bucket, _), there in zip(gathered, on_device, strict=True):
                bucket.compile(there)
        # torch's step goes first: where it raises, nothing has been changed
        if plan.leftovers:
            self._run_stock(plan.leftovers, others, control, amp)
        for (bucket, bucket_grads), there in zip(gathered, on_device, strict=True):
            bucket.update(bucket_grads, there)
            # autograd has to notice that what it saved for backward is gone
            torch.autograd.graph.increment_version(bucket.params)
        if plan.is_first and control is not None and amp.found_inf is not None and bool(control[2] != 0):
            plan.take_back_first()

    def _run_stock(self, leftovers: Sequence[Leftover], grads: Sequence[Any], control: Tensor | None, amp: Amp) -> None:
        """Torch's own step, for these parameters only, with gradients unscaled and clipped as ``control`` says."""
        if control is not None and amp.found_inf is not None and bool(control[2] != 0):
            return
        params = [leftover.param for leftover in leftovers]
        scaled = nullcontext() if control is None else _scaled_grads(params, grads, control[1])
        with _only(self, params), scaled:
            _compat.stock_step(self, MultiTensorStep)


@_compat.disable_dynamo
def _step_outside_of_the_graph(optimizer: MultiTensorStep) -> None:
    optimizer._step()


class _TritonError(Exception):
    """A launch that cannot be, before anything was changed."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


@contextmanager
def _triton_errors(expected: bool) -> Iterator[None]:
    """Mark what a compiler or a driver may raise; running out of memory and our own mistakes are neither."""
    try:
        yield
    except (torch.OutOfMemoryError, AssertionError):
        raise
    except Exception as error:
        if not expected:
            raise
        raise _TritonError(error) from error


def _are_constants(settings: Iterable[Any]) -> bool:
    """Whether settings that are the same objects are the same values. They are many, their types few."""
    settings = [*settings]
    if not all(issubclass(cls, _CONSTANTS) for cls in {*map(type, settings)}):
        return False
    tuples = [value for value in settings if isinstance(value, tuple)]
    return not tuples or _are_constants(chain.from_iterable(tuples))


def _readable(value: Any) -> Any:
    """Numbers as they are; a tensor on a CPU as a number, one on a device as it is, for the kernels to read."""
    if not isinstance(value, Tensor):
        return value
    return value.item() if value.device.type == "cpu" else value.to(torch.float32)


@contextmanager
def _only(optimizer: Optimizer, params: Sequence[Tensor]) -> Iterator[None]:
    """Let torch's step see these parameters alone, and nothing of GradScaler's."""
    wanted = {id(param) for param in params}
    everything = [group["params"] for group in optimizer.param_groups]
    attributes = vars(optimizer)
    handed_over: dict[str, Any] = {
        name: attributes.pop(name) for name in ("grad_scale", "found_inf") if name in attributes
    }
    try:
        for group in optimizer.param_groups:
            group["params"] = [param for param in group["params"] if id(param) in wanted]
        yield
    finally:
        for group, all_params in zip(optimizer.param_groups, everything, strict=True):
            group["params"] = all_params
        attributes.update(handed_over)


@contextmanager
def _scaled_grads(params: Sequence[Tensor], grads: Sequence[Tensor], scale: Tensor) -> Iterator[None]:
    """Gradients times ``scale`` in place of the parameters' own, which stay as they are."""
    try:
        for param, grad in zip(params, grads, strict=True):
            factor = scale.to(grad.device) if _compat.is_plain(grad) else float(scale)
            param.grad = (grad * factor).to(grad.dtype)
        yield
    finally:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
