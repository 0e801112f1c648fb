"""What a GradScaler shows and tells to whoever stands around the step: hooks, subclasses, wrappers, trainers."""

from __future__ import annotations

import copy
import logging
import pickle
import types
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import ExponentialLR, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset

import optimx

# torchvision, which Lightning imports, has to import first
import tests.models  # noqa: F401
from tests.cases import CASES, Case, assert_same, make_params, set_grads
from tests.engine import each_case, each_kind, interpreted, usual

SHAPES = [(), (129,), (5, 7)]
SCALE = 2.0**10
#: Whether a gradient is infinite, step by step.
BAD_STEPS = (False, True, False, False)
EXACT = {"rtol": 0.0, "atol": 0.0}

each_scaler = pytest.mark.parametrize(
    "scaler_cls", [torch.amp.GradScaler, optimx.GradScaler], ids=["torchs_scaler", "our_scaler"]
)
each_fused_case = pytest.mark.parametrize("case", [c for c in CASES if c.has("fused")], ids=lambda c: c.name)


class Watch:
    """Clips the gradients that it finds when it is called, and remembers their norms."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = params
        self.norms: list[float] = []

    def __call__(self, *_: Any) -> None:
        self.norms.append(float(clip_grad_norm_(self.params, 1.0)))


class Wrapper:
    """What passes on everything that it does not do itself."""

    def __init__(self, optimizer: Any, watch: Watch) -> None:
        self.optimizer = optimizer
        self.watch = watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def step(self, closure: Any = None) -> Any:
        self.watch()
        return self.optimizer.step(closure)


def clipping(cls: type[torch.optim.Optimizer], watch: Watch) -> type[torch.optim.Optimizer]:
    """A subclass made as detectron2 makes it."""

    def step(self: Any, closure: Any = None) -> Any:
        watch()
        return super(type(self), self).step(closure)

    return type(cls.__name__ + "WithGradientClip", (cls,), {"step": step})


def bound(optimizer: Any, watch: Watch) -> types.MethodType:
    """A method for this instance alone."""
    before = type(optimizer).step

    def step(self: Any, closure: Any = None) -> Any:
        watch()
        return before(self, closure)

    return types.MethodType(step, optimizer)


def replacement(optimizer: Any, watch: Watch) -> Callable[..., Any]:
    """A function that accelerate puts in place of the method."""
    before = optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        watch()
        return before(*args, **kwargs)

    return step


#: Somebody between scaler and optimizer: ``(make, watch, undo) -> (optimizer, what the scaler is given)``.
WATCHERS: dict[str, Callable[[Callable[..., Any], Watch, ExitStack], tuple[Any, Any]]] = {}


def watcher(function: Callable[..., Any]) -> Callable[..., Any]:
    WATCHERS[function.__name__] = function
    return function


@watcher
def pre_hook(make: Any, watch: Watch, undo: ExitStack) -> Any:
    optimizer = make()
    optimizer.register_step_pre_hook(watch)
    return optimizer, optimizer


@watcher
def post_hook(make: Any, watch: Watch, undo: ExitStack) -> Any:
    optimizer = make()
    optimizer.register_step_post_hook(watch)
    return optimizer, optimizer


@watcher
def global_pre_hook(make: Any, watch: Watch, undo: ExitStack) -> Any:
    undo.callback(register_optimizer_step_pre_hook(watch).remove)
    optimizer = make()
    return optimizer, optimizer


@watcher
def global_post_hook(make: Any, watch: Watch, undo: ExitStack) -> Any:
    undo.callback(register_optimizer_step_post_hook(watch).remove)
    optimizer = make()
    return optimizer, optimizer


@watcher
def subclass(make: Any, watch: Watch, undo: ExitStack) -> Any:
    optimizer = make(lambda cls: clipping(cls, watch))
    return optimizer, optimizer


@watcher
def patched_class(make: Any, watch: Watch, undo: ExitStack) -> Any:
    patch = undo.enter_context(pytest.MonkeyPatch.context())

    def patched(cls: Any) -> Any:
        before = cls.step
        patch.setattr(cls, "step", lambda self, closure=None: [watch(), before(self, closure)][1])
        return cls

    optimizer = make(patched)
    return optimizer, optimizer


@watcher
def wrapper(make: Any, watch: Watch, undo: ExitStack) -> Any:
    optimizer = make()
    return optimizer, Wrapper(optimizer, watch)


@watcher
def replaced_step(make: Any, watch: Watch, undo: ExitStack) -> Any:
    optimizer = make()
    optimizer.step = replacement(optimizer, watch)
    return optimizer, optimizer


@watcher
def replaced_after_scheduler(make: Any, watch: Watch, undo: ExitStack) -> Any:
    optimizer = make()
    StepLR(optimizer, 100)
    optimizer.step = replacement(optimizer, watch)
    return optimizer, optimizer


@watcher
def own_method(make: Any, watch: Watch, undo: ExitStack) -> Any:
    optimizer = make()
    optimizer.step = bound(optimizer, watch)
    return optimizer, optimizer


@watcher
def own_method_before_scheduler(make: Any, watch: Watch, undo: ExitStack) -> Any:
    optimizer = make()
    optimizer.step = bound(optimizer, watch)
    StepLR(optimizer, 100)
    return optimizer, optimizer


each_watcher = pytest.mark.parametrize("name", WATCHERS)


def new_scaler(cls: type[torch.amp.GradScaler], device: torch.device | str = "cpu") -> torch.amp.GradScaler:
    return cls(torch.device(device).type, init_scale=SCALE)


def set_scaled_grads(scaler: torch.amp.GradScaler, params: Sequence[Tensor], step: int, bad: bool) -> None:
    set_grads(params, step)
    for param in params:
        param.grad = scaler.scale(param.grad)
    if bad:
        params[-1].grad.view(-1)[-1] = torch.inf


def watched(
    name: str | None,
    cls: type[torch.optim.Optimizer],
    kwargs: dict[str, Any],
    scaler: torch.amp.GradScaler | None,
    after_step: Callable[[Any], None] = lambda optimizer: None,
) -> tuple[torch.optim.Optimizer, list[float]]:
    """A loop with a scaler; None: one without, that leaves out the bad step. What it leaves, and what was seen."""
    params = make_params(SHAPES)
    watch = Watch(params)

    def make(change: Callable[[Any], Any] = lambda cls: cls) -> Any:
        return change(cls)(params, **kwargs)

    with ExitStack() as undo:
        optimizer, target = WATCHERS[name](make, watch, undo) if name else (make(),) * 2
        for step, bad in enumerate(BAD_STEPS):
            if scaler is not None:
                set_scaled_grads(scaler, params, step, bad)
                scaler.step(target)
                scaler.update()
            elif not bad:
                set_grads(params, step)
                target.step()
            after_step(optimizer)
    return optimizer, watch.norms


@each_scaler
@each_watcher
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_gradients_are_unscaled_where_somebody_looks(case: Case, name: str, scaler_cls: type) -> None:
    """And where nobody is called, nothing is stepped: bitwise the loop that has no scaler and no bad step."""
    kwargs = usual(case, lr=0.01)
    ours, norms = watched(name, case.cls, kwargs, new_scaler(scaler_cls))
    expected, expected_norms = watched(name, case.cls, kwargs, None)
    assert norms == expected_norms
    assert_same(ours, expected, EXACT)


@each_fused_case
def test_wrapper_around_fused(case: Case) -> None:
    """It says that the optimizer in it unscales, but does not pass on what that needs: our scaler unscales."""
    kwargs = {**usual(case), "fused": True}
    ours, norms = watched("wrapper", case.cls, kwargs, new_scaler(optimx.GradScaler))
    expected, expected_norms = watched("wrapper", case.cls, kwargs, None)
    assert norms == expected_norms
    assert_same(ours, expected, EXACT)
    # the claim is the optimizer's own, and still there
    assert ours._step_supports_amp_scaling


@each_scaler
@each_watcher
@each_fused_case
def test_fused_contract_is_torchs(case: Case, name: str, scaler_cls: type) -> None:
    """The step is called always, with scaled gradients, ``grad_scale`` and ``found_inf``."""
    if name == "wrapper":
        pytest.skip("does not pass on what the scaler hands over")
    if name.endswith("post_hook"):
        pytest.skip("torch's fused kernels write the gradients unscaled, ours do not write them")
    kwargs = {**usual(case), "fused": True}
    ours, norms = watched(name, case.cls, kwargs, new_scaler(scaler_cls))
    stock, stock_norms = watched(name, case.stock, kwargs, new_scaler(torch.amp.GradScaler))
    assert len(norms) == len(BAD_STEPS)
    assert norms == pytest.approx(stock_norms, nan_ok=True)
    assert_same(ours, stock)


@each_scaler
@each_fused_case
def test_what_is_handed_over(case: Case, scaler_cls: type) -> None:
    """Nothing without fused=True: then nobody has to understand it."""
    for kwargs, expected in (({}, [None] * 3), ({"fused": True}, [(SCALE, 0.0), (SCALE, 1.0), (SCALE / 2, 0.0)])):
        params = make_params(SHAPES)
        optimizer = case.cls(params, **kwargs)
        scaler, seen = new_scaler(scaler_cls), []

        def look(optimizer: Any, *_: Any, seen: list[Any] = seen) -> None:
            handed_over = [getattr(optimizer, name, None) for name in ("grad_scale", "found_inf")]
            seen.append(None if None in handed_over else tuple(map(float, handed_over)))

        optimizer.register_step_pre_hook(look)
        for step in range(3):
            set_scaled_grads(scaler, params, step, step == 1)
            scaler.step(optimizer)
            scaler.update()
        # a skipped step is called with fused=True only
        assert seen == (expected if kwargs else expected[1:])


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "deepcopy", "pickle"]
)
@pytest.mark.parametrize("fused", [None, True], ids=["default", "fused"])
@each_fused_case
def test_copies_behave_like_stocks(case: Case, fused: bool | None, copied: Callable[[Any], Any]) -> None:
    """Torch does not copy the claim to unscale."""
    calls = []
    for cls in (case.cls, case.stock):
        optimizer = copied(cls(make_params(SHAPES), **usual(case), fused=fused))
        params = optimizer.param_groups[0]["params"]
        scaler, called = new_scaler(torch.amp.GradScaler), []
        optimizer.register_step_pre_hook(lambda *_, step_calls=called: step_calls.append(1))
        for step, bad in enumerate(BAD_STEPS):
            set_scaled_grads(scaler, params, step, bad)
            scaler.step(optimizer)
            scaler.update()
        calls.append((len(called), [p.detach().clone() for p in params]))
    (ours, mine), (stock, theirs) = calls
    assert ours == stock
    torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("name", [None, *WATCHERS])
@each_kind
def test_step_was_skipped_on_every_path(case: Case, name: str | None) -> None:
    """Our scaler tells it, and that the norm is unknown, also where the step is not called."""
    told, finite = [], []

    def ask(optimizer: Any) -> None:
        told.append(bool(optimizer.step_was_skipped))
        finite.append(bool(optimizer.grad_norm.isfinite()))

    watched(name, case.cls, {**usual(case, lr=0.01), "max_grad_norm": 1.0}, new_scaler(optimx.GradScaler), ask)
    assert tuple(told) == BAD_STEPS
    assert finite == [not bad for bad in BAD_STEPS]


@pytest.mark.parametrize("by_hand", [False, True], ids=["step", "unscale_"])
@pytest.mark.parametrize("asked", [{}, {"foreach": False}, {"fused": True}], ids=["default", "loop", "fused"])
def test_step_was_skipped_until_the_next_step(asked: dict[str, bool], by_hand: bool, device: torch.device) -> None:
    """With whichever implementation; a step without the scaler ends it, too."""
    params = make_params(SHAPES, device)
    optimizer = optimx.AdamW(params, **asked)
    scaler = new_scaler(optimx.GradScaler, device)
    for step, bad in enumerate([*BAD_STEPS, True]):
        set_scaled_grads(scaler, params, step, bad)
        if by_hand:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        assert bool(optimizer.step_was_skipped) is bad
        scaler.update()
    optimizer.step()
    assert not optimizer.step_was_skipped


class Returning:
    """Its step has a keyword of its own, and returns it."""

    def step(self, closure: Any = None, *, times: int = 1) -> int:
        super().step(closure)  # type: ignore[misc]
        return times


@each_scaler
def test_result_and_arguments_of_step(scaler_cls: type) -> None:
    """What the step returned, None where it was skipped; a keyword of one's own gets through."""
    params = make_params(SHAPES)
    optimizer = type("Counting", (Returning, optimx.AdamW), {})(params)
    scaler, results = new_scaler(scaler_cls), []
    for step, bad in enumerate(BAD_STEPS):
        set_scaled_grads(scaler, params, step, bad)
        results.append(scaler.step(optimizer, **({"times": step} if step else {})))
        scaler.update()
    assert results == [1, None, 2, 3]


