"""What do cautious steps cost: divided by their share of the tensor in this step, and in the step before?"""

from __future__ import annotations

from functools import partial

from bench.case import OURS, Case, Target
from bench.contestants import optimx_step
from bench.suite import LARGE, SMALL, contests

EXACT, LAST = "cautious", "last_mean"
cautious = partial(
    Case, baseline=EXACT,
    contestants={
        name: partial(optimx_step, cautious=value) for name, value in {OURS: False, EXACT: True, LAST: LAST}.items()
    },
)  # fmt: skip
FASTER = (Target(LAST, "speed", 1.2, EXACT),)
CASES = [
    cautious("cautious-4x4M", LARGE, targets=FASTER),
    cautious("cautious-4x4M-lion", LARGE, optimizer="Lion", targets=FASTER),
    cautious("cautious-1000x4", SMALL),
    cautious("cautious-64x256x256", [(256, 256)] * 64),
    cautious("cautious-llama-1b-layer", [(2048, 2048)] * 16, device="cuda", clock="device", targets=FASTER),
    cautious("cautious-llama-1b-layer-lion", [(2048, 2048)] * 16, device="cuda", clock="device", optimizer="Lion"),
]


@contests(CASES)
def test_cautious(enter, case: Case, contestant: str) -> None:
    enter(case, contestant)
