"""What a watcher makes of measured steps: rows, history, warnings, pictures. No engine is asked here."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optimx
from optimx._engine.watched_step import WatchedStep
from optimx.watching.parts import layer_of
from optimx.watching.rules import FAR, ROWS, USUAL_RATIO, VANISHING
from optimx.watching.statistics import NEEDS, STATISTICS, SUMS
from tests.engine import interpreted

NAN = float("nan")
ALL = tuple(STATISTICS)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.fc2 = nn.Linear(8, 6)


class Model(nn.Module):
    """A stem, two layers, a head, a parameter of its own and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.nothing = nn.Parameter(torch.empty(0))
        self.stem = nn.Linear(5, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 3, bias=False)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Matrices and the rest, named."""
    named = list(model.named_parameters())
    groups = [[each for each in named if (each[1].dim() == 2) == matrices] for matrices in (True, False)]
    return optimx.AdamW([{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}])


Tensors = dict[str, list[Tensor | None]]


def made_up(params: list[Tensor], missing: tuple[int, ...] = ()) -> Tensors:
    """Gradients, moments, updates and parameters of a step; of some parameters there are none."""
    found: Tensors = {}
    for scale, role in enumerate(("param", "grad", "moment", "update"), 1):
        tensors = [torch.randn(param.shape, dtype=torch.float64) * 10.0**-scale for param in params]
        found[role] = [None if i in missing else tensor for i, tensor in enumerate(tensors)]
    for grad in found["grad"]:
        if grad is not None and grad.dim():
            grad[..., :1] = 0.0
    return found


def measured(tensors: Tensors, step: int = 1, **totals: float) -> WatchedStep:
    formulas: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
        "grad_sq": lambda g, m, u, p: g.square().sum(),
        "grad_max": lambda g, m, u, p: g.abs().max() if g.numel() else g.new_zeros(()),
        "grad_zeros": lambda g, m, u, p: (g == 0).sum(),
        "param_sq": lambda g, m, u, p: p.square().sum(),
        "update_sq": lambda g, m, u, p: u.square().sum(),
        "moment_sq": lambda g, m, u, p: m.square().sum(),
        "grad_moment": lambda g, m, u, p: (g * m).sum(),
    }
    assert formulas.keys() == SUMS.keys()
    each = list(zip(*(tensors[role] for role in ("grad", "moment", "update", "param")), strict=True))
    sums = {
        name: [NAN if four[0] is None else formula(*four).item() for four in each] for name, formula in formulas.items()
    }
    norm = math.sqrt(sum(value for value in sums["grad_sq"] if not math.isnan(value)))
    return WatchedStep(step, sums, {"grad_norm": norm, "clip_factor": 1.0, "skipped": 0.0} | totals)


def expected(stat: str, tensors: Tensors, members: list[int]) -> float | None:
    """The statistic of the members' elements, all in one vector; None where there are none."""
    grad, moment, update, param = (
        torch.cat([each.flatten() for i in members if (each := tensors[role][i]) is not None] or [torch.empty(0)])
        for role in ("grad", "moment", "update", "param")
    )
    if all(tensors["grad"][i] is None for i in members):
        return None
    if not grad.numel():
        # no fraction of nothing, no angle
        return None if stat in ("grad_zeros", "update_ratio", "cosine") else 0.0
    return {
        "grad_norm": lambda: grad.norm(),
        "max_grad": lambda: grad.abs().max(),
        "grad_zeros": lambda: (grad == 0).double().mean(),
        "param_norm": lambda: param.norm(),
        "update_norm": lambda: update.norm(),
        "update_ratio": lambda: update.norm() / param.norm(),
        "moment_norm": lambda: moment.norm(),
        "cosine": lambda: torch.cosine_similarity(grad, moment, dim=0),
    }[stat]().item()


class Rows(list):
    """A sink that keeps what it is given."""

    def __call__(self, step: int, row: dict[str, float]) -> None:
        self.append((step, row))


def watched(model: nn.Module | None = None, **options: Any) -> tuple[optimx.Watcher, Rows]:
    rows = Rows()
    return optimx.watch(optimizer_of(model or Model()), sinks=[rows], **options), rows


