"""ScheduleLR: every value a function of the step, however it was come by; and what stands in its way is said."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler as torchs

import optimx
from optimx.lr_scheduler import (
    Absolute,
    Constant,
    Cosine,
    Exponential,
    Hold,
    InverseSqrt,
    Linear,
    MultiStep,
    OneCycle,
    Restarts,
    Schedule,
    ScheduleLR,
    Warmup,
)
from tests.training import LRS, each_order, make_optimizer, resume_documented, resume_scheduler_only, save, train

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

SCHEDULES: dict[str, Schedule] = {
    "cosine": Warmup(3) >> Cosine(7, 0.1),
    "absolute": Warmup(3, start=Absolute(0.01)) >> Linear(7, Absolute(0.02)),
    "wsd": Warmup(2) >> Hold(4) >> Linear(5),
    "inverse-sqrt": Warmup(4) >> InverseSqrt(2),
    "restarts": Warmup(2) >> Restarts(Cosine(3), mult=2, peak_decay=0.5),
    "multi-step": MultiStep((3, 6)),
    "one-cycle": OneCycle(12),
    "product": (Warmup(3) >> Hold()) * Exponential(0.9),
}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def approx(numbers: list[float]) -> Any:
    return pytest.approx(numbers)


def expected(schedule: Schedule, steps: int, lrs: list[float] | None = None, start: int = 0) -> list[Any]:
    own = LRS if lrs is None else lrs
    return [pytest.approx([schedule.value(step, lr) for lr in own]) for step in range(start, start + steps)]


@each_schedule
def test_every_step_has_its_value(schedule: Schedule) -> None:
    optimizer = make_optimizer()
    scheduler = ScheduleLR(optimizer, schedule)
    assert isinstance(scheduler, torchs.LRScheduler)
    assert train(optimizer, scheduler, 20) == expected(schedule, 20)
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups] == scheduler.get_lr()
    assert scheduler.base_lrs == LRS


def test_groups_keep_their_ratio() -> None:
    optimizer = make_optimizer(cls=optimx.AdamW)
    for low, high in train(optimizer, ScheduleLR(optimizer, SCHEDULES["cosine"]), 12):
        assert low / high == pytest.approx(0.1)


# resuming, in the four orders


@each_order
@each_schedule
def test_resume_at_every_step(schedule: Schedule, order: Any) -> None:
    optimizer = make_optimizer()
    scheduler = ScheduleLR(optimizer, schedule)
    for done in range(14):
        resumed = order(lambda opt: ScheduleLR(opt, schedule), save(optimizer, scheduler))
        assert train(*resumed, 5) == expected(schedule, 5, start=done)
        train(optimizer, scheduler, 1)


@each_schedule
def test_resume_by_last_epoch(schedule: Schedule) -> None:
    """The fourth order: the scheduler is not saved, the optimizer brings the base values."""
    optimizer = make_optimizer()
    scheduler = ScheduleLR(optimizer, schedule)
    for done in range(14):
        new = make_optimizer()
        new.load_state_dict(optimizer.state_dict())
        assert train(new, ScheduleLR(new, schedule, last_epoch=done - 1), 5) == expected(schedule, 5, start=done)
        train(optimizer, scheduler, 1)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.integers(0, 20), st.lists(st.integers(0, 40), max_size=5), st.sampled_from(sorted(SCHEDULES)))
def test_random_access_equals_stepping(steps: int, jumps: list[int], name: str) -> None:
    optimizer = make_optimizer()
    scheduler = ScheduleLR(optimizer, SCHEDULES[name])
    train(optimizer, scheduler, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for jump in jumps:
            scheduler.step(jump)
            assert [scheduler.get_last_lr()] == expected(SCHEDULES[name], 1, start=jump)


@each_schedule
def test_between_two_steps(schedule: Schedule) -> None:
    optimizer = make_optimizer()
    scheduler = ScheduleLR(optimizer, schedule)
    for epoch in (0.25, 1.5, 2.0, 3.75, 0.5):
        scheduler.step(epoch)
        assert scheduler.get_last_lr() == pytest.approx([schedule.value(epoch, lr) for lr in LRS])
    scheduler.step()
    assert scheduler.last_epoch == 1.5
    scheduler.step(2.0)
    assert type(scheduler.last_epoch) is int


def test_preview_touches_nothing() -> None:
    optimizer = make_optimizer()
    scheduler = ScheduleLR(optimizer, SCHEDULES["cosine"])
    train(optimizer, scheduler, 3)
    optimizer.add_param_group({"params": [Parameter(torch.zeros(1))], "lr": 0.5})
    before = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
    state = scheduler.state_dict()
    assert scheduler.preview(12) == expected(SCHEDULES["cosine"], 12, [*LRS, 0.5])
    assert scheduler.preview(2, start=5) == expected(SCHEDULES["cosine"], 2, [*LRS, 0.5], start=5)
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == before
    assert scheduler.state_dict() == state


def test_one_schedule_a_group() -> None:
    schedules = [Constant(0.5), Linear(10)]
    optimizer = make_optimizer()
    scheduler = ScheduleLR(optimizer, schedules)
    assert train(optimizer, scheduler, 4) == [pytest.approx([0.05, 1 - step / 10]) for step in range(4)]
    saved = save(optimizer, scheduler)
    optimizer, scheduler = resume_scheduler_only(lambda opt: ScheduleLR(opt, schedules), saved)
    assert train(optimizer, scheduler, 1) == [pytest.approx([0.05, 0.6])]
    optimizer.add_param_group({"params": [Parameter(torch.zeros(1))], "lr": 1.0})
    with pytest.raises(ValueError, match="one for each of the 3 param_groups, but are: 2"):
        scheduler.step()


# other fields


@each_order
def test_weight_decay_and_betas(order: Any) -> None:
    fields = {"lr": Linear(10), "weight_decay": Linear(10, 0.5), "momentum": Warmup(5, start=0.5), "betas[1]": Hold()}

    def make(optimizer: Any) -> ScheduleLR:
        return ScheduleLR(optimizer, fields)

    options: Any = {"weight_decay": 0.2, "betas": (0.8, 0.99)}
    optimizer = make_optimizer(**options)
    scheduler = make(optimizer)
    train(optimizer, scheduler, 3)
    optimizer, scheduler = order(make, save(optimizer, scheduler), **options)
    for group, lr in zip(optimizer.param_groups, LRS, strict=True):
        assert group["lr"] == pytest.approx(lr * 0.7)
        assert group["weight_decay"] == pytest.approx(0.2 * 0.85)
        assert group["betas"] == (pytest.approx(0.8 * (0.5 + 0.5 * 3 / 4)), 0.99)
    train(optimizer, scheduler, 10)
    assert [group["betas"] for group in optimizer.param_groups] == [(pytest.approx(0.8), 0.99)] * 2
    assert scheduler.preview(1, 10, "weight_decay") == [pytest.approx([0.1, 0.1])]
    assert set(scheduler.schedule) == {"lr", "weight_decay", "betas[0]", "betas[1]"}


def test_momentum_of_sgd_alone() -> None:
    optimizer = make_optimizer(cls=torch.optim.SGD, momentum=0.9)
    scheduler = ScheduleLR(optimizer, {"momentum": Warmup(2, start=0.5)})
    train(optimizer, scheduler, 1)
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]
    assert scheduler.get_last_lr() == scheduler.get_lr() == LRS
    resumed, again = resume_scheduler_only(
        lambda opt: ScheduleLR(opt, {"lr": Constant()}), {"scheduler": ScheduleLR(optimizer, Constant()).state_dict()}
    )
    assert again.get_last_lr() == LRS == [group["lr"] for group in resumed.param_groups]


# what the optimizer may be


def test_tensor_lr_is_updated_in_place() -> None:
    lr = torch.tensor(0.5)
    optimizer = make_optimizer([lr, 1.0])
    scheduler = ScheduleLR(optimizer, SCHEDULES["cosine"])
    train(optimizer, scheduler, 5)
    assert optimizer.param_groups[0]["lr"] is lr
    assert scheduler.get_last_lr()[0] is not lr
    assert float(lr) == pytest.approx(SCHEDULES["cosine"].value(5, 0.5))
    # rounded once, from the formula: nothing adds up
    scheduler.step(100_000)
    assert float(lr) == pytest.approx(0.05, rel=1e-7)
    saved = save(optimizer, scheduler)
    resumed, again = make_optimizer([torch.tensor(0.5), 1.0]), None
    again = ScheduleLR(resumed, SCHEDULES["cosine"])
    again.load_state_dict(saved["scheduler"])
    assert float(resumed.param_groups[0]["lr"]) == pytest.approx(0.05)


def test_added_group_joins_at_its_own_lr() -> None:
    optimizer = make_optimizer()
    scheduler = ScheduleLR(optimizer, SCHEDULES["cosine"])
    train(optimizer, scheduler, 4)
    optimizer.add_param_group({"params": [Parameter(torch.zeros(2))], "lr": 0.5})
    scheduler.step()
    assert train(optimizer, scheduler, 8) == expected(SCHEDULES["cosine"], 8, [*LRS, 0.5], start=5)
    saved = save(optimizer, scheduler)
    # the checkpoint has one group more than the optimizer
    fewer = ScheduleLR(make_optimizer(), SCHEDULES["cosine"])
    with pytest.raises(ValueError, match="param_groups: 3 in the checkpoint, 2 here"):
        fewer.load_state_dict(saved["scheduler"])


def test_group_that_is_refused_takes_no_step() -> None:
    optimizer = make_optimizer()
    scheduler = ScheduleLR(optimizer, Linear(4, Absolute(0.05)))
    optimizer.add_param_group({"params": [Parameter(torch.zeros(2))], "lr": 0.01})
    with pytest.raises(ValueError, match=r"should be <= 0.01, the lr of param_groups\[2\], but is: 0.05"):
        scheduler.step()
    assert (scheduler.last_epoch, "initial_lr" in optimizer.param_groups[2]) == (0, False)
    optimizer.param_groups[2]["lr"] = 0.05
    scheduler.step()
    assert train(optimizer, scheduler, 1) == [approx([0.0875, 0.7625, 0.05])]
    each = ScheduleLR(optimizer, [Linear(4)] * 3)
    optimizer.add_param_group({"params": [Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match="one for each of the 4 param_groups, but are: 3"):
        each.step()


def test_group_that_is_taken_away() -> None:
    optimizer = make_optimizer([0.1, 1.0, 0.5])
    scheduler = ScheduleLR(optimizer, Linear(4))
    optimizer.param_groups.pop(1)
    scheduler.step()
    assert train(optimizer, scheduler, 2) == expected(Linear(4), 2, [0.1, 0.5], start=1)


def test_checkpoint_of_before_a_group_was_added() -> None:
    optimizer = make_optimizer()
    scheduler = ScheduleLR(optimizer, SCHEDULES["cosine"])
    train(optimizer, scheduler, 4)
    state = scheduler.state_dict()
    optimizer = make_optimizer([*LRS, 0.5])
    scheduler = ScheduleLR(optimizer, SCHEDULES["cosine"])
    scheduler.load_state_dict(state)
    assert train(optimizer, scheduler, 8) == expected(SCHEDULES["cosine"], 8, [*LRS, 0.5], start=4)


@pytest.mark.parametrize("replace", ["function", "compiled"])
def test_replaced_optimizer_step(replace: str) -> None:
    """Torch's constructor takes the method apart, and fails."""
    optimizer = make_optimizer(cls=torch.optim.SGD)
    step = optimizer.step
    if replace == "compiled":
        optimizer.step = torch.compile(step, backend="eager")
    else:
        optimizer.step = lambda *args: step(*args)
    with pytest.raises(AttributeError, match="__func__"):
        torchs.LambdaLR(optimizer, lambda step: 1.0)
    scheduler = ScheduleLR(optimizer, SCHEDULES["cosine"])
    assert train(optimizer, scheduler, 4) == expected(SCHEDULES["cosine"], 4)


