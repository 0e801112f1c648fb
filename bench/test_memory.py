"""What memory do a step and its state take? Each optimizer of optimx, and those of others that exist to save memory."""

from __future__ import annotations

from functools import partial
from typing import Any

from bench.case import FUSED, Case
from bench.contestants import MAX_NORM, optimx_step, package_step, torch_clip_step, torch_step
from bench.packages import Peer
from bench.suite import contests, model_case

OURS: dict[str, tuple[str, dict[str, Any]]] = {
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
    contestants |= {f"optimx {name}": partial(optimx_step, optimizer=cls, **kw) for name, (cls, kw) in OURS.items()}
    contestants |= {name: partial(package_step, peer=peer) for name, peer in SMALLER.items()}
    return Case(case.name, case.shapes, contestants, FUSED, case.model, device, clock=case.clock)


CASES = [memory("cpu"), memory("cuda")]


@contests(CASES)
def test_memory(enter, case: Case, contestant: str) -> None:
    enter(case, contestant)
