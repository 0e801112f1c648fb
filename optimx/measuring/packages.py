"""Optimizers of other packages, measured beside ours where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

#: How the reason begins why one that is there takes no part.
NOT_MEASURED = "not measured"


class Missing(Exception):
    """The package of a contestant is not installed."""


@dataclass(frozen=True)
class Peer:
    """An optimizer of another package.

    Args:
        package: What pip installs.
        path: "module:Class".
        kwargs: Arguments without which it would do other work than the case asks for.
        group: Keys of the parameter group without which it takes no parameters.
        most_tensors: With more it compiles for minutes, and is not measured; None: it compiles nothing.
    """

    package: str
    path: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    group: dict[str, Any] = field(default_factory=dict)
    most_tensors: int | None = None

    @property
    def installed(self) -> bool:
        """Whether its package can be imported, by the look of it."""
        return importlib.util.find_spec(self.path.partition(":")[0].partition(".")[0]) is not None

    def load(self, tensors: int = 1) -> Any:
        """The class, for so many tensors.

        Raises:
            Missing: The package is not installed, or would compile for minutes.
        """
        module, _, name = self.path.partition(":")
        if not self.installed:
            raise Missing(f"{self.package} is not installed")
        check_compiles(tensors, self.most_tensors)
        if self.package in ("timm", "transformers"):
            import_torchvision()
        return getattr(importlib.import_module(module), name)


def check_compiles(tensors: int, most: int | None) -> None:
    """Missing if there are more tensors than a compiler can write a step for in a minute or so."""
    if most is not None and tensors > most:
        raise Missing(f"{NOT_MEASURED} ({tensors:,} tensors: compiling takes minutes)")


def import_torchvision() -> None:
    """Import torchvision, where it is installed, also beside a CPU build of torch.

    Its CUDA build, which is what pip finds, then misses operators of its own. They only have to be declared.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            torchvision_library().define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@cache
def torchvision_library() -> torch.library.Library:
    """Where operators are declared, which live as long as it does."""
    return torch.library.Library("torchvision", "FRAGMENT")


#: Else FlashOptim's quantise the state and correct 16-bit parameters, and optimi's add up 16-bit ones with Kahan's sum.
FLASH: dict[str, Any] = {"quantize": False, "master_weight_bits": None}
OPTIMI: dict[str, Any] = {"kahan_sum": False}

#: HeavyBall writes a step out tensor by tensor and tunes it: 60 take more than a minute.
HEAVYBALL = 50

#: What torch's Muon does by default.
MUON: dict[str, Any] = {"weight_decay": 0.1, "nesterov": True}

#: Optimizer -> contestant -> where it is. The arithmetic is that of the case, give or take where eps is added and how
#: the first averages are corrected; the states of bitsandbytes and HeavyBall are float32 with 16-bit parameters
#: too.
BY_OPTIMIZER: dict[str, tuple[Peer, ...]] = {
    "AdamW": (
        Peer("flashoptim", "flashoptim:FlashAdamW", FLASH),
        Peer("torch-optimi", "optimi:AdamW", OPTIMI),
        Peer("torchao", "torchao.optim:_AdamW"),
        Peer("bitsandbytes", "bitsandbytes.optim:AdamW32bit"),
        Peer("timm", "timm.optim:AdamWLegacy"),
        Peer("apex", "apex.optimizers:FusedAdam", {"weight_decay": 0.01}),
        Peer("heavyball", "heavyball:AdamW", {"betas": (0.9, 0.999), "weight_decay": 0.01}, most_tensors=HEAVYBALL),
    ),
    "Adam": (
        Peer("flashoptim", "flashoptim:FlashAdam", FLASH),
        Peer("torch-optimi", "optimi:Adam", OPTIMI),
        Peer("bitsandbytes", "bitsandbytes.optim:Adam32bit"),
        Peer("apex", "apex.optimizers:FusedAdam", {"adam_w_mode": False}),
    ),
    "SGD": (
        Peer("flashoptim", "flashoptim:FlashSGD", FLASH),
        Peer("torch-optimi", "optimi:SGD", OPTIMI),
        Peer("bitsandbytes", "bitsandbytes.optim:SGD32bit"),
        Peer("apex", "apex.optimizers:FusedSGD"),
    ),
    "RMSprop": (Peer("bitsandbytes", "bitsandbytes.optim:RMSprop32bit"), Peer("timm", "timm.optim:RMSpropTF")),
    "Adagrad": (
        Peer("bitsandbytes", "bitsandbytes.optim:Adagrad32bit"),
        Peer("apex", "apex.optimizers:FusedAdagrad"),
    ),
    "NAdam": (
        Peer("timm", "timm.optim:NAdamLegacy"),
        Peer("heavyball", "heavyball:NAdam", most_tensors=HEAVYBALL),
    ),
    "RAdam": (
        Peer("torch-optimi", "optimi:RAdam", OPTIMI),
        Peer("timm", "timm.optim:RAdamLegacy"),
        Peer("pytorch_optimizer", "pytorch_optimizer:RAdam"),
    ),
    "Lion": (
        Peer("flashoptim", "flashoptim:FlashLion", FLASH),
        Peer("torch-optimi", "optimi:Lion", OPTIMI),
        Peer("bitsandbytes", "bitsandbytes.optim:Lion32bit"),
        Peer("timm", "timm.optim:Lion"),
        Peer("pytorch_optimizer", "pytorch_optimizer:Lion"),
    ),
    "LAMB": (
        Peer("bitsandbytes", "bitsandbytes.optim:LAMB32bit"),
        Peer("timm", "timm.optim:Lamb", {"max_grad_norm": None}),
        Peer("pytorch_optimizer", "pytorch_optimizer:Lamb"),
        Peer("apex", "apex.optimizers:FusedLAMB"),
    ),
    "Muon": (
        Peer("timm", "timm.optim:Muon", {**MUON, "ns_coefficients": "original", "adjust_lr_fn": "original"}),
        Peer("pytorch_optimizer", "pytorch_optimizer:Muon", MUON, {"use_muon": True}),
    ),
    "Adafactor": (
        Peer("transformers", "transformers.optimization:Adafactor", {"relative_step": False}),
        Peer("timm", "timm.optim:Adafactor"),
        # without a first average, as torch's is
        Peer("pytorch_optimizer", "pytorch_optimizer:AdaFactor", {"relative_step": False, "betas": (None, 0.999)}),
    ),
}

#: Every package there is a contestant of.
PEERS = frozenset(peer.package for peers in BY_OPTIMIZER.values() for peer in peers)


def is_peer(contestant: str) -> bool:
    """Whether it is of another package, whose name its own begins with: "torchao", "torchao 8-bit"."""
    return contestant.partition(" ")[0] in PEERS
