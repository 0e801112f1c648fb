"""Where training ends by how numbers are kept: only that differs, and the check can fail."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

# `make gpu` uses the Python on PATH, which need not have what only this check wants
pytest.importorskip("matplotlib")

import optimx
from bench import convergence_storage, convergence_text
from bench.convergence_storage import SCHEMES, InFloat32, KeptText, Scheme, judge, main
from bench.convergence_tasks import Recipe, loss
from bench.gpt import GPT, GPTConfig
from optimx import presets

NAN = float("nan")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(convergence_storage, "GPTConfig", partial(GPTConfig, heads=1, width=128))
    monkeypatch.setattr(KeptText, "recipe", Recipe(steps=60, max_grad_norm=1.0, warmup=20))
    monkeypatch.setattr(KeptText, "batch", 1)


FLOAT32 = "exp_avg float32, exp_avg_sq float32"
CODES = "exp_avg_codes int8, exp_avg_sq_codes uint8"
SCALES = "exp_avg_scales float32, exp_avg_sq_scales float32"


@pytest.mark.filterwarnings("ignore:exp_avg_sq in bfloat16")
@pytest.mark.parametrize(
    ("scheme", "expected"),
    [*zip(SCHEMES, [
        f"float32, {FLOAT32}",
        f"bfloat16, {FLOAT32}",
        f"bfloat16, {FLOAT32}",
        f"bfloat16, {FLOAT32}, param_remainder int8",
        f"bfloat16, {FLOAT32}, param_remainder int16",
        f"bfloat16, {FLOAT32}, param_master float32",
        "float32, exp_avg bfloat16, exp_avg_sq bfloat16",
        "float32, exp_avg bfloat16, exp_avg_sq bfloat16",
        f"float32, {CODES}, {SCALES}",
        f"bfloat16, {CODES}, {SCALES}",
        f"bfloat16, {CODES}, param_remainder int8, {SCALES}",
    ], strict=True)],
    ids=lambda value: f"{value.params}-{value.states}" if isinstance(value, Scheme) else "",
)  # fmt: skip
def test_schemes_keep_what_they_say(scheme, expected):
    model = KeptText(torch.device("cpu"), scheme.dtype).model()
    optimizer, _ = optimx.build(model, {"optimizer": scheme.section(), "schedule": {"name": "cosine", "total": 10}})
    rows = optimx.memory(optimizer).rows
    most = max(rows, key=lambda row: row.elements)
    assert most.kept == expected
    assert most.elements > 0.98 * sum(row.elements for row in rows), "matrices are large enough for 8 bits"


def test_a_run_trains_every_scheme_and_saves(small, tmp_path, capsys):
    status = main(["--quick", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "convergence_storage.json").read_text())
    assert results["run"]["command"] == "python -m bench.convergence_storage --quick"
    assert results["steps"] == [0, 1, 2, 3, 4, 5, 6]
    assert [Scheme(entry["params"], entry["states"]) for entry in results["schemes"]] == [*SCHEMES]
    first, *others = results["schemes"]
    assert first["verdict"] == {"seen": "within", "unseen": "within"}
    for entry in results["schemes"]:
        assert [len(losses) for losses in entry["losses"]] == [7, 7]
        # the same weights to begin with, seed by seed
        assert [losses[0] for losses in entry["losses"]] == [losses[0] for losses in first["losses"]]
    # six steps are too few for what is kept of states to show in six digits
    assert all(entry["losses"] != first["losses"] for entry in others if entry["params"] != "float32")
    rounded = {entry["params"]: entry["losses"] for entry in others if entry["states"] == "float32"}
    assert rounded["nearest"] != rounded["stochastic"] != rounded["remainder8"]
    above = [entry for entry in others if "above" in entry["verdict"].values()]
    assert status == any(not entry["plain"] for entry in above)
    assert capsys.readouterr().err.count("above the seeds of float32") == len(above)


@pytest.mark.parametrize(("params", "status"), [("nearest", 0), ("stochastic", 1)])
def test_what_is_above_fails_unless_it_is_rounded_to_the_nearest(small, monkeypatch, tmp_path, capsys, params, status):
    wrong = Scheme(params, "float32")
    section = Scheme.section
    monkeypatch.setattr(convergence_storage, "SCHEMES", (SCHEMES[0], wrong))
    monkeypatch.setattr(Scheme, "section", lambda self: {**section(self), **({"lr": 0.0} if self == wrong else {})})
    assert main(["--quick", "--out", str(tmp_path)]) == status
    assert ("as expected" in capsys.readouterr().err) == (not status)


def test_a_part_of_the_results_replaces_no_whole_ones(small, tmp_path, monkeypatch):
    monkeypatch.setattr(convergence_text, "RESULTS", tmp_path)
    monkeypatch.setattr(convergence_storage, "SCHEMES", SCHEMES[:1])
    main(["--quick"])
    assert not list(tmp_path.iterdir())


def test_the_model_computes_in_float32_from_what_its_parameters_hold():
    torch.manual_seed(0)
    model = GPT(GPTConfig(context=8, layers=1, heads=1, width=16)).bfloat16()
    whole = GPT(GPTConfig(context=8, layers=1, heads=1, width=16))
    whole.load_state_dict(model.state_dict())
    batch = torch.randint(256, (2, 8)), torch.randint(256, (2, 8))
    mine, theirs = loss(InFloat32(model), batch), loss(whole, batch)
    assert torch.equal(mine, theirs)
    mine.backward()
    theirs.backward()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad.bfloat16())


def test_the_settings_are_the_presets_but_for_the_betas():
    preset = presets.PRESETS["gpt-pretrain"].config["optimizer"]
    section = Scheme("float32", "float32").section()
    assert section == {**preset, "betas": [0.9, 0.999], "state_dtype": "float32"}


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.1, 2.3], "within"), ([2.0, 2.0], "within"), ([2.4, 2.4], "within"), ([2.4, 2.5], "above"),
        ([1.9, 1.9], "below"), ([2.1, NAN], "above"),
    ],
    ids=["equal", "lowest", "highest", "above", "below", "nan"],
)  # fmt: skip
def test_judgement(losses, expected):
    assert judge(losses, [2.0, 2.4]) == expected
