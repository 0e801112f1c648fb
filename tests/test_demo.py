"""The training demo: it runs, it shows what it promises, and its check can fail."""

import dataclasses

import pytest
import torch

# `make gpu` uses the Python on PATH, which need not have what only the demo wants
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from bench import demo

TINY = ["--steps=25", "--layers=1", "--heads=2", "--width=16", "--context=16", "--batch=2", "--device=cpu"]
NAN = float("nan")


@pytest.fixture(autouse=True)
def _terminal_and_threads(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    # threads that wait for a core taken by another test worker cost seconds, on a model this small
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("baseline", [demo.DEFAULT, demo.FUSED])
def test_demo_agrees_and_shows_every_run(tmp_path, capsys, baseline):
    flag = "--fused" if baseline == demo.FUSED else "--default"
    assert demo.main([*TINY, "--out", str(tmp_path), flag]) == 0

    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    # nothing cut off, nothing wrapped: a row is a name, three losses, a time, its range, a speed
    rows = {cells[0]: cells[1:] for line in lines if len(cells := line.split()) == 7 and cells[-1].endswith("x")}
    assert list(rows) == [demo.DEFAULT, demo.FUSED, demo.OURS]
    assert rows[baseline][-1] == "1.00x"
    assert len({tuple(cells[:3]) for cells in rows.values()}) == 1, "same losses"
    assert all(len(line) <= 80 for line in lines if not line.startswith("Loss curves"))
    assert lines[-1].startswith("AGREE")


def test_demo_exits_1_when_the_optimizer_is_another(tmp_path, capsys, monkeypatch):
    def adamw_without_decay(params, **options):
        return torch.optim.AdamW(params, **{**options, "weight_decay": 0.0})

    monkeypatch.setattr(demo.optimx, "AdamW", adamw_without_decay)
    assert demo.main([*TINY, "--out", str(tmp_path)]) == 1
    assert "DISAGREE optimx.AdamW does not train like torch.optim.AdamW:" in capsys.readouterr().out


def run(losses, validation_loss=2.0):
    clock = demo.Stopwatch(torch.device("cpu"))
    return demo.Run(clock, clock, list(losses), validation_loss)


FALLING = [4.0 - 0.01 * step for step in range(100)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({}, [], id="equal"),
        pytest.param({19: 5e-5, 60: 0.2}, [], id="rounding"),
        pytest.param({19: 2e-4}, ["first 20 steps"], id="early"),
        pytest.param(dict.fromkeys(range(80, 100), 0.04), ["last loss"], id="end"),
        pytest.param({3: NAN}, ["first 20 steps"], id="nan-early"),
        pytest.param({99: NAN}, ["last loss"], id="nan-end"),
        pytest.param({0: 1.0, 99: 5.0}, ["first 20 steps", "last loss"], id="both"),
    ],
)
def test_agreement_of_losses(change, words):
    other = run(loss + change.get(step, 0.0) for step, loss in enumerate(FALLING))
    failures = demo.Agreement.between(other, run(FALLING)).failures()
    assert len(failures) == len(words)
    assert all(word in failure for word, failure in zip(words, failures, strict=True))


@pytest.mark.parametrize(("validation_loss", "agrees"), [(2.0, True), (2.01, True), (2.03, False), (NAN, False)])
def test_agreement_of_validation(validation_loss, agrees):
    agreement = demo.Agreement.between(run(FALLING, validation_loss), run(FALLING))
    assert (agreement.failures() == []) is agrees
    assert dataclasses.replace(agreement, validation=0.0).failures() == []


def test_agreement_refuses_runs_of_different_length():
    with pytest.raises(ValueError, match=r"zip\(\)"):
        demo.Agreement.between(run(FALLING[:-1]), run(FALLING))
