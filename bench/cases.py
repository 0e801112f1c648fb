"""What is measured: one table of cases, read by the driver (``bench.run``) and by the pytest suite (``test_step``)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

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
    peer_step,
    torch_amp_step,
    torch_clip_step,
    torch_step,
    vit_layer_decay,
)
from bench.shapes import Shape

LARGE, SMALL = [(2048, 2048)] * 4, [(4,)] * 1000
BELOW, CLIPPED = 0.5 * MAX_NORM, 10 * MAX_NORM
LOSS_SCALE = 2.0**16


@dataclass(frozen=True)
class Target:
    """A promise about one contestant of a case.

    With ``against``, its speed or bandwidth is at least ``bound`` times the other contestant's; without,
    the quantity (a column of the results) is at most ``bound``. ``BEST_STOCK`` is whoever of ``STOCK`` has the
    shortest median in that run.
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
        notes: Contestant -> what one must know to read its times.
        optimizer, kwargs: The optimizer's class by name, and its arguments where they are not the defaults.
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
    notes: dict[str, str] = field(default_factory=dict)
    optimizer: str = "AdamW"
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def call(self) -> str:
        """The optimizer as it is called: "AdamW", "SGD(momentum=0.9)"."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.kwargs.items())
        return f"{self.optimizer}({arguments})" if arguments else self.optimizer

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


DEFAULT, FOREACH, FUSED = "torch default", "torch foreach", "torch fused"
STOCK, BEST_STOCK = (DEFAULT, FOREACH, FUSED), "fastest stock"
OURS, COPY = "optimx", "device copy"
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


def beside_one_group(
    name: str, tensors: Sequence[Shape], number: int, groups: Groups, bound: float, **more: Any
) -> Case:
    """What many groups cost: held against the same step with one."""
    one = {f"{contestant}, one group": start for contestant, start in PLAIN.items()}
    many = {f"{contestant}, {number} groups": partial(start, groups=groups) for contestant, start in PLAIN.items()}
    target = Target(f"{OURS}, {number} groups", "speed", bound, f"{OURS}, one group")
    return Case(name, tensors, one | many, f"{FUSED}, one group", targets=(target,), **more)


def at_least(bound: float, contestant: str = OURS, against: str = FUSED) -> Target:
    return Target(contestant, "speed", bound, against)


def cpu_cases() -> list[Case]:
    many = [(4,)] * 465
    float32, bfloat16 = {FUSED: 28.0, OURS: 28.0}, {FUSED: 14.0, OURS: 14.0}

    inside = partial(at_least, contestant=CLIP_INSIDE, against=TORCH_CLIP)
    clip = partial(Case, contestants=CLIP, baseline=TORCH_CLIP)
    return [
        Case(
            "step-4x4M-float32",
            LARGE,
            STEP,
            FUSED,
            traffic=float32,
            targets=(at_least(4, against=DEFAULT), at_least(0.97)),
        ),
        Case("step-4x4M-bfloat16", LARGE, STEP, FUSED, dtype=torch.bfloat16, traffic=bfloat16),
        Case("step-1000x4", SMALL, STEP, FUSED, targets=(at_least(5),)),
        Case("step-465-groups-same-lr", many, grouped(group_each), FUSED, targets=(at_least(5),)),
        Case("step-465-groups-layer-decay", many, grouped(layer_decay), FUSED, targets=(at_least(5),)),
        # from 17 elements on torch's operator opens a parallel region for every tensor
        Case("step-465-groups-of-64", [(64,)] * 465, grouped(layer_decay), FUSED),
        beside_one_group("step-vit-s16-layer-decay", shapes.vit(384), 28, vit_layer_decay, 0.91),
        clip("clip-4x4M-below", LARGE, targets=(inside(1.1),)),
        clip("clip-4x4M-clipped", LARGE, grad_norm=CLIPPED, targets=(inside(1.1),)),
        clip("clip-1000x4-below", SMALL, targets=(inside(3),)),
        clip("clip-1000x4-clipped", SMALL, grad_norm=CLIPPED, targets=(inside(3),)),
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
        case = beside_one_group(f"groups-465-{clock}", deep_vit, 465, layer_decay, 0.95, device="cuda", clock=clock)
        return replace(case, targets=(*case.targets, Target(f"{OURS}, 465 groups", "syncs", 0)))

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


def other(name: str, optimizer: str, traffic: dict[str, float], **kwargs: Any) -> Case:
    """An optimizer other than AdamW, as a float32 case that wants tensors and targets."""
    if optimizer in ("Lion", "LAMB"):
        contestants = {FOREACH: peer_step}
    else:
        contestants = {DEFAULT: torch_step, FOREACH: partial(torch_step, foreach=True)}
    if optimizer in ("SGD", "Adagrad"):
        contestants[FUSED] = partial(torch_step, fused=True)
    baseline = FUSED if FUSED in contestants else FOREACH
    contestants[OURS] = optimx_step
    return Case(name, (), contestants, baseline, traffic=traffic, optimizer=optimizer, kwargs=kwargs)


SGD_MOMENTUM = other("sgd-momentum", "SGD", {FOREACH: 32.0, FUSED: 20.0, OURS: 20.0}, momentum=0.9)
# ours: p and g read, p written, states read and written; torch's foreach: where somebody has counted it
OTHERS = (
    other("sgd", "SGD", {FUSED: 12.0, OURS: 12.0}),
    SGD_MOMENTUM,
    other("rmsprop", "RMSprop", {FOREACH: 52.0, OURS: 20.0}),
    other("rmsprop-centered", "RMSprop", {OURS: 36.0}, momentum=0.9, centered=True),
    other("adagrad", "Adagrad", {FOREACH: 52.0, FUSED: 20.0, OURS: 20.0}),
    other("adadelta", "Adadelta", {OURS: 28.0}),
    other("adamax", "Adamax", {OURS: 28.0}),
    other("nadam", "NAdam", {OURS: 28.0}),
    other("radam", "RAdam", {OURS: 28.0}),
    other("rprop", "Rprop", {OURS: 28.0}),
    other("asgd", "ASGD", {OURS: 20.0}),
    other("lion", "Lion", {OURS: 20.0}, lr=1e-4, weight_decay=0.1),
    # a second pass: the norms of parameters and steps come first
    other("lamb", "LAMB", {OURS: 44.0}, lr=1e-3, weight_decay=0.01),
)


def other_cpu_cases() -> list[Case]:
    cases = []
    for case in OTHERS:
        large = (at_least(0.97 if FUSED in case.contestants else 1.5, against=BEST_STOCK),)
        if DEFAULT in case.contestants:
            small = (at_least(3, against=DEFAULT), at_least(0.97, against=BEST_STOCK))
        else:
            small = (at_least(3, against=FOREACH),)
        cases += [
            replace(case, name=f"{case.name}-4x4M", shapes=LARGE, targets=large),
            replace(case, name=f"{case.name}-1000x4", shapes=SMALL, traffic={}, targets=small),
        ]
    bfloat16 = replace(
        SGD_MOMENTUM,
        name="sgd-momentum-4x4M-bfloat16",
        shapes=LARGE,
        # not against fused, and no target against whoever is fastest, which might be fused
        baseline=FOREACH,
        dtype=torch.bfloat16,
        traffic={FOREACH: 16.0, OURS: 10.0},
        notes={FUSED: "wrong: torch 2.13's 16-bit CPU kernel leaves the parameters as they were"},
    )
    return [*cases, bfloat16]


def other_gpu_cases() -> list[Case]:
    targets = {
        "sgd-momentum": (at_least(1.5, against=FOREACH), at_least(1.0)),
        "rmsprop": (at_least(2.3, against=FOREACH),),
        "adagrad": (at_least(2.3, against=FOREACH),),
        "lion": (Target(OURS, "bandwidth", 0.92, COPY),),
    }
    cases = []
    for case in OTHERS:
        # sgd-momentum and rmsprop with less or more state
        if case.name in ("sgd", "rmsprop-centered"):
            continue
        # without flags torch takes foreach on a GPU, which is there under that name
        contestants = {name: start for name, start in case.contestants.items() if name != DEFAULT}
        cases.append(
            replace(
                case,
                name=f"{case.name}-llama-1b",
                shapes=shapes.llama(),
                contestants={**contestants, COPY: device_copy},
                device="cuda",
                clock="device",
                traffic={**case.traffic, COPY: 8.0},
                targets=(*targets.get(case.name, ()), Target(OURS, "syncs", 0)),
            )
        )
    return cases


CASES: tuple[Case, ...] = (*cpu_cases(), *other_cpu_cases(), *gpu_cases(), *other_gpu_cases())