@each_scaler
@pytest.mark.parametrize("fused", [None, True], ids=["default", "fused"])
@each_fused_case
def test_closure(case: Case, fused: bool | None, scaler_cls: type) -> None:
    """A positional one is called as torch calls it: after the search, and not where that found something."""

    def run(cls: type, scaler: torch.amp.GradScaler) -> tuple[list[Any], list[bool], Any]:
        params = make_params(SHAPES)
        optimizer = cls(params, **usual(case), fused=fused)
        results, was_scaled = [], []

        def closure() -> float:
            was_scaled.append(float(params[-1].grad.norm()) > SCALE / 4)
            return float(len(was_scaled))

        for step, bad in enumerate(BAD_STEPS):
            set_scaled_grads(scaler, params, step, bad)
            results.append(scaler.step(optimizer, closure))
            scaler.update()
        return results, was_scaled, optimizer

    results, was_scaled, ours = run(case.cls, new_scaler(scaler_cls))
    stock_results, stock_was_scaled, stock = run(case.stock, new_scaler(torch.amp.GradScaler))
    assert results == stock_results == ([1.0, 2.0, 3.0, 4.0] if fused else [1.0, None, 2.0, 3.0])
    assert was_scaled == stock_was_scaled == [bool(fused)] * len(was_scaled)
    assert_same(ours, stock)


