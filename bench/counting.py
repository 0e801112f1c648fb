"""What a step does beside taking time: kernels it launches, whether it waits, memory it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from optimx.measuring.peak import peak_memory, traced
from optimx.measuring.timing import Run


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
    elif isinstance(value, dict):
        for part in value.values():
            yield from plain_tensors(part)
    elif hasattr(value, "__dict__"):
        for part in vars(value).values():
            if isinstance(part, torch.Tensor):
                yield part


def count_launches(run: Run) -> int | None:
    """Kernels that a step launches, copies and fills not among them; None where the profiler sees none."""
    run.prepare()
    # the trace names the category; the profiler's own events mix kernels with annotated ranges
    return sum(event.get("cat") == "kernel" for event in traced(run)) or None


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
