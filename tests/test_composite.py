"""``optimx.Composite``: members step as they do apart, and are clipped, scaled, saved and scheduled together."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.utils import clip_grad_norm_
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel
from torch.utils.data import DataLoader

import optimx

# torchvision, which trainers import, has to import first
import tests.models  # noqa: F401
from optimx.lr_scheduler import Cosine, ScheduleLR, Warmup, WarmupLR
from tests.engine import interpreted

Factory = Callable[[list[Any]], torch.optim.Optimizer]

#: Optimizers of matrices and of the rest, by name.
PAIRS: dict[str, dict[str, Factory]] = {
    "muon-adamw": {
        "muon": lambda params: torch.optim.Muon(params, lr=0.02),
        "adamw": lambda params: optimx.AdamW(params, lr=0.01),
    },
    "ours": {
        "muon": lambda params: optimx.Muon(params, lr=0.02),
        "adamw": lambda params: optimx.AdamW(params, lr=0.01),
    },
    "lion-sgd": {
        "lion": lambda params: optimx.Lion(params, lr=0.003),
        "sgd": lambda params: optimx.SGD(params, lr=0.1, momentum=0.9),
    },
    "stock": {
        "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
        "adam": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
    },
}
each_pair = pytest.mark.parametrize("pair", PAIRS)


class Net(nn.Sequential):
    """Takes and returns what transformers' Trainer wants, too."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        out = super().forward(x)
        return out if labels is None else {"loss": (out - labels).square().mean(), "logits": out}

    def split(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Matrices and the rest."""
        params = [*self.parameters()]
        return [p for p in params if p.dim() == 2], [p for p in params if p.dim() != 2]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return 10 * torch.randn(4, 3, generator=generator), torch.randn(4, 2, generator=generator)


def members(model: Net, pair: str) -> dict[str, torch.optim.Optimizer]:
    return {name: make(params) for (name, make), params in zip(PAIRS[pair].items(), model.split(), strict=True)}


def composed(pair: str, **kwargs: Any) -> tuple[Net, optimx.Composite]:
    model = Net()
    return model, optimx.Composite(members(model, pair), **kwargs)


def backward(model: Net, step: int) -> None:
    model.zero_grad()
    model(*batch(step))["loss"].backward()
    if step == 2:
        model[2].bias.grad = None


def train(model: Net, optimizer: Any, steps: Iterator[int] | range, scheduler: Any = None) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def is_ours(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, optimx.MultiTensorStep)


def plain(values: Any) -> Any:
    """A state dict as something that can be compared."""
    if isinstance(values, Tensor):
        return values.tolist()
    if isinstance(values, dict):
        return {key: plain(value) for key, value in values.items()}
    return [*map(plain, values)] if isinstance(values, (list, tuple)) else values


def assert_same(model: nn.Module, optimizers: Any, other: nn.Module, others: Any, **tolerance: float) -> None:
    """Parameters and states of members are the same, to the bit without a tolerance."""
    tolerance = tolerance or {"rtol": 0.0, "atol": 0.0}
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)
    assert [*optimizers] == [*others]
    for name in optimizers:
        mine, theirs = optimizers[name].state_dict(), others[name].state_dict()
        assert plain(mine["param_groups"]) == plain(theirs["param_groups"])
        assert mine["state"].keys() == theirs["state"].keys()
        for key in mine["state"]:
            torch.testing.assert_close(mine["state"][key], theirs["state"][key], **tolerance)


# steps


@each_pair
def test_members_step_as_apart(pair: str) -> None:
    model, composite = composed(pair)
    other = Net()
    apart = members(other, pair)
    train(model, composite, range(5))
    for step in range(5):
        backward(other, step)
        for optimizer in apart.values():
            optimizer.step()
    assert composite.grad_norm is None
    assert_same(model, composite.optimizers, other, apart)


@interpreted
@each_pair
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_one_norm_over_all(pair: str, max_norm: float) -> None:
    """Beside torch's function over all parameters; what is optimx's leaves gradients as they are."""
    model, composite = composed(pair, max_grad_norm=max_norm)
    other = Net()
    apart = members(other, pair)
    for step in range(5):
        backward(model, step)
        clipped = copy.deepcopy(model)
        for twin, param in zip(clipped.parameters(), model.parameters(), strict=True):
            twin.grad = None if param.grad is None else param.grad.clone()
        norm = clip_grad_norm_(clipped.parameters(), max_norm)
        before = copy.deepcopy([param.grad for param in model.parameters()])
        composite.step()
        backward(other, step)
        clip_grad_norm_(other.parameters(), max_norm)
        for optimizer in apart.values():
            optimizer.step()
        # a float32 sum in another order
        torch.testing.assert_close(composite.grad_norm, norm, rtol=1e-6, atol=0.0)
        assert (norm > max_norm) == (max_norm == 0.5)
        ours = {p for own in composite.optimizers.values() if is_ours(own) for p in own.param_groups[0]["params"]}
        for param, grad, twin in zip(model.parameters(), before, clipped.parameters(), strict=True):
            torch.testing.assert_close(param.grad, grad if param in ours else twin.grad, rtol=1e-6, atol=0.0)
    # Muon rounds to bfloat16 what differs in the last bits of float32
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if pair == "muon-adamw" else {"rtol": 1e-5, "atol": 1e-6}
    assert_same(model, composite.optimizers, other, apart, **tolerance)


@interpreted
def test_norm_is_that_of_one_optimizer() -> None:
    """Two members of a class are as one optimizer of it with two groups, also in what clipping does."""
    model, other = Net(), Net()
    first, rest = model.split()
    composite = optimx.Composite({"a": optimx.AdamW(first), "b": optimx.AdamW(rest)}, max_grad_norm=0.5)
    one = optimx.AdamW([{"params": params} for params in other.split()], max_grad_norm=0.5)
    for step in range(4):
        backward(model, step)
        backward(other, step)
        composite.step()
        one.step()
        torch.testing.assert_close(composite.grad_norm, one.grad_norm, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(composite["a"].grad_norm, composite.grad_norm, rtol=0.0, atol=0.0)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    # apart, nothing is clipped any more
    assert composite["a"].max_grad_norm is None


def test_max_grad_norm_may_change_between_steps() -> None:
    model, composite = composed("lion-sgd")
    other, changed = composed("lion-sgd")
    train(model, composite, range(3))
    changed.max_grad_norm = 1e-3
    train(other, changed, range(1))
    assert changed.grad_norm is not None
    assert not torch.equal(model[0].bias, other[0].bias)
    changed.max_grad_norm = None
    train(other, changed, range(1, 2))
    assert changed.grad_norm is None


def test_no_gradients() -> None:
    model, composite = composed("muon-adamw", max_grad_norm=1.0)
    before = copy.deepcopy(model)
    composite.step()
    assert float(composite.grad_norm) == 0.0
    assert_same(model, {}, before, {})


def test_sparse_gradients_are_clipped() -> None:
    embedding, linear = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1)
    twins = copy.deepcopy((embedding, linear))
    composite = optimx.Composite(
        {"rows": torch.optim.SparseAdam(embedding.parameters()), "rest": optimx.SGD(linear.parameters(), lr=1.0)},
        max_grad_norm=0.1,
    )
    indices = torch.tensor([1, 1, 3])
    linear(embedding(indices)).sum().backward()
    composite.step()
    twins[1](twins[0](indices)).sum().backward()
    grads = [twins[0].weight.grad.coalesce().values(), *(p.grad for p in twins[1].parameters())]
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    torch.testing.assert_close(composite.grad_norm, norm, rtol=1e-6, atol=0.0)
    factor = 0.1 / (norm + 1e-6)
    torch.testing.assert_close(embedding.weight.grad.coalesce().values(), factor * grads[0], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(linear.weight, twins[1].weight - factor * twins[1].weight.grad, rtol=1e-6, atol=1e-7)


def test_closure_is_called_once() -> None:
    model, composite = composed("muon-adamw")
    other, expected = composed("muon-adamw")
    losses = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        backward(model, 0)
        losses.append(model(*batch(0))["loss"])
        return losses[-1]

    with torch.no_grad():
        loss = composite.step(closure)
    train(other, expected, range(1))
    assert len(losses) == 1
    assert loss is losses[0]
    assert_same(model, composite.optimizers, other, expected.optimizers)


def test_zero_grad() -> None:
    model, composite = composed("muon-adamw")
    backward(model, 0)
    composite.zero_grad(set_to_none=False)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())
    composite.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_hooks() -> None:
    """Those of the composite once around all, those of a member around its step, with torch's profiling."""
    model, composite = composed("muon-adamw")
    calls: list[str] = []
    composite.register_step_pre_hook(lambda optimizer, *_: calls.append(f"before {type(optimizer).__name__}"))
    composite.register_step_post_hook(lambda optimizer, *_: calls.append(f"after {type(optimizer).__name__}"))
    for member in composite.optimizers.values():
        member.register_step_post_hook(lambda optimizer, *_: calls.append(type(optimizer).__name__))
    backward(model, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        composite.step()
    assert calls == ["before Composite", "Muon", "AdamW", "after Composite"]
    assert {f"Optimizer.step#{name}.step" for name in ("Composite", "Muon", "AdamW")} <= {
        event.name for event in profile.events()
    }


# what it refuses


def test_refusals() -> None:
    model = Net()
    (first, second), rest = model.split()
    with pytest.raises(ValueError, match=r"optimizers should be one or more but are: \{\}"):
        optimx.Composite({})
    with pytest.raises(TypeError, match="optimizers should be a dict of optimizers by name but is: list"):
        optimx.Composite([optimx.SGD(rest)])
    with pytest.raises(TypeError, match=r"optimizers\['a'\] should be a torch.optim.Optimizer but is: Linear"):
        optimx.Composite({"a": model[0]})
    with pytest.raises(ValueError, match=r"need no closure to step, but is: LBFGS"):
        optimx.Composite({"a": torch.optim.LBFGS(rest)})
    with pytest.raises(ValueError, match=r"should be no composite, .* but is: Composite"):
        optimx.Composite({"a": optimx.Composite({"b": optimx.SGD(rest)})})
    with pytest.raises(ValueError, match=r"one of shape \(4, 3\) is in: 'a' and 'b'"):
        optimx.Composite({"a": optimx.SGD([first, second]), "b": optimx.SGD([*rest, first])})
    with pytest.raises(ValueError, match=r"max_grad_norm should be > 0 but is: -1"):
        optimx.Composite({"a": optimx.SGD(rest)}, max_grad_norm=-1)
    with pytest.raises(ValueError, match=r"max_grad_norm of 'a' should be unset .* but is: 2.0"):
        optimx.Composite({"a": optimx.SGD(rest, max_grad_norm=2.0)}, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"normalize_grads of 'a' should be unset .* but is: True"):
        optimx.Composite({"a": optimx.LAMB(rest, normalize_grads=True)}, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"norm_group should be that of 'a' but is: None"):
        optimx.Composite({"a": optimx.SGD(rest, norm_group=object())}, max_grad_norm=1.0)
    rest[0]._fsdp_flattened = True
    with pytest.raises(ValueError, match=r"norm_group should be the process group .* but is: None"):
        optimx.Composite({"a": torch.optim.SGD(rest)}, max_grad_norm=1.0)


def test_refusals_of_a_step() -> None:
    """Nothing is changed, and no member keeps what it was told."""
    model, composite = composed("lion-sgd", max_grad_norm=1.0)
    before = copy.deepcopy(model)
    composite["sgd"].max_grad_norm = 2.0
    backward(model, 0)
    with pytest.raises(RuntimeError, match=r"max_grad_norm of 'sgd' should be unset"):
        composite.step()
    assert_same(model, {}, before, {})
    composite["sgd"].max_grad_norm = None
    handle = composite["lion"].register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        composite.step()
    handle.remove()
    assert (composite["lion"].max_grad_norm, composite["lion"].total_norm) == (None, None)


def test_members_may_clip_apart() -> None:
    model = Net()
    other = Net()
    matrices, rest = model.split()
    composite = optimx.Composite({"a": optimx.AdamW(matrices, max_grad_norm=0.1), "b": optimx.SGD(rest)})
    matrices, rest = other.split()
    expected = [optimx.AdamW(matrices, max_grad_norm=0.1), optimx.SGD(rest)]
    backward(model, 0)
    backward(other, 0)
    composite.step()
    for optimizer in expected:
        optimizer.step()
    assert_same(model, {}, other, {})
    assert composite.grad_norm is None
    assert torch.equal(composite["a"].grad_norm, expected[0].grad_norm)


# groups and states


def test_groups_are_the_members_own() -> None:
    _, composite = composed("muon-adamw")
    assert isinstance(composite, torch.optim.Optimizer)
    own = [*composite["muon"].param_groups, *composite["adamw"].param_groups]
    assert [*map(id, composite.param_groups)] == [*map(id, own)]
    composite.param_groups[1]["lr"] = 0.5
    assert composite["adamw"].param_groups[0]["lr"] == 0.5
    # a member that loads has other groups then
    composite["muon"].load_state_dict(composite["muon"].state_dict())
    assert composite.param_groups[0] is composite["muon"].param_groups[0]
    assert composite.param_groups[0] is not own[0]
    assert repr(composite).startswith("Composite (\nmuon: Muon (\nParameter Group 0\n")
    assert "adamw: AdamW (\nParameter Group 0\n" in repr(composite)


def test_added_groups() -> None:
    """They come last, whichever member they are of, as schedulers zip groups with what they know of them."""
    model, composite = composed("muon-adamw", max_grad_norm=0.5)
    more = nn.Linear(2, 2)
    composite.add_param_group({"params": more.weight, "lr": 0.5, "optimizer": "muon"})
    composite.add_param_group({"params": [more.bias], "optimizer": "adamw"})
    assert [group["lr"] for group in composite.param_groups] == [0.02, 0.01, 0.5, 0.01]
    assert composite["muon"].param_groups[1] is composite.param_groups[2]
    assert "optimizer" not in composite.param_groups[2]
    assert composite.state_dict()["param_groups"][2]["params"] == [4]
    with pytest.raises(TypeError, match="param_group should be a dict but is: list"):
        composite.add_param_group([more.bias])
    with pytest.raises(ValueError, match=r"param_group\['optimizer'\] should be one of adamw, muon but is: None"):
        composite.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="'muonn'; did you mean 'muon'"):
        composite.add_param_group({"params": [nn.Parameter(torch.ones(2))], "optimizer": "muonn"})
    with pytest.raises(ValueError, match=r"of shape \(2, 2\) is in: 'muon' and 'adamw'"):
        composite.add_param_group({"params": [more.weight], "optimizer": "adamw"})
    assert len(composite.param_groups) == 4
    backward(model, 0)
    more.weight.grad = torch.full((2, 2), 100.0)
    composite.step()
    assert float(composite.grad_norm) > 200.0
    assert more.weight in composite["muon"].state


def test_states_are_the_members_own() -> None:
    model, composite = composed("muon-adamw")
    weight, bias = model[0].weight, model[0].bias
    states = composite.state
    assert (len(states), [*states], weight in states, states.get(weight, 1)) == (0, [], False, 1)
    assert states.pop(weight, 1) == 1
    train(model, composite, range(2))
    assert len(states) == 4
    assert {*states} == {*model.parameters()}
    assert states[weight] is composite["muon"].state[weight]
    assert dict(states.items())[bias] is composite["adamw"].state[bias] is states.get(bias)
    del states[bias]
    assert bias not in composite["adamw"].state
    states[bias] = {"step": torch.tensor(3.0)}
    assert composite["adamw"].state[bias]["step"] == 3.0
    assert states.setdefault(bias, {}) is composite["adamw"].state[bias]
    assert states.pop(bias)["step"] == 3.0
    # torch's state is a defaultdict
    states[bias]["step"] = torch.tensor(1.0)
    assert composite["adamw"].state[bias] == {"step": torch.tensor(1.0)}
    with pytest.raises(KeyError, match="a state should be of a parameter of one of the optimizers"):
        states[nn.Parameter(torch.ones(1))] = {}
    composite["muon"].load_state_dict(composite["muon"].state_dict())
    assert states[weight] is composite["muon"].state[weight]


# checkpoints


def saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_state_dict_is_that_of_one_optimizer() -> None:
    """Of stock's class with a group each, whose checkpoints load, too; and back."""
    model, other = Net(), Net()
    composite = optimx.Composite({name: torch.optim.AdamW(own) for name, own in zip("ab", model.split(), strict=True)})
    one = torch.optim.AdamW([{"params": params} for params in other.split()])
    train(model, composite, range(2))
    train(other, one, range(2))
    state_dict = composite.state_dict()
    assert [group.pop("optimizer") for group in state_dict["param_groups"]] == ["a", "b"]
    assert plain(state_dict) == plain(one.state_dict())
    resumed_model, resumed = copy.deepcopy(other), copy.deepcopy(one)
    resumed = torch.optim.AdamW([{"params": params} for params in resumed_model.split()])
    resumed.load_state_dict(saved(composite.state_dict()))
    composite.load_state_dict(saved(one.state_dict()))
    train(model, composite, range(2, 4))
    train(other, one, range(2, 4))
    train(resumed_model, resumed, range(2, 4))
    assert_same(model, {}, other, {})
    assert_same(resumed_model, {}, other, {})


@each_pair
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_resume(pair: str, max_norm: float | None) -> None:
    model, composite = composed(pair, max_grad_norm=max_norm)
    train(model, composite, range(5))
    other, before = composed(pair, max_grad_norm=max_norm)
    composite.param_groups[0]["note"] = before.param_groups[0]["note"] = "kept"
    train(other, before, range(3))
    checkpoint = saved(before.state_dict())
    assert "optimizer" not in before.param_groups[0]
    resumed_model, resumed = composed(pair, max_grad_norm=max_norm)
    resumed_model.load_state_dict(saved(other.state_dict()))
    resumed.load_state_dict(checkpoint)
    train(resumed_model, resumed, range(3, 5))
    assert_same(resumed_model, resumed.optimizers, model, composite.optimizers)
    assert resumed.param_groups[0]["note"] == "kept"


def test_resume_with_members_in_another_order() -> None:
    """Also with groups that have joined in another order: groups know their member."""
    model, composite = composed("muon-adamw")
    extra = nn.Parameter(torch.ones(2, 2))
    composite.add_param_group({"params": [extra], "lr": 0.5, "optimizer": "muon"})
    train(model, composite, range(3))
    other = copy.deepcopy(model)
    matrices, rest = other.split()
    adamw = optimx.AdamW(rest, lr=1.0)
    muon = torch.optim.Muon([{"params": matrices}, {"params": [nn.Parameter(torch.ones(2, 2))]}])
    resumed = optimx.Composite({"adamw": adamw, "muon": muon})
    resumed.load_state_dict(saved(composite.state_dict()))
    assert [group["lr"] for group in resumed.param_groups] == [0.01, 0.02, 0.5]
    train(model, composite, range(3, 5))
    train(other, resumed, range(3, 5))
    assert_same(other, {"muon": muon, "adamw": adamw}, model, composite.optimizers)


def test_checkpoints_of_others() -> None:
    """Other members, other groups, states of nobody: nothing is changed."""
    model, composite = composed("muon-adamw")
    train(model, composite, range(2))
    before = plain(composite.state_dict())
    good = composite.state_dict()
    alone = optimx.Composite({"muon": torch.optim.Muon(Net().split()[0])}).state_dict()
    message = r"should have groups of \{'muon': \[2\], 'adamw': \[2\]\} parameters but has: "
    with pytest.raises(ValueError, match=message + r"\{'muon': \[2\]\}"):
        composite.load_state_dict(alone)
    with pytest.raises(ValueError, match=message + r"\{'lion': \[2\], 'sgd': \[2\]\}"):
        composite.load_state_dict(composed("lion-sgd")[1].state_dict())
    others = [*Net().split(), [nn.Parameter(torch.ones(1))]]
    with pytest.raises(ValueError, match=message + r"\{'muon': \[2\], 'adamw': \[2\], None: \[1\]\}"):
        composite.load_state_dict(torch.optim.SGD([{"params": params} for params in others]).state_dict())
    with pytest.raises(ValueError, match=r"state_dict\['state'\] should be of parameters but is also of: \['17'\]"):
        composite.load_state_dict({**good, "state": {**good["state"], 17: {}}})
    assert plain(composite.state_dict()) == before


def test_all_members_load_or_none() -> None:
    model, composite = composed("lion-sgd")
    other, expected = composed("lion-sgd")
    train(model, composite, range(3))
    train(other, expected, range(3))
    groups, states = [*map(id, composite.param_groups)], {key: id(value) for key, value in composite.state.items()}
    checkpoint = composed("lion-sgd")[1].state_dict()
    # the last to load
    handle = composite["sgd"].register_load_state_dict_post_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        composite.load_state_dict(checkpoint)
    handle.remove()
    assert [*map(id, composite.param_groups)] == groups
    assert {key: id(value) for key, value in composite.state.items()} == states
    train(model, composite, range(3, 5))
    train(other, expected, range(3, 5))
    assert_same(model, composite.optimizers, other, expected.optimizers)


def test_hooks_of_checkpoints() -> None:
    """The composite's around all; members' own around theirs, with the entries that they add."""
    model, composite = composed("muon-adamw")
    train(model, composite, range(2))
    calls: list[str] = []
    composite.register_state_dict_pre_hook(lambda _: calls.append("save"))
    composite.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "more": 1})
    composite["muon"].register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "note": "muon's"})
    state_dict = composite.state_dict()
    assert (state_dict["more"], state_dict["optimizers"]) == (1, {"muon": {"note": "muon's"}})
    composite.register_load_state_dict_pre_hook(lambda _, state_dict: {**state_dict, "more": 2})
    composite.register_load_state_dict_pre_hook(lambda _, state_dict: calls.append(f"load {state_dict['more']}"))
    composite["muon"].register_load_state_dict_pre_hook(lambda _, state_dict: calls.append(state_dict["note"]))
    composite["adamw"].register_load_state_dict_post_hook(lambda _: calls.append("loaded adamw"))
    composite.register_load_state_dict_post_hook(lambda _: calls.append("loaded all"))
    composite.load_state_dict(state_dict)
    assert calls == ["save", "load 2", "muon's", "loaded adamw", "loaded all"]
    assert state_dict["more"] == 1


