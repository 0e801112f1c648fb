"""Sinks write what a watcher gives them, where and as they should."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from optimx import sinks
from optimx.watching.statistics import STATISTICS

WHOLE = {"grad_norm": 2.5, "clip_factor": 1.0, "skipped": 0.0}
ROWS = {
    10: {**WHOLE, "grad_norm/a.weight": 1.5, "max_grad": 0.25},
    20: {**WHOLE, "grad_norm/a.weight": float("nan"), "grad_norm/b.weight": 2.0},
}


class Writer:
    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        self.scalars.append((tag, value, global_step))


def test_tensorboard_has_a_scalar_for_each_key() -> None:
    writer = Writer()
    sink = sinks.TensorBoard(writer)
    for step, row in ROWS.items():
        sink(step, row)
    assert writer.scalars == [(key, value, step) for step, row in ROWS.items() for key, value in row.items()]


def test_tensorboard_itself(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        sinks.TensorBoard(writer)(10, ROWS[10])
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("grad_norm/a.weight")] == [(10, 1.5)]


class Run:
    """What W&B does with steps: a row below the current one is dropped, one without is the next."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.axes: dict[str, str] = {}
        self.step = 0

    def log(self, row: dict[str, float], step: int | None = None) -> None:
        if step is not None and step < self.step:
            return
        self.step = step if step is not None else self.step + 1
        self.rows.append((self.step, row))

    def define_metric(self, name: str, step_metric: str) -> None:
        assert name not in self.axes, "once"
        self.axes[name] = step_metric


def test_wandb_logs_rows_with_their_steps() -> None:
    run = Run()
    sink = sinks.WandB(run)
    for step, row in ROWS.items():
        sink(step, row)
    assert run.rows == [*ROWS.items()]
    assert not run.axes


def test_wandb_with_an_axis_loses_no_late_row() -> None:
    run = Run()
    sink = sinks.WandB(run, step_metric="watched_step")
    run.log({"loss": 1.0}, step=25)
    for step, row in ROWS.items():
        sink(step, row)
    assert [row for _, row in run.rows[1:]] == [{**row, "watched_step": step} for step, row in ROWS.items()]
    assert run.axes == dict.fromkeys(["grad_norm", "clip_factor", "skipped", "max_grad", "grad_norm/*"], "watched_step")


def test_csv_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    sinks.CSV(path)(10, ROWS[10])
    again = sinks.CSV(str(path))
    again(20, ROWS[20])
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(int(line["step"]), line["key"]) for line in lines] == [(s, key) for s, row in ROWS.items() for key in row]
    for line in lines:
        assert float(line["value"]) == pytest.approx(ROWS[int(line["step"])][line["key"]], rel=0, nan_ok=True)


def test_csv_that_cannot_be_written_says_so_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        sinks.CSV(tmp_path / "nowhere" / "run.csv")


# tables


def long_row(layers: int = 12, stats: Any = tuple(STATISTICS)) -> dict[str, float]:
    """A row as of a transformer: long names, numbers of all sizes."""
    names = ["", "group/0", *(f"model.layers.{i}" for i in range(layers))]
    names += [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(layers)]
    row = {**WHOLE, "clip_factor": 0.4, "skipped": 1.0}
    for i, stat in enumerate(stats):
        for name in names:
            row[f"{stat}/{name}" if name else stat] = (-1 if stat == "cosine" else 1) * 1.26 * 10.0 ** (-i - 3)
    return row


def shown(row: dict[str, float], width: int, **options: Any) -> list[str]:
    """The lines that a terminal of this width has in the end."""
    pytest.importorskip("rich")
    from rich.console import Console
    from rich.live import Live

    console = Console(width=width, height=60, file=io.StringIO(), force_terminal=False, record=True)
    with Live(console=console, auto_refresh=False) as live:
        sink = sinks.RichTable(live, **options)
        sink(10, {**row, "grad_norm": 12345.0})
        sink(20, row)
        sink.close()
        assert live.is_started, "whoever opened it closes it"
    return console.export_text().splitlines()


@pytest.mark.parametrize("stats", [tuple(STATISTICS), ("grad_norm", "update_ratio")], ids=len)
def test_a_table_fits_into_80_columns(stats: Any) -> None:
    lines = shown(long_row(stats=stats), 80)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("step 20  skipped  clip_factor 4.0e-1")
    assert "1.2e4" not in text, "of a row before"
    for i, stat in enumerate(stats):
        assert f"{'-' if stat == 'cosine' else ''}1.3e-{i + 3}" in text
        assert all(word in text for word in stat.split("_"))
    assert "all " in text
    assert "group/0" in text
    assert "_proj.weight" in text
    assert "and 6 more" in text


def test_a_wide_table_has_whole_names_and_dashes() -> None:
    lines = shown({**WHOLE, "max_grad/a.very.long.name.of.a.parameter": 1e-30}, 120)
    (line,) = [line for line in lines if "a.very.long.name.of.a.parameter" in line]
    assert line.split() == ["a.very.long.name.of.a.parameter", "-", "1.0e-30"]


def test_a_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rich = pytest.importorskip("rich")
    from rich.console import Console

    file = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(width=80, file=file, force_terminal=True))
    sink = sinks.RichTable(rows=3)
    sink(10, ROWS[10])
    sink(20, ROWS[20])
    assert "step 10" in file.getvalue()
    sink.close()
    sink.close()
    assert "b.weight" in file.getvalue()
    sinks.RichTable().close()


def test_rows_of_a_table_are_a_number() -> None:
    with pytest.raises(ValueError, match="rows should be >= 1 but is: 0"):
        sinks.RichTable(rows=0)
