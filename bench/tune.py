"""Which tile sizes are the fastest on this GPU? ``python -m bench.tune [--out DIR] [--keep]``, `make gpu-tune`.

AdamW with every size, beside torch's fused step and a plain copy, in turns. ``DIR/tune.json`` has all times and, as
``sizes``, the best by number of elements; ``--keep`` writes those where the launchers read them. The default sizes stay
where no others are faster by more than a few percent.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from typing import Any
from unittest.mock import patch

import torch
from optimx.triton_kernels.tensor_table import NUM_THREADS, NUM_WARPS, TUNED, LaunchSize

import optimx._engine.triton.elementwise
from bench.case import COPY, FUSED, Case
from bench.contestants import Run, device_copy, optimx_step, torch_step
from bench.provenance import circumstances, machine
from bench.results import Row
from bench.tables import text_case, text_header
from bench.timing import GPU, QUICK, Budget, measure

CHUNKS = (2048, 4096, 8192, 16384, 32768)
#: Elements of a block, and the threads that share them.
BLOCKS = ((1024, 128), (2048, 256), (1024, 256))
SIZES = [
    LaunchSize(chunk, block, threads * NUM_WARPS // NUM_THREADS)
    for chunk, (block, threads) in product(CHUNKS, BLOCKS)
    if chunk >= 2 * block
]
#: Bounds of the number of elements, and tensors that stand for what is below.
MODELS = {2**26: [(512, 512)] * 97, 2**40: [(2048, 2048)] * 24}
DTYPES = (torch.float32, torch.bfloat16)
#: By how much a size must be faster than the default one.
GAIN = 1.02


def name_of(size: LaunchSize) -> str:
    return f"{size.chunk_size} x {size.block_size} x {size.num_warps}"


def sized_step(case: Case, *, size: LaunchSize) -> Run:
    run = optimx_step(case)
    with patch.object(optimx._engine.triton.elementwise, "launch_size", size):
        run.prepare()
        # the plan that this step makes has the size, and stays
        run.step()
    return run


def tuning(below: int, dtype: torch.dtype, device: str = "cuda") -> Case:
    tensors = MODELS[below]
    contestants: dict[str, Any] = {FUSED: partial(torch_step, fused=True)}
    contestants |= {name_of(size): partial(sized_step, size=size) for size in SIZES}
    contestants[COPY] = device_copy
    traffic = {name: 7.0 * dtype.itemsize for name in contestants if name != COPY}
    name = f"tune-{len(tensors)}x{tensors[0][0]}-{str(dtype).removeprefix('torch.')}"
    return Case(name, tensors, contestants, FUSED, device=device, dtype=dtype, clock="device", traffic=traffic)


def best(measured: list[dict[str, Row]]) -> LaunchSize | None:
    """The size that is the fastest on average; None where that is the default one, nearly, or not all were measured."""

    def slowness(size: LaunchSize) -> float:
        medians = [rows[name_of(size)].median_ms for rows in measured]
        return float("inf") if None in medians else geometric_mean(medians)

    fastest = min(SIZES, key=slowness)
    return fastest if slowness(fastest) * GAIN < slowness(LaunchSize()) else None


def entry(below: int, size: LaunchSize) -> dict[str, int]:
    return {"below": below, **size._asdict()}


def keep(device_name: str, sizes: list[dict[str, int]], path: Path = TUNED) -> None:
    """Put the sizes of a device in the table, in place of those it has."""
    table = json.loads(path.read_text()) if path.exists() else {}
    table[device_name] = sizes
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description="Tile sizes for this GPU.")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of the results")
    parser.add_argument("--keep", action="store_true", help="let the launchers use what is found")
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it runs, not for numbers")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("a GPU is needed that torch can use; torch.cuda.is_available() is False")
    options.out.mkdir(parents=True, exist_ok=True)
    budget: Budget = QUICK if options.quick else GPU
    report: dict[str, Any] = {
        "machine_info": machine(gpu=True), "run": circumstances("make gpu-tune"), "rows": [], "sizes": [],
    }  # fmt: skip
    print(text_header())
    for below in MODELS:
        measured = []
        for dtype in DTYPES:
            torch.cuda.empty_cache()
            rows = measure(tuning(below, dtype), budget).rows
            print(text_case(rows.values(), []), flush=True)
            measured.append(rows)
            report["rows"] += map(asdict, rows.values())
        if size := best(measured):
            report["sizes"].append(entry(below, size))
        # what there is stays, should the next one fail
        (options.out / "tune.json").write_text(json.dumps(report, indent=1))
    print(f"sizes: {report['sizes'] or 'the default ones'}")
    if options.keep:
        keep(torch.cuda.get_device_name(), report["sizes"])


if __name__ == "__main__":
    main()
