"""What the benchmark files share: how a case of plain steps is made, and how cases become tests of pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

import optimx
from bench.case import COPY, DEFAULT, FOREACH, FUSED, LOOP, NO_SYNC, OURS, Case, Target
from bench.contestants import device_copy, optimx_step, package_step, stock_step
from bench.shapes import MODELS, Shape, sized_down
from optimx.measuring.packages import BY_OPTIMIZER
from optimx.measuring.stock import ways
from optimx.measuring.timing import Run

LARGE, SMALL = [(2048, 2048)] * 4, [(4,)] * 1000

#: With more tensors than this a host is not ready with the step when the device is free: it is the one that is timed.
HOST_BOUND = 2000


def steps(optimizer: str, peers: bool = True) -> dict[str, Callable[[Case], Run]]:
    """Every way to take a step: stock's, ours, and that of each package which has this optimizer.

    For stock's see :func:`optimx.measuring.stock.ways`.
    """
    stock = ways(getattr(optimx, optimizer))
    contestants: dict[str, Callable[[Case], Run]] = {name: partial(stock_step, way=name) for name in stock}
    contestants[OURS] = optimx_step
    if peers:
        contestants |= {peer.package: partial(package_step, peer=peer) for peer in BY_OPTIMIZER.get(optimizer, ())}
    return contestants


def step_case(
    name: str,
    tensors: Sequence[Shape],
    optimizer: str = "AdamW",
    traffic: dict[str, float] | None = None,
    peers: bool = True,
    **settings: Any,
) -> Case:
    """Plain steps of an optimizer. With ``traffic`` a copy takes part, to compare bandwidth with.

    On a GPU the step is charged with time on the device, and torch without flags takes foreach, which is there.
    """
    contestants = steps(optimizer, peers)
    if settings.get("device") == "cuda":
        contestants.pop(DEFAULT, None)
        settings = {"clock": "device", **settings}
    if traffic:
        contestants[COPY] = device_copy
    baseline = next(name for name in (FUSED, FOREACH, LOOP) if name in contestants)
    return Case(name, tensors, contestants, baseline, optimizer=optimizer, traffic=traffic or {}, **settings)


def model_case(question: str, model: str, device: str = "cpu", factor: int = 0, **settings: Any) -> Case:
    """Plain steps on a model of ``shapes.MODELS``, sized down on a CPU, by ``factor`` if one is given."""
    tensors, usual = MODELS[model]
    factor = 1 if device == "cuda" else factor or usual
    label = model if factor == 1 else f"{model} / {factor}"
    name = f"{question}-{model}" + "-gpu" * (device == "cuda")
    if device == "cuda" and len(tensors) > HOST_BOUND:
        settings = {"clock": "wall", **settings}
    return step_case(name, sized_down(tensors, factor), device=device, model=label, **settings)


def no_sync(case: Case, *targets: Target) -> Case:
    """The case with further targets, and that our step does not wait."""
    return replace(case, targets=(*case.targets, *targets, NO_SYNC))


class Replay:
    """A timer for pytest-benchmark that shows times measured before.

    Contestants take turns, so that the machine is equally noisy to all of them; pytest-benchmark times one test after
    the other. It gets the times of each, through this clock, when they are there.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._seconds: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self.now

    def load(self, seconds: Sequence[float]) -> None:
        self.now, self._seconds = 0.0, iter(seconds)

    def advance(self) -> None:
        self.now += next(self._seconds)


REPLAY = Replay()


def contests(cases: Sequence[Case]) -> Callable:
    """Decorate a test of arguments (enter, case, contestant): it is run for every contestant of every case."""
    params = [
        pytest.param(case, name, id=f"{case.name}-{name}".replace(", ", "-").replace(" ", "-"))
        for case in cases
        for name in case.contestants
    ]
    timer = pytest.mark.benchmark(timer=REPLAY, warmup=False)
    return lambda test: timer(pytest.mark.parametrize(("case", "contestant"), params)(test))
