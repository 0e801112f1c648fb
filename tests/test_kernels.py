"""The launchers themselves: interpreted on CPU tensors, or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import optimx
from tests.cases import CLOSE, SHAPES, make_params, set_grads

pytestmark = pytest.mark.interpreted
pytest.importorskip("triton")

from optimx.triton_kernels import adam, grad_norm  # noqa: E402
from optimx.triton_kernels.tensor_table import (  # noqa: E402
    LaunchSize,
    TensorTable,
    chunk_map,
    is_aligned,
    upload,
)

SIZE = LaunchSize(chunk_size=64, block_size=32)
ADAMW = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "maximize": 0.0, "decoupled": 1.0}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def in_poison(shapes: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype, seed: int, shift: int):
    """Tensors between NaNs; ``shift`` elements past an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    tensors, poison = [], []
    for shape in shapes:
        numel = torch.Size(shape).numel()
        buffer = torch.full((numel + 64,), float("nan"), device=device, dtype=dtype)
        inside = buffer[16 + shift : 16 + shift + numel]
        inside.copy_(torch.rand(numel, generator=generator).to(device, dtype))
        tensors.append(inside.view(shape))
        poison += [buffer[: 16 + shift], buffer[16 + shift + numel :]]
    return tensors, poison


def addresses(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    return upload(torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64), device)


