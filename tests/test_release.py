"""Released gradients: the same numbers as without a release, and gradients that are gone before ``step``."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import optimx
from tests.cases import CLOSE, VARIANTS, Case
from tests.engine import params, pick

#: Makes three parts of the network's parameters, and leaves some open until ``step``.
BUCKET_MB = 0.004
STEPS = 4
QUICK = pick("adamw-default", "sgd-momentum", "lion-default")

Model = nn.Module
Loss = Callable[[Model, int], Tensor]


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Nobody is told that gradients are kept where they are not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="gradients are kept")
        yield


class Net(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(12, 40)
        self.blocks = nn.ModuleList(nn.Linear(40, 40) for _ in range(3))
        self.norm = nn.LayerNorm(40)
        self.last = nn.Linear(40, 12)
        if tied:
            self.last.weight = nn.Parameter(self.first.weight.detach().clone().t().contiguous())
            self.first.weight = nn.Parameter(torch.zeros(40, 12))
        self.tied = tied
        self.skipped: set[int] = set()
        self.checkpoints: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x @ self.last.weight if self.tied else self.first(x))
        for i, block in enumerate(self.blocks):
            if i in self.skipped:
                continue
            if self.checkpoints is None:
                x = torch.tanh(block(x))
            else:
                x = checkpoint(lambda x, block=block: torch.tanh(block(x)), x, use_reentrant=self.checkpoints)
        return self.last(self.norm(x))


def net(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", **kwargs: Any) -> Net:
    torch.manual_seed(0)
    return Net(**kwargs).to(device, dtype)


def loss_of(model: Model, step: int, scale: float = 1.0) -> Tensor:
    weight = next(model.parameters())
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step)).to(weight.device, weight.dtype)
    return scale * model(x).square().mean()


def groups_of(model: Model, **second: Any) -> list[dict[str, Any]]:
    """Matrices and vectors: neighbours in the model are in different groups."""
    by_dim: list[list[Tensor]] = [[], []]
    for param in model.parameters():
        by_dim[param.dim() < 2].append(param)
    return [{"params": by_dim[0]}, {"params": by_dim[1], "weight_decay": 0.0, **second}]


Make = Callable[[Model], Any]


def adamw(**kwargs: Any) -> Make:
    return lambda model: optimx.AdamW(groups_of(model, lr=0.02), **{"lr": 0.01, **kwargs})


class Twins:
    """Two equal models with equal optimizers, the gradients of one of which are released."""

    def __init__(
        self, make: Make | None = None, bucket_mb: float = BUCKET_MB, model: Net | None = None, **release: Any
    ) -> None:
        self.plain = net() if model is None else model
        self.model = deepcopy(self.plain)
        make = make or adamw()
        self.plain_optimizer, self.optimizer = make(self.plain), make(self.model)
        self.release = optimx.release_gradients(self.optimizer, bucket_mb, **release)

    def both(self) -> list[tuple[Net, Any]]:
        return [(self.plain, self.plain_optimizer), (self.model, self.optimizer)]

    def train(self, steps: Sequence[int] = range(STEPS), is_kept: bool = False, scale: float = 1.0) -> None:
        """The documented loop."""
        for step in steps:
            for model, optimizer in self.both():
                loss_of(model, step, scale).backward()
                if optimizer is self.optimizer:
                    n_grads = sum(param.grad is not None for param in model.parameters())
                    everything = sum(param.requires_grad for param in model.parameters())
                    assert n_grads == everything if is_kept else n_grads < everything / 2
                optimizer.step()
                optimizer.zero_grad()
            assert all(param.grad is None for param in self.model.parameters())
            assert (self.release.kept_because is not None) is is_kept

    def assert_same(self, tolerance: dict[str, float] | None = None) -> None:
        """Parameters, states and groups; bit by bit, unless there is a tolerance."""

        def check(mine: Any, theirs: Any, name: str) -> None:
            if not isinstance(theirs, Tensor):
                assert mine == theirs, name
            elif tolerance is None:
                assert mine.dtype is theirs.dtype, name
                assert torch.equal(mine, theirs), name
            else:
                torch.testing.assert_close(mine, theirs, **tolerance, msg=lambda text: f"{name}: {text}")

        for (name, theirs), mine in zip(self.plain.named_parameters(), self.model.parameters(), strict=True):
            check(mine.detach(), theirs.detach(), name)
        mine, theirs = self.optimizer.state_dict(), self.plain_optimizer.state_dict()
        assert mine.keys() == theirs.keys()
        assert mine["state"].keys() == theirs["state"].keys()
        for key, state in theirs["state"].items():
            assert mine["state"][key].keys() == state.keys()
            for name, value in state.items():
                check(mine["state"][key][name], value, f"{name} of {key}")
        for mine_group, group in zip(mine["param_groups"], theirs["param_groups"], strict=True):
            assert mine_group.keys() == group.keys()
            for name, value in group.items():
                check(mine_group[name], value, name)


def case_of(case: Case, kwargs: dict[str, Any]) -> Make:
    return lambda model: case.cls(groups_of(model), **deepcopy(kwargs))


def has_sums(case: Case, kwargs: dict[str, Any]) -> bool:
    """Whether an update needs sums over a tensor, which a bucket of other tensors adds up in another order."""
    optimizer: Any = case.cls([nn.Parameter(torch.zeros(2, 2))], **deepcopy(kwargs))
    return optimizer.rule.walk_of(optimizer.rule.group_variant(optimizer.param_groups[0])) != "elementwise"


@pytest.mark.parametrize(("case", "kwargs"), params(VARIANTS, QUICK))
def test_every_optimizer(case: Case, kwargs: dict[str, Any], device: torch.device) -> None:
    """Bit by bit; with sums over a tensor in float64, where their order is all that there can be."""
    summed = has_sums(case, kwargs)
    twins = Twins(case_of(case, kwargs), model=net(torch.float64 if summed else torch.float32, device))
    twins.train()
    twins.assert_same(CLOSE[torch.float64] if summed else None)


@pytest.mark.parametrize(("case", "kwargs"), params(VARIANTS, ()))
def test_one_part_has_the_same_bits(case: Case, kwargs: dict[str, Any]) -> None:
    """Where all tensors are in one bucket, sums are in the same order."""
    twins = Twins(case_of(case, kwargs), bucket_mb=1.0)
    for step in range(3):
        for model, optimizer in twins.both():
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    twins.assert_same()


def test_muon() -> None:
    def make(model: Net) -> Any:
        return optimx.Muon([param for param in model.parameters() if param.dim() == 2], lr=0.02)

    twins = Twins(make)
    for step in range(STEPS):
        for model, optimizer in twins.both():
            loss_of(model, step).backward()
            optimizer.step()
            model.zero_grad()
    # products of one matrix, and of three, may be added up in another order, in bfloat16
    twins.assert_same({"rtol": 0.02, "atol": 2e-3})


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "settings",
    [
        {"state_dtype": torch.bfloat16},
        {"state_dtype": "8bit"},
        {"param_rounding": "stochastic", "state_dtype": "stochastic", "rounding_seed": 3},
        {"param_rounding": "remainder16", "state_dtype": torch.float32},
        {"param_rounding": "master", "state_dtype": torch.float32},
    ],
    ids=["bfloat16", "8bit", "stochastic", "remainder", "master"],
)
@pytest.mark.filterwarnings("ignore:.*stands still")
def test_formats(settings: dict[str, Any], device: torch.device) -> None:
    """Random bits depend on where a parameter is among all."""
    dtype = torch.bfloat16 if "param_rounding" in settings else torch.float32
    twins = Twins(adamw(**settings), bucket_mb=BUCKET_MB * dtype.itemsize / 4, model=net(dtype, device))
    twins.train()
    twins.assert_same()


def test_random_bits_where_no_step_is_counted() -> None:
    """The part that steps last has nothing that is rounded, and does not count."""

    def make(model: Net) -> Any:
        blocks = [*model.blocks.parameters()]
        others = [param for param in model.parameters() if all(param is not one for one in blocks)]
        return optimx.Lion([{"params": blocks, "param_rounding": "stochastic"}, {"params": others}], lr=0.01)

    twins = Twins(make, bucket_mb=BUCKET_MB / 2, model=net(torch.bfloat16))
    twins.train()
    twins.assert_same()
    assert twins.optimizer.param_groups[0]["rounding_step"] == STEPS


@pytest.mark.parametrize("average", [optimx.EMA(0.9), optimx.SWA(start=2), optimx.EMA(0.9, every=2)], ids=str)
def test_averages(average: Any, device: torch.device) -> None:
    twins = Twins(adamw(average=average), model=net(device=device))
    twins.train()
    twins.assert_same()
    with twins.optimizer.averaged(), pytest.raises(RuntimeError, match=r"optimizer\.averaged"):
        loss_of(twins.model, 0).backward()


def test_gradients_are_never_more_than_a_bucket() -> None:
    twins = Twins()
    weights = [*twins.model.parameters()]
    most: list[int] = []

    def note(_: Tensor) -> None:
        most.append(sum(param.nbytes for param in weights if param.grad is not None))

    for param in weights:
        param.register_post_accumulate_grad_hook(note)
    for step in range(STEPS):
        loss_of(twins.model, step).backward()
        twins.optimizer.step()
    bound = BUCKET_MB * 1e6 + max(param.nbytes for param in weights)
    assert 0 < max(most) < bound < sum(param.nbytes for param in weights)


def test_accumulation() -> None:
    twins = Twins()
    for step in range(STEPS):
        for model, optimizer in twins.both():
            for micro in range(2):
                if optimizer is twins.optimizer:
                    with twins.release.accumulate():
                        loss_of(model, 10 * step + micro).backward()
                    assert all(param.grad is not None for param in model.parameters())
                else:
                    loss_of(model, 10 * step + micro).backward()
            loss_of(model, 10 * step + 9).backward()
            optimizer.step()
            optimizer.zero_grad()
    twins.assert_same()


def test_a_second_backward_is_an_error() -> None:
    twins = Twins()
    loss_of(twins.model, 0).backward()
    with pytest.raises(RuntimeError, match=r"release\.accumulate"):
        loss_of(twins.model, 1).backward()
    twins.optimizer.step()
    loss_of(twins.model, 2).backward()


def warned(twins: Twins, steps: Sequence[int] = range(STEPS), **kwargs: Any) -> None:
    """Train with gradients that are kept, which the user is told once."""
    with pytest.warns(UserWarning, match="gradients are kept until") as told:
        twins.train(steps, is_kept=True, **kwargs)
    assert len(told) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"max_grad_norm": 0.1},
        {"normalize_grads": True},
        {"skip_nonfinite": True},
        {"max_grad_norm": optimx.ZClip()},
        {"skip_spikes": True, "max_grad_norm": 0.1},
    ],
    ids=["max_grad_norm", "normalize", "skip_nonfinite", "zclip", "spikes"],
)
class TestNorm:
    def make(self, settings: dict[str, Any]) -> Make:
        def make(model: Net) -> Any:
            optimizer = adamw(**{name: value for name, value in settings.items() if name != "normalize_grads"})(model)
            optimizer.normalize_grads = "normalize_grads" in settings
            return optimizer

        return make

    def test_kept(self, settings: dict[str, Any]) -> None:
        twins = Twins(self.make(settings))
        warned(twins)
        twins.assert_same()
        assert torch.equal(twins.optimizer.grad_norm, twins.plain_optimizer.grad_norm)

    @pytest.mark.interpreted
    def test_measured(self, settings: dict[str, Any], device: torch.device) -> None:
        """The norm of norms of other batches: the same but for a rounding."""
        twins = Twins(self.make(settings), model=net(device=device))
        for step in range(STEPS):
            bad = torch.nan if step == 2 and "skip_nonfinite" in settings else 1.0
            for model, optimizer in twins.both():
                loss = loss_of(model, step, bad)
                if optimizer is twins.optimizer:
                    with twins.release.measure():
                        loss.backward(retain_graph=True)
                    assert all(param.grad is None for param in model.parameters())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            assert twins.release.kept_because is None
            assert bool(twins.optimizer.step_was_skipped) is (bad != 1.0)
            norms = twins.optimizer.grad_norm, twins.plain_optimizer.grad_norm
            torch.testing.assert_close(*norms, rtol=1e-6, atol=0.0, equal_nan=True)
        twins.assert_same({"rtol": 1e-5, "atol": 1e-6, "equal_nan": True})  # type: ignore[dict-item]
        assert float(twins.optimizer.state[twins.model.last.weight]["step"]) == STEPS - ("skip_nonfinite" in settings)


def test_previous_norm(device: torch.device) -> None:
    """As an optimizer that is told the norm of the step before."""
    twins = Twins(adamw(max_grad_norm=0.1), model=net(device=device), norm="previous")
    norm = None
    for step in range(STEPS):
        for model, optimizer in twins.both():
            loss = loss_of(model, step, scale=1.0 + step)
            loss.backward()
            if optimizer is twins.plain_optimizer:
                own = optimx.get_total_norm([param.grad for param in model.parameters()])
                if norm is not None:
                    optimizer.total_norm = norm
                norm = own
            optimizer.step()
            optimizer.zero_grad()
        assert (twins.release.kept_because is None) is (step > 0)
        # what it reports is the norm of this step
        torch.testing.assert_close(twins.optimizer.grad_norm, own, rtol=1e-6, atol=0.0)
    twins.assert_same(CLOSE[torch.float32])


def test_previous_norm_passes_over_infinite_ones() -> None:
    """By an infinite norm nothing would be left of a gradient."""
    model = net()
    optimizer = optimx.SGD(model.parameters(), lr=0.1, max_grad_norm=0.1)
    optimx.release_gradients(optimizer, BUCKET_MB, norm="previous")
    for step, (scale, lr) in enumerate([(1.0, 0.1), (1e30, 0.0), (1.0, 0.1)]):
        before = [param.detach().clone() for param in model.parameters()]
        optimizer.param_groups[0]["lr"] = lr
        loss_of(model, step, scale).backward()
        optimizer.step()
        assert bool(optimizer.grad_norm.isinf()) is (scale > 1.0)
        assert any(map(torch.equal, before, model.parameters())) is (scale > 1.0)
        assert all(param.isfinite().all() for param in model.parameters())


def test_group_norms_and_hooks_keep_gradients() -> None:
    twins = Twins(lambda model: optimx.AdamW(groups_of(model, max_group_norm=0.1)))
    warned(twins)
    assert "max_group_norm" in str(twins.release.kept_because)
    twins.assert_same()

    twins = Twins()
    seen: list[bool] = []
    handle = twins.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append(all(p.grad is not None for g in optimizer.param_groups for p in g["params"]))
    )
    warned(twins)
    assert seen == [True] * STEPS
    handle.remove()
    twins.train(range(STEPS, 6))
    twins.assert_same()


@pytest.mark.parametrize("name", ["centralize_grads", "agc", "max_param_norm"])
def test_transforms(name: str) -> None:
    twins = Twins(
        lambda model: optimx.AdamW(
            [{**group, name: 0.01 if name != "centralize_grads" else True} for group in groups_of(model)]
        )
    )
    twins.train()
    twins.assert_same()


@pytest.mark.parametrize("cls", [torch.amp.GradScaler, optimx.GradScaler])
@pytest.mark.parametrize("kwargs", [{}, {"fused": True}, {"max_grad_norm": 0.1}], ids=str)
def test_scaler(cls: type, kwargs: dict[str, Any]) -> None:
    scalers = [cls("cpu", init_scale=64.0) for _ in range(2)]
    twins = Twins(adamw(**kwargs), scaler=scalers[1])
    for step in range(STEPS):
        for (model, optimizer), scaler in zip(twins.both(), scalers, strict=True):
            scaler.scale(loss_of(model, step, torch.inf if step == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    twins.assert_same()
    assert scalers[0].get_scale() == scalers[1].get_scale() == 32.0
    assert "GradScaler" in str(twins.release.kept_because)


@pytest.mark.parametrize("cls", [torch.amp.GradScaler, optimx.GradScaler])
@pytest.mark.parametrize("fused", [False, True])
def test_scaler_that_nobody_told_of(cls: type, fused: bool) -> None:
    twins, scaler = Twins(adamw(fused=fused)), cls("cpu")
    scaler.scale(loss_of(twins.model, 0)).backward()
    with pytest.raises(RuntimeError, match=r"scaler=\.\.\."):
        scaler.step(twins.optimizer)
    twins.release.remove()
    assert "_step_supports_amp_scaling" not in vars(twins.optimizer) or fused


def test_scheduler_tensor_lr_and_edits() -> None:
    def make(model: Net) -> Any:
        return optimx.AdamW(groups_of(model), lr=torch.tensor(0.01))

    twins = Twins(make)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5) for _, optimizer in twins.both()]
    for step in range(STEPS):
        twins.train([step])
        for scheduler in schedulers:
            scheduler.step()
        for _, optimizer in twins.both():
            optimizer.param_groups[1]["weight_decay"] = 0.1 * step
    twins.assert_same()


def test_missing_frozen_and_new_parameters() -> None:
    twins = Twins()

    def change(edit: Callable[[Net, Any], None]) -> None:
        for model, optimizer in twins.both():
            edit(model, optimizer)
        start = int(twins.optimizer.state[twins.model.last.weight]["step"])
        for step in range(start, start + 2):
            for model, optimizer in twins.both():
                loss_of(model, step).backward()
                optimizer.step()
                optimizer.zero_grad()
        twins.assert_same()

    twins.train()
    change(lambda model, _: model.skipped.add(1))
    change(lambda model, _: model.skipped.clear())
    change(lambda model, _: model.blocks[0].requires_grad_(False))
    change(lambda model, _: model.blocks[0].requires_grad_(True))

    def add(model: Net, optimizer: Any) -> None:
        model.blocks.append(deepcopy(model.blocks[0]))
        optimizer.add_param_group({"params": [*model.blocks[-1].parameters()], "lr": 0.1})

    change(add)

    def drop(model: Net, optimizer: Any) -> None:
        del optimizer.state[optimizer.param_groups[0]["params"].pop(0)]

    change(drop)

    def divide(model: Net, optimizer: Any) -> None:
        """A parameter less and two groups more, which is as much to be told of."""
        drop(model, optimizer)
        for _ in range(2):
            param = optimizer.param_groups[0]["params"].pop()
            optimizer.add_param_group({"params": [param], "lr": 0.05})

    change(divide)
    # those that came are released, too
    loss_of(twins.model, 0).backward()
    assert twins.model.blocks[-1].weight.grad is None


def test_unused_parameters_hold_nothing_back() -> None:
    model = net()
    model.skipped = {1}
    twins = Twins(model=model)
    twins.train()
    twins.assert_same()


def test_resume() -> None:
    """Whoever loads a checkpoint goes on with the release, and the state dicts are each other's."""
    twins = Twins()
    twins.train()
    twins.optimizer.load_state_dict(deepcopy(twins.plain_optimizer.state_dict()))
    twins.train(range(STEPS, 6))
    fresh = Twins(model=deepcopy(twins.plain))
    for (_, optimizer), source in zip(fresh.both(), (twins.optimizer, twins.optimizer), strict=True):
        optimizer.load_state_dict(deepcopy(source.state_dict()))
    fresh.train(range(6, 8))
    fresh.assert_same()


