"""Where the host's time goes in a step on a GPU: ``python -m bench host --stub --profile``.

A table a case and contestant, of functions by their own time. The profiler charges calls that it sees, not loops in C:
``map(Tensor.data_ptr, grads)`` is time of the function that it stands in. It also makes calls dearer than they are, so
the table begins with the step's time without it.
"""

from __future__ import annotations

# before torch, which looks for devices once
import tests.fake_gpu.stub_plugin  # noqa: F401  # isort: skip

import cProfile
import pstats
import time
from pathlib import Path
from statistics import median

import torch

from bench.case import Case
from bench.contestants import Run
from bench.stub import CASES

#: As many steps as take that many seconds, at most that many; functions in a table.
SECONDS, STEPS, ROWS = 2.0, 200, 16
ROOT = Path(__file__).parents[1]


def profile(run: Run) -> tuple[float, list[tuple[str, float, float, float]]]:
    """Microseconds of a step, and for each function its calls a step, own and total microseconds, the dearest first."""
    plain: list[float] = []
    while len(plain) < STEPS and sum(plain) < SECONDS:
        run.prepare()
        start = time.thread_time()
        run.step()
        plain.append(time.thread_time() - start)
    steps = len(plain)
    profiler = cProfile.Profile()
    for _ in range(steps):
        run.prepare()
        profiler.enable()
        run.step()
        profiler.disable()
    rows = [
        (_name(*function), calls / steps, 1e6 * own / steps, 1e6 * total / steps)
        for function, (_, calls, own, total, _) in pstats.Stats(profiler).stats.items()
    ]
    return 1e6 * median(plain), sorted(rows, key=lambda row: -row[2])


def _name(file: str, line: int, function: str) -> str:
    if file == "~":
        return function.strip("<>").removeprefix("built-in ")
    path = Path(file)
    # a checkout's files by their place, a package's by their last two folders
    short = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-3:])
    return f"{short}:{line} {function}"


def table(case: Case, contestant: str) -> str:
    microseconds, rows = profile(case.contestants[contestant](case))
    lines = [f"{case.name}, {contestant}: {microseconds:.1f} us a step (the profiler's own cost is in what follows)"]
    lines += [f"{'own us':>9} {'total us':>9} {'calls':>7}  function"]
    lines += [f"{own:9.1f} {total:9.1f} {calls:7.1f}  {name}" for name, calls, own, total in rows[:ROWS]]
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    for case in CASES:
        for contestant in case.contestants:
            print(table(case, contestant), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
