"""The launchers themselves: interpreted on CPU tensors, or on a GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import optimx
from tests.cases import BY_NAME, CASES, CLOSE, SHAPES, Case, loop, make_params, set_grads
from tests.conftest import INTERPRETED
from tests.engine import KERNELS, each

pytestmark = pytest.mark.interpreted
pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from optimx.triton_kernels import grad_norm, lagged, lamb, matrix_walk, measured, update  # noqa: E402
from optimx.triton_kernels.device import Launcher, chunk, divide, divide_by, for_each_block, launch  # noqa: E402
from optimx.triton_kernels.matrix_table import tables  # noqa: E402
from optimx.triton_kernels.tensor_table import (  # noqa: E402
    LaunchSize,
    TensorTable,
    chunk_map,
    send,
    upload,
    upload_all,
)
from triton.runtime import interpreter  # noqa: E402

SIZE = LaunchSize(chunk_size=128, block_size=64)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
#: States that may be negative.
SIGNED = ("ax", "exp_avg", "grad_avg", "momentum_buffer", "prev")


#: Every kernel that goes from element to element.
each_kernel = each([variant for variant in KERNELS if variant.case.cls.rule.walk != "factored"], ())


def _group(case: Case, kwargs: dict) -> tuple[dict[str, Any], tuple[bool, ...]]:
    group = case.cls([torch.nn.Parameter(torch.zeros(1))], **kwargs).param_groups[0]
    return group, case.cls.rule.group_variant(group)


def in_poison(
    shapes: Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    shifts: int | Sequence[int] = 0,
    poison=float("nan"),
):
    """Tensors ``shifts`` elements past an aligned address, and what is around them: NaN tells of reads past an end.

    Another number tells of writes; NaN read, updated and written is NaN again.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors, around = [], []
    for i, shape in enumerate(shapes):
        shift = shifts if isinstance(shifts, int) else shifts[i]
        numel = torch.Size(shape).numel()
        buffer = torch.full((numel + 64,), poison, device=device, dtype=dtype)
        inside = buffer[16 + shift : 16 + shift + numel]
        inside.copy_(torch.rand(numel, generator=generator).to(device, dtype))
        tensors.append(inside.view(shape))
        around += [buffer[: 16 + shift], buffer[16 + shift + numel :]]
    return tensors, around


def is_untouched(around: Sequence[Tensor], poison: float) -> bool:
    return all(torch.equal(a.nan_to_num(9.0), torch.full_like(a, poison).nan_to_num(9.0)) for a in around)


def addresses(tensors: Sequence[Tensor], device: torch.device, missing: Collection[int] = ()) -> Tensor:
    """Of tensors, on the device; 0 for those at indices ``missing``."""
    found = [0 if i in missing else t.data_ptr() for i, t in enumerate(tensors)]
    return upload(torch.tensor(found, dtype=torch.int64), device)


