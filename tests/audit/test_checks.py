"""The audit can fail: each check finds fault with a kernel made for it, and with no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from .assembly import Assembly, Limits, examine, problems
from .compiler import TARGETS, Launch, compile_for

BLOCK = 1024
NUM_THREADS = 128


@triton.jit
def _copy_kernel(x_ptr, y_ptr, numel_ptr, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets).to(y_ptr.dtype.element_ty))


@triton.jit
def _masked_kernel(x_ptr, y_ptr, numel_ptr, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < tl.load(numel_ptr)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask), mask=mask)


@triton.jit
def _atomic_kernel(x_ptr, y_ptr, numel_ptr, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + offsets), axis=0))


@triton.jit
def _normalize_kernel(x_ptr, y_ptr, numel_ptr, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    x = tl.load(x_ptr + offsets)
    # every value waits for the sum
    tl.store(y_ptr + offsets, x / tl.sum(x, axis=0))


def _examine(architecture: str, kernel: Any, x_dtype=torch.float32, block=BLOCK, **options: int) -> Assembly:
    target = TARGETS[architecture]
    x, y, numel = torch.empty(16, dtype=x_dtype), torch.empty(16), torch.empty(1, dtype=torch.int64)
    options |= {"BLOCK_SIZE": block, "num_warps": NUM_THREADS // target.warp_size}
    return examine(compile_for(target, Launch(kernel, (x, y, numel), options)))


@pytest.fixture(params=TARGETS)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


COPY = Limits(reads=[32], writes=[32])


def test_good_kernel(architecture: str) -> None:
    assert problems(_examine(architecture, _copy_kernel), COPY) == []


def test_narrow_accesses(architecture: str) -> None:
    loads, stores = problems(_examine(architecture, _masked_kernel), COPY)
    assert loads == "loads of 128 bits or more should move 256 bits a block but move: 0"
    assert stores == "stores of 128 bits or more should move 256 bits a block but move: 0"


def test_one_narrow_role(architecture: str) -> None:
    (loads,) = problems(_examine(architecture, _copy_kernel), Limits(reads=[32, 32], writes=[32]))
    assert loads == "loads of 128 bits or more should move 512 bits a block but move: 256"


def test_atomics(architecture: str) -> None:
    (atomics,) = problems(_examine(architecture, _atomic_kernel), Limits(reads=[32], shared=128))
    assert "atomics" in atomics


def test_spills(architecture: str) -> None:
    # 128 values a thread, and room for 32 or 64
    scarce = {"cuda": {"maxnreg": 32}, "hip": {"waves_per_eu": 8}}[TARGETS[architecture].backend]
    assembly = _examine(architecture, _normalize_kernel, block=128 * NUM_THREADS, **scarce)
    (spills,) = problems(assembly, Limits(shared=128))
    assert spills.startswith("nothing should be spilled but is: ")


def test_registers(architecture: str) -> None:
    (registers,) = problems(_examine(architecture, _copy_kernel), Limits(registers=4))
    assert registers.startswith("registers should be <= 4 but are: ")


def test_layouts_that_differ(architecture: str) -> None:
    # bfloat16 read eight elements a thread, float32 written four
    (shared,) = problems(_examine(architecture, _copy_kernel, torch.bfloat16), Limits(reads=[16], writes=[32]))
    assert shared.startswith("shared memory should be <= 0 bytes but is: ")
