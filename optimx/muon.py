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

from ._checks import check_number, one_of, within
from ._engine.averages import Average
from ._engine.guards import Clipping, Spikes
from ._engine.matrices import Block, MatrixVariant, as_split, blocks_of, equalized, row_squares
from ._engine.newton_schulz import NAMED, Iterations, first_dtype, orthogonalize_, safe
from ._engine.optimizer import evaluated
from ._engine.rule import StateKind, UpdateRule
from ._engine.sharding import gathered, like, local, scattered
from ._engine.step import MultiTensorStep
from ._engine.storage import StateDtype

__all__ = ["Muon"]

#: How the step size depends on a matrix's shape. Torch's names; None is the first.
ADJUSTMENTS = ("original", "match_rms_adamw")
#: Settings that torch has not, and their values if a group does not have them.
EXTRAS: dict[str, Any] = {
    "coefficients": None,
    "ns_dtype": torch.bfloat16,
    "stacked": False,
    "split": None,
    "normalize": None,
    "beta2": 0.95,
    "cautious_weight_decay": False,
    "gram": False,
}
#: What may happen to a matrix after the iterations.
NORMALIZATIONS = ("neuron",)
NS_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class MuonRow(NamedTuple):
    """A matrix's hyperparameters in one step: the columns of the kernel's ``HYPER``."""

    factor: float
    eps: float
    momentum_c: float
    mix: float
    decay: float
    lr: float
    beta2_c: float


class MuonSettings(NamedTuple):
    """A group's settings that choose other arithmetic."""

    iterations: Iterations
    dtype: torch.dtype
    stacked: bool
    split: int | tuple[int, ...] | None
    adjust: str
    normalized: bool
    cautious: bool


class MuonRule(UpdateRule):
    """One step of Muon. Torch keeps no step count."""

    module = "muon"
    codes = {"momentum_buffer": False}
    averages = ("second_momentum_buffer",)
    scalars = ()
    walk = "orthogonal"
    of_wholes = True
    optional_settings = tuple(EXTRAS)
    _read = itemgetter("lr", "weight_decay", "momentum", "nesterov", "eps")
    #: Where ``eps`` is among :meth:`values`.
    EPS = 4

    def group_variant(self, group: dict[str, Any]) -> MuonSettings:
        adjust, normalize = group["adjust_lr_fn"], group.get("normalize")
        if adjust is not None:
            one_of("adjust_lr_fn", adjust, ADJUSTMENTS)
        if normalize is not None:
            one_of("normalize", normalize, NORMALIZATIONS)
        dtype, stacked, split, cautious = (
            group.get(name, EXTRAS[name]) for name in ("ns_dtype", "stacked", "split", "cautious_weight_decay")
        )
        return MuonSettings(
            iterations_of(group),
            dtype,
            stacked,
            as_split(split),
            adjust or ADJUSTMENTS[0],
            normalize is not None,
            cautious,
        )

    def variant_of(self, variant: Any, param: Tensor) -> MatrixVariant:
        blocks = blocks_of(param.shape, stacked=variant.stacked, split=variant.split)
        times = tuple(size_of(variant.adjust, block.rows, block.columns) for block in blocks)
        return MatrixVariant(blocks, times, variant.iterations, variant.dtype, variant.normalized, variant.cautious)

    def unsuitable(self, param: Tensor) -> str | None:
        return None if param.is_contiguous() else "rows are not contiguous"

    def values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        lr, weight_decay, momentum, nesterov, eps = self._read(group)
        return lr, weight_decay, momentum, float(bool(nesterov)), eps, group.get("beta2", EXTRAS["beta2"])

    def has_whole_groups(self, shape: torch.Size, variant: Any, group: int) -> bool:
        return all(block.columns % group == 0 for block in variant.blocks) and super().has_whole_groups(
            shape, variant, group
        )

    def state_names(self, variant: Any) -> tuple[str, ...]:
        return ("momentum_buffer", "second_momentum_buffer") if variant.normalized else ("momentum_buffer",)

    def kind_of(self, name: str, param: Tensor, group: dict[str, Any], defaults: dict[str, Any]) -> StateKind:
        if name == "momentum_buffer":
            return StateKind()
        # one entry a row
        n_rows_dims = param.dim() - 1 if group.get("stacked") else 1
        return StateKind(reduced=tuple(range(n_rows_dims - param.dim(), 0)))

    def prepare(self, values, scalars):
        lr, weight_decay, momentum, nesterov, eps, beta2 = values
        mix = momentum if nesterov else 1.0
        return MuonRow(1.0, eps, 1.0 - momentum, mix, 1.0 - lr * weight_decay, lr, 1.0 - beta2), ()

    def treat_wholes_(self, wholes, variant, values):
        flat = wholes.view(len(wholes), -1)
        eps = [of_group[self.EPS] for of_group in values]
        for block in variant.blocks:
            part = block.of(flat, dim=1)
            x = part.reshape(-1, block.rows, block.columns)
            floors = torch.stack([torch.as_tensor(each, dtype=x.dtype, device=x.device) for each in eps])
            floors = floors.repeat_interleave(block.n_matrices).view(-1, 1, 1)
            memory = partial(_fresh, x.device)
            part.copy_(orthogonalize_(x, variant.iterations, variant.dtype, floors, memory).reshape(part.shape))


