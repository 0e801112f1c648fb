"""What is measured of a watched step, on the device, and how it gets to the host without waiting.

Where a kernel reads every number anyway, sums over its chunks ride along (elementwise walks on the Triton backend);
elsewhere torch's operators measure, with a copy of the parameters for the time of the step. Parameters and states are
the same bits with and without.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from .. import _compat
from .cpu.sums import integers, maxima, products, squares, zeros
from .grad_norm import FACTOR, NORM, SKIP, Amp, Measurement
from .plan import StepInputs, StepPlan
from .sharding import all_reduced, cutting, is_here
from .watched_step import MOMENTS, OF_GRADS, OF_MOMENTS, OF_UPDATES, WatchedStep

#: What the host learns of a step besides.
TOTALS = ("step", "grad_norm", "clip_factor", "skipped")
#: Steps that a CUDA graph may take before somebody asks for its rows; older ones are lost.
SLOTS = 64


class _Arrival(NamedTuple):
    """A row on its way to the host.

    Attributes:
        numbers: float64 ``[4 + n_sums * n_params]``, see :data:`TOTALS`; pinned where it comes from a device.
        event: Of its arrival; None: it is there.
    """

    numbers: Tensor
    event: Any = None


class Recorder:
    """Measures some steps of an optimizer.

    Args:
        every: Every so many steps, from the first on; in a CUDA graph all of them.
        sums: Names of what is measured, of :data:`OF_GRADS` and :data:`OF_UPDATES`.
        receive: Called with what was measured, in the order of steps, from a later step or :meth:`flush`.

    Attributes:
        n_steps: Steps that have begun. Of a graph's this knows after :meth:`flush`.
    """

    def __init__(self, every: int, sums: Sequence[str], receive: Callable[[WatchedStep], None]) -> None:
        self.every = every
        self.sums = [name for name in (*OF_GRADS, *OF_UPDATES) if name in sums]
        self.n_steps = 0
        self._receive = receive
        self._arriving: deque[_Arrival] = deque()
        # of graphs: rows, and how many steps there were, on the device
        self._ring: Tensor | None = None
        self._count: Tensor | None = None
        self._last_step = 0

    @property
    def is_due(self) -> bool:
        """Whether the coming step is measured."""
        return self.n_steps % self.every == 0

    def begin(self) -> bool:
        """A step begins: hand over what has arrived, and say whether the step is measured."""
        if _compat.is_capturing():
            return True
        self.n_steps += 1
        self._hand_over(wait=False)
        return (self.n_steps - 1) % self.every == 0

    def flush(self) -> None:
        """Hand over all rows; this waits for the device."""
        self._hand_over(wait=True)
        if self._ring is not None:
            rows = self._ring.cpu()
            for row in rows[rows[:, 0].argsort()]:
                if row[0] > self._last_step:
                    self._deliver(row)
            self.n_steps = max(self.n_steps, self._last_step)

    def send(self, measured: Row, control: Tensor, capturable: bool) -> None:
        """Send what was measured to the host; nobody waits."""
        row = measured.numbers
        control = control.to(row.device, torch.float64)
        # a factor that unscales is no clipping
        factor = torch.where(control[SKIP] != 0, 1.0, control[FACTOR] / measured.inverse)
        totals = torch.stack([measured.norm(control), factor, (control[SKIP] != 0).double()])
        numbers = torch.cat([totals.new_zeros(1), totals, row.reshape(-1)])
        if capturable and numbers.device.type == "cuda" and self._ring is None and not _compat.is_capturing():
            self._ring = numbers.new_zeros(SLOTS, len(numbers))
            self._count = torch.zeros(1, dtype=torch.int64, device=numbers.device)
        if _compat.is_capturing():
            if self._ring is None or self._count is None:
                raise RuntimeError("a watched step should be taken once before a CUDA graph records one")
            numbers[:1].copy_(self._count + 1)
            self._ring.index_copy_(0, self._count % SLOTS, numbers.view(1, -1))
            self._count.add_(1)
            return
        numbers[:1].fill_(self.n_steps)
        if self._count is not None:
            self._count.fill_(self.n_steps)
        if numbers.device.type == "cpu":
            self._arriving.append(_Arrival(numbers))
            return
        arrival = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
        arrival.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(numbers.device))
        self._arriving.append(_Arrival(arrival, event))

    def _hand_over(self, wait: bool) -> None:
        while self._arriving:
            numbers, event = self._arriving[0]
            if event is not None and not wait and not event.query():
                return
            if event is not None and wait:
                event.synchronize()
            self._arriving.popleft()
            self._deliver(numbers)

    def _deliver(self, numbers: Tensor) -> None:
        step, *totals = numbers[: len(TOTALS)].tolist()
        self._last_step = int(step)
        rows = numbers[len(TOTALS) :].view(len(self.sums), -1).tolist()
        sums = dict(zip(self.sums, rows, strict=True))
        self._receive(WatchedStep(self._last_step, sums, dict(zip(TOTALS[1:], totals, strict=True))))


class Row:
    """What is measured of one step, float64 ``[n_sums, n_params]``; NaN where nothing is.

    Sums ride along with updates where buckets let them; the others are taken by torch's operators.

    Args:
        recorder: Whose.
        plan: Of the step.
        inputs: Of the step.
        states: Of the optimizer.

    Attributes:
        numbers: What is measured.
        inverse: What unscales gradients.
    """

    def __init__(self, recorder: Recorder, plan: StepPlan, inputs: StepInputs, states: Mapping[Tensor, Any]) -> None:
        self._sums = recorder.sums
        self._plan, self._inputs = plan, inputs
        self._states = states
        device = plan.buckets[0].key.device if plan.buckets else inputs.shards[0].device
        shape = len(self._sums), len(inputs.params)
        self.numbers = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        self._before: dict[int, Tensor] = {}
        self._finds_norm = False
        self.inverse: Tensor | float = 1.0
        # of each sum, whose does not ride along
        with_grad = [i for i, grad in enumerate(inputs.grads) if grad is not None and grad.layout is torch.strided]
        self._rest = {name: {*with_grad} for name in self._sums}
        for bucket in plan.buckets:
            for name in bucket.carry(self._sums):
                self._rest[name].difference_update(bucket.positions)

    def find_norm(self) -> bool:
        """Find the norm of all gradients among what is measured, if it is: nobody has to measure it before."""
        plan = self._plan
        is_alone = not (plan.on_triton or plan.leftovers or plan.reduction or self._inputs.is_sharded)
        self._finds_norm = is_alone and not self._rest.get("grad_sq", {None})
        return self._finds_norm

    def norm(self, control: Tensor) -> Tensor:
        """The norm of all gradients, a float64 scalar."""
        return self.numbers[self._sums.index("grad_sq")].nansum().sqrt() if self._finds_norm else control[NORM]

    def of_grads(self, measured: Measurement, amp: Amp) -> None:
        """Measure gradients, unscaled and before clipping, with what the kernels have found of them."""
        for bucket, partials in measured.partials:
            if len(partials) > 2 and bucket.watches_grads:
                found = dict(zip(("grad_sq", "", "grad_max", "grad_zeros"), bucket.sums_of(partials), strict=True))
                self._put_members(found, bucket)
                for name in self._rest.keys() & found.keys():
                    self._rest[name].difference_update(bucket.positions)
        self.inverse = 1.0 if amp.grad_scale is None else amp.grad_scale.double().reciprocal()
        self._measure_grads()

    def _measure_grads(self) -> None:
        """By torch's operators."""
        measures = {"grad_sq": squares, "grad_max": maxima, "grad_zeros": zeros}
        for name, measure in measures.items():
            self._put(name, partial(self._of_scaled, name, measure))

    def _of_scaled(self, name: str, measure: Callable[[Sequence[Tensor]], Tensor], positions: Sequence[int]) -> Tensor:
        return measure(self._grads(positions)) * self._unscaling(name)

    def _unscaling(self, name: str) -> Tensor | float:
        """What makes a sum over scaled gradients one over gradients."""
        if name == "grad_sq":
            return self.inverse * self.inverse
        return self.inverse if name in ("grad_max", "grad_moment") else 1.0

    def _grad_moments(self, positions: Sequence[int]) -> Tensor:
        moments = [*map(self._moment, positions)]
        return products(moments, self._grads(positions)) * self._unscaling("grad_moment")

    def before_update(self) -> None:
        """Look at what changes, where nothing rides along."""
        for name in OF_MOMENTS:
            if name in self._rest:
                self._rest[name] = {i for i in self._rest[name] if self._moment(i) is not None}
        self._put("moment_sq", lambda positions: squares([*map(self._moment, positions)]))
        self._put("grad_moment", self._grad_moments)
        self._before = {i: self._inputs.shards[i].detach().clone() for i in self._rest.get("update_sq", ())}

    def after_update(self, control: Tensor) -> None:
        """Take what rode along, and look at what has changed."""
        for bucket in self._plan.buckets:
            for names, found in bucket.carried():
                sums = {name: numbers * self._unscaling(name) for name, numbers in zip(names, found, strict=True)}
                self._put_members(sums, bucket)
        self._put("param_sq", lambda positions: squares(self._shards(positions)))
        self._put("update_sq", lambda positions: squares([*map(self._change, positions)]))
        self._before = {}
        if control.device.type == "cpu" and control[SKIP] != 0:
            # nobody walked over the gradients
            riding = {*OF_GRADS} & self._rest.keys()
            with_grad = {i for i, grad in enumerate(self._inputs.grads) if grad is not None}
            for name in riding:
                known = ~self.numbers[self._sums.index(name)].isnan()
                self._rest[name] = with_grad - {*known.nonzero().flatten().tolist()}
            self._measure_grads()
        self._meet()

    def _grads(self, positions: Sequence[int]) -> list[Tensor]:
        return [self._inputs.grads[i] for i in positions]

    def _shards(self, positions: Sequence[int]) -> list[Tensor]:
        return [self._inputs.shards[i] for i in positions]

    def _change(self, position: int) -> Tensor:
        return self._inputs.shards[position].detach().sub(self._before[position])

    def _moment(self, position: int) -> Any:
        """The first moment of a parameter, where it is a plain tensor of its shape; else None."""
        state, shard = self._states.get(self._inputs.params[position], {}), self._inputs.shards[position]
        for moment in _compat.local_tensors([state[name] for name in MOMENTS if isinstance(state.get(name), Tensor)]):
            if moment.shape == shard.shape and moment.is_floating_point():
                return moment
        return None

    def _put(self, name: str, measure: Callable[[Sequence[int]], Tensor]) -> None:
        """Measure something of the parameters of which nobody else does."""
        positions = sorted(self._rest.get(name, ()))
        if positions:
            self._write(name, positions, measure(positions))

    def _put_members(self, found: Mapping[str, Tensor], bucket: Any) -> None:
        """Take what was found of a bucket's members, those of them that have gradients."""
        absent = {*bucket.absent}
        members = [i for i in range(len(bucket.positions)) if i not in absent]
        positions = [bucket.positions[i] for i in members]
        for name, numbers in found.items():
            if name in self._sums:
                numbers = numbers.to(self.numbers.device, non_blocking=True)
                self._write(name, positions, numbers.index_select(0, self._index(members)))

    def _write(self, name: str, positions: Sequence[int], numbers: Tensor) -> None:
        numbers = numbers.to(self.numbers.device, torch.float64, non_blocking=True)
        self.numbers[self._sums.index(name)].index_copy_(0, self._index(positions), numbers)

    def _index(self, positions: Sequence[int]) -> Tensor:
        return integers((*positions,), self.numbers.device)

    def _meet(self) -> None:
        """Combine with what other ranks have found of their parts of DTensors; all of them come to the same steps."""
        if not self._inputs.is_sharded:
            return
        over: dict[Any, list[int]] = {}
        for i, param in enumerate(self._inputs.params):
            if is_here(param):
                for dim in cutting(param):
                    over.setdefault((_compat.dtensor_spec(param).mesh, dim), []).append(i)
        for (mesh, dim), positions in over.items():
            index, group = self._index(positions), [mesh.get_group(dim)]
            part = self.numbers[:, index]
            # a rank may have no gradient, or nothing of a tensor
            known = torch.stack([torch.where(part.isnan(), 0.0, part), (~part.isnan()).double()])
            most = [i for i, name in enumerate(self._sums) if name == "grad_max"]
            largest = all_reduced(known[0, most].clone(), group, dist.ReduceOp.MAX) if most else None
            total, n = all_reduced(known, group, dist.ReduceOp.SUM).to(part.device)
            if largest is not None:
                total[most] = largest.to(part.device)
            self.numbers[:, index] = torch.where(n != 0, total, torch.nan)
