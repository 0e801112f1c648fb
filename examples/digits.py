"""A small training whose learning rate matters: an MLP on scikit-learn's handwritten digits, built from digits.toml."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import optimx

CONFIG = Path(__file__).with_name("digits.toml")
EPOCHS = 9
BATCH = 64


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 64] from 0 to 1 and their digits, in an order of their own."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]


class Training:
    """Trains on four fifths of the images, and tells the loss of the others.

    Args:
        overrides: Set over digits.toml.
    """

    def __init__(self, overrides: Mapping[str, Any]) -> None:
        torch.manual_seed(0)
        images, labels = digits()
        held_out = len(images) // 5
        self.images, self.labels = images[held_out:], labels[held_out:]
        self.val_images, self.val_labels = images[:held_out], labels[:held_out]
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.optimizer, self.scheduler = optimx.build(self.model, CONFIG, overrides)
        self.order = torch.Generator().manual_seed(1)

    def epoch(self) -> float:
        """Train for an epoch; the validation loss after it."""
        order = torch.randperm(len(self.images), generator=self.order)
        for batch in order[: len(order) // BATCH * BATCH].split(BATCH):
            self.optimizer.zero_grad()
            cross_entropy(self.model(self.images[batch]), self.labels[batch]).backward()
            self.optimizer.step()
            self.scheduler.step()
        with torch.no_grad():
            return float(cross_entropy(self.model(self.val_images), self.val_labels))