RULE = MuonRule()


def size_of(adjust: str, rows: int, columns: int) -> float:
    """What the learning rate of a matrix is multiplied by."""
    if not rows * columns:
        return 1.0
    return math.sqrt(max(1.0, rows / columns)) if adjust == "original" else 0.2 * math.sqrt(max(rows, columns))


def iterations_of(group: dict[str, Any]) -> Iterations:
    """What the settings of a group say of the iterations.

    Raises:
        ValueError: There are 100 of them or more, not three coefficients, some of one's own with which singular values
            run away, or the Gram form in bfloat16.
    """
    coefficients, gram = group.get("coefficients"), gram_of(group)
    if isinstance(coefficients, str):
        return NAMED[one_of("coefficients", coefficients, NAMED)]._replace(gram=gram)
    of_ones_own = coefficients
    if coefficients is None:
        if group["ns_steps"] >= 100:
            raise ValueError("Number of steps must be less than 100 for computational efficiency")
        coefficients = (group["ns_coefficients"],) * group["ns_steps"]
    if any(len(each) != 3 for each in coefficients):
        raise ValueError("Coefficients must be a tuple of exactly 3 values")
    numbers = tuple((float(a), float(b), float(c)) for a, b, c in coefficients)
    return (Iterations(numbers) if of_ones_own is None else safe(numbers))._replace(gram=gram)


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
    """Muon, one parameter after the other, on any device and in any layout: what :class:`Muon` falls back to."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = evaluated(closure)
        for group in self.param_groups:
            settings = RULE.group_variant(group)
            lr, weight_decay, momentum, nesterov, eps, beta2 = (
                value.item() if isinstance(value, Tensor) else value for value in RULE.values(group)
            )
            for param in group["params"]:
                grad, state = param.grad, self.state[param]
                if grad is None:
                    continue
                if param.is_complex() or grad.is_sparse:
                    kind = "complex parameters" if param.is_complex() else "sparse gradients"
                    raise RuntimeError(f"Muon does not support {kind}")
                variant = RULE.variant_of(settings, param)
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(grad, memory_format=torch.preserve_format)
                buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
                update = grad.lerp(buffer, momentum) if nesterov else buffer
                # of a DTensor, all ranks do the same work
                x = gathered(update.to(first_dtype(variant.dtype), copy=True)).reshape(-1)
                matrices = [_orthogonal(block.of(x).view(block[1:]), variant, eps) for block in variant.blocks]
                if variant.normalized:
                    name = "second_momentum_buffer"
                    if name not in state:
                        new = RULE.new_state(name, local(param), group, self.defaults)
                        state[name] = like(param, new, RULE.kind_of(name, param, group, self.defaults))
                    averages = gathered(state[name])
                    _normalize_(matrices, variant.blocks, averages.view(-1), 1 - beta2)
                    state[name].copy_(scattered(state[name], averages))
                times = variant.times[0]
                if len({*variant.times}) > 1:
                    matrices = [m.float() * (of_m / times) for m, of_m in zip(matrices, variant.times, strict=True)]
                whole = torch.cat([m.reshape(-1) for m in matrices]) if len(matrices) > 1 else matrices[0]
                step = scattered(param, whole.reshape(param.shape))
                if variant.cautious:
                    param.copy_(torch.where(param * step < 0, param, param * (1 - lr * weight_decay)))
                else:
                    param.mul_(1 - lr * weight_decay)
                param.add_(step, alpha=-lr * times)
        return loss


def _orthogonal(x: Tensor, variant: MatrixVariant, eps: float) -> Tensor:
    return orthogonalize_(x, variant.iterations, variant.dtype, eps, partial(_fresh, x.device))


def _normalize_(matrices: Sequence[Tensor], blocks: Sequence[Block], averages: Tensor, beta2_c: float) -> None:
    """Bring the rows of matrices to alike sizes, and move the averages of their mean squares, one entry a row."""
    for x, block in zip(matrices, blocks, strict=True):
        if x.numel():
            squares, average = row_squares(x), block.of(averages, 1)
            average.copy_(average.double().lerp_((squares / block.columns).view(-1), beta2_c))
            x.mul_(equalized(squares, average.view(squares.shape)).float())


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
        split: Tensors are several matrices, one above the other, each of which is orthogonalized by itself, with the
            step size of its own shape: a number of equal ones (3 for queries, keys and values in one; the number of
            heads to take each by itself), or how many rows each has, ``(queries, keys, values)`` (default: None: they
            are one).
            With ``stacked=True`` each matrix of a stack is split. Layers that keep columns of outputs, as transformers'
            Conv1D does, have no rows to split.
        normalize: ``"neuron"``: divide each row of an orthogonalized matrix by the root of an average of its mean
            squares, and keep the matrix's norm (NorMuon, https://arxiv.org/abs/2510.05491) (default: None).
        beta2: What that average keeps of itself in a step (default: 0.95).
        cautious_weight_decay: Weights decay only where the step does not move them away from zero
            (https://arxiv.org/abs/2510.12402) (default: False).
        stacked: Tensors of more than two dimensions are stacks of matrices, such as those of experts, each of which is
            orthogonalized by itself (default: False: they are kernels, each a matrix of output channels and all else).
        ns_dtype: The dtype that iterations compute in: torch.bfloat16, torch.float16 or torch.float32
            (default: torch.bfloat16, as torch).
        gram: Iterations compute with Gram matrices, ``XX'``, where the shorter side is at most half of the longer
            (default: False). Less work and a little less exact; ``ns_dtype`` must be torch.float16 or torch.float32
            (https://github.com/Dao-AILab/gram-newton-schulz).
        capturable: The step may be recorded in a CUDA graph (default: False: recorded steps are a plain loop).
        centralize_grads: Gradients lose their means over all dimensions but the first, before the norm is taken
            (https://arxiv.org/abs/2004.01461) (default: False).
        max_grad_norm: Clip the gradients of *all* groups to this 2-norm, or to what an :class:`AutoClip` or a
            :class:`ZClip` finds, inside the step, without rewriting them (default: None, no clipping).
            :attr:`grad_norm` then holds the norm before clipping.
        skip_nonfinite: Skip steps with infinite or NaN gradients (default: False).
        skip_spikes: Skip steps whose gradient norm is far above those before: True, or an :class:`Spikes` (default:
            None).
        max_skips: Raise RuntimeError after so many skipped steps in a row (default: None).
        average: Average the parameters in the step: an :class:`EMA`, :class:`SWA` or :class:`PowerEMA` (default: None).
        norm_group: A process group, each rank of which has other parameters or other parts of them, that are no
            DTensors (default: None: they are alike on all ranks). See :attr:`norm_group`.
        param_rounding: How 16-bit parameters are kept: "nearest", "stochastic", "remainder8", "remainder16" or "master"
            (default: "nearest"); docs/storage.md tells of them.
        state_dtype: How states are kept: a dtype, "stochastic", "8bit", or a dict of these by name (default: None).
        rounding_seed: Of the random bits (default: 0).

    State: ``momentum_buffer`` of the parameter's shape; with ``normalize`` also ``second_momentum_buffer``, which has
    one entry a row.

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
        split: int | Sequence[int] | None = None,
        normalize: str | None = None,
        beta2: float = 0.95,
        cautious_weight_decay: bool = False,
        gram: bool = False,
        capturable: bool = False,
        centralize_grads: bool = False,
        max_grad_norm: float | Clipping | None = None,
        skip_nonfinite: bool = False,
        skip_spikes: Spikes | bool | None = None,
        max_skips: int | None = None,
        average: Average | None = None,
        norm_group: Any = None,
        param_rounding: str = "nearest",
        state_dtype: StateDtype = None,
        rounding_seed: int = 0,
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
        extras = {
            "coefficients": coefficients, "ns_dtype": ns_dtype, "stacked": stacked, "split": split,
            "normalize": normalize, "beta2": beta2, "cautious_weight_decay": cautious_weight_decay, "gram": gram,
        }  # fmt: skip
        defaults |= {name: value for name, value in extras.items() if value != EXTRAS[name]}
        if coefficients is not None:
            iterations_of(defaults)
        if normalize is not None:
            one_of("normalize", normalize, NORMALIZATIONS)
        check_number("beta2", beta2, within("[0, 1)"))
        super().__init__(
            params, defaults, max_grad_norm=max_grad_norm, capturable=capturable, norm_group=norm_group,
            skip_nonfinite=skip_nonfinite, skip_spikes=skip_spikes, max_skips=max_skips, average=average,
            param_rounding=param_rounding, state_dtype=state_dtype, rounding_seed=rounding_seed,
            centralize_grads=centralize_grads,
        )  # fmt: skip

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.

        Raises:
            ValueError: A parameter has fewer than two dimensions, the group's ``split`` does not suit its rows, or
                the Gram form is asked for in bfloat16.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            gram_of(group)
            for param in group["params"]:
                if param.dim() < 2:
                    raise ValueError(
                        f"Muon only supports 2D parameters whereas we found a parameter with size: {param.size()}"
                    )
                blocks_of(param.shape, stacked=bool(group.get("stacked")), split=as_split(group.get("split")))
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise
