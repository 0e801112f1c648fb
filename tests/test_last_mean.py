"""``cautious="last_mean"``: the share that is kept, and all that must leave it alone or bring it along."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import optimx
from optimx._engine.averages import AVERAGE
from optimx._engine.flags import MASK_MEAN
from optimx._engine.recorder import Recorder
from optimx._engine.watched_step import OF_GRADS, OF_UPDATES, WatchedStep
from tests.cases import CLOSE, make_params, set_grads
from tests.engine import a_step, interpreted, params_of

Make = Callable[..., Any]
CLASSES = [optimx.Adam, optimx.AdamW, optimx.NAdam, optimx.Lion]
SHAPES = [(300,), (7, 3), (0,), (), (129,)]
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
#: With two states and a count, and with neither.
each_kind = pytest.mark.parametrize("cls", [optimx.AdamW, optimx.Lion], ids=lambda cls: cls.__name__)


def lagged(cls: Make, params: Any = None, **more: Any) -> Any:
    return cls(make_params(SHAPES) if params is None else params, lr=0.05, cautious="last_mean", **more)


def means(optimizer: Any) -> list[Tensor]:
    return [optimizer.state[param][MASK_MEAN] for param in params_of(optimizer)]


def everything(optimizer: Any) -> list[Tensor]:
    tensors = [param.detach() for param in params_of(optimizer)]
    return [*tensors, *(value for param in params_of(optimizer) for value in optimizer.state[param].values())]


def assert_equal(a: Any, b: Any) -> None:
    pairs = zip(everything(a), everything(b), strict=True)
    assert all(torch.equal(x, y) and x.dtype is y.dtype for x, y in pairs)


@interpreted
@each_class
def test_the_first_step_is_not_divided(cls: Make, device: torch.device) -> None:
    """Where every element takes it, it is that of the class without the flag; the next one is not."""
    ours, plain = lagged(cls, make_params(SHAPES, device)), cls(make_params(SHAPES, device), lr=0.05)
    for step in range(2):
        for optimizer in (ours, plain):
            a_step(optimizer, step)
        if not step:
            assert [float(mean) for mean in means(ours)] == [1.0] * len(SHAPES)
            torch.testing.assert_close(params_of(ours), params_of(plain), **CLOSE[torch.float32])
    assert not torch.equal(params_of(ours)[0], params_of(plain)[0])
    for mean in means(ours):
        assert (mean.dtype, mean.dim(), mean.device) == (torch.float32, 0, params_of(ours)[0].device)


@interpreted
@each_kind
def test_a_skipped_step_leaves_the_share(cls: Make, device: torch.device) -> None:
    ours, plain = (lagged(cls, make_params(SHAPES, device), skip_nonfinite=True) for _ in range(2))
    for step in range(4):
        set_grads(params_of(ours), step)
        if step == 2:
            params_of(ours)[0].grad[5] = torch.inf
        else:
            a_step(plain, step)
        ours.step()
        assert bool(ours.step_was_skipped) == (step == 2)
        assert_equal(ours, plain)


@interpreted
@each_kind
def test_a_skip_of_the_scaler_leaves_the_share(cls: Make) -> None:
    ours, plain = lagged(cls), lagged(cls)
    scaler = optimx.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros((), requires_grad=True))
    for step in range(4):
        set_grads(params_of(ours), step, scale=1024.0)
        if step == 1:
            params_of(ours)[1].grad[2, 1] = torch.nan
        else:
            a_step(plain, step)
        scaler.step(ours)
        scaler.update(1024.0)
        assert_equal(ours, plain)


@interpreted
@each_kind
def test_without_a_gradient_the_share_stays(cls: Make, device: torch.device) -> None:
    optimizer = lagged(cls, make_params(SHAPES, device))
    for step in range(2):
        a_step(optimizer, step)
    before = [mean.clone() for mean in means(optimizer)]
    set_grads(params_of(optimizer), 2, skip=(0,))
    optimizer.step()
    assert torch.equal(means(optimizer)[0], before[0])
    assert not torch.equal(means(optimizer)[4], before[4])


@interpreted
@each_class
def test_a_step_that_no_element_takes_tells_nothing(cls: Make, device: torch.device) -> None:
    """LoRA's first gradients, and what ``get_optimizer_state_dict`` does to make states: all zeros."""
    ours = lagged(cls, make_params([(300,), (3, 5)], device))
    for step in range(5):
        set_grads(params_of(ours), step)
        for param in params_of(ours) if step in (0, 3) else ():
            param.grad.zero_()
        before = [mean.clone() for mean in means(ours)] if step else [torch.ones((), device=device)] * 2
        ours.step()
        assert all(map(torch.equal, before, means(ours))) == (step in (0, 1, 3))
        assert all(float(mean) > 0.1 for mean in means(ours))
        assert (params_of(ours)[0].detach().cpu() - make_params([(300,)])[0]).abs().max() < 1.0


