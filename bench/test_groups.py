"""What do parameter groups cost? The same tensors in few and in many, with equal settings and each with its own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from bench import shapes
from bench.case import FUSED, NO_SYNC, OURS, Case, Target, at_least
from bench.contestants import Groups, group_each, layer_decay, optimx_step, torch_step, vit_layer_decay
from bench.shapes import Shape
from bench.suite import contests, step_case

MANY = [(4,)] * 465


def grouped(name: str, tensors: list[Shape], groups: Groups, count: int, **settings: Any) -> Case:
    case = step_case(name, tensors, peers=False, groups=count, **settings)
    return replace(case, contestants={name: partial(run, groups=groups) for name, run in case.contestants.items()})


def beside_one_group(
    name: str, tensors: list[Shape], number: int, groups: Groups, bound: float, **settings: Any
) -> Case:
    """What many groups cost: held against the same step with one."""
    ways = {FUSED: partial(torch_step, fused=True), OURS: optimx_step}
    one = {f"{contestant}, one group": start for contestant, start in ways.items()}
    many = {f"{contestant}, {number} groups": partial(start, groups=groups) for contestant, start in ways.items()}
    target = Target(f"{OURS}, {number} groups", "speed", bound, f"{OURS}, one group")
    return Case(name, tensors, one | many, f"{FUSED}, one group", targets=(target,), groups=number, **settings)


def cpu_cases() -> list[Case]:
    sweep = [grouped(f"groups-{count}", MANY, partial(layer_decay, count=count), count) for count in (1, 8, 64, 465)]
    return [
        *sweep[:-1],
        replace(sweep[-1], targets=(at_least(5),)),
        grouped("groups-465-equal", MANY, group_each, 465, targets=(at_least(5),)),
        # from 17 elements on torch's operator opens a parallel region for every tensor
        grouped("groups-465-of-64", [(64,)] * 465, layer_decay, 465),
        beside_one_group("groups-vit-s16-layer-decay", shapes.vit(384), 28, vit_layer_decay, 0.91, model="vit-s16"),
    ]


def gpu_cases() -> list[Case]:
    # ViT-B's width, and as many tensors as the CPU cases have groups
    deep_vit = shapes.vit(layers=38, registers=4)
    cases = []
    for clock in ("wall", "device"):
        case = beside_one_group(f"groups-465-{clock}", deep_vit, 465, layer_decay, 0.95, device="cuda", clock=clock)
        cases.append(replace(case, targets=(*case.targets, Target(f"{OURS}, 465 groups", "syncs", 0))))
    sweep = [
        grouped(f"groups-{count}-gpu", deep_vit, partial(layer_decay, count=count), count, targets=(NO_SYNC,),
                device="cuda", clock="wall")
        for count in (1, 8, 64, 465)
    ]  # fmt: skip
    return [*cases, *sweep]


CASES = [*cpu_cases(), *gpu_cases()]


@contests(CASES)
def test_groups(enter, case: Case, contestant: str) -> None:
    enter(case, contestant)