def rows(*values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(device)


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_adam_writes_its_tensors_and_nothing_else(
    triton_backend: torch.device, dtype: torch.dtype, amsgrad: bool, shift: int
) -> None:
    device = triton_backend
    made = [in_poison(SHAPES, device, dtype, seed, shift) for seed in range(5 if amsgrad else 4)]
    (params, grads, *states), poison = [m[0] for m in made], [p for m in made for p in m[1]]
    expected = [[t.double().clone() for t in role] for role in (params, grads, *states)]
    table = TensorTable([p.numel() for p in params], [params, *states], [0] * len(params), device, SIZE)
    hyper = rows(adam.hyper_row(**ADAMW, step=3.0), device=device)
    kwargs: dict[str, Any] = {"dtypes": [dtype] * 4, "amsgrad": amsgrad, "aligned": shift == 0}
    adam.adam_(table, addresses(grads, device), hyper, None, **kwargs)

    for i, (p, g, m, v, *vmax) in enumerate(zip(*expected, strict=True)):
        m = m + 0.1 * (g - m)
        v = 0.99 * v + 0.01 * g * g
        largest = torch.maximum(vmax[0], v) if amsgrad else v
        p = p * (1 - 0.01 * 0.1) - 0.01 / (1 - 0.9**3) * m / ((largest / (1 - 0.99**3)).sqrt() + 1e-8)
        for name, actual, value in zip("pmv", (params[i], states[0][i], states[1][i]), (p, m, v), strict=True):
            torch.testing.assert_close(
                actual.double(), value, **CLOSE[dtype], msg=lambda s, n=name, i=i: f"{n}{i}: {s}"
            )
        assert torch.equal(grads[i].double(), g)
    assert all(p.isnan().all() for p in poison)


def test_adam_is_repeatable_and_alignment_changes_no_bit(triton_backend: torch.device) -> None:
    device = triton_backend
    results = []
    for aligned in (True, True, False):
        (params, grads, m, v) = (in_poison(SHAPES, device, torch.float32, seed, 0)[0] for seed in range(4))
        table = TensorTable([p.numel() for p in params], [params, m, v], [0] * len(params), device, SIZE)
        hyper = rows(adam.hyper_row(**ADAMW, step=1.0), device=device)
        kwargs: dict[str, Any] = {"dtypes": [torch.float32] * 4, "amsgrad": False, "aligned": aligned}
        adam.adam_(table, addresses(grads, device), hyper, None, **kwargs)
        results.append(torch.cat([t.flatten() for t in (*params, *m, *v)]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_adam_skips(triton_backend: torch.device) -> None:
    device = triton_backend
    params, grads, m, v = (make_params(SHAPES, device, seed=seed) for seed in range(4))
    before = [t.detach().clone() for t in (*params, *m, *v)]
    table = TensorTable([p.numel() for p in params], [params, m, v], [0] * len(params), device, SIZE)
    control = torch.tensor([float("inf"), 1.0, 1.0], dtype=torch.float64, device=device)
    hyper = rows(adam.hyper_row(**ADAMW, step=1.0), device=device)
    kwargs: dict[str, Any] = {"dtypes": [torch.float32] * 4, "amsgrad": False, "aligned": True}
    adam.adam_(table, addresses(grads, device), hyper, control, **kwargs)
    assert all(map(torch.equal, before, (*params, *m, *v)))


@pytest.mark.parametrize("skip", [False, True])
def test_prepare_is_the_hosts_row(triton_backend: torch.device, skip: bool) -> None:
    device = triton_backend
    values = [{**ADAMW, "lr": 0.1}, {**ADAMW, "decoupled": 0.0, "maximize": 1.0}, {**ADAMW, "beta1": 0.0}]
    counts = [0.0, 9.0, 99999.0]
    steps = torch.tensor(counts, device=device)
    lr = torch.tensor(0.25, device=device)
    raw = rows(*(list(row.values()) for row in values), device=device)
    scalars = torch.zeros(3, adam.RAW_COLUMNS, dtype=torch.int64)
    scalars[1, 0] = lr.data_ptr()
    values[1]["lr"] = 0.25
    hyper = torch.full((3, adam.HYPER_COLUMNS), float("nan"), dtype=torch.float64, device=device)
    control = torch.tensor([0.0, 1.0, float(skip)], dtype=torch.float64, device=device)
    adam.prepare_(raw, scalars.to(device), addresses(list(steps.unbind()), device), hyper, control)
    counted = [count + (not skip) for count in counts]
    assert steps.tolist() == counted
    if not skip:
        expected = rows(*(adam.hyper_row(**row, step=t) for row, t in zip(values, counted, strict=True)), device=device)
        # float64 throughout; 1 - beta**t at t=1 loses three digits of sixteen
        torch.testing.assert_close(hyper, expected, rtol=1e-12, atol=0)


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
        grad_norm.norm_(table, where, None, partials, 0, dtype=dtype, norm_type=norm_type, aligned=shift == 0)
        grad_norm.finish_(partials, norm, control, norm_type=norm_type, max_norm=0.5)
        found.append(control)
    exact = torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in grads]), norm_type)
    # 64 float32 additions a chunk
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
    grad_norm.norm_(table, where, scale, partials, 0, dtype=torch.float32, norm_type=norm_type, aligned=True)
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
    grad_norm.norm_(
        table, addresses(grads, device), None, partials, 0, dtype=torch.float32, norm_type=2.0, aligned=True
    )
    grad_norm.finish_(partials, norm, control, norm_type=2.0, max_norm=None, found_inf=found_inf, check_finite=True)
    assert norm.isinf()
    assert found_inf.item() == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_scale(triton_backend: torch.device, dtype: torch.dtype, scale: float) -> None:
    device = triton_backend
    grads, poison = in_poison(SHAPES, device, dtype, 0, 1)
    expected = [g * scale for g in grads]
    table = TensorTable([g.numel() for g in grads], [], [], device, SIZE)
    factor = torch.tensor(scale, dtype=torch.float64, device=device)
    grad_norm.scale_(table, addresses(grads, device), factor, dtype=dtype, aligned=False)
    # a quarter is exact in every dtype
    assert all(map(torch.equal, grads, expected))
    assert all(p.isnan().all() for p in poison)


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


def test_alignment_is_of_every_address() -> None:
    assert is_aligned(torch.tensor([16, 32, 1024]))
    assert not is_aligned(torch.tensor([16, 24, 1024]))


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


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, ["_adam_kernel"]),
        ({"max_grad_norm": 1.0}, ["_norm_kernel", "_finish_kernel", "_adam_kernel"]),
        ({"fused": True}, ["_adam_prepare_kernel", "_adam_kernel"]),
    ],
    ids=["step", "clip", "device_counts"],
)
def test_launches_do_not_grow_with_groups(
    triton_backend: torch.device, kwargs: dict, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    for module in (adam, grad_norm):
        original = module.launch

        def record(kernel, n_programs, warmup, original=original):
            if not warmup:
                launched.append(kernel.fn.__name__)
            return original(kernel, n_programs, warmup)

        monkeypatch.setattr(module, "launch", record)
    params = make_params([(9,)] * 26, triton_backend)
    groups = [{"params": [p], "lr": 0.1 * 0.75**i, "weight_decay": 0.01 * (i % 2)} for i, p in enumerate(params)]
    optimizer = optimx.AdamW(groups, **kwargs)
    for step in range(2):
        set_grads(params, step)
        launched.clear()
        optimizer.step()
        assert launched == expected
