"""Sharded parameters: what of a DTensor lies in this process, and how a norm is summed over all processes.

Torch's engines (FSDP2, tensor parallel) own the communication of parameters and gradients. Kernels see the local
tensors of DTensors, and ``optimizer.state`` holds DTensors again for everybody else. What is communicated here is one
vector of two numbers for a set of ranks, once a step: squares of gradients, and marks of infinite ones.

Which collectives a step has depends on parameters, meshes and ``norm_group`` alone, never on which gradients, shards or
backend a rank has: ranks that disagreed would wait for each other forever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from .. import _compat
from .rule import StateKind
from .storage import Geometry

#: A state of the parameter's shape.
PLAIN = StateKind()


class Cut(NamedTuple):
    """Over which ranks the elements of a DTensor are spread.

    Attributes:
        mesh: The ranks, as a DeviceMesh.
        n_shards: In how many pieces it is cut; the mesh has ``mesh.size() / n_shards`` copies of each.
        dims: Of the tensor, counted from its end, that are cut.
    """

    mesh: Any
    n_shards: int
    dims: tuple[int, ...] = ()

    @property
    def weight(self) -> float:
        """What a rank's sum counts, for each element to count once in the sum over all ranks of the mesh."""
        return self.n_shards / self.mesh.size()


def cutting(param: Tensor, *dims: int) -> list[int]:
    """Dimensions of a DTensor's mesh over which it is cut; given ``dims`` counted from its end, along one of them."""
    spec = _compat.dtensor_spec(param)
    # not is_shard(): tensor parallelism beneath FSDP2 has strided shards, which say no
    return [
        i
        for i, (size, placement) in enumerate(zip(spec.mesh.shape, spec.placements, strict=True))
        if size > 1 and not placement.is_replicate() and (not dims or placement.dim % param.dim() - param.dim() in dims)
    ]


def cut_of(param: Tensor) -> Cut | None:
    """How a parameter is cut; None where it is no DTensor."""
    if not _compat.is_dtensor(param):
        return None
    spec = _compat.dtensor_spec(param)
    over = cutting(param)
    dims = sorted({spec.placements[i].dim % param.dim() - param.dim() for i in over})
    return Cut(spec.mesh, prod(spec.mesh.shape[i] for i in over), (*dims,))


