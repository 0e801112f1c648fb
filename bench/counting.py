"""What a step does beside taking time: kernels it launches, whether it waits, memory it takes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.contestants import Run


def count(run: Run, device: str, steps: bool = True) -> dict[str, int | None]:
    """By column of the results. Takes a few steps, unless told not to; the last one may be left half done."""
    counts: dict[str, int | None] = {"state_bytes": None if run.optimizer is None else state_bytes(run.optimizer)}
    if not steps:
        return counts
    counts["peak_bytes"] = peak_memory(run, device)
    if device == "cuda":
        counts |= {"launches": count_launches(run), "syncs": count_syncs(run)}
    return counts


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Memory of the state. What several tensors share counts once, what a tensor leaves unused of it not at all."""
    seen = {
        (tensor.device, tensor.data_ptr()): tensor.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        for tensor in plain_tensors(value)
        # counts of steps and other scalars are not what one asks for
        if tensor.dim() > 0
    }
    return sum(seen.values())


def plain_tensors(value: Any) -> Iterator[torch.Tensor]:
    """Those that a state is made of: quantised states are subclasses or plain objects with several inside."""
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        for name in names:
            yield from plain_tensors(getattr(value, name))
    elif isinstance(value, torch.Tensor):
        yield value
    elif hasattr(value, "__dict__"):
        for part in vars(value).values():
            if isinstance(part, torch.Tensor):
                yield part


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


def count_launches(run: Run) -> int | None:
    """Kernels that a step launches, copies and fills not among them; None where the profiler sees none."""
    run.prepare()
    # the trace names the category; the profiler's own events mix kernels with annotated ranges
    return sum(event.get("cat") == "kernel" for event in traced(run)) or None


def traced(run: Run, memory: bool = False) -> list[dict[str, Any]]:
    """The events of a step, as torch's profiler writes them."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    with torch.profiler.profile(profile_memory=memory) as profiler:
        run.step()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        return json.loads(trace.read_text())["traceEvents"]


def count_syncs(run: Run) -> int:
    """0 if the step never makes the host wait for the device; 1 if it does, for the first wait ends it."""
    run.prepare()
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.step()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return 1
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return 0
