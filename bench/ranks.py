"""What a clipped step costs on many ranks, computed: ``python -m bench.ranks HOST_MS``.

Three terms: the time of the host, as ``python -m bench dtensor`` measures it, on any number of ranks; the latency of
one all-reduce of 16 bytes, two hops up and down a tree of nodes; and the kernels, whose bytes are spread over the ranks
and move at the speed of memory. Nothing here is measured on that many ranks.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

RANKS = (64, 256, 1024, 4096, 16384)


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

    def row(self, ranks: int) -> tuple[str, str, str, str]:
        """Ranks, and milliseconds of host, latency and kernels."""
        return f"{ranks:,}", f"{self.host_ms:.1f}", f"{self.latency_ms(ranks):.2f}", f"{self.kernel_ms(ranks):.2f}"


def table(step: Step) -> str:
    """The table in Markdown."""
    rows = [("ranks", "host, ms", "all-reduce, ms", "kernels, ms"), ("---:",) * 4, *map(step.row, RANKS)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ranks", description="A clipped step on many ranks, computed."
    )
    parser.add_argument("host_ms", type=float, help="milliseconds of the host in a clipped step, as measured")
    parser.add_argument("--params", type=float, default=Step.params, help="elements of all parameters (default: 70e9)")
    options = parser.parse_args(arguments)
    print(table(Step(options.host_ms, options.params)))


if __name__ == "__main__":
    main()