def rows(*values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(device)


def values_of(rule: Any, group: dict[str, Any]) -> tuple[Any, ...]:
    """The raw hyperparameters."""
    return rule.values_for(rule.values(group), torch.float32, first=False)


def counts_of(rule: Any, group: dict[str, Any]) -> tuple[float, ...]:
    """After three steps."""
    counts = tuple(rule.new_scalar(name, group) for name in rule.scalars)
    for _ in range(3):
        counts = rule.prepare(values_of(rule, group), counts)[1]
    return counts


class Launch:
    """Everything that one launch of an algorithm's update takes, on poisoned memory.

    Args:
        case, kwargs: Which algorithm, and its hyperparameters.
        shifts: Elements past an aligned address: of all tensors, or a list of numbers a role (params, grads, states).
        poison: What is around tensors.
        missing: Tensors that have no gradient.
    """

    def __init__(
        self,
        case: Case,
        kwargs: dict,
        device: torch.device,
        dtype: torch.dtype,
        shifts: int | Sequence[Sequence[int]] = 0,
        poison: float = float("nan"),
        shapes: Sequence[Sequence[int]] = SHAPES,
        size: LaunchSize = SIZE,
        missing: Collection[int] = (),
    ) -> None:
        self.case, self.kwargs, self.rule = case, kwargs, case.cls.rule
        self.group, self.variant = _group(case, kwargs)
        self.dtype, self.missing = dtype, missing
        names = self.rule.state_names(self.variant)
        made = [
            in_poison(shapes, device, dtype, role, shifts if isinstance(shifts, int) else shifts[role], poison)
            for role in range(2 + len(names))
        ]
        self.params, self.grads, *self.states = (m[0] for m in made)
        self.around, self.poison = [a for m in made for a in m[1]], poison
        # what is a square stays positive; the rest takes both signs
        for tensor in (*self.grads, *(t for n, s in zip(names, self.states, strict=True) if n in SIGNED for t in s)):
            tensor.sub_(0.5)
        if "grad_avg" in names:
            # a variance is not negative
            for square_avg in self.states[0]:
                square_avg.add_(1)
        numels = [p.numel() for p in self.params]
        self.table = TensorTable(numels, [self.params, *self.states], range(len(numels)), device, size)
        #: Shares of the step before.
        self.means = [torch.full((), 0.25 + 0.5 * (i % 2), device=device) for i in range(len(numels))]
        self.kept = ("mask_mean",) * (self.rule.walk_of(self.variant) == "lagged")
        row, _ = self.rule.prepare(self.rule.values(self.group), counts_of(self.rule, self.group))
        self.hyper = rows(*[row] * len(numels), device=device)

    def __call__(self, control: Tensor | None = None) -> None:
        where = addresses(self.grads, self.params[0].device, self.missing)
        dtypes = (self.dtype,) * (2 + len(self.states))
        roles = self.rule.kernels, self.table, where, self.hyper, control
        walk = self.rule.walk_of(self.variant)
        if walk == "measured":
            deque(measured.measured_update_(*roles, variant=self.variant, dtypes=dtypes), maxlen=0)
        elif walk == "lagged":
            means = addresses(self.means, self.params[0].device)
            partials = torch.full((1, self.table.n_chunks), torch.nan, device=self.params[0].device)
            launches = lagged.lagged_update_(
                *roles, variant=self.variant, dtypes=dtypes, means=means, partials=partials
            )
            deque(launches, maxlen=0)
        else:
            update.update_(*roles, variant=self.variant, dtypes=dtypes)

    def everything(self) -> list[Tensor]:
        return [t for role in (self.params, self.grads, *self.states, self.means) for t in role]

    def roles(self) -> list[list[Tensor]]:
        """Params, grads, states and what else is kept."""
        return [self.params, self.grads, *self.states, *[self.means] * len(self.kept)]

    def expected(self) -> list[list[Tensor]]:
        """Of params, grads and states: torch's for-loop, in float64."""
        params, grads, *states = (
            [t.to("cpu", torch.float64, copy=True) for t in role] for role in (self.params, self.grads, *self.states)
        )
        twins = [torch.nn.Parameter(p) for p in params]  # of the same memory
        optimizer = loop(self.case, twins, **self.kwargs)
        counts = counts_of(self.rule, self.group)
        for i, twin in enumerate(twins):
            twin.grad = grads[i]
            named = dict(zip(self.rule.state_names(self.variant), (s[i] for s in states), strict=True))
            scalars = {n: torch.tensor(c, dtype=torch.float64) for n, c in zip(self.rule.scalars, counts, strict=True)}
            if named or scalars:
                optimizer.state[twin] = {
                    **scalars,
                    **named,
                    **{name: self.means[i].cpu().clone() for name in self.kept},
                }
        optimizer.step()
        # Rprop's loop leaves prev in another tensor
        names = *self.rule.state_names(self.variant), *self.kept
        return [params, grads, *([optimizer.state[t][name] for t in twins] for name in names)]

    def check(self, expected: list[list[Tensor]]) -> None:
        """All tensors, and the memory around them."""
        names = ("param", "grad", *self.rule.state_names(self.variant), *self.kept)
        for name, role, values in zip(names, self.roles(), expected, strict=True):
            for i, (tensor, value) in enumerate(zip(role, values, strict=True)):
                close = dict(CLOSE[self.dtype])
                if tensor.numel():
                    # an ulp of the tensor's largest number, where numbers cancelled
                    close["atol"] = max(close["atol"], torch.finfo(self.dtype).eps * float(value.abs().max()))
                torch.testing.assert_close(
                    tensor.double().cpu(), value.double(), **close, msg=lambda m, n=name, i=i: f"{n} {i}: {m}"
                )
        assert is_untouched(self.around, self.poison)


#: Dtype, elements past an aligned address, and what is around tensors. To the interpreter a wide access is no other:
#: there the second poison, which tells of writes, is for one dtype.
MEMORIES = {
    **{f"{dtype}-aligned-nan".removeprefix("torch."): (dtype, 0, float("nan")) for dtype in DTYPES},
    **{
        f"{dtype}-misaligned-seven".removeprefix("torch."): (dtype, 1, 7.0)
        for dtype in (DTYPES[:1] if INTERPRETED else DTYPES)
    },
}


@pytest.mark.parametrize(("dtype", "shift", "poison"), MEMORIES.values(), ids=MEMORIES)
@each_kernel
def test_writes_its_tensors_and_nothing_else(
    triton_backend: torch.device, case: Case, kwargs: dict, dtype: torch.dtype, shift: int, poison: float
) -> None:
    launch = Launch(case, kwargs, triton_backend, dtype, shift, poison)
    expected, grads = launch.expected(), [g.clone() for g in launch.grads]
    launch()
    launch.check(expected)
    assert all(map(torch.equal, launch.grads, grads))


@each_kernel
def test_repeatable(triton_backend: torch.device, case: Case, kwargs: dict) -> None:
    results = []
    for _ in range(2):
        launch = Launch(case, kwargs, triton_backend, torch.float32)
        launch()
        results.append(torch.cat([t.flatten() for t in launch.everything()]))
    assert torch.equal(*results)


#: Chunks of several wide blocks, and narrow blocks of several rows.
MIXED_SIZE = LaunchSize(chunk_size=512, block_size=512)
#: Several chunks each, with a tail and without, and a tail alone; two are alike but for what becomes of them.
MIXED = [(1300,), (2, 515), (1536,), (1536,), (40,), (513,)]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d).removeprefix("torch."))
@each_kernel
def test_alignment_is_of_each_tensor_and_changes_no_bit(
    triton_backend: torch.device, case: Case, kwargs: dict, dtype: torch.dtype
) -> None:
    """In one launch: of some tensors nothing is misaligned, of others one role, of others all."""
    n_roles = 2 + len(case.cls.rule.state_names(_group(case, kwargs)[1]))
    shifts = [[0] * len(MIXED) for _ in range(n_roles)]
    for role, tensor in [(0, 0), (1, 1), (n_roles - 1, 3), *((role, 5) for role in range(n_roles))]:
        shifts[role][tensor] = 1 + role
    results = []
    for these in (0, shifts):
        launch = Launch(case, kwargs, triton_backend, dtype, these, 7.0, MIXED, MIXED_SIZE)
        launch()
        assert is_untouched(launch.around, 7.0)
        results.append(launch.everything())
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("shift", "poison"),
    [(0, float("nan")), (1, 7.0), *[(1, float("nan")), (0, 7.0)] * (not INTERPRETED)],
    ids=["aligned-nan", "misaligned-seven", *["misaligned-nan", "aligned-seven"] * (not INTERPRETED)],
)
@each_kernel
def test_without_a_gradient_a_tensor_is_left_alone(
    triton_backend: torch.device, case: Case, kwargs: dict, shift: int, poison: float
) -> None:
    missing = (0, 2, 4)
    results, before = [], []
    for these in ((), missing):
        launch = Launch(case, kwargs, triton_backend, torch.float32, shift, poison, MIXED, MIXED_SIZE, these)
        before = [t.clone() for t in launch.everything()]
        launch()
        assert is_untouched(launch.around, poison)
        results.append(launch.everything())
    for i, (there, without, first) in enumerate(zip(*results, before, strict=True)):
        assert torch.equal(without, first if i % len(MIXED) in missing else there), i
    launch = Launch(
        case, kwargs, triton_backend, torch.float32, shapes=MIXED, size=MIXED_SIZE, missing=range(len(MIXED))
    )
    before = [t.clone() for t in launch.everything()]
    launch()
    assert all(map(torch.equal, launch.everything(), before))


