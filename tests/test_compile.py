"""Steps under ``torch.compile``: of ours and of stock, the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.cases import Case, assert_same, make_params, set_grads, train
from tests.engine import QUICK, builders, each_kind, each_of, params_of, usual

SHAPES = [(5,), (3, 4)]


@pytest.fixture
def fresh_dynamo():
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lr", [0.1, "tensor"])
@each_kind
def test_compiled_step(case: Case, lr: float | str, device: torch.device) -> None:
    optimizers = [
        make(make_params(SHAPES, device), **usual(case, lr=torch.tensor(0.1) if lr == "tensor" else lr))
        for make in builders(case)
    ]
    steps = [torch.compile(optimizer.step, backend="eager") for optimizer in optimizers]
    for step in range(3):
        for optimizer, run in zip(optimizers, steps, strict=True):
            set_grads(params_of(optimizer), step)
            run()
    assert_same(*optimizers)
    # and on without the compiler
    train(optimizers, 2, first=3)
    assert_same(*optimizers, {"rtol": 1e-5, "atol": 1e-6} if lr == "tensor" else None)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("max_grad_norm", [None, 0.5], ids=["plain", "clipped"])
@each_of(QUICK, ())
def test_compiled_training_step(case: Case, max_grad_norm: float | None, device: torch.device) -> None:
    make_ours, make_stock = builders(case)
    ours = make_ours(make_params(SHAPES, device), **usual(case), max_grad_norm=max_grad_norm)
    stock = make_stock(make_params(SHAPES, device), **usual(case))

    def train_step(optimizer: Optimizer) -> Tensor:
        loss = torch.stack([(param - 1).square().sum() for param in params_of(optimizer)]).sum()
        loss.backward()
        if optimizer is stock and max_grad_norm is not None:
            nn.utils.clip_grad_norm_(params_of(optimizer), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    compiled = torch.compile(train_step, backend="eager", fullgraph=False)
    for _ in range(3):
        # the step that clips is not compiled; what is computes bias corrections in float32, in stock too
        of_stock = compiled(stock) if max_grad_norm is None else train_step(stock)
        torch.testing.assert_close(compiled(ours), of_stock)
    assert_same(ours, stock)
