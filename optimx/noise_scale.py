"""The gradient noise scale, by which a batch size can be chosen (https://arxiv.org/abs/1812.06162, appendix A)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import above, as_steps, check_number, told, within
from .clip_grad import get_total_norm

__all__ = ["GradientNoise", "NoiseScale", "noise_scale"]


class GradientNoise(NamedTuple):
    """Estimates of one step, numbers or tensors; average many of each before you divide.

    Attributes:
        squared_norm: Squared norm of the gradient that all data would give, G^2; noise can make it negative.
        variance: Variance of the gradient of one sample, summed over the parameters, S.
    """

    squared_norm: Any
    variance: Any


def noise_scale(
    small_squared_norm: float | Tensor, large_squared_norm: float | Tensor, small_batch: float, large_batch: float
) -> GradientNoise:
    """What the gradients of two batch sizes tell of the gradient without noise, and of the noise.

    ``estimate.variance / estimate.squared_norm`` is the noise scale, once both are averaged over many steps; a single
    step's is biased. :class:`NoiseScale` averages.

    Args:
        small_squared_norm: Squared norm of the mean gradient over ``small_batch`` samples: a number, or a tensor, which
            is not waited for.
        large_squared_norm: That over ``large_batch`` samples.
        small_batch, large_batch: Samples, different numbers of them.

    Returns:
        G^2 and S, numbers or tensors as the norms are.

    Raises:
        TypeError: A batch size is no number.
        ValueError: The batch sizes are not finite and above 0, or they are the same.
    """
    for name, batch in (("small_batch", small_batch), ("large_batch", large_batch)):
        check_number(name, batch, within("(0, inf)"))
    above(small_batch).check("large_batch", large_batch)
    small, large = small_squared_norm, large_squared_norm
    squared_norm = (large_batch * large - small_batch * small) / (large_batch - small_batch)
    return GradientNoise(squared_norm, (small - large) / (1 / small_batch - 1 / large_batch))


class NoiseScale:
    """The gradient noise scale of a training that accumulates gradients, averaged over its steps.

    The norm after the first backward of a step is that of the small batch, the norm of the step that of the large one.
    Everything stays on the gradients' device until somebody reads it.

    Args:
        micro_batch: Samples of one backward, on one rank.
        accumulation: Backwards of a step; each loss is divided by this number.
        ranks: Ranks whose gradients are averaged after the last backward (default: 1).
        decay: Of the averages, which are taken of S and of G^2 apart (default: 0.99).

    Raises:
        TypeError: A number of samples, backwards or ranks is no whole number.
        ValueError: An argument is out of range, or micro-batch and batch are the same.
    """

    def __init__(self, micro_batch: int, accumulation: int, *, ranks: int = 1, decay: float = 0.99) -> None:
        self.micro_batch = as_steps("micro_batch", micro_batch, least=1)
        self.accumulation = as_steps("accumulation", accumulation, least=1)
        self.ranks = as_steps("ranks", ranks, least=1)
        if self.batch == self.micro_batch:
            rule = "should be >= 2 on one rank, as gradients of two batch sizes are compared,"
            raise ValueError(told("accumulation", rule, accumulation))
        within("[0, 1)").check("decay", decay)
        self.decay = decay
        self._small_norm: Tensor | None = None
        # G^2 and S as averages that begin with 0, and that of 1 in the same way
        self._averages = torch.zeros(3)

    @property
    def batch(self) -> int:
        """Samples of a step, on all ranks."""
        return self.micro_batch * self.accumulation * self.ranks

    def after_first_backward(self, params: Iterable[Tensor], grad_scale: float | Tensor = 1.0) -> None:
        """Measure the gradients that the first backward of a step has left; one pass that reads them.

        Args:
            params: The parameters, which had no gradients before.
            grad_scale: What the loss was multiplied by for AMP: ``scaler.scale(torch.ones((), device=...))``, a tensor
                that nobody waits for (default: 1).

        Raises:
            RuntimeError: No parameter has a gradient. Nothing is changed.
        """
        grads = [param.grad for param in params if param.grad is not None]
        if not grads:
            raise RuntimeError("after_first_backward should come after a backward, but no parameter has a gradient")
        self._small_norm = get_total_norm(grads) * self.accumulation / grad_scale

    def update(self, grad_norm: float | Tensor, small_norm: float | Tensor | None = None) -> None:
        """Take in a step. Norms that are not finite, as of a step that AMP skips, change nothing.

        Args:
            grad_norm: Norm of the gradient of all of the step's samples before clipping, unscaled: the optimizer's
                ``grad_norm``, or what ``clip_grad_norm_`` returns.
            small_norm: Norm of the gradient of ``micro_batch`` samples (default: what :meth:`after_first_backward` has
                measured since the last step).

        Raises:
            RuntimeError: There is no norm of a micro-batch. Nothing is changed.
        """
        small = self._small_norm if small_norm is None else small_norm
        if small is None:
            raise RuntimeError("update should come after after_first_backward, or with small_norm, but has neither")
        large = torch.as_tensor(grad_norm, dtype=torch.float32)
        small = torch.as_tensor(small, dtype=torch.float32, device=large.device)
        found = noise_scale(small.square(), large.square(), self.micro_batch, self.batch)
        new = torch.stack([found.squared_norm, found.variance, torch.ones_like(large)])
        before = self._averages.to(large.device, non_blocking=True)
        self._averages = torch.where(new.isfinite().all(), before.lerp(new, 1 - self.decay), before)
        self._small_norm = None

    @property
    def squared_norm(self) -> Tensor:
        """Squared norm of the gradient without noise, G^2; a 0-d float32 tensor, NaN before the first step."""
        return self._averages[0] / self._averages[2]

    @property
    def variance(self) -> Tensor:
        """Variance of the gradient of one sample, summed over the parameters, S; as :attr:`squared_norm`."""
        return self._averages[1] / self._averages[2]

    @property
    def scale(self) -> Tensor:
        """The noise scale S / G^2, in samples; NaN before the first step, negative where the noise hides all."""
        return self._averages[1] / self._averages[0]

    def state_dict(self) -> dict[str, Any]:
        """The averages, which later steps do not change."""
        return {"averages": self._averages.clone()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the averages of a checkpoint, also with other batch sizes.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: It has other keys, or no three averages. Nothing is changed.
        """
        averages = state_dict.get("averages")
        if set(state_dict) != {"averages"} or not isinstance(averages, Tensor) or averages.shape != (3,):
            raise ValueError(f"state_dict should be that of a NoiseScale but has the keys: {sorted(state_dict)}")
        self._averages = averages.to(torch.float32, copy=True)
