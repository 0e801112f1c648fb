"""How a case is timed: contestants take turns, so that a noisy machine is noisy to all of them alike."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch

from bench.case import COPY, Case
from bench.contestants import HOLD_CYCLES, Run
from bench.counting import count
from bench.packages import Missing, is_peer
from bench.results import Row, empty_rows, summarize

CPU_THREADS = 2
WARMUP = 3
# a step that waits for the device is never queued in time
MAX_HOLD_CYCLES = 16 * HOLD_CYCLES


@dataclass(frozen=True)
class Budget:
    """How long a case is measured: rounds until ``seconds`` have passed, within bounds.

    A round is a turn of each contestant, a turn is ``calls`` calls in a row, fewer of one that needs more than
    ``turn`` seconds for them. One that needs more than ``patience`` seconds for a step has the times of its warm-up.
    """

    seconds: float = 4.0
    min_rounds: int = 8
    max_rounds: int = 100
    calls: int = 5
    turn: float = 0.2
    patience: float = 1.0


#: Noise is less on a GPU that nobody shares, and its time is dear.
GPU = Budget(seconds=2.0)
QUICK = Budget(seconds=0.3, min_rounds=1, max_rounds=20, calls=3, turn=0.1, patience=0.2)


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
        torch.cuda._sleep(run.hold)
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


CLOCKS: dict[str, Callable[[Run], float]] = {
    "wall": wall_time,
    "host": host_time,
    "device": device_time,
    "cpu": cpu_time,
}


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Measured:
    """A case's rows and, for contestants that came through, seconds of every timed call; both by contestant."""

    rows: dict[str, Row]
    times: dict[str, list[float]]


def measure(case: Case, budget: Budget) -> Measured:
    """Time a case. A contestant that raises or is not installed gets a row that says so, and the others go on."""
    rows = empty_rows(case)
    runs: dict[str, Run] = {}
    warm: dict[str, list[float]] = {}
    for name, start in case.contestants.items():
        with recorded(rows[name]):
            run = start(case)
            warm[name] = [timed(run, case) for _ in range(WARMUP)]
            runs[name] = run
    slow = {name: seconds[1:] for name, seconds in warm.items() if name in runs and min(seconds) > budget.patience}
    quick = {name: run for name, run in runs.items() if name not in slow}
    calls = {name: max(1, min(budget.calls, int(budget.turn / median(warm[name])))) for name in quick}
    times = take_turns(case, quick, calls, rows, budget) | slow
    for name in list(times):
        if name != COPY:
            with recorded(rows[name]):
                # under a profiler a slow step takes too long
                for column, value in count(runs[name], case.device, steps=name in quick).items():
                    setattr(rows[name], column, value)
            if rows[name].out:
                del times[name]
    moved = {name: run.moved for name, run in runs.items() if run.moved is not None}
    summarize(case, rows, times, moved)
    return Measured(rows, times)


def take_turns(
    case: Case, runs: dict[str, Run], calls: dict[str, int], rows: dict[str, Row], budget: Budget
) -> dict[str, list[float]]:
    """Seconds, one a call, of every contestant that comes through all rounds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + budget.seconds
        for turn in range(budget.max_rounds):
            if turn >= budget.min_rounds and time.perf_counter() > deadline:
                break
            names = [name for name in runs if not rows[name].out]
            # nobody always runs in the wake of the same other
            first = turn % max(len(names), 1)
            for name in names[first:] + names[:first]:
                with recorded(rows[name]):
                    times[name] += [timed(runs[name], case) for _ in range(calls[name])]
    finally:
        gc.enable()
    return {name: seconds for name, seconds in times.items() if not rows[name].out}


def timed(run: Run, case: Case) -> float:
    run.prepare()
    return CLOCKS[case.clock](run) / case.repeat


@contextmanager
def recorded(row: Row) -> Iterator[None]:
    """Turn an exception into the row's error; of another package's optimizer, into the reason for its absence."""
    try:
        yield
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        text = f"{type(error).__name__}: {first_line}"[:200]
        if is_peer(row.contestant):
            row.missing = str(error) if isinstance(error, Missing) else text
        else:
            row.error = text