def test_optimizer_step_is_left_alone() -> None:
    optimizer = make_optimizer()
    before = optimizer.step
    ScheduleLR(optimizer, SCHEDULES["cosine"])
    assert optimizer.step == before


@pytest.mark.parametrize("scaler", [torch.amp.GradScaler, optimx.GradScaler], ids=["torch", "optimx"])
def test_a_skipped_first_step_gives_no_warning(scaler: Any) -> None:
    """The first scale is too large as a rule; torch's schedulers then warn of calls in the wrong order."""
    optimizer = make_optimizer(cls=optimx.AdamW)
    scheduler = ScheduleLR(optimizer, SCHEDULES["cosine"])
    scale = scaler("cpu", init_scale=2.0**16)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            for p in params:
                p.grad = torch.full_like(p, float("inf") if step == 0 else 2.0**14)
            scale.scale(torch.zeros(()))
            scale.step(optimizer)
            scale.update()
            scheduler.step()
            if step == 0:
                assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert not torch.equal(params[0], before[0])
    assert [scheduler.get_last_lr()] == expected(SCHEDULES["cosine"], 1, start=3)


def test_gradient_accumulation_counts_optimizer_steps() -> None:
    optimizer = make_optimizer(cls=optimx.AdamW)
    scheduler = ScheduleLR(optimizer, SCHEDULES["cosine"])
    applied = []
    for micro in range(1, 13):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p) if p.grad is None else p.grad + 1
        if micro % 4 == 0:
            applied.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert applied == expected(SCHEDULES["cosine"], 3)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on_by_themselves(duplicate: Any) -> None:
    optimizer = make_optimizer()
    scheduler = ScheduleLR(optimizer, SCHEDULES["restarts"])
    train(optimizer, scheduler, 4)
    other, other_scheduler = duplicate((optimizer, scheduler))
    assert other_scheduler.optimizer is other
    train(optimizer, scheduler, 2)
    assert train(other, other_scheduler, 4) == expected(SCHEDULES["restarts"], 4, start=4)
    assert [scheduler.get_last_lr()] == expected(SCHEDULES["restarts"], 1, start=6)