def torchs_scheduler(optimizer: torch.optim.Optimizer) -> Any:
    return StepLR(optimizer, 100)


def our_scheduler(optimizer: torch.optim.Optimizer) -> Any:
    return optimx.lr_scheduler.WarmupCosineLR(optimizer, 2, 10)


@pytest.mark.parametrize("fused", [None, True], ids=["default", "fused"])
@pytest.mark.parametrize("scheduler_cls", [None, our_scheduler, torchs_scheduler])
@each_case
def test_fast_path(case: Case, scheduler_cls: Any, fused: bool | None, device: torch.device) -> None:
    """Gradients are neither unscaled nor written, but while a scheduler of torch's waits for the first step."""
    if fused and not case.has("fused"):
        pytest.skip("there is no such argument")
    params = make_params(SHAPES, device)
    optimizer = case.cls(params, **usual(case, lr=0.01), **({"fused": True} if fused else {}))
    scheduler = scheduler_cls and scheduler_cls(optimizer)
    scaler, untouched = new_scaler(optimx.GradScaler, device), []
    for step, bad in enumerate(BAD_STEPS):
        set_scaled_grads(scaler, params, step, bad)
        before = [(p.grad.clone(), p.grad._version) for p in params]
        scaler.step(optimizer)
        scaler.update()
        if scheduler:
            scheduler.step()
        untouched.append(
            all(torch.equal(p.grad, grad) and p.grad._version == v for p, (grad, v) in zip(params, before, strict=True))
        )
    waits = scheduler_cls is torchs_scheduler and not fused
    assert untouched[1:] == [True] * 3
    assert untouched[0] is not waits
    assert ("_step_supports_amp_scaling" in vars(optimizer)) is bool(fused)


