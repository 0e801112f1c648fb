"""Adafactor (https://arxiv.org/abs/1804.04235), as torch defines it and as transformers does."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Adafactor as TorchAdafactor
from torch.optim.optimizer import ParamsT

from . import _compat
from ._checks import one_of, within
from ._engine.averages import Average
from ._engine.guards import Clipping, Spikes
from ._engine.layout import memory_order
from ._engine.optimizer import evaluated
from ._engine.rule import StateKind, UpdateRule, new_state
from ._engine.step import MultiTensorStep
from ._engine.storage import StateDtype, kept
from ._loop import each_parameter
from ._transformers_checkpoint import RELATIVE_LR, from_transformers, is_of_transformers

__all__ = ["Adafactor"]

#: Whose definition of the algorithm it is.
VARIANTS = ("torch", "hf")
#: Settings that torch has not, and their values if a group does not have them: torch's definition.
EXTRAS: dict[str, Any] = {
    "variant": "torch",
    "beta1": None,
    "scale_parameter": True,
    "relative_step": True,
    "warmup_init": False,
}


class AdafactorRow(NamedTuple):
    """A tensor's hyperparameters in one step: the columns of the kernel's ``HYPER``."""

    factor: float
    omega: float
    eps_stat: float
    eps: float
    rho: float
    eps2: float
    scaled: float
    d: float
    decay_lr: float
    decay_alpha: float
    beta1_c: float


class AdafactorRule(UpdateRule):
    """One step of Adafactor. Averages of squared gradients are kept of rows and columns; of a vector, of all of it.

    A variant says whether a tensor has rows and columns, whether they lie in memory the other way round, and whether
    there is a first moment.
    """

    module = "adafactor"
    codes = {"exp_avg": False}
    averages = ("row_var", "col_var", "variance")
    walk = "factored"
    optional_settings = tuple(EXTRAS)
    _read = itemgetter("lr", "beta2_decay", "eps", "d", "weight_decay", "maximize")

    def group_variant(self, group: dict[str, Any]) -> tuple[bool, ...]:
        return False, False, group.get("beta1") is not None

    def unsuitable(self, param: Tensor) -> str | None:
        return "neither rows nor columns are contiguous" if memory_order(param) is None else None

    def variant_of(self, variant: tuple[bool, ...], param: Tensor) -> tuple[bool, ...]:
        return param.dim() > 1, memory_order(param) == "columns", variant[2]

    def values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        lr, beta2_decay, (eps1, eps2), d, weight_decay, maximize = self._read(group)
        extras = {name: group.get(name, default) for name, default in EXTRAS.items()}
        hf = extras["variant"] == "hf"
        if hf and eps1 is None:
            eps1 = 1e-30
        if hf and extras["relative_step"]:
            # as in transformers, where schedules that report step sizes leave them in the groups
            lr = RELATIVE_LR
        return (
            lr, beta2_decay, eps1, eps2, d, weight_decay, float(maximize), float(hf), extras["beta1"] or 0.0,
            float(extras["scale_parameter"]), float(extras["relative_step"]), float(extras["warmup_init"]),
        )  # fmt: skip

    def has_whole_groups(self, shape: torch.Size, variant: Any, group: int) -> bool:
        # a walk is one over matrices, which may lie in memory either way round
        return len(shape) > 1 and not (shape[-1] % group or shape[-2] % group)

    def state_names(self, variant: tuple[bool, ...]) -> tuple[str, ...]:
        factored, transposed, moment = variant
        # of the rows and of the columns that lie in memory
        second: tuple[str, ...] = ("variance",)
        if factored:
            second = ("col_var", "row_var") if transposed else ("row_var", "col_var")
        return (*second, "exp_avg") if moment else second

    def kind_of(self, name: str, param: Tensor, group: dict[str, Any], defaults: dict[str, Any]) -> StateKind:
        return StateKind(
            dtype=torch.promote_types(torch.float32, param.dtype) if group.get("variant") == "hf" else None,
            reduced={"row_var": (-1,), "col_var": (-2,)}.get(name, ()),
        )

    def values_for(self, values: tuple[Any, ...], dtype: torch.dtype, first: bool) -> tuple[Any, ...]:
        # torch's default of eps depends on the parameter's dtype
        return values if values[2] is not None else (*values[:2], torch.finfo(dtype).eps, *values[3:])

    def prepare(self, values, scalars):
        lr, beta2_decay, eps1, eps2, d, weight_decay, maximize, hf, beta1, scaled, relative, warmup_init = values
        step = scalars[0] + 1
        rho = lr
        if relative:
            rho = min(min(lr, 1e-6 * step) if warmup_init else lr, step**-0.5)
        row = AdafactorRow(
            -1.0 if maximize else 1.0,
            step**beta2_decay,
            eps1 if hf else 0.0,
            0.0 if hf else eps1,
            rho,
            eps2,
            scaled,
            d,
            # without weight decay an infinite lr, which bounds nothing, is no NaN
            0.0 if hf or not weight_decay else lr * weight_decay,
            weight_decay if hf else 0.0,
            1.0 - beta1,
        )
        return row, (step,)


RULE = AdafactorRule()


class AdafactorLoop(TorchAdafactor):
    """Adafactor, one parameter after the other: what :class:`Adafactor` falls back to.

    Torch's own step for torch's definition; a plain one of either definition where a group has settings of ours.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = evaluated(closure)
        theirs = {**EXTRAS, "state_dtype": None}
        if all(group.get(name, default) == default for group in self.param_groups for name, default in theirs.items()):
            _compat.without_hooks(TorchAdafactor.step)(self)
            return loss
        for group, param, grad, state in each_parameter(self):
            if param.is_complex():
                raise RuntimeError("Adafactor does not support complex parameters")
            kinds = kept(RULE, param, param, group, self.defaults).kinds
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=_compat.scalar_dtype(False), device="cpu")
            for name, kind in kinds.items():
                if name not in state:
                    state[name] = new_state(kind, param)
            values = RULE.values_for(tuple(map(_number, RULE.values(group))), param.dtype, first=False)
            (_, omega, eps_stat, eps, rho, eps2, scaled, d, decay_lr, decay_alpha, beta1_c), _ = RULE.prepare(
                values, (float(state["step"]),)
            )
            state["step"] += 1
            compute = torch.float64 if param.dtype is torch.float64 else torch.float32
            g, p = grad.to(compute), param.to(compute)
            alpha = torch.full((), rho, dtype=compute, device=param.device)
            if scaled:
                alpha = alpha * _rms(p).clamp(min=eps2)
            square = g * g + eps_stat
            if param.dim() > 1:
                row, col = state["row_var"], state["col_var"]
                row.copy_(torch.lerp(row.to(compute), square.mean(-1, keepdim=True), omega))
                col.copy_(torch.lerp(col.to(compute), square.mean(-2, keepdim=True), omega))
                mean = row.to(compute).mean(-2, keepdim=True).clamp_(min=eps)
                # roots of factors: their product stays in range where that of the factors would not
                root = (row.to(compute) / mean).sqrt_() * col.to(compute).sqrt()
            else:
                state["variance"].copy_(torch.lerp(state["variance"].to(compute), square, omega))
                root = state["variance"].to(compute).sqrt()
            update = g / root.clamp_(min=eps)
            update.mul_(alpha / (_rms(update) / d).clamp(min=1.0))
            if "exp_avg" in kinds:
                moment = torch.lerp(state["exp_avg"].to(compute), update, beta1_c)
                state["exp_avg"].copy_(moment)
                update = moment
            param.copy_(p * (1.0 - decay_lr - decay_alpha * alpha) - update)
        return loss