# beside torch's schedulers


@pytest.mark.parametrize("place", ["first", "second"])
@each_order
def test_member_of_sequential(order: Any, place: str) -> None:
    """SequentialLR takes members without a closed form only where torch wrote one; and restores them wrongly."""
    schedule = Cosine(6, 0.1)

    def make(optimizer: Any) -> Any:
        ours = ScheduleLR(optimizer, schedule)
        constant = torchs.ConstantLR(optimizer, 1.0, 100)
        members = [ours, constant] if place == "first" else [constant, ours]
        return torchs.SequentialLR(optimizer, members, [3])

    if place == "first":
        wanted = expected(schedule, 3) + [pytest.approx(LRS)] * 5
    else:
        wanted = [pytest.approx(LRS)] * 3 + expected(schedule, 5)
    optimizer = make_optimizer()
    assert train(optimizer, make(optimizer), 8) == wanted

    for done in range(8):
        optimizer = make_optimizer()
        scheduler = make(optimizer)
        train(optimizer, scheduler, done)
        # torch's own members are restored by the documented order alone
        governed_by_ours = (done < 3) == (place == "first")
        if order is not resume_documented and not governed_by_ours:
            continue
        resumed = order(make, save(optimizer, scheduler))
        steps = 3 - done if place == "first" and done < 3 else 8 - done
        assert train(*resumed, steps) == wanted[done : done + steps]


