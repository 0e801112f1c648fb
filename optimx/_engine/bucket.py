"""What a bucket of either backend holds: which tensors one launch (or one native call) updates, and how to find them.

A bucket keeps positions, never tensors: whatever the user takes out of ``optimizer.state`` or ``param_groups`` is free
at once, and whatever lies there instead is what the next step uses. :meth:`Bucket.bind` gives it the tensors of a step,
:meth:`Bucket.release` takes them away.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, compress, count
from operator import itemgetter, not_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .averages import AVERAGE
from .flags import MASK_MEAN
from .rounds import ROUNDS_OF, Update
from .rule import Row, UpdateRule
from .scalars import Scalars
from .sharding import Cut
from .storage import Format, Geometry, tensor_names
from .twins import Transfer

#: Where a parameter is that is in one piece.
WHOLE = Geometry()
#: Members up to which also the dtypes of scalars are compared.
FEW = 8


@dataclass(frozen=True)
class BucketKey:
    """What the members of a bucket have in common.

    Attributes:
        dtypes: Of parameter, gradient, states and companions.
        variant: What the settings that choose other arithmetic are, see :meth:`UpdateRule.variant_of`.
        on_device: Counts live on the device, and hyperparameter rows are made there, because the host cannot know them
            (``capturable``, AMP skips, a tensor lr).
        scalar_dtype: Of the scalar states.
        first: Members take their first step, where the rule has it differ from the others.
        cut: How members are spread over ranks; None where they are no DTensors.
        formats: Of parameter and states; empty where all are plain.
        transfer: What they travel in between a device and the host; None where they do not.
    """

    backend: str
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    variant: Any
    on_device: bool
    scalar_dtype: torch.dtype
    first: bool
    cut: Cut | None = None
    formats: tuple[Format, ...] = ()
    transfer: Transfer | None = None

    def kernel_key(self, rule: UpdateRule) -> tuple[Any, ...]:
        """What tells the kernels that a rule's bucket launches from those of others."""
        return rule.module, replace(self, first=False, cut=None)


Picker = Callable[[Sequence[Any]], Sequence[Any]]


def picker(indices: Sequence[int]) -> Picker:
    """A function that takes the elements at ``indices`` out of a list, in C."""
    first, n = indices[0], len(indices)
    stride = indices[1] - first if n > 1 else 1
    # which is also how a single one comes as a list
    if stride > 0 and [*indices] == [*range(first, first + stride * n, stride)]:
        return itemgetter(slice(first, first + stride * (n - 1) + 1, stride))
    return itemgetter(*indices)


