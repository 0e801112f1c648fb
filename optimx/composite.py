"""Several optimizers as one: Muon for matrices and AdamW for the rest, say, in one ``step`` with one norm."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _compat
from ._checks import check_instance, one_of
from ._engine.bad_gradients import BadGradients, check_skips
from ._engine.engine import flat_shards_message
from ._engine.flags import FLAGS
from ._engine.grad_norm import FACTOR, SKIP, Measurement, widest
from ._engine.grad_transforms import asked_for
from ._engine.guards import SETTINGS, Clipping, Guarded, Spikes
from ._engine.optimizer import evaluated, needs_closure
from ._engine.step import MultiTensorStep
from .clip_grad import clip_grads_with_norm_, norm_of

__all__ = ["Composite"]


class Composite(Guarded, Optimizer):
    """Several optimizers, its *members*, as one :class:`torch.optim.Optimizer`. Torch has no class of this name.

    ``composite["muon"]`` is a member. ``param_groups`` lists the very dicts of the members, so schedulers and edits
    reach them; ``state`` reads and writes the members' states. Step hooks of the composite run once around a step, and
    those of the members around theirs.

    Args:
        optimizers: The members by name: optimx's, torch's, or any other :class:`torch.optim.Optimizer`. They keep
            their settings and may be stepped, saved and loaded apart.
        max_grad_norm: Clip the gradients of *all* members together to this 2-norm inside the step (default: None, each
            member has its own ``max_grad_norm`` or none). Members of optimx are told the norm and leave ``p.grad``
            alone; the gradients of others are scaled in place. May be changed between steps.
        norm_group: A process group, each rank of which has other parameters that are no DTensors, as for every
            optimizer of optimx (default: None).
        skip_nonfinite, skip_spikes, max_skips: As for every optimizer of optimx, of all members together (default: no
            step is skipped). A member of another library waits for the device to know whether to step.

    Attributes:
        optimizers: The members by name.
        grad_norm: The norm before clipping in the last step, a scalar tensor that nobody waits for; None where nobody
            asks for it. Not finite where our GradScaler skipped the step.

    Raises:
        TypeError: ``optimizers`` is no mapping, or a member no :class:`torch.optim.Optimizer`.
        ValueError: There is no member; a parameter is in two of them; a step needs a closure, as LBFGS's does; a member
            is a composite; or with ``max_grad_norm``, or a rule about skipping, a member has its own, normalizes its
            gradients, or has another ``norm_group``.
    """

    optimizers: dict[str, Optimizer]
    norm_group: Any
    grad_norm: Tensor | None

    def __init__(
        self,
        optimizers: Mapping[str, Optimizer],
        max_grad_norm: float | Clipping | None = None,
        norm_group: Any = None,
        *,
        skip_nonfinite: bool = False,
        skip_spikes: Spikes | bool | None = None,
        max_skips: int | None = None,
    ) -> None:
        check_instance("optimizers", optimizers, Mapping, "a dict of optimizers by name")
        for name, optimizer in optimizers.items():
            check_instance(f"optimizers[{name!r}]", optimizer, Optimizer, "a torch.optim.Optimizer")
            if isinstance(optimizer, Composite) or needs_closure(optimizer):
                raise ValueError(
                    f"optimizers[{name!r}] should be no composite, and need no closure to step, but is: "
                    f"{type(optimizer).__name__}"
                )
        if not optimizers:
            raise ValueError("optimizers should be one or more but are: {}")
        self._set_rules(max_grad_norm, skip_nonfinite, skip_spikes, max_skips)
        of_all = set.intersection(*(set(optimizer.defaults) for optimizer in optimizers.values()))
        first = next(iter(optimizers.values()))
        # torch's __init__ would put an empty list and an empty dict in the place of groups and states
        self.__setstate__(
            {
                # CyclicLR and OneCycleLR ask here whether groups have betas, or momentum
                "defaults": {name: value for name, value in first.defaults.items() if name in of_all},
                "optimizers": dict(optimizers),
                "grad_norm": None,
            }
        )
        self.norm_group = norm_group
        self._placed()
        self._check_owners()
        if self._conflict is not None:
            raise ValueError(self._conflict)

    def __getstate__(self) -> dict[str, Any]:
        names = ("defaults", "optimizers", "grad_norm", "_places", *SETTINGS, "guard_state")
        return {name: vars(self)[name] for name in names if name in vars(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # ranks are no data
        self.norm_group = None
        self._skipped: Tensor | None = None
        self._bad = BadGradients()
        self._places: list[tuple[str, int]] = []
        super().__setstate__(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Composite:
        twin = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin.norm_group = self.norm_group
        return twin

    def __getitem__(self, name: str) -> Optimizer:
        return self.optimizers[name]

    def __repr__(self) -> str:
        members = [f"{name}: {optimizer!r}" for name, optimizer in self.optimizers.items()]
        return "\n".join([f"{type(self).__name__} (", *members, ")"])

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all members; those that join later come last. Add some with :meth:`add_param_group`."""
        return [self.optimizers[name].param_groups[i] for name, i in self._placed()]

    @property
    def state(self) -> MutableMapping[Any, Any]:  # type: ignore[override]
        """The states of all members."""
        return _States(self.optimizers)

    @property
    def step_was_skipped(self) -> Tensor:
        """Whether :class:`optimx.GradScaler`, or a rule, skipped the last step: a bool scalar; looking at it waits."""
        return torch.tensor(False, device="cpu") if self._skipped is None else self._skipped != 0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step each member once.

        Args:
            closure: Reevaluates the model and returns the loss; called once.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: A member has got a setting that does not go with ``max_grad_norm``, or is schedule-free and in
                evaluation.
        """
        if self.max_skips is not None:
            check_skips(self, self._bad)
        for optimizer in self.optimizers.values():
            if isinstance(optimizer, MultiTensorStep):
                # before another member has stepped
                optimizer._check_may_step()
        loss = evaluated(closure)
        self._skipped = None
        if self._conflict is not None:
            raise RuntimeError(self._conflict)
        self.grad_norm = verdict = None
        if self.needs_norm:
            params = [*chain.from_iterable(map(_params_of, self.optimizers.values()))]
            grads = [param.grad for param in params if param.grad is not None]
            self.grad_norm = norm_of(grads, params, group=self.norm_group)
            if self.rules is not None:
                verdict = self._verdict(self.grad_norm, params)
        for optimizer in self.optimizers.values():
            if verdict is None:
                with self._clipping(optimizer):
                    optimizer.step()
            else:
                self._step_as_told(optimizer, verdict)
        return loss

    def eval(self) -> None:
        """Let the members that are schedule-free show their averages; the others stay as they are."""
        self._switch("eval")

    def train(self) -> None:
        """Let the members that are schedule-free be trained again."""
        self._switch("train")

    def _switch(self, mode: str) -> None:
        for optimizer in self.optimizers.values():
            if callable(switch := getattr(optimizer, mode, None)):
                switch()

    def _verdict(self, norm: Tensor, params: Sequence[Tensor]) -> Tensor:
        """What the rules make of a step with gradients of this norm: ``control`` of all members."""
        wide = norm.to(widest(norm.device))
        verdict = torch.stack([wide, torch.ones_like(wide), torch.zeros_like(wide)])
        self._judge(verdict)
        self._bad.note(self, [param.grad for param in params], Measurement(norm, verdict))
        self._skipped = verdict[SKIP]
        return verdict

    def _step_as_told(self, optimizer: Optimizer, verdict: Tensor) -> None:
        """Step a member as the rules want it: skip it, or clip its gradients, inside its step if it is optimx's."""
        if isinstance(optimizer, MultiTensorStep):
            optimizer._engine.verdict = verdict
            optimizer.step()
            return
        assert self.rules is not None
        if self.rules.skips and bool(verdict[SKIP] != 0):
            return
        if self.rules.max_norm is not None:
            # the norm to which this factor clips to 1
            clip_grads_with_norm_(_params_of(optimizer), 1.0, 1.0 / verdict[FACTOR] - 1e-6)
        optimizer.step()

    @_compat.disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all members, each by its own ``zero_grad``."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none)

    @_compat.disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the member that its key ``"optimizer"`` names; the key is taken out.

        Raises:
            ValueError: There is no such key or member, or another member has one of the parameters.
        """
        check_instance("param_group", param_group, dict, "a dict")
        owner = self.optimizers[one_of("param_group['optimizer']", param_group.get("optimizer"), self.optimizers)]
        del param_group["optimizer"]
        owner.add_param_group(param_group)
        try:
            self._check_owners()
        except ValueError:
            owner.param_groups.pop()
            raise
        self._placed()

    @_compat.disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The members' state dicts as one in torch's shape, numbered over all groups.

        A group tells its member in a key ``"optimizer"``.

        Raises:
            RuntimeError: A member has a state that is no parameter's.
        """
        return _compat.with_state_dict_hooks(self, self._packed)

    @_compat.disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let each member load its part by its own method: all, or, where one fails, none.

        Groups go to the members that they name, or where they do not (flattened by DCP) by their places.

        Raises:
            ValueError: The members of the state dict, or the sizes of their groups, are not those of this composite; or
                a member refuses its part.
        """
        _compat.with_load_state_dict_hooks(self, state_dict, self._load)

    def _placed(self) -> list[tuple[str, int]]:
        """Name of the member of each group, and its place there. Schedulers know groups by their order."""
        now = [(name, i) for name, own in self.optimizers.items() for i in range(len(own.param_groups))]
        if len(now) != len(self._places) or {*now} != {*self._places}:
            before = [place for place in self._places if place in now]
            self._places = before + [place for place in now if place not in before]
        return self._places

    def _check_owners(self) -> None:
        """Raise ValueError where a parameter is in two members."""
        owners: dict[Tensor, str] = {}
        for name, optimizer in self.optimizers.items():
            for param in _params_of(optimizer):
                if owners.setdefault(param, name) != name:
                    raise ValueError(
                        f"a parameter should be in one optimizer but one of shape {tuple(param.shape)} is in: "
                        f"{owners[param]!r} and {name!r}"
                    )

    @property
    def _conflict(self) -> str | None:
        """Why the members cannot be clipped, or skipped, together, if so."""
        if not self.needs_norm:
            return None
        for name, own in self.optimizers.items():
            if isinstance(own, MultiTensorStep):
                if own.needs_norm:
                    ours, theirs = (next(s for s in SETTINGS if getattr(one, s)) for one in (self, own))
                    return f"{theirs} of {name!r} should be unset beside the composite's {ours} but is: " + str(
                        getattr(own, theirs)
                    )
                if own.norm_group is not None and own.norm_group is not self.norm_group:
                    return f"norm_group should be that of {name!r} but is: {self.norm_group}"
            if asked := asked_for(own.param_groups):
                values = [group[asked[0]] for group in own.param_groups if group.get(asked[0])]
                return (
                    f"{asked[0]} should be {FLAGS[asked[0]]} in {name!r} beside the composite's max_grad_norm but is: "
                    f"{values[0]}"
                )
            if self.norm_group is None and any(map(_compat.is_flat_shard, _params_of(own))):
                return flat_shards_message(self.max_grad_norm)
        return None

    @contextmanager
    def _clipping(self, optimizer: Optimizer) -> Iterator[None]:
        """Clip a member's gradients by the norm of all: inside its step if it is optimx's, else in place."""
        if self.max_grad_norm is None or isinstance(self.max_grad_norm, Clipping) or self.grad_norm is None:
            yield
        elif isinstance(optimizer, MultiTensorStep):
            optimizer.max_grad_norm, optimizer.total_norm = self.max_grad_norm, self.grad_norm
            try:
                yield
            finally:
                optimizer.max_grad_norm = optimizer.total_norm = None
        else:
            clip_grads_with_norm_(_params_of(optimizer), self.max_grad_norm, self.grad_norm)
            yield

    def _note_found_inf(self, found_inf: Sequence[Tensor]) -> None:
        """GradScaler has looked for infinite gradients, and may not call the step."""
        device = found_inf[0].device
        self._skipped = torch.stack([found.to(device, torch.float32) for found in found_inf]).sum()
        if self.needs_norm:
            self.grad_norm = torch.full_like(self._skipped, torch.nan)
        for optimizer in self.optimizers.values():
            if isinstance(optimizer, MultiTensorStep):
                optimizer._note_found_inf(found_inf)

    def _packed(self) -> dict[str, Any]:
        parts = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        numbers: dict[tuple[str, Any], int] = {}
        groups: list[dict[str, Any]] = []
        first = 0
        for name, i in self._placed():
            group = parts[name]["param_groups"][i]
            for number, key in enumerate(group["params"], first):
                numbers.setdefault((name, key), number)
            first += len(group["params"])
            groups.append({**group, "params": [numbers[name, key] for key in group["params"]], "optimizer": name})
        state = {}
        for name, part in parts.items():
            for key, value in part["state"].items():
                if (name, key) not in numbers:
                    raise RuntimeError(f"a state of {name!r} should be of a parameter but is of: {key!r}")
                state[numbers[name, key]] = value
        packed: dict[str, Any] = {"state": state, "param_groups": groups}
        # of hooks of the members, or of classes that save more
        more = {
            name: {key: value for key, value in part.items() if key not in packed}
            for name, part in parts.items() if part.keys() > packed.keys()
        }  # fmt: skip
        if self.guard_state is not None:
            packed["guard_state"] = {name: vector.clone() for name, vector in self.guard_state.items()}
        return packed | ({"optimizers": more} if more else {})

    def _load(self, state_dict: dict[str, Any]) -> None:
        parts = self._parts(state_dict)
        with all_or_none(self):
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(parts[name])
        if "guard_state" in state_dict:
            self.guard_state = {name: vector.detach().clone() for name, vector in state_dict["guard_state"].items()}

    def _parts(self, state_dict: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """What of a state dict is each member's."""
        state, groups = state_dict["state"], state_dict["param_groups"]
        names = [group.get("optimizer") for group in groups]
        if None in names:
            places = [name for name, _ in self._placed()]
            names = places + [None] * (len(groups) - len(places))
        own: dict[Any, list[dict[str, Any]]] = {}
        for name, group in zip(names, groups, strict=False):
            own.setdefault(name, []).append({key: value for key, value in group.items() if key != "optimizer"})
        sizes, saved_sizes = (
            {name: [len(group["params"]) for group in groups] for name, groups in by_name.items() if groups}
            for by_name in ({name: opt.param_groups for name, opt in self.optimizers.items()}, own)
        )
        if sizes != saved_sizes:
            raise ValueError(f"state_dict should have groups of {sizes} parameters but has: {saved_sizes}")
        keys = {name: [*chain.from_iterable(group["params"] for group in groups)] for name, groups in own.items()}
        strange = state.keys() - {*chain.from_iterable(keys.values())}
        if strange:
            raise ValueError(f"state_dict['state'] should be of parameters but is also of: {sorted(map(str, strange))}")
        return {
            name: {
                "state": {key: state[key] for key in keys.get(name, ()) if key in state},
                "param_groups": own.get(name, []),
                **state_dict.get("optimizers", {}).get(name, {}),
            }
            for name in self.optimizers
        }