def test_a_member_that_is_not_in_force_writes_nothing_when_loaded() -> None:
    def make(optimizer: Any) -> Any:
        members = [torchs.LinearLR(optimizer, 0.1, 1.0, 5), ScheduleLR(optimizer, Linear(10))]
        return torchs.SequentialLR(optimizer, members, [5])

    optimizer = make_optimizer()
    scheduler = make(optimizer)
    whole = train(optimizer, scheduler, 12)
    optimizer = make_optimizer()
    scheduler = make(optimizer)
    train(optimizer, scheduler, 2)
    assert train(*resume_documented(make, save(optimizer, scheduler)), 10) == [pytest.approx(row) for row in whole[2:]]


def test_new_scheduler_on_a_used_optimizer() -> None:
    """The base is what the first scheduler found, or what is given."""
    optimizer = make_optimizer()
    train(optimizer, ScheduleLR(optimizer, Linear(3)), 3)
    assert [group["lr"] for group in optimizer.param_groups] == [0, 0]
    assert train(optimizer, ScheduleLR(optimizer, Linear(4)), 4) == expected(Linear(4), 4)
    again = ScheduleLR(optimizer, Linear(4), base_lrs=[0.2, 0.4])
    assert train(optimizer, again, 4) == expected(Linear(4), 4, [0.2, 0.4])
    assert train(optimizer, ScheduleLR(optimizer, Linear(4), base_lrs=3), 4) == expected(Linear(4), 4, [3.0, 3.0])


