"""What is measured: one table of cases, read by the driver (``bench.run``) and by the pytest suite (``test_step``)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from bench import shapes
from bench.contestants import (
    MAX_NORM,
    Groups,
    Run,
    device_copy,
    group_each,
    layer_decay,
    optimx_amp_step,
    optimx_clip_step,
    optimx_step,
    torch_amp_step,
    torch_clip_step,
    torch_step,
)
from bench.shapes import Shape

BELOW, CLIPPED = 0.5 * MAX_NORM, 10 * MAX_NORM
LOSS_SCALE = 2.0**16


@dataclass(frozen=True)
class Target:
    """A promise about one contestant of a case.

    With ``against``, its speed or bandwidth is at least ``bound`` times the other contestant's; without,
    the quantity (a column of the results) is at most ``bound``.
    """

    contestant: str
    quantity: str
    bound: float
    against: str | None = None

    def __str__(self) -> str:
        if self.against is None:
            return f"{self.quantity} <= {self.bound:g}"
        return f"{self.quantity} >= {self.bound:g}x {self.against}"


@dataclass(frozen=True)
class Case:
    """Contestants that do the same work on tensors of the same shapes.

    Args:
        name: Unique; also the id in pytest.
        shapes: One a parameter.
        contestants: Name -> function that builds tensors and optimizer for the case.
        baseline: The contestant that ratios are against.
        device, dtype: Of parameters, gradients and state.
        grad_norm: 2-norm of all gradients together.
        loss_scale: What the gradients are multiplied with, for GradScaler to take out again.
        clock: What a call is charged with (see ``bench.timing``): "wall", "device" or "host" time.
        traffic: Contestant -> bytes of memory traffic a parameter, counted from its algorithm, where bandwidth matters.
        targets: What the results are held against.
    """

    name: str
    shapes: Sequence[Shape]
    contestants: dict[str, Callable[["Case"], Run]]
    baseline: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    grad_norm: float = BELOW
    loss_scale: float = 1.0
    clock: str = "wall"
    traffic: dict[str, float] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


DEFAULT, FUSED, OURS, COPY = "torch default", "torch fused", "optimx", "device copy"
TORCH_CLIP, CLIP_INSIDE, CLIP_BEFORE = "torch clip, fused", "optimx max_grad_norm", "optimx clip, step"
TORCH_AMP, AMP_INSIDE, AMP_TORCH = "torch unscale, clip", "optimx GradScaler", "optimx, torch scaler"

PLAIN = {FUSED: partial(torch_step, fused=True), OURS: optimx_step}
STEP = {DEFAULT: torch_step, **PLAIN}
CLIP = {
    TORCH_CLIP: torch_clip_step,
    CLIP_INSIDE: partial(optimx_step, max_grad_norm=MAX_NORM),
    CLIP_BEFORE: optimx_clip_step,
}
AMP = {TORCH_AMP: torch_amp_step, AMP_INSIDE: optimx_amp_step, AMP_TORCH: partial(optimx_amp_step, torch_scaler=True)}


def grouped(groups: Groups) -> dict[str, Callable[[Case], Run]]:
    return {name: partial(start, groups=groups) for name, start in STEP.items()}


def cpu_cases() -> list[Case]:
    large, small, many = [(2048, 2048)] * 4, [(4,)] * 1000, [(4,)] * 465
    float32, bfloat16 = {FUSED: 28.0, OURS: 28.0}, {FUSED: 14.0, OURS: 14.0}

    def at_least(bound: float, contestant: str = OURS, against: str = FUSED) -> Target:
        return Target(contestant, "speed", bound, against)

    inside = partial(at_least, contestant=CLIP_INSIDE, against=TORCH_CLIP)
    clip = partial(Case, contestants=CLIP, baseline=TORCH_CLIP)
    return [
        Case(
            "step-4x4M-float32",
            large,
            STEP,
            FUSED,
            traffic=float32,
            targets=(at_least(4, against=DEFAULT), at_least(0.97)),
        ),
        Case("step-4x4M-bfloat16", large, STEP, FUSED, dtype=torch.bfloat16, traffic=bfloat16),
        Case("step-1000x4", small, STEP, FUSED, targets=(at_least(5),)),
        Case("step-465-groups-same-lr", many, grouped(group_each), FUSED, targets=(at_least(5),)),
        Case("step-465-groups-layer-decay", many, grouped(layer_decay), FUSED, targets=(at_least(5),)),
        # from 17 elements on torch's operator opens a parallel region for every tensor
        Case("step-465-groups-of-64", [(64,)] * 465, grouped(layer_decay), FUSED),
        clip("clip-4x4M-below", large, targets=(inside(1.1),)),
        clip("clip-4x4M-clipped", large, grad_norm=CLIPPED, targets=(inside(1.1),)),
        clip("clip-1000x4-below", small, targets=(inside(3),)),
        clip("clip-1000x4-clipped", small, grad_norm=CLIPPED, targets=(inside(3),)),
    ]


def gpu_cases() -> list[Case]:
    language_model = shapes.llama()
    # ViT-B's width, and as many tensors as the CPU cases have groups
    deep_vit = shapes.vit(layers=38, registers=4)
    no_sync = Target(OURS, "syncs", 0)

    def model(name: str, tensors: Sequence[Shape]) -> Case:
        targets = (Target(OURS, "speed", 1.0, FUSED), no_sync)
        traffic = dict.fromkeys(PLAIN, 28.0)
        return Case(name, tensors, STEP, FUSED, "cuda", clock="device", traffic=traffic, targets=targets)

    def large(dtype: torch.dtype, width: float) -> Case:
        return Case(
            f"step-llama-1b-{str(dtype).removeprefix('torch.')}",
            language_model,
            {**PLAIN, COPY: device_copy},
            FUSED,
            "cuda",
            dtype,
            clock="device",
            # p, g, exp_avg and exp_avg_sq are read; all but g are written; the copy is of float32
            traffic={FUSED: 7 * width, OURS: 7 * width, COPY: 8.0},
            targets=(Target(OURS, "speed", 1.0, FUSED), Target(OURS, "bandwidth", 0.92, COPY), no_sync),
        )

    def clip(name: str, grad_norm: float) -> Case:
        return Case(
            name,
            language_model,
            CLIP,
            TORCH_CLIP,
            "cuda",
            grad_norm=grad_norm,
            clock="device",
            # torch multiplies the gradients also when nothing is clipped
            traffic={TORCH_CLIP: 40.0, CLIP_INSIDE: 32.0, CLIP_BEFORE: 40.0 if grad_norm > MAX_NORM else 32.0},
            targets=(Target(CLIP_INSIDE, "speed", 1.22, TORCH_CLIP), Target(CLIP_INSIDE, "syncs", 0)),
        )

    def groups(clock: str) -> Case:
        each = {f"{name}, 465 groups": partial(start, groups=layer_decay) for name, start in PLAIN.items()}
        one = {f"{name}, one group": start for name, start in PLAIN.items()}
        ours, ours_one = f"{OURS}, 465 groups", f"{OURS}, one group"
        targets = (Target(ours, "speed", 0.95, ours_one), Target(ours, "syncs", 0))
        return Case(
            f"groups-465-{clock}", deep_vit, one | each, f"{FUSED}, one group", "cuda", clock=clock, targets=targets
        )

    return [
        large(torch.float32, 4),
        large(torch.bfloat16, 2),
        model("step-gpt2-124m", shapes.gpt2()),
        model("step-vit-b16", shapes.vit()),
        model("step-resnet50", shapes.resnet()),
        clip("clip-llama-1b-below", BELOW),
        clip("clip-llama-1b-clipped", CLIPPED),
        Case(
            "amp-llama-1b",
            language_model,
            AMP,
            TORCH_AMP,
            "cuda",
            grad_norm=CLIPPED,
            loss_scale=LOSS_SCALE,
            clock="device",
            traffic={TORCH_AMP: 48.0, AMP_INSIDE: 32.0},
            targets=(Target(AMP_INSIDE, "speed", 1.4, TORCH_AMP), Target(AMP_INSIDE, "syncs", 0)),
        ),
        groups("wall"),
        groups("device"),
        Case(
            "host-1000-tensors",
            [(64,)] * 1000,
            PLAIN,
            FUSED,
            "cuda",
            clock="host",
            targets=(Target(OURS, "us_per_tensor", 0.5), no_sync),
        ),
    ]


CASES: tuple[Case, ...] = (*cpu_cases(), *gpu_cases())
