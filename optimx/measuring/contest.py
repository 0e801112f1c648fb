"""An optimizer's step taken by several contestants in turns, over the same parameters and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._checks import told
from .._engine.grad_transforms import TRANSFORMS
from .._engine.step import MultiTensorStep
from .._engine.storage import SETTINGS as STORAGE
from .._kept import placements_of
from .._table import plural
from ..composite import Composite
from ..config.values import parameters_of
from ..memory import memory
from .cost import SMALL, StepCost, StepCostRow, StepCostTorchRow, row_of
from .packages import BY_OPTIMIZER, Missing, Peer
from .peak import peak_memory
from .stock import COMPILED, DEFAULT, FOREACH, FUSED, OURS, STOCK, compiled_step, ways
from .timing import CLOCKS, Budget, Run, take_turns, warm_up

__all__ = ["Contest"]

#: The plain sum that tells the speed of memory, and the bytes of a term, at least and at most: it neither fits the
#: caches nor takes memory that a model needs.
_SUM = "plain sum"
_LEAST, _MOST = 2**26, 2**30
#: With more tensors than this a host is not ready with the step when a GPU is free: it is the one that is timed.
_HOST_BOUND = 2000
#: 2-norm of all gradients together, where nothing clips them.
_NORM = 0.5
#: Arguments that say how a step is taken, not which.
_HOW = ("foreach", "fused", "capturable", "differentiable")
#: Arguments of a whole optimizer that stock and others lack.
_RULES = ("skip_nonfinite", "skip_spikes", "average")


class Contest:
    """Contestants over the same parameters and gradients.

    Args:
        optimizer: Ours, which has taken no step.
        named: Its parameters by their names in the model.
    """

    def __init__(self, optimizer: Optimizer, named: Mapping[str, nn.Parameter]) -> None:
        self.members: list[MultiTensorStep] = []
        for member in optimizer.optimizers.values() if isinstance(optimizer, Composite) else [optimizer]:
            if not isinstance(member, MultiTensorStep):
                raise ValueError(told("optimizer", "should be one of optimx's", type(member).__name__))
            self.members.append(member)
        self.ours, self.named = optimizer, named
        # the groups, as what steps may add to them
        self.groups = [[dict(group) for group in member.param_groups] for member in self.members]
        self.params = [param for groups in self.groups for group in groups for param in group["params"]]
        clips: Any = getattr(optimizer, "max_grad_norm", None)
        self.clips = clips
        self.max_norm = float(clips) if isinstance(clips, (int, float)) else 1.0
        norm = _NORM if clips is None else 2 * self.max_norm
        std = norm / math.sqrt(max(1, sum(param.numel() for param in self.params)))
        self.grads = [torch.empty_like(param.detach()).normal_(std=std) for param in self.params]
        self.device = self.params[0].device
        # what stock and others lack
        asked = {name: getattr(owner, name, None) for owner in (optimizer, *self.members) for name in _RULES}
        self._rules = {name: value for name, value in asked.items() if value}
        if clips is not None and clips != self.max_norm:
            self._rules["max_grad_norm"] = clips

    def held(self, compiled: bool, peers: bool, rounds: int) -> StepCost:
        """Everybody's rows, and what they are about."""
        torch_steps = self._torch_steps()
        needed = memory(self.ours).traffic
        if self.clips is not None:
            # the norm is a pass of its own over the gradients
            needed += sum(grad.nbytes for grad in self.grads)
        starts = self._starts(compiled, peers)
        baseline = next(name for name in (FUSED, FOREACH, *STOCK) if name in starts)
        rows, speed = self._rows(starts, baseline, rounds)
        small = [param.numel() for param in self.params if param.numel() <= SMALL]
        return StepCost(
            optimizer=" and ".join(type(member).__name__ for member in self.members),
            device=_device_name(self.device),
            dtypes=tuple(dict.fromkeys(str(param.dtype).removeprefix("torch.") for param in self.params)),
            max_grad_norm=None if self.clips is None else f"{self.clips}",
            tensors=len(self.params),
            elements=sum(param.numel() for param in self.params),
            groups=sum(map(len, self.groups)),
            small_tensors=len(small),
            small_elements=sum(small),
            moved=needed,
            memory_gb_per_s=speed,
            baseline=baseline,
            rows=rows,
            torch_steps=torch_steps,
        )

    def _torch_steps(self) -> tuple[StepCostTorchRow, ...]:
        names: dict[Tensor, str] = {param: name for name, param in self.named.items()}
        found: dict[str, list[Tensor]] = {}
        for member in self.members:
            params = (param for group in member.param_groups for param in group["params"])
            for param, (key, reason, _) in zip(params, placements_of(member), strict=False):
                if key is None:
                    found.setdefault(reason, []).append(param)
        return tuple(
            StepCostTorchRow(reason, len(params), sum(map(Tensor.numel, params)), tuple(map(names.__getitem__, params)))
            for reason, params in found.items()
        )

    def _starts(self, compiled: bool, peers: bool) -> dict[str, Callable[[], tuple[Run, str]]]:
        """By contestant, what makes its run, and tells what it does without."""
        of_members = [ways(type(member)) for member in self.members]
        names = [name for name in STOCK if any(name in of_member for of_member in of_members)]
        # there foreach is the default
        left_out = {DEFAULT} if self.device.type == "cuda" and FOREACH in names else set()
        left_out |= set() if compiled else {COMPILED}
        starts: dict[str, Callable[[], tuple[Run, str]]]
        starts = {name: partial(self._stock, name, of_members) for name in names if name not in left_out}
        starts[OURS] = self._ours
        if peers and len(self.members) == 1:
            for peer in BY_OPTIMIZER.get(type(self.members[0]).__name__, ()):
                if peer.installed and (compiled or peer.most_tensors is None):
                    starts[peer.package] = partial(self._peer, peer)
        return starts

    def _ours(self) -> tuple[Run, str]:
        return Run(self._backward, self.ours.step, self.ours), ""

    def _stock(self, name: str, of_members: Sequence[Mapping[str, Any]]) -> tuple[Run, str]:
        optimizers: list[Optimizer] = []
        without: dict[str, Any] = {}
        for of_member, member, groups in zip(of_members, self.members, self.groups, strict=True):
            # a member that has no such implementation takes its step in the default one
            make = of_member.get(name) or next(iter(of_member.values()))
            known = _arguments(make)
            chosen = [self._rules | _chosen(member, group) for group in groups]
            without |= {key: value for each in chosen for key, value in each.items() if key not in known}
            kwargs = [{key: value for key, value in group.items() if key in known} for group in groups]
            optimizers.append(make(_with_params(kwargs, groups), **kwargs[0]))
        step = compiled_step(*optimizers) if name == COMPILED else _one_after_the_other(optimizers)
        return self._clipped(step), _without(without)

    def _peer(self, peer: Peer) -> tuple[Run, str]:
        cls = peer.load(len(self.params))
        known = _arguments(cls)
        (member,), (groups,) = self.members, self.groups
        chosen = [self._rules | _chosen(member, group) | {"lr": group["lr"]} for group in groups]
        without = {key: value for each in chosen for key, value in each.items() if key not in known}
        kwargs = [peer.kwargs | {key: value for key, value in each.items() if key in known} for each in chosen]
        optimizer = cls(_with_params([peer.group | each for each in kwargs], groups), **kwargs[0])
        return self._clipped(optimizer.step), _without(without)

    def _clipped(self, step: Callable[[], object]) -> Run:
        if self.clips is None:
            return Run(self._backward, step)

        def clip_and_step() -> None:
            torch.nn.utils.clip_grad_norm_(self.params, self.max_norm)
            step()

        return Run(self._backward, clip_and_step)

    def _backward(self) -> None:
        for param in self.params:
            param.grad = None
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad.clone()

    def _rows(
        self, starts: Mapping[str, Callable[[], tuple[Run, str]]], baseline: str, rounds: int
    ) -> tuple[tuple[StepCostRow, ...], float | None]:
        """Everybody's, and GB/s of the plain sum."""
        notes: dict[str, str] = {}
        failed: dict[str, str] = {}

        @contextmanager
        def guard(name: str) -> Iterator[None]:
            try:
                yield
            except Exception as error:
                # ours should never fail, and what fails of it is a defect to be told whole
                if name == OURS:
                    raise
                text = str(error) if isinstance(error, Missing) else f"{type(error).__name__}: {error}"
                failed[name] = text if isinstance(error, Missing) else f"does not run here, {_first_line(text)}"

        event_timed = self.device.type == "cuda" and len(self.params) <= _HOST_BOUND
        clock = CLOCKS["device" if event_timed else "wall"]
        budget = Budget(seconds=math.inf, min_rounds=rounds, max_rounds=rounds)
        runs: dict[str, Run] = {}
        warm: dict[str, list[float]] = {}
        for name, start in starts.items():
            with guard(name):
                runs[name], notes[name] = start()
                warm[name] = warm_up(runs[name], clock)
        runs = {name: run for name, run in runs.items() if name in warm}
        runs[_SUM] = _plain_sum(self.device, sum(param.nbytes for param in self.params))
        warm[_SUM] = warm_up(runs[_SUM], clock)
        times = take_turns(runs, warm, clock, budget, guard, failed.__contains__)
        peaks: dict[str, int] = {}
        for name in times:
            # under a profiler a slow step takes too long
            if name != _SUM and min(warm[name]) <= budget.patience:
                with guard(name):
                    peaks[name] = peak_memory(runs[name], self.device.type)
        plain = times.pop(_SUM, None)
        moved = runs[_SUM].moved or 0
        rows = tuple(
            row_of(name, times.get(name), times.get(baseline), peaks.get(name), failed.get(name, notes.get(name, "")))
            for name in starts
        )
        return rows, moved / median(plain) / 1e9 if plain else None


