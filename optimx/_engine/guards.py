"""Rules that look at the gradient norm of each step: what is skipped, and to what gradients are clipped.

Every rule exists twice, as :mod:`optimx.triton_kernels.guards` for a device, where nothing waits for it, and here, on
numbers. Both keep what they remember in float64 vectors, which are saved with the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .._checks import Condition, above, as_steps, check_instance, check_number, told, within
from . import backends

State = dict[str, Tensor]

#: What is counted: steps; those that were skipped; whose gradients were clipped; whose gradients were infinite or NaN;
#: and how many were skipped in a row just now. The last norms follow.
COUNTERS = ("steps", "skipped", "clipped", "nonfinite", "in_a_row")
STEPS, SKIPPED, CLIPPED, NONFINITE, IN_A_ROW = range(len(COUNTERS))
#: Norms that reports tell of.
RECENT = 8

#: Names of the settings that an optimizer has.
SETTINGS = ("max_grad_norm", "normalize_grads", "skip_nonfinite", "skip_spikes", "max_skips")

#: A spread of log-norms below this is taken for this: norms that hardly differ are all the same.
LEAST_SPREAD = 0.01


class _Rule:
    """A rule with settings that are checked, and a vector that it remembers."""

    #: How each setting is checked.
    conditions: ClassVar[dict[str, Condition]] = {}

    def __post_init__(self) -> None:
        for name, condition in self.conditions.items():
            value = getattr(self, name)
            if value is not None:
                check_number(name, value, condition)

    @property
    def size(self) -> int:
        """Numbers that it remembers."""
        raise NotImplementedError


@dataclass(frozen=True)
class Spikes(_Rule):
    """Skips a step whose gradient norm is far above those before it: ``skip_spikes=optimx.Spikes()``.

    The logarithm of the norm is compared with those of the last ``window`` steps that were taken: norms are skewed, and
    six standard deviations of their logarithms are rarely exceeded where nothing is wrong. What was skipped stays out
    of the window, or spikes would hide spikes; ``accept_after`` skips in a row are a new level, which is accepted, and
    the window begins anew. An infinite or NaN norm is always skipped, and is no part of the window.

    Args:
        window: Norms that are remembered (default: 128), as OLMo's skip-step optimizers do.
        sigma: How many standard deviations above their mean a logarithm may be (default: 6).
        least: Norms that have to be there before one can be a spike, >= 2 (default: half of the window).
        accept_after: Spikes in a row after which the next one is accepted (default: 8).

    Raises:
        ValueError: An argument is out of range.
    """

    window: int = 128
    sigma: float = 6.0
    least: int | None = None
    accept_after: int = 8

    conditions = {"sigma": above(0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        as_steps("window", self.window, least=2)
        as_steps("accept_after", self.accept_after, least=1)
        if self.least is not None and as_steps("least", self.least, least=2) > self.window:
            raise ValueError(f"least should be at most window, {self.window}, but is: {self.least}")

    @property
    def from_norms(self) -> int:
        """Norms that have to be there."""
        return max(2, self.window // 2) if self.least is None else self.least

    @property
    def size(self) -> int:
        # how many norms there are, where the next one goes, spikes in a row, and the logarithms
        return 3 + self.window

    def is_spike(self, memory: list[float], norm: float) -> bool:
        """Whether a finite norm is one; the memory takes note."""
        if norm <= 0.0:
            return False
        n, place, in_a_row = (int(number) for number in memory[:3])
        logarithm = math.log(norm)
        if n >= self.from_norms:
            known = memory[3 : 3 + n]
            mean = sum(known) / n
            spread = math.sqrt(sum((one - mean) ** 2 for one in known) / (n - 1))
            if logarithm - mean > self.sigma * max(spread, LEAST_SPREAD):
                if in_a_row < self.accept_after:
                    memory[2] = in_a_row + 1.0
                    return True
                n = place = 0
        memory[3 + place] = logarithm
        memory[:3] = [min(n + 1.0, self.window), (place + 1.0) % self.window, 0.0]
        return False


class Clipping(_Rule):
    """A rule that says to which norm the gradients of a step are clipped."""

    def limit(self, memory: list[float], norm: float) -> float:
        """The norm to clip a finite one to; the memory takes note."""
        raise NotImplementedError

    def on_device(self, kernels: Any) -> Any:
        """The same for the kernel: a ``Clip`` of its module."""
        raise NotImplementedError


@dataclass(frozen=True)
class AutoClip(Clipping):
    """Clips to a percentile of the norms so far: ``max_grad_norm=optimx.AutoClip()`` (arXiv:2007.14469).

    Args:
        percentile: Of the norms, this step's with them, in (0, 100] (default: 10, the paper's choice).
        window: Norms that are remembered, the last ones (default: 1000; the paper forgets none).

    Raises:
        ValueError: An argument is out of range.
    """

    percentile: float = 10.0
    window: int = 1000

    conditions = {"percentile": within("(0, 100]")}

    def __post_init__(self) -> None:
        super().__post_init__()
        as_steps("window", self.window, least=1)

    @property
    def size(self) -> int:
        # how many there are, where the next one goes, and the norms
        return 2 + self.window

    def limit(self, memory: list[float], norm: float) -> float:
        n, place = int(memory[0]), int(memory[1])
        memory[2 + place] = norm
        n = min(n + 1, self.window)
        memory[:2] = [float(n), (place + 1.0) % self.window]
        ordered = sorted(memory[2 : 2 + n])
        at = self.percentile / 100.0 * (n - 1)
        low = int(at)
        high = min(low + 1, n - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])

    def on_device(self, kernels: Any) -> Any:
        return kernels.Clip(kernels.PERCENTILE.value, (self.percentile, 0.0, 0.0, 0.0), self.window)


@dataclass(frozen=True)
class ZClip(Clipping):
    """Clips norms whose z-score is large: ``max_grad_norm=optimx.ZClip()`` (arXiv:2504.02507).

    Mean and variance of norms are moving averages, of norms as they are after clipping. A norm ``z`` standard
    deviations above the mean, with ``z > threshold``, is clipped to ``threshold**2 / z`` standard deviations above it;
    the further out, the more. Infinite and NaN norms leave the averages alone.

    Args:
        threshold: The z-score (default: 2.5).
        decay: Of the moving averages, in [0, 1) (default: 0.97).
        warmup: Steps whose norms make the first mean and variance, >= 1 (default: 25). None of them has a z-score.
        max_norm: Clip to this norm in any case (default: 1.0; None: do not).

    Raises:
        ValueError: An argument is out of range.
    """

    threshold: float = 2.5
    decay: float = 0.97
    warmup: int = 25
    max_norm: float | None = 1.0

    conditions = {"threshold": above(0), "decay": within("[0, 1)"), "max_norm": above(0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        as_steps("warmup", self.warmup, least=1)

    @property
    def size(self) -> int:
        # how many norms there were, their mean, and their variance
        return 3

    @property
    def most(self) -> float:
        """The norm that is never exceeded."""
        return math.inf if self.max_norm is None else self.max_norm

    def limit(self, memory: list[float], norm: float) -> float:
        n, mean, variance = memory
        if n < self.warmup:
            n += 1.0
            away = norm - mean
            mean += away / n
            memory[:] = [n, mean, variance + (away * (norm - mean) - variance) / n]
            return self.most
        spread = math.sqrt(variance)
        z = (norm - mean) / (spread + 1e-6)
        limit = min(mean + self.threshold**2 / z * spread if z > self.threshold else math.inf, self.most)
        clipped = min(norm, limit)
        mean = self.decay * mean + (1.0 - self.decay) * clipped
        variance = self.decay * variance + (1.0 - self.decay) * (clipped - mean) ** 2
        memory[1:] = [mean, variance]
        return limit

    def on_device(self, kernels: Any) -> Any:
        return kernels.Clip(kernels.Z_SCORE.value, (self.threshold, self.decay, self.warmup, self.most))


class Rules(NamedTuple):
    """What an optimizer asks for.

    Attributes:
        max_norm: To clip to, or how it is found; None: gradients are not clipped.
        clamp: Leave shorter gradients as they are; False: scale them up.
        nonfinite: Skip steps with infinite or NaN gradients.
        spikes: Skip these, too.
    """

    max_norm: float | Clipping | None
    clamp: bool
    nonfinite: bool
    spikes: Spikes | None

    @property
    def skips(self) -> bool:
        """Whether a step may be skipped."""
        return self.nonfinite or self.spikes is not None

    def brought_up(self, state: State | None, device: torch.device) -> State:
        """What is remembered, on the device; what is missing begins anew, and what has no rule any more is gone."""
        sizes = {"counters": len(COUNTERS) + RECENT}
        if self.spikes is not None:
            sizes["spikes"] = self.spikes.size
        if isinstance(self.max_norm, Clipping):
            sizes["clipping"] = self.max_norm.size
        before = {} if state is None else state
        if before.keys() == sizes.keys() and all(
            vector.device == device and len(vector) == sizes[name] for name, vector in before.items()
        ):
            return before
        return {
            name: before[name].to(device)
            if name in before and len(before[name]) == size
            else torch.zeros(size, dtype=torch.float64, device=device)
            for name, size in sizes.items()
        }

    def judge(self, state: State, control: Tensor) -> None:
        """What the rules make of a step. On a device with kernels nobody waits for it.

        Args:
            state: From :meth:`brought_up`, changed.
            control: float64 ``[3]``: the norm before clipping, the factor for gradients without clipping, and the mark
                of a step to be skipped, not 0 where gradients are infinite or NaN. The last two are changed.
        """
        if backends.choose(control.device)[0] == backends.TRITON:
            self._judge_on_device(state, control)
        else:
            self._judge_on_host(state, control)

    def _judge_on_host(self, state: State, control: Tensor) -> None:
        norm, factor, skip = control.tolist()
        memory = {name: vector.tolist() for name, vector in state.items()}
        bad = bool(skip) or not math.isfinite(norm)
        if bad:
            skip = 1.0 if self.skips else skip
        elif self.spikes is not None and self.spikes.is_spike(memory["spikes"], norm):
            skip = 1.0
        ratio, clipped = 1.0, False
        if not skip and self.max_norm is not None:
            limit = self.max_norm
            if isinstance(limit, Clipping):
                limit = math.inf if bad else limit.limit(memory["clipping"], norm)
            ratio, clipped = limit / (norm + 1e-6), norm > limit
            # what is found may be the very norm, and 1e-6 then not little; else as torch.clamp: NaN stays NaN
            is_short = norm <= limit if isinstance(self.max_norm, Clipping) else ratio > 1.0
            ratio = 1.0 if self.clamp and is_short else ratio
        counters = memory["counters"]
        counters[len(COUNTERS) + int(counters[STEPS]) % RECENT] = norm
        counters[STEPS] += 1.0
        counters[SKIPPED] += bool(skip)
        counters[CLIPPED] += clipped
        counters[NONFINITE] += bad
        counters[IN_A_ROW] = counters[IN_A_ROW] + 1.0 if skip else 0.0
        for name, vector in state.items():
            vector.copy_(torch.tensor(memory[name], dtype=torch.float64, device="cpu"))
        control.copy_(torch.tensor([norm, factor * ratio, skip], dtype=control.dtype, device="cpu"))

    def _judge_on_device(self, state: State, control: Tensor) -> None:
        from ..triton_kernels import guards as kernels

        spike, clip = kernels.Spike(0, (0.0,) * 4), kernels.Clip(0, (0.0,) * 4)
        if self.spikes is not None:
            of_spikes = self.spikes
            numbers = of_spikes.from_norms, of_spikes.sigma, of_spikes.accept_after, LEAST_SPREAD
            spike = kernels.Spike(of_spikes.window, numbers)
        if isinstance(self.max_norm, Clipping):
            clip = self.max_norm.on_device(kernels)
        elif self.max_norm is not None:
            clip = kernels.Clip(kernels.FIXED.value, (self.max_norm, 0.0, 0.0, 0.0), clamp=self.clamp)
        kernels.judge_(
            control, state["counters"], state.get("spikes"), state.get("clipping"), spike=spike, clip=clip,
            skips_nonfinite=self.skips,
        )  # fmt: skip


class Guarded:
    """An optimizer that clips, and skips what its rules say; the settings are for all groups together."""

    #: Clip the gradients of all groups to this 2-norm inside the step, or to one that an :class:`AutoClip` or a
    #: :class:`ZClip` finds; None: do not. May be changed between steps.
    #: The norm is that of the parameters this optimizer has, on all ranks: DTensors (FSDP2, tensor parallel) tell where
    #: the rest of them is; for other shards see :attr:`norm_group`.
    max_grad_norm: float | Clipping | None = None
    #: Divide the gradients of all groups by their common 2-norm inside the step.
    normalize_grads: bool = False
    #: Skip steps with infinite or NaN gradients: parameters, states, counts and averages stay as they are.
    skip_nonfinite: bool = False
    #: Skip steps whose gradient norm is far above those before; None: do not.
    skip_spikes: Spikes | None = None
    #: A step raises RuntimeError, once it is known that so many before it were skipped in a row; None: none does.
    max_skips: int | None = None
    #: What the rules remember: float64 vectors by name; None before the first step. Saved with the optimizer.
    guard_state: State | None = None

    @property
    def rules(self) -> Rules | None:
        """What the gradient norm of a step decides, beyond clipping to a number; None: nothing."""
        max_norm = 1.0 if self.normalize_grads else self.max_grad_norm
        if not (self.skip_nonfinite or self.skip_spikes is not None or isinstance(max_norm, Clipping)):
            return None
        return Rules(max_norm, not self.normalize_grads, self.skip_nonfinite, self.skip_spikes)

    @property
    def needs_norm(self) -> bool:
        """Whether the step measures the norm of the gradients."""
        return self.max_grad_norm is not None or self.normalize_grads or self.rules is not None

    @property
    def counters(self) -> dict[str, Tensor]:
        """How many steps there were (``"steps"``), how many of them were ``"skipped"``, ``"clipped"``, had
        ``"nonfinite"`` gradients, and how many were skipped ``"in_a_row"`` up to the last one.

        Scalars on the device; only looking at one waits. They count while there is a rule: ``skip_nonfinite``,
        ``skip_spikes``, or a ``max_grad_norm`` that is no number; without one the dict is empty.
        """
        return {} if self.guard_state is None else dict(zip(COUNTERS, self.guard_state["counters"], strict=False))

    def _set_rules(
        self,
        max_grad_norm: float | Clipping | None,
        skip_nonfinite: bool,
        skip_spikes: Spikes | Mapping[str, Any] | bool | None,
        max_skips: int | None,
    ) -> None:
        """Check the settings, and take them.

        Raises:
            ValueError, TypeError: One is not what it should be.
        """
        if max_grad_norm is not None:
            if not isinstance(max_grad_norm, Clipping):
                above(0).check("max_grad_norm", max_grad_norm)
            self.max_grad_norm = max_grad_norm
        if isinstance(skip_spikes, Mapping):
            skip_spikes = Spikes(**skip_spikes)
        elif isinstance(skip_spikes, bool):
            skip_spikes = Spikes() if skip_spikes else None
        if skip_spikes is not None:
            check_instance("skip_spikes", skip_spikes, Spikes, "an optimx.Spikes, or True")
            self.skip_spikes = skip_spikes
        if skip_nonfinite:
            self.skip_nonfinite = True
        if max_skips is not None:
            if not (skip_nonfinite or skip_spikes):
                raise ValueError(told("max_skips", "should be None without skip_nonfinite or skip_spikes", max_skips))
            self.max_skips = as_steps("max_skips", max_skips, least=1)

    def _judge(self, control: Tensor) -> None:
        """Let the rules decide about a step, see :meth:`Rules.judge`."""
        rules = self.rules
        if rules is not None:
            self.guard_state = rules.brought_up(self.guard_state, control.device)
            rules.judge(self.guard_state, control)
