"""The blocks of docs/sharding.md with other libraries, as two ranks run them, and clipping by the libraries."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

import optimx

# torchvision, which these libraries import, has to import first
import tests.models  # noqa: F401
from tests.distributed.recipes import CLIP, STEPS, Recipe


@contextmanager
def launched(rank: int) -> Iterator[None]:
    """The environment that torchrun makes, without GPUs."""
    world = str(dist.get_world_size())
    names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    with mock.patch.dict(os.environ, {**names, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}):
        yield


@contextmanager
def fsdp_on_cpus() -> Iterator[None]:
    """Accelerate takes an FSDP plugin where all processes are on CPUs, too."""
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


def results_of(recipe: Recipe, optimizer: Any) -> dict[str, Any]:
    """With what it updates, and whether it clips."""
    return recipe.results(shown=str(optimx.explain(optimizer)), clips=optimizer.grad_norm is not None)


def with_accelerate(rank: int, in_step: bool, folder: str) -> dict[str, Any]:
    """The block, with steps in between that a checkpoint undoes; or the same with accelerate's clipping."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    recipe = Recipe(Accelerator=Accelerator, FullyShardedDataParallelPlugin=FullyShardedDataParallelPlugin)

    def batches() -> Iterator[int]:
        yield from range(STEPS // 2)
        recipe["accelerator"].save_state(folder)
        norms = [*recipe.norms]
        yield from range(STEPS, STEPS + 2)
        recipe["accelerator"].load_state(folder)
        recipe.norms[:] = norms
        yield from range(STEPS // 2, STEPS)

    with launched(rank), fsdp_on_cpus():
        recipe.run("with_accelerate", batches=batches() if in_step else ())
        optimizer = recipe["optimizer"]
        if not in_step:
            optimizer.max_grad_norm = None
            for batch in range(STEPS):
                recipe["accelerator"].backward(recipe["loss_of"](recipe["model"], batch))
                norm = recipe["accelerator"].clip_grad_norm_(recipe["model"].parameters(), CLIP)
                recipe["print"](norm.full_tensor())
                recipe["prepared"].step()
                recipe["prepared"].zero_grad()
        return results_of(recipe, optimizer)


def with_transformers(rank: int, in_step: bool, folder: str) -> dict[str, Any]:
    """The block with a small loss, in which the Trainer may clip."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Rows(Trainer):
        def compute_loss(self, model: Any, inputs: Any, **_: Any) -> Tensor:
            return recipe["loss_of"](model, self.state.global_step)

    class Norms(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            if not in_step and "grad_norm" in logs:
                recipe["print"](logs["grad_norm"])

        def on_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
            if in_step:
                recipe["print"](optimizer.optimizer.grad_norm)

    def arguments(output: str, max_grad_norm: float, **kwargs: Any) -> TrainingArguments:
        return TrainingArguments(
            folder, max_grad_norm=max_grad_norm if in_step else CLIP, max_steps=STEPS, logging_steps=1, use_cpu=True,
            lr_scheduler_type="constant", report_to=[], save_strategy="no", disable_tqdm=True,
            remove_unused_columns=False, **kwargs,
        )  # fmt: skip

    def trainer(*args: Any, optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]], **kwargs: Any) -> Trainer:
        cls, of_optimizer = optimizer_cls_and_kwargs
        of_optimizer["max_grad_norm"] = of_optimizer["max_grad_norm"] if in_step else None
        return Rows(*args, optimizer_cls_and_kwargs=(cls, of_optimizer), callbacks=[Norms()], **kwargs)

    recipe = Recipe(TrainingArguments=arguments, Trainer=trainer, dataset=[{"x": 0}] * 100)
    with launched(rank), fsdp_on_cpus():
        recipe.run("with_transformers")
    recipe.names["model"] = recipe["trainer"].model
    return results_of(recipe, recipe["trainer"].optimizer.optimizer)


def with_lightning(rank: int, in_step: bool, folder: str) -> dict[str, Any]:
    """The block with a CPU; Lightning may clip."""
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Norms(lightning.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            if not in_step:
                optimizer.max_grad_norm = None
                recipe["print"](optimx.get_total_norm([p.grad for p in module.parameters()]))

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if in_step:
                recipe["print"](trainer.optimizers[0].grad_norm)

    trainer = partial(
        lightning.Trainer, accelerator="cpu", callbacks=[Norms()], gradient_clip_val=None if in_step else CLIP,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, use_distributed_sampler=False,
    )  # fmt: skip
    names = mock.Mock(LightningModule=lightning.LightningModule, Trainer=trainer)
    recipe = Recipe(
        lightning=names, ModelParallelStrategy=ModelParallelStrategy, batches=DataLoader(range(STEPS), batch_size=None)
    )  # fmt: skip
    with launched(rank):
        recipe.run("with_lightning")
    return results_of(recipe, recipe["trainer"].optimizers[0])


LIBRARIES: dict[str, Callable[..., dict[str, Any]]] = {
    "accelerate": with_accelerate,
    "transformers": with_transformers,
    "lightning": with_lightning,
}


def checks_of_libraries(folder: str) -> dict[str, Callable[[int], dict[str, Any]]]:
    """Those that are installed, clipped in the step and by the library."""
    return {
        f"{library}-{where}": partial(check, in_step=where == "step", folder=f"{folder}/{library}")
        for library, check in LIBRARIES.items() if find_spec(library)
        for where in ("step", "library")
    }  # fmt: skip
