"""Offloading: states on the host, parameters on a GPU, and what travels between them in a step.

Every parameter on a GPU has a *twin*, a tensor of its dtype and layout in pinned host memory, which the engine updates
in its place, with states that lie beside it. Gradients arrive and parameters leave in *transfers* of some megabytes,
each direction on a stream of its own: while the CPU updates one transfer's twins, the gradients of the next ones arrive
and the parameters before them leave. A parameter that somebody else has written is copied to its twin before the step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _compat
from .._checks import above, check_instance, check_number
from .layout import flat, is_dense, same_layout
from .matrices import Scratch
from .rounds import Update

HOST = torch.device("cpu")
#: Elements of a transfer at which twins begin: cache lines of all dtypes.
ALIGNMENT = 32


@dataclass(frozen=True)
class Offload:
    """How states are kept on the host.

    Attributes:
        bucket_mb: Megabytes (of 2**20 bytes) of parameters that travel together, unless one alone has more.
        pin_memory: Twins and gradients lie in pinned memory; without it nothing overlaps.

    Raises:
        ValueError: ``bucket_mb`` is not above 0.
        TypeError: It is no number, or ``pin_memory`` no bool.
    """

    bucket_mb: float = 32.0
    pin_memory: bool = True

    def __post_init__(self) -> None:
        check_number("bucket_mb", self.bucket_mb, above(0))
        check_instance("pin_memory", self.pin_memory, bool, "a bool")


class Workspace:
    """Scratch memory of all buckets of an optimizer, which are many, and are updated one after the other.

    Attributes:
        pieces: By the dtype to compute in.
        scratches: By what they are for.
    """

    def __init__(self) -> None:
        self.pieces: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        self.scratches: defaultdict[str, Scratch] = defaultdict(partial(Scratch, HOST))


class Transfer:
    """Parameters that travel together: of one device and dtype.

    Attributes:
        positions: Of the parameters, among all.
        twins: Of these.
        workspace: Of the updates.
    """

    def __init__(self, lanes: Lanes, dtype: torch.dtype, workspace: Workspace) -> None:
        self.workspace = workspace
        self.positions: list[int] = []
        self.twins: list[Tensor] = []
        self._lanes = lanes
        self._dtype = dtype
        self._starts: list[int] = []
        self._layouts: list[tuple[torch.Size, tuple[int, ...]]] = []
        self._numel = 0
        self._grads: dict[torch.dtype, list[Tensor]] = {}
        self._arrived: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of the twins."""
        return self._numel * self._dtype.itemsize

    def add(self, position: int, shard: Tensor) -> None:
        """Let a parameter's part in this process travel, too."""
        self.positions.append(position)
        self._starts.append(self._numel)
        self._layouts.append((shard.shape, shard.stride()))
        self._numel += -(-shard.numel() // ALIGNMENT) * ALIGNMENT

    def allocate(self) -> None:
        """Make the twins, when all parameters are there."""
        self.twins = self._new(self._dtype)

    def _new(self, dtype: torch.dtype) -> list[Tensor]:
        """Host tensors that lie as the parameters do."""
        memory = torch.empty(self._numel, dtype=dtype, device=HOST, pin_memory=self._lanes.pin_memory)
        places = zip(self._layouts, self._starts, strict=True)
        return [memory.as_strided(shape, stride, start) for (shape, stride), start in places]

    def send_grads(self, shards: Sequence[Tensor], grads: Sequence[Any], on_host: list[Any]) -> None:
        """Begin to copy gradients to the host.

        Args:
            shards: All parameters, or what of them lies in this process.
            grads: All gradients.
            on_host: The same; those that can travel are replaced by what they arrive in.
        """
        self._arrived = None
        with torch.cuda.stream(self._lanes.to_host):
            for i, position in enumerate(self.positions):
                grad, shard = grads[position], shards[position]
                if not _can_travel(grad, shard):
                    continue
                if not same_layout(grad, shard):
                    grad = torch.empty_like(shard, dtype=grad.dtype).copy_(grad)
                if grad.dtype not in self._grads:
                    self._grads[grad.dtype] = self._new(grad.dtype)
                on_host[position] = self._grads[grad.dtype][i]
                enqueue_copy(flat(on_host[position]), flat(grad))
            self._arrived = self._lanes.to_host.record_event()

    def wait(self) -> None:
        """Wait until the gradients have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None

    def refresh(self, i: int, shard: Tensor) -> None:
        """Begin to copy a parameter to its twin."""
        with torch.cuda.stream(self._lanes.to_host):
            enqueue_copy(flat(self.twins[i]), flat(shard))

    def send_params(self, positions: Sequence[int], shards: Sequence[Tensor]) -> None:
        """Begin to copy twins to their parameters, which whoever comes next on the device waits for."""
        index = {position: i for i, position in enumerate(self.positions)}
        with torch.cuda.stream(self._lanes.to_device):
            for position in positions:
                enqueue_copy(flat(shards[position]), flat(self.twins[index[position]]))
        torch.cuda.current_stream(self._lanes.device).wait_stream(self._lanes.to_device)


class Lanes:
    """The streams of a device, one in each direction.

    Attributes:
        device: The device.
        pin_memory: Of what copies go to and come from.
    """

    def __init__(self, device: torch.device, pin_memory: bool) -> None:
        self.device = device
        self.pin_memory = pin_memory
        self.to_host, self.to_device = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def open(self) -> None:
        """A step begins: copies come after what the device has been given so far, and after those of the last step."""
        current = torch.cuda.current_stream(self.device)
        self.to_device.wait_stream(current)
        self.to_host.wait_stream(current)
        self.to_host.wait_stream(self.to_device)


def enqueue_copy(target: Tensor, source: Tensor) -> None:
    """Copy on the current stream, without waiting."""
    target.copy_(source, non_blocking=True)


def _can_travel(grad: Any, shard: Tensor) -> bool:
    """Whether a gradient is what its parameter's should be; placement says what is wrong with others."""
    return (
        isinstance(grad, Tensor)
        and _compat.is_plain(grad)
        and grad.layout is torch.strided
        and (grad.device, grad.shape) == (shard.device, shard.shape)
    )


def _looks(shard: Tensor) -> Any:
    """What a twin depends on; None for what has none: it is on the host, or no kernel could update it."""
    if not (shard.is_cuda and _compat.is_plain(shard) and shard.layout is torch.strided and is_dense(shard)):
        return None
    return shard.data_ptr(), shard.device, shard.dtype, shard.shape, shard.stride()


def like_on_host(tensor: Tensor) -> Tensor:
    """What has the looks of a tensor's twin; the tensor itself where it would have none. Its memory is not touched."""
    if _looks(tensor) is None:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=HOST)


