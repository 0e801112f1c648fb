"""Small training runs, and the orders in which people build and load optimizer and scheduler when they resume."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

LRS = [0.1, 1.0]


def make_optimizer(lrs: list[Any] | None = None, cls: Any = torch.optim.AdamW, **options: Any) -> Any:
    torch.manual_seed(0)
    groups = [{"params": [Parameter(torch.randn(3))], "lr": lr} for lr in (LRS if lrs is None else lrs)]
    return cls(groups, **options)


def train(optimizer: Any, scheduler: Any, steps: int) -> list[list[float]]:
    """The learning rates that each step was taken with."""
    applied = []
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        applied.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return applied


def resume_documented(make: Callable[[Any], Any], saved: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    optimizer = make_optimizer(**options)
    scheduler = make(optimizer)
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    return optimizer, scheduler


def resume_optimizer_first(make: Callable[[Any], Any], saved: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    optimizer = make_optimizer(**options)
    optimizer.load_state_dict(saved["optimizer"])
    scheduler = make(optimizer)
    scheduler.load_state_dict(saved["scheduler"])
    return optimizer, scheduler


def resume_scheduler_only(make: Callable[[Any], Any], saved: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    optimizer = make_optimizer(**options)
    scheduler = make(optimizer)
    scheduler.load_state_dict(saved["scheduler"])
    return optimizer, scheduler


def resume_scheduler_before_optimizer(
    make: Callable[[Any], Any], saved: dict[str, Any], **options: Any
) -> tuple[Any, Any]:
    optimizer = make_optimizer(**options)
    scheduler = make(optimizer)
    scheduler.load_state_dict(saved["scheduler"])
    optimizer.load_state_dict(saved["optimizer"])
    return optimizer, scheduler


#: Three orders; the fourth is to give ``last_epoch`` without a checkpoint of the scheduler.
ORDERS = [resume_documented, resume_optimizer_first, resume_scheduler_only, resume_scheduler_before_optimizer]


def save(optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Through a file, as checkpoints go."""
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


each_order = pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__.removeprefix("resume_"))
