"""The public face of every optimizer: a ``step()`` that updates all groups together.

:class:`MultiTensorStep` goes before a torch optimizer class among the bases; torch's class keeps validation, defaults,
``param_groups``, checkpoints, hooks and the step for whatever the kernels do not do exactly. What an algorithm adds is
an :class:`UpdateRule`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .. import _compat
from . import flags
from .averager import swapped
from .averages import AVERAGE, Average, checked
from .engine import Engine, check_group, flat_shards_message
from .grad_norm import SKIP
from .grad_transforms import asked_for
from .guards import Clipping, Spikes
from .offload import Loading, state_device
from .optimizer import EngineOptimizer, evaluated
from .recode import check_complete, with_float32
from .states import own_states, settle_scalars
from .storage import REMAINDER_NAME, SETTINGS, is_set, kept, named, warn_of_freezing
from .storage import check as check_storage
from .twins import Offload

#: Settings of groups, which are in none where they are these.
OPTIONAL = {**SETTINGS, **flags.FLAGS}


class MultiTensorStep(EngineOptimizer):
    """Mixin with the step, which updates all groups together.

    A torch class comes after it among the bases, ``class AdamW(MultiTensorStep, torch.optim.AdamW)``, or
    :class:`FormulaLoop` where torch has none; :attr:`rule` says what a step is.
    """

    _is_copy: bool
    #: The parameters are not those that are trained, see :meth:`averaged`.
    _holds_averages = False
    #: Settings of the whole optimizer are known, which the first groups come before.
    _is_set_up = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # ``super().step()`` would do until the first stock instance exists: from then on the stock class's ``step``
        # carries the hook runner, and the user's hooks, which already run around our step, would run twice
        after = cls.__mro__[cls.__mro__.index(MultiTensorStep) + 1 :]
        cls._stock_step = _compat.without_hooks(next(vars(base)["step"] for base in after if "step" in vars(base)))

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | Clipping | None = None,
        capturable: bool = False,
        norm_group: Any = None,
        **settings: Any,
    ) -> None:
        """As :class:`torch.optim.Optimizer`: a subclass may pass over its base class's own ``__init__``.

        Args:
            params: Parameters, or groups of them.
            defaults: Settings of groups that do not have their own.
            max_grad_norm: See :attr:`max_grad_norm` (default: None).
            capturable: The step may be recorded in a CUDA graph (default: False).
            norm_group: See :attr:`norm_group` (default: None).
            settings: ``skip_nonfinite``, ``skip_spikes`` and ``max_skips``, which steps are not taken (default: all
                are); ``average``, see :attr:`average` (default: None); ``param_rounding``, ``state_dtype`` and
                ``rounding_seed``, how parameters and states are kept (default: as torch keeps them); flags (default:
                none is set).

        Raises:
            ValueError: ``max_grad_norm`` is not > 0, another setting is out of range, or nothing can be kept like that.
        """
        Optimizer.__init__(self, params, defaults)
        self._init_step(max_grad_norm, capturable=capturable, norm_group=norm_group, **settings)

    def _init_step(
        self,
        max_grad_norm: float | Clipping | None,
        *,
        capturable: bool = False,
        norm_group: Any = None,
        skip_nonfinite: bool = False,
        skip_spikes: Spikes | Mapping[str, Any] | bool | None = None,
        max_skips: int | None = None,
        average: Average | None = None,
        **settings: Any,
    ) -> None:
        """To be called at the end of a subclass's ``__init__``."""
        self._set_settings(settings)
        self._set_rules(max_grad_norm, skip_nonfinite, skip_spikes, max_skips)
        if average is not None:
            self.average = checked(average)
        if norm_group is not None:
            self.norm_group = norm_group
        if self.needs_norm and norm_group is None:
            if any(map(_compat.is_flat_shard, chain.from_iterable(group["params"] for group in self.param_groups))):
                raise ValueError(flat_shards_message(max_grad_norm))
        if capturable:
            self.capturable = capturable
        self._is_set_up = True
        for group in self.param_groups:
            check_group(group, self)
        if self.state:
            own_states(self)

    def _set_settings(self, settings: dict[str, Any]) -> None:
        """Settings of how things are kept, and flags, which groups have only where they are not torch's."""
        unknown = settings.keys() - OPTIONAL.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__} has no arguments {', '.join(sorted(unknown))}")
        chosen = {name: value for name, value in settings.items() if value != OPTIONAL[name]}
        self.defaults.update(chosen)
        for group in self.param_groups:
            for name, value in chosen.items():
                group.setdefault(name, value)
            self._check_settings(group)

    def _check_settings(self, group: dict[str, Any]) -> None:
        """Raise where a group's parameters cannot be kept as it says, or its flags do not suit."""
        flags.check(self.rule, group)
        check_storage(group)
        if is_set(group):
            found = [kept(self.rule, param, param, group, self.defaults) for param in group["params"]]
            warn_of_freezing(self.rule, group, found)

    @cached_property
    def _engine(self) -> Engine:
        """Made when it is first asked for: a subclass may call :class:`torch.optim.Optimizer`'s ``__init__`` alone."""
        return Engine()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: value for name, value in self._own_attributes() if _is_data(value)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state.get("param_groups", ()):
            check_group(group, self, state)
        super().__setstate__(state)
        self._is_set_up = True
        if not all("differentiable" in group for group in self.param_groups):
            # torch adds this default to any optimizer; Lion and LAMB have no such setting
            self.defaults.pop("differentiable", None)
        vars(self).pop("_engine", None)
        vars(self).pop("_twins", None)
        if "defaults" in state and not vars(self).get("_is_copy"):
            # unpickled: each state may have brought all the memory that it shared
            own_states(self, keep_shared=True)

    def _own_attributes(self) -> list[tuple[str, Any]]:
        """Public attributes of the instance that torch's ``__getstate__`` leaves out; no replaced methods."""
        taken = super().__getstate__().keys() | {"grad_scale", "found_inf"}
        return [
            (name, value) for name, value in vars(self).items()
            if not name.startswith("_") and name not in taken and not callable(getattr(type(self), name, None))
        ]  # fmt: skip

    def __copy__(self) -> Any:
        return self._copied(lambda value: value, {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._copied(lambda value: copy.deepcopy(value, memo), memo)

    def _copied(self, copied: Callable[[Any], Any], memo: dict[int, Any]) -> Any:
        """A copy as pickle would make it, also of attributes that pickle might not take."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin._is_copy = True
        # ranks are no data
        memo[id(self.norm_group)] = self.norm_group
        twin.__setstate__(copied(self.__getstate__()))
        del twin._is_copy
        vars(twin).update(copied(dict(self._own_attributes())))
        return twin

    @_compat.disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, but groups with ``param_names`` and groups without may be mixed.

        Raises:
            ValueError: The group has a setting of the whole optimizer, such as ``max_grad_norm``, or something cannot
                be kept as it says.
        """
        if self._is_set_up:
            check_group(param_group, self)
        _compat.add_param_group(self, param_group, super().add_param_group)
        if self._is_set_up:
            try:
                self._check_settings(self.param_groups[-1])
            except (ValueError, TypeError):
                self.param_groups.pop()
                raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what torch's or our :meth:`state_dict` gave. Nothing of it is changed by later steps.

        But tensors that are states of this optimizer already, into which DCP has loaded, stay what they are. How things
        are kept is a setting of the checkpoint's groups; where they have none, as torch's, that of ours stays. So it is
        with flags.

        Raises:
            ValueError: States of 8 bits are missing, as DCP leaves them out of flattened state dicts; nothing is
                changed then.
        """
        check_complete(state_dict)
        settings = [{name: group[name] for name in OPTIONAL if name in group} for group in self.param_groups]
        own = {id(value) for state in self.state.values() if isinstance(state, dict) for value in state.values()}
        # hooks may load something else than was given, and are to find the states where they stay
        loaded: list[dict[str, Any]] = []
        loading = Loading(self)

        def begin(_: Any, final: dict[str, Any]) -> None:
            loaded.append(final)
            loading.begin()

        def end(_: Any) -> None:
            loading.end()
            self._take_over(loaded[0], own, settings)

        before = self.register_load_state_dict_pre_hook(begin)
        after = self.register_load_state_dict_post_hook(end, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
            loading.end()

    def _take_over(self, state_dict: dict[str, Any], own: set[int], settings: Sequence[dict[str, Any]]) -> None:
        """Give what has been loaded its own memory, and the exact values where torch rounds.

        Args:
            state_dict: What has been loaded.
            own: Ids of what was in the state before.
            settings: How groups said before that things are kept.
        """
        guard_state = state_dict.get("guard_state")
        if guard_state is not None:
            self.guard_state = {name: one.detach().clone() for name, one in guard_state.items()}
        for group, chosen in zip(self.param_groups, settings, strict=True):
            for kind in (SETTINGS, flags.FLAGS):
                if not group.keys() & kind.keys():
                    group.update({name: value for name, value in chosen.items() if name in kind})
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = ((param, group) for group in self.param_groups for param in group["params"])
        for (param, group), saved_id in zip(params, saved_ids, strict=False):
            state: Any = self.state.get(param, {})
            saved = state_dict["state"].get(saved_id, {})
            for name in self.rule.scalars[1:]:
                # torch rounds all scalars but step counts to the parameter's dtype
                if isinstance(state.get(name), Tensor) and isinstance(saved.get(name), Tensor):
                    state[name] = saved[name].detach().to(state[name].device)
            kinds = kept(self.rule, param, param, group, self.defaults).kinds
            for name in saved.keys() - {*self.rule.scalars}:
                # what is kept otherwise than torch does stays as it was saved
                as_saved = is_set(group) or name in (AVERAGE, flags.MASK_MEAN)
                dtype = saved[name].dtype if as_saved else getattr(kinds.get(name), "dtype", None)
                if name == REMAINDER_NAME and dtype is torch.int32:
                    # as `_for_others` has it
                    dtype = torch.int16
                if dtype not in (None, param.dtype) and isinstance(saved[name], Tensor):
                    state[name] = saved[name].detach().to(state_device(self, param), dtype)
        others = {
            key: {name: value for name, value in state.items() if id(value) not in own}
            if isinstance(state, dict) else state
            for key, state in state_dict["state"].items()
        }  # fmt: skip
        own_states(self, others)

    def state_dict(self, *, compressed: bool = False) -> dict[str, Any]:
        """Torch's state dict. Step counts are where torch would have them, also after steps under GradScaler.

        Args:
            compressed: States of 8 bits stay codes and scales: smaller, and bit by bit what goes on when they are
                loaded (default: False: they are float32, which every class of the name takes).
        """
        names = self.rule.scalars
        if names and not self.rule.scalars_on_device:
            away = [
                state
                for group in self.param_groups
                if not (group.get("capturable", self.capturable) or group.get("fused"))
                for state in map(self.state.get, group["params"])
                if state and all(isinstance(state.get(name), Tensor) for name in names)
                and any(state[name].device.type != "cpu" for name in names)
            ]  # fmt: skip
            settle_scalars(names, away, torch.device("cpu"))
        # before others' hooks, which know no codes; DCP takes no dtypes where it gathers groups
        saved = self.register_state_dict_post_hook(partial(_as_saved, compressed=compressed), prepend=True)
        try:
            return super().state_dict()
        finally:
            saved.remove()

    def _is_beyond_loop(self, group: dict[str, Any]) -> bool:
        """Whether torch's step, or the loop that stands for it, does not do what a group asks for."""
        unknown = () if self.loop_knows_flags else flags.of_update(self.rule, group)
        return is_set(group) or bool(asked_for([group])) or bool(unknown)

    @property
    def step_was_skipped(self) -> Tensor:
        """Whether the last step changed nothing, as GradScaler or the optimizer's own rules wanted: a bool scalar.

        It is on the gradients' device; only looking at its value (``if opt.step_was_skipped``) waits. Without
        ``fused=True`` torch's GradScaler does not call a step that it skips, and this tells of the last one called.
        """
        control = self._engine.control
        return torch.tensor(False, device="cpu") if control is None else control[SKIP] != 0

    def _note_found_inf(self, found_inf: Sequence[Tensor]) -> None:
        """GradScaler has looked for infinite gradients, and may not call the step."""
        self._engine.note_found_inf(self, found_inf)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the parameters hold their averages, to be evaluated, saved or sampled from.

        They are written in place, and have the bits of before when it ends; meanwhile no step can be taken. Parameters
        without an average, because none is due yet, stay as they are.

        Raises:
            RuntimeError: The optimizer averages nothing, or the context is entered twice.
        """
        if self.average is None:
            raise RuntimeError(
                f"average should be an optimx.EMA, SWA or PowerEMA of {type(self).__name__} but is: None"
            )
        self._check_may_step()
        self._holds_averages = True
        try:
            with swapped(self):
                yield
        finally:
            self._holds_averages = False

    def _check_may_step(self) -> None:
        """Raise RuntimeError where the parameters are not those that are trained."""
        if self._holds_averages:
            raise RuntimeError(
                f"{type(self).__name__}.step() should be called in training but is called while the parameters hold "
                "their averages; leave optimizer.averaged()"
            )

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
        self._check_may_step()
        loss = evaluated(closure)
        if not torch.compiler.is_compiling():
            (self._release or self._engine).step(self)
        elif not (
            self.needs_norm
            or self.average
            or self.offload
            or self._recorder
            or self._release
            or any(map(self._is_beyond_loop, self.param_groups))
        ):
            # under torch.compile the stock formulas, which know no formats and flags, become one graph
            self._stock_step()
        else:
            _step_outside_of_the_graph(self)
        return loss


@_compat.disable_dynamo
def _step_outside_of_the_graph(optimizer: MultiTensorStep) -> None:
    (optimizer._release or optimizer._engine).step(optimizer)


def _as_saved(optimizer: Any, state_dict: dict[str, Any], *, compressed: bool) -> dict[str, Any]:
    saved = dict(state_dict)
    if not compressed:
        saved["state"] = with_float32(optimizer, state_dict["state"])
        saved["param_groups"] = [
            {**group, "state_dtype": named(group["state_dtype"])} if "state_dtype" in group else group
            for group in state_dict["param_groups"]
        ]
    if optimizer.guard_state is not None:
        # under a key of its own, which stock classes pass over
        saved["guard_state"] = {name: vector.clone() for name, vector in optimizer.guard_state.items()}
    return saved


def _is_data(value: Any) -> bool:
    """Whether an attribute can go wherever the optimizer is sent: numbers, texts, tensors, rules, lists of them."""
    if isinstance(value, dict):
        return all(map(_is_data, chain.from_iterable(value.items())))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_data, value))
    return value is None or isinstance(
        value,
        (bool, int, float, complex, str, bytes, Tensor, torch.dtype, torch.device, Average, Clipping, Offload, Spikes),
    )
