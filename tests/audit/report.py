"""What the kernels compile to, as a Markdown table: ``python -m tests.audit.report [--out bench/results/audit.md]``."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton

from bench.provenance import commit

from .assembly import Assembly, examine, problems
from .compiler import LEFT_OUT, TARGETS, compile_for
from .variants import cases, variants

COMMAND = "python -m tests.audit.report"
LEGEND = """\
A cell reads: widths in bits of the vector loads / stores (`-`: none), registers of a thread (AMD: vector registers),
instructions for an element where they are counted, then what is not 0 of shared memory and spills, in bytes. Where
dtypes differ, the narrow tensors move 64 bits at a time: 128 would take a detour through shared memory. Adafactor's
unaligned variants and the kernels without blocks of elements (`*_prepare`, `*_adapt`, `finish`) have nothing to
widen.
**Bold**: past a limit of the audit.

Every variant of Adam is here; of the other algorithms, those that `tests/audit/variants.py` says are enough. How roles
are kept is named as its settings are: `stochastic-8bit` is `param_rounding="stochastic"`, `state_dtype="8bit"`.
"""
REGISTERS = """Registers of a thread at most (Adafactor: where accesses are aligned); in parentheses those of float64.
"""
INSTRUCTIONS = """Machine instructions that a thread executes for an element of a full chunk, at most; in parentheses
those of float64. `tests/audit/walk.py` says what counts, `tests/audit/budgets.py` has the limits. Not counted: variants
with control (it is read before the walk), and of Adafactor's, unaligned ones and those without a walk (vectors, small
matrices).
"""

Results = dict[str, tuple[Assembly, list[str]]]


def _examine(name: str) -> tuple[Assembly, list[str]]:
    variant, architecture = cases()[name]
    target = TARGETS[architecture]
    launch, limits = variant.on(target)
    assembly = examine(compile_for(target, launch), limits.walk)
    return assembly, problems(assembly, limits)


def _widths(accesses: Counter[int]) -> str:
    return "+".join(map(str, sorted(accesses, reverse=True))) or "-"


def _cell(assembly: Assembly, found: list[str]) -> str:
    parts = [f"{_widths(assembly.loads)} / {_widths(assembly.stores)}", f"{assembly.registers} regs"]
    if assembly.instructions is not None:
        parts.append(f"{assembly.instructions:.1f} instr")
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


def _summary(results: Results, text: str, fact: Callable[[Assembly], float | None]) -> Iterator[str]:
    """A line a kernel with the most of each architecture."""
    most: dict[str, dict[tuple[str, bool], float]] = {}
    for name, (assembly, _) in results.items():
        variant, architecture = cases()[name]
        value = fact(assembly)
        if value is not None and "unaligned" not in variant.options:
            values = most.setdefault(variant.kernel, {})
            key = architecture, "float64" in variant.options
            values[key] = max(values.get(key, 0), value)
    yield text
    yield f"| kernel | {' | '.join(TARGETS)} |"
    yield "|---" * (1 + len(TARGETS)) + "|"
    for kernel, values in most.items():
        cells = [
            f"{values[architecture, False]:.3g}"
            + (f" ({values[architecture, True]:.3g})" if (architecture, True) in values else "")
            for architecture in TARGETS
        ]
        yield f"| {kernel} | {' | '.join(cells)} |"
    yield ""


def _lines(results: Results) -> Iterator[str]:
    failed = sum(bool(found) for _, found in results.values())
    yield "# What the kernels compile to"
    yield ""
    yield f"{len(results)} kernels, {failed} of them past a limit. Compiled ahead of time; no GPU was involved."
    yield f"torch {torch.__version__}, triton {triton.__version__}, ptxas {triton.knobs.nvidia.ptxas.version}"
    yield f"(sm_100: {triton.knobs.nvidia.ptxas_blackwell.version}), commit {commit()}, `{COMMAND}`."
    for name, reason in LEFT_OUT.items():
        yield f"{name} is left out, because this Triton does not compile for it: `{reason}`"
    yield ""
    yield from _summary(results, REGISTERS, lambda assembly: assembly.registers)
    yield from _summary(results, INSTRUCTIONS, lambda assembly: assembly.instructions)
    yield LEGEND
    yield f"| kernel | variant | {' | '.join(TARGETS)} |"
    yield "|---" * (2 + len(TARGETS)) + "|"
    for variant in variants():
        names = (f"{variant.kernel}-{architecture}-{variant.options}" for architecture in TARGETS)
        cells = [_cell(*results[name]) if name in results else "" for name in names]
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
