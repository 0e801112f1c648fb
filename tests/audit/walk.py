"""How many instructions a thread executes for an element of a full chunk."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

#: Bits of the widest access that every architecture here has.
WIDE = 128
#: Bytes that are known for a block's: four may also be those of something else.
NARROWEST = 8


@dataclass(frozen=True)
class Walk:
    """How a program walks through its full chunk.

    Attributes:
        reads: Bytes a thread loads in one block, an entry a tensor role.
        elements: Of one role, those that a thread has of a block.
        blocks: Of a chunk.
    """

    reads: Sequence[int]
    elements: int
    blocks: int

    def blocks_loaded(self, widths: Sequence[int]) -> float:
        """Of how many blocks loads of these widths in bits are; loads narrower than any role's are of other things."""
        widest = min(min(WIDE, 8 * size) for size in self.reads)
        return sum(width for width in widths if width >= widest) / (8 * sum(self.reads))


@dataclass(frozen=True)
class Dialect:
    """How to read an assembler's listing.

    Attributes:
        line: A label, or an instruction.
        branch: Finds the label a branch goes to.
        load: Finds the width of a load from global memory, in units of ``unit`` bits.
    """

    line: re.Pattern[str]
    branch: re.Pattern[str]
    load: re.Pattern[str]
    unit: int


SASS = Dialect(
    re.compile(r"^(?:(\.L\w+):|\s+/\*[0-9a-f]+\*/\s+(.*);)", re.MULTILINE),
    re.compile(r"\bBRA\b.*`\((\.L\w+)\)"),
    re.compile(r"\bLDG\.\S*?\b(\d+)\b"),
    unit=1,
)
AMDGCN = Dialect(
    re.compile(r"^(?:(\.LBB\w+):|\t([a-z][^;\n]*))", re.MULTILINE),
    re.compile(r"\bs_c?branch\w*\s+(\.L\w+)"),
    re.compile(r"\b(?:global|buffer|flat)_load_dwordx(\d)\b"),
    unit=32,
)


def instructions_per_element(text: str, dialect: Dialect, walk: Walk) -> float | None:
    """Instructions of the walk through a full chunk, over the elements they are for; None where it is not to be found.

    The walk is the innermost loop whose vector loads are of whole blocks: all instructions from where a branch goes
    back to, to that branch; or, where the compiler has unrolled the whole chunk, the basic block with its loads. All
    kinds of instructions count, scalar, uniform and waiting ones too; before and after the walk nothing does. What a
    branch skips does not count where it calls: there ptxas puts divisions and roots of rare operands. Of several such
    loops (for cases that are known before the walk) the longest counts.
    """
    code: list[str] = []
    labels: dict[str, int] = {}
    for label, instruction in dialect.line.findall(text):
        if label:
            labels[label] = len(code)
        else:
            code.append(instruction)
    branches = [(i, labels[found[1]]) for i, line in enumerate(code) if (found := dialect.branch.search(line))]
    widths = [[dialect.unit * int(width) for width in dialect.load.findall(line)] for line in code]

    def loaded(start: int, end: int) -> float:
        return walk.blocks_loaded([width for line in widths[start:end] for width in line])

    ends = sorted({0, len(code), *labels.values(), *(i + 1 for i, _ in branches)})
    bodies = [span for span in pairwise(ends) if loaded(*span) == walk.blocks > 1]
    if not bodies:
        loops = [(target, i + 1) for i, target in branches if target <= i]
        loops = [span for span in loops if (n := loaded(*span)) and n == int(n)]
        bodies = [span for span in loops if not any(_inside(other, span) for other in loops)]
    lengths = [(end - start - _rare(code, branches, start, end), loaded(start, end)) for start, end in bodies]
    return max((length / (n * walk.elements) for length, n in lengths), default=None)


def _inside(span: tuple[int, int], other: tuple[int, int]) -> bool:
    return span != other and other[0] <= span[0] and span[1] <= other[1]


def _rare(code: Sequence[str], branches: Sequence[tuple[int, int]], start: int, end: int) -> int:
    """How many of the instructions are on a way around with a call."""

    def skipped() -> Iterator[int]:
        for i, target in branches:
            if start <= i < target <= end and any("CALL" in line for line in code[i:target]):
                yield from range(i + 1, target)

    return len({*skipped()})