class Members(NamedTuple):
    """The tensors of a bucket, or of some of its members, in the step at hand.

    Attributes:
        params, grads: One entry a member.
        states: For each state name of the rule the members' tensors; then for each companion.
        scalars: For each scalar state of the rule the members' tensors, step counts first.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[Sequence[Tensor]]
    scalars: Sequence[Sequence[Tensor]]

    def pick(self, pick: Picker) -> Members:
        """Some of the members."""
        return Members(pick(self.params), pick(self.grads), [*map(pick, self.states)], [*map(pick, self.scalars)])


NOBODY = Members((), (), (), ())


class Bucket:
    """Parallel lists, one entry a parameter.

    Attributes:
        positions: Index in the step's list of all parameters.
        places: Index among all parameters of the optimizer, which noise depends on; others in the step of a part.
        groups: Index of the parameter's group.
        shapes: Of the whole parameters, parts of which are members.
        geometries: Where members are in these.
        seeds: Of each member's stochastic rounding.
        noise_step: The step that is taken, 1 for the first; of rules that count none.
        members: The tensors, between :meth:`bind` and :meth:`release`.
        averages: Of the members' parameters, meanwhile; empty where not all members have one.
        has_means: Members keep their shares of cautious steps, :data:`MASK_MEAN`, where their parameters are.
        means: These shares, meanwhile.
        present: bool, of each member, whether it has a gradient in the step; None: all have.
        absent: Members that have none.
        n_roles: The parameter and the states.
        state_names: Of the states' tensors and companions.
        takes_missing: A member may lack its gradient: then it is left as it is, whatever stands in ``members.grads``.
        watches_grads: Measuring the norm can tell of the largest gradients and of zeros, too.
        kernel_key: What tells its kernels from those of others; None where nothing is compiled.
    """

    takes_missing = False
    watches_grads = False
    has_means = False
    kernel_key: Any = None

    @classmethod
    def formats_problem(cls, variant: Any, formats: Sequence[Format], param: Tensor) -> str:
        """Why numbers of a parameter, or of the part of it in this process, cannot be kept in formats."""
        return ""

    def __init__(self, key: BucketKey, rule: UpdateRule) -> None:
        self.key = key
        self.rule = rule
        self.positions: list[int] = []
        self.places: list[int] = []
        self.groups: list[int] = []
        self.shapes: list[torch.Size] = []
        self.geometries: list[Geometry] = []
        self.seeds: list[int] = []
        self.noise_step = 1
        self.members = NOBODY
        self.averages: Sequence[Tensor] = ()
        self.means: Sequence[Tensor] = ()
        self.present: Tensor | None = None
        self.absent: list[int] = []
        #: None where the host does not count.
        self.scalars: Scalars | None = None
        names = rule.state_names(key.variant)
        self.n_roles = 1 + len(names)
        self.state_names = tensor_names(names, key.formats) if key.formats else names

    def add(
        self, position: int, place: int, group: int, shape: torch.Size, geometry: Geometry = WHOLE, seed: int = 0
    ) -> None:
        """Make a parameter, of which ``shape`` is all, a member."""
        self.positions.append(position)
        self.places.append(place)
        self.groups.append(group)
        self.shapes.append(shape)
        self.geometries.append(geometry)
        self.seeds.append(seed)

    @property
    def meets(self) -> bool:
        """Whether an update needs what other ranks find in their parts of the members."""
        return (
            bool(ROUNDS_OF[self.rule.walk_of(self.key.variant)])
            and self.key.cut is not None
            and self.key.cut.n_shards > 1
        )

    @property
    def has_whole_rows(self) -> bool:
        """Whether no rank has but a part of a member's row."""
        return self.key.cut is None or -1 not in self.key.cut.dims

    def locate(self, values_of: Sequence[dict[str, int]]) -> None:
        """All members are there; ``values_of`` tells of each where its states are among all states."""
        self._pick = picker(self.positions)
        self._pick_states = [picker([where[name] for where in values_of]) for name in self.state_names]
        self._pick_scalars = [picker([where[name] for where in values_of]) for name in self.rule.scalars]
        self._pick_means = picker([where[MASK_MEAN] for where in values_of]) if self.has_means else None
        averages = [where[AVERAGE] for where in values_of if AVERAGE in where]
        self._pick_averages = picker(averages) if len(averages) == len(values_of) else None

    def mark(self, has_grad: Sequence[int]) -> None:
        """Say which of all parameters have a gradient in the coming steps: 1, else 0."""
        present = bytearray(self._pick(has_grad))
        self.present = torch.frombuffer(present, dtype=torch.bool) if 0 in present else None
        self.absent = [*compress(count(), map(not_, present))]

    def updated(self, of_members: Sequence[Any]) -> Sequence[Any]:
        """Of those members that have a gradient."""
        return of_members if self.present is None else [*compress(of_members, self.present.tolist())]

    def bind(self, params: Sequence[Tensor], grads: Sequence[Any], values: Sequence[Any]) -> None:
        """Take the members out of all parameters, their gradients, and the values of all states."""
        self.members = Members(
            self._pick(params),
            self._pick(grads),
            [pick(values) for pick in self._pick_states],
            [pick(values) for pick in self._pick_scalars],
        )
        self.averages = () if self._pick_averages is None else self._pick_averages(values)
        self.means = () if self._pick_means is None else self._pick_means(values)

    def release(self) -> None:
        """Forget the tensors of the step."""
        self.members = NOBODY
        self.averages = self.means = ()
        if self.scalars is not None:
            self.scalars.forget()

    def finish(self, known_scalars: Container[int]) -> None:
        """Plan what depends on the members, which are bound.

        Args:
            known_scalars: Addresses of all scalar states of the optimizer, members' and others'.
        """
        numels = [param.numel() for param in self.members.params]
        self._few = sorted({0, numels.index(max(numels)), len(numels) - 1})
        if self.rule.scalars and not self.key.on_device:
            self.scalars = Scalars(self.members.scalars, known_scalars)
        self._scalar_addresses = self._addresses_of_scalars()
        self._group_of_member = torch.tensor(self.groups, dtype=torch.int64, device="cpu")
        #: A member of each distinct row, and each member's row.
        self._row_owners: list[int] = []
        self._row_of_member = torch.empty(0, dtype=torch.int64, device="cpu")
        self._new_scalars: list[tuple[float, ...]] = []

    def _addresses_of_scalars(self) -> list[int]:
        """Of all that are counted where they lie."""
        return [] if self.scalars is None else [*map(Tensor.data_ptr, chain.from_iterable(self.members.scalars))]

    def values_of(self, values: Sequence[tuple[Any, ...]]) -> Sequence[tuple[Any, ...]]:
        """Each group's hyperparameters, for the members and the step at hand."""
        return [self.rule.values_for(of_group, self.key.dtypes[0], self.key.first) for of_group in values]

    def host_rows(self, values: Sequence[tuple[Any, ...]]) -> tuple[list[Row], Tensor | None]:
        """The distinct hyperparameter rows of the coming step.

        Returns:
            The rows, and each member's row, int64; None if those are the ones of the last call.
        """
        values = self.values_of(values)
        row_of_member = None
        unchanged = self.scalars is None or self.scalars.read(self.members.scalars)
        if not (unchanged and self._row_owners):
            row_of_member, self._row_owners = self._distinct_rows()
            self._row_of_member = row_of_member
        owners = self._row_owners
        scalars = [()] * len(owners) if self.scalars is None else self.scalars.of_members(owners)
        steps = [self.rule.prepare(values[self.groups[i]], of_i) for i, of_i in zip(owners, scalars, strict=True)]
        self._new_scalars = [new for _, new in steps]
        return [row for row, _ in steps], row_of_member

    def _distinct_rows(self) -> tuple[Tensor, list[int]]:
        if self.scalars is not None:
            return self.scalars.kinds(self._group_of_member)
        distinct = {group: row for row, group in enumerate(dict.fromkeys(self.groups))}
        rows = torch.tensor([distinct[group] for group in self.groups], dtype=torch.int64, device="cpu")
        return rows, [self.groups.index(group) for group in distinct]

    def new_steps(self) -> list[int]:
        """Of each member the step that is taken, 1 for the first; after :meth:`host_rows`, where the host counts."""
        if self.scalars is None:
            return [self.noise_step] * len(self.positions)
        return [int(self._new_scalars[row][0]) for row in self._row_of_member.tolist()]

    def count(self, present: Tensor | None = None) -> None:
        """The step happens: bring scalar states on the host up to date (if they are many, after :meth:`host_rows`).

        Args:
            present: bool, of each member, whether it has a gradient; None: all have.
        """
        if self.scalars is None:
            return
        others = None
        if len(self.rule.scalars) > 1:
            new = torch.tensor([new[1:] for new in self._new_scalars], dtype=torch.float64, device="cpu")
            others = new[self._row_of_member].t()
        self.scalars.count(self.members.scalars, others, present)

    def wait(self) -> None:
        """Wait until the gradients of the step are where the update reads them."""
        if self.key.transfer is not None:
            self.key.transfer.wait()

    def send(self, values: Sequence[tuple[Any, ...]]) -> None:
        """Get ready for the launches of this step; may fail, and changes no parameter, state or count."""

    def compile(self, control: Tensor | None) -> None:
        """Compile what :meth:`update` needs; may fail, and changes nothing."""

    def compared_states(self) -> list[Tensor]:
        """State tensors whose shapes, strides and dtypes are compared every step: all, or few where addresses are."""
        states = [*self.members.states, *[self.means] * self.has_means]
        if self.compares_addresses:
            states = [[role[i] for i in self._few] for role in states]
        # scalars that lie together are known by their addresses
        scalars = self.members.scalars if len(self.positions) <= FEW else ()
        return [*chain(*states, *scalars, self.averages)]

    @property
    def compares_addresses(self) -> bool:
        """Whether :meth:`matches` compares the addresses of all parameters and states."""
        return True

    def matches(self) -> bool:
        """Whether what the bucket itself stands on is unchanged (see :meth:`StepPlan.fits`)."""
        return self._addresses_of_scalars() == self._scalar_addresses

    def carry(self, sums: Sequence[str]) -> Sequence[str]:
        """Let sums ride along with the coming update: names of the engine's recorder. Returns those that do."""
        return ()

    def carry_averages(self, weight: Tensor) -> bool:
        """Let :attr:`averages` move in the coming update, if they can: by a float64 scalar."""
        return False

    def carried(self) -> Iterator[tuple[Sequence[str], Tensor]]:
        """What rode along, float64 ``[n_names, n_members]``; NaN where the step was skipped."""
        yield from ()

    def update(self, control: Tensor | None) -> Update:
        """Update all members in place, with the hyperparameters :meth:`send` was given.

        Args:
            control: float64 ``[3]``, norm, gradient factor and skip mark, on any device; None: plain gradients.

        Yields:
            Where :attr:`meets`: what this process has found, to go on with what all ranks have.
        """
        raise NotImplementedError