def test_states_of_no_parameter_cannot_be_saved() -> None:
    _, composite = composed("stock")
    composite["adam"].state["history"] = [1, 2]
    with pytest.raises(RuntimeError, match="a state of 'adam' should be of a parameter but is of: 'history'"):
        composite.state_dict()


@pytest.mark.parametrize("flatten", [False, True], ids=["groups", "flattened"])
def test_distributed_checkpoint(flatten: bool, tmp_path: Path) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, composite = composed("muon-adamw", max_grad_norm=0.5)
    train(model, composite, range(3))
    # what there is to read into is made by the functions, where it is missing
    composite.zero_grad()
    dcp.save({"optimizer": get_optimizer_state_dict(model, composite, options=options)}, checkpoint_id=tmp_path)
    other, resumed = composed("muon-adamw", max_grad_norm=0.5)
    for group in resumed.param_groups:
        group["lr"] = 1.0
    state = get_optimizer_state_dict(other, resumed, options=options)
    dcp.load({"optimizer": state}, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other, resumed, state, options=options)
    other.load_state_dict(model.state_dict())
    assert [group["lr"] for group in resumed.param_groups] == [0.02, 0.01]
    train(model, composite, range(3, 5))
    train(other, resumed, range(3, 5))
    assert_same(other, resumed.optimizers, model, composite.optimizers)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["deepcopy", "pickle"]
)
def test_copies(copied: Callable[[Any], Any]) -> None:
    """With the model: the copy's parameters are those of the model's copy."""
    model, composite = composed("muon-adamw", max_grad_norm=0.5)
    composite.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "optimizer": "muon"})
    train(model, composite, range(2))
    twin_model, twin = copied((model, composite))
    assert type(twin) is optimx.Composite
    assert twin.max_grad_norm == 0.5
    assert torch.equal(twin.grad_norm, composite.grad_norm)
    assert [len(group["params"]) for group in twin.param_groups] == [2, 2, 1]
    assert {*twin.param_groups[0]["params"], *twin.param_groups[1]["params"]} == {*twin_model.parameters()}
    train(model, composite, range(2, 4))
    assert not torch.equal(model[0].weight, twin_model[0].weight)
    train(twin_model, twin, range(2, 4))
    assert_same(twin_model, twin.optimizers, model, composite.optimizers)
    twin.register_step_post_hook(lambda *_: None)