class _States(MutableMapping[Any, Any]):
    """The states of several optimizers, read and written where they are; a missing one is made as there."""

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        self._optimizers = optimizers

    def _of_owner(self, key: Any) -> MutableMapping[Any, Any]:
        """The states of the member that has a state, or a parameter."""
        for optimizer in self._optimizers.values():
            if key in optimizer.state:
                return optimizer.state
        for optimizer in self._optimizers.values():
            if any(key is param for param in _params_of(optimizer)):
                return optimizer.state
        raise KeyError("a state should be of a parameter of one of the optimizers")

    def __getitem__(self, key: Any) -> Any:
        return self._of_owner(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._of_owner(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._of_owner(key)[key]

    def __contains__(self, key: object) -> bool:
        return any(key in optimizer.state for optimizer in self._optimizers.values())

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(optimizer.state for optimizer in self._optimizers.values())

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers.values())

    def __repr__(self) -> str:
        return repr(dict(self))

    # the base class's would make what is missing

    def get(self, key: Any, default: Any = None) -> Any:
        return self._of_owner(key)[key] if key in self else default

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: Any, *default: Any) -> Any:
        return default[0] if default and key not in self else self._of_owner(key).pop(key)


@contextmanager
def all_or_none(optimizer: Optimizer) -> Iterator[None]:
    """Where loading fails, leave the optimizer, or all members of a composite, as before."""
    members = [*optimizer.optimizers.values()] if isinstance(optimizer, Composite) else [optimizer]
    # a load puts others in the place of these, and leaves these as they are
    before = [(own, {"state": own.state, "param_groups": own.param_groups}) for own in members]
    try:
        yield
    except BaseException:
        for own, was in before:
            own.__setstate__(was)
        raise


def _params_of(optimizer: Optimizer) -> list[Tensor]:
    return [*chain.from_iterable(group["params"] for group in optimizer.param_groups)]
