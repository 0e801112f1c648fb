"""What memory do a step and its state take? Each optimizer of optimx, and those of others that exist to save memory.

Then each way to keep parameters and states: bytes a parameter beside those counted by hand, and what a step takes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from bench.case import FUSED, KEPT_ERROR, OURS, Case, Target
from bench.contestants import MAX_NORM, optimx_step, package_step, torch_clip_step, torch_step, training_step
from bench.suite import contests, model_case
from optimx.measuring.packages import Peer

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("AdamW", {}),
    "AdamW, clip": ("AdamW", {"max_grad_norm": MAX_NORM}),
    "SGD": ("SGD", {"momentum": 0.9}),
    "RMSprop": ("RMSprop", {}),
    "NAdam": ("NAdam", {}),
    "Lion": ("Lion", {}),
    "LAMB": ("LAMB", {}),
    "Adafactor": ("Adafactor", {}),
}
#: Stock's, for whoever is above.
STOCK = {
    "torch AdamW, foreach": partial(torch_step, foreach=True),
    "torch AdamW, clip": torch_clip_step,
    "torch NAdam": partial(torch_step, optimizer="NAdam", foreach=True),
    "torch Adafactor": partial(torch_step, optimizer="Adafactor", foreach=True),
}
#: Of other packages, that store less. The columns of state and peak are what they are here for.
SMALLER = {
    "flashoptim": Peer("flashoptim", "flashoptim:FlashAdamW"),
    "torchao 8-bit": Peer("torchao", "torchao.optim:AdamW8bit"),
    "torchao 4-bit": Peer("torchao", "torchao.optim:AdamW4bit"),
    "bitsandbytes 8-bit": Peer("bitsandbytes", "bitsandbytes.optim:AdamW8bit"),
}


def memory(device: str) -> Case:
    case = model_case("memory", "gpt2-124m", device, peers=False)
    contestants = {FUSED: case.contestants[FUSED], **STOCK}
    contestants |= {
        f"optimx {name}": partial(optimx_step, optimizer=cls, **kw) for name, (cls, kw) in OPTIMIZERS.items()
    }
    contestants |= {name: partial(package_step, peer=peer) for name, peer in SMALLER.items()}
    return Case(case.name, case.shapes, contestants, FUSED, case.model, device, clock=case.clock)


class Scheme(NamedTuple):
    """How parameters and states are kept.

    Attributes:
        settings: Of the optimizer.
        expected: Bytes a parameter of parameter and states, by optimizer, counted by hand: 8-bit states have a float32
            scale for 128 elements; averages of rows and columns count nothing.
    """

    settings: dict[str, Any]
    expected: dict[str, float]


def scheme(adamw: float, one_state: float, adafactor: float | None, **settings: Any) -> Scheme:
    """With the bytes of AdamW, of Lion and SGD with momentum, and of Adafactor, which may have nothing to keep so."""
    expected = {"AdamW": adamw, "Lion": one_state, "SGD": one_state}
    return Scheme(settings, expected if adafactor is None else expected | {"Adafactor": adafactor})


FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
#: By the dtype of the parameters; a name says how these are kept, where there is a choice, and then states.
SCHEMES: dict[torch.dtype, dict[str, Scheme]] = {
    FLOAT32: {
        OURS: scheme(12, 8, 4),
        "bfloat16": scheme(8, 6, 4, state_dtype=BFLOAT16),
        "8bit": scheme(6.0625, 5.03125, None, state_dtype="8bit"),
    },
    BFLOAT16: {
        OURS: scheme(6, 4, 2),
        "master, float32": scheme(14, 10, 6, param_rounding="master", state_dtype=FLOAT32),
        "remainder16, float32": scheme(12, 8, 4, param_rounding="remainder16", state_dtype=FLOAT32),
        "stochastic, float32": scheme(10, 6, 2, param_rounding="stochastic", state_dtype=FLOAT32),
        "remainder16, stochastic": scheme(8, 6, 4, param_rounding="remainder16", state_dtype="stochastic"),
        "remainder8, stochastic": scheme(7, 5, 3, param_rounding="remainder8", state_dtype="stochastic"),
        "stochastic, stochastic": scheme(6, 4, 2, param_rounding="stochastic", state_dtype="stochastic"),
        "remainder8, 8bit": scheme(5.0625, 4.03125, None, param_rounding="remainder8", state_dtype="8bit"),
        "stochastic, 8bit": scheme(4.0625, 3.03125, None, param_rounding="stochastic", state_dtype="8bit"),
    },
}
#: How far bytes that are measured may be from these: vectors stay float32, rows and columns take some.
TOLERANCE = 0.02
ARGUMENTS: dict[str, dict[str, Any]] = {"AdamW": {}, "Lion": {}, "SGD": {"momentum": 0.9}, "Adafactor": {}}
#: Of other packages, for parameters in bfloat16.
FLASH = "flashoptim:FlashAdamW"
KEPT_SMALLER = {
    "flashoptim 24, 8bit": Peer("flashoptim", FLASH),
    "flashoptim 32, 8bit": Peer("flashoptim", FLASH, {"master_weight_bits": 32}),
    "flashoptim 24": Peer("flashoptim", FLASH, {"quantize": False, "fused": False}),
    "flashoptim 32": Peer("flashoptim", FLASH, {"master_weight_bits": 32, "quantize": False, "fused": False}),
    "flashoptim plain": Peer("flashoptim", FLASH, {"master_weight_bits": None, "quantize": False, "fused": False}),
    "torchao stochastic": Peer("torchao", "torchao.optim:_AdamW", {"bf16_stochastic_round": True}),
    "torchao stochastic, 8b": Peer("torchao", "torchao.optim:AdamW8bit", {"bf16_stochastic_round": True}),
    "torchao stochastic, 4b": Peer("torchao", "torchao.optim:AdamW4bit", {"bf16_stochastic_round": True}),
    "torch-optimi Kahan": Peer("torch-optimi", "optimi:AdamW", {"kahan_sum": True}),
    "bitsandbytes 8-bit": SMALLER["bitsandbytes 8-bit"],
}
#: Models all matrices of which have rows for 8-bit states, sized down or not.
MODELS = {"cpu": "llama-3-8b-slice", "cuda": "gpt2-124m"}


def kept(optimizer: str, dtype: torch.dtype, device: str) -> Case:
    """Every scheme of an optimizer for parameters of a dtype."""
    schemes = {name: found for name, found in SCHEMES[dtype].items() if optimizer in found.expected}
    contestants: dict[str, Any] = {name: partial(optimx_step, **found.settings) for name, found in schemes.items()}
    if optimizer == "AdamW":
        contestants = {FUSED: partial(torch_step, fused=True), **contestants}
        if dtype is BFLOAT16:
            contestants |= {name: partial(package_step, peer=peer) for name, peer in KEPT_SMALLER.items()}
    baseline = FUSED if FUSED in contestants else OURS
    case = model_case(
        f"kept-{optimizer.lower()}-{str(dtype).removeprefix('torch.')}", MODELS[device], device, factor=16,
        peers=False, optimizer=optimizer, kwargs=ARGUMENTS[optimizer], dtype=dtype,
    )  # fmt: skip
    return replace(
        case,
        contestants=contestants,
        baseline=baseline,
        kept={name: found.expected[optimizer] for name, found in schemes.items()},
        targets=tuple(Target(name, KEPT_ERROR, TOLERANCE) for name in schemes),
    )


#: Released gradients: megabytes of a bucket, of a matrix, and what everything else may take at once.
BUCKET_MB, MATRIX_MB, REST_MB = 8.0, 4.2, 4.0


def released(device: str) -> Case:
    """Training steps of a chain of 24 matrices, 101 MB: the peak has gradients and activations."""
    clip: dict[str, Any] = {"max_grad_norm": MAX_NORM}
    bucket: dict[str, Any] = {"release": {"bucket_mb": BUCKET_MB}}
    contestants = {
        OURS: training_step,
        "released": partial(training_step, **bucket),
        "released, 25 MB": partial(training_step, release={}),
        "clip": partial(training_step, **clip),
        "clip, measured": partial(training_step, **clip, **bucket, measures=True),
        "clip, previous": partial(
            training_step, **clip, release={"bucket_mb": BUCKET_MB, "norm": "previous"}
        ),
    }  # fmt: skip
    peak = (BUCKET_MB + MATRIX_MB + REST_MB) * 1e6
    targets = tuple(
        Target(name, "peak_bytes", peak) for name in contestants if name not in (OURS, "clip", "released, 25 MB")
    )
    name = "released-gradients" + "-gpu" * (device == "cuda")
    return Case(name, [(1024, 1024)] * 24, contestants, OURS, device=device, targets=targets)


DEVICES = ("cpu", "cuda")
CASES = [memory(device) for device in DEVICES]
CASES += [kept(optimizer, dtype, device) for device in DEVICES for optimizer in ARGUMENTS for dtype in SCHEMES]
CASES += map(released, DEVICES)


@contests(CASES)
def test_memory(enter, case: Case, contestant: str) -> None:
    enter(case, contestant)
