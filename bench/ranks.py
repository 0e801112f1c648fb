"""What a clipped step costs on many ranks, computed: ``python -m bench.ranks FOLDER``.

Three terms: the time of the host, as ``python -m bench dtensor`` left it in the folder, on any number of ranks;
the latency of one all-reduce of 16 bytes, two hops up and down a tree of nodes; and the kernels, whose bytes are spread
over the ranks and move at the speed of memory. Nothing here is measured on that many ranks.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.case import OURS
from bench.saved import Results, load
from bench.tables import markdown_table

RANKS = (64, 256, 1024, 4096, 16384)
#: As many tensors as Llama-70B has, on so many ranks, as far as one of them can tell.
CASE = "dtensor-723-clip-4096-ranks"


@dataclass(frozen=True)
class Step:
    """A step's assumptions.

    Attributes:
        host_ms: Of a clipped step.
        params: Elements of all parameters.
        bytes_per_param: Of gradients read twice, parameters and two states read and written, in float32.
        bandwidth: Of a GPU's memory, bytes a second.
        gpus_per_node: Within a node a hop costs nothing here.
        hop_us: Of a message between nodes.
        launch_us: Of the collective's kernel.
    """

    host_ms: float
    params: float = 70e9
    bytes_per_param: float = 32.0
    bandwidth: float = 3e12
    gpus_per_node: int = 8
    hop_us: float = 5.0
    launch_us: float = 20.0

    def latency_ms(self, ranks: int) -> float:
        nodes = max(1, ranks // self.gpus_per_node)
        return (2 * math.log2(nodes) * self.hop_us + self.launch_us) / 1e3

    def kernel_ms(self, ranks: int) -> float:
        return self.params / ranks * self.bytes_per_param / self.bandwidth * 1e3

    def row(self, ranks: int) -> list[str]:
        """Ranks, and milliseconds of host, latency and kernels."""
        return [f"{ranks:,}", f"{self.host_ms:.1f}", f"{self.latency_ms(ranks):.2f}", f"{self.kernel_ms(ranks):.2f}"]


def step_of(results: Results) -> Step:
    """A step whose host takes as long as was measured.

    Raises:
        FileNotFoundError: The case is not among the results.
    """
    medians = [row.median_ms for _, rows in results.cases("dtensor", CASE) for row in rows if row.contestant == OURS]
    if not medians or medians[0] is None:
        raise FileNotFoundError(
            f"{results.folder} has no time of {OURS} in {CASE}: `python -m bench dtensor` writes it"
        )
    return Step(medians[0])


def table(step: Step) -> list[list[str]]:
    return [["ranks", "host, ms", "all-reduce, ms", "kernels, ms"], *map(step.row, RANKS)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ranks",
        description="A clipped step of a model of 70e9 parameters on many ranks, computed.",
    )
    parser.add_argument("folder", type=Path, help="results of `python -m bench dtensor`")
    print("\n".join(markdown_table(table(step_of(load(parser.parse_args(arguments).folder))))))


if __name__ == "__main__":
    main()
