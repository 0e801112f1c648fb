"""The JSON that ``python -m bench`` leaves in a folder, read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.results import Row, Verdict

#: Stems of files that :mod:`bench.convergence` and its like leave.
CHECKS = ("convergence", "convergence_muon", "convergence_storage", "lr_find", "bad_steps", "step_costs")


@dataclass
class Question:
    """The results of a benchmark file: machine and circumstances of the run, rows in the order of the cases."""

    name: str
    machine: dict[str, str]
    run: dict[str, str]
    rows: list[Row]
    verdicts: list[Verdict]

    def cases(self) -> Iterator[tuple[str, list[Row]]]:
        """Names of cases with their rows."""
        for case in dict.fromkeys(row.case for row in self.rows):
            yield case, [row for row in self.rows if row.case == case]


@dataclass
class Results:
    """All questions that a machine has answered, and the convergence checks where they were run."""

    folder: Path
    questions: dict[str, Question] = field(default_factory=dict)
    convergence: dict[str, Any] | None = None
    convergence_muon: dict[str, Any] | None = None
    convergence_storage: dict[str, Any] | None = None
    lr_find: dict[str, Any] | None = None
    bad_steps: dict[str, Any] | None = None
    step_costs: dict[str, Any] | None = None

    @property
    def rows(self) -> list[Row]:
        return [row for question in self.questions.values() for row in question.rows]

    @property
    def verdicts(self) -> list[Verdict]:
        return [verdict for question in self.questions.values() for verdict in question.verdicts]

    def cases(self, question: str, start: str = "") -> list[tuple[str, list[Row]]]:
        """Cases of a question whose names begin so, with their rows; none where the question was not put."""
        if question not in self.questions:
            return []
        return [(case, rows) for case, rows in self.questions[question].cases() if case.startswith(start)]

    @property
    def machine(self) -> dict[str, str]:
        return next(iter(self.questions.values())).machine


def load(folder: Path) -> Results:
    """What is in a folder of results.

    Raises:
        FileNotFoundError: There are no results in it.
    """
    results = Results(folder)
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        if path.stem in CHECKS:
            setattr(results, path.stem, report)
        else:
            results.questions[path.stem] = question(path.stem, report)
    if not results.questions:
        raise FileNotFoundError(f"{folder} has no results: `make bench` writes some")
    return results


def question(name: str, report: dict[str, Any]) -> Question:
    measured = [benchmark["extra_info"] for benchmark in report["benchmarks"]]
    rows = [Row(**row) for row in [*measured, *report["left_out"]]]
    # who did not come through stands where the others of the case stand
    order = list(dict.fromkeys(row.case for row in rows))
    rows.sort(key=lambda row: order.index(row.case))
    verdicts = [Verdict(**verdict) for verdict in report["targets"]]
    return Question(name, report["machine_info"], report["run"], rows, verdicts)
