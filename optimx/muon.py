"""Muon (https://kellerjordan.github.io/posts/muon), as torch defines it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Muon as TorchMuon
from torch.optim.optimizer import ParamsT

from ._checks import one_of
from ._engine.newton_schulz import NAMED, Iterations, first_dtype, orthogonalize_
from ._engine.optimizer import evaluated
from ._engine.rule import UpdateRule
from ._engine.sharding import gathered, scattered
from ._engine.step import MultiTensorStep

__all__ = ["Muon"]

#: How the step size depends on a matrix's shape. Torch's names; None is the first.
ADJUSTMENTS = ("original", "match_rms_adamw")
#: Settings that torch has not, and their values if a group does not have them.
EXTRAS: dict[str, Any] = {"coefficients": None, "ns_dtype": torch.bfloat16, "stacked": False, "gram": False}
NS_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class MuonRow(NamedTuple):
    """A matrix's hyperparameters in one step: the columns of the kernel's ``HYPER``."""

    factor: float
    eps: float
    momentum_c: float
    mix: float
    decay: float
    lr: float


class MuonRule(UpdateRule):
    """One step of Muon. Torch keeps no step count.

    A variant is what tensors have in common whose matrices are orthogonalized together: how many of how many rows and
    columns, iterations, the dtype that these compute in, and the factor of the step size that follows from the shape.
    """

    module = "muon"
    scalars = ()
    walk = "orthogonal"
    optional_settings = tuple(EXTRAS)
    _read = itemgetter("lr", "weight_decay", "momentum", "nesterov", "eps")

    def group_variant(self, group: dict[str, Any]) -> tuple[Any, ...]:
        adjust = group["adjust_lr_fn"]
        if adjust is not None:
            one_of("adjust_lr_fn", adjust, ADJUSTMENTS)
        extras = (group.get(name, EXTRAS[name]) for name in ("ns_dtype", "stacked"))
        return iterations_of(group), *extras, adjust or ADJUSTMENTS[0]

    def variant_of(self, variant: tuple[Any, ...], param: Tensor) -> tuple[Any, ...]:
        iterations, dtype, stacked, adjust = variant
        shape = matrices_of(param, stacked)
        return shape, iterations, dtype, size_of(adjust, *shape[1:])

    def unsuitable(self, param: Tensor) -> str | None:
        return None if param.is_contiguous() else "rows are not contiguous"

    def values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        lr, weight_decay, momentum, nesterov, eps = self._read(group)
        return lr, weight_decay, momentum, float(bool(nesterov)), eps

    def state_names(self, variant: tuple[Any, ...]) -> tuple[str, ...]:
        return ("momentum_buffer",)

    def prepare(self, values, scalars):
        lr, weight_decay, momentum, nesterov, eps = values
        return MuonRow(1.0, eps, 1.0 - momentum, momentum if nesterov else 1.0, 1.0 - lr * weight_decay, lr), ()


RULE = MuonRule()


def matrices_of(param: Tensor, stacked: bool) -> tuple[int, int, int]:
    """How many matrices, of how many rows and columns: output channels and all else, if they are not ``stacked``."""
    if stacked:
        return math.prod(param.shape[:-2]), *param.shape[-2:]
    return 1, param.shape[0], math.prod(param.shape[1:])


def size_of(adjust: str, rows: int, columns: int) -> float:
    """What the learning rate of a matrix is multiplied by."""
    if not rows * columns:
        return 1.0
    return math.sqrt(max(1.0, rows / columns)) if adjust == "original" else 0.2 * math.sqrt(max(rows, columns))


def iterations_of(group: dict[str, Any]) -> Iterations:
    """What the settings of a group say of the iterations.

    Raises:
        ValueError: There are 100 of them or more, not three coefficients, or the Gram form in bfloat16.
    """
    coefficients, gram = group.get("coefficients"), gram_of(group)
    if isinstance(coefficients, str):
        return NAMED[one_of("coefficients", coefficients, NAMED)]._replace(gram=gram)
    if coefficients is None:
        if group["ns_steps"] >= 100:
            raise ValueError("Number of steps must be less than 100 for computational efficiency")
        coefficients = (group["ns_coefficients"],) * group["ns_steps"]
    if any(len(each) != 3 for each in coefficients):
        raise ValueError("Coefficients must be a tuple of exactly 3 values")
    return Iterations(tuple((float(a), float(b), float(c)) for a, b, c in coefficients), gram=gram)


def gram_of(group: dict[str, Any]) -> bool:
    """Whether a group wants the Gram form.

    Raises:
        ValueError: It does in bfloat16, of which too little is left.
    """
    gram, dtype = (group.get(name, EXTRAS[name]) for name in ("gram", "ns_dtype"))
    if gram and dtype is torch.bfloat16:
        raise ValueError(f"ns_dtype should be torch.float16 or torch.float32 with gram=True but is: {dtype}")
    return bool(gram)


def _fresh(device: torch.device, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


class MuonLoop(TorchMuon):
    """Muon, one matrix after the other, on any device and in any layout: what :class:`Muon` falls back to."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = evaluated(closure)
        for group in self.param_groups:
            iterations, dtype, stacked, adjust = RULE.group_variant(group)
            lr, weight_decay, momentum, nesterov, eps = (
                value.item() if isinstance(value, Tensor) else value for value in RULE.values(group)
            )
            for param in group["params"]:
                grad, state = param.grad, self.state[param]
                if grad is None:
                    continue
                if param.is_complex() or grad.is_sparse:
                    kind = "complex parameters" if param.is_complex() else "sparse gradients"
                    raise RuntimeError(f"Muon does not support {kind}")
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(grad, memory_format=torch.preserve_format)
                buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
                update = grad.lerp(buffer, momentum) if nesterov else buffer
                shape = matrices_of(param, stacked)
                # of a DTensor, all ranks do the same work
                x = gathered(update.to(first_dtype(dtype), copy=True)).reshape(shape)
                x = orthogonalize_(x, iterations, dtype, eps, partial(_fresh, param.device))
                param.mul_(1 - lr * weight_decay)
                step = scattered(param, x.reshape(param.shape))
                param.add_(step, alpha=-lr * size_of(adjust, *shape[1:]))
        return loss