def _one_after_the_other(optimizers: Sequence[Optimizer]) -> Callable[[], object]:
    if len(optimizers) == 1:
        return optimizers[0].step

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step


def _with_params(kwargs: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"params": group["params"], **each} for each, group in zip(kwargs, groups, strict=True)]


def _arguments(make: Any) -> set[str]:
    """Names of what an optimizer takes beside parameters, and that say which step is taken."""
    named, _ = parameters_of(make)
    return {*named} - {"params", *_HOW}


def _chosen(member: MultiTensorStep, group: Mapping[str, Any]) -> dict[str, Any]:
    """What in a group is not as the class has it by default."""
    cls: Any = type(member)
    (default,) = cls([nn.Parameter(torch.zeros(1, 1))]).param_groups
    # some are in no group where nobody chooses them
    names = {*_arguments(cls), *STORAGE, *TRANSFORMS, *member.rule.optional_settings} & group.keys()
    return {name: group[name] for name in sorted(names) if not _same(group[name], default.get(name))}


def _same(value: Any, other: Any) -> bool:
    return value is other or (not isinstance(value, Tensor) and value == other)


def _without(arguments: Mapping[str, Any]) -> str:
    told = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return f"does without {told}" if told else ""


def _plain_sum(device: torch.device, n_bytes: int) -> Run:
    """A sum as large as the parameters, within bounds; unlike a copy it writes what it has read, as a step does."""
    x, y = torch.zeros(2, min(max(n_bytes, _LEAST), _MOST) // 4, device=device)
    return Run(lambda: None, lambda: x.add_(y), moved=2 * x.nbytes + y.nbytes)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{plural(torch.get_num_threads(), 'thread')} of the CPU" if device.type == "cpu" else str(device)


def _first_line(text: str) -> str:
    return text.partition("\n")[0][:200]