def test_base_lrs_that_are_set() -> None:
    """All, or one, or those of groups that have joined; they count from the next step on."""
    optimizer = make_optimizer()
    scheduler = ScheduleLR(optimizer, Linear(9))
    scheduler.base_lrs = [0.2, 0.4]
    assert scheduler.get_last_lr() == LRS
    scheduler.step()
    assert train(optimizer, scheduler, 1) == expected(Linear(9), 1, [0.2, 0.4], start=1)
    scheduler.base_lrs[1] = 0.8
    assert train(optimizer, scheduler, 2)[1:] == expected(Linear(9), 1, [0.2, 0.8], start=3)
    scheduler.base_lrs[:] = [lr / 2 for lr in scheduler.base_lrs]
    assert scheduler.state_dict()["bases"] == {"lr": [0.1, 0.4]}
    assert train(optimizer, scheduler, 2)[1:] == expected(Linear(9), 1, [0.1, 0.4], start=5)
    optimizer.add_param_group({"params": [Parameter(torch.zeros(2))]})
    scheduler.base_lrs.append(0.3)
    assert train(optimizer, scheduler, 2)[1:] == expected(Linear(9), 1, [0.1, 0.4, 0.3], start=7)
    for change in (
        lambda: scheduler.base_lrs.append(1.0),
        lambda: scheduler.base_lrs.pop(),
        lambda: scheduler.base_lrs.__setitem__(0, -1.0),
        lambda: setattr(scheduler, "base_lrs", [1.0]),
    ):
        with pytest.raises(ValueError, match="base_lrs"):
            change()
    assert scheduler.base_lrs == [0.1, 0.4, 0.3]
    twin = copy.deepcopy(scheduler)
    twin.base_lrs = 2.0
    assert scheduler.base_lrs == copy.copy(scheduler.base_lrs) == [0.1, 0.4, 0.3]
    with pytest.raises(ValueError, match="base_lrs should be set of a scheduler of lr"):
        ScheduleLR(make_optimizer(), {"weight_decay": Hold()}).base_lrs = [1.0, 1.0]
    with pytest.raises(ValueError, match=r"should be <= 0.04, the lr of param_groups\[0\], but is: 0.05"):
        ScheduleLR(make_optimizer(), Linear(4, Absolute(0.05))).base_lrs = [0.04, 1.0]


