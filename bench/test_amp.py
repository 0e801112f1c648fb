"""What does a step cost under GradScaler: gradients unscaled, looked through for inf, clipped to a norm?"""

from __future__ import annotations

from functools import partial

from bench import shapes
from bench.case import CLIPPED, COPY, Case, Target, at_least
from bench.contestants import device_copy, optimx_amp_step, torch_amp_step
from bench.suite import LARGE, SMALL, contests

TORCH, INSIDE, TORCH_SCALER = "torch unscale, clip", "optimx GradScaler", "optimx, torch scaler"
CONTESTANTS = {
    TORCH: torch_amp_step,
    INSIDE: optimx_amp_step,
    TORCH_SCALER: partial(optimx_amp_step, torch_scaler=True),
}
amp = partial(Case, contestants=CONTESTANTS, baseline=TORCH, grad_norm=CLIPPED, loss_scale=2.0**16)
large = partial(
    amp,
    contestants=CONTESTANTS | {COPY: device_copy},
    # torch's scaler reads and writes the gradients for its own search
    traffic={TORCH: 48.0, INSIDE: 32.0, TORCH_SCALER: 40.0},
)
CASES = [
    large("amp-4x4M", LARGE),
    amp("amp-1000x4", SMALL),
    large(
        "amp-llama-1b", shapes.llama(), device="cuda", clock="device", model="llama-3.2-1b",
        targets=(at_least(1.4, INSIDE, TORCH), Target(INSIDE, "syncs", 0)),
    ),
]  # fmt: skip


@contests(CASES)
def test_amp(enter, case: Case, contestant: str) -> None:
    enter(case, contestant)