def test_copies_are_not_released() -> None:
    twins = Twins()
    twins.train()
    copy = deepcopy(twins.optimizer)
    assert copy._release is None
    for param in chain.from_iterable(group["params"] for group in copy.param_groups):
        param.grad = torch.ones_like(param)
    copy.step()
    assert all(param.grad is not None for group in copy.param_groups for param in group["params"])
    twins.train(range(STEPS, 6))
    twins.assert_same()


def test_tied_weights() -> None:
    twins = Twins(model=net(tied=True))
    for step in range(STEPS):
        for model, optimizer in twins.both():
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    twins.assert_same()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    model = net()
    model.checkpoints = reentrant
    twins = Twins(model=model)
    twins.train()
    twins.assert_same()


def test_compiled_model() -> None:
    twins = Twins()
    compiled = torch.compile(twins.model, backend="aot_eager")
    for step in range(STEPS):
        for model, optimizer in twins.both():
            loss_of(compiled if model is twins.model else model, step).backward()
            assert model is twins.plain or model.last.weight.grad is None
            optimizer.step()
            optimizer.zero_grad()
    twins.assert_same(CLOSE[torch.float32])


def test_compiled_step() -> None:
    twins = Twins()
    step_of = torch.compile(lambda: twins.optimizer.step(), backend="eager")
    for step in range(STEPS):
        for model, optimizer in twins.both():
            loss_of(model, step).backward()
            if optimizer is twins.optimizer:
                step_of()
            else:
                optimizer.step()
            optimizer.zero_grad()
    twins.assert_same()


