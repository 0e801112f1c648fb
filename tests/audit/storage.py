"""Ways to keep parameters and states, for the audit: the formats of each role, and what comes of them.

A scheme is named as its settings are: ``"remainder8-8bit"`` is ``param_rounding="remainder8"``, ``state_dtype="8bit"``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from optimx.triton_kernels.codecs import MASTER, NEAREST, REMAINDER8, REMAINDER16, SIGNED8, STOCHASTIC, UNSIGNED8
from optimx.triton_kernels.storage import Formats, Noise, Storage

from .sizes import addresses

Kept = tuple[int, torch.dtype]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
_PARAMS: dict[str, Kept] = {
    "nearest": (NEAREST.value, BF16),
    "stochastic": (STOCHASTIC.value, BF16),
    "remainder8": (REMAINDER8.value, BF16),
    "remainder16": (REMAINDER16.value, BF16),
    "master": (MASTER.value, BF16),
    "float16": (STOCHASTIC.value, F16),
    "float32": (NEAREST.value, F32),
}
_STATES: dict[str, tuple[Kept, Kept]] = {
    "float32": ((NEAREST.value, F32),) * 2,
    "bfloat16": ((NEAREST.value, BF16),) * 2,
    "stochastic": ((STOCHASTIC.value, BF16),) * 2,
    "8bit": ((SIGNED8.value, torch.int8), (UNSIGNED8.value, torch.uint8)),
}
_COMPANIONS = {
    REMAINDER8.value: torch.int8,
    REMAINDER16.value: torch.int16,
    MASTER.value: F32,
    SIGNED8.value: F32,
    UNSIGNED8.value: F32,
}

#: Those that save memory, and those that take the most registers and instructions.
SCHEMES = (
    "stochastic-float32", "stochastic-stochastic", "stochastic-8bit", "remainder8-float32", "remainder8-8bit",
    "remainder16-float32", "remainder16-bfloat16", "remainder16-8bit", "master-float32", "nearest-8bit",
    "float32-8bit", "float32-stochastic", "float16-8bit",
)  # fmt: skip
#: For algorithms that are not the first one to be compiled: each codec once.
MANY_SCHEMES = ("stochastic-stochastic", "stochastic-8bit", "remainder8-8bit", "remainder16-float32")


@dataclass(frozen=True)
class Scheme:
    """How the roles of a kernel are kept; gradients are bfloat16.

    Attributes:
        roles: Kind and dtype of the parameter and each state.
    """

    roles: tuple[Kept, ...]

    @property
    def formats(self) -> Formats:
        return Formats(tuple(kind for kind, _ in self.roles))

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of params, grads, each state and each companion."""
        (_, param), *states = self.roles
        companions = (_COMPANIONS[kind] for kind, _ in self.roles if kind in _COMPANIONS)
        return (param, BF16, *(dtype for _, dtype in states), *companions)

    def storage(self, counts_on_device: bool = False) -> Storage:
        formats = self.formats._replace(counts_on_device=counts_on_device)
        return Storage(formats, Noise(addresses(1, 5), addresses(1)) if formats.is_random else None)

    def reads(self, roles: list[int]) -> list[torch.dtype]:
        """Of what is read of some roles, but scales, which are few; a copy is not read."""
        own = [self.roles[role][1] for role in roles if self.roles[role][0] != MASTER.value]
        return own + self._companions(roles)

    def writes(self, roles: list[int]) -> list[torch.dtype]:
        """Of what is written."""
        return [self.roles[role][1] for role in roles] + self._companions(roles)

    def _companions(self, roles: list[int]) -> list[torch.dtype]:
        kinds = (self.roles[role][0] for role in roles)
        return [_COMPANIONS[kind] for kind in kinds if kind in _COMPANIONS and kind < SIGNED8.value]


def scheme(name: str, n_states: int) -> Scheme:
    """A scheme for an algorithm with so many states, of which the second, and those after it, are never negative."""
    param, state = name.split("-")
    first, second = _STATES[state]
    return Scheme((_PARAMS[param], *[first, second, second][:n_states]))


def adafactor_scheme(name: str, n_averages: int, moment: bool) -> Scheme:
    """A scheme for Adafactor, whose averages are float32."""
    param, state = name.split("-")
    return Scheme((_PARAMS[param], *[(NEAREST.value, F32)] * n_averages, *[_STATES[state][0]] * moment))
