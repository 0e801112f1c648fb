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
@pytest.mark.parametrize("name", ["adamw", "torch.optim:AdamW"])
def test_lightning_unfreezes_a_backbone(name: str, tmp_path: Path) -> None:
    """The callback adds a plain group in the middle of the training; the schedule goes on, also from a checkpoint."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import BackboneFinetuning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.backbone, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
            self.rates: list[list[float]] = []

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            self.rates.append([group["lr"] for group in self.optimizers().param_groups])
            return (self.head(self.backbone(batch[0])) - batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            cfg = {"optimizer": {"name": name, "lr": 0.1}, "schedule": {"name": "linear", "total": 4 * STEPS}}
            return optimx.build(self, cfg).as_lightning()

    def fit(epochs: int, checkpoint: Path | None) -> Any:
        callback = BackboneFinetuning(1, lambda_func=lambda epoch: 1.0, should_align=False, backbone_initial_lr=0.01)
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, callbacks=[callback],
        )  # fmt: skip
        module = Module()
        trainer.fit(module, DataLoader(batches(), batch_size=None), ckpt_path=checkpoint, weights_only=False)
        if checkpoint is None:
            trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    whole = fit(4, None)
    # the head's two groups, then the backbone's own
    assert [len(rates) for rates in whole.rates] == [2] * STEPS + [3] * 3 * STEPS
    for step, rates in enumerate(whole.rates):
        factor = 1 - step / (4 * STEPS)
        assert rates[:2] == pytest.approx([0.1 * factor] * 2)
        # at an epoch's beginning the callback sets its own rate
        assert rates[2:] == pytest.approx([0.01 * (factor if step % STEPS else 1.0)] * len(rates[2:]))
    fit(3, None)
    # only the rates: the callback leaves the backbone frozen where it begins after the epoch that unfreezes it
    resumed = fit(4, tmp_path / "3.ckpt")
    assert resumed.rates == [pytest.approx(rates) for rates in whole.rates[3 * STEPS :]]


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


# schedule-free optimizers, whose parameters are other ones in an evaluation


def averages(steps: int = STEPS) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters after the plain loop: those that are trained, and those to evaluate."""
    model = Net()
    optimizer = optimx.ScheduleFreeAdamW(model.parameters(), lr=0.1)
    for x, y in batches()[:steps]:
        optimizer.zero_grad()
        model(x, y)["loss"].backward()
        optimizer.step()
    trained = [p.detach().clone() for p in model.parameters()]
    with optimizer.averaged():
        return trained, [p.detach().clone() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore")
def test_averages_in_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    trained, evaluated = averages()
    accelerator = accelerate.Accelerator(cpu=True)
    model = Net()
    prepared, optimizer = accelerator.prepare(model, optimx.ScheduleFreeAdamW(model.parameters(), lr=0.1))
    for x, y in batches():
        accelerator.backward(prepared(x, y)["loss"])
        optimizer.step()
        optimizer.zero_grad()
        with optimx.averaged(optimizer):
            pass
    with optimx.averaged(optimizer):
        assert_same(model, evaluated)
    optimizer.eval()
    assert_same(model, evaluated)
    optimizer.train()
    assert_same(model, trained)


@pytest.mark.filterwarnings("ignore")
def test_averages_in_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    trained, evaluated = averages()
    seen = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return self.net(*batch)["loss"]

        def on_validation_model_eval(self) -> None:
            super().on_validation_model_eval()
            self.optimizers().eval()

        def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            seen.append([p.detach().clone() for p in self.net.parameters()])

        def on_validation_model_train(self) -> None:
            super().on_validation_model_train()
            self.optimizers().train()

        def configure_optimizers(self) -> Any:
            return optimx.ScheduleFreeAdamW(self.parameters(), lr=0.1)

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, val_check_interval=STEPS // 2, num_sanity_val_steps=0,
    )  # fmt: skip
    loaders = [DataLoader(some, batch_size=None) for some in (batches(), batches()[:1])]
    trainer.fit(module, *loaders)
    assert len(seen) == 2
    for found, expected in zip(seen, (averages(STEPS // 2)[1], evaluated), strict=True):
        assert all(map(torch.equal, found, expected))
    assert_same(module.net, trained)
    with optimx.averaged(module.optimizers()):
        assert_same(module.net, evaluated)


@pytest.mark.filterwarnings("ignore")
def test_averages_in_transformers(tmp_path: Path) -> None:
    """Its Trainer evaluates them by itself."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    trained, evaluated = averages()
    model, seen = Net(), []

    class Trainer(transformers.Trainer):  # type: ignore[name-defined,misc]
        def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
            seen.append([p.detach().clone() for p in model.parameters()])
            return super().prediction_step(*args, **kwargs)

    inputs = [{"x": x, "labels": y} for batch in batches() for x, y in zip(*batch, strict=True)]
    optimizer = optimx.ScheduleFreeAdamW(model.parameters(), lr=0.1)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, per_device_eval_batch_size=len(inputs), report_to=[],
        num_train_epochs=1, use_cpu=True, save_strategy="no", max_grad_norm=0.0, disable_tqdm=True,
        eval_strategy="steps", eval_steps=STEPS // 2, remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=inputs, eval_dataset=inputs,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
    )  # fmt: skip
    trainer.train()
    for found, expected in zip(seen, (averages(STEPS // 2)[1], evaluated), strict=True):
        assert all(map(torch.equal, found, expected))
    optimizer.train()
    assert_same(model, trained)