def test_a_copy_knows_the_ranks() -> None:
    composite = optimx.Composite({"a": optimx.SGD(Net().parameters())}, 1.0, norm_group=iter(()))
    assert copy.deepcopy(composite).norm_group is composite.norm_group


# schedules

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 0.5**step),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=8, cycle_momentum=False),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.5)], milestones=[2]
    ),
    "ScheduleLR": lambda opt: ScheduleLR(opt, {"lr": Warmup(2) >> Cosine(6), "weight_decay": Cosine(8)}),
    "WarmupLR": lambda opt: WarmupLR(opt, Cosine(8), 2),
    "WarmupAroundLR": lambda opt: WarmupLR(opt, lr_scheduler.StepLR(opt, 2), 2),
    "SWALR": lambda opt: SWALR(opt, swa_lr=0.001, anneal_epochs=3),
}
each_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


class Each:
    """A scheduler of each member."""

    def __init__(self, make: Callable[[Any], Any], optimizers: dict[str, torch.optim.Optimizer]) -> None:
        self.schedulers = [make(optimizer) for optimizer in optimizers.values()]

    def step(self) -> None:
        for scheduler in self.schedulers:
            scheduler.step()


@each_scheduler
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_schedulers(name: str) -> None:
    """One of the composite does what one of each member would do."""
    model, composite = composed("muon-adamw")
    other, expected = composed("muon-adamw")
    scheduler = SCHEDULERS[name](composite)
    each = Each(SCHEDULERS[name], expected.optimizers)
    for step in range(6):
        train(model, composite, range(step, step + 1), scheduler)
        train(other, expected, range(step, step + 1), each)
        rates, expected_rates = ([group["lr"] for group in own.param_groups] for own in (composite, expected))
        assert rates == expected_rates
    assert rates != [0.02, 0.01]
    assert_same(model, composite.optimizers, other, expected.optimizers)


@each_scheduler
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_schedulers_resume(name: str) -> None:
    model, composite = composed("muon-adamw")
    scheduler = SCHEDULERS[name](composite)
    train(model, composite, range(3), scheduler)
    other, resumed = composed("muon-adamw")
    then = SCHEDULERS[name](resumed)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved(composite.state_dict()))
    then.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    train(model, composite, range(3, 6), scheduler)
    train(other, resumed, range(3, 6), then)
    assert_same(other, resumed.optimizers, model, composite.optimizers)


def test_cycled_momentum() -> None:
    """Torch's OneCycleLR cycles betas or momenta, of which all members have to have one; else it says so."""
    model, other = Net(), Net()
    matrices, rest = model.split()
    composite = optimx.Composite({"a": optimx.AdamW(matrices), "b": optimx.Lion(rest)})
    matrices, rest = other.split()
    expected = optimx.Composite({"a": optimx.AdamW(matrices), "b": optimx.Lion(rest)})

    def make(optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8)

    scheduler, each = make(composite), Each(make, expected.optimizers)
    assert [group["betas"] for group in composite.param_groups] == [(0.95, 0.999), (0.95, 0.99)]
    train(model, composite, range(4), scheduler)
    train(other, expected, range(4), each)
    assert_same(model, composite.optimizers, other, expected.optimizers)
    with pytest.raises(ValueError, match="optimizer must support momentum or beta1"):
        make(composed("muon-adamw")[1])