class Muon(MultiTensorStep, MuonLoop):
    """Muon, a drop-in for :class:`torch.optim.Muon`: SGD with momentum whose step has singular values near 1.

    For the matrices between a model's layers; embeddings, output heads, norms and biases belong to AdamW. All matrices
    of a shape, whatever their group, are orthogonalized together. Tensors of more dimensions (kernels of convolutions)
    are matrices of output channels and all else, or with ``stacked=True`` several matrices.

    Where torch's class is wrong, this one is not: bfloat16 gradients with ``nesterov=False`` (torch 2.13 divides the
    momentum buffer), matrices without columns, norms whose squares overflow float32, and an unknown ``adjust_lr_fn``
    in a group, which is an error.

    Args beyond torch's:
        coefficients: Of the iterations, in place of ``ns_coefficients`` and ``ns_steps``: a name of
            ``"standard"``, ``"quintic5"``, ``"polar-express"``, ``"deepseek-v4"``, or a sequence of ``(a, b, c)``, one
            for each (default: None).
        stacked: Tensors of more than two dimensions are stacks of matrices, such as those of experts, each of which is
            orthogonalized by itself (default: False: they are kernels, each a matrix of output channels and all else).
        ns_dtype: The dtype that iterations compute in: torch.bfloat16, torch.float16 or torch.float32
            (default: torch.bfloat16, as torch).
        gram: Iterations compute with Gram matrices, ``XX'``, where the shorter side is at most half of the longer
            (default: False). Less work and a little less exact; ``ns_dtype`` must be torch.float16 or torch.float32
            (https://github.com/Dao-AILab/gram-newton-schulz).
        capturable: The step may be recorded in a CUDA graph (default: False: recorded steps are a plain loop).
        max_grad_norm: Clip the gradients of *all* groups to this 2-norm inside the step, without rewriting them
            (default: None, no clipping). :attr:`grad_norm` then holds the norm before clipping.
        norm_group: A process group, each rank of which has other parameters or other parts of them, that are no
            DTensors (default: None: they are alike on all ranks). See :attr:`norm_group`.

    State: ``momentum_buffer`` of the parameter's shape.

    Raises:
        ValueError: A hyperparameter is out of range, a parameter has fewer than two dimensions, or the Gram form is
            asked for in bfloat16.
        RuntimeError: A gradient is sparse or a parameter complex, as in torch.
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        coefficients: str | Sequence[tuple[float, float, float]] | None = None,
        ns_dtype: torch.dtype = torch.bfloat16,
        stacked: bool = False,
        gram: bool = False,
        capturable: bool = False,
        max_grad_norm: float | None = None,
        norm_group: Any = None,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        for name, value in (("Learning rate", lr), ("momentum", momentum), ("weight decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"{name} should be >= 0 but is: {value}")
        if adjust_lr_fn is not None and adjust_lr_fn not in ADJUSTMENTS:
            raise ValueError(f"Adjust learning rate function {adjust_lr_fn} is not supported")
        if ns_dtype not in NS_DTYPES:
            raise ValueError(f"ns_dtype should be one of {', '.join(map(str, NS_DTYPES))} but is: {ns_dtype}")
        defaults: dict[str, Any] = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn,
        }  # fmt: skip
        # groups have torch's keys alone where nothing else is chosen: checkpoints go both ways
        extras = {"coefficients": coefficients, "ns_dtype": ns_dtype, "stacked": stacked, "gram": gram}
        defaults |= {name: value for name, value in extras.items() if value != EXTRAS[name]}
        if coefficients is not None:
            iterations_of(defaults)
        super().__init__(params, defaults, max_grad_norm=max_grad_norm, capturable=capturable, norm_group=norm_group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.

        Raises:
            ValueError: A parameter has fewer than two dimensions, or the Gram form is asked for in bfloat16.
        """
        super().add_param_group(param_group)
        try:
            gram_of(param_group)
        except ValueError:
            self.param_groups.pop()
            raise
        for param in param_group["params"]:
            if param.dim() < 2:
                self.param_groups.pop()
                raise ValueError(
                    f"Muon only supports 2D parameters whereas we found a parameter with size: {param.size()}"
                )
