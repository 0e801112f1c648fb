"""Who is measured: a function for each way to take a step, which builds tensors and optimizer for a case.

The optimizer is the one that the case names, from torch.optim, from optimx or from
optimx.measuring.foreach. It is looked up when the contestant is built, so that one that is missing is an error in its
row and nowhere else.
"""

import inspect
import itertools
import math
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

import optimx
from optimx.measuring import packages
from optimx.measuring.stock import COMPILED, compiled_step, ways
from optimx.measuring.timing import Run

if TYPE_CHECKING:
    from bench.case import Case

MAX_NORM = 1.0
#: Float32 elements of the plain copy, at least and at most: it neither fits the caches nor takes memory that a large
#: model needs.
COPY_NUMEL, MAX_COPY_NUMEL = 2**24, 2**28
#: Rows of the batch in a step with forward and backward: few, for activations to be small beside gradients.
ROWS = 16

Params = list[torch.nn.Parameter]
Groups = Callable[[Params], list[dict[str, Any]]]


class Model:
    """The parameters of a case, and a backward pass that costs next to nothing.

    ``backward`` gives every parameter a new gradient tensor, as zero_grad() and loss.backward() do: a step that
    remembers the addresses of its tensors has to find them anew, and clipping in place has something to clip.
    """

    def __init__(self, case: "Case") -> None:
        torch.manual_seed(0)
        std = case.loss_scale * case.grad_norm / math.sqrt(case.numel)
        empty = partial(torch.empty, dtype=case.dtype, device=case.device)
        self.params = [torch.nn.Parameter(empty(shape).normal_(std=0.02)) for shape in case.shapes]
        self.grads = [empty(shape).normal_(std=std) for shape in case.shapes]

    def backward(self) -> None:
        for p in self.params:
            p.grad = None
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g.clone()


def one_group(params: Params) -> list[dict[str, Any]]:
    return [{"params": params}]


def group_each(params: Params) -> list[dict[str, Any]]:
    """A group of its own for every parameter, all with the same hyperparameters."""
    return [{"params": [p]} for p in params]


def layer_decay(params: Params, count: int | None = None) -> list[dict[str, Any]]:
    """``count`` groups of neighbours, or one for every parameter, no two with the same lr."""
    count = count or len(params)
    bounds = [round(i * len(params) / count) for i in range(count + 1)]
    return [
        {"params": params[first:last], "lr": 1e-3 * 0.99 ** (count - i)}
        for i, (first, last) in enumerate(itertools.pairwise(bounds))
    ]


def vit_layer_decay(params: Params) -> list[dict[str, Any]]:
    """Layer-wise decay on ``shapes.vit()``: the matrices of a layer, and its vectors, 28 groups for 12 blocks."""
    layers = [params[:4], *(params[i : i + 12] for i in range(4, len(params) - 4, 12)), params[-4:]]
    return [
        {"params": [p for p in layer if (p.ndim > 1) == decays], "lr": 1e-3 * 0.75 ** (len(layers) - 1 - i), **settings}
        for i, layer in enumerate(layers)
        for decays, settings in ((True, {}), (False, {"weight_decay": 0.0}))
    ]


def optimizer_of(
    case: "Case", module: ModuleType, model: Model, groups: Groups = one_group, optimizer: str = "", **options: Any
) -> torch.optim.Optimizer:
    """The case's optimizer, or the one named, as ``module`` has it, over the parameters of ``model``."""
    return getattr(module, optimizer or case.optimizer)(groups(model.params), **case.kwargs, **options)


def plain_step(case: "Case", *, module: ModuleType, **options: Any) -> Run:
    model = Model(case)
    optimizer = optimizer_of(case, module, model, **options)
    return Run(model.backward, optimizer.step, optimizer)


torch_step = partial(plain_step, module=torch.optim)
optimx_step = partial(plain_step, module=optimx)