def test_base_follows_the_optimizers_checkpoint() -> None:
    other = make_optimizer([0.7, 0.3])
    ScheduleLR(other, Linear(10))
    optimizer = make_optimizer()
    scheduler = ScheduleLR(optimizer, Linear(10))
    optimizer.load_state_dict(other.state_dict())
    scheduler.step()
    assert [scheduler.get_last_lr()] == expected(Linear(10), 1, [0.7, 0.3], start=1)
    assert scheduler.base_lrs == [0.7, 0.3]


def test_checkpoint_of_an_optimizer_without_scheduler() -> None:
    optimizer = make_optimizer()
    scheduler = ScheduleLR(optimizer, Linear(10))
    optimizer.load_state_dict(make_optimizer([0.7, 0.3]).state_dict())
    scheduler.step()
    assert [scheduler.get_last_lr()] == expected(Linear(10), 1, start=1)


# a checkpoint of something else


def saved_at(schedule: Schedule, steps: int, lrs: list[float] | None = None) -> dict[str, Any]:
    optimizer = make_optimizer(lrs)
    scheduler = ScheduleLR(optimizer, schedule)
    train(optimizer, scheduler, steps)
    return save(optimizer, scheduler)["scheduler"]


def test_changed_horizon() -> None:
    old, new = Warmup(3) >> Cosine(7), Warmup(3) >> Cosine(17)
    state = saved_at(old, 5)
    untouched = copy.deepcopy(state)
    optimizer = make_optimizer()
    scheduler = ScheduleLR(optimizer, new)
    with pytest.raises(ValueError, match=r"phases\[1\].steps: 7 in the checkpoint, 17 here.*use_new.*use_checkpoint"):
        scheduler.load_state_dict(state)
    assert [scheduler.get_last_lr()] == expected(new, 1)
    assert scheduler.last_epoch == 0

    for policy, schedule in (("use_new", new), ("use_checkpoint", old)):
        optimizer = make_optimizer()
        scheduler = ScheduleLR(optimizer, new, on_mismatch=policy)  # type: ignore[arg-type]
        scheduler.load_state_dict(state)
        assert scheduler.schedule == schedule
        assert train(optimizer, scheduler, 6) == expected(schedule, 6, start=5)
    assert state == untouched


def test_changed_learning_rates() -> None:
    state = saved_at(Linear(10), 5)
    with pytest.raises(ValueError, match=r"base lr of param_groups\[1\]: 1.0 in the checkpoint, 0.5 here"):
        ScheduleLR(make_optimizer([0.1, 0.5]), Linear(10)).load_state_dict(state)
    for policy, lrs in (("use_new", [0.1, 0.5]), ("use_checkpoint", LRS)):
        optimizer = make_optimizer([0.1, 0.5])
        scheduler = ScheduleLR(optimizer, Linear(10), on_mismatch=policy)  # type: ignore[arg-type]
        scheduler.load_state_dict(state)
        assert train(optimizer, scheduler, 3) == expected(Linear(10), 3, lrs, start=5)


def test_a_field_is_scheduled_no_longer() -> None:
    optimizer = make_optimizer()
    state = ScheduleLR(optimizer, {"lr": Linear(10), "weight_decay": Hold()}).state_dict()
    with pytest.raises(ValueError, match="schedule of weight_decay: Hold in the checkpoint, none here"):
        ScheduleLR(make_optimizer(), Linear(10)).load_state_dict(state)


