"""The recipes of docs/sharding.md with other libraries, as two ranks run them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

import optimx

# torchvision, which these libraries import, has to import first
import tests.models  # noqa: F401
from tests.distributed.recipes import ADAMW, CLIP, STEPS, train, whole
from tests.distributed.transformer import apply_tensor_parallel, loss_of, shard, transformer


@contextmanager
def launched(rank: int) -> Iterator[None]:
    """The environment that torchrun makes."""
    world = str(dist.get_world_size())
    names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    with mock.patch.dict(os.environ, {**names, "OMP_NUM_THREADS": "1"}):
        yield


@contextmanager
def fsdp_on_cpus() -> Iterator[None]:
    """Accelerate takes FSDP for what it is where all processes are on CPUs, too."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(state: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with mock.patch.object(AcceleratorState, "__init__", init):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def with_accelerate(rank: int, in_step: bool) -> dict[str, Any]:
    """``prepare`` shards the model, and then swaps the parameters of the optimizer."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    with launched(rank), fsdp_on_cpus():
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        model = transformer()
        optimizer = optimx.AdamW(model.parameters(), **ADAMW, max_grad_norm=CLIP if in_step else None)
        model, prepared = accelerator.prepare(model, optimizer)

        def step() -> Tensor:
            norm = None if in_step else accelerator.clip_grad_norm_(model.parameters(), CLIP).full_tensor()
            prepared.step()
            prepared.zero_grad()
            return optimizer.grad_norm if norm is None else norm

        norms = train([model], rank, dist.get_world_size(), step)
        return {"params": whole([model]), "norms": norms, "shown": str(optimx.explain(optimizer))}


def with_transformers(rank: int, in_step: bool, folder: str) -> dict[str, Any]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    norms: list[float] = []

    class Rows(Trainer):
        def compute_loss(self, model: Any, inputs: Any, **_: Any) -> Tensor:
            return loss_of([model], self.state.global_step, rank, dist.get_world_size())

    class Norms(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            if not in_step and "grad_norm" in logs:
                norms.append(logs["grad_norm"])

        def on_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
            if in_step:
                norms.append(float(optimizer.optimizer.grad_norm))

    with launched(rank), fsdp_on_cpus():
        arguments = TrainingArguments(
            output_dir=folder, max_steps=STEPS, logging_steps=1, use_cpu=True, lr_scheduler_type="constant",
            max_grad_norm=0.0 if in_step else CLIP, weight_decay=ADAMW["weight_decay"], save_strategy="no",
            report_to=[], disable_tqdm=True, remove_unused_columns=False, fsdp=True,
            fsdp_config={"transformer_layer_cls_to_wrap": ["Block"]},
        )  # fmt: skip
        trainer = Rows(
            transformer(), arguments, train_dataset=[{"x": 0}] * 100, callbacks=[Norms()],
            optimizer_cls_and_kwargs=(optimx.AdamW, {**ADAMW, "max_grad_norm": CLIP if in_step else None}),
        )  # fmt: skip
        trainer.train()
        shown = str(optimx.explain(trainer.optimizer.optimizer))
        return {"params": whole([trainer.model]), "norms": norms, "shown": shown}


def with_lightning(rank: int, in_step: bool, folder: str) -> dict[str, Any]:
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy

    norms: list[float] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = transformer()

        def configure_model(self) -> None:
            apply_tensor_parallel(self.net, self.device_mesh["tensor_parallel"])
            shard(self.net, self.device_mesh["data_parallel"])

        def configure_optimizers(self) -> Any:
            return optimx.AdamW(self.net.parameters(), **ADAMW, max_grad_norm=CLIP if in_step else None)

        def training_step(self, batch: int, index: int) -> Tensor:
            mesh = self.device_mesh["data_parallel"]
            return loss_of([self.net], batch, mesh.get_local_rank(), mesh.size())

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if not in_step:
                norms.append(float(optimx.get_total_norm([p.grad for p in self.net.parameters()])))

        def on_train_batch_end(self, *_: Any) -> None:
            if in_step:
                norms.append(float(self.optimizers().optimizer.grad_norm))

    world = dist.get_world_size()
    with launched(rank):
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", devices=world, strategy=ModelParallelStrategy(world, 1),
            gradient_clip_val=None if in_step else CLIP, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            use_distributed_sampler=False,
        )  # fmt: skip
        module = Module()
        trainer.fit(module, DataLoader(range(STEPS), batch_size=None))
    shown = str(optimx.explain(trainer.optimizers[0]))
    return {"params": whole([module.net]), "norms": norms, "shown": shown}


def libraries(folder: str) -> dict[str, Callable[[int], dict[str, Any]]]:
    """All of them, clipped in the step and by the library."""
    return {
        f"{library}-{where}": partial(check, in_step=where == "step")
        for library, check in {
            "accelerate": with_accelerate,
            "transformers": partial(with_transformers, folder=folder),
            "lightning": partial(with_lightning, folder=folder),
        }.items()
        for where in ("step", "library")
    }
