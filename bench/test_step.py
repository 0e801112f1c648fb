"""What does a step cost? Every optimizer, on tensors large and tiny; AdamW on the shapes of real models."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from bench import shapes
from bench.case import BEST_STOCK, COPY, DEFAULT, FOREACH, FUSED, OURS, Case, Target, at_least
from bench.suite import LARGE, SMALL, contests, model_case, no_sync, step_case

#: Bytes a parameter, float32. Ours: parameter and gradient read, parameter written, states read and written; torch's
#: foreach: where somebody has counted it.
ADAM = {FUSED: 28.0, OURS: 28.0}
TRAFFIC: dict[str, dict[str, float]] = {
    "adam": ADAM,
    "sgd": {FUSED: 12.0, OURS: 12.0},
    "sgd-momentum": {FOREACH: 32.0, FUSED: 20.0, OURS: 20.0},
    "rmsprop": {FOREACH: 52.0, OURS: 20.0},
    "rmsprop-centered": {OURS: 36.0},
    "adagrad": {FOREACH: 52.0, FUSED: 20.0, OURS: 20.0},
    "adadelta": {OURS: 28.0},
    "adamax": {OURS: 28.0},
    "nadam": {OURS: 28.0},
    "radam": {OURS: 28.0},
    "rprop": {OURS: 28.0},
    "asgd": {OURS: 20.0},
    "lion": {OURS: 20.0},
    # a second pass: the norms of parameters and steps come first
    "lamb": {OURS: 44.0},
}
#: Name of the cases -> class and arguments.
OTHERS = {
    "adam": ("Adam", {}),
    "sgd": ("SGD", {}),
    "sgd-momentum": ("SGD", {"momentum": 0.9}),
    "rmsprop": ("RMSprop", {}),
    "rmsprop-centered": ("RMSprop", {"momentum": 0.9, "centered": True}),
    "adagrad": ("Adagrad", {}),
    "adadelta": ("Adadelta", {}),
    "adamax": ("Adamax", {}),
    "nadam": ("NAdam", {}),
    "radam": ("RAdam", {}),
    "rprop": ("Rprop", {}),
    "asgd": ("ASGD", {}),
    "lion": ("Lion", {"lr": 1e-4, "weight_decay": 0.1}),
    "lamb": ("LAMB", {"lr": 1e-3, "weight_decay": 0.01}),
}


def adamw_on_cpu() -> list[Case]:
    step = partial(step_case, traffic=ADAM)
    large = at_least(4, against=DEFAULT), at_least(0.97)
    return [
        step("step-4x4M-float32", LARGE, targets=large),
        step("step-4x4M-bfloat16", LARGE, dtype=torch.bfloat16, traffic={FUSED: 14.0, OURS: 14.0}),
        step_case("step-1000x4", SMALL, targets=(at_least(5),)),
        *(model_case("step", model, traffic=ADAM) for model in shapes.MODELS),
    ]


def others_on_cpu() -> list[Case]:
    cases = []
    for name, (optimizer, kwargs) in OTHERS.items():
        case = step_case(name, LARGE, optimizer, TRAFFIC[name], kwargs=kwargs)
        large = (at_least(0.97 if FUSED in case.contestants else 1.5, against=BEST_STOCK),)
        if DEFAULT in case.contestants:
            small = (at_least(3, against=DEFAULT), at_least(0.97, against=BEST_STOCK))
        else:
            small = (at_least(3, against=FOREACH),)
        cases += [
            replace(case, name=f"{name}-4x4M", targets=large),
            step_case(f"{name}-1000x4", SMALL, optimizer, kwargs=kwargs, targets=small),
            model_case(name, "vit-b16", optimizer=optimizer, kwargs=kwargs),
        ]
    bfloat16 = step_case(
        "sgd-momentum-4x4M-bfloat16", LARGE, "SGD", {FOREACH: 16.0, OURS: 10.0},
        dtype=torch.bfloat16, kwargs={"momentum": 0.9},
        notes={FUSED: "wrong: torch 2.13's 16-bit CPU kernel leaves the parameters as they were"},
    )  # fmt: skip
    # not against fused, and no target against whoever is fastest, which might be fused
    return [*cases, replace(bfloat16, baseline=FOREACH)]


#: On a GPU, beside not waiting.
GPU_TARGETS = {
    "sgd-momentum": (at_least(1.5, against=FOREACH), at_least(1.0)),
    "rmsprop": (at_least(2.3, against=FOREACH),),
    "adagrad": (at_least(2.3, against=FOREACH),),
    "lion": (Target(OURS, "bandwidth", 0.92, COPY),),
}


def gpu_cases() -> list[Case]:
    # the parameters, gradients and states of all contestants must fit together: of the largest, torch's and ours
    large = partial(step_case, tensors=shapes.llama(), device="cuda", peers=False, model="llama-3.2-1b")

    def adamw(dtype: torch.dtype, width: float) -> Case:
        name = f"step-llama-1b-{str(dtype).removeprefix('torch.')}"
        case = large(name, dtype=dtype, traffic={FUSED: 7 * width, OURS: 7 * width})
        case.contestants.pop(FOREACH)
        return no_sync(case, at_least(1.0), Target(OURS, "bandwidth", 0.92, COPY))

    cases = [adamw(torch.float32, 4), adamw(torch.bfloat16, 2)]
    for model in shapes.MODELS:
        case = model_case("step", model, "cuda", traffic=ADAM, peers=model != "llama-3-8b-slice")
        cases.append(no_sync(case, at_least(1.0)))
    for name, (optimizer, kwargs) in OTHERS.items():
        # variants with less or more state say little new
        if name not in ("adam", "sgd", "rmsprop-centered"):
            case = large(f"{name}-llama-1b", optimizer=optimizer, traffic=TRAFFIC[name], kwargs=kwargs)
            cases.append(no_sync(case, *GPU_TARGETS.get(name, ())))
    return cases


CASES = [*adamw_on_cpu(), *others_on_cpu(), *gpu_cases()]


@contests(CASES)
def test_step(enter, case: Case, contestant: str) -> None:
    enter(case, contestant)
