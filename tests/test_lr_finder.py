"""The learning-rate finder: what it measures, and that nothing tells afterwards that it was there."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import optimx
from optimx import LRCurve, lr_find
from optimx.lr_scheduler import Cosine, ScheduleLR, Warmup
from tests.cases import CASES, Case

SHORT: dict[str, Any] = {"low": 1e-5, "high": 1e-2, "steps": 25}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """With all that training changes beside parameters: statistics, a buffer that is replaced, random numbers."""

    counted: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(8, 2)
        self.register_buffer("counted", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.counted = self.counted + random.random() + float(numpy.random.rand())
        return self.last(self.drop(self.norm(self.first(x)).relu()))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 4), torch.randint(2, (6,))


def loss_of(model: nn.Module, of: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(of[0]), of[1])


def closure_of(model: nn.Module) -> Callable[[], Tensor]:
    """Of random batches."""
    return lambda: loss_of(model, batch())


def train(model: nn.Module, optimizer: Optimizer, steps: int = 3, scheduler: Any = None, scaler: Any = None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch())
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if scheduler is not None:
            scheduler.step()


def seed_all() -> None:
    torch.manual_seed(5)
    random.seed(5)
    numpy.random.seed(5)


def held(value: Any) -> Any:
    """A copy to compare with: tensors cloned, objects that are neither data nor containers by their identity."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Optimizer):
        return held(vars(value))
    if isinstance(value, dict):
        return {key: held(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [held(item) for item in value]
    return value


def assert_equal(mine: Any, theirs: Any) -> None:
    if isinstance(mine, Tensor):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    elif isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert_equal(mine[key], theirs[key])
    elif isinstance(mine, list):
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            assert_equal(one, other)
    else:
        assert mine == theirs


def everything(model: nn.Module, optimizer: Optimizer) -> Any:
    """All that a sweep might change."""
    buffers = dict(model.named_buffers())
    return held(
        {
            "params": dict(model.named_parameters()),
            "grads": {name: p.grad for name, p in model.named_parameters()},
            "buffers": buffers,
            "modes": {name: module.training for name, module in model.named_modules()},
            "optimizer": optimizer,
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": numpy.random.get_state()[1].tolist(),
        }
    )


def tensors_of(model: nn.Module, optimizer: Optimizer) -> list[int]:
    """Ids of what plans and graphs hold."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    rates = [group["lr"] for group in optimizer.param_groups]
    return [id(one) for one in (*model.parameters(), *model.buffers(), *states, *rates, *optimizer.param_groups)]


# what is put back


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_goes_on_as_if_nothing_had_been(case: Case, used: bool) -> None:
    """Bit by bit, with every optimizer and with torch's own of that name."""
    for make in (case.cls, case.stock)[: 1 + case.is_torchs]:
        results = []
        for swept in (False, True):
            model = net()
            optimizer = make(model.parameters(), lr=1e-3)
            seed_all()
            if used:
                train(model, optimizer)
            before, ids = everything(model, optimizer), tensors_of(model, optimizer)
            if swept:
                curve = lr_find(model, optimizer, closure_of(model), **SHORT)
                assert len(curve.losses) == 25
                assert_equal(everything(model, optimizer), before)
                assert tensors_of(model, optimizer) == ids
            train(model, optimizer, 4)
            results.append(everything(model, optimizer)["params"])
        assert_equal(*results)


class Interruption(BaseException):
    """As KeyboardInterrupt, no Exception."""


@pytest.mark.parametrize("error", [ValueError, Interruption])
@pytest.mark.parametrize("at", [1, 12])
def test_also_after_an_exception(error: type[BaseException], at: int) -> None:
    model = net()
    optimizer = optimx.AdamW(model.parameters(), lr=torch.tensor(1e-3), max_grad_norm=1.0)
    seed_all()
    train(model, optimizer)
    model.norm.eval()
    before, ids = everything(model, optimizer), tensors_of(model, optimizer)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        model.train()
        # whoever writes into the groups himself
        optimizer.param_groups[0]["betas"] = (0.1, 0.2)
        optimizer.param_groups[0]["mark"] = calls
        if calls == at:
            raise error("here")
        return loss_of(model, batch())

    with pytest.raises(error, match="here"):
        lr_find(model, optimizer, closure, **SHORT)
    assert_equal(everything(model, optimizer), before)
    assert tensors_of(model, optimizer) == ids
    assert not model.norm.training
    assert model.training


def test_gradients_are_the_ones_of_before() -> None:
    model = net()
    optimizer = optimx.SGD([*model.first.parameters()], lr=0.1)
    loss_of(model, batch()).backward()
    grads = [p.grad for p in model.parameters()]
    values = held(grads)
    lr_find(model, optimizer, closure_of(model), **SHORT)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert_equal(held(grads), values)


def test_parameters_that_the_optimizer_has_not() -> None:
    """Those of the model that others change, and the optimizer's that are not the model's."""
    model, temperature = net(), nn.Parameter(torch.ones(()))
    optimizer = optimx.SGD([*model.first.parameters(), temperature], lr=0.1)

    def closure() -> Tensor:
        with torch.no_grad():
            model.last.bias.add_(1.0)
        return loss_of(model, batch()) * temperature

    before = everything(model, optimizer)
    lr_find(model, optimizer, closure, **SHORT)
    assert_equal(everything(model, optimizer), before)
    assert temperature.item() == 1.0
    assert temperature.grad is None


def test_a_composite() -> None:
    """Groups of both members rise, and both are put back."""
    model = net()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    optimizer = optimx.Composite(
        {"muon": optimx.Muon(matrices, lr=0.02), "adamw": torch.optim.AdamW(rest, lr=5e-3)}, max_grad_norm=1.0
    )
    seed_all()
    train(model, optimizer, 1)
    before = everything(model, optimizer)
    seen = []
    model.last.register_forward_pre_hook(lambda *_: seen.append([group["lr"] for group in optimizer.param_groups]))
    curve = lr_find(model, optimizer, closure_of(model), **SHORT)
    model.last._forward_pre_hooks.clear()
    assert curve.ratios == [1.0, 0.25]
    assert seen[0] == pytest.approx([1e-5, 2.5e-6])
    assert seen[-1] == pytest.approx([1e-2, 2.5e-3])
    assert_equal(everything(model, optimizer), before)


@pytest.mark.parametrize("settings", [
    {"param_rounding": "stochastic"}, {"param_rounding": "remainder16", "state_dtype": "8bit"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("make", [optimx.SGD, optimx.AdamW])
@pytest.mark.filterwarnings("ignore:exp_avg_sq in bfloat16")
def test_other_ways_to_keep_numbers(make: Any, settings: dict[str, Any]) -> None:
    results = []
    for swept in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(128, 64).bfloat16()
        momentum = {"momentum": 0.9} if make is optimx.SGD else {}
        optimizer = make(model.parameters(), lr=1e-2, **momentum, **settings)

        def closure(model: nn.Module = model) -> Tensor:
            return model(torch.randn(4, 128).bfloat16()).float().square().mean()

        for step in range(4):
            if swept and step == 2:
                before = held(optimizer)
                lr_find(model, optimizer, closure, **SHORT)
                assert_equal(held(optimizer), before)
            optimizer.zero_grad()
            closure().backward()
            optimizer.step()
        results.append(held([*model.parameters()]))
    assert_equal(*results)


# what is attached


def averaged(model: nn.Module) -> Any:
    return torch.optim.swa_utils.AveragedModel(model, use_buffers=True)


@pytest.mark.parametrize("attach", [
    lambda opt: ScheduleLR(opt, Warmup(4) >> Cosine(20)),
    lambda opt: torch.optim.lr_scheduler.StepLR(opt, 3, 0.5),
    lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, 50),
    lambda opt: optimx.lr_scheduler.PlateauWithWarmup(opt, 4),
], ids=["ScheduleLR", "StepLR", "OneCycleLR", "Plateau"])  # fmt: skip
@pytest.mark.parametrize("stepped", [False, True], ids=["left alone", "stepped by the closure"])
def test_attached_schedulers_go_on_where_they_were(attach: Callable[[Optimizer], Any], stepped: bool) -> None:
    rates, ends = [], []
    for swept in (False, True):
        model = net()
        optimizer = optimx.AdamW(model.parameters(), lr=1e-3)
        scheduler = attach(optimizer)
        plateau = (1.0,) if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else ()
        seed_all()
        train(model, optimizer, 2)
        scheduler.step(*plateau)

        def closure(model: nn.Module = model, scheduler: Any = scheduler, plateau: Any = plateau) -> Tensor:
            if stepped:
                scheduler.step(*plateau)
            return loss_of(model, batch())

        if swept:
            before = held(scheduler.state_dict())
            lr_find(model, optimizer, closure, also=[scheduler], **SHORT)
            assert_equal(held(scheduler.state_dict()), before)
        rates.append([])
        for _ in range(6):
            train(model, optimizer, 1)
            scheduler.step(*plateau)
            rates[-1].append(float(optimizer.param_groups[0]["lr"]))
        ends.append(held([*model.parameters()]))
    assert rates[0] == rates[1]
    assert_equal(*ends)


def test_keys_that_the_sweep_adds_are_gone() -> None:
    """torch's next scheduler would take ``initial_lr`` for the learning rate."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    lr_find(model, optimizer, closure_of(model), **SHORT)
    assert "initial_lr" not in optimizer.param_groups[0]
    assert torch.optim.lr_scheduler.StepLR(optimizer, 3).base_lrs == [0.5]


def test_averages_and_generators() -> None:
    model = net()
    optimizer = optimx.AdamW(model.parameters(), lr=1e-3)
    average = averaged(model)
    generator = torch.Generator().manual_seed(3)
    before = held(average.state_dict()), generator.get_state()

    def closure() -> Tensor:
        average.update_parameters(model)
        return loss_of(model, (torch.randn(6, 4, generator=generator), torch.randint(2, (6,))))

    lr_find(model, optimizer, closure, also=[average, generator], **SHORT)
    assert_equal((held(average.state_dict()), generator.get_state())[0], before[0])
    assert torch.equal(generator.get_state(), before[1])
    assert average.n_averaged == 0


# gradient scaling


@pytest.mark.parametrize("make_scaler", [torch.amp.GradScaler, optimx.GradScaler], ids=["torch", "optimx"])
@pytest.mark.parametrize("fused", [False, True])
def test_scalers(make_scaler: Any, fused: bool) -> None:
    """The same losses as without, and a scaler that has seen nothing."""
    curves, ends = [], []
    for scaled in (False, True):
        model = net()
        optimizer = optimx.AdamW(model.parameters(), lr=1e-3, fused=fused or None)
        scaler = make_scaler("cpu", init_scale=1024.0) if scaled else None
        seed_all()
        train(model, optimizer, 2, scaler=scaler)
        before = copy.deepcopy(scaler.state_dict()) if scaled else None
        curves.append(lr_find(model, optimizer, closure_of(model), scaler=scaler, **SHORT))
        assert not scaled or scaler.state_dict() == before
        train(model, optimizer, 2, scaler=scaler)
        ends.append([p.detach() for p in model.parameters()])
    assert curves[1].losses == pytest.approx(curves[0].losses, rel=1e-5)
    torch.testing.assert_close(ends[1], ends[0])


def test_a_scaler_of_an_interrupted_step_steps_again() -> None:
    model = net()
    optimizer = optimx.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu")

    def fail(*_: Any) -> None:
        raise ValueError("between step and update")

    handle = optimizer.register_step_post_hook(fail)
    with pytest.raises(ValueError, match="between"):
        lr_find(model, optimizer, closure_of(model), scaler=scaler, **SHORT)
    handle.remove()
    train(model, optimizer, 2, scaler=scaler)


@pytest.mark.parametrize("make_scaler", [torch.amp.GradScaler, optimx.GradScaler], ids=["torch", "optimx"])
def test_skipped_steps_are_taken_again(make_scaler: Any) -> None:
    """Every learning rate has had its update."""
    model = nn.Linear(3, 1)
    optimizer = optimx.SGD(model.parameters(), lr=1.0)
    tried = []

    def closure() -> Tensor:
        tried.append(optimizer.param_groups[0]["lr"])
        return 256.0 * model(torch.ones(2, 3)).square().mean()

    scaler = make_scaler("cpu", init_scale=2.0**127)
    curve = lr_find(model, optimizer, closure, scaler=scaler, low=1e-9, high=1e-6, steps=25)
    assert len(curve.losses) == 25
    # the loss becomes finite after some halvings of the scale
    skipped = len(tried) - 25
    assert skipped >= 5
    assert tried == pytest.approx([curve.lrs[0]] * skipped + curve.lrs)


def test_gradients_that_no_scale_makes_finite_end_the_sweep() -> None:
    model = nn.Linear(3, 1)
    optimizer = optimx.SGD(model.parameters(), lr=1.0)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = model(torch.ones(2, 3)).square().mean()
        if calls > 3:
            loss.register_hook(lambda grad: grad * math.inf)
        return loss

    curve = lr_find(model, optimizer, closure, scaler=torch.amp.GradScaler("cpu"), **SHORT)
    assert len(curve.losses) == 3
    assert "no scale" in str(curve)


# the sweep


@pytest.mark.parametrize("shape", ["exponential", "linear"])
def test_rates(shape: str) -> None:
    """The learning rate of the step whose loss stands beside it; a group keeps its ratio, also one of zero."""
    model = net()
    groups = [{"params": model.first.parameters(), "lr": 1e-3}, {"params": model.last.parameters(), "lr": 4e-3},
              {"params": model.norm.parameters(), "lr": 0.0}]  # fmt: skip
    optimizer = optimx.AdamW(groups)
    rates = []
    optimizer.register_step_pre_hook(lambda opt, *_: rates.append([group["lr"] for group in opt.param_groups]))
    curve = lr_find(model, optimizer, closure_of(model), shape=shape, **SHORT)
    parts = [step / 24 for step in range(25)]
    expected = {"exponential": [1e-5 * 1e3**x for x in parts], "linear": [1e-5 + 0.00999 * x for x in parts]}[shape]
    assert curve.lrs == pytest.approx(expected)
    assert curve.ratios == [0.25, 1.0, 0.0]
    assert rates == [pytest.approx(curve.group_lrs(lr)) for lr in expected]


def test_ratios_are_those_of_initial_lr() -> None:
    """At the beginning of a warmup all learning rates may be zero."""
    model = net()
    optimizer = optimx.AdamW([{"params": model.first.parameters(), "lr": 1e-3}, {"params": model.last.parameters()}])
    optimizer.param_groups[1]["lr"] = 2e-3
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert [group["lr"] for group in optimizer.param_groups] == [0, 0]
    assert lr_find(model, optimizer, closure_of(model), **SHORT).ratios == [0.5, 1.0]


def test_losses_are_those_of_a_plain_loop() -> None:
    curve = None
    losses = []
    for swept in (True, False):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
        seed_all()
        if swept:
            curve = lr_find(model, optimizer, closure_of(model), **SHORT)
            continue
        for step in range(25):
            optimizer.param_groups[0]["lr"] = 1e-5 * 1e3 ** (step / 24)
            optimizer.zero_grad()
            loss = loss_of(model, batch())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert curve is not None
    assert curve.losses == pytest.approx(losses, rel=1e-6)
    assert curve.stopped is None


def test_gradients_are_on_also_where_they_were_off() -> None:
    model = net()
    optimizer = optimx.AdamW(model.parameters())
    with torch.no_grad():
        assert len(lr_find(model, optimizer, closure_of(model), **SHORT).losses) == 25
        assert not torch.is_grad_enabled()


def test_accumulation_is_a_larger_batch() -> None:
    x, y = torch.randn(8, 4), torch.randint(2, (8,))
    curves = []
    for parts in (1, 4):
        torch.manual_seed(1)
        model = nn.Linear(4, 2)
        optimizer = optimx.SGD(model.parameters(), lr=1.0)
        loader = [*zip(x.chunk(parts), y.chunk(parts), strict=True)]
        curves.append(lr_find(model, optimizer, loader=loader, loss_fn=loss_of, accumulate=parts, **SHORT))
    assert curves[1].losses == pytest.approx(curves[0].losses, rel=1e-5)


@pytest.mark.parametrize(("planted", "told", "length"), [
    (100.0, "above 4 times its best", 14), (math.nan, "not finite", 13), (math.inf, "not finite", 13),
])  # fmt: skip
def test_it_stops(planted: float, told: str, length: int) -> None:
    """At the step itself, though it is seen some steps later."""
    model = nn.Linear(3, 1)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return model(torch.zeros(1, 3)).square().mean() * 0 + (planted * 100 if calls == 14 else 1.0)

    curve = lr_find(model, optimx.SGD(model.parameters(), lr=1.0), closure, **{**SHORT, "steps": 60})
    assert calls == 20
    assert len(curve.losses) == len(curve.lrs) == length
    assert curve.steps == 60
    assert told in str(curve)


def test_nobody_waits_for_a_single_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for whether it is finite."""
    counted = dict.fromkeys(("item", "tolist", "__bool__", "__float__"), 0)

    def counting(name: str) -> Callable[..., Any]:
        real = getattr(Tensor, name)

        def called(self: Tensor, *args: Any) -> Any:
            counted[name] += 1
            return real(self, *args)

        return called

    model = nn.Linear(3, 1)
    # no step counts, which lie on the host
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, foreach=True)
    for name in counted:
        monkeypatch.setattr(Tensor, name, counting(name))
    lr_find(model, optimizer, lambda: model(torch.ones(1, 3)).square().mean(), **{**SHORT, "steps": 40})
    assert counted == {"item": 0, "tolist": 4, "__bool__": 0, "__float__": 0}


# batches


def loader_of(workers: int = 0, **options: Any) -> DataLoader:
    torch.manual_seed(2)
    data = TensorDataset(torch.randn(10, 4), torch.randint(2, (10,)))
    return DataLoader(data, batch_size=5, num_workers=workers, **options)


def test_a_loader_starts_over_and_is_not_touched() -> None:
    generator = torch.Generator().manual_seed(1)
    loader = loader_of(shuffle=True, generator=generator)
    model = net()
    state = generator.get_state()
    first = [x for x, _ in loader]
    generator.set_state(state)
    ahead = iter(loader)
    seen = [next(ahead)[0]]
    after = generator.get_state()
    curve = lr_find(model, optimx.AdamW(model.parameters()), loader=loader, loss_fn=loss_of, **SHORT)
    assert len(curve.losses) == 25
    assert torch.equal(generator.get_state(), after)
    seen += [x for x, _ in ahead]
    assert_equal(seen, first)


def test_workers_that_persist_go_on() -> None:
    loader = loader_of(1, persistent_workers=True)
    ahead = iter(loader)
    seen = [next(ahead)[0]]
    model = net()
    lr_find(model, optimx.AdamW(model.parameters()), loader=loader, loss_fn=loss_of, **{**SHORT, "steps": 4})
    seen += [x for x, _ in ahead]
    assert_equal(torch.cat(seen), loader.dataset.tensors[0])  # type: ignore[attr-defined]


# bad input


def one_shot() -> Iterator[Any]:
    yield batch()


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "nothing": ({"closure": None}, ValueError, "closure, or loader and loss_fn, but has: none"),
    "both": ({"loader": [1], "loss_fn": loss_of}, ValueError, "but has: closure, loader, loss_fn"),
    "no loss": ({"closure": None, "loader": [1]}, ValueError, "but has: loader"),
    "iterator": ({"closure": None, "loader": one_shot(), "loss_fn": loss_of}, ValueError, "should start over"),
    "empty": ({"closure": None, "loader": [], "loss_fn": loss_of}, ValueError, "one batch or more but has none"),
    "model": ({"model": 3}, TypeError, "model should be a torch.nn.Module but is: int"),
    "optimizer": ({"optimizer": 3}, TypeError, "optimizer should be a torch.optim.Optimizer but is: int"),
    "low": ({"low": 0}, ValueError, "low should be > 0 but is: 0"),
    "order": ({"low": 1.0, "high": 1.0}, ValueError, "low should be < 1.0, which is high, but is: 1.0"),
    "high": ({"high": math.inf}, ValueError, "high should be >= 0 and finite but is: inf"),
    "steps": ({"steps": 1}, ValueError, "steps should be >= 2 but is: 1"),
    "some steps": ({"steps": 2.5}, TypeError, "steps should be a whole number but is: 2.5"),
    "shape": ({"shape": "lineal"}, ValueError, "did you mean 'linear'?"),
    "accumulate": ({"accumulate": 0}, ValueError, "accumulate should be >= 1 but is: 0"),
    "stop": ({"stop": 1}, ValueError, "stop should be > 1 but is: 1"),
    "also": ({"also": [3]}, TypeError, r"also\[0\] should have state_dict and load_state_dict but is: 3"),
    "number": ({"closure": lambda: 3.0}, TypeError, "the loss should be a tensor that needs gradients but is: 3.0"),
    "detached": ({"closure": lambda: torch.ones(())}, TypeError, "needs gradients but is: 1.0"),
    "vector": (
        {"closure": lambda: torch.ones(3, requires_grad=True)}, ValueError, "should have one element but has: 3"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    arguments, error, message = BAD[name]
    model = net()
    optimizer = optimx.AdamW(model.parameters())
    before = everything(model, optimizer)
    with pytest.raises(error, match=message):
        lr_find(**{"model": model, "optimizer": optimizer, "closure": closure_of(model), **SHORT, **arguments})
    assert_equal(everything(model, optimizer), before)


@pytest.mark.parametrize(("make", "message"), [
    (lambda p: torch.optim.LBFGS(p), "should need no closure to step but is: LBFGS"),
    (lambda p: optimx.SGD(p, lr=0.0), "should be > 0 but all are: 0"),
])  # fmt: skip
def test_optimizers_that_have_no_sweep(make: Any, message: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=message):
        lr_find(model, make(model.parameters()), closure_of(model))


# what comes out


def test_the_table_has_every_rule() -> None:
    lrs = [1e-7 * 1e8 ** (step / 99) for step in range(100)]
    curve = LRCurve(lrs, [1 / (1 + lr * 100) + lr**2 for lr in lrs], 100, [1.0, 0.5])
    lines = str(curve).splitlines()
    assert lines[0].startswith("100 of 100 steps, lr 1e-07 to 10, least smoothed loss 0.")
    assert [line.split()[0] for line in lines[1:]] == ["rule", *curve.suggestions]
    assert [float(line.split()[1]) for line in lines[2:]] == pytest.approx([*curve.suggestions.values()], rel=5e-3)
    assert curve.group_lrs(0.2) == [0.2, 0.1]
    assert curve.to_dict()["suggestions"] == curve.suggestions
    short = LRCurve(lrs[:3], [1.0, 1.0, 9.0], 100, [1.0], "it exploded")
    assert {*short.suggestions.values()} == {None}
    assert str(short).splitlines()[0].endswith("; stopped: it exploded")
    assert "-" in str(short)


def test_pictures(tmp_path: Any) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    lrs = [1e-7 * 1e8 ** (step / 99) for step in range(100)]
    curve = LRCurve(lrs, [1 / (1 + lr * 100) + lr**2 for lr in lrs], 100, [1.0])
    axes = figures.Figure().add_subplot()
    curve.plot(axes)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert all(any(name in label for label in labels) for name in curve.suggestions)
    assert axes.get_xscale() == "log"
    curve.plot(tmp_path / "lr.png")
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="one or more"):
        LRCurve([], [], 10, [1.0]).plot(tmp_path / "none.png")
