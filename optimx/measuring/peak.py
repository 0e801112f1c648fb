"""The memory that a step allocates while it runs."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .timing import Run, synchronize

__all__ = ["peak_memory", "traced"]


def peak_memory(run: Run, device: str) -> int:
    """Bytes that a step has allocated at most, at one time, beyond what was there before it."""
    run.prepare()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run.step()
        return torch.cuda.max_memory_allocated() - before
    events = (event for event in traced(run, memory=True) if event.get("name") == "[memory]")
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


def traced(run: Run, memory: bool = False) -> list[dict[str, Any]]:
    """The events of a step, as torch's profiler writes them."""
    synchronize()
    with _quiet(), torch.profiler.profile(profile_memory=memory) as profiler:
        run.step()
        synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        return json.loads(trace.read_text())["traceEvents"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, what is written to the process's stderr goes nowhere: a profiler tells when it starts."""
    if sys.stderr is not None:
        sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:
        # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
