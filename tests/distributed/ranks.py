"""Gloo ranks on this machine, which go through a list of checks together."""

from __future__ import annotations

import datetime
import multiprocessing
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint import CheckpointException

#: Called with the rank, in a process group of all.
Check = Callable[[int], Any]


class Results:
    """What each rank returned, by the name of the check: ``results["name"][rank]``."""

    def __init__(self, of_ranks: list[dict[str, Any]], failures: list[dict[str, str]]) -> None:
        self.world = len(of_ranks)
        self._of_ranks = of_ranks
        self._failures = failures

    def __getitem__(self, name: str) -> list[Any]:
        for rank, failures in enumerate(self._failures):
            assert name not in failures, f"rank {rank}: {failures[name]}"
        return [results[name] for results in self._of_ranks]


def run(checks: Mapping[str, Check], world: int, folder: Path) -> Results:
    """Let ``world`` processes go through the checks, and have a process group of its own for each."""
    # ranks are forked from a server that has imported what they need, and nothing more
    multiprocessing.set_forkserver_preload(["tests.distributed.engines", "torch.distributed.checkpoint"])
    mp.start_processes(_run_all, (dict(checks), str(folder), world), nprocs=world, start_method="forkserver")
    results, failures = zip(*(torch.load(folder / f"rank{rank}") for rank in range(world)), strict=True)
    return Results([*results], [*failures])


def _run_all(rank: int, checks: dict[str, Check], folder: str, world: int) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for i, (name, check) in enumerate(checks.items()):
        # ranks that one check has left apart meet in the next
        init, timeout = f"file://{folder}/{i}", datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", init, rank=rank, world_size=world, timeout=timeout)
        try:
            results[name] = check(rank)
        # the test of this check fails with it, and the others go on; the last is no Exception
        except (Exception, CheckpointException):
            failures[name] = traceback.format_exc()
        dist.destroy_process_group()
    torch.save((results, failures), f"{folder}/rank{rank}")
