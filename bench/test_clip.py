"""What does a step cost with the gradients clipped to a norm?

``-below``: the norm is half of what clipping allows, so nothing has to be scaled; ``-clipped``: ten times that.
"""

from __future__ import annotations

from functools import partial

from bench import shapes
from bench.case import BELOW, CLIPPED, COPY, Case, Target, at_least
from bench.contestants import MAX_NORM, device_copy, optimx_clip_step, optimx_step, torch_clip_step
from bench.suite import LARGE, SMALL, contests

TORCH, INSIDE, BEFORE = "torch clip, fused", "optimx max_grad_norm", "optimx clip, step"
CONTESTANTS = {
    TORCH: torch_clip_step,
    "torch clip, foreach": partial(torch_clip_step, foreach=True),
    INSIDE: partial(optimx_step, max_grad_norm=MAX_NORM),
    BEFORE: optimx_clip_step,
}
WITH_COPY = CONTESTANTS | {COPY: device_copy}
clip = partial(Case, contestants=CONTESTANTS, baseline=TORCH)
inside = partial(at_least, contestant=INSIDE, against=TORCH)


def traffic(grad_norm: float) -> dict[str, float]:
    """Bytes a float32 parameter: torch multiplies the gradients also where nothing is clipped."""
    return {TORCH: 40.0, INSIDE: 32.0, BEFORE: 40.0 if grad_norm > MAX_NORM else 32.0}


def cpu_cases() -> list[Case]:
    gpt2, factor = shapes.MODELS["gpt2-124m"]
    model = {"shapes": shapes.sized_down(gpt2, factor), "model": f"gpt2-124m / {factor}", "contestants": WITH_COPY}
    large = partial(clip, shapes=LARGE, contestants=WITH_COPY, targets=(inside(1.1),))
    return [
        large("clip-4x4M-below", traffic=traffic(BELOW)),
        large("clip-4x4M-clipped", grad_norm=CLIPPED, traffic=traffic(CLIPPED)),
        clip("clip-1000x4-below", SMALL, targets=(inside(3),)),
        clip("clip-1000x4-clipped", SMALL, grad_norm=CLIPPED, targets=(inside(3),)),
        clip("clip-gpt2-124m-below", **model, traffic=traffic(BELOW)),
        clip("clip-gpt2-124m-clipped", **model, grad_norm=CLIPPED, traffic=traffic(CLIPPED)),
    ]


def gpu_cases() -> list[Case]:
    # more contestants would not fit
    contestants = {name: WITH_COPY[name] for name in (TORCH, INSIDE, BEFORE, COPY)}
    llama = partial(
        clip, shapes=shapes.llama(), contestants=contestants, device="cuda", clock="device", model="llama-3.2-1b",
        targets=(inside(1.22), Target(INSIDE, "syncs", 0)),
    )  # fmt: skip
    return [
        llama("clip-llama-1b-below", traffic=traffic(BELOW)),
        llama("clip-llama-1b-clipped", grad_norm=CLIPPED, traffic=traffic(CLIPPED)),
    ]


CASES = [*cpu_cases(), *gpu_cases()]


@contests(CASES)
def test_clip(enter, case: Case, contestant: str) -> None:
    enter(case, contestant)
