"""The host side of storage formats: what :mod:`.codecs` have to know of the tensors of one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .codecs import GROUP, SIGNED8, STOCHASTIC
from .device import TRITON_DTYPE
from .tensor_table import LaunchSize, TensorTable

#: Of all that is kept.
_DTYPES = {**TRITON_DTYPE, torch.int8: tl.int8, torch.uint8: tl.uint8, torch.int16: tl.int16}


class Noise(NamedTuple):
    """What random bits follow from.

    Attributes:
        table: int64 ``[n_tensors, 5]``: a seed; the parameter's index among all, times 16; and of its part in this
            process, where it is in the whole: the first element, elements that follow each other there, too, and
            elements of other parts after each such row.
        steps: int64 ``[n_tensors]``: the step that is taken, 1 for the first; or the address of its float32 scalar.
    """

    table: Tensor
    steps: Tensor


class Formats(NamedTuple):
    """How the tensors of a launch are kept, as far as kernels are compiled for it.

    Attributes:
        kinds: Of the parameter and of each state, see :mod:`.codecs`; empty: all are plain tensors.
        counts_on_device: Whether :attr:`Noise.steps` are addresses.
    """

    kinds: tuple[int, ...] = ()
    counts_on_device: bool = False

    @property
    def is_random(self) -> bool:
        """Whether one of them is rounded stochastically."""
        return STOCHASTIC.value in self.kinds

    @property
    def companions(self) -> list[int]:
        """Roles that have one."""
        return [role for role, kind in enumerate(self.kinds) if kind > STOCHASTIC.value]

    @property
    def elements_each(self) -> tuple[int, ...]:
        """Of parameter, gradient, states and companions, elements that an entry is for; empty where all have one."""
        if not any(kind >= SIGNED8.value for kind in self.kinds):
            return ()
        of_companions = (GROUP.value if self.kinds[role] >= SIGNED8.value else 1 for role in self.companions)
        return (*[1] * (1 + len(self.kinds)), *of_companions)

    def noise(self, width: int) -> tuple[int, bool] | tuple[()]:
        """What :func:`~.device.load_noise` takes, of so many elements that a thread has in a row."""
        return (width, self.counts_on_device) if self.is_random else ()

    def of_elements(self, dtypes: Sequence[torch.dtype]) -> list[torch.dtype]:
        """Dtypes of all but scales, which are few."""
        each = self.elements_each or [1] * len(dtypes)
        return [dtype for dtype, n in zip(dtypes, each, strict=True) if n == 1]


class Storage(NamedTuple):
    """How the tensors of a launch are kept; ``noise`` is there where :attr:`Formats.is_random`."""

    formats: Formats = Formats()
    noise: Noise | None = None

    def noise_of(self, table: TensorTable) -> Sequence[Tensor]:
        """Two arguments of a kernel; without noise some that nobody reads."""
        return self.noise or (table.fixed, table.fixed)


PLAIN = Storage()


def packed(formats: Formats) -> tuple[tuple[int, int], ...]:
    """Of each role its kind, and its companion's index among parameter, gradient, states and companions."""
    where = {role: 1 + len(formats.kinds) + i for i, role in enumerate(formats.companions)}
    return tuple((kind, where.get(role, 0)) for role, kind in enumerate(formats.kinds))


def packed_dtypes(dtypes: Sequence[torch.dtype]) -> tuple[tl.dtype, ...]:
    """As kernels take them."""
    return tuple(_DTYPES[dtype] for dtype in dtypes)


def constants(dtypes: Sequence[torch.dtype], formats: Formats, size: LaunchSize) -> dict[str, Any]:
    """Constexprs of a kernel that reads and writes roles.

    ``EACH`` is :attr:`Formats.elements_each`, ``FORMATS`` what :func:`~.device.read` says, ``NOISE`` what
    :func:`~.device.load_noise` does.
    """
    each, of_elements = formats.elements_each, formats.of_elements(dtypes)
    widest = max(dtype.itemsize for dtype in of_elements)
    block_size = size.block(of_elements)
    return {
        "DTYPES": packed_dtypes(dtypes),
        "N_STATES": len(dtypes) - 2 - len(formats.companions),
        "EACH": each,
        "FORMATS": packed(formats),
        "NOISE": formats.noise(16 // widest),
        # no group is cut
        "BLOCK_SIZE": max(GROUP.value, block_size) if each else block_size,
    }