@each_kernel
def test_skips(triton_backend: torch.device, case: Case, kwargs: dict) -> None:
    launch = Launch(case, kwargs, triton_backend, torch.float32)
    before = [t.clone() for t in (*launch.everything(), launch.hyper)]
    launch(torch.tensor([float("inf"), 1.0, 1.0], dtype=torch.float64, device=triton_backend))
    assert all(map(torch.equal, before, (*launch.everything(), launch.hyper)))


@each_kernel
def test_control_scales_gradients(triton_backend: torch.device, case: Case, kwargs: dict) -> None:
    results = []
    for factor in (1.0, 0.25):
        launch = Launch(case, kwargs, triton_backend, torch.float32)
        for grad in launch.grads:
            grad.mul_(0.25 / factor)
        launch(torch.tensor([9.0, factor, 0.0], dtype=torch.float64, device=triton_backend))
        results.append(torch.cat([t.flatten() for role in (launch.params, *launch.states) for t in role]))
    # a quarter is exact
    assert torch.equal(*results)


#: Adafactor's: several strips and blocks of columns, kernels of convolutions, and vectors.
MATRICES = {
    "matrices": [(40, 70), (3, 5, 24), (18, 16), (18, 16), (1, 150)],
    "convolutions": [(40, 3, 3), (9, 4, 2, 3), (7, 3, 3), (7, 3, 3), (2, 2)],
    "vectors": [(300,), (128,), (65,), (65,), (1,)],
}
if INTERPRETED:
    MATRICES["matrices"] = [(20, 40), (2, 5, 24), (18, 16), (18, 16), (1, 70)]
    MATRICES["convolutions"] = [(20, 3, 3), (3, 4, 2, 3), (7, 3, 3), (7, 3, 3), (2, 2)]