@pytest.mark.parametrize("missing", [(), (0,), (1, 7), tuple(range(5))], ids=str)
@pytest.mark.parametrize("stat", ALL)
def test_every_part_has_its_statistic(stat: str, missing: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    watcher, rows = watched(stats=[stat])
    tensors = made_up(watcher.params, missing)
    watcher.receive(measured(tensors, step=30, clip_factor=0.5))
    ((step, row),) = rows
    assert step == 30
    names = watcher.names
    parts = {name: [i] for i, name in enumerate(names)}
    for layer in ("stem", "blocks.0", "blocks.1", "head"):
        parts[layer] = [i for i, name in enumerate(names) if name.startswith(f"{layer}.")]
    matrices = sum(param.dim() == 2 for param in watcher.params)
    parts |= {"group/0": [*range(matrices)], "group/1": [*range(matrices, len(names))], "": [*range(len(names))]}
    wanted = {"grad_norm": row["grad_norm"], "clip_factor": 0.5, "skipped": 0.0}
    for name, members in parts.items():
        value = expected(stat, tensors, members)
        if value is not None:
            wanted[f"{stat}/{name}" if name else stat] = value
    assert row == pytest.approx(wanted, rel=1e-12, abs=1e-300)


def test_all_statistics_at_once_are_those_of_each_alone() -> None:
    model = Model()
    watcher, rows = watched(model, stats=ALL)
    found = measured(made_up(watcher.params, (3,)), grad_norm=5.0)
    watcher.receive(found)
    alone: dict[str, float] = {}
    for stat in ALL:
        one, of_one = watched(model, stats=[stat])
        assert one.sums == {*NEEDS[stat]}
        needed = {name: values for name, values in found.sums.items() if name in one.sums}
        one.receive(WatchedStep(found.step, needed, found.totals))
        alone |= of_one[0][1]
    assert rows[0][1] == alone
    assert rows[0][1]["grad_norm"] == 5.0, "the engine's, also of what is not watched"
    assert watcher.sums == {*SUMS}
    assert {*rows[0][1]} < {*watcher.keys}


def test_nan_shows_in_every_part_it_is_in() -> None:
    watcher, rows = watched()
    tensors = made_up(watcher.params)
    i = watcher.names.index("blocks.0.fc1.weight")
    tensors["grad"][i][0, 0] = NAN
    watcher.receive(measured(tensors, grad_norm=NAN))
    row = rows[0][1]
    nans = {key for key, value in row.items() if math.isnan(value)}
    of_stat = ("", "/group/0", "/blocks.0", "/blocks.0.fc1.weight")
    # 0 / 0 of an empty parameter
    assert nans == {f"{stat}{part}" for stat in ("grad_norm", "max_grad") for part in of_stat} | {
        "update_ratio/nothing"
    }


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blocks.3.attn.qkv.weight", "blocks.3"),
        ("model.layers.11.mlp.experts.4.w1", "model.layers.11"),
        ("layer1.0.conv1.weight", "layer1.0"),
        ("0.weight", "0"),
        ("scales.2", "scales.2"),
        ("head.mlp.fc1.weight", "head.mlp.fc1"),
        ("embed.weight", "embed"),
        ("cls_token", "cls_token"),
        ("mlp.fc2d.weight", "mlp.fc2d"),
    ],
)
def test_layer_of_a_name(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_names_are_the_groups_or_the_models_or_numbers() -> None:
    model = Model()
    plain = optimx.SGD(model.parameters(), lr=0.1)
    names = [name for name, _ in model.named_parameters()]
    assert optimx.watch(optimizer_of(model)).names == sorted(names, key=lambda n: model.get_parameter(n).dim() != 2)
    for kwargs in ({"model": model}, {"model": nn.DataParallel(model)}):
        with optimx.watch(plain, **kwargs) as watcher:
            assert watcher.names == names
    assert optimx.watch(plain).names == [f"param{i}" for i in range(len(names))]
    partly = optimx.SGD([*model.parameters(), nn.Parameter(torch.ones(2))], lr=0.1)
    assert optimx.watch(partly, model=model).names == [*names, f"param{len(names)}"]
    wrapped = optimx.SGD([("module.a.weight", nn.Parameter(torch.ones(2)))], lr=0.1)
    assert optimx.watch(wrapped).names == ["a.weight"]


def test_names_of_a_build_and_of_a_composite() -> None:
    model = Model()
    built = optimx.build(model, {"optimizer": {"name": "adamw", "lr": 1e-3}})
    assert {*optimx.watch(built.optimizer).names} == {name for name, _ in model.named_parameters()}
    one, other = (
        optimx.SGD([each for each in model.named_parameters() if (each[1].dim() == 2) == m], lr=0.1)
        for m in (True, False)
    )
    composite = optimx.Composite({"one": one, "other": other})
    watcher = optimx.watch(composite)
    assert watcher.names == optimx.watch(optimizer_of(model)).names
    assert "grad_norm/group/1" in watcher.keys


def test_groups_have_their_names() -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    groups = [{"params": params[:1], "name": "decay"}, {"params": params[1:], "name": "no_decay"}]
    keys = optimx.watch(optimx.SGD(groups, lr=0.1)).keys
    assert {"grad_norm/group/decay", "grad_norm/group/no_decay"} < {*keys}


def test_layers_of_ones_own() -> None:
    model = Model()
    numbers = optimx.param_groups.layer_ids(model)
    watcher, rows = watched(model, layers=numbers.__getitem__)
    tensors = made_up(watcher.params)
    watcher.receive(measured(tensors))
    second = [i for i, name in enumerate(watcher.names) if name.startswith("blocks.1")]
    assert rows[0][1]["grad_norm/layer2"] == pytest.approx(expected("grad_norm", tensors, second), rel=1e-12)
    with pytest.raises(TypeError, match=r"layers\('blocks.0.fc1.weight'\) should be a name or a number but is: None"):
        watched(model, layers=dict(numbers, **{"blocks.0.fc1.weight": None}).get)
    with pytest.raises(
        ValueError, match="a layer should not be called as a parameter is, but layers= has both: 'scale'"
    ):
        watched(model, layers=lambda name: "scale")


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("blocks.?", {"blocks.0", "blocks.1"}),
        ("head*", {"head", "head.weight"}),
        (["stem", r"re:1\.norm\.b"], {"stem", "blocks.1.norm.bias"}),
    ],
    ids=["glob", "both", "several"],
)
def test_a_pattern_chooses_keys(pattern: Any, left: set[str]) -> None:
    everything, all_rows = watched(model := Model())
    watcher, rows = watched(model, pattern=pattern)
    found = measured(made_up(watcher.params))
    everything.receive(found)
    watcher.receive(found)
    groups = {"group/0", "group/1"}
    chosen = {key for key in all_rows[0][1] if key.partition("/")[2] in {"", *groups, *left}}
    assert rows[0][1] == {key: value for key, value in all_rows[0][1].items() if key in chosen}
    assert len(chosen) == 3 + 3 + 4 * (len(left) + len(groups))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"stats": ["grad_nrom"]},
            ValueError,
            "stats should be one of .* but is: 'grad_nrom'; did you mean 'grad_norm'?",
        ),
        ({"stats": "grad_norm"}, TypeError, "stats should be a list of names"),
        ({"stats": []}, ValueError, "stats should not be empty"),
        ({"every": 0}, ValueError, "every should be >= 1 but is: 0"),
        ({"every": 2.5}, TypeError, "every should be a whole number"),
        ({"history": 1}, ValueError, "history should be >= 2"),
        ({"pattern": "block.*"}, ValueError, "pattern should fit a parameter but is: 'block..'; did you mean 'blocks"),
        ({"sinks": print}, TypeError, "sinks should be a list of functions"),
        ({"sinks": ["out.csv"]}, TypeError, r"sinks\[0\] should be a function but is: 'out.csv'"),
        (
            {"stats": ["cosine"], "warn": True},
            ValueError,
            "stats should have 'grad_norm' or 'update_ratio' for warn=True",
        ),
    ],
)
def test_arguments_that_make_no_sense(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optimx.watch(optimizer_of(Model()), **options)


def test_other_mistakes() -> None:
    with pytest.raises(TypeError, match=r"optimizer should be a torch.optim.Optimizer but is: Model"):
        optimx.watch(Model())  # type: ignore[arg-type]
    twice = [{"params": [("w", nn.Parameter(torch.ones(1)))]} for _ in range(2)]
    with pytest.raises(ValueError, match="parameters should have names of their own but share: w"):
        optimx.watch(optimx.SGD(twice, lr=0.1))


class Late:
    """A source that hands out a row when it is asked to."""

    def __init__(self, watcher: optimx.Watcher) -> None:
        self.watcher = watcher
        self.waiting: list[WatchedStep] = []
        self.closed = 0

    def flush(self) -> None:
        while self.waiting:
            self.watcher.receive(self.waiting.pop(0))

    def close(self) -> None:
        self.closed += 1


def test_flush_and_close_hand_out_what_is_late() -> None:
    watcher, rows = watched()
    watcher._source = source = Late(watcher)
    source.waiting = [measured(made_up(watcher.params), step) for step in (10, 20)]
    watcher.flush()
    assert [step for step, _ in rows] == [10, 20]
    source.waiting = [measured(made_up(watcher.params), 30)]
    with watcher:
        assert len(rows) == 2
    assert rows[-1][0] == 30
    watcher.close()
    assert source.closed == 1


def test_a_sink_that_fails_stops_nothing_and_is_not_hidden() -> None:
    rows = Rows()

    class Full:
        closed = False

        def __call__(self, step: int, row: dict[str, float]) -> None:
            row.clear()
            if step != 20:
                raise OSError("disk full")

        def close(self) -> None:
            self.closed = True

    full = Full()
    watcher = optimx.watch(optimizer_of(Model()), sinks=[full, rows])
    with pytest.warns(RuntimeWarning, match=r"sink Full failed at step 10, training goes on: OSError\('disk full'\)"):
        watcher.receive(measured(made_up(watcher.params), 10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watcher.receive(measured(made_up(watcher.params), 20))
        watcher.receive(measured(made_up(watcher.params), 30))
    assert [step for step, row in rows if row] == [10, 20, 30]
    with pytest.raises(
        RuntimeError, match=r"^sink Full failed at step 10: OSError\('disk full'\) \(failures: 2\)$"
    ) as caught:
        watcher.flush()
    assert isinstance(caught.value.__cause__, OSError)
    watcher.flush()
    with pytest.warns(RuntimeWarning, match="at step 40"):
        watcher.receive(measured(made_up(watcher.params), 40))
    with pytest.raises(RuntimeError, match="sink Full failed at step 40"):
        watcher.close()
    assert full.closed


def test_a_sinks_error_does_not_hide_that_of_the_block() -> None:
    def fails(step: int, row: dict[str, float]) -> None:
        raise OSError("disk full")

    watcher = optimx.watch(optimizer_of(Model()), sinks=[fails])
    with pytest.raises(KeyError, match="mine"), watcher:
        with pytest.warns(RuntimeWarning, match="fails failed at step 1"):
            watcher.receive(measured(made_up(watcher.params)))
        raise KeyError("mine")


def test_frame_has_every_row_as_columns() -> None:
    watcher, rows = watched()
    for step in (10, 20, 30):
        watcher.receive(measured(made_up(watcher.params, (0,) if step == 20 else ()), step))
    frame = watcher.frame()
    assert [*frame] == ["step", *watcher.keys]
    assert frame["step"] == [10, 20, 30]
    for i, (_, row) in enumerate(rows):
        assert {key for key in watcher.keys if not math.isnan(frame[key][i])} == {*row}
        assert all(frame[key][i] == value for key, value in row.items())


def test_a_long_history_is_thinned_evenly() -> None:
    watcher, rows = watched(history=8)
    found = measured(made_up(watcher.params))
    for step in range(1, 101):
        watcher.receive(WatchedStep(step, found.sums, found.totals | {"grad_norm": float(step)}))
        kept = watcher.frame()["step"]
        assert len(kept) <= 8
        assert kept[0] == 1
        assert len({b - a for a, b in pairwise(kept)}) <= 1
    assert kept == [1, 17, 33, 49, 65, 81, 97]
    assert watcher.frame()["grad_norm"] == kept
    assert len(rows) == 100


# warnings


def ratios(watcher: optimx.Watcher, step: int, ratio: float, name: str, **totals: float) -> WatchedStep:
    """A step in which all updates are usual, but of one parameter."""
    n = len(watcher.params)
    sums = {name: [1.0] * n for name in SUMS} | {"update_sq": [USUAL_RATIO**2] * n}
    sums["update_sq"][watcher.names.index(name)] = ratio**2
    return WatchedStep(step, sums, {"grad_norm": math.sqrt(n), "clip_factor": 1.0, "skipped": 0.0} | totals)


def warnings_of(watcher: optimx.Watcher, steps: list[WatchedStep]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for each in steps:
            watcher.receive(each)
    return [str(warning.message) for warning in caught]


MATRIX = "blocks.0.fc1.weight"


@pytest.mark.parametrize(
    ("factor", "text"),
    [
        (1.1 * FAR, "updated by more than 0.1 of its norm a step: a learning rate may be too large"),
        (0.9 / FAR, "updated by less than 1e-05 of its norm a step: it hardly learns"),
    ],
)
def test_a_ratio_far_from_a_thousandth_is_told_once(factor: float, text: str) -> None:
    watcher, _ = watched(warn=True)
    found = warnings_of(watcher, [ratios(watcher, 110 + 10 * i, factor * USUAL_RATIO, MATRIX) for i in range(10)])
    assert found == [f"step {100 + 10 * ROWS}: {MATRIX}: {text}"]


def test_many_at_once_are_one_warning() -> None:
    watcher, _ = watched(warn=True)
    step = ratios(watcher, 200, 1.0, MATRIX)
    step.sums["update_sq"][:] = [1.0] * len(watcher.params)
    (found,) = warnings_of(watcher, [step] * 9)
    assert found.startswith("step 200: stem.weight, blocks.0.fc1.weight, blocks.0.fc2.weight and 3 more: updated by")


@pytest.mark.parametrize(
    ("first", "ratio", "name", "totals"),
    [
        (200, 0.9 * FAR * USUAL_RATIO, MATRIX, {}),
        (200, 1.1 / FAR * USUAL_RATIO, MATRIX, {}),
        (10, 1.0, MATRIX, {}),
        (200, 1.0, "blocks.0.fc1.bias", {}),
        (200, 1.0, MATRIX, {"skipped": 1.0}),
        (200, 1.0, MATRIX, {"grad_norm": NAN}),
    ],
    ids=["not so large", "not so small", "warmup", "vector", "skipped", "nan"],
)
def test_what_is_no_ratio_to_warn_of(first: int, ratio: float, name: str, totals: dict[str, float]) -> None:
    watcher, _ = watched(warn=True)
    assert warnings_of(watcher, [ratios(watcher, first + 10 * i, ratio, name, **totals) for i in range(9)]) == []


def test_a_single_spike_is_no_warning() -> None:
    watcher, _ = watched(warn=True)
    steps = [ratios(watcher, 200 + 10 * i, 1.0 if i % ROWS else 1e-3, MATRIX) for i in range(20)]
    assert warnings_of(watcher, steps) == []


@pytest.mark.parametrize("lr", [1e-6, torch.tensor(1e-3), None], ids=["decayed", "of a device", "none"])
def test_small_updates_are_expected_of_a_small_lr(lr: Any) -> None:
    optimizer = optimizer_of(Model())
    for group in optimizer.param_groups:
        group |= {"initial_lr": 1e-3, "lr": lr}
    watcher = optimx.watch(optimizer, warn=True)
    assert warnings_of(watcher, [ratios(watcher, 200 + i, 1e-7, MATRIX) for i in range(9)]) == []
    assert len(warnings_of(watcher, [ratios(watcher, 300 + i, 1.0, MATRIX) for i in range(9)])) == 1


def test_a_learning_rate_set_by_hand_is_known_by_its_peak() -> None:
    optimizer = optimizer_of(Model())
    watcher = optimx.watch(optimizer, warn=True)
    assert warnings_of(watcher, [ratios(watcher, 150, 1e-3, MATRIX)]) == []
    for group in optimizer.param_groups:
        group["lr"] *= 0.01
    assert warnings_of(watcher, [ratios(watcher, 200 + i, 1e-7, MATRIX) for i in range(9)]) == []


@pytest.mark.parametrize(("factor", "expected"), [(0.9, 1), (1.2, 0)])
def test_a_layer_without_gradient_is_told_once(factor: float, expected: int) -> None:
    watcher, _ = watched(warn=True)
    sizes = dict(zip(watcher.names, (param.numel() for param in watcher.params), strict=True))
    # root mean squares: 1 of the whole model, and one that is small
    squares = [n * ((factor * VANISHING) ** 2 if name.startswith("blocks.1") else 1.0) for name, n in sizes.items()]
    sums = {name: [USUAL_RATIO**2 if name == "update_sq" else 1.0] * len(sizes) for name in SUMS} | {"grad_sq": squares}
    totals = {"grad_norm": math.sqrt(sum(sizes.values())), "clip_factor": 1.0, "skipped": 0.0}
    found = warnings_of(watcher, [WatchedStep(step, sums, totals) for step in range(1, 9)])
    assert len(found) == expected
    if expected:
        assert found[0].startswith(
            f"step {ROWS}: blocks.1: a gradient that vanishes: its root mean square is below 1e-05"
        )


def test_warnings_are_opt_in() -> None:
    watcher, _ = watched()
    assert warnings_of(watcher, [ratios(watcher, 200 + i, 1.0, MATRIX) for i in range(9)]) == []


# pictures


@pytest.mark.parametrize(("stat", "rows"), [("update_ratio", 1), *((stat, 40) for stat in ALL)])
def test_plot(stat: str, rows: int, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    watcher, _ = watched(stats=ALL)
    for i in range(rows):
        found = measured(made_up(watcher.params, (2,)), 10 * i + 1, clip_factor=0.5 if i % 3 else 1.0, skipped=i == 20)
        watcher.receive(found)
    watcher.plot(tmp_path / "run.png", stat)
    watcher.plot(tmp_path / "run", stat)
    pixels = image.imread(tmp_path / "run.png")
    assert pixels.std() > 0.05
    assert (tmp_path / "run").read_bytes()[1:4] == b"PNG"


def test_plot_of_what_is_odd(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    watcher, _ = watched(pattern="*.bias")
    with pytest.raises(ValueError, match="there should be a row to draw but is none"):
        watcher.plot(tmp_path / "run.png")
    with pytest.raises(ValueError, match=r"stat should be one of .*; did you mean 'update_ratio'"):
        watcher.plot(tmp_path / "run.png", "update_ration")
    tensors = made_up(watcher.params, tuple(range(len(watcher.params))))
    watcher.receive(measured(tensors, grad_norm=NAN))
    watcher.receive(measured(tensors, 2, grad_norm=math.inf))
    watcher.plot(tmp_path / "run.png")
    assert [path.name for path in tmp_path.iterdir()] == ["run.png"]


def test_map_shows_each_layer_in_its_own_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = pytest.importorskip("matplotlib.axes")
    drawn: dict[str, Any] = {}

    def pcolormesh(self: Any, x: Any, y: Any, values: Any, **options: Any) -> Any:
        # a colorbar draws with it, too
        if not drawn:
            drawn.update(x=x, values=values, options=options)
        return original(self, x, y, values, **options)

    original = axes.Axes.pcolormesh
    monkeypatch.setattr(axes.Axes, "pcolormesh", pcolormesh)
    watcher, rows = watched()
    for step in (10, 20, 40):
        watcher.receive(measured(made_up(watcher.params), step))
    watcher.plot(tmp_path / "run.png")
    assert drawn["x"] == [5, 15, 30, 50]
    layers = ["stem", "blocks.0", "blocks.1", "head", "scale"]
    found = [[math.log10(row[f"update_ratio/{layer}"]) for _, row in rows] for layer in layers]
    assert drawn["values"][:5] == found
    assert all(map(math.isnan, drawn["values"][5])), "the empty parameter's"
    assert (drawn["options"]["vmin"], drawn["options"]["vmax"]) == (-5, -1)


@interpreted
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_rows_of_a_training(max_grad_norm: float | None) -> None:
    """With their steps, which later ones hand over."""
    torch.manual_seed(0)
    model = Model()
    optimizer = optimx.AdamW(model.named_parameters(), lr=1e-2, max_grad_norm=max_grad_norm)
    rows: dict[int, dict[str, float]] = {}
    norms = {}
    with optimx.watch(optimizer, every=2, sinks=[rows.__setitem__]) as watcher:
        for step in range(1, 6):
            model.zero_grad()
            sum((param + 1.0).square().sum() for param in model.parameters()).backward()
            norms[step] = {name: float(param.grad.norm()) for name, param in model.named_parameters()}
            before = {name: param.detach().clone() for name, param in model.named_parameters()}
            optimizer.step()
            if step == 5:
                assert rows.keys() == {1, 3}
            changes = {name: float((param - before[name]).norm()) for name, param in model.named_parameters()}
    assert rows.keys() == {1, 3, 5}
    assert watcher.frame()["step"] == [1, 3, 5]
    for step, row in rows.items():
        for name, norm in norms[step].items():
            assert row[f"grad_norm/{name}"] == pytest.approx(norm, rel=1e-5)
        assert row["grad_norm"] == pytest.approx(math.hypot(*norms[step].values()), rel=1e-5)
        assert (row["clip_factor"] < 1.0) == (max_grad_norm is not None)
    for name, param in model.named_parameters():
        if param.numel():
            assert rows[5][f"update_ratio/{name}"] == pytest.approx(changes[name] / float(param.norm()), rel=1e-4)
    # nobody watches any more
    optimizer.step()
    assert len(watcher.frame()["step"]) == 3


@interpreted
@pytest.mark.parametrize(
    "settings", [{}, {"max_grad_norm": 0.5}, {"max_grad_norm": 0.5, "skip_nonfinite": True}], ids=str
)
def test_rows_of_a_composite(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Model()
    members = {
        name: cls([each for each in model.named_parameters() if (each[1].dim() == 2) == matrices], lr=1e-2)
        for name, cls, matrices in (("muon", optimx.Muon, True), ("adamw", optimx.AdamW, False))
    }
    composite = optimx.Composite(members, **settings)
    rows: dict[int, dict[str, float]] = {}
    with optimx.watch(composite, every=1, sinks=[rows.__setitem__]):
        for _ in range(2):
            model.zero_grad()
            sum((param + 1.0).square().sum() for param in model.parameters()).backward()
            norms = {name: float(param.grad.norm()) for name, param in model.named_parameters()}
            composite.step()
    for name, norm in norms.items():
        assert rows[2][f"grad_norm/{name}"] == pytest.approx(norm, rel=1e-5)
        assert rows[2].get(f"update_ratio/{name}", 0.0) > 0.0 or not model.get_parameter(name).numel()
    total = math.hypot(*norms.values())
    assert rows[2]["grad_norm"] == pytest.approx(total, rel=1e-5)
    assert rows[2]["clip_factor"] == pytest.approx(0.5 / total if settings else 1.0, rel=1e-4)


def test_one_watcher() -> None:
    optimizer = optimizer_of(Model())
    watcher = optimx.watch(optimizer)
    with pytest.raises(RuntimeError, match="AdamW should be watched by one watcher"):
        optimx.watch(optimizer)
    watcher.close()
    optimx.watch(optimizer)


def test_others_are_refused() -> None:
    with pytest.raises(TypeError, match="optimizer should be an optimizer of optimx but is: SGD"):
        optimx.watch(torch.optim.SGD(Model().parameters()))
    member = {"sgd": torch.optim.SGD(Model().parameters())}
    with pytest.raises(TypeError, match="should be an optimizer of optimx but is: SGD"):
        optimx.watch(optimx.Composite(member))
