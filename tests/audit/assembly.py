"""What to read in the assembly of a kernel, and what to find fault with."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton

from .walk import AMDGCN, SASS, WIDE, Walk, instructions_per_element

_PTX_ACCESS = re.compile(r"\b(ld|st)\.(?:[\w:]+\.)*?global\.(?:[\w:]+\.)*?v(\d)\.[bfus](\d+)\b")
#: From global to shared memory, of so many bytes.
_PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S* \[[^]]*\], \[[^]]*\], (\w+)")
_MATRIX = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma_f32)")
_PTX_ATOMIC = re.compile(r"\b(?:atom|red)\.\S+")
_AMD_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store)(?:_lds)?_dwordx(\d)\b")
# what the local data share does but read, write and permute is atomic
_AMD_ATOMIC = re.compile(r"\b\w+_atomic_\w+|\bds_(?:add|sub|rsub|inc|dec|min|max|and|or|xor|cmpst|wrxchg|pk_add)\w*")


@dataclass(frozen=True)
class Assembly:
    """Facts about a compiled kernel.

    Attributes:
        loads, stores: Vector accesses to global memory: how many of each width in bits, wherever they stand. An
            unrolled loop has several times those of one block. Copies to shared memory are loads.
        registers: Of a thread (AMD: vector registers).
        spills: Bytes of stack (AMD: and the number of spilled registers).
        shared: Bytes of shared memory.
        atomics: Atomic instructions.
        instructions: For an element of a full chunk; None where nobody asked, or no walk through one was found.
        matrix: Kinds of instructions that multiply matrices.
    """

    loads: Counter[int]
    stores: Counter[int]
    registers: int
    spills: int
    shared: int
    atomics: tuple[str, ...]
    instructions: float | None = None
    matrix: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Limits:
    """What a kernel must keep to.

    Attributes:
        reads, writes: Bytes a thread moves in one block, an entry a tensor role. 128-bit accesses must move them, or
            one narrower access where there are fewer than 16. Empty: any access will do.
        registers, shared: As in :class:`Assembly`, at most.
        instructions: As in :class:`Assembly`, at most; None: any number will do.
        walk: Where instructions are limited, how a full chunk is walked through.
        matrix: As in :class:`Assembly`, exactly.
    """

    reads: Sequence[int] = ()
    writes: Sequence[int] = ()
    registers: int = 64
    shared: int = 0
    instructions: float | None = None
    walk: Walk | None = None
    matrix: frozenset[str] = frozenset()


def examine(kernel: Any, walk: Walk | None = None) -> Assembly:
    """Read the assembly of a compiled kernel; count instructions, if told how it walks."""
    return _examine_cuda(kernel, walk) if "ptx" in kernel.asm else _examine_hip(kernel, walk)


def _run(knob: Any, *arguments: str) -> str:
    return subprocess.run([knob.path, *arguments], capture_output=True, text=True, check=True).stdout


def _examine_cuda(kernel: Any, walk: Walk | None) -> Assembly:
    ptx = kernel.asm["ptx"]
    accesses = {"ld": Counter(), "st": Counter()}
    for direction, lanes, bits in _PTX_ACCESS.findall(ptx):
        accesses[direction][int(lanes) * int(bits)] += 1
    accesses["ld"].update(8 * int(size, 0) for size in _PTX_COPY.findall(ptx))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _run(triton.knobs.nvidia.cuobjdump, "--dump-resource-usage", cubin.name)
        # half of its time is an analysis of data flow that nothing here asks for
        sass = walk and _run(triton.knobs.nvidia.nvdisasm, "--print-code", "--no-dataflow", cubin.name)
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Assembly(
        loads=accesses["ld"],
        stores=accesses["st"],
        registers=resources["REG"],
        spills=resources["STACK"] + resources["LOCAL"],
        shared=kernel.metadata.shared,
        atomics=tuple(_PTX_ATOMIC.findall(ptx)),
        instructions=instructions_per_element(sass, SASS, walk) if walk else None,
        matrix=frozenset(_MATRIX.findall(ptx)),
    )


def _examine_hip(kernel: Any, walk: Walk | None) -> Assembly:
    text = kernel.asm["amdgcn"]
    accesses = {"load": Counter(), "store": Counter()}
    for direction, words in _AMD_ACCESS.findall(text):
        accesses[direction][int(words) * 32] += 1
    facts = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    return Assembly(
        loads=accesses["load"],
        stores=accesses["store"],
        registers=facts["vgpr_count"],
        spills=facts["private_segment_fixed_size"] + facts["vgpr_spill_count"] + facts["sgpr_spill_count"],
        shared=kernel.metadata.shared,
        atomics=tuple(_AMD_ATOMIC.findall(text)),
        instructions=instructions_per_element(text, AMDGCN, walk) if walk else None,
        matrix=frozenset(_MATRIX.findall(text)),
    )


def problems(assembly: Assembly, limits: Limits) -> list[str]:
    """Where ``assembly`` does not keep to ``limits``, in words."""
    found = _narrow("loads", assembly.loads, limits.reads) + _narrow("stores", assembly.stores, limits.writes)
    if assembly.registers > limits.registers:
        found.append(f"registers should be <= {limits.registers} but are: {assembly.registers}")
    if assembly.spills:
        found.append(f"nothing should be spilled but is: {assembly.spills}")
    if assembly.shared > limits.shared:
        found.append(f"shared memory should be <= {limits.shared} bytes but is: {assembly.shared}")
    if assembly.atomics:
        found.append(f"atomics make results depend on timing, but there are: {', '.join(assembly.atomics)}")
    if assembly.matrix != limits.matrix:
        named = (", ".join(sorted(each)) or "none" for each in (limits.matrix, assembly.matrix))
        found.append("matrices should be multiplied by {} but are by: {}".format(*named))
    if limits.instructions is not None:
        if assembly.instructions is None:
            found.append("no walk through a full chunk was found")
        elif assembly.instructions > limits.instructions:
            found.append(
                f"instructions an element should be <= {limits.instructions:g} but are: {assembly.instructions:.1f}"
            )
    return found


def _narrow(what: str, accesses: Counter[int], roles: Sequence[int]) -> list[str]:
    found = []
    for width in sorted({min(WIDE, 8 * size) for size in roles}):
        needed = sum(8 * size for size in roles if 8 * size >= width)
        moved = sum(bits * count for bits, count in accesses.items() if bits >= width)
        # an unrolled loop moves several blocks; a fraction of a block means that a role is moved otherwise
        if moved == 0 or moved % needed:
            found.append(f"{what} of {width} bits or more should move {needed} bits a block but move: {moved}")
    return found