@interpreted
def test_fast_path_when_nobody_looks_any_more(device: torch.device) -> None:
    params = make_params(SHAPES, device)
    optimizer = optimx.AdamW(params)
    scaler, untouched = new_scaler(optimx.GradScaler, device), []
    for hooks in (0, 1, 0):
        handles = [optimizer.register_step_pre_hook(lambda *_: None) for _ in range(hooks)]
        set_scaled_grads(scaler, params, hooks, bad=False)
        before = [p.grad.clone() for p in params]
        scaler.step(optimizer)
        scaler.update()
        untouched.append(all(torch.equal(p.grad, grad) for p, grad in zip(params, before, strict=True)))
        for handle in handles:
            handle.remove()
    assert untouched == [True, False, True]


def test_nothing_is_left_of_a_step_that_raises() -> None:
    """No claim to unscale, above all: the next step may be one with torch's scaler."""
    params = make_params(SHAPES)
    optimizer = optimx.AdamW(params)
    scaler = new_scaler(optimx.GradScaler)
    set_scaled_grads(scaler, params, 0, bad=False)
    optimizer.param_groups[0]["lr"] = object()
    with pytest.raises(TypeError):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


@pytest.mark.parametrize("skipped", [False, True], ids=["taken", "skipped"])
@each_scaler
def test_warning_of_a_scheduler_stepped_first(scaler_cls: type, skipped: bool) -> None:
    """Torch's schedulers ask whether the first step was taken. They hear what they hear of stock."""

    def heard(cls: type[torch.optim.Optimizer], scaler: torch.amp.GradScaler) -> list[str]:
        params = make_params(SHAPES)
        optimizer = cls(params)
        scheduler = ExponentialLR(optimizer, 0.5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(2):
                set_scaled_grads(scaler, params, step, skipped and step == 0)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
        return [str(warning.message) for warning in caught]

    ours = heard(optimx.AdamW, new_scaler(scaler_cls))
    assert ours == heard(torch.optim.AdamW, new_scaler(torch.amp.GradScaler))
    assert [text[:45] for text in ours] == ["Detected call of `lr_scheduler.step()` before"] * skipped


@each_scaler
@pytest.mark.filterwarnings("ignore")
def test_accelerate_is_told(scaler_cls: type) -> None:
    """Its scheduler does not go on after a step that was skipped."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)

    def run(cls: type[torch.optim.Optimizer], scaler: torch.amp.GradScaler) -> list[tuple[bool, float, float]]:
        params = make_params(SHAPES)
        inner = cls(params, lr=1.0)
        optimizer = accelerate.optimizer.AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)
        scheduler = accelerate.scheduler.AcceleratedScheduler(ExponentialLR(inner, 0.5), optimizer)
        record = []
        for step, bad in enumerate([True, *BAD_STEPS]):
            set_scaled_grads(scaler, params, step, bad)
            optimizer.step()
            scheduler.step()
            record.append((optimizer.step_was_skipped, inner.param_groups[0]["lr"], scaler.get_scale()))
        return record

    ours = run(optimx.AdamW, new_scaler(scaler_cls))
    assert ours == run(torch.optim.AdamW, new_scaler(torch.amp.GradScaler))
    assert [skipped for skipped, _, _ in ours] == [True, *BAD_STEPS]
    assert [lr for _, lr, _ in ours] == [1.0, 0.5, 0.5, 0.25, 0.125]


def fit(optimizer_cls: type, scaler: torch.amp.GradScaler, clip: float | None, **kwargs: Any) -> Tensor:
    """Weights after an epoch with Lightning, in 16-bit mixed precision; the second batch is infinite."""
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            (self.weight,) = map(Parameter, make_params([(3,)]))

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return (batch[0] @ self.weight).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_cls(self.parameters(), lr=0.1, **kwargs)

    rows = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    rows[2] = torch.inf
    module = Module()
    precision = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, plugins=[precision], gradient_clip_val=clip, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(rows), batch_size=2))
    return module.weight.detach()


@pytest.mark.parametrize("clip", [None, 0.5], ids=["plain", "gradient_clip_val"])
@each_scaler
@pytest.mark.filterwarnings("ignore")
def test_lightning(scaler_cls: type, clip: float | None) -> None:
    scaler, torchs = new_scaler(scaler_cls), new_scaler(torch.amp.GradScaler)
    ours, stock = fit(optimx.SGD, scaler, clip), fit(torch.optim.SGD, torchs, clip)
    torch.testing.assert_close(ours, stock, rtol=1e-6, atol=0.0)
    assert ours.isfinite().all()
    assert scaler.get_scale() == torchs.get_scale() == SCALE / 2


@each_scaler
@pytest.mark.filterwarnings("ignore")
def test_lightning_clips_no_fused_optimizer(scaler_cls: type) -> None:
    """As it refuses to with stock."""
    for cls in (torch.optim.AdamW, optimx.AdamW):
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            fit(cls, new_scaler(scaler_cls), 0.5, fused=True)