def test_closure_and_leftovers() -> None:
    """A closure's backward releases; parameters with gaps in memory are torch's."""

    def make(model: Net) -> Any:
        model.first.weight = nn.Parameter(torch.stack([model.first.weight.detach()] * 2, -1)[..., 0])
        return adamw()(model)

    twins = Twins(make)
    for step in range(STEPS):
        for each, optimizer in twins.both():

            def closure(each: Net = each, optimizer: Any = optimizer, step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(each, step)
                loss.backward()
                return loss

            assert isinstance(optimizer.step(closure), Tensor)
    twins.assert_same()


def composite(**kwargs: Any) -> Make:
    def make(model: Net) -> Any:
        matrices, vectors = groups_of(model)
        sgd = optimx.SGD([matrices], lr=0.1, momentum=0.9)
        return optimx.Composite({"sgd": sgd, "adamw": optimx.AdamW([vectors])}, **kwargs)

    return make


def test_composite() -> None:
    twins = Twins(composite(), bucket_mb=0.0005)
    twins.train()
    twins.assert_same()
    twins = Twins(composite(max_grad_norm=0.1))
    warned(twins)
    twins.assert_same()
    with pytest.raises(RuntimeError, match="composite"), twins.release.measure():
        pass
    with pytest.raises(ValueError, match="norm should be 'exact' with max_grad_norm"):
        Twins(composite(max_grad_norm=0.1), norm="previous")


def test_watched_steps_keep_gradients() -> None:
    twins = Twins()
    rows: list[Any] = []
    watchers = [
        optimx.watch(optimizer, every=2, sinks=[lambda *row: rows.append(row)]) for _, optimizer in twins.both()
    ]
    for step in range(STEPS):
        twins.train([step], is_kept=step % 2 == 0)
    for watcher in watchers:
        watcher.close()
    twins.assert_same()


def test_remove() -> None:
    make = adamw()
    twins = Twins(make)
    with twins.release:
        twins.train()
        with pytest.raises(ValueError, match="are not released"):
            optimx.release_gradients(twins.optimizer)
    loss_of(twins.model, 0).backward()
    assert all(param.grad is not None for param in twins.model.parameters())
    twins.optimizer.step()
    assert all(param.grad is not None for param in twins.model.parameters())
    with optimx.release_gradients(twins.optimizer, BUCKET_MB):
        twins.optimizer.zero_grad()
        loss_of(twins.model, 1).backward()
        assert twins.model.last.weight.grad is None
        twins.optimizer.step()


def test_nothing_is_kept_alive() -> None:
    model = net()
    optimizer = optimx.AdamW(model.parameters())
    optimx.release_gradients(optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    loss_of(model, 0).backward()
    assert all(param.grad is not None for param in model.parameters())


def test_errors() -> None:
    model = net()
    with pytest.raises(TypeError, match=r"optimizer should be an optimizer of optimx"):
        optimx.release_gradients(torch.optim.AdamW(model.parameters()))
    optimizer = optimx.AdamW(model.parameters())
    with pytest.raises(ValueError, match="bucket_mb"):
        optimx.release_gradients(optimizer, 0.0)
    with pytest.raises(ValueError, match="norm should be"):
        optimx.release_gradients(optimizer, norm="last")
    with pytest.raises(ValueError, match="with a scaler"):
        optimx.release_gradients(optimizer, norm="previous", scaler=torch.amp.GradScaler("cpu"))
    for settings in ({"skip_nonfinite": True}, {"max_grad_norm": optimx.AutoClip()}):
        with pytest.raises(ValueError, match=r"norm should be 'exact' with"):
            optimx.release_gradients(optimx.AdamW(model.parameters(), **settings), norm="previous")
    release = optimx.release_gradients(optimizer, BUCKET_MB)
    with pytest.raises(RuntimeError, match="but the optimizer has none"), release.measure():
        pass
    optimizer.max_grad_norm = 1.0
    with release.accumulate():
        loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="would be lost"), release.measure():
        pass
    assert all(param.grad is not None for param in model.parameters())
