"""The audit can fail: each check finds fault with a kernel made for it, and with no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from optimx.triton_kernels.device import Launcher
from triton.backends.compiler import GPUTarget

from .assembly import Assembly, Limits, examine, problems
from .compiler import TARGETS, Launch, compile_for, why_not
from .variants import cases
from .walk import AMDGCN, SASS, Walk, instructions_per_element

BLOCK = 1024
NUM_THREADS = 128
N_BLOCKS = tl.constexpr(8)


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


@triton.jit
def _walk_kernel(x_ptr, y_ptr, numel_ptr, BLOCK_SIZE: tl.constexpr, DIVIDE: tl.constexpr, MASKED: tl.constexpr):
    for i in range(0, N_BLOCKS * BLOCK_SIZE, BLOCK_SIZE):
        offsets = i + tl.arange(0, BLOCK_SIZE)
        mask = None
        if MASKED:
            mask = offsets < tl.load(numel_ptr)
        y = tl.load(x_ptr + offsets, mask=mask) * 3.0
        if DIVIDE:
            y = tl.div_rn(y, y + 1.0)
        tl.store(y_ptr + offsets, y, mask=mask)


def _examine(
    architecture: str, kernel: Any, x_dtype=torch.float32, block=BLOCK, walk: Walk | None = None, **options: int
) -> Assembly:
    target = TARGETS[architecture]
    x, y, numel = torch.empty(16, dtype=x_dtype), torch.empty(16), torch.empty(1, dtype=torch.int64)
    options |= {"BLOCK_SIZE": block, "num_warps": NUM_THREADS // target.warp_size}
    return examine(compile_for(target, Launch(Launcher(kernel, **options), (x, y, numel))), walk)


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


#: One block is eight floats a thread.
WALK = Walk(reads=[32], elements=8, blocks=8)


def test_instructions(architecture: str) -> None:
    limits = Limits(instructions=6.0, walk=WALK)
    assert problems(_examine(architecture, _walk_kernel, walk=WALK, DIVIDE=False, MASKED=False), limits) == []
    # with a division, so many that the loop is not unrolled any more
    (instructions,) = problems(_examine(architecture, _walk_kernel, walk=WALK, DIVIDE=True, MASKED=False), limits)
    assert instructions.startswith("instructions an element should be <= 6 but are: 1")


def test_no_walk(architecture: str) -> None:
    limits = Limits(instructions=6.0, walk=WALK)
    narrow = _examine(architecture, _walk_kernel, walk=WALK, DIVIDE=False, MASKED=True)
    assert problems(narrow, limits) == ["no walk through a full chunk was found"]


def test_matrix_instructions(architecture: str) -> None:
    assembly = _examine(architecture, _copy_kernel)
    (matrix,) = problems(assembly, replace(COPY, matrix=frozenset({"mma.sync"})))
    assert matrix == "matrices should be multiplied by mma.sync but are by: none"


def test_rows_off_16_bytes(architecture: str) -> None:
    """Why matrices that are multiplied are filled up with zeros."""
    variant, _ = cases()[f"newton_schulz-{architecture}-bfloat16-gram-512"]
    launch, limits = variant.on(TARGETS[architecture])
    sizes = [arg + 1 if isinstance(arg, int) else arg for arg in launch.args]
    found = problems(examine(compile_for(TARGETS[architecture], replace(launch, args=(*sizes,)))), limits)
    assert "loads of 128 bits or more should move 1024 bits a block but move: 0" in found


LOOP = """\
        /*0000*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.64 R8, desc[UR4][R6.64] ;
        /*0030*/                   MUFU.RSQ R8, R4 ;
        /*0040*/              @!P1 BRA `(.L_x_1) ;
        /*0050*/                   MOV R12, 0x70 ;
        /*0060*/                   CALL.REL.NOINC `($root) ;
.L_x_1:
        /*0070*/              @!P0 BRA `(.L_x_2) ;
        /*0080*/                   FADD R4, R4, 1 ;
.L_x_2:
        /*0090*/              @!P5 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
$root:
"""
UNROLLED = """\
.LBB0_1:
	v_mov_b32_e32 v0, 0                     ; not a load
	global_load_dwordx4 v[0:3], v[4:5], off
.Ltmp0:
	.loc	1 95 40
	s_waitcnt vmcnt(0)
	global_load_dwordx4 v[0:3], v[4:5], off offset:2048
	s_cbranch_scc1 .LBB0_1
"""


def test_counting_a_loop() -> None:
    # one block of four floats: 0010, 0020, 0030, 0040, 0070, 0080, 0090
    assert instructions_per_element(LOOP, SASS, Walk(reads=[16], elements=4, blocks=4)) == 7 / 4
    # one block of two roles is not what is loaded
    assert instructions_per_element(LOOP, SASS, Walk(reads=[16, 16], elements=4, blocks=4)) is None
    # of a role that moves 64 bits, too
    assert instructions_per_element(LOOP, SASS, Walk(reads=[16, 8], elements=4, blocks=4)) == 7 / 4


def test_counting_what_is_unrolled() -> None:
    assert instructions_per_element(UNROLLED, AMDGCN, Walk(reads=[16], elements=4, blocks=2)) == 5 / 8


def test_fusion_is_pinned(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    x = torch.empty(16)
    variant = Launcher(_copy_kernel, BLOCK_SIZE=BLOCK, num_warps=1)
    kernel = compile_for(TARGETS[architecture], Launch(variant, (x, x, x)))
    assert kernel.metadata.enable_fp_fusion is True


def test_unknown_architecture(architecture: str) -> None:
    target = TARGETS[architecture]
    assert why_not(target) is None
    unknown = {"cuda": 999, "hip": "gfx999"}[target.backend]
    assert why_not(GPUTarget(target.backend, unknown, target.warp_size)) is not None
