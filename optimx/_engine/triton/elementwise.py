"""Buckets on the Triton backend: tables of addresses and hyperparameters, sent in one copy a step, and the launches."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ... import _compat
from ...triton_kernels.device import TRITON_DTYPE
from ...triton_kernels.grad_norm import norm_
from ...triton_kernels.storage import Formats, Noise, Storage
from ...triton_kernels.tensor_sums import tensor_sums_
from ...triton_kernels.tensor_table import LaunchSize, TensorTable, send, upload
from ...triton_kernels.update import NO_RIDERS, prepare_, update_
from .. import backends
from ..bucket import Bucket
from ..layout import same_layout
from ..rounds import Update
from ..storage import MOST_ROLES
from ..watched_step import OF_MOMENTS, OF_UPDATES, moment_in

#: Where an empty gradient lies: its tensor takes the step, and nobody reads.
_NOWHERE = 16

#: Tile sizes of new tables; None: the kernels' own.
launch_size: LaunchSize | None = None


class TritonBucket(Bucket):
    """Members that one launch updates.

    The host computes a hyperparameter row for every distinct (group, scalars). With ``on_device`` it knows no scalars:
    then a small kernel counts, and computes a row for every tensor from the raw hyperparameters.

    In a step come, in this order, :meth:`send`, the gradient norm if any, :meth:`compile` and :meth:`update`. What
    can fail lies before the last, so a failure leaves nothing half done.
    """

    takes_missing = True
    watches_grads = True
    #: Whether the update is one launch that others can ride along with.
    takes_riders = True

    def finish(self, known_scalars: Container[int]) -> None:
        super().finish(known_scalars)
        device, n = self.key.device, len(self.positions)
        kernels = self.rule.kernels
        params, _, states, scalars = self.members
        self.table = TensorTable([param.numel() for param in params], [params, *states], range(n), device, launch_size)
        self._empty = [i for i, param in enumerate(params) if not param.numel()]
        self._compiled: set[tuple[Any, ...]] = set()
        if self.key.on_device:
            addresses = torch.tensor(
                [[*map(Tensor.data_ptr, role)] for role in scalars], dtype=torch.int64, device="cpu"
            )
            self._scalar_table = upload(addresses.view(len(self.rule.scalars), n).t().contiguous(), device)
            self._rows = torch.empty(n, len(kernels.HYPER), dtype=torch.float64, device=device)
            self._raw_values: Sequence[tuple[Any, ...]] = []
        formats = Formats((*(kept.kind for kept in self.key.formats),), self.key.on_device and bool(scalars))
        self.storage = Storage(formats)
        self._riders = NO_RIDERS
        if formats.is_random:
            of_members = zip(self.seeds, self.places, self.geometries, strict=True)
            rows = [(seed, place * MOST_ROLES, *geometry) for seed, place, geometry in of_members]
            noise = upload(torch.tensor(rows, dtype=torch.int64, device="cpu"), device)
            steps = self._scalar_table[:, 0].contiguous() if formats.counts_on_device else noise
            self.storage = Storage(formats, Noise(noise, steps))
        self._addresses = self._fixed_addresses()
        self.kernel_key = self.key.kernel_key(self.rule)

    def _fixed_addresses(self) -> list[int]:
        """Addresses that the tables have: all but those of gradients."""
        params, _, states, scalars = self.members
        counted = scalars if self.key.on_device else ()
        return [*map(Tensor.data_ptr, chain(params, *states, *counted, self.means))]

    def matches(self) -> bool:
        return super().matches() and self._fixed_addresses() == self._addresses

    def send(self, values: Sequence[tuple[Any, ...]]) -> None:
        """Send this step's addresses and hyperparameters; the launches that follow read them."""
        device, grads = self.key.device, self.members.grads
        #: Of gradients; 0 where there is none.
        self.addresses = [*map(Tensor.data_ptr, grads)]
        for i in self._empty:
            self.addresses[i] = _NOWHERE
        for i in self.absent:
            self.addresses[i] = 0
        if not self.key.on_device:
            rows, row_of_member = self.host_rows(values)
            if row_of_member is not None:
                self.table.set_rows(row_of_member)
            self._rows = self._send_addresses([*chain.from_iterable(rows)])
            return
        values = self.values_of(values)
        capturing = _compat.is_capturing()
        if capturing or not _identical(values, self._raw_values):
            self._raw_tables = send(device, *self._raw(values))
            # what is sent under capture arrives at replay, and belongs to the graph
            self._raw_values = [] if capturing else values
        self._send_addresses(())

    def _send_addresses(self, numbers: Sequence[float]) -> Tensor:
        """Send the gradients' addresses, and numbers, which are returned; and steps, where random bits depend on them
        and the device does not count."""
        n, storage = len(self.positions), self.storage
        steps = [] if storage.noise is None or storage.formats.counts_on_device else self.new_steps()
        self.grads, sent = send(self.key.device, [*self.addresses, *steps], numbers)
        if storage.noise is not None and steps:
            self.storage = storage._replace(noise=storage.noise._replace(steps=self.grads[n : 2 * n]))
        return sent

    @property
    def n_partials(self) -> int:
        """How many results :meth:`measure` writes."""
        return self.table.n_chunks

    @property
    def member_of_partial(self) -> Tensor:
        """Of which member each of these results is."""
        return self.table.chunk_tensor

    def measure(self, partials: Tensor, offset: int, grad_scale: Tensor | None) -> None:
        """Write squared norms, of gradients divided by ``grad_scale``, and marks of bad ones; see ``norm_``.

        Where ``partials`` has four rows, also the largest ones and numbers of zeros, if it ``watches_grads``.
        """
        with backends.compiling(self.kernel_key):
            self._measure(partials, offset, grad_scale)

    def _measure(self, partials: Tensor, offset: int, grad_scale: Tensor | None) -> None:
        norm_(
            self.table, self.grads, grad_scale, partials, offset,
            dtype=self.key.dtypes[1], norm_type=2.0, watched=len(partials) == 4,
        )  # fmt: skip

    def sums_of(self, partials: Tensor) -> Tensor:
        """What :meth:`measure` has written, for each member: float64 ``[4, n_members]``."""
        sums = torch.empty(len(partials), len(self.positions), dtype=torch.float64, device=self.key.device)
        tensor_sums_(partials, self.table.first_chunk, sums, maxima=(False, True, True, False))
        return sums

    def carry(self, sums: Sequence[str]) -> Sequence[str]:
        moment = moment_in(self.state_names)
        names = [name for name in OF_UPDATES if name in sums and (moment is not None or name not in OF_MOMENTS)]
        if not self.takes_riders or not names:
            return ()
        shape = len(names), self.table.n_chunks
        partials = torch.full(shape, torch.nan, dtype=torch.float32, device=self.key.device)
        which = tuple(OF_UPDATES.index(name) for name in names)
        self._riders = self._riders._replace(sums=which, moment=moment or 0, partials=partials)
        return names

    def carry_averages(self, weight: Tensor) -> bool:
        averages = self.averages
        dtypes = {average.dtype for average in averages}
        laid_out = map(same_layout, averages, self.members.params)
        if (
            not self.takes_riders
            or self.absent
            or len(dtypes) != 1
            or not all(laid_out)
            or not dtypes <= TRITON_DTYPE.keys()
        ):
            return False
        addresses, _ = send(self.key.device, [*map(Tensor.data_ptr, averages)], ())
        self._riders = self._riders._replace(
            averages=addresses, average_dtype=dtypes.pop(), weight=weight.to(self.key.device, non_blocking=True)
        )
        return True

    def carried(self) -> Iterator[tuple[Sequence[str], Tensor]]:
        which, partials = self._riders.sums, self._riders.partials
        if partials is not None:
            self._riders = self._riders._replace(sums=(), moment=0, partials=None)
            sums = torch.empty(len(which), len(self.positions), dtype=torch.float64, device=self.key.device)
            tensor_sums_(partials, self.table.first_chunk, sums, maxima=(False,) * len(which))
            yield [OF_UPDATES[i] for i in which], sums

    def compile(self, control: Tensor | None) -> None:
        """Compile what :meth:`update` will launch.

        Raises:
            CompileError: It does not compile.
        """
        needed = self._needs(control)
        if needed not in self._compiled:
            with backends.compiling(self.kernel_key):
                for _ in self._launch(control, warmup=True):
                    # nothing was launched, nothing is to meet
                    pass
            self._compiled.add(needed)

    def _needs(self, control: Tensor | None) -> tuple[Any, ...]:
        """What tells the kernels of a step from those of others of this bucket."""
        return control is not None, self._riders.sums, self._riders.average_dtype

    def update(self, control: Tensor | None) -> Update:
        if not self.key.on_device:
            self.count(self.present)
        yield from self._launch(control, warmup=False)
        self._riders = self._riders._replace(averages=None, average_dtype=None, weight=None)

    def _launch(self, control: Tensor | None, warmup: bool) -> Update:
        if self.key.on_device:
            given, raw = self._raw_tables
            prepare_(self.rule.kernels, raw, given, self._scalar_table, self.grads, self._rows, control, warmup=warmup)
        yield from self._launch_update(control, warmup)

    def _launch_update(self, control: Tensor | None, warmup: bool) -> Update:
        """What follows when hyperparameter rows are there."""
        update_(
            self.rule.kernels, self.table, self.grads, self._rows, control,
            variant=self.key.variant, dtypes=self.key.dtypes, storage=self.storage, riders=self._riders, warmup=warmup,
        )  # fmt: skip
        yield from ()

    def _raw(self, values: Sequence[tuple[Any, ...]]) -> tuple[list[int], list[float]]:
        """Hyperparameters of each tensor for ``prepare_``: addresses of those that are device scalars, and numbers."""
        addresses: list[int] = []
        numbers: list[float] = []
        for value in chain.from_iterable(values[group] for group in self.groups):
            on_device = isinstance(value, Tensor)
            addresses.append(value.data_ptr() if on_device else 0)
            numbers.append(0.0 if on_device else value)
        return addresses, numbers


def _identical(a: Sequence[tuple[Any, ...]], b: Sequence[tuple[Any, ...]]) -> bool:
    """Equality that never asks a tensor on a device whether it equals another."""
    if len(a) != len(b):
        return False
    pairs = zip(chain.from_iterable(a), chain.from_iterable(b), strict=True)
    return all(x is y or (not (isinstance(x, Tensor) or isinstance(y, Tensor)) and x == y) for x, y in pairs)
