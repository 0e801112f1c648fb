"""Launches of a walk over matrices that keeps averages of rows and columns: see :mod:`.adafactor` for the kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import adafactor
from .device import TRITON_DTYPE, Launcher, compute_dtype, launch
from .lengths import BLOCK_SIZE, lengths_
from .matrix_table import ENTRIES, MatrixTable, Parts, Tile
from .storage import PLAIN, Formats, Storage, packed, packed_dtypes
from .tensor_table import TensorTable

Dtypes = tuple[torch.dtype, ...]


@dataclass
class Sums:
    """Memory of one step: what a launch leaves for the next.

    Attributes:
        rows, columns: Partial sums of squared gradients.
        lengths: float64 ``[n_programs, 2]``, partial sums of squares of parameters and of updates.
        means: One a matrix.
        sizes: float64 ``[n_tensors, 2]``.
    """

    rows: Tensor
    columns: Tensor
    lengths: Tensor
    means: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, table: MatrixTable, dtype: torch.dtype, factored: bool) -> Sums:
        """Memory for a table, to compute in ``dtype``."""

        def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=table.device)

        made = cls(
            empty(table.n_row_sums if factored else 1, dtype=dtype), empty(table.n_column_sums, dtype=dtype),
            empty(table.n_programs, 2), empty(table.n_matrices, dtype=dtype), empty(table.n_tensors, 2),
        )  # fmt: skip
        if table.parts is not None:
            # nobody writes those of parts without a gradient, and other processes read them
            made.lengths.zero_()
        return made


def sums_(
    tensors: TensorTable,
    matrices: MatrixTable,
    grads: Tensor,
    grad_scale: Tensor | None,
    control: Tensor | None,
    sums: Sums,
    norms: Tensor,
    bad: Tensor,
    *,
    factored: bool,
    dtypes: Dtypes,
    storage: Storage = PLAIN,
    aligned: bool,
    warmup: bool = False,
) -> None:
    """Sum squared gradients, divided by ``grad_scale``, and squared parameters.

    Args:
        tensors: Roles: params, averages of rows and of columns (in memory; one of both for vectors), first moments,
            then each companion.
        matrices: Which of them, and how they are cut.
        grads: int64, addresses; 0 where there is no gradient: then only ``norms`` and ``bad`` are written, 0.
        grad_scale: float32 scalar, the loss scale to divide gradients by first, or None.
        control: float64 ``[3]`` from :func:`~.grad_norm.finish_`, where it is known already: the gradients' factor, in
            place of ``grad_scale``, and whether to do nothing.
        sums: Written.
        norms, bad: float64 ``[n_programs]``, written: squares of gradients, and marks of infinite and NaN ones.
        factored: False for vectors.
        dtypes: Of params, grads, each state and each companion.
        storage: How they are kept.
        aligned: Addresses are multiples of 16 bytes, and so are rows.
        warmup: Compile, launch nothing.
    """
    launcher = _sums_launcher(
        factored, dtypes, storage.formats, aligned, matrices.tile, tensors.size.num_warps, grad_scale is not None,
        control is not None,
    )  # fmt: skip
    launch(
        launcher, matrices.n_programs,
        tensors.fixed, grads, matrices.tensor, matrices.shapes, matrices.program_tensor,
        norms if grad_scale is None else grad_scale, norms if control is None else control,
        sums.rows, sums.columns, sums.lengths, norms, bad, warmup=warmup,
    )  # fmt: skip


@cache
def _sums_launcher(
    factored: bool,
    dtypes: Dtypes,
    formats: Formats,
    aligned: bool,
    tile: Tile,
    num_warps: int,
    has_scale: bool,
    has_control: bool,
) -> Launcher:
    return Launcher(
        adafactor._adafactor_sums_kernel, DTYPES=packed_dtypes(dtypes),
        FORMATS=packed(formats), COMPUTE=compute_dtype(dtypes[0]), FACTORED=factored, HAS_SCALE=has_scale,
        HAS_CONTROL=has_control, **_widths(dtypes, aligned), TILE=tuple(tile), num_warps=num_warps,
    )  # fmt: skip


def update_(
    tensors: TensorTable,
    matrices: MatrixTable,
    grads: Tensor,
    hyper: Tensor,
    grad_scale: Tensor | None,
    control: Tensor | None,
    sums: Sums,
    *,
    measured: bool,
    variant: tuple[bool, ...],
    dtypes: Dtypes,
    storage: Storage = PLAIN,
    aligned: bool,
    is_straight: bool = False,
    whole_rows: bool = True,
    warmup: bool = False,
) -> Iterator[dict[str, Sequence[Tensor]]]:
    """Update every tensor of ``matrices`` in place, from the sums that :func:`sums_` left.

    Args:
        tensors, matrices, grads, grad_scale, control, sums, dtypes, storage, aligned, warmup: As for :func:`sums_`.
        measured: The sums were made without ``control``, of gradients that are not clipped.
        hyper: float64 ``[n_rows, len(adafactor.HYPER)]``; ``tensors.rows`` says which is whose.
        variant: Whether tensors have rows and columns, lie in memory the other way round, have a first moment.
        is_straight: Every eight elements of a row are neighbours also in the whole parameter, and begin at a multiple.
        whole_rows: Of parts of tensors: their (logical) rows are whole.

    Yields:
        Only of parts of tensors, what is to be added up in place over all parts, by name, an entry each tensor: sums of
        ``"rows"`` and ``"columns"``, with ``"means"`` (averages of rows, added up) or, if rows are not whole, before
        them; then ``"lengths"``.
    """
    factored, transposed, _ = variant
    parts = matrices.parts
    kernels = _launchers(
        variant, dtypes, storage.formats, aligned, is_straight, matrices.tile, matrices.matrices_per_mean,
        tensors.size.num_warps, parts is None, measured, grad_scale is not None, control is not None,
    )  # fmt: skip
    some_control = hyper if control is None else control
    noise = storage.noise_of(tensors)

    def average(which: int, entries: Tensor, partials: Tensor) -> None:
        chunk_tensor, chunk_start = matrices.entry_chunks[which]
        launch(
            kernels.averages[which], len(chunk_tensor),
            tensors.fixed, grads, matrices.tensor, entries, chunk_tensor, chunk_start, tensors.rows,
            hyper, hyper if grad_scale is None else grad_scale, some_control, partials, warmup=warmup,
        )  # fmt: skip

    def mean() -> None:
        chunk_tensor, chunk_start = matrices.mean_chunks
        launch(
            kernels.mean, len(chunk_tensor), tensors.fixed, matrices.tensor, matrices.shapes, chunk_tensor, chunk_start,
            tensors.rows, hyper, some_control, sums.means, warmup=warmup,
        )  # fmt: skip

    if not factored:
        # the only average of a vector is that of its columns
        average(1, matrices.entries[1], sums.columns)
    elif parts is None:
        for which, partials in enumerate((sums.rows, sums.columns)):
            average(which, matrices.entries[which], partials)
        mean()
    else:
        totals = [torch.zeros(sum(n), dtype=sums.rows.dtype, device=matrices.device) for n in parts.n_entries]
        for which, partials in enumerate((sums.rows, sums.columns)):
            chunk_tensor, chunk_start = matrices.entry_chunks[which]
            launch(
                kernels.totals, len(chunk_tensor), grads, matrices.tensor, matrices.entries[which],
                parts.entries[which], chunk_tensor, chunk_start, some_control, partials, totals[which], warmup=warmup,
            )  # fmt: skip
        of_rows, of_columns = (total.split(n) for total, n in zip(totals, parts.n_entries, strict=True))
        found = {"columns": of_rows, "rows": of_columns} if transposed else {"rows": of_rows, "columns": of_columns}
        means = {"means": sums.means.split(parts.n_matrices)}
        logical = int(transposed)
        if not whole_rows:
            yield found
        average(logical, parts.entries[logical], totals[logical])
        mean()
        yield {**found, **means} if whole_rows else means
        average(1 - logical, parts.entries[1 - logical], totals[1 - logical])
        _finish_means_(sums.means, parts, logical, hyper, tensors.rows[matrices.tensor.long()])
    walk = (
        tensors.fixed, grads, matrices.tensor, matrices.shapes, matrices.program_tensor, tensors.rows, hyper,
        some_control, sums.means, sums.sizes, sums.lengths, *noise,
    )  # fmt: skip
    launch(kernels.length, matrices.n_programs, *walk, warmup=warmup)
    lengths, first = sums.lengths, matrices.first_program
    if parts is not None:
        lengths, first = lengths_(lengths, first, control, warmup=warmup)
        yield {"lengths": lengths.unbind()}
    launch(
        kernels.size, matrices.n_tensors, matrices.tensor, matrices.shapes, tensors.rows, hyper, some_control,
        lengths, first, sums.sizes, warmup=warmup,
    )  # fmt: skip
    launch(kernels.update, matrices.n_programs, *walk, warmup=warmup)


def _finish_means_(means: Tensor, parts: Parts, role: int, hyper: Tensor, rows: Tensor) -> None:
    """Make means of sums over all parts, not below eps, as the kernel does with those of whole tensors."""
    eps = hyper.view(-1, len(adafactor.HYPER))[:, adafactor.HYPER.index("eps")]
    eps = eps[rows[parts.tensor_of_matrix].long()].to(means.dtype)
    torch.maximum(means.div_(parts.lengths[role]), eps, out=means)


class _Variants(NamedTuple):
    """The kernels of :func:`update_`; ``averages`` of rows and of columns."""

    averages: tuple[Launcher, Launcher]
    totals: Launcher
    mean: Launcher
    length: Launcher
    size: Launcher
    update: Launcher


@cache
def _launchers(
    variant: tuple[bool, ...],
    dtypes: Dtypes,
    formats: Formats,
    aligned: bool,
    is_straight: bool,
    tile: Tile,
    matrices_per_mean: int,
    num_warps: int,
    whole: bool,
    measured: bool,
    has_scale: bool,
    has_control: bool,
) -> _Variants:
    factored, transposed, moment = variant
    common: dict[str, Any] = {"COMPUTE": compute_dtype(dtypes[0]), "HAS_CONTROL": has_control}
    roles = {"N_ROLES": len(dtypes) - 1}
    storage = {"FORMATS": packed(formats)}
    width = 16 // max(dtype.itemsize for dtype in walked(dtypes, factored, formats))
    if not is_straight or width > tile.columns:
        width = 0
    state = TRITON_DTYPE[dtypes[2]]
    # of a vector, which has no averages of rows, those of columns are the first
    rows, columns = (
        Launcher(
            adafactor._adafactor_average_kernel, DTYPE=state, ROLE=role, MEASURED=measured, HAS_SCALE=has_scale,
            BLOCK_SIZE=ENTRIES, num_warps=2, **common, **roles,
        )
        for role in (1, 2 if factored else 1)
    )  # fmt: skip
    length, update = (
        Launcher(
            adafactor._adafactor_update_kernel, DTYPES=packed_dtypes(dtypes), FACTORED=factored,
            MOMENT=moment, ONLY_LENGTHS=only_lengths, NOISE=formats.noise(width), **_widths(dtypes, aligned),
            TILE=tuple(tile), num_warps=num_warps, **common, **storage,
        )
        for only_lengths in (True, False)
    )  # fmt: skip
    return _Variants(
        (rows, columns),
        Launcher(
            adafactor._adafactor_totals_kernel, COMPUTE=common["COMPUTE"], HAS_CONTROL=has_control, BLOCK_SIZE=ENTRIES,
            num_warps=2,
        ),
        Launcher(
            adafactor._adafactor_mean_kernel, DTYPE=state, ROLE=2 if transposed else 1, WHOLE=whole,
            MATRICES=matrices_per_mean, BLOCK_SIZE=1024 if matrices_per_mean == 1 else tile.rows, num_warps=4, **common,
            **roles,
        ),
        length,
        Launcher(adafactor._adafactor_size_kernel, HAS_CONTROL=has_control, BLOCK_SIZE=BLOCK_SIZE, num_warps=2),
        update,
    )  # fmt: skip


def _widths(dtypes: Dtypes, aligned: bool) -> dict[str, int]:
    """What the compiler may take addresses and lengths of rows to be multiples of."""
    return {"ALIGNMENT": 16 if aligned else 1, "N_DIVISOR": row_divisor(dtypes) if aligned else 1}


def walked(dtypes: Dtypes, factored: bool, formats: Formats) -> list[torch.dtype]:
    """Dtypes of what has an entry an element: not of averages of rows and columns, nor of scales."""
    each = formats.elements_each or [1] * len(dtypes)
    roles = [*zip(dtypes, each, strict=True)]
    return [dtype for dtype, n in roles[:2] + roles[4 if factored else 3 :] if n == 1]


def row_divisor(dtypes: Sequence[torch.dtype]) -> int:
    """Rows whose length is a multiple of it begin at a multiple of 16 bytes, whatever the dtype."""
    return 16 // min(dtype.itemsize for dtype in dtypes)
