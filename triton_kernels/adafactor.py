"""Adafactor: averages of rows and columns in place of a second moment. :mod:`.matrix_walk` launches the kernels.

Six launches for all matrices that are cut into the same tiles: sums of squares of rows and columns, a partial result a
program; the averages of rows; those of columns; the mean of each matrix's rows; the length of each update; how long
each step is; the update. Vectors are one row, and need neither averages of rows nor means. Nothing waits for the host,
and sums meet in a fixed order: bitwise repeatable.

Bytes a parameter, float32: grad and param 4 each for the sums, grad 4 for the length, grad 4 and param 4+4 for the
update: 24. The averages and the partial sums of a matrix are a hundredth of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codecs import GROUP, SIGNED8
from .device import FACTOR, SKIP, divide, gradient_factor, lerp, load, load_noise, maximum, read, sqrt, store, write
from .lengths import squared_lengths

RAW = (
    "lr", "beta2_decay", "eps1", "eps2", "d", "weight_decay", "maximize", "hf", "beta1", "scale_parameter",
    "relative_step", "warmup_init",
)  # fmt: skip
HYPER = (
    "factor", "omega", "eps_stat", "eps", "rho", "eps2", "scaled", "d", "decay_lr", "decay_alpha",
    "beta1_c",
)  # fmt: skip

_N_COLUMNS = tl.constexpr(len(HYPER))
_OMEGA, _EPS_STAT, _EPS, _RHO, _EPS2, _SCALED, _D, _DECAY_LR, _DECAY_ALPHA, _BETA1_C = (
    tl.constexpr(i) for i in range(1, len(HYPER))
)
_N_SHAPE = tl.constexpr(8)


@triton.jit
def prepare(raw, scalars):
    lr, beta2_decay, eps1, eps2, d, weight_decay, maximize, hf, beta1, scaled, relative, warmup_init = raw
    step = scalars[0] + 1.0
    largest = tl.where((warmup_init != 0) & (1e-6 * step < lr), 1e-6 * step, lr)
    decreasing = 1.0 / tl.sqrt(step)
    relative_size = tl.where(largest < decreasing, largest, decreasing)
    row = (
        gradient_factor(maximize),
        tl.exp(beta2_decay * tl.log(step)),
        tl.where(hf != 0, eps1, 0.0),
        tl.where(hf != 0, 0.0, eps1),
        tl.where(relative != 0, relative_size, lr),
        eps2,
        scaled,
        d,
        # without weight decay an infinite lr, which bounds nothing, is no NaN
        tl.where((hf != 0) | (weight_decay == 0.0), 0.0, lr * weight_decay),
        tl.where(hf != 0, weight_decay, 0.0),
        1.0 - beta1,
    )
    return row, (step,)


@triton.jit
def _share(program_tensor_ptr, shapes_ptr, TILE: tl.constexpr, N_DIVISOR: tl.constexpr):
    """A program's part of a tensor: which one, its shape and layout, and the first matrix, row and column."""
    pid = tl.program_id(0)
    index = tl.load(program_tensor_ptr + pid)
    shape_ptr = shapes_ptr + index * _N_SHAPE
    n_matrices = tl.load(shape_ptr)
    n_rows = tl.load(shape_ptr + 1)
    n_columns = tl.multiple_of(tl.load(shape_ptr + 2), N_DIVISOR)
    local = pid - tl.load(shape_ptr + 3)
    blocks = tl.cdiv(n_columns, TILE[2])
    strips = tl.cdiv(n_rows, TILE[3])
    block = local % blocks
    strip = local // blocks % strips
    matrices = local // (blocks * strips) * TILE[0] + tl.arange(0, TILE[0]).to(tl.int64)
    columns = block * TILE[2] + tl.arange(0, TILE[2])
    return index, shape_ptr, (n_matrices, n_rows, n_columns), block, strip, matrices, columns