def shard_lengths(length: int, n_ranks: int) -> list[int]:
    """What ranks get of a dimension, as torch's ``Shard`` cuts it: as much as the first, while there is some."""
    longest = -(-length // n_ranks)
    return [max(0, min(longest, length - rank * longest)) for rank in range(n_ranks)]


def geometry_of(param: Tensor, part: Tensor) -> Geometry | None:
    """Where the elements of the part of a parameter in this process are among all; None where no geometry says it."""
    if part is param or not _compat.is_dtensor(param) or not (over := cutting(param)):
        return Geometry()
    spec = _compat.dtensor_spec(param)
    dims = {spec.placements[i].dim % param.dim() for i in over}
    if len(dims) > 1 or not part.is_contiguous() or not all(spec.placements[i].is_shard() for i in over):
        return None
    (dim,) = dims
    # several dimensions of a mesh cut one after the other
    first, length = 0, param.shape[dim]
    for i in over:
        lengths, coordinate = shard_lengths(length, spec.mesh.size(i)), spec.mesh.get_coordinate()[i]
        first, length = first + sum(lengths[:coordinate]), lengths[coordinate]
    inner = prod(param.shape[dim + 1 :])
    return Geometry(first * inner, max(1, length * inner), (param.shape[dim] - length) * inner if dim else 0)


def layout_of(param: Tensor) -> str:
    """How a DTensor lies on which ranks, as a text; empty for other tensors."""
    if not _compat.is_dtensor(param):
        return ""
    spec = _compat.dtensor_spec(param)
    names = spec.mesh.mesh_dim_names or range(spec.mesh.ndim)
    dims = zip(names, spec.mesh.shape, spec.placements, strict=True)
    return ", ".join(f"{placement} over {size} ranks of {name}" for name, size, placement in dims)


def has_dtensors(tensors: Iterable[Any]) -> bool:
    """Whether one of them is a DTensor; costs nothing where nobody has imported the class."""
    cls = _compat.dtensor_class()
    return cls is not None and cls in {*map(type, tensors)}


def is_here(tensor: Any) -> bool:
    """Whether it is a DTensor of whose mesh this process is a rank: there may be parameters that only others have."""
    return _compat.is_dtensor(tensor) and _compat.dtensor_spec(tensor).mesh.get_coordinate() is not None


def local(tensor: Any) -> Any:
    """The part of a DTensor in this process, when it has arrived; anything else as it is."""
    return _compat.local_tensors([tensor])[0]


def local_pairs(
    params: Sequence[Tensor], grads: Sequence[Any], *, communicate: bool = True
) -> tuple[Sequence[Tensor], list[Any]]:
    """Local parts of parameters and of their gradients, in which all partial sums have met.

    A gradient that is laid out otherwise than its parameter (tensor parallelism of sequences leaves partial sums) is
    redistributed: a collective, to which all ranks come in the same order. Without ``communicate``, what looks like
    the result stands in its place.
    """
    if _are_laid_out_alike(params, grads):
        return _compat.local_tensors(params), _compat.local_tensors(grads)
    shards, local_grads = [], []
    for param, grad in zip(params, grads, strict=True):
        if not _compat.is_dtensor(param) or not (grad is None or _compat.is_dtensor(grad)):
            # torch's step says what is wrong with a plain gradient of a DTensor
            shards.append(param)
            local_grads.append(grad)
            continue
        shards.append(local(param))
        if grad is not None:
            of_param, of_grad = _compat.dtensor_spec(param), _compat.dtensor_spec(grad)
            if of_grad is of_param or (of_grad.mesh, of_grad.placements) == (of_param.mesh, of_param.placements):
                grad = local(grad)
            elif communicate:
                grad = local(grad.redistribute(of_param.mesh, of_param.placements))
            else:
                grad = torch.empty_like(shards[-1], dtype=grad.dtype)
        local_grads.append(grad)
    return shards, local_grads


def _are_laid_out_alike(params: Sequence[Tensor], grads: Sequence[Any]) -> bool:
    """Whether all are DTensors, and gradients have the very specs of their parameters, as FSDP2 leaves them."""
    if not {*map(type, params)} == {*map(type, grads)} == {_compat.dtensor_class()}:
        return False
    return all(map(is_, map(_compat.dtensor_spec, params), map(_compat.dtensor_spec, grads)))


def with_sums_met(tensor: Any) -> Any:
    """A DTensor without placements that are partial sums: those are reduced. Anything else as it is."""
    if not _compat.is_dtensor(tensor):
        return tensor
    spec = _compat.dtensor_spec(tensor)
    if not any(placement.is_partial() for placement in spec.placements):
        return tensor
    from torch.distributed.tensor import Replicate

    whole = [Replicate() if placement.is_partial() else placement for placement in spec.placements]
    return tensor.redistribute(spec.mesh, whole)


def gathered(number: Any) -> Any:
    """All of a DTensor, on every rank: a collective if its parts are not alike. Anything else as it is."""
    return local(number.full_tensor()) if _compat.is_dtensor(number) else local(number)


def scattered(param: Tensor, whole: Tensor) -> Tensor:
    """A tensor that all ranks have alike, laid out as a parameter; nobody communicates."""
    if not _compat.is_dtensor(param):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    spec = _compat.dtensor_spec(param)
    everywhere = DTensor.from_local(whole, spec.mesh, [Replicate()] * spec.mesh.ndim, run_check=False)
    return everywhere.redistribute(spec.mesh, spec.placements)


def like(param: Tensor, shard: Tensor, kind: StateKind = PLAIN) -> Tensor:
    """What belongs to a parameter, given this process's part of it: a DTensor if the parameter is one.

    Args:
        param: The parameter.
        shard: What belongs to the part of it in this process.
        kind: What a state is: dimensions of which it has one entry are not cut.
    """
    if not _compat.is_dtensor(param):
        return shard
    spec = _compat.dtensor_spec(param)
    if not kind.is_like_param:
        spec = _compat.new_dtensor_spec(spec.mesh, _placements_of(param, kind), kind.shape(param), shard.dtype)
    return _compat.dtensor_of(shard, spec)


def part_of(param: Tensor, state: Any, kind: StateKind) -> Any:
    """The part of a parameter's state in this process, if it is laid out as :func:`like` does it; else the state."""
    if not (_compat.is_dtensor(state) and _compat.is_dtensor(param)):
        return state
    spec, mesh = _compat.dtensor_spec(state), _compat.dtensor_spec(param).mesh
    return local(state) if (spec.mesh, spec.placements) == (mesh, _placements_of(param, kind)) else state


def _placements_of(param: Tensor, kind: StateKind) -> tuple[Any, ...]:
    """How a parameter's state is laid out."""
    placements: tuple[Any, ...] = _compat.dtensor_spec(param).placements
    if not kind.reduced:
        return placements
    from torch.distributed.tensor import Replicate

    over = cutting(param, *kind.reduced)
    return tuple(Replicate() if i in over else placement for i, placement in enumerate(placements))


class Reduction:
    """Where sums over ranks meet: those of parameters that lie on the same ranks together, then all in ``norm_group``.

    Args:
        params: All parameters of the optimizer.
        norm_group: A process group, each rank of which has other parameters, or other parts of them, that are no
            DTensors; None: plain parameters are alike on all ranks.
    """

    def __init__(self, params: Sequence[Tensor], norm_group: Any) -> None:
        self.norm_group = norm_group
        sharded = [*filter(_compat.is_dtensor, params)] if has_dtensors(params) else []
        #: A mesh that this process is no rank of: it cannot hear of what is there.
        self._elsewhere = next((_compat.dtensor_spec(p).mesh for p in sharded if not is_here(p)), None)
        meshes = dict.fromkeys(_compat.dtensor_spec(param).mesh for param in filter(is_here, sharded))
        # in the order of sizes: what few ranks have found, the many that come later hear
        by_ranks = {_ranks(mesh): _groups(mesh) for mesh in sorted(meshes, key=lambda mesh: mesh.size())}
        self._groups = [*by_ranks.values()]
        #: Row of :meth:`total`'s argument for each mesh; 0 is that of plain parameters.
        self._row_of = {mesh: 1 + [*by_ranks].index(_ranks(mesh)) for mesh in meshes}

    def __bool__(self) -> bool:
        return bool(self._groups) or self._elsewhere is not None or self.norm_group is not None

    def new(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Zeros to add sums to: squares and marks of bad gradients, for plain parameters and each set of ranks.

        Raises:
            RuntimeError: There are parameters on ranks that this process is none of.
        """
        if self._elsewhere is not None:
            raise RuntimeError(
                "a norm should be that of parameters on this rank, but some are on others only, which it cannot hear "
                f"of: {self._elsewhere}"
            )
        return torch.zeros(1 + len(self._groups), 2, dtype=dtype, device=device)

    def add(
        self, sums: Tensor, cut: Cut | None, squares: Tensor, bad: Tensor | None = None, *, largest: bool = False
    ) -> None:
        """Add what a rank has found in parameters that are cut alike; or keep the ``largest``."""
        row = sums[0 if cut is None else self._row_of[cut.mesh]]
        if largest:
            row[0] = torch.maximum(row[0], squares)
        else:
            row[0].add_(squares, alpha=1.0 if cut is None else cut.weight)
        if bad is not None:
            row[1].add_(bad)

    def total(self, sums: Tensor, *, largest: bool = False) -> Tensor:
        """Squares and marks of all ranks, ``[2]``. Nobody waits on a device."""
        op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
        device = sums.device
        squares, marks = sums[0]
        for row, groups in zip(sums[1:], self._groups, strict=True):
            # every rank of these hears of what is bad elsewhere
            row[1].add_(marks)
            of_ranks, marks = all_reduced(row, groups, op).to(device)
            squares = torch.maximum(squares, of_ranks) if largest else squares + of_ranks
        total = torch.stack([squares, marks])
        return total if self.norm_group is None else all_reduced(total, [self.norm_group], op).to(device)


def _ranks(mesh: Any) -> tuple[int, ...]:
    """The ranks of a mesh; none stand for all."""
    return () if mesh.size() == dist.get_world_size() else tuple(sorted(mesh.mesh.flatten().tolist()))


def _groups(mesh: Any) -> list[Any]:
    """Process groups, in which one after the other a sum is that over all ranks of the mesh."""
    if mesh.size() == dist.get_world_size():
        return [dist.group.WORLD]
    return [mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1]


def all_reduced(numbers: Tensor, groups: Sequence[Any], op: Any) -> Tensor:
    """The sum or maximum over the ranks of all groups, on a device that they can communicate."""
    for group in groups:
        numbers = numbers.to(reachable(numbers.device, group), non_blocking=True)
        dist.all_reduce(numbers, op, group)
    return numbers


def reachable(device: torch.device, group: Any) -> torch.device:
    """Where a group can communicate what lies on ``device``: parameters may have been offloaded."""
    if device.type == "cpu" and dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device