@pytest.mark.parametrize("moment", [False, True], ids=["plain", "moment"])
@pytest.mark.parametrize("kind", MATRICES)
def test_adafactor_without_some_gradients(triton_backend: torch.device, kind: str, moment: bool) -> None:
    """Such tensors and their averages stay as they are, and the norm counts nothing; nobody reads sums nobody wrote."""
    device, shapes, shifts, dtypes = triton_backend, MATRICES[kind], [0, 0, 1, 0, 0], (torch.float32,) * (4 + moment)
    factored, missing = kind != "vectors", (1, 2)
    if not factored:
        dtypes = dtypes[:-1]
    (group,) = optimx.Adafactor(make_params([(2,)]), lr=0.1, weight_decay=0.1).param_groups
    rule = optimx.Adafactor.rule
    row, _ = rule.prepare(values_of(rule, group), counts_of(rule, group))
    numels = [torch.Size(shape).numel() for shape in shapes]
    cuts = [(torch.Size(s[:-2]).numel(), *s[-2:]) if factored else (1, 1, *s) for s in shapes]
    averages = [[s[:-1] for s in shapes], [s[:-2] + s[-1:] for s in shapes]] if factored else [shapes]
    results: list[list[Tensor]] = []
    for these in ((), missing):
        roles = [shapes, shapes, *averages, *[shapes] * moment]
        made = [in_poison(role, device, torch.float32, i, shifts) for i, role in enumerate(roles)]
        params, grads, *states = (tensors for tensors, _ in made)
        before = [t.clone() for tensors, _ in made for t in tensors]
        table = TensorTable(numels, [params, *states], range(len(shapes)), device, SIZE)
        where, hyper = addresses(grads, device, these), rows(*[row] * len(shapes), device=device)
        aligned, divisor = [shift == 0 for shift in shifts], matrix_walk.row_divisor(dtypes)
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for matrices in tables(cuts, aligned, factored, divisor, device, SIZE, SIZE.block(dtypes)):
            sums = matrix_walk.Sums.of(matrices, torch.float32, factored)
            for memory in vars(sums).values():
                memory.fill_(float("nan"))
            partials = torch.zeros(2, matrices.n_programs, dtype=torch.float64, device=device)
            same: dict[str, Any] = {"dtypes": dtypes, "aligned": matrices.aligned}
            matrix_walk.sums_(table, matrices, where, None, None, sums, *partials, factored=factored, **same)
            steps = matrix_walk.update_(
                table, matrices, where, hyper, None, None, sums,
                measured=False, variant=(factored, False, moment), **same,
            )  # fmt: skip
            deque(steps, maxlen=0)
            total += partials.sum(1)
        assert is_untouched([a for _, around in made for a in around], float("nan"))
        exact = sum(float(g.double().square().sum()) for i, g in enumerate(grads) if i not in these)
        torch.testing.assert_close(total.cpu(), torch.tensor([exact, 0.0]).double(), rtol=1e-6, atol=0)
        results.append([t for tensors, _ in made for t in tensors])
    changed = 0
    for i, (there, without, first) in enumerate(zip(*results, before, strict=True)):
        assert torch.equal(without, first if i % len(shapes) in missing else there), i
        changed += not torch.equal(there, first)
    # all but gradients
    assert changed == len(shapes) * (len(roles) - 1)


def test_matrices_of_a_launch_are_alike_aligned() -> None:
    shapes = [(1, 40, 64), (1, 40, 64), (1, 40, 62), (0, 40, 64), (1, 80, 64), (9, 2, 2)]
    cut = tables(shapes, [True, False, True, True, True, True], True, 4, torch.device("cpu"), LaunchSize(), 512)
    assert [(table.tensor.tolist(), table.aligned) for table in cut] == [([0, 4], True), ([1, 2], False), ([5], False)]


