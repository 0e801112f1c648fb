"""The benchmark driver: what it computes from times, what it writes, and that an error in a case stays in that case."""

import ast
import inspect
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import peers, run, shapes, tables
from bench.cases import BEST_STOCK, CASES, COPY, DEFAULT, FOREACH, FUSED, OTHERS, OURS, STEP, STOCK, Case, Target
from bench.contestants import Model, Run
from bench.provenance import slug
from bench.results import Row, empty_rows, judge, summarize
from bench.timing import Budget, measure
from tests.reference.lamb import lamb
from tests.reference.lion import lion

BUDGET = Budget(seconds=0.0, min_rounds=3, max_rounds=3, calls=1)


def broken(case: Case):
    raise RuntimeError("no such | kernel\nwith details")


def tiny(**changes) -> Case:
    return Case(**{"name": "tiny", "shapes": [(3,), (2, 2)], "contestants": STEP, "baseline": FUSED, **changes})


def summarized(case: Case, times: dict[str, list[float]]) -> dict[str, Row]:
    rows = empty_rows(case)
    summarize(case, rows, times)
    return rows


@pytest.mark.parametrize(
    ("tensors", "numel", "count"),
    [
        (shapes.llama(), 1_235_814_400, 146),
        (shapes.gpt2(), 124_439_808, 148),
        (shapes.vit(), 86_567_656, 152),
        (shapes.resnet(), 25_557_032, 161),
        (shapes.vit(layers=38, registers=4), None, 465),
    ],
    ids=["llama-1b", "gpt2-124m", "vit-b16", "resnet50", "465-tensors"],
)
def test_shapes_are_those_of_the_model(tensors, numel, count):
    assert len(tensors) == count
    assert numel is None or sum(map(math.prod, tensors)) == numel