@triton.jit
def _places(shape, matrices, rows, columns, TILE: tl.constexpr):
    """Offsets and mask of a block ``[matrices, rows, columns]``."""
    n_matrices, n_rows, n_columns = shape
    line = matrices[:, None] * n_rows + rows[None, :]
    offsets = line[:, :, None] * n_columns + columns[None, None, :]
    inside = (rows < n_rows)[None, :, None] & (columns < n_columns)[None, None, :]
    if TILE[0] > 1:
        inside &= (matrices < n_matrices)[:, None, None]
    return offsets, tl.broadcast_to(inside, (TILE[0], TILE[1], TILE[2]))


@triton.jit
def _every(shape, matrices, rows, block, N: tl.constexpr, TILE: tl.constexpr):
    """Offsets of every ``N``-th element of a block ``[matrices, rows, columns]`` and mask, both in one dimension."""
    n_matrices, n_rows, n_columns = shape
    columns = block * TILE[2] + tl.arange(0, TILE[2] // N) * N
    line = matrices[:, None] * n_rows + rows[None, :]
    offsets = line[:, :, None] * n_columns + columns[None, None, :]
    inside = (matrices < n_matrices)[:, None, None] & (rows < n_rows)[None, :, None]
    inside &= (columns < n_columns)[None, None, :]
    return tl.reshape(offsets, (offsets.numel,)), tl.reshape(inside, (offsets.numel,))


@triton.constexpr_function
def _has_codes(FORMATS):
    """Whether a first moment, the last role, is kept in codes."""
    return len(FORMATS) > 0 and FORMATS[len(FORMATS) - 1][0] >= SIGNED8.value


@triton.jit
def _groups(shape, matrices, rows, block, FORMATS: tl.constexpr, TILE: tl.constexpr):
    """What :func:`~.device.read` has to know of the groups of a block."""
    if not _has_codes(FORMATS):
        return ()
    else:
        firsts, mask = _every(shape, matrices, rows, block, GROUP, TILE)
        return (firsts // GROUP, mask)


@triton.jit
def _runs(shape, matrices, rows, block, NOISE: tl.constexpr, TILE: tl.constexpr):
    """What :func:`~.codecs.random_bits` may know of a block."""
    if len(NOISE) == 0 or NOISE[0] == 0:
        return ()
    else:
        firsts, _ = _every(shape, matrices, rows, block, NOISE[0], TILE)
        return (firsts,)


@triton.jit
def _pointers(
    fixed_ptr,
    grads_ptr,
    tensor,
    DTYPES: tl.constexpr,
    FORMATS: tl.constexpr,
    N_AVERAGES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Of parameter, gradient, states and companions; averages, and scales, which come last, begin anywhere."""
    N_ROLES: tl.constexpr = len(DTYPES) - 1
    N_ALIGNED: tl.constexpr = N_ROLES - 1 if _has_codes(FORMATS) else N_ROLES
    pointers = (
        _pointer(fixed_ptr, tensor * N_ROLES, DTYPES[0], ALIGNMENT),
        _pointer(grads_ptr, tensor, DTYPES[1], ALIGNMENT),
    )
    for i in tl.static_range(1, N_ROLES):
        if i <= N_AVERAGES or i >= N_ALIGNED:
            pointers = pointers + (_pointer(fixed_ptr, tensor * N_ROLES + i, DTYPES[1 + i], 1),)
        else:
            pointers = pointers + (_pointer(fixed_ptr, tensor * N_ROLES + i, DTYPES[1 + i], ALIGNMENT),)
    return pointers


@triton.jit
def _pointer(addresses_ptr, index, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    return tl.multiple_of(tl.load(addresses_ptr + index).to(tl.pointer_type(DTYPE)), ALIGNMENT)


# partial results begin anywhere, and what stands in for a scalar that is not there is no scalar
@triton.jit(do_not_specialize_on_alignment=["grad_scale_ptr", "control_ptr", "norms_ptr", "bad_ptr"])
def _adafactor_sums_kernel(
    fixed_ptr,  # int64 [n, n_roles]: params, averages of rows, of columns, ..., companions
    grads_ptr,  # int64 [n]; 0 where there is none in this step
    tensor_ptr,  # int32 [n_tensors]: row of the two above
    shapes_ptr,  # int64 [n_tensors, 8], see MatrixTable
    program_tensor_ptr,  # int32 [n_programs]
    grad_scale_ptr,  # float32 scalar
    control_ptr,  # float64 [3]: NORM, FACTOR, SKIP
    row_sums_ptr,  # written: for each block of columns, sums of squares of each row
    column_sums_ptr,  # written: for each strip of rows, sums of squares of each column
    lengths_ptr,  # float64 [n_programs, 2], written: squares of parameters
    norms_ptr,  # float64 [n_programs], written: squares of gradients
    bad_ptr,  # float64 [n_programs], written: 1 where a gradient is infinite or NaN
    DTYPES: tl.constexpr,  # of params, grads, states and companions
    FORMATS: tl.constexpr,  # see storage.constants
    COMPUTE: tl.constexpr,
    FACTORED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CONTROL: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    N_DIVISOR: tl.constexpr,
    TILE: tl.constexpr,
):
    if HAS_CONTROL:
        if tl.load(control_ptr + SKIP) != 0:
            return
    # before anything else: what is held across the branch takes registers
    tensor = tl.load(tensor_ptr + tl.load(program_tensor_ptr + tl.program_id(0)))
    if tl.load(grads_ptr + tensor) == 0:
        tl.store(norms_ptr + tl.program_id(0), 0.0)
        tl.store(bad_ptr + tl.program_id(0), 0.0)
        return
    _, shape_ptr, shape, block, strip, matrices, columns = _share(program_tensor_ptr, shapes_ptr, TILE, N_DIVISOR)
    n_matrices, n_rows, n_columns = shape
    pointers = _pointers(fixed_ptr, grads_ptr, tensor, DTYPES, FORMATS, 1 + FACTORED, ALIGNMENT)
    row_sums_ptr += tl.load(shape_ptr + 4) + block * n_matrices * n_rows
    column_sums_ptr += tl.load(shape_ptr + 5) + strip * n_matrices * n_columns
    scale = tl.full((), 1.0, COMPUTE)
    if HAS_SCALE:
        scale = 1.0 / tl.load(grad_scale_ptr).to(COMPUTE)
    if HAS_CONTROL:
        scale = tl.load(control_ptr + FACTOR).to(COMPUTE)
    # not tl.zeros: Triton 3.6 takes no plain numbers, which items of a constexpr are, as a function's arguments
    of_columns = tl.full((TILE[0], TILE[1], TILE[2]), 0.0, COMPUTE)
    of_params = tl.full((TILE[0], TILE[1], TILE[2]), 0.0, COMPUTE)
    bad = tl.full((TILE[0], TILE[1], TILE[2]), 0, tl.int32)
    for i in range(0, TILE[3], TILE[1]):
        rows = strip * TILE[3] + i + tl.arange(0, TILE[1])
        offsets, mask = _places(shape, matrices, rows, columns, TILE)
        g = load(pointers[1] + offsets, mask, COMPUTE) * scale
        p = read((pointers, offsets, mask, (), (), (), FORMATS), 0, COMPUTE)
        square = g * g
        of_columns += square
        of_params += p * p
        # neither NaN nor infinite equals itself times zero
        bad |= (g * 0.0 != 0.0).to(tl.int32)
        if FACTORED:
            inside = (matrices[:, None] < n_matrices) & (rows[None, :] < n_rows)
            places = matrices[:, None] * n_rows + rows[None, :]
            tl.store(row_sums_ptr + places, tl.sum(square, axis=2), mask=inside)
    inside = (matrices[:, None] < n_matrices) & (columns[None, :] < n_columns)
    places = matrices[:, None] * n_columns + columns[None, :]
    tl.store(column_sums_ptr + places, tl.sum(of_columns, axis=1), mask=inside)
    pid = tl.program_id(0)
    tl.store(lengths_ptr + 2 * pid, tl.sum(tl.ravel(of_params), axis=0).to(tl.float64))
    tl.store(norms_ptr + pid, tl.sum(tl.ravel(of_columns), axis=0).to(tl.float64))
    tl.store(bad_ptr + pid, tl.max(tl.ravel(bad), axis=0).to(tl.float64))


@triton.jit
def _entry_totals(entries_ptr, index, start, sums_ptr, COMPUTE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Partial sums added up, for a block of a tensor's rows or columns; places of these among them, and a mask."""
    n_entries = tl.load(entries_ptr + index * 4)
    n_sums = tl.load(entries_ptr + index * 4 + 1)
    sums_ptr += tl.load(entries_ptr + index * 4 + 2)
    places = start + tl.arange(0, BLOCK_SIZE)
    mask = places < n_entries
    total = tl.zeros((BLOCK_SIZE,), COMPUTE)
    for i in range(n_sums):
        total += tl.load(sums_ptr + i * n_entries + places, mask=mask, other=0.0)
    return total, places, mask


@triton.jit
def _adafactor_totals_kernel(
    grads_ptr,  # int64 [n]; 0 where there is none in this step
    tensor_ptr,  # int32 [n_tensors]
    entries_ptr,  # int64 [n_tensors, 4], see MatrixTable
    part_entries_ptr,  # int64 [n_tensors, 4], see Parts
    chunk_tensor_ptr,  # int32 [n_programs]
    chunk_start_ptr,  # int64 [n_programs]
    control_ptr,  # float64 [3]: NORM, FACTOR, SKIP
    sums_ptr,  # partial sums
    totals_ptr,  # written, one an entry
    COMPUTE: tl.constexpr,
    HAS_CONTROL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    if HAS_CONTROL:
        if tl.load(control_ptr + SKIP) != 0:
            return
    pid = tl.program_id(0)
    index = tl.load(chunk_tensor_ptr + pid)
    if tl.load(grads_ptr + tl.load(tensor_ptr + index)) == 0:
        return
    start = tl.load(chunk_start_ptr + pid)
    total, places, mask = _entry_totals(entries_ptr, index, start, sums_ptr, COMPUTE, BLOCK_SIZE)
    tl.store(totals_ptr + tl.load(part_entries_ptr + index * 4 + 2) + places, total, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["grad_scale_ptr"])
def _adafactor_average_kernel(
    fixed_ptr,  # int64 [n, n_roles]
    grads_ptr,  # int64 [n]; 0 where there is none in this step
    tensor_ptr,  # int32 [n_tensors]
    entries_ptr,  # int64 [n_tensors, 4], see MatrixTable
    chunk_tensor_ptr,  # int32 [n_programs]
    chunk_start_ptr,  # int64 [n_programs]
    rows_ptr,  # int32 [n]: row of hyper_ptr
    hyper_ptr,  # float64 [n_rows, 11]
    grad_scale_ptr,  # float32 scalar
    control_ptr,  # float64 [3]: NORM, FACTOR, SKIP
    sums_ptr,  # partial sums
    DTYPE: tl.constexpr,  # of the averages
    COMPUTE: tl.constexpr,
    N_ROLES: tl.constexpr,
    ROLE: tl.constexpr,
    MEASURED: tl.constexpr,  # the sums are of gradients that are not clipped yet
    HAS_SCALE: tl.constexpr,  # but divided by the loss scale
    HAS_CONTROL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    if HAS_CONTROL:
        if tl.load(control_ptr + SKIP) != 0:
            return
    pid = tl.program_id(0)
    index = tl.load(chunk_tensor_ptr + pid)
    tensor = tl.load(tensor_ptr + index)
    if tl.load(grads_ptr + tensor) == 0:
        return
    start = tl.load(chunk_start_ptr + pid)
    total, places, mask = _entry_totals(entries_ptr, index, start, sums_ptr, COMPUTE, BLOCK_SIZE)
    n_elements = tl.load(entries_ptr + index * 4 + 3).to(COMPUTE)
    scale = tl.full((), 1.0, tl.float64)
    if MEASURED:
        # when the sums were made, the norm was not known
        scale = tl.load(control_ptr + FACTOR)
        if HAS_SCALE:
            scale *= tl.load(grad_scale_ptr).to(tl.float64)
    row_ptr = hyper_ptr + tl.load(rows_ptr + tensor) * _N_COLUMNS
    omega = tl.load(row_ptr + _OMEGA).to(COMPUTE)
    mean = divide(total, n_elements) * (scale * scale).to(COMPUTE) + tl.load(row_ptr + _EPS_STAT).to(COMPUTE)
    average_ptr = _pointer(fixed_ptr, tensor * N_ROLES + ROLE, DTYPE, 1) + places
    store(average_ptr, lerp(load(average_ptr, mask, COMPUTE), mean, omega), mask)


@triton.jit
def _adafactor_mean_kernel(
    fixed_ptr,  # int64 [n, n_roles]
    tensor_ptr,  # int32 [n_tensors]
    shapes_ptr,  # int64 [n_tensors, 8]
    chunk_tensor_ptr,  # int32 [n_programs]
    chunk_start_ptr,  # int64 [n_programs]: first matrix
    rows_ptr,  # int32 [n]: row of hyper_ptr
    hyper_ptr,  # float64 [n_rows, 11]
    control_ptr,  # float64 [3]: NORM, FACTOR, SKIP
    means_ptr,  # written: of the logical rows' averages, one a matrix; of a part of them, the sum
    DTYPE: tl.constexpr,  # of the averages
    COMPUTE: tl.constexpr,
    N_ROLES: tl.constexpr,
    ROLE: tl.constexpr,  # 1 where logical rows are rows in memory, else 2
    WHOLE: tl.constexpr,  # there are no others
    HAS_CONTROL: tl.constexpr,
    MATRICES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    if HAS_CONTROL:
        if tl.load(control_ptr + SKIP) != 0:
            return
    pid = tl.program_id(0)
    index = tl.load(chunk_tensor_ptr + pid)
    tensor = tl.load(tensor_ptr + index)
    n_matrices = tl.load(shapes_ptr + index * _N_SHAPE)
    length = tl.load(shapes_ptr + index * _N_SHAPE + ROLE)
    average_ptr = _pointer(fixed_ptr, tensor * N_ROLES + ROLE, DTYPE, 1)
    matrices = tl.load(chunk_start_ptr + pid) + tl.arange(0, MATRICES)
    total = tl.zeros((MATRICES, BLOCK_SIZE), COMPUTE)
    for i in range(0, length, BLOCK_SIZE):
        places = i + tl.arange(0, BLOCK_SIZE)
        mask = (matrices[:, None] < n_matrices) & (places[None, :] < length)
        total += load(average_ptr + matrices[:, None] * length + places[None, :], mask, COMPUTE)
    mean = tl.sum(total, axis=1)
    if WHOLE:
        eps = tl.load(hyper_ptr + tl.load(rows_ptr + tensor) * _N_COLUMNS + _EPS).to(COMPUTE)
        mean = maximum(divide(mean, length.to(COMPUTE)), eps)
    means_ptr += tl.load(shapes_ptr + index * _N_SHAPE + 6)
    tl.store(means_ptr + matrices, mean, mask=matrices < n_matrices)


@triton.jit
def _row_roots(row_ptr, means_ptr, shape, matrices, rows, COMPUTE: tl.constexpr):
    """Roots of rows' averages over their mean, ``[matrices, rows]``."""
    n_matrices, n_rows, _ = shape
    mask = (matrices[:, None] < n_matrices) & (rows[None, :] < n_rows)
    average = tl.load(row_ptr + matrices[:, None] * n_rows + rows[None, :], mask=mask, other=1.0).to(COMPUTE)
    mean = tl.load(means_ptr + matrices, mask=matrices < n_matrices, other=1.0)
    return sqrt(divide(average, mean[:, None]))


@triton.jit
def _direction(g, root, eps):
    """The gradient over the root of the second moment."""
    return divide(g, maximum(root, eps))


@triton.jit
def _take_step(block, u, size, decay, beta1_c, FACTORED: tl.constexpr, MOMENT: tl.constexpr):
    """The first moment, if any, and the parameter; ``block`` as for :func:`~.device.read`."""
    p = read(block, 0, u.dtype)
    u *= size
    if MOMENT:
        u = lerp(read(block, 2 + FACTORED, u.dtype), u, beta1_c)
        write(block, 2 + FACTORED, u)
    write(block, 0, p * decay - u)


@triton.jit(do_not_specialize_on_alignment=["steps_ptr"])
def _adafactor_update_kernel(
    fixed_ptr,  # int64 [n, n_roles]
    grads_ptr,  # int64 [n]; 0 where there is none in this step
    tensor_ptr,  # int32 [n_tensors]
    shapes_ptr,  # int64 [n_tensors, 8]
    program_tensor_ptr,  # int32 [n_programs]
    rows_ptr,  # int32 [n]: row of hyper_ptr
    hyper_ptr,  # float64 [n_rows, 11]
    control_ptr,  # float64 [3]: NORM, FACTOR, SKIP
    means_ptr,  # of the rows' averages, one a matrix
    sizes_ptr,  # float64 [n_tensors, 2]: size of the step, factor of the parameter
    lengths_ptr,  # float64 [n_programs, 2], written: squares of updates, beside those of parameters
    noise_ptr,  # int64 [n, 5], see Noise
    steps_ptr,  # int64 [n], see Noise
    DTYPES: tl.constexpr,  # of params, grads, states and companions
    FORMATS: tl.constexpr,  # see storage.constants, as the next one
    NOISE: tl.constexpr,
    COMPUTE: tl.constexpr,
    FACTORED: tl.constexpr,
    MOMENT: tl.constexpr,
    ONLY_LENGTHS: tl.constexpr,  # write squares of updates; False: take the step
    HAS_CONTROL: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    N_DIVISOR: tl.constexpr,
    TILE: tl.constexpr,
):
    if HAS_CONTROL:
        if tl.load(control_ptr + SKIP) != 0:
            return
    # before anything else: what is held across the branch takes registers
    tensor = tl.load(tensor_ptr + tl.load(program_tensor_ptr + tl.program_id(0)))
    if tl.load(grads_ptr + tensor) == 0:
        return
    index, shape_ptr, shape, block, strip, matrices, columns = _share(program_tensor_ptr, shapes_ptr, TILE, N_DIVISOR)
    n_matrices, _, n_columns = shape
    row_ptr = hyper_ptr + tl.load(rows_ptr + tensor) * _N_COLUMNS
    eps = tl.load(row_ptr + _EPS).to(COMPUTE)
    pointers = _pointers(fixed_ptr, grads_ptr, tensor, DTYPES, FORMATS, 1 + FACTORED, ALIGNMENT)
    column_ptr = pointers[3 if FACTORED else 2]
    inside = (matrices[:, None] < n_matrices) & (columns[None, :] < n_columns)
    of_columns = tl.load(column_ptr + matrices[:, None] * n_columns + columns[None, :], mask=inside, other=1.0)
    # roots of factors: their product stays in range where that of the factors would not
    of_columns = sqrt(of_columns.to(COMPUTE))
    if HAS_CONTROL:
        # in place of each gradient; a loss scale may be so large that squares of scaled gradients overflow
        # what an infinite norm clips to 0 goes on to be 0, and 0 / 0 would not
        inverse = (1.0 / maximum(tl.load(control_ptr + FACTOR), 1.2e-38)).to(COMPUTE)
        of_columns *= inverse
        eps *= inverse
    means_ptr += tl.load(shape_ptr + 6)
    # not before: what is held for long takes registers
    average_ptr = _pointer(fixed_ptr, tensor * (len(DTYPES) - 1) + 1, DTYPES[2], 1)
    if not ONLY_LENGTHS:
        size = (tl.load(sizes_ptr + 2 * index) * tl.load(row_ptr)).to(COMPUTE)
        decay = tl.load(sizes_ptr + 2 * index + 1).to(COMPUTE)
        beta1_c = tl.load(row_ptr + _BETA1_C).to(COMPUTE)
        noise, _ = load_noise(noise_ptr, steps_ptr, tensor, 0, NOISE)
    squares = tl.full((TILE[0], TILE[1], TILE[2]), 0.0, COMPUTE)
    for i in range(0, TILE[3], TILE[1]):
        rows = strip * TILE[3] + i + tl.arange(0, TILE[1])
        offsets, mask = _places(shape, matrices, rows, columns, TILE)
        g = load(pointers[1] + offsets, mask, COMPUTE)
        root = of_columns[:, None, :]
        if FACTORED:
            root = _row_roots(average_ptr, means_ptr, shape, matrices, rows, COMPUTE)[:, :, None] * root
        u = _direction(g, root, eps)
        if ONLY_LENGTHS:
            squares += u * u
        else:
            groups = _groups(shape, matrices, rows, block, FORMATS, TILE)
            runs = _runs(shape, matrices, rows, block, NOISE, TILE)
            _take_step(
                (pointers, offsets, mask, groups, runs, noise, FORMATS), u, size, decay, beta1_c, FACTORED, MOMENT
            )
    if ONLY_LENGTHS:
        tl.store(lengths_ptr + 2 * tl.program_id(0) + 1, tl.sum(tl.ravel(squares), axis=0).to(tl.float64))


@triton.jit
def _adafactor_size_kernel(
    tensor_ptr,  # int32 [n_tensors]
    shapes_ptr,  # int64 [n_tensors, 8]
    rows_ptr,  # int32 [n]: row of hyper_ptr
    hyper_ptr,  # float64 [n_rows, 11]
    control_ptr,  # float64 [3]: NORM, FACTOR, SKIP
    lengths_ptr,  # float64 [n_programs, 2]: squares of parameters and of updates
    first_ptr,  # int32 [n_tensors + 1]: program with which a tensor begins
    sizes_ptr,  # float64 [n_tensors, 2], written
    HAS_CONTROL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    if HAS_CONTROL:
        if tl.load(control_ptr + SKIP) != 0:
            return
    index = tl.program_id(0)
    of_params, of_updates = squared_lengths(lengths_ptr, first_ptr, index, BLOCK_SIZE)
    numel = tl.load(shapes_ptr + index * _N_SHAPE + 7).to(tl.float64)
    row_ptr = hyper_ptr + tl.load(rows_ptr + tl.load(tensor_ptr + index)) * _N_COLUMNS
    # comparisons as torch makes them: what is NaN scales nothing, and is in the elements anyway
    eps2 = tl.load(row_ptr + _EPS2)
    rms = tl.sqrt(of_params / numel)
    rms = tl.where(tl.load(row_ptr + _SCALED) != 0, tl.where(rms > eps2, rms, eps2), 1.0)
    alpha = tl.load(row_ptr + _RHO) * rms
    length = tl.sqrt(of_updates / numel) / tl.load(row_ptr + _D)
    tl.store(sizes_ptr + 2 * index, alpha / tl.where(length > 1.0, length, 1.0))
    decay = 1.0 - tl.load(row_ptr + _DECAY_LR) - tl.load(row_ptr + _DECAY_ALPHA) * alpha
    tl.store(sizes_ptr + 2 * index + 1, decay)