@pytest.mark.parametrize("max_grad_norm", [None, 0.5], ids=["plain", "clipping"])
@interpreted
@each_kind
def test_what_rides_along_changes_nothing(cls: Make, max_grad_norm: float | None, device: torch.device) -> None:
    """Statistics and averages are those of the step, which has the bits that it has without them."""
    make = partial(lagged, cls, max_grad_norm=max_grad_norm)
    ours = make(make_params(SHAPES, device), average=optimx.EMA(0.5))
    plain = make(make_params(SHAPES, device))
    rows: list[WatchedStep] = []
    ours._recorder = Recorder(2, (*OF_GRADS, *OF_UPDATES), rows.append)
    moved = []
    for step in range(4):
        before = [param.detach().double() for param in params_of(ours)]
        averages = [ours.state[param].get(AVERAGE) for param in params_of(ours)]
        averages = [None if average is None else average.clone() for average in averages]
        for optimizer in (ours, plain):
            a_step(optimizer, step)
        pairs = zip(params_of(ours), before, strict=True)
        moved.append([float((a.detach().double() - b).square().sum()) for a, b in pairs])
        for a, b, average in zip(params_of(ours), params_of(plain), averages, strict=True):
            assert torch.equal(a, b)
            assert all(torch.equal(value, ours.state[a][name]) for name, value in plain.state[b].items())
            if average is not None:
                torch.testing.assert_close(ours.state[a][AVERAGE], (average + a.detach()) / 2)
    ours._recorder.flush()
    assert [row.step for row in rows] == [1, 3]
    for row in rows:
        assert row.sums["update_sq"] == pytest.approx(moved[row.step - 1], rel=2e-5, abs=1e-9)


@interpreted
@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_checkpoints_keep_the_exact_share(cls: Make, dtype: torch.dtype) -> None:
    """Copies go on with the same bits, and nothing of a checkpoint changes with them; torch's class takes it."""
    first = lagged(cls, make_params(SHAPES, dtype=dtype))
    for step in range(3):
        a_step(first, step)
    assert any(mean != mean.bfloat16() for mean in means(first))
    saved, file = first.state_dict(), io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    kept = [mean.clone() for mean in means(first)]
    others = [copy.deepcopy(first), pickle.loads(pickle.dumps(first))]
    for state_dict in (saved, torch.load(file, weights_only=True)):
        other = lagged(cls, [Parameter(param.detach().clone()) for param in params_of(first)])
        other.load_state_dict(state_dict)
        others.append(other)
    for other in others:
        a_step(other, 3)
    assert all(map(torch.equal, means(first), kept))
    a_step(first, 3)
    for other in others:
        assert_equal(other, first)
    if cls is optimx.AdamW:
        stock = torch.optim.AdamW(make_params(SHAPES, dtype=dtype))
        stock.load_state_dict(first.state_dict())
        a_step(stock, 4)


@interpreted
@each_kind
def test_formats_leave_the_share_alone(cls: Make, device: torch.device) -> None:
    """With float32 copies a step of bfloat16 parameters is that of float32 ones; a dtype of states is not its."""
    params = make_params([(300,), (40, 128)], device, torch.bfloat16)
    twins = [Parameter(param.detach().float()) for param in params]
    ours = lagged(cls, params, param_rounding="master", state_dtype=torch.float32)
    plain = lagged(cls, twins)
    coded = lagged(cls, make_params([(300,), (40, 128)], device), state_dtype="8bit")
    rounded = lagged(cls, make_params([(300,), (40, 128)], device), state_dtype="stochastic")
    for step in range(3):
        set_grads(params, step)
        for param, twin in zip(params, twins, strict=True):
            twin.grad = param.grad.float()
        ours.step()
        plain.step()
        for optimizer in (coded, rounded):
            a_step(optimizer, step)
    torch.testing.assert_close(optimx.master_weights(ours), [twin.detach() for twin in twins], **CLOSE[torch.float32])
    assert all(map(torch.equal, means(ours), means(plain)))
    for mean in (*means(coded), *means(rounded)):
        assert mean.dtype is torch.float32
        assert 0.3 < mean < 1.0


@interpreted
def test_a_share_is_brought_to_what_it_should_be(device: torch.device) -> None:
    """Somebody else put a number there, or a tensor of another kind."""
    ours, plain = (lagged(optimx.AdamW, make_params([(300,)], device)) for _ in range(2))
    for value in (lambda mean: float(mean), lambda mean: mean.double().view(1), lambda mean: mean):
        for step in range(2):
            a_step(plain, step)
            a_step(ours, step)
        state = ours.state[params_of(ours)[0]]
        state[MASK_MEAN] = value(state[MASK_MEAN])
    a_step(plain, 3)
    a_step(ours, 3)
    assert_equal(ours, plain)