def test_fields_of_one_member() -> None:
    """A schedule of what other members have not is one of that member: its groups are the composite's."""
    _, composite = composed("muon-adamw")
    with pytest.raises(ValueError, match=r"field should be one of eps, lr, weight_decay but is: 'momentum'"):
        ScheduleLR(composite, {"momentum": Cosine(8)})
    scheduler = ScheduleLR(composite["muon"], {"momentum": Warmup(4)})
    composite.step()
    scheduler.step()
    assert composite.param_groups[0]["momentum"] == pytest.approx(0.95 * 2 / 4)


def test_plateau() -> None:
    _, composite = composed("muon-adamw")
    scheduler = lr_scheduler.ReduceLROnPlateau(composite, factor=0.5, patience=0)
    for loss in (1.0, 2.0, 0.5, 0.7):
        scheduler.step(loss)
    assert [group["lr"] for group in composite.param_groups] == [0.005, 0.0025]


def test_averaged_weights() -> None:
    """Torch's recipe of SWA, beside the same with one optimizer after the other."""
    averages = []
    for make in (SCHEDULERS["SWALR"], None):
        model, composite = composed("muon-adamw")
        scheduler = Each(SCHEDULERS["SWALR"], composite.optimizers) if make is None else make(composite)
        averaged = AveragedModel(model)
        for step in range(5):
            train(model, composite, range(step, step + 1), scheduler)
            averaged.update_parameters(model)
        averages.append(averaged)
    assert_same(averages[0], {}, averages[1], {})
    assert not torch.equal(averages[0].module[0].weight, model[0].weight)