def stock_step(case: "Case", *, way: str, groups: Groups = one_group) -> Run:
    """One of :func:`optimx.measuring.stock.ways` to take the step."""
    if way == COMPILED and case.device == "cuda":
        raise packages.Missing(
            f"{packages.NOT_MEASURED} on a GPU: compiling takes longer than the rest of the question"
        )
    model = Model(case)
    optimizer = ways(getattr(optimx, case.optimizer))[way](groups(model.params), **case.kwargs)
    step = compiled_step(optimizer) if way == COMPILED else optimizer.step
    return Run(model.backward, step, optimizer)


def training_step(
    case: "Case", *, measures: bool = False, release: dict[str, Any] | None = None, **options: Any
) -> Run:
    """Forward and backward of a chain of square matrices, and the step; with ``release`` gradients are released.

    Args:
        case: Of matrices of one size.
        measures: A backward of its own measures the gradients.
        release: Arguments of ``release_gradients``; None: gradients stay until the step.
        options: Of the optimizer.
    """
    model = Model(case)
    model.grads.clear()
    optimizer = optimizer_of(case, optimx, model, **options)
    released = None if release is None else optimx.release_gradients(optimizer, **release)
    x = torch.randn(ROWS, case.shapes[0][1], dtype=case.dtype, device=case.device)

    def step() -> None:
        y = x
        for weight in model.params:
            y = torch.tanh(torch.nn.functional.linear(y, weight))
        loss = y.square().mean()
        if released is not None and measures:
            with released.measure():
                loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Run(lambda: None, step, optimizer)


def package_step(case: "Case", *, peer: packages.Peer) -> Run:
    model = Model(case)
    # some have no default for the learning rate, or another one
    lr = inspect.signature(getattr(optimx, case.optimizer)).parameters["lr"].default
    groups = [{"params": model.params, **peer.group}] if peer.group else model.params
    optimizer = peer.load(len(model.params))(groups, **{"lr": lr, **case.kwargs, **peer.kwargs})
    return Run(model.backward, optimizer.step, optimizer)


def torch_clip_step(case: "Case", **options: Any) -> Run:
    model = Model(case)
    optimizer = optimizer_of(case, torch.optim, model, **(options or {"fused": True}))

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(model.params, MAX_NORM)
        optimizer.step()

    return Run(model.backward, step, optimizer)


def optimx_clip_step(case: "Case") -> Run:
    model = Model(case)
    optimizer = optimizer_of(case, optimx, model)

    def step() -> None:
        optimx.clip_grad_norm_(model.params, MAX_NORM)
        optimizer.step()

    return Run(model.backward, step, optimizer)


def torch_amp_step(case: "Case") -> Run:
    model = Model(case)
    optimizer = optimizer_of(case, torch.optim, model, fused=True)
    scaler = make_scaler(torch.amp.GradScaler, case)

    def step() -> None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.params, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()

    return Run(model.backward, step, optimizer)


def optimx_amp_step(case: "Case", *, torch_scaler: bool = False) -> Run:
    model = Model(case)
    optimizer = optimizer_of(case, optimx, model, max_grad_norm=MAX_NORM)
    scaler = make_scaler(torch.amp.GradScaler if torch_scaler else optimx.GradScaler, case)

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    return Run(model.backward, step, optimizer)


def make_scaler(scaler_class: type[torch.amp.GradScaler], case: "Case") -> torch.amp.GradScaler:
    scaler = scaler_class(case.device, init_scale=case.loss_scale)
    # it makes its tensors when it first scales a loss
    scaler.scale(torch.zeros((), device=case.device))
    return scaler


def device_copy(case: "Case") -> Run:
    """The yardstick of bandwidth: one copy as large as the parameters, within bounds."""
    src = torch.zeros(min(max(case.numel, COPY_NUMEL), MAX_COPY_NUMEL), device=case.device)
    dst = torch.empty_like(src)
    return Run(lambda: None, lambda: dst.copy_(src), moved=src.nbytes + dst.nbytes)
