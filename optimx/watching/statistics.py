"""Statistics of a parameter, or of many together, from sums over their elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DEFAULTS", "NEEDS", "STATISTICS", "SUMS", "Statistic", "Sums"]

#: By name of a sum one number a part.
Sums = Mapping[str, Tensor]

#: What is measured of each parameter, and how the numbers of several are put together, an argument of
#: ``Tensor.scatter_reduce_``.
SUMS = {
    "grad_sq": "sum",
    "grad_max": "amax",
    "grad_zeros": "sum",
    "param_sq": "sum",
    "update_sq": "sum",
    "moment_sq": "sum",
    "grad_moment": "sum",
}


@dataclass(frozen=True)
class Statistic:
    """A number for each part of a model.

    Attributes:
        needs: The sums that it is made of.
        formula: Makes it of them and of the numbers of elements, float64 ``[parts]`` all of them.
        log: Whether its logarithm to base 10 is drawn.
        limits: Where the drawn scale ends, with a neutral middle (default: None, where the numbers end).
    """

    needs: tuple[str, ...]
    formula: Callable[[Sums, Tensor], Tensor]
    log: bool = True
    limits: tuple[float, float] | None = None

    def of_parts(self, sums: Sums, elements: Tensor, param: Tensor, part: Tensor, broken: bool) -> Tensor:
        """The statistic of each part, float64; nan where nothing was measured, or 0 is divided by 0.

        A parameter counts if all that the statistic needs was measured of it.

        Args:
            sums: One number a parameter.
            elements: How many elements each parameter has.
            param: With ``part``, which parameters are in which parts, each ``[pairs]``.
            part: Numbered from 0 without gaps.
            broken: Whether nan means NaN in a gradient, which its parts inherit, rather than that there was none.
        """
        n_parts = int(part.max()) + 1
        if not broken:
            measured = torch.stack([sums[name] for name in self.needs]).isnan().logical_not().all(0)
            kept = measured[param]
            param, part = param[kept], part[kept]
        values = {name: _gather(sums[name][param], part, n_parts, SUMS[name]) for name in self.needs}
        return self.formula(values, _gather(elements[param], part, n_parts, "sum"))


def _gather(values: Tensor, part: Tensor, n_parts: int, reduce: str) -> Tensor:
    """The values of each part put together; nan of a part that has none."""
    gathered = values.new_full((n_parts,), float("nan"))
    return gathered.scatter_reduce_(0, part, values, reduce, include_self=False)


def _norm(name: str) -> Statistic:
    return Statistic((name,), lambda sums, _: sums[name].sqrt())


STATISTICS = {
    "grad_norm": _norm("grad_sq"),
    "max_grad": Statistic(("grad_max",), lambda sums, _: sums["grad_max"]),
    "grad_zeros": Statistic(("grad_zeros",), lambda sums, elements: sums["grad_zeros"] / elements, log=False),
    "param_norm": _norm("param_sq"),
    "update_norm": _norm("update_sq"),
    "update_ratio": Statistic(
        ("update_sq", "param_sq"),
        lambda sums, _: sums["update_sq"].sqrt() / sums["param_sq"].sqrt(),
        # a thousandth, which is usual, is the middle
        limits=(-5.0, -1.0),
    ),
    "moment_norm": _norm("moment_sq"),
    "cosine": Statistic(
        ("grad_moment", "grad_sq", "moment_sq"),
        lambda sums, _: sums["grad_moment"] / (sums["grad_sq"].sqrt() * sums["moment_sq"].sqrt()),
        log=False,
        limits=(-1.0, 1.0),
    ),
}

#: By name of a statistic the sums that it needs.
NEEDS = {name: statistic.needs for name, statistic in STATISTICS.items()}

DEFAULTS = ("grad_norm", "param_norm", "update_ratio", "max_grad")
