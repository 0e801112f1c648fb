"""What the kernels compile to, as a Markdown table: ``python -m tests.audit.report [--out bench/results/audit.md]``."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton

from bench.provenance import commit

from .assembly import Assembly, examine, problems
from .compiler import TARGETS, compile_for
from .variants import cases, variants

COMMAND = "python -m tests.audit.report"
LEGEND = """\
A cell reads: widths in bits of the vector loads / stores (`-`: none), registers of a thread (gfx942: vector
registers), then what is not 0 of shared memory and spills, in bytes. Where dtypes differ, the narrow tensors move 64
bits at a time: 128 would take a detour through shared memory. Unaligned variants and the kernels without blocks of
elements (`*_prepare`, `lamb_ratio`, `finish`) have nothing to widen. **Bold**: past a limit of the audit.

Every variant of Adam is here; of the other algorithms, those that `tests/audit/variants.py` says are enough.
"""
SUMMARY = """Registers of a thread at most, where accesses are aligned; in parentheses those of float64.
"""


def _examine(name: str) -> tuple[Assembly, list[str]]:
    variant, architecture = cases()[name]
    target = TARGETS[architecture]
    launch, limits = variant.on(target)
    assembly = examine(compile_for(target, launch))
    return assembly, problems(assembly, limits)


def _widths(accesses: Counter[int]) -> str:
    return "+".join(map(str, sorted(accesses, reverse=True))) or "-"


def _cell(assembly: Assembly, found: list[str]) -> str:
    parts = [f"{_widths(assembly.loads)} / {_widths(assembly.stores)}", f"{assembly.registers} regs"]
    if assembly.shared:
        parts.append(f"{assembly.shared} shared")
    if assembly.spills:
        parts.append(f"{assembly.spills} spilled")
    text = ", ".join(parts)
    return f"**{text}**" if found else text


def report() -> str:
    """The whole page."""
    names = list(cases())
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = dict(zip(names, pool.map(_examine, names, chunksize=8), strict=True))
    return "\n".join(_lines(results)) + "\n"


def _summary(results: dict[str, tuple[Assembly, list[str]]]) -> Iterator[str]:
    """A line a kernel."""
    most: dict[str, dict[tuple[str, bool], int]] = {}
    for name, (assembly, _) in results.items():
        variant, architecture = cases()[name]
        if "unaligned" not in variant.options:
            registers = most.setdefault(variant.kernel, {})
            key = architecture, "float64" in variant.options
            registers[key] = max(registers.get(key, 0), assembly.registers)
    yield SUMMARY
    yield f"| kernel | {' | '.join(TARGETS)} |"
    yield "|---" * (1 + len(TARGETS)) + "|"
    for kernel, registers in most.items():
        cells = [
            f"{registers[architecture, False]}"
            + (f" ({registers[architecture, True]})" if (architecture, True) in registers else "")
            for architecture in TARGETS
        ]
        yield f"| {kernel} | {' | '.join(cells)} |"


def _lines(results: dict[str, tuple[Assembly, list[str]]]) -> Iterator[str]:
    failed = sum(bool(found) for _, found in results.values())
    yield "# What the kernels compile to"
    yield ""
    yield f"{len(results)} kernels, {failed} of them past a limit. Compiled ahead of time; no GPU was involved."
    yield f"torch {torch.__version__}, triton {triton.__version__}, ptxas {triton.knobs.nvidia.ptxas.version}"
    yield f"(sm_100: {triton.knobs.nvidia.ptxas_blackwell.version}), commit {commit()}, `{COMMAND}`."
    yield ""
    yield from _summary(results)
    yield ""
    yield LEGEND
    yield f"| kernel | variant | {' | '.join(TARGETS)} |"
    yield "|---" * (2 + len(TARGETS)) + "|"
    for variant in variants():
        cells = [_cell(*results[f"{variant.kernel}-{architecture}-{variant.options}"]) for architecture in TARGETS]
        yield f"| {variant.kernel} | {variant.options} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--out", type=Path, help="file to write (default: print)")
    out = parser.parse_args().out
    text = report()
    if out is None:
        print(text, end="")
    else:
        out.write_text(text)


if __name__ == "__main__":
    main()