def test_torchs_checkpoint() -> None:
    """Of its step alone, and only when told to."""
    optimizer = make_optimizer()
    old = torchs.LambdaLR(optimizer, lambda step: 1.0)
    train(optimizer, old, 4)
    optimizer = make_optimizer()
    scheduler = ScheduleLR(optimizer, Linear(10))
    with pytest.raises(ValueError, match="schedule of lr: none in the checkpoint, Linear here"):
        scheduler.load_state_dict(old.state_dict())
    scheduler.on_mismatch = "use_checkpoint"
    with pytest.raises(ValueError, match="should have 'schedules'"):
        scheduler.load_state_dict(old.state_dict())
    with pytest.raises(ValueError, match="should have 'last_epoch'"):
        scheduler.load_state_dict({})
    scheduler.on_mismatch = "use_new"
    scheduler.load_state_dict(old.state_dict())
    assert train(optimizer, scheduler, 3) == expected(Linear(10), 3, start=4)


# plots and errors


def test_plot(tmp_path: Path) -> None:
    scheduler = ScheduleLR(make_optimizer(), {"lr": SCHEDULES["cosine"], "weight_decay": Hold()})
    scheduler.plot(tmp_path / "lr.png")
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")
    scheduler.plot(tmp_path / "wd.svg", 5, "weight_decay")
    assert (tmp_path / "wd.svg").stat().st_size > 1000
    with pytest.raises(ValueError, match="n should be given"):
        scheduler.plot(tmp_path / "no.png", field="weight_decay")


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "optimizer": (lambda: ScheduleLR(None, Hold()), TypeError, "should be a torch.optim.Optimizer but is: NoneType"),  # type: ignore
    "schedule": (lambda: ScheduleLR(make_optimizer(), lambda step: 1.0), TypeError, "Schedule, or several, but is"),  # type: ignore
    "field": (lambda: ScheduleLR(make_optimizer(), {"weight_deca": Hold()}), ValueError, "did you mean 'weight_decay'"),
    "betas": (lambda: ScheduleLR(make_optimizer(), {"betas": Hold()}), ValueError, r"did you mean 'betas\[\d\]'"),
    "no-field": (lambda: ScheduleLR(make_optimizer(), {}), ValueError, "one field or more"),
    "twice": (
        lambda: ScheduleLR(make_optimizer(), {"momentum": Hold(), "betas[0]": Hold()}),
        ValueError,
        r"one schedule but betas\[0\] has: 2",
    ),
    "number": (lambda: ScheduleLR(make_optimizer(), [Hold()]), ValueError, "each of the 2 param_groups, but are: 1"),
    "policy": (
        lambda: ScheduleLR(make_optimizer(), Hold(), on_mismatch="new"),  # type: ignore[arg-type]
        ValueError,
        "'new'; did you mean 'use_new'",
    ),
    "floor": (
        lambda: ScheduleLR(make_optimizer(), Linear(3, Absolute(0.5))),
        ValueError,
        r"should be <= 0.1, the lr of param_groups\[0\], but is: 0.5",
    ),
    "last-epoch": (lambda: ScheduleLR(make_optimizer(), Hold(), -2), ValueError, "last_epoch should be >= -1"),
    "base-lrs": (lambda: ScheduleLR(make_optimizer(), Hold(), base_lrs=[1]), ValueError, r"but are: \[1.0\]"),
    "base-lr": (lambda: ScheduleLR(make_optimizer(), Hold(), base_lrs=-1), ValueError, ">= 0 but is: -1"),
    "no-epoch": (lambda: ScheduleLR(make_optimizer(), Hold()).step("1"), TypeError, "epoch should be a number"),  # type: ignore
    "epoch": (lambda: ScheduleLR(make_optimizer(), Hold()).step(-3), ValueError, "epoch should be >= 0 but is: -3"),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_bad_input_changes_nothing() -> None:
    optimizer = make_optimizer()
    before = [sorted(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError):
        ScheduleLR(optimizer, {"lr": Linear(3, Absolute(0.5)), "weight_decay": Hold()})
    assert [sorted(group) for group in optimizer.param_groups] == before
    assert [group["lr"] for group in optimizer.param_groups] == LRS
