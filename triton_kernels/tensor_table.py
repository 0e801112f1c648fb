"""The host side of a multi-tensor launch: what the kernels read instead of one tensor argument after another.

Addresses, sizes and hyperparameters lie in device memory, so a launch takes any number of tensors and of parameter
groups (a by-value argument struct ends at 4 or 32 KB). No kernel is defined here.
"""

from __future__ import annotations

import ctypes
import json
import struct
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Elements a program works through; a tensor's last chunk may be shorter.
CHUNK_SIZE = 8192
#: Elements of one vector step: 128 threads x 8 elements, two 128-bit accesses a thread for float32, one for 16 bits.
BLOCK_SIZE = 1024
NUM_THREADS = 128
NUM_WARPS = NUM_THREADS // (64 if torch.version.hip else 32)


def chunk_map(numels: Sequence[int], chunk_size: int) -> tuple[Tensor, Tensor]:
    """Cut tensors of ``numels`` elements into chunks.

    Returns:
        ``(tensor, start)``, one entry a chunk: the index of the tensor (int32) and the chunk's first element (int64).
    """
    sizes = torch.tensor(list(numels), dtype=torch.int64, device="cpu")
    counts = (sizes + chunk_size - 1).div(chunk_size, rounding_mode="floor")
    tensor = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), counts)
    first_chunk = counts.cumsum(0) - counts
    start = (torch.arange(len(tensor), device="cpu") - first_chunk[tensor]) * chunk_size
    return tensor.to(torch.int32), start


def upload(source: Tensor, device: torch.device) -> Tensor:
    """Send a CPU tensor to ``device`` without waiting.

    The staging memory is fresh on every call: torch's caching host allocator takes it back only when the copy is done,
    where a buffer of our own, written again too early, would be a race. Under capture (torch 2.11 or later) it becomes
    the graph's, which copies from it at every replay.
    """
    if device.type == "cpu":
        return source.clone()
    staging = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=True)
    return staging.copy_(source).to(device, non_blocking=True)