def _rms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x) / math.sqrt(x.numel())


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


class Adafactor(MultiTensorStep, AdafactorLoop):
    """Adafactor, a drop-in for :class:`torch.optim.Adafactor`, and for transformers' with ``variant="hf"``.

    Memory of a matrix's second moment is that of a row and a column. Nothing waits for the host, where torch asks
    for two numbers a parameter and step, and nothing of a matrix's size is allocated. A step of torch's definition
    with the default lr is ``min(lr, 1 / sqrt(step))`` times each tensor's root mean square.

    Args beyond torch's:
        variant: Whose definition holds. ``"torch"`` (default), or ``"hf"``: eps is added to the squared gradients and
            nowhere else (``eps[0]=None`` is 1e-30 then), weight decay is times the tensor's own step size, and 16-bit
            parameters have float32 state.
        beta1: Keep an average of the updates, and take it as the step (default: None, none is kept).
        scale_parameter: Multiply the step by the tensor's root mean square, ``eps[1]`` at least (default: True).
        relative_step: The step size falls as ``1 / sqrt(step)``, and lr bounds it (default: None, which is True for
            torch's definition, and for transformers' if ``lr=None``).
        warmup_init: ``1e-6 * step`` bounds it, too (default: False).
        clip_threshold: Another name of ``d``.
        decay_rate: Another name of ``beta2_decay``.
        state_dtype: How row and column averages and the first moment are kept: a dtype; for the first moment also
            ``"stochastic"`` (bfloat16, rounded stochastically) or ``"8bit"`` (codes, and a scale for 128 of them); or a
            dict of these by the names of states (default: None, the parameter's dtype; float32 is better for 16-bit
            parameters).
        capturable: The step may be recorded in a CUDA graph (default: False: recorded steps are torch's own).
        max_grad_norm: Clip the gradients of *all* groups to this 2-norm inside the step, without rewriting or even
            reading them once more (default: None, no clipping). :attr:`grad_norm` then holds the norm before clipping.
        skip_nonfinite: Skip steps with infinite or NaN gradients (default: False).
        skip_spikes: Skip steps whose gradient norm is far above those before: True, or an :class:`Spikes` (default:
            None).
        max_skips: Raise RuntimeError after so many skipped steps in a row (default: None).
        average: Average the parameters in the step: an :class:`EMA`, :class:`SWA` or :class:`PowerEMA` (default: None).
        norm_group: A process group, each rank of which has other parameters or other parts of them, that are no
            DTensors (default: None: they are alike on all ranks). See :attr:`norm_group`.
        param_rounding: How 16-bit parameters are kept: "nearest", "stochastic", "remainder8", "remainder16" or "master"
            (default: "nearest"); docs/storage.md tells of them.
        rounding_seed: Of the random bits (default: 0).

    What transformers' arguments are here:

    ======================== ==========================================================
    transformers             optimx
    ======================== ==========================================================
    ``lr=None``              ``lr=None``: a relative step size, at most 1e-2
    ``eps=(1e-30, 1e-3)``    the default with ``variant="hf"``
    ``clip_threshold=1.0``   ``clip_threshold`` or ``d``
    ``decay_rate=-0.8``      ``decay_rate`` or ``beta2_decay``
    ``beta1=None``           ``beta1``
    ``weight_decay=0.0``     ``weight_decay``
    ``scale_parameter=True`` ``scale_parameter``
    ``relative_step=True``   ``relative_step``, the default with ``lr=None``
    ``warmup_init=False``    ``warmup_init``
    ======================== ==========================================================

    State: ``step``, ``row_var`` and ``col_var`` (of shapes ``[..., rows, 1]`` and ``[..., 1, columns]``) or, for
    vectors and scalars, ``variance``; ``exp_avg`` with ``beta1``. With ``variant="hf"``, :meth:`load_state_dict` takes
    transformers' checkpoints, too.

    ``foreach=True`` and ``foreach=False`` ask for torch's implementation and get it.

    Raises:
        ValueError: A hyperparameter is out of range (torch's messages), two names of one disagree, or ``lr`` and
            ``relative_step`` contradict each other.
        RuntimeError: A gradient is sparse or a parameter complex, as in torch.
    """

    rule = RULE
    loop_keeps_dtypes = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        variant: str = "torch",
        beta1: float | None = None,
        scale_parameter: bool = True,
        relative_step: bool | None = None,
        warmup_init: bool = False,
        clip_threshold: float | None = None,
        decay_rate: float | None = None,
        state_dtype: StateDtype = None,
        capturable: bool = False,
        max_grad_norm: float | Clipping | None = None,
        skip_nonfinite: bool = False,
        skip_spikes: Spikes | bool | None = None,
        max_skips: int | None = None,
        average: Average | None = None,
        norm_group: Any = None,
        param_rounding: str = "nearest",
        rounding_seed: int = 0,
    ) -> None:
        one_of("variant", variant, VARIANTS)
        d = _one_name("clip_threshold", clip_threshold, "d", d, 1.0)
        beta2_decay = _one_name("decay_rate", decay_rate, "beta2_decay", beta2_decay, -0.8)
        if relative_step is None:
            relative_step = variant == "torch" or lr is None
        if lr is None:
            if not relative_step:
                raise ValueError("lr should be a number with relative_step=False but is: None")
            lr = RELATIVE_LR
        elif variant == "hf" and relative_step:
            raise ValueError(f"lr should be None with variant='hf' and relative_step=True but is: {lr}")
        if warmup_init and not relative_step:
            raise ValueError("warmup_init should be False with relative_step=False but is: True")
        if beta1 is not None:
            within("[0, 1)").check("beta1", beta1)
        TorchAdafactor.__init__(self, params, lr, beta2_decay, eps, d, weight_decay, foreach=foreach, maximize=maximize)
        chosen = (variant, beta1, scale_parameter, relative_step, warmup_init)
        # groups have torch's keys alone as long as the definition is torch's: checkpoints go both ways
        extras = {name: value for name, value in zip(EXTRAS, chosen, strict=True) if value != EXTRAS[name]}
        self.defaults.update(extras)
        self._fill_groups()
        self._init_step(
            max_grad_norm, capturable=capturable, norm_group=norm_group, skip_nonfinite=skip_nonfinite,
            skip_spikes=skip_spikes, max_skips=max_skips, average=average, param_rounding=param_rounding,
            state_dtype=state_dtype, rounding_seed=rounding_seed,
        )  # fmt: skip

    def _fill_groups(self) -> None:
        for group in self.param_groups:
            for name in EXTRAS.keys() & self.defaults.keys():
                group.setdefault(name, self.defaults[name])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; settings go by torch's names there, and ``lr`` is a number."""
        # torch says what else a group cannot be
        given = param_group if isinstance(param_group, dict) else {}
        for alias, name in (("clip_threshold", "d"), ("decay_rate", "beta2_decay")):
            if alias in given:
                raise ValueError(f"{alias} should be {name} in a parameter group but is: {given[alias]}")
        if given.get("lr", 0.0) is None:
            raise ValueError("lr should be a number in a parameter group but is: None")
        one_of("variant", given.get("variant", "torch"), VARIANTS)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # a checkpoint of torch's has none of ours
        self._fill_groups()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what torch's or our :meth:`state_dict` gave, or, with ``variant="hf"``, that of transformers' Adafactor.

        Raises:
            ValueError: The checkpoint is of transformers' Adafactor, and ``variant`` is "torch".
        """
        if is_of_transformers(state_dict):
            if self.defaults.get("variant") != "hf":
                raise ValueError("variant should be 'hf' to load transformers' checkpoints but is: 'torch'")
            state_dict = from_transformers(state_dict, self.defaults)
        super().load_state_dict(state_dict)

    def step_sizes(self) -> list[float]:
        """The step size that each group's first parameter has: relative step times root mean square. Waits."""
        return [self._step_size(group) for group in self.param_groups]

    def _step_size(self, group: dict[str, Any]) -> float:
        if not group["params"]:
            return 0.0
        param = group["params"][0]
        done = self.state.get(param, {}).get("step", 1.0)
        values = RULE.values_for(tuple(map(_number, RULE.values(group))), param.dtype, first=False)
        row, _ = RULE.prepare(values, (max(float(done), 1.0) - 1.0,))
        _, _, _, _, rho, eps2, scaled, *_ = row
        return rho * max(eps2, float(_rms(param.detach().float()))) if scaled else rho

    def _get_lr(self, param_group: dict[str, Any], param_state: dict[str, Any]) -> float:
        """What transformers' AdafactorSchedule asks for, and writes into ``group["lr"]``.

        Raises:
            RuntimeError: ``lr`` bounds the step size here, so a report must not overwrite it.
        """
        if not (param_group.get("variant") == "hf" and param_group.get("relative_step", True)):
            raise RuntimeError(
                "transformers' AdafactorSchedule overwrites lr, which Adafactor reads except with variant='hf' and "
                "relative_step=True: use optimx.lr_scheduler.AdafactorSchedule"
            )
        return self._step_size(param_group)


def _one_name(alias: str, given: float | None, name: str, value: float, default: float) -> float:
    """The value of a setting with two names."""
    if given is None:
        return value
    if value not in (default, given):
        raise ValueError(f"{alias} should be {name} ({value}), its other name, but is: {given}")
    return given
