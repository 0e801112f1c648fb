"""What a build makes goes into other people's training loops, with the libraries themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import optimx

# torchvision, which these libraries import, has to import first
import tests.models  # noqa: F401

STEPS = 6
CFG = {
    "optimizer": {"name": "adamw", "lr": 0.1, "max_grad_norm": 0.5},
    "groups": {"rules": [{"match": "2.*", "lr_mult": 2.0}]},
    "schedule": {"name": "linear", "total": STEPS, "warmup": 2},
}


class Net(nn.Sequential):
    """Takes and returns what transformers' Trainer wants, too."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        out = super().forward(x)
        return out if labels is None else {"loss": (out - labels).square().mean(), "logits": out}


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, generator=generator), torch.randn(4, 2, generator=generator)) for _ in range(STEPS)]


@pytest.fixture(scope="module")
def by_hand() -> list[Tensor]:
    """Parameters after the plain loop."""
    model = Net()
    optimizer, scheduler = optimx.build(model, CFG)
    for x, y in batches():
        optimizer.zero_grad()
        model(x, y)["loss"].backward()
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.0
    return [p.detach().clone() for p in model.parameters()]


def assert_same(model: nn.Module, expected: list[Tensor]) -> None:
    for mine, theirs in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(mine.detach().cpu(), theirs, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_lightning(by_hand: list[Tensor], tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return self.net(*batch)["loss"]

        def configure_optimizers(self) -> Any:
            return optimx.build(self.net, CFG).as_lightning()

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches(), batch_size=None))
    # one step of the schedule for each of the optimizer's
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0
    assert_same(module.net, by_hand)


@pytest.mark.filterwarnings("ignore")
def test_accelerate(by_hand: list[Tensor]) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = Net()
    optimizer, scheduler = optimx.build(model, CFG)
    loader = DataLoader(batches(), batch_size=None)
    prepared, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for x, y in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(x, y)["loss"])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert_same(model, by_hand)


@pytest.mark.filterwarnings("ignore")
def test_transformers(by_hand: list[Tensor], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    inputs = [{"x": x, "labels": y} for batch in batches() for x, y in zip(*batch, strict=True)]
    model = Net()
    optimizer, scheduler = optimx.build(model, CFG)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=1, use_cpu=True, report_to=[],
        save_strategy="no", max_grad_norm=0.0, disable_tqdm=True, remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=inputs, optimizers=(optimizer, scheduler))
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert_same(model, by_hand)