# gradient scaling


@each_pair
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("scaler_cls", [torch.amp.GradScaler, optimx.GradScaler], ids=["torchs_scaler", "our_scaler"])
def test_all_members_skip_or_none(pair: str, max_norm: float | None, scaler_cls: Any) -> None:
    """An infinite gradient of one is a step that none takes. Scales are powers of 2: nothing else differs."""
    model, composite = composed(pair, max_grad_norm=max_norm)
    other, expected = composed(pair, max_grad_norm=max_norm)
    scaler = scaler_cls("cpu", init_scale=1024.0, growth_interval=2)
    skipped = []
    for step in range(6):
        composite.zero_grad()
        loss = model(*batch(step))["loss"]
        scaler.scale(loss).backward()
        if step in (1, 4):
            [model[0].weight, model[2].bias][step == 1].grad[0] = float("inf")
        scaler.step(composite)
        scaler.update()
        skipped.append(bool(composite.step_was_skipped))
        for optimizer in filter(is_ours, composite.optimizers.values()):
            assert bool(optimizer.step_was_skipped) == skipped[-1]
        if step in (1, 4):
            assert scaler_cls is torch.amp.GradScaler or max_norm is None or not composite.grad_norm.isfinite()
            continue
        other.zero_grad()
        other(*batch(step))["loss"].backward()
        expected.step()
        if max_norm is not None:
            assert torch.equal(composite.grad_norm, expected.grad_norm)
    assert scaler.get_scale() == 1024.0 / 2 * 2 / 2
    # torch's does not call what it skips
    assert skipped == [scaler_cls is optimx.GradScaler and step in (1, 4) for step in range(6)]
    assert_same(model, composite.optimizers, other, expected.optimizers)
    # without a scaler nothing is skipped
    scaler.scale(model(*batch(0))["loss"]).backward()
    model[0].weight.grad[0] = float("inf")
    scaler.step(composite)
    composite.step()
    assert not composite.step_was_skipped


