"""What do compiled formulas cost on a CPU, beside torch's compiled foreach, and how far are they from memory's speed?

Contestants that compile need a C++ compiler. The floor of a step is what the bytes that it has to move take where
torch's fused AdamW, which is at memory's speed, moves its 28 bytes a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import optimx
from bench.case import BEST_STOCK, COMPILED, OURS, Case, at_least
from bench.contestants import Run, optimx_step, torch_step
from bench.suite import LARGE, contests, model_case, step_case

COMPILED_OURS, ADAMW = "optimx compiled", "AdamW fused"
#: Bytes a float32 parameter that a step has to move, and how many times their time it may take.
FLOORS = {
    "RMSprop": (20.0, 1.3),
    "NAdam": (28.0, 1.3),
    "Adamax": (28.0, 1.3),
    "Adadelta": (28.0, 1.3),
    "Lion": (20.0, 1.3),
    "LAMB": (28.0, 1.6),
    "Adafactor": (24.0, 1.6),
}


def switched(case: Case, *, compiled: bool) -> Run:
    """Our step, with formulas compiled or not: contestants take turns in one process."""
    run = optimx_step(case)

    def prepare() -> None:
        optimx.compile_formulas(compiled)
        run.prepare()

    return replace(run, prepare=prepare)


def compiled_case(make: Callable[..., Case], *args: str, optimizer: str) -> Case:
    """A case of plain steps, with compiled contestants and the yardstick."""
    bytes_moved, times = FLOORS[optimizer]
    case = make(*args, optimizer=optimizer, peers=False)
    contestants = {
        **case.contestants,
        OURS: partial(switched, compiled=False),
        COMPILED_OURS: partial(switched, compiled=True),
        ADAMW: partial(torch_step, optimizer="AdamW", fused=True),
    }
    targets = (
        at_least(1.0, COMPILED_OURS, COMPILED),
        at_least(1.0, COMPILED_OURS, BEST_STOCK),
        at_least(28.0 / bytes_moved / times, COMPILED_OURS, ADAMW),
    )
    return replace(case, contestants=contestants, targets=targets)


def large_case(optimizer: str, peers: bool = True) -> Case:
    return step_case(f"compiled-{optimizer.lower()}-4x4M", LARGE, optimizer=optimizer, peers=peers)


def vit_case(optimizer: str, peers: bool = True) -> Case:
    return model_case(f"compiled-{optimizer.lower()}", "vit-b16", optimizer=optimizer, peers=peers)


CASES = [compiled_case(make, optimizer=name) for name in FLOORS for make in (large_case, vit_case)]


@contests(CASES)
def test_compiled(enter, case: Case, contestant: str) -> None:
    enter(case, contestant)
