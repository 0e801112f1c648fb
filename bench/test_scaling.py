"""How does a step's time grow with the number of parameters, and with the number of tensors?

The report fits fixed cost + cost per tensor + bytes over bandwidth to what comes out.
"""

from __future__ import annotations

from typing import Any

from bench.case import Case
from bench.suite import contests, step_case

#: Tensors over which parameters are spread, where these grow; elements of a tensor, where the tensors' number grows.
SPREAD, ELEMENTS = 8, 64


def by_params(params: int, device: str, **settings: Any) -> Case:
    name = f"params-1e{len(str(params)) - 1}" + "-gpu" * (device == "cuda")
    tensors = [(params // SPREAD,)] * SPREAD
    # of the largest, states of all would not fit
    peers = device == "cpu" and params < 10**8
    return step_case(name, tensors, peers=peers, device=device, **settings)


def by_tensors(count: int, device: str) -> Case:
    # on a GPU the host is the one that pays for tensors
    name = f"tensors-{count}" + "-gpu" * (device == "cuda")
    return step_case(name, [(ELEMENTS,)] * count, peers=device == "cpu", device=device, clock="wall")


CASES = [
    case
    for device, largest in (("cpu", 8), ("cuda", 9))
    for case in [
        *(by_params(10**exponent, device, clock="wall") for exponent in range(4, largest + 1)),
        *(by_tensors(count, device) for count in (1, 10, 100, 1000, 10_000)),
    ]
]


@contests(CASES)
def test_scaling(enter, case: Case, contestant: str) -> None:
    enter(case, contestant)
