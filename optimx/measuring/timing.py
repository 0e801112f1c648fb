"""How steps are timed: contestants take turns, so that a noisy machine is noisy to all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median

import torch
from torch.optim import Optimizer

from .. import _compat

__all__ = ["CLOCKS", "HOLD_CYCLES", "MAX_HOLD_CYCLES", "WARMUP", "Budget", "Run", "device_time", "synchronize",
           "take_turns", "warm_up"]  # fmt: skip

#: Calls before the first that counts.
WARMUP = 3
#: Some 10 ms of a GPU's time, longer than the host mostly needs to queue a step (torch's own tests hold a stream so).
HOLD_CYCLES = 20_000_000
# a step that waits for the device is never queued in time
MAX_HOLD_CYCLES = 16 * HOLD_CYCLES


@dataclass
class Run:
    """A contestant ready to be timed: ``prepare()`` is called before every ``step()`` and is not timed.

    Attributes:
        prepare: Brings what a step needs, such as gradients.
        step: What is timed.
        optimizer: That steps, where there is one.
        moved: Bytes of memory traffic of a step, where they are known.
        hold: Cycles for which the GPU is kept busy while the host queues a step.
    """

    prepare: Callable[[], object]
    step: Callable[[], object]
    optimizer: Optimizer | None = None
    moved: int | None = None
    hold: int = HOLD_CYCLES


@dataclass(frozen=True)
class Budget:
    """How long contestants are measured: rounds until ``seconds`` have passed, within bounds.

    A round is a turn of each contestant, a turn is ``calls`` calls in a row, fewer of one that needs more than
    ``turn`` seconds for them. One that needs more than ``patience`` seconds for a step has the times of its warm-up.
    """

    seconds: float = 4.0
    min_rounds: int = 8
    max_rounds: int = 100
    calls: int = 5
    turn: float = 0.2
    patience: float = 1.0


def wall_time(run: Run) -> float:
    """Seconds from the call to the end of its work, started on an idle device."""
    synchronize()
    start = time.perf_counter()
    run.step()
    synchronize()
    return time.perf_counter() - start


def host_time(run: Run) -> float:
    """Seconds until the call returns, started on an idle device: what the host pays to queue the work."""
    synchronize()
    start = time.perf_counter()
    run.step()
    seconds = time.perf_counter() - start
    synchronize()
    return seconds


def device_time(run: Run) -> float:
    """Seconds on the device, kept busy until the host has queued the step, as the backward pass does in training.

    Hundreds of groups take some implementations longer to queue than others: where the device came to the step too
    early, it is held for longer, and the step is taken once more.
    """
    while True:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        _compat.hold_stream(run.hold)
        start.record()
        run.step()
        end.record()
        too_early = start.query()
        end.synchronize()
        if not too_early or run.hold >= MAX_HOLD_CYCLES:
            return start.elapsed_time(end) / 1e3
        run.hold *= 2
        run.prepare()


def cpu_time(run: Run) -> float:
    """Seconds of processor time until the call returns: what others do with the cores meanwhile does not count."""
    synchronize()
    start = time.thread_time()
    run.step()
    return time.thread_time() - start


#: What a call is charged with, by name.
CLOCKS: dict[str, Callable[[Run], float]] = {
    "wall": wall_time,
    "host": host_time,
    "device": device_time,
    "cpu": cpu_time,
}


def synchronize() -> None:
    """Wait for the GPU, where one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def warm_up(run: Run, clock: Callable[[Run], float]) -> list[float]:
    """Seconds of the first calls, which make states and fill caches."""
    return [_timed(run, clock) for _ in range(WARMUP)]


def take_turns(
    runs: Mapping[str, Run],
    warm: Mapping[str, list[float]],
    clock: Callable[[Run], float],
    budget: Budget,
    guard: Callable[[str], AbstractContextManager[object]],
    out: Callable[[str], bool],
) -> dict[str, list[float]]:
    """Seconds, one a call, of every contestant that comes through all rounds.

    Args:
        runs: By contestant.
        warm: What :func:`warm_up` gave for each.
        clock: One of :data:`CLOCKS`.
        budget: How long.
        guard: Given a contestant's name, a context for its calls, which keeps what they raise.
        out: Whether a contestant has raised something and takes no further part.
    """
    slow = {name: warm[name][1:] for name in runs if min(warm[name]) > budget.patience}
    quick = [name for name in runs if name not in slow]
    calls = {name: max(1, min(budget.calls, int(budget.turn / median(warm[name])))) for name in quick}
    times: dict[str, list[float]] = {name: [] for name in quick}
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + budget.seconds
        for turn in range(budget.max_rounds):
            if turn >= budget.min_rounds and time.perf_counter() > deadline:
                break
            names = [name for name in quick if not out(name)]
            # nobody always runs in the wake of the same other
            first = turn % max(len(names), 1)
            for name in names[first:] + names[:first]:
                with guard(name):
                    times[name] += [_timed(runs[name], clock) for _ in range(calls[name])]
    finally:
        gc.enable()
    return {name: seconds for name, seconds in times.items() if not out(name)} | slow


def _timed(run: Run, clock: Callable[[Run], float]) -> float:
    run.prepare()
    return clock(run)