def test_the_driver_needs_torch_alone():
    allowed = sys.stdlib_module_names | {"torch", "optimx", "bench"}
    driver = ["run", "cases", "contestants", "peers", "shapes", "timing", "results", "tables", "provenance"]
    for module in driver:
        for node in ast.walk(ast.parse(Path(run.__file__).with_name(f"{module}.py").read_text())):
            if isinstance(node, ast.Import):
                assert {name.name.partition(".")[0] for name in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                assert node.module.partition(".")[0] in allowed


def test_cases_are_consistent():
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert case.baseline in case.contestants
        assert case.traffic.keys() | case.notes.keys() <= case.contestants.keys()
        assert all(len(name) < tables.NAME_WIDTH for name in case.contestants)
        for target in case.targets:
            rivals = set(STOCK) if target.against == BEST_STOCK else {target.against or target.contestant}
            assert target.contestant in case.contestants
            assert rivals & case.contestants.keys()
            quantities = {"speed", "bandwidth"} if target.against else {"us_per_tensor", "syncs"}
            assert target.quantity in quantities


def test_optimizers_take_the_arguments_of_their_cases():
    for case in CASES:
        module = peers if hasattr(peers, case.optimizer) else torch.optim
        inspect.signature(getattr(module, case.optimizer)).bind([], **case.kwargs)


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_whoever_is_stock_takes_steps(case):
    stock = {name: start for name, start in case.contestants.items() if name != OURS}
    rows = measure(replace(case, shapes=[(3,), (2, 2)], contestants=stock), BUDGET)
    assert [row.error for row in rows.values()] == [None] * len(stock)
    assert {row.optimizer for row in rows.values()} == {case.call}


def test_an_optimizer_that_does_not_exist_is_an_error_of_its_row():
    rows = measure(tiny(optimizer="Nameless", contestants=STEP), BUDGET)
    assert all("Nameless" in row.error for row in rows.values())


@pytest.mark.parametrize(
    ("peer", "reference", "arguments"),
    [
        (peers.Lion, lion, {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1}),
        (peers.Lion, lion, {"lr": 0.01}),
        (peers.LAMB, lamb, {"lr": 0.01, "betas": (0.8, 0.9), "eps": 0.01, "weight_decay": 0.1}),
        (peers.LAMB, lamb, {"lr": 0.01, "weight_decay": 0.0}),
    ],
    ids=["lion-decay", "lion", "lamb-decay", "lamb"],
)
def test_peers_equal_the_papers(peer, reference, arguments):
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    # LAMB has no trust ratio where the parameters are zero
    starts = [random((7,)), random((3, 5)), torch.zeros(4, dtype=torch.float64)]
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = peer(params, **arguments)
    gradients = [[random(p.shape) for _ in range(5)] for p in params]
    for grads in zip(*gradients, strict=True):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()
    for p, start, grads in zip(params, starts, gradients, strict=True):
        expected = reference(start.flatten().tolist(), [grad.flatten().tolist() for grad in grads], **arguments)
        # float64 on both sides, in another order: a few roundings a step
        assert p.flatten().tolist() == pytest.approx(expected, rel=1e-11, abs=1e-13)


def test_backward_brings_new_gradients_of_the_norm_asked_for():
    model = Model(tiny(shapes=[(1000,)] * 4, grad_norm=10.0, loss_scale=4.0))
    model.backward()
    first = [p.grad for p in model.params]
    model.backward()
    assert all(p.grad is not g and torch.equal(p.grad, g) for p, g in zip(model.params, first, strict=True))
    assert torch.nn.utils.get_total_norm(first).item() == pytest.approx(40.0, rel=0.1)


def test_summary_of_known_times():
    case = tiny(
        contestants={**STEP, COPY: broken},
        clock="host",
        traffic={OURS: 28.0, COPY: 8.0},
        targets=(
            Target(OURS, "speed", 4, DEFAULT),
            Target(OURS, "speed", 2.5, FUSED),
            Target(OURS, "bandwidth", 0.92, COPY),
            Target(OURS, "us_per_tensor", 500),
            Target(OURS, "syncs", 0),
        ),
    )
    times = {
        DEFAULT: [4e-3, 4e-3, 9.0],
        FUSED: [2e-3, 1e-3, 3e-3],
        OURS: [1e-3, 1e-3, 1e-3],
        COPY: [0.5e-3, 0.5e-3, 0.5e-3],
    }
    rows = summarized(case, times)
    assert [rows[name].ratio for name in times] == [pytest.approx(0.5), 1.0, pytest.approx(2.0), None]
    assert (rows[FUSED].p20_ms, rows[FUSED].p80_ms) == (pytest.approx(1.4), pytest.approx(2.6))
    assert rows[OURS].gb_per_s == pytest.approx(28 * 7 / 1e-3 / 1e9)
    assert rows[OURS].copy_fraction == pytest.approx(28 / 16)
    assert rows[OURS].us_per_tensor == pytest.approx(500)
    assert [verdict.holds for verdict in judge(case, rows)] == ["yes", "no", "yes", "yes", "not measured"]


@pytest.mark.parametrize(
    ("times", "measured", "holds"),
    [
        ({DEFAULT: [4e-3] * 2, FOREACH: [1e-3] * 2, FUSED: [2e-3] * 2, OURS: [2e-3] * 2}, 0.5, "no"),
        ({DEFAULT: [4e-3] * 2, FOREACH: [8e-3] * 2, FUSED: [9e-3] * 2, OURS: [2e-3] * 2}, 2.0, "yes"),
        # the one that failed might have been the fastest
        ({DEFAULT: [4e-3] * 2, FUSED: [9e-3] * 2, OURS: [2e-3] * 2}, None, "not measured"),
    ],
    ids=["foreach", "default", "failed"],
)
def test_the_fastest_stock_is_that_of_the_run(times, measured, holds):
    target = Target(OURS, "speed", 1.5, BEST_STOCK)
    case = tiny(contestants={**STEP, FOREACH: broken}, targets=(target,))
    verdict = judge(case, summarized(case, times))[0]
    assert str(target) == "speed >= 1.5x fastest stock"
    assert (verdict.measured, verdict.holds) == (pytest.approx(measured), holds)


def test_a_contestant_that_raises_has_a_row_and_the_others_have_times():
    rows = measure(
        tiny(contestants={FUSED: STEP[FUSED], OURS: broken}, targets=(Target(OURS, "speed", 1, FUSED),)), BUDGET
    )
    assert rows[OURS].error == "RuntimeError: no such | kernel"
    assert rows[OURS].median_ms is None
    assert rows[FUSED].rounds == 3
    assert rows[FUSED].ratio == 1.0


def test_without_a_baseline_there_are_times_but_no_ratios():
    rows = measure(tiny(contestants={FUSED: broken, DEFAULT: STEP[DEFAULT]}), BUDGET)
    assert rows[DEFAULT].median_ms > 0
    assert rows[DEFAULT].ratio is None


def test_contestants_take_turns():
    calls: list[str] = []

    def contestant(name: str):
        return lambda case: Run(lambda: None, lambda: calls.append(name))

    measure(tiny(contestants={"a": contestant("a"), "b": contestant("b")}, baseline="a"), BUDGET)
    assert calls[-6:] == ["a", "b", "b", "a", "a", "b"]


def test_the_driver_prints_80_columns_and_writes_both_files(monkeypatch, tmp_path, capsys):
    targets = (Target(OURS, "speed", 1.0, FUSED),)
    failing = tiny(name="failing", contestants={FUSED: STEP[FUSED], OURS: broken}, targets=targets)
    noted = tiny(
        name="noted", optimizer="SGD", kwargs={"momentum": 0.9}, notes={FUSED: "a long story " * 10}, targets=targets
    )
    monkeypatch.setattr(run, "CASES", (tiny(targets=targets), failing, noted, tiny(name="left-out", device="cuda")))
    before = torch.get_num_threads()
    try:
        assert run.main(["--quick", "--out", str(tmp_path)]) == 1
    finally:
        torch.set_num_threads(before)

    printed = capsys.readouterr().out.partition("median ms")[2].rpartition("written to")[0]
    assert max(map(len, printed.splitlines())) <= tables.WIDTH
    report = json.loads((tmp_path / "step.json").read_text())
    assert report["provenance"]["command"] == "python -m bench.run --quick"
    assert report["provenance"]["torch"] == torch.__version__
    assert [(row["case"], row["contestant"]) for row in report["rows"]] == [
        *(("tiny", name) for name in STEP),
        ("failing", FUSED),
        ("failing", OURS),
        *(("noted", name) for name in STEP),
    ]
    assert [row["optimizer"] for row in report["rows"]][-4:] == ["AdamW", *["SGD(momentum=0.9)"] * 3]
    assert [target["holds"] for target in report["targets"]][1] == "not measured"
    text = (tmp_path / "step.md").read_text()
    assert r"error: RuntimeError: no such \| kernel" in text
    sections = text.split("\n## ")[1:]
    assert [section.partition("\n")[0] for section in sections] == ["AdamW", "SGD(momentum=0.9)", "Targets"]
    assert ["a long story" in section for section in sections] == [False, True, False]
    for lines in text.split("\n\n"):
        if lines.startswith("|"):
            assert len({line.replace(r"\|", "").count("|") for line in lines.splitlines()}) == 1


def test_a_filter_that_matches_nothing_is_an_error(capsys):
    assert run.main(["--filter", "no-such-case"]) == 2
    assert "no-such-case" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [("NVIDIA H200", "nvidia-h200"), ("cpu AMD EPYC 9654 (tm) 2 threads", "cpu-amd-epyc-9654-tm-2-threads")],
)
def test_slug(name, expected):
    assert slug(name) == expected
