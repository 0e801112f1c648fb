"""Benchmarks under pytest-benchmark: ``python -m pytest bench --benchmark-only [--gpu] [--quick]``.

A case is measured when the first of its contestants is asked for; each contestant is a test, which hands its times to
pytest-benchmark, and whose ``extra_info`` is its row of the results.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from bench.case import Case
from bench.provenance import circumstances, machine
from bench.results import Row, Verdict, judge
from bench.suite import REPLAY
from bench.tables import text_case, text_header
from bench.timing import CPU_THREADS, GPU, QUICK, Budget, Measured, measure

#: What the session has measured: cases in order, with their verdicts.
MEASURED = pytest.StashKey[list[tuple[Measured, list[Verdict]]]]()
CIRCUMSTANCES = pytest.StashKey[dict[str, str]]()
#: The plugin that stands in for a GPU.
STUB = "tests.fake_gpu.stub_plugin"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("optimx benchmarks")
    group.addoption("--gpu", action="store_true", help="the cases for a GPU instead of those for a CPU")
    group.addoption("--stub", action="store_true", help="the cases for the stub driver, which is no GPU")
    group.addoption("--quick", action="store_true", help="few rounds: to see that they run, not for numbers")
    group.addoption("--command", default="", help="what to name as the command in the results")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = []
    if config.getoption("--stub") and not config.pluginmanager.has_plugin(STUB):
        raise pytest.UsageError(f"--stub needs -p {STUB}")
    if config.getoption("--gpu") and not torch.cuda.is_available():
        raise pytest.UsageError("--gpu needs a GPU that torch can use; torch.cuda.is_available() is False")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    stub = config.getoption("--stub")
    device = "cuda" if config.getoption("--gpu") or stub else "cpu"
    there, elsewhere = [], []
    for item in items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        # other tests may have cases of their own
        other = isinstance(case, Case) and (case.device, case.stub) != (device, stub)
        (elsewhere if other else there).append(item)
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = there


@pytest.fixture(scope="session")
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(CPU_THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config, threads: None) -> Callable[[Case], Measured]:
    """Measures a case once."""
    pytestconfig.stash[CIRCUMSTANCES] = circumstances(pytestconfig.getoption("--command"))
    known: dict[str, Measured] = {}

    def measured(case: Case) -> Measured:
        if case.name not in known:
            # a case's tensors go before the next one's come
            gc.collect()
            if case.device == "cuda":
                torch.cuda.empty_cache()
            budget = GPU if case.device == "cuda" and not case.stub else Budget()
            known[case.name] = result = measure(case, QUICK if pytestconfig.getoption("--quick") else budget)
            pytestconfig.stash[MEASURED].append((result, judge(case, result.rows)))
        return known[case.name]

    return measured


@pytest.fixture
def enter(benchmark: Any, measured: Callable[[Case], Measured]) -> Callable[[Case, str], None]:
    """Reports a contestant of a case: as times of pytest-benchmark, as a skip or as a failure."""

    def enter(case: Case, contestant: str) -> None:
        result = measured(case)
        row, times = result.rows[contestant], result.times.get(contestant)
        if times is None:
            # pytest-benchmark would complain that nobody used its fixture
            benchmark.skipped = True
            if row.missing is not None:
                pytest.skip(row.missing)
            pytest.fail(f"{contestant} in {case.name}: {row.error}", pytrace=False)
        benchmark.group = case.name
        benchmark.extra_info.update(filled(row))
        REPLAY.load(times)
        benchmark.pedantic(REPLAY.advance, rounds=len(times))

    return enter


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What a comparison needs to know, in place of what would name the machine in its network."""
    machine_info.clear()
    machine_info.update(machine(config.getoption("--gpu"), config.getoption("--stub")))


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    commit_info.clear()
    commit_info["id"] = config.stash[CIRCUMSTANCES]["commit"]


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Adds who did not come through, and the targets. Every single time would be too much, and cases are no JSON."""
    for benchmark in output_json["benchmarks"]:
        del benchmark["params"], benchmark["options"], benchmark["stats"]["data"]
    results = config.stash[MEASURED]
    output_json["run"] = config.stash[CIRCUMSTANCES]
    output_json["left_out"] = [filled(row) for result, _ in results for row in left_out(result)]
    output_json["targets"] = [asdict(verdict) for _, verdicts in results for verdict in verdicts]


def filled(row: Row) -> dict[str, Any]:
    """The columns that the row has."""
    return {name: value for name, value in asdict(row).items() if value is not None}


def left_out(result: Measured) -> list[Row]:
    return [row for name, row in result.rows.items() if name not in result.times]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash[MEASURED]
    if results:
        terminalreporter.write_line(text_header())
    for result, verdicts in results:
        terminalreporter.write_line(text_case(result.rows.values(), verdicts))
