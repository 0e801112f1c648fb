"""Parts of an optimizer, each of which takes its steps alone, to the very numbers of a step of the whole.

A part's step is an engine's, with plans of its own, on a twin of the optimizer: the same settings, hyperparameters and
states, but groups that list the part's parameters. What the engine counts in groups begins in each part where the step
of the whole does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .averager import N_AVERAGED, STEPS
from .engine import Engine
from .optimizer import EngineOptimizer

#: What a step counts in groups that draw random bits.
ROUNDING_STEP = "rounding_step"


def counts_of(optimizer: EngineOptimizer) -> dict[str, Any]:
    """What groups have counted before a step."""
    groups = optimizer.param_groups
    counts = {name: groups[0][name] for name in (STEPS, N_AVERAGED) if name in groups[0]}
    rounding = [group[ROUNDING_STEP] for group in groups if ROUNDING_STEP in group]
    return counts | ({ROUNDING_STEP: max(rounding)} if rounding else {})


class Part:
    """Some parameters of an optimizer.

    Args:
        optimizer: Whose. The part holds until its groups list other parameters.
        params: Some of its parameters.

    Attributes:
        params: These, in the optimizer's order.
    """

    def __init__(self, optimizer: EngineOptimizer, params: Iterable[Tensor]) -> None:
        chosen = {*map(id, params)}
        self.params: list[Tensor] = []
        self._engine = Engine()
        self._places: list[int] = []
        #: The index of a group, and its parameters.
        self._groups: list[tuple[int, list[Tensor]]] = []
        place = 0
        for g, group in enumerate(optimizer.param_groups):
            members = [(place + i, param) for i, param in enumerate(group["params"]) if id(param) in chosen]
            place += len(group["params"])
            if members:
                self._places += [at for at, _ in members]
                self._groups.append((g, [param for _, param in members]))
                self.params += self._groups[-1][1]

    def twin(self, optimizer: EngineOptimizer, counts: Mapping[str, Any]) -> EngineOptimizer:
        """The optimizer with this part's parameters alone; states that are made are to be handed over.

        Args:
            optimizer: Whose part this is.
            counts: Of :func:`counts_of`.
        """
        # what is counted on a device is counted in place
        own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in counts.items()}
        groups = [{**optimizer.param_groups[g], **own, "params": params} for g, params in self._groups]
        known = {param: optimizer.state[param] for param in self.params if param in optimizer.state}
        twin: EngineOptimizer = object.__new__(type(optimizer))
        vars(twin).update(vars(optimizer))
        # watching and giving up are the whole's
        vars(twin).update(
            param_groups=groups, state=defaultdict(dict, known), _places=self._places, _engine=self._engine,
            _recorder=None, _release=None, max_skips=None, grad_norm=None, total_norm=None,
        )  # fmt: skip
        return twin

    def step(
        self,
        optimizer: EngineOptimizer,
        counts: Mapping[str, Any],
        *,
        total_norm: Tensor | None = None,
        verdict: Tensor | None = None,
    ) -> dict[str, Any]:
        """Update those parameters that have a gradient.

        Args:
            optimizer: Whose part this is.
            counts: Of :func:`counts_of`.
            total_norm: What the gradients are clipped by, where the optimizer clips (default: None, it does not).
            verdict: What the optimizer's rules have decided about the step (default: None, there are none).

        Returns:
            What the groups of the whole have counted after a step, as far as it has changed.
        """
        twin = self.twin(optimizer, counts)
        twin.total_norm = total_norm
        self._engine.verdict = verdict
        try:
            self._engine.step(twin)
        finally:
            optimizer.state.update(twin.state)
        now = counts_of(twin).items()
        return {name: value for name, value in now if isinstance(value, Tensor) or value != counts.get(name)}