@pytest.mark.parametrize("skip", [False, True], ids=["counts", "skips"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_prepare_is_the_hosts_row(triton_backend: torch.device, case: Case, skip: bool) -> None:
    """All variants at many step counts, more than a program takes; every other tensor has a value on the device."""
    device, rule = triton_backend, case.cls.rule
    module = rule.kernels
    groups = [_group(case, kwargs)[0] for kwargs in case.variants.values()]
    # RAdam changes its formula at the sixth step
    steps = [*map(float, range(12)), 98.0, 99.0, 999.0, 9999.0, 99999.0]
    values = [[float(v) for v in values_of(rule, group)] for group in groups for _ in steps]
    if case.name == "sgd":
        values = [[*value[:-1], float(i % 2)] for i, value in enumerate(values)]
    counts = [(step, *counts_of(rule, group)[1:])[: len(rule.scalars)] for group in groups for step in steps]
    n, n_raw, n_counts = len(values), len(module.RAW), len(rule.scalars)
    assert n > 64
    scalars = torch.zeros(n, n_raw, dtype=torch.int64)
    given = torch.tensor(values, dtype=torch.float32, device=device)
    raw = rows(*values, device=device)
    for i in range(0, n, 2):
        column = i // 2 % n_raw
        scalars[i, column] = given[i, column].data_ptr()
        values[i][column] = float(given[i, column])
        raw[i, column] = float("nan")
    stored = torch.tensor(counts, dtype=torch.float32, device=device).view(n, n_counts)
    before = stored.clone()
    counts = stored.tolist()
    where = addresses(list(stored.flatten().unbind()), device).view(n, n_counts)
    hyper = torch.full((n, len(module.HYPER)), float("nan"), dtype=torch.float64, device=device)
    control = torch.tensor([0.0, 1.0, float(skip)], dtype=torch.float64, device=device)
    missing = [*range(5, n, 7)]
    grads = torch.full((n,), 16, dtype=torch.int64, device=device)
    grads[missing] = 0
    update.prepare_(module, raw, scalars.to(device), where, grads, hyper, control)
    if skip:
        assert hyper.isnan().all()
        assert torch.equal(stored, before)
        return
    # what has no gradient counts no step
    assert torch.equal(stored[missing], before[missing])
    prepared = [rule.prepare(tuple(v), tuple(c)) for v, c in zip(values, counts, strict=True)]
    # float64 throughout. 1 - beta**t at t=1 loses three digits of sixteen; RAdam's rho loses three more
    rtol = 1e-9 if case.name == "radam" else 1e-12
    torch.testing.assert_close(hyper, rows(*(row for row, _ in prepared), device=device), rtol=rtol, atol=1e-300)
    new = torch.tensor([new for _, new in prepared], dtype=torch.float32).view(n, n_counts)
    new[missing] = before[missing].cpu()
    # a float32 rounding may fall the other way
    torch.testing.assert_close(stored.cpu(), new, rtol=2e-7, atol=0)


@pytest.mark.parametrize("rows_on_device", [False, True], ids=["host_rows", "device_rows"])
@pytest.mark.parametrize("clip", [False, True], ids=["step", "clip"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_launches_do_not_grow_with_groups(
    triton_backend: torch.device, case: Case, clip: bool, rows_on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = record_launches(monkeypatch)
    # the interpreter takes milliseconds a tensor
    params = make_params([(9,)] * (5 if INTERPRETED else 26), triton_backend)
    optimizer: Any = case.cls(
        [{"params": [p], "lr": 0.1 * 0.75**i} for i, p in enumerate(params)], max_grad_norm=1.0 if clip else None
    )
    # as after a step under GradScaler
    optimizer._engine.device_counts = rows_on_device
    name = case.cls.rule.module
    expected = ["_norm_kernel", "_finish_kernel"] if clip else []
    if name == "adafactor" and clip:
        # the sums tell the norm
        expected[0] = "_adafactor_sums_kernel"
    if rows_on_device or name in ("asgd", "lamb"):
        expected.append(f"_{name}_prepare_kernel")
    if name == "lamb":
        expected += ["_lamb_measure_kernel", "_lamb_adapt_kernel"]
    if name == "adafactor":
        launches = ["sums"] * (not clip) + ["average", "update", "size", "update"]
        expected += [f"_adafactor_{launch}_kernel" for launch in launches]
    else:
        expected.append(f"_{name}_kernel")
    for step in range(2):
        set_grads(params, step)
        launched.clear()
        optimizer.step()
        assert launched == expected


@pytest.mark.parametrize("case", [c for c in CASES if c.has("fused")], ids=lambda c: c.name)
def test_fused_counts_on_the_device(triton_backend: torch.device, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = record_launches(monkeypatch)
    params = make_params([(9,)] * 3, triton_backend)
    optimizer = case.cls([{"params": [p]} for p in params], fused=True)
    set_grads(params, 0)
    optimizer.step()
    name = case.cls.rule.module
    assert launched == [*[f"_{name}_prepare_kernel"] * bool(case.cls.rule.scalars), f"_{name}_kernel"]


def record_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels, as profilers will show them."""
    launched: list[str] = []
    for module in (update, measured, matrix_walk, grad_norm):
        original = module.launch

        def record(variant, n_programs, *args, warmup=False, original=original):
            names = ("UPDATE", "PREPARE", "MEASURE", "ADAPT")
            algorithm = next(filter(None, map(variant.options.get, names)), None)
            name = variant.kernel.fn.__name__
            if algorithm is not None:
                name = f"_{algorithm.fn.__module__.rpartition('.')[2]}{name.replace('_update', '')}"
            if not warmup:
                launched.append(name)
            original(variant, n_programs, *args, warmup=warmup)

        monkeypatch.setattr(module, "launch", record)
    return launched


@pytest.mark.parametrize("adapted", [False, True], ids=["unadapted", "adapted"])
def test_lambs_trust_ratio_is_of_the_whole_tensor(triton_backend: torch.device, adapted: bool) -> None:
    """Of many chunks; of zeros; clamped."""
    values = [torch.linspace(-3, 5, 1000), torch.zeros(130), torch.full((70,), 100.0)]
    params = [torch.nn.Parameter(v.to(triton_backend, copy=True)) for v in values]
    optimizer = optimx.LAMB(params, lr=0.1, weight_decay=0.0, always_adapt=adapted, max_trust_ratio=50.0, eps=0.0)
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    for before, after in zip(values, params, strict=True):
        # all elements of the step are 1
        ratio = float(before.norm()) / before.numel() ** 0.5 if adapted and before.any() else 1.0
        torch.testing.assert_close(after.cpu(), before - 0.1 * min(ratio, 50.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shift", "largest"), [(0, None), (1, 0.5)], ids=["aligned-unlimited", "misaligned-clamped"])
def test_lambs_norms_of_many_chunks(triton_backend: torch.device, shift: int, largest: float | None) -> None:
    """More of them than the kernel of the ratio reads at once; and a tensor of zeros with gradients of zeros."""
    case = BY_NAME["lamb"]
    kwargs = {"lr": 0.1, "weight_decay": 0.1, "max_trust_ratio": largest}
    shapes, size = [(5,), (16 * 270 + 3,), (40,), ()], LaunchSize(chunk_size=16, block_size=32)
    launch = Launch(case, kwargs, triton_backend, torch.float32, shift, shapes=shapes, size=size)
    for role in (launch.params, launch.grads, *launch.states):
        role[2].zero_()
    expected = launch.expected()
    launch()
    launch.check(expected)
    ratios = launch.hyper[:, lamb.HYPER.index("size")] / 0.1
    assert ratios[2] == (largest or 1.0)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shift", [0, 3], ids=["aligned", "misaligned"])
def test_norm(triton_backend: torch.device, dtype: torch.dtype, norm_type: float, shift: int) -> None:
    device = triton_backend
    grads, _ = in_poison(SHAPES, device, dtype, 0, shift)
    table = TensorTable([g.numel() for g in grads], [], [], device, SIZE)
    found = []
    for _ in range(2):
        partials = torch.full((2, table.n_chunks), float("nan"), dtype=torch.float64, device=device)
        norm, control = torch.empty((), device=device), torch.empty(3, dtype=torch.float64, device=device)
        where = addresses(grads, device)
        grad_norm.norm_(table, where, None, partials, 0, dtype=dtype, norm_type=norm_type)
        grad_norm.finish_(partials, norm, control, norm_type=norm_type, max_norm=0.5)
        found.append(control)
    exact = torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in grads]), norm_type)
    # 128 float32 additions a chunk
    torch.testing.assert_close(found[0][0], exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0][1], (0.5 / (exact + 1e-6)).clamp(max=1.0), rtol=1e-6, atol=0)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_one_bad_gradient_is_found(triton_backend: torch.device, value: float, norm_type: float) -> None:
    device = triton_backend
    grads, _ = in_poison([(65,), (130,)], device, torch.float32, 0, 0)
    grads[1][129] = value
    table = TensorTable([g.numel() for g in grads], [], [], device, SIZE)
    partials = torch.zeros(2, table.n_chunks, dtype=torch.float64, device=device)
    norm, control = torch.empty((), device=device), torch.empty(3, dtype=torch.float64, device=device)
    found_inf = torch.zeros((), device=device)
    where, scale = addresses(grads, device), torch.tensor(4.0, device=device)
    grad_norm.norm_(table, where, scale, partials, 0, dtype=torch.float32, norm_type=norm_type)
    kwargs: dict[str, Any] = {"norm_type": norm_type, "max_norm": 1.0, "grad_scale": scale, "check_finite": True}
    grad_norm.finish_(partials, norm, control, found_inf=found_inf, **kwargs)
    assert found_inf.item() == 1.0
    assert control[2].item() == 1.0
    torch.testing.assert_close(norm.cpu(), torch.tensor(abs(value)), equal_nan=True)


def test_large_finite_gradients_are_not_bad(triton_backend: torch.device) -> None:
    """Their squares overflow; that makes the norm infinite, and no gradient so."""
    device = triton_backend
    grads = [torch.full((100,), 1e30, device=device)]
    table = TensorTable([100], [], [], device, SIZE)
    partials = torch.zeros(2, table.n_chunks, dtype=torch.float64, device=device)
    norm, control = torch.empty((), device=device), torch.empty(3, dtype=torch.float64, device=device)
    found_inf = torch.ones((), device=device)
    grad_norm.norm_(table, addresses(grads, device), None, partials, 0, dtype=torch.float32, norm_type=2.0)
    grad_norm.finish_(partials, norm, control, norm_type=2.0, max_norm=None, found_inf=found_inf, check_finite=True)
    assert norm.isinf()
    assert found_inf.item() == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_scale(triton_backend: torch.device, dtype: torch.dtype, scale: float) -> None:
    device = triton_backend
    grads, around = in_poison(SHAPES, device, dtype, 0, 1, 7.0)
    expected = [g * scale for g in grads]
    table = TensorTable([g.numel() for g in grads], [], [], device, SIZE)
    factor = torch.tensor(scale, dtype=torch.float64, device=device)
    grad_norm.scale_(table, addresses(grads, device), factor, dtype=dtype)
    # a quarter is exact in every dtype
    assert all(map(torch.equal, grads, expected))
    assert is_untouched(around, 7.0)


def test_norm_and_scale_without_some_gradients(triton_backend: torch.device) -> None:
    """They count nothing, whatever lies in the memory of results, and others are what they would be without them."""
    device, missing = triton_backend, (0, 3, 4)
    grads, around = in_poison(MIXED, device, torch.float32, 0, [0, 1, 0, 0, 3, 0])
    there = [g for i, g in enumerate(grads) if i not in missing]
    expected = [g.clone() if i in missing else g * 0.25 for i, g in enumerate(grads)]
    table = TensorTable([g.numel() for g in grads], [], [], device, MIXED_SIZE)
    where, factor = addresses(grads, device, missing), torch.tensor(0.25, dtype=torch.float64, device=device)
    for norm_type in grad_norm.NORM_TYPES:
        partials = torch.full((2, table.n_chunks), float("nan"), dtype=torch.float64, device=device)
        norm, control = torch.empty((), device=device), torch.empty(3, dtype=torch.float64, device=device)
        grad_norm.norm_(table, where, None, partials, 0, dtype=torch.float32, norm_type=norm_type)
        grad_norm.finish_(partials, norm, control, norm_type=norm_type, max_norm=None)
        exact = torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in there]), norm_type)
        torch.testing.assert_close(control[0], exact, rtol=1e-6, atol=0)
        assert not partials[1].any()
    grad_norm.scale_(table, where, factor, dtype=torch.float32)
    assert all(map(torch.equal, grads, expected))
    assert is_untouched(around, float("nan"))


def test_chunks_of_a_tensor_past_2_to_the_31() -> None:
    numels = [5, 2**31 + 10_000, 0, 8192]
    tensor, start = chunk_map(numels, 8192)
    assert tensor.dtype is torch.int32
    assert start.dtype is torch.int64
    assert len(tensor) == 1 + 2**18 + 2 + 1
    assert tensor[-1] == 3
    assert start[-2] == 2**31 + 8192
    covered = [0] * len(numels)
    for i, numel in enumerate(numels):
        starts = start[tensor == i]
        assert torch.equal(starts, torch.arange(len(starts)) * 8192)
        covered[i] = int(torch.clamp(numel - starts, max=8192).sum())
    assert covered == numels


@triton.jit
def _wide_block(carry, pointers, args, first, offsets, mask, CONSTANTS: tl.constexpr):
    if mask is None:
        return (carry[0] + 1.0,)
    else:
        return carry


@triton.jit
def _wide_blocks_kernel(
    first_ptr, second_ptr, remaining, out_ptr, SHIFTS: tl.constexpr, CHUNK_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    pointers = first_ptr + SHIFTS[0], second_ptr + SHIFTS[1]
    carry = (tl.zeros((BLOCK_SIZE,), tl.float32),)
    carry = for_each_block(_wide_block, None, carry, pointers, (), remaining, CHUNK_SIZE, BLOCK_SIZE)
    tl.store(out_ptr + tl.arange(0, BLOCK_SIZE), carry[0])


@pytest.mark.parametrize(
    ("shifts", "remaining", "n_wide"),
    [
        ((0, 0), 64, 4), ((0, 0), 65, 4), ((0, 0), 63, 0), ((4, 8), 64, 4), ((4, 4), 64, 0),
        ((1, 0), 64, 0), ((0, 4), 64, 0), ((0, 1), 64, 0), ((2, 0), 64, 0),
    ],
)  # fmt: skip
def test_full_chunks_of_aligned_tensors_are_wide(
    triton_backend: torch.device, shifts: tuple[int, int], remaining: int, n_wide: int
) -> None:
    """Four floats are a multiple of 16 bytes, eight 16-bit numbers are."""
    first, second = torch.zeros(128, device=triton_backend), torch.zeros(128, device=triton_backend).bfloat16()
    out = torch.empty(16, device=triton_backend)
    variant = Launcher(_wide_blocks_kernel, SHIFTS=shifts, CHUNK_SIZE=64, BLOCK_SIZE=16, num_warps=1)
    launch(variant, 1, first, second, remaining, out)
    assert (out == n_wide).all()


@triton.jit
def _chunk_kernel(grads_ptr, chunk_tensor_ptr, chunk_start_ptr, numels_ptr, out_ptr, CHUNK_SIZE: tl.constexpr):
    tensor, start, remaining = chunk(grads_ptr, chunk_tensor_ptr, chunk_start_ptr, numels_ptr, CHUNK_SIZE)
    tl.store(out_ptr + 3 * tl.program_id(0), tensor.to(tl.int64))
    tl.store(out_ptr + 3 * tl.program_id(0) + 1, start)
    tl.store(out_ptr + 3 * tl.program_id(0) + 2, remaining)


def test_shares_of_programs(triton_backend: torch.device) -> None:
    """Past 2**31, too; nothing is left of a tensor without a gradient, and not less than nothing."""
    device, numel = triton_backend, 2**32 + 100
    grads, numels = torch.tensor([16, 0], device=device), torch.tensor([numel, numel], device=device)
    starts = [0, 2**31 + 128, 2**32] * 2
    tensors = torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.int32, device=device)
    out = torch.empty(6, 3, dtype=torch.int64, device=device)
    variant = Launcher(_chunk_kernel, CHUNK_SIZE=128, num_warps=1)
    launch(variant, 6, grads, tensors, torch.tensor(starts, device=device), numels, out)
    left = [numel - start for start in starts[:3]] + [0] * 3
    assert out.tolist() == [[*share] for share in zip(tensors.tolist(), starts, left, strict=True)]


@pytest.mark.parametrize(
    ("integers", "numbers"),
    [
        ([1, 2, 3], [0.5]), ([1, 2, 3], [0.5, 0.25]), ([4, 5], [0.1, -0.0, float("inf")]), ([2**63 - 1, -(2**63)], []),
        ([7], []), ([], [1.5]), ([], [5e-324, 1e308]), ([], []), ([*range(101)], [i / 7 for i in range(33)]),
    ],
    ids=lambda part: str(len(part)),
)  # fmt: skip
def test_send(device: torch.device, integers: list[int], numbers: list[float]) -> None:
    sent = send(device, integers, numbers)
    for tensor, part, dtype in zip(sent, (integers, numbers), (torch.int64, torch.float64), strict=True):
        assert tensor.device.type == device.type
        # a word to the next multiple of 16 bytes may belong to it
        assert tensor[: len(part)].tolist() == part
        assert not part or (tensor.dtype is dtype and tensor.data_ptr() % 16 == 0)
    memory = {tensor.untyped_storage().data_ptr() for tensor in sent if len(tensor)}
    assert len(memory) == bool(integers or numbers), "all in one copy"


def test_misaligned_gradient_of_one_step(triton_backend: torch.device) -> None:
    """The bucket was made with aligned gradients; addresses of later ones say otherwise."""
    results = []
    for misaligned in (False, True):
        params = make_params([(130,), (4, 40)], triton_backend)
        optimizer = optimx.AdamW(params, lr=0.1)
        for step in range(3):
            set_grads(params, step)
            if misaligned and step == 1:
                buffer = torch.empty(131, device=triton_backend)
                buffer[1:] = params[0].grad
                params[0].grad = buffer[1:]
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in params]))
    assert torch.equal(*results)


def test_normalizing_also_lengthens(triton_backend: torch.device) -> None:
    device = triton_backend
    grads = [torch.full((16,), 0.01, device=device)]
    table = TensorTable([16], [], [], device, SIZE)
    partials = torch.zeros(2, table.n_chunks, dtype=torch.float64, device=device)
    norm, control = torch.empty((), device=device), torch.empty(3, dtype=torch.float64, device=device)
    where = addresses(grads, device)
    grad_norm.norm_(table, where, None, partials, 0, dtype=torch.float32, norm_type=2.0)
    for clamp, expected in ((True, 1.0), (False, 1 / (0.04 + 1e-6))):
        grad_norm.finish_(partials, norm, control, norm_type=2.0, max_norm=1.0, clamp=clamp)
        torch.testing.assert_close(control[1].item(), expected, rtol=1e-6, atol=0)


@triton.jit
def _quotients_kernel(x_ptr, y_ptr, out_ptr, BLOCK_SIZE: tl.constexpr):
    offsets = tl.arange(0, BLOCK_SIZE)
    x = tl.load(x_ptr + offsets)
    y = tl.load(y_ptr)
    tl.store(out_ptr + offsets, divide_by(x, y))
    tl.store(out_ptr + BLOCK_SIZE + offsets, divide(x, y))


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.95, 0.999, 1.0 - 1e-15])
@pytest.mark.parametrize("step", [1, 2, 1000])
def test_divide_by_has_the_bits_of_divide(triton_backend: torch.device, beta2: float, step: int) -> None:
    if INTERPRETED and not hasattr(interpreter._interpreter, "fma_fp64"):
        pytest.skip("this interpreter rounds a fused product, too")
    n = 4096
    x = torch.randint(0x7F800000, (n,), generator=torch.Generator().manual_seed(step), dtype=torch.int32)
    x = x.view(torch.float32).sqrt()
    x[:4] = torch.tensor([0.0, float("inf"), float("nan"), torch.finfo(torch.float32).smallest_normal * 2**-23]).sqrt()
    y = torch.tensor([(1.0 - beta2**step) ** 0.5])
    out = torch.empty(2, n, device=triton_backend)
    launch(Launcher(_quotients_kernel, BLOCK_SIZE=n), 1, x.to(triton_backend), y.to(triton_backend), out)
    torch.testing.assert_close(out[0], out[1], rtol=0.0, atol=0.0, equal_nan=True)
    torch.testing.assert_close(out[1].cpu(), x / y, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter specializes nothing")
def test_no_kernel_is_compiled_anew_for_an_integer() -> None:
    """One, and multiples of 16, would make a kernel of their own; and 1 a constant, which has no method of a tensor."""
    from importlib import import_module
    from pkgutil import iter_modules

    import optimx.triton_kernels as package

    found = set()
    for module in iter_modules(package.__path__, f"{package.__name__}."):
        for name, kernel in vars(import_module(module.name)).items():
            if not (isinstance(kernel, triton.JITFunction) and name.endswith("_kernel")):
                continue
            for param in kernel.params:
                if param.is_constexpr or param.name.endswith("_ptr"):
                    continue
                found.add(param.name)
                # sides of matrices are always multiples of 16, which newton_schulz.multiply_ makes sure of
                told = param.do_not_specialize or param.name in ("n_rows", "n_columns", "n_inner")
                assert told or param.annotation_type in ("fp32", "fp64"), f"{name}: {param.name}"
    numbers = {"from_norms", "sigma", "accept_after", "least_spread", "clip_a", "clip_b", "clip_c", "clip_d"}
    assert found == {"n_tensors", "n_partials", "max_norm", "n_rows", "n_columns", "n_inner", "beta", "alpha", *numbers}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_have_the_kernels_columns(case: Case) -> None:
    """By name: what the host makes in one order, the kernel must not read in another."""
    rule = case.cls.rule
    group = case.cls([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    values = rule.values_for(rule.values(group), torch.float32, first=False)
    row, _ = rule.prepare(tuple(map(float, values)), counts_of(rule, group))
    assert row._fields == rule.kernels.HYPER
    assert len(values) == len(rule.kernels.RAW)


def test_tables_are_sent_in_one_copy(triton_backend: torch.device) -> None:
    sources = [torch.arange(3, dtype=torch.int32), torch.arange(5), torch.ones(2, 3, dtype=torch.float64),
               torch.empty(0, dtype=torch.int64), torch.tensor(7, dtype=torch.int32)]  # fmt: skip
    sent = upload_all(sources, triton_backend)
    assert len({tensor.untyped_storage().data_ptr() for tensor in sent if tensor.numel()}) == 1
    for source, tensor in zip(sources, sent, strict=True):
        assert torch.equal(tensor.cpu(), source)
        assert tensor.data_ptr() % 16 == 0