@interpreted
@each_kind
def test_shares_may_lie_anywhere(cls: Make, device: torch.device) -> None:
    """Somebody moved one of those that were made together, and the order of groups is not that of memory."""
    ours, plain = (lagged(cls, make_params(SHAPES, device)) for _ in range(2))
    for step in range(4):
        for optimizer in (ours, plain):
            a_step(optimizer, step)
        assert_equal(ours, plain)
        state = ours.state[params_of(ours)[1]]
        if step == 0:
            state[MASK_MEAN].data = state[MASK_MEAN].clone()
        if step == 1:
            state[MASK_MEAN] = state[MASK_MEAN].clone()
        for optimizer in (ours, plain) if step == 2 else ():
            optimizer.param_groups[0]["params"].reverse()


@interpreted
@each_kind
def test_the_kind_of_share_may_change_between_steps(cls: Make) -> None:
    optimizer, exact = lagged(cls), cls(make_params(SHAPES), lr=0.05, cautious=True)
    for step in range(2):
        optimizer.param_groups[0]["cautious"] = True
        a_step(optimizer, step)
        a_step(exact, step)
        torch.testing.assert_close(params_of(optimizer), params_of(exact))
    assert MASK_MEAN not in optimizer.state[params_of(optimizer)[0]]
    optimizer.param_groups[0]["cautious"] = "last_mean"
    a_step(optimizer, 3)
    assert 0.0 < means(optimizer)[0] < 1.0
    optimizer.param_groups[0]["cautious"] = "mean"
    before = [tensor.clone() for tensor in everything(optimizer)]
    set_grads(params_of(optimizer), 4)
    with pytest.raises(ValueError, match="cautious should be True, False or 'last_mean' but is: 'mean'"):
        optimizer.step()
    assert all(map(torch.equal, everything(optimizer), before))


def test_lions_loop_keeps_it() -> None:
    """Complex numbers are pairs of real ones; a share of their parts is kept, in float32."""
    param = Parameter(torch.randn(40, dtype=torch.complex64))
    twin = Parameter(torch.view_as_real(param.detach()).clone())
    ours, plain = lagged(optimx.Lion, [param]), lagged(optimx.Lion, [twin])
    for _ in range(3):
        param.grad = torch.randn_like(param)
        twin.grad = torch.view_as_real(param.grad)
        ours.step()
        plain.step()
        assert torch.equal(*means(ours), *means(plain))
    torch.testing.assert_close(torch.view_as_real(param.detach()), twin.detach())


def test_torchs_step_is_refused() -> None:
    param = Parameter(torch.ones(4, dtype=torch.complex64))
    param.grad = torch.ones_like(param)
    optimizer = lagged(optimx.AdamW, [param])
    with pytest.raises(RuntimeError, match="should be updated with cautious=last_mean but is left to torch"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("text", ['"last_mean"', "true"])
def test_configs(text: str, tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text(f'[optimizer]\nname = "lion"\ncautious = {text}\n')
    built = optimx.build(nn.Linear(3, 2), path)
    assert built.optimizer.param_groups[0]["cautious"] == ("last_mean" if text.startswith('"') else True)


def test_explained_and_told() -> None:
    optimizer = lagged(optimx.AdamW, make_params([(300,)]))
    set_grads(params_of(optimizer), 0)
    (row,) = optimx.explain(optimizer).rows
    assert not row.reason
    assert optimx.memory(optimizer).scratch


BAD: dict[str, tuple[Make, str]] = {
    "other_text": (
        lambda p: optimx.AdamW(p, cautious="last-mean"), "True, False or 'last_mean' but is: 'last-mean'; did you mean"
    ),
    "number": (lambda p: optimx.Lion(p, cautious=0.5), "cautious should be True, False or 'last_mean' but is: 0.5"),
    "clipped": (
        lambda p: optimx.Adam(p, cautious="last_mean", update_clipping=True),
        "update_clipping should be False with cautious='last_mean'",
    ),
    "other_flag": (
        lambda p: optimx.AdamW(p, cautious_weight_decay="last_mean"), "cautious_weight_decay should be True or False"
    ),
    "no_flag": (lambda p: optimx.LAMB([{"params": p, "cautious": "last_mean"}]), "cautious is no flag of LAMBRule"),
    "config": (
        lambda p: optimx.build(nn.Linear(3, 2), {"optimizer": {"name": "lion", "cautious": "lastmean"}}),
        "cautious should be True, False or 'last_mean' but is: 'lastmean'; did you mean",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_errors(bad: str) -> None:
    make, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        make(make_params([(3,)]))
