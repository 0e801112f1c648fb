"""What does Adafactor cost, where torch waits twice a matrix and makes its outer product?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from bench import shapes
from bench.case import BEST_STOCK, CLIPPED, COPY, FOREACH, OURS, Case, Target, at_least
from bench.catalogue import cost_of
from bench.contestants import MAX_NORM, device_copy, optimx_step, torch_clip_step
from bench.suite import LARGE, contests, model_case, no_sync, step_case

#: LoRA's factors; a row and a column of each are kept.
SMALL_MATRICES = [(32, 32)] * 300
#: Bytes a float32 parameter. Ours: sums, length and update are a walk each.
TRAFFIC = {FOREACH: 76.0, OURS: cost_of("Adafactor", {}).moved}
TORCH_CLIP, CLIP_INSIDE = "torch clip, foreach", "optimx max_grad_norm"
CLIP = {
    TORCH_CLIP: partial(torch_clip_step, foreach=True),
    CLIP_INSIDE: partial(optimx_step, max_grad_norm=MAX_NORM),
    COPY: device_copy,
}

adafactor = partial(step_case, optimizer="Adafactor")
# no peak of 5 % of the parameters' bytes
little_memory = Target(OURS, "peak_fraction", 0.05)


def cpu_cases() -> list[Case]:
    return [
        adafactor("adafactor-4x4M", LARGE, traffic=TRAFFIC, targets=(at_least(3, against=BEST_STOCK), little_memory)),
        adafactor("adafactor-300x32x32", SMALL_MATRICES, targets=(at_least(5, against=BEST_STOCK),)),
        *(model_case("adafactor", name, optimizer="Adafactor") for name in ("vit-b16", "llama-3-8b-slice", "lora")),
        Case(
            "adafactor-clip-4x4M",
            LARGE,
            CLIP,
            TORCH_CLIP,
            grad_norm=CLIPPED,
            optimizer="Adafactor",
            # the norm comes with the sums
            traffic={CLIP_INSIDE: 24.0},
            targets=(at_least(3, CLIP_INSIDE, TORCH_CLIP),),
        ),
    ]


def gpu_cases() -> list[Case]:
    llama = adafactor(
        "adafactor-llama-1b", shapes.llama(), traffic=TRAFFIC, peers=False, device="cuda", model="llama-3.2-1b"
    )
    # torch waits for the device: its time is the host's
    vit = replace(model_case("adafactor", "vit-b16", "cuda", optimizer="Adafactor"), clock="wall")
    return [
        no_sync(llama, at_least(3, against=FOREACH), Target(OURS, "peak_fraction", 0.01)),
        no_sync(vit, at_least(10, against=FOREACH)),
    ]


CASES = [*cpu_cases(), *gpu_cases()]


@contests(CASES)
def test_adafactor(enter, case: Case, contestant: str) -> None:
    enter(case, contestant)