def on_host(tensor: Any) -> Any:
    """A number on the host, which this waits for; anything but a tensor as it is."""
    return tensor.to(HOST) if isinstance(tensor, Tensor) else tensor


def send_(number: Tensor, target: Tensor) -> None:
    """Write what :func:`on_host` gave, and somebody has written, back to where it came from, without waiting."""
    if number is not target:
        target.copy_(number.pin_memory(), non_blocking=True)


class Twins:
    """The twins of an optimizer's parameters.

    Args:
        settings: How they are kept.

    Attributes:
        transfers: What travels together, in the order in which it does.
        transfer_of: The same by a parameter's position.
    """

    def __init__(self, settings: Offload) -> None:
        self._settings = settings
        self._lanes: dict[torch.device, Lanes] = {}
        self._workspace = Workspace()
        self._shards: list[Tensor] = []
        self._seen: list[Any] = []
        self._versions: list[int] = []
        self._twins: list[Tensor] = []
        self.transfers: list[Transfer] = []
        self.transfer_of: dict[int, Transfer] = {}

    def begin(self, shards: Sequence[Tensor], grads: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
        """Twins and gradients on the host, in the places of those on devices; gradients are on their way.

        Args:
            shards: All parameters, or what of them lies in this process.
            grads: Of these.

        Raises:
            RuntimeError: A CUDA graph is being recorded.
        """
        if _compat.is_capturing():
            raise RuntimeError(
                "the step of an optimizer with offloaded states waits for gradients: no graph records it"
            )
        seen = [*map(_looks, shards)]
        if seen != self._seen or not all(a is b for a, b in zip(shards, self._shards, strict=True)):
            self._allot(shards, seen)
        for lanes in self._lanes.values():
            lanes.open()
        self._refresh(shards)
        on_host = [*grads]
        for transfer in self.transfers:
            transfer.send_grads(shards, grads, on_host)
        return self._twins, on_host

    def _allot(self, shards: Sequence[Tensor], seen: list[Any]) -> None:
        """Make the twins of these parameters, and say what travels together."""
        most = self._settings.bucket_mb * (1 << 20)
        self._shards, self._seen = [*shards], seen
        self._twins, self._versions = [*shards], [-1] * len(shards)
        self.transfers, self.transfer_of = [], {}
        filling: dict[tuple[torch.device, torch.dtype], Transfer] = {}
        for position, shard in enumerate(shards):
            if seen[position] is None:
                continue
            kind = shard.device, shard.dtype
            if kind not in filling or filling[kind].nbytes + shard.nbytes > most:
                if shard.device not in self._lanes:
                    self._lanes[shard.device] = Lanes(shard.device, self._settings.pin_memory)
                filling[kind] = Transfer(self._lanes[shard.device], shard.dtype, self._workspace)
                self.transfers.append(filling[kind])
            filling[kind].add(position, shard)
            self.transfer_of[position] = filling[kind]
        for transfer in self.transfers:
            transfer.allocate()
            for position, twin in zip(transfer.positions, transfer.twins, strict=True):
                self._twins[position] = twin

    def _refresh(self, shards: Sequence[Tensor]) -> None:
        """Bring the twins of parameters up to date that somebody else has written; this waits for those."""
        stale = False
        for transfer in self.transfers:
            for i, position in enumerate(transfer.positions):
                version = _compat.version(shards[position])
                if version != self._versions[position]:
                    transfer.refresh(i, shards[position])
                    self._versions[position] = version
                    stale = True
        for lanes in self._lanes.values() if stale else ():
            lanes.to_host.synchronize()

    def update(self, bucket: Any, update: Update, skips: bool) -> Update:
        """A bucket's update, begun when its gradients have arrived; then its parameters leave, unless it skips."""
        bucket.wait()
        if bucket.key.transfer is None or skips:
            yield from update
            return
        positions = bucket.updated(bucket.positions)
        for position in positions:
            # where the update fails, the next step goes on from what the parameters are
            self._versions[position] = -1
        yield from update
        bucket.key.transfer.send_params(positions, self._shards)
        for position in positions:
            self._versions[position] = _compat.version(self._shards[position])
