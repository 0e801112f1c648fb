"""How a case is timed: its contestants take turns, and each gets a row of the results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench.case import COMPILED, COPY, Case
from bench.counting import count
from bench.results import Row, empty_rows, summarize
from optimx.measuring.packages import Missing, is_peer
from optimx.measuring.timing import CLOCKS, Budget, Run, take_turns, warm_up

CPU_THREADS = 2

#: Noise is less on a GPU that nobody shares, and its time is dear.
GPU = Budget(seconds=2.0)
QUICK = Budget(seconds=0.3, min_rounds=1, max_rounds=20, calls=3, turn=0.1, patience=0.2)


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
    clock = clock_of(case)
    for name, start in case.contestants.items():
        with recorded(rows[name]):
            run = start(case)
            warm[name] = warm_up(run, clock)
            runs[name] = run
    times = take_turns(runs, warm, clock, budget, lambda name: recorded(rows[name]), lambda name: rows[name].out)
    for name in list(times):
        if name != COPY:
            with recorded(rows[name]):
                # under a profiler a slow step takes too long
                quick = min(warm[name]) <= budget.patience
                for column, value in count(runs[name], case.device, steps=quick).items():
                    setattr(rows[name], column, value)
            if rows[name].out:
                del times[name]
    moved = {name: run.moved for name, run in runs.items() if run.moved is not None}
    summarize(case, rows, times, moved)
    return Measured(rows, times)


def clock_of(case: Case) -> Callable[[Run], float]:
    """The case's clock, for one of what is called several times in a call."""
    clock = CLOCKS[case.clock]
    return lambda run: clock(run) / case.repeat


@contextmanager
def recorded(row: Row) -> Iterator[None]:
    """Turn an exception into the row's error; of what is not torch's or ours, into the reason for its absence."""
    try:
        yield
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        text = f"{type(error).__name__}: {first_line}"[:200]
        # a machine need not have a compiler
        if is_peer(row.contestant) or row.contestant == COMPILED:
            row.missing = str(error) if isinstance(error, Missing) else text
        else:
            row.error = text