def test_fused_members_get_unscaled_gradients() -> None:
    """Members that would unscale by themselves, one by one, are not asked to: what one skips, the others would not."""
    models = Net(), Net()
    composites = []
    for model in models:
        matrices, rest = model.split()
        own = {"a": optimx.AdamW(matrices, fused=True), "b": torch.optim.AdamW(rest, fused=True)}
        composites.append(optimx.Composite(own))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        composites[0].zero_grad()
        scaler.scale(models[0](*batch(step))["loss"]).backward()
        if step == 1:
            models[0][0].weight.grad[0] = float("nan")
        scaler.step(composites[0])
        scaler.update()
        if step != 1:
            composites[1].zero_grad()
            models[1](*batch(step))["loss"].backward()
            composites[1].step()
    assert_same(models[0], composites[0].optimizers, models[1], composites[1].optimizers)


# what explain shows


def test_explain() -> None:
    _, composite = composed("muon-adamw")
    explanation = optimx.explain(composite)
    assert explanation.optimizer == "Composite"
    assert [member.optimizer for member in explanation.members] == ["muon: Muon", "adamw: AdamW"]
    assert explanation.rows == (*explanation.members[0].rows, *optimx.explain(composite["adamw"]).rows)
    assert explanation.rows[0].reason == "Muon is not an optimx optimizer"
    composite.max_grad_norm = 1.0
    clipped = optimx.explain(composite)
    assert [row.reason for row in clipped.rows] == [
        "Muon is not an optimx optimizer; its gradients are written when they are clipped", "",
    ]  # fmt: skip
    assert str(clipped).startswith("muon: Muon\nbackend")
    assert "\n\nadamw: AdamW\nbackend" in str(clipped)


