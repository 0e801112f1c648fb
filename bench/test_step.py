"""What does a step cost? Every optimizer, on tensors large and tiny; AdamW on the shapes of real models."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench import shapes
from bench.case import BEST_STOCK, COPY, DEFAULT, FOREACH, FUSED, OURS, Case, Target, at_least
from bench.catalogue import cost_of, of_all_shapes
from bench.suite import LARGE, SMALL, contests, model_case, no_sync, step_case, steps

#: Arguments of an optimizer: of cases that move other memory, and with which stock takes the same steps.
ARGUMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "SGD": {"": {}, "momentum": {"momentum": 0.9}},
    "RMSprop": {"": {}, "centered": {"momentum": 0.9, "centered": True}},
    "Lion": {"": {"lr": 1e-4, "weight_decay": 0.1}},
    "LAMB": {"": {"lr": 1e-3, "weight_decay": 0.01}},
}
#: Name of the cases -> class and arguments: all but AdamW and Adafactor, which have cases of their own.
OTHERS = {
    "-".join(filter(None, (optimizer.lower(), label))): (optimizer, kwargs)
    for optimizer in of_all_shapes()
    if optimizer not in ("AdamW", "Adafactor")
    for label, kwargs in ARGUMENTS.get(optimizer, {"": {}}).items()
}
#: Bytes a float32 parameter that torch's foreach moves, where somebody has counted it.
FOREACH_MOVES = {"sgd-momentum": 32.0, "rmsprop": 52.0, "adagrad": 52.0}


def traffic_of(name: str) -> dict[str, float]:
    """Bytes a float32 parameter: ours, and torch's fused step's, which is one pass as well."""
    optimizer, kwargs = OTHERS[name]
    moved = cost_of(optimizer, kwargs).moved
    passes = {contestant: moved for contestant in (FUSED, OURS) if contestant in steps(optimizer, peers=False)}
    return passes | ({FOREACH: FOREACH_MOVES[name]} if name in FOREACH_MOVES else {})


ADAM = traffic_of("adam")


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
        case = step_case(name, LARGE, optimizer, traffic_of(name), kwargs=kwargs)
        large = (at_least(0.97 if FUSED in case.contestants else 1.5, against=BEST_STOCK),)
        if DEFAULT in case.contestants:
            small = (at_least(3, against=DEFAULT), at_least(0.97, against=BEST_STOCK))
        else:
            small = (at_least(3, against=case.baseline),)
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
            case = large(f"{name}-llama-1b", optimizer=optimizer, traffic=traffic_of(name), kwargs=kwargs)
            cases.append(no_sync(case, *GPU_TARGETS.get(name, ())))
    return cases


CASES = [*adamw_on_cpu(), *others_on_cpu(), *gpu_cases()]


@contests(CASES)
def test_step(enter, case: Case, contestant: str) -> None:
    enter(case, contestant)
