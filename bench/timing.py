"""How a case is timed: contestants take turns, so that a noisy machine is noisy to all of them alike."""

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.cases import Case
from bench.contestants import Run
from bench.results import Row, empty_rows, summarize

CPU_THREADS = 2
WARMUP = 3
# some 10 ms: longer than the host needs to queue a step (torch's own tests hold a stream with _sleep)
HOLD_CYCLES = 20_000_000


@dataclass(frozen=True)
class Budget:
    """How long a case is measured: rounds until ``seconds`` have passed, within bounds.

    A round is a turn of each contestant, a turn is ``calls`` calls in a row.
    """

    seconds: float = 4.0
    min_rounds: int = 8
    max_rounds: int = 100
    calls: int = 5


QUICK = Budget(seconds=0.3, min_rounds=1, max_rounds=20, calls=3)


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
    """Seconds on the device, kept busy until the host has queued the step, as the backward pass does in training."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(HOLD_CYCLES)
    start.record()
    run.step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


CLOCKS: dict[str, Callable[[Run], float]] = {"wall": wall_time, "host": host_time, "device": device_time}


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def measure(case: Case, budget: Budget) -> dict[str, Row]:
    """Rows by contestant. One that raises gets a row with the error, and the others go on."""
    rows = empty_rows(case)
    runs: dict[str, Run] = {}
    for name, start in case.contestants.items():
        with recorded(rows[name]):
            run = start(case)
            for _ in range(WARMUP):
                timed(run, case)
            runs[name] = run
    times = take_turns(case, runs, rows, budget)
    if case.device == "cuda":
        for name in times:
            with recorded(rows[name]):
                rows[name].launches = count_launches(runs[name])
            # last, for it may leave a step half done
            with recorded(rows[name]):
                rows[name].syncs = count_syncs(runs[name])
    summarize(case, rows, times)
    return rows


def take_turns(case: Case, runs: dict[str, Run], rows: dict[str, Row], budget: Budget) -> dict[str, list[float]]:
    """Seconds, one a call, of every contestant that comes through all rounds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + budget.seconds
        for turn in range(budget.max_rounds):
            if turn >= budget.min_rounds and time.perf_counter() > deadline:
                break
            names = [name for name in runs if rows[name].error is None]
            # nobody always runs in the wake of the same other
            first = turn % max(len(names), 1)
            for name in names[first:] + names[:first]:
                with recorded(rows[name]):
                    times[name] += [timed(runs[name], case) for _ in range(budget.calls)]
    finally:
        gc.enable()
    return {name: seconds for name, seconds in times.items() if rows[name].error is None}


def timed(run: Run, case: Case) -> float:
    run.prepare()
    return CLOCKS[case.clock](run)


@contextmanager
def recorded(row: Row) -> Iterator[None]:
    """Turn an exception into the row's error."""
    try:
        yield
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        row.error = f"{type(error).__name__}: {first_line}"[:200]


def count_launches(run: Run) -> int | None:
    """Kernels that a step launches, copies and fills not among them; None where the profiler sees none."""
    run.prepare()
    synchronize()
    with torch.profiler.profile() as profiler:
        run.step()
        synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        # the trace names the category; the profiler's own events mix kernels with annotated ranges
        events = json.loads(trace.read_text())["traceEvents"]
    return sum(event.get("cat") == "kernel" for event in events) or None


def count_syncs(run: Run) -> int:
    """0 if the step never makes the host wait for the device; 1 if it does, for the first wait ends it."""
    run.prepare()
    synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.step()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return 1
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return 0