# other people's training loops

STEPS = 5
CLIP = 0.5


def decaying(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * STEPS))


@pytest.fixture(scope="module")
def by_hand() -> Net:
    model, composite = composed("ours", max_grad_norm=CLIP)
    scheduler = decaying(composite)
    for step in range(STEPS):
        composite.zero_grad()
        model(*batch(step))["loss"].backward()
        composite.step()
        scheduler.step()
    return model


@pytest.mark.filterwarnings("ignore")
def test_lightning(by_hand: Net, tmp_path: Path) -> None:
    """Resumed from its checkpoint after each epoch but the first."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.composite = composed("ours", max_grad_norm=CLIP)

        def training_step(self, numbers: Tensor, index: int) -> Tensor:
            return self.net(*batch(self.trainer.current_epoch))["loss"]

        def configure_optimizers(self) -> Any:
            return {"optimizer": self.composite, "lr_scheduler": {"scheduler": decaying(self.composite)}}

    path = None
    for epoch in range(STEPS):
        trainer = lightning.Trainer(
            max_epochs=epoch + 1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        module = Module()
        trainer.fit(module, DataLoader([torch.zeros(1)], batch_size=None), ckpt_path=path)
        path = tmp_path / "last.ckpt"
        trainer.save_checkpoint(path)
    assert_same(module.net, {}, by_hand, {})


@pytest.mark.filterwarnings("ignore")
def test_accelerate(by_hand: Net, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)

    def begin() -> tuple[Any, ...]:
        model, composite = composed("ours", max_grad_norm=CLIP)
        return accelerator.prepare(model, composite, decaying(composite))

    model, optimizer, scheduler = begin()
    for step in range(STEPS):
        if step == 2:
            accelerator.save_state(str(tmp_path))
            accelerator.free_memory()
            model, optimizer, scheduler = begin()
            accelerator.load_state(str(tmp_path))
        accelerator.backward(model(*batch(step))["loss"])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert_same(accelerator.unwrap_model(model), {}, by_hand, {})


@pytest.mark.filterwarnings("ignore")
def test_transformers(by_hand: Net, tmp_path: Path) -> None:
    """A training that ends early, and one that goes on from its checkpoint."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    inputs = [{"x": x, "labels": y} for step in range(STEPS) for x, y in zip(*batch(step), strict=True)]
    for last in (3, STEPS):
        model, composite = composed("ours", max_grad_norm=CLIP)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=last, use_cpu=True, report_to=[],
            save_strategy="steps", save_steps=3, max_grad_norm=0.0, disable_tqdm=True, remove_unused_columns=False,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=inputs, optimizers=(composite, decaying(composite))
        )
        trainer.train(resume_from_checkpoint=last == STEPS)
    assert trainer.state.global_step == STEPS
    assert_same(model, {}, by_hand, {})