def upload_all(sources: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Send several CPU tensors in one copy; see :func:`upload`. Each begins at a multiple of 16 bytes."""
    ends = [*accumulate(-(-source.nbytes // 16) * 16 for source in sources)]
    memory = torch.empty(ends[-1], dtype=torch.uint8, device="cpu")
    places = [memory[end - -(-s.nbytes // 16) * 16 :][: s.nbytes] for s, end in zip(sources, ends, strict=True)]
    for place, source in zip(places, sources, strict=True):
        place.view(source.dtype).copy_(source.reshape(-1))
    sent = upload(memory, device)
    return [
        sent[place.storage_offset() :][: place.numel()].view(source.dtype).view(source.shape)
        for place, source in zip(places, sources, strict=True)
    ]


def send(device: torch.device, integers: Sequence[int], numbers: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Send int64 integers and float64 numbers in one copy; see :func:`upload`.

    Both begin at multiples of 16 bytes, so that no launch is specialized anew: a word follows integers of odd length.
    """
    lengths, layout, memory_type = _parcel(len(integers), len(numbers))
    pinned = device.type != "cpu"
    staging = torch.empty(sum(lengths), dtype=torch.int64, device="cpu", pin_memory=pinned)
    if staging.nbytes:
        layout.pack_into(memory_type.from_address(staging.data_ptr()), 0, *integers, *numbers)
    sent = staging.to(device, non_blocking=True) if pinned else staging
    of_integers, of_numbers = sent.split_with_sizes(lengths)
    return of_integers, of_numbers.view(torch.float64)


@lru_cache(maxsize=256)
def _parcel(n_integers: int, n_numbers: int) -> tuple[tuple[int, int], struct.Struct, Any]:
    """Words of both parts, how they are packed, and the type of such memory."""
    padding = n_integers % 2
    lengths = n_integers + padding, n_numbers
    return lengths, struct.Struct(f"{n_integers}q{8 * padding}x{n_numbers}d"), ctypes.c_char * (8 * sum(lengths))


class LaunchSize(NamedTuple):
    """Tile sizes of a launch; tests shrink them so that small tensors have many chunks."""

    chunk_size: int = CHUNK_SIZE
    block_size: int = BLOCK_SIZE
    num_warps: int = NUM_WARPS

    def block(self, dtypes: Sequence[torch.dtype]) -> int:
        """Elements of a vector step over tensors of several roles: 128 bits a thread of the widest dtype.

        More spills registers, as roles add up. And where element sizes differ, eight elements a thread of the narrow
        tensors and four of the wide ones would have to meet through shared memory.
        """
        return max(1, self.block_size * 2 // max(dtype.itemsize for dtype in dtypes))


#: Tile sizes measured on a kind of GPU, by its name: ``[{"below": elements, "chunk_size": ..., ...}, ...]``, the
#: smallest bound first. `make gpu-tune` writes it.
TUNED = Path(__file__).with_name("launch_sizes.json")


@cache
def _tuned(device_name: str) -> list[dict[str, int]]:
    return json.loads(TUNED.read_text()).get(device_name, []) if TUNED.exists() else []


def launch_size(device: torch.device, n_elements: int) -> LaunchSize:
    """The tile sizes for tensors of so many elements together: measured ones where there are some for the device."""
    for entry in _tuned(torch.cuda.get_device_name(device)) if device.type == "cuda" else ():
        if n_elements < entry["below"]:
            return LaunchSize(entry["chunk_size"], entry["block_size"], entry["num_warps"])
    return LaunchSize()


class TensorTable:
    """What stays the same from step to step for the tensors of one launch.

    Args:
        numels: Elements of each tensor.
        roles: For each role but the gradient (parameter, then states) its tensors, in the order of ``numels``.
        rows: The hyperparameter row of each tensor.
        device: Where the kernels run.
        size: Tile sizes; None: those of :func:`launch_size`.

    Attributes:
        fixed: int64 ``[n_tensors, n_roles]``, addresses.
        numels: int64 ``[n_tensors]``.
        rows: int32 ``[n_tensors]``.
        chunk_tensor, chunk_start: int32 and int64 ``[n_chunks]``, see :func:`chunk_map`.
        first_chunk: int32 ``[n_tensors + 1]``: chunks of tensor ``i`` begin there, and end where the next one's begin.
    """

    def __init__(
        self,
        numels: Sequence[int],
        roles: Sequence[Sequence[Tensor]],
        rows: Sequence[int],
        device: torch.device,
        size: LaunchSize | None = None,
    ) -> None:
        self.size = size or launch_size(device, sum(numels))
        self.device = device
        self.n_tensors = len(numels)
        addresses = [[tensor.data_ptr() for tensor in role] for role in roles]
        fixed = (
            torch.tensor(addresses, dtype=torch.int64, device="cpu").reshape(len(roles), len(numels)).t().contiguous()
        )
        chunk_tensor, chunk_start = chunk_map(numels, self.size.chunk_size)
        self.n_chunks = len(chunk_tensor)
        tensors = torch.arange(self.n_tensors + 1, dtype=torch.int32, device="cpu")
        self.fixed, self.numels, self.chunk_tensor, self.chunk_start, self.first_chunk, self.rows = upload_all(
            [
                fixed, torch.tensor(list(numels), dtype=torch.int64, device="cpu"), chunk_tensor, chunk_start,
                torch.searchsorted(chunk_tensor, tensors, out_int32=True),
                torch.tensor([*rows], dtype=torch.int32, device="cpu"),
            ],
            device,
        )  # fmt: skip

    def set_rows(self, rows: Tensor) -> None:
        """Let each tensor read another hyperparameter row, ``rows`` of integers on the CPU."""
        self.rows = upload(rows.to(torch.int32), self.device)
