"""What kernels share: constants for dtypes, launching, loads and stores, arithmetic that rounds correctly."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .codecs import (
    GROUP,
    MASTER,
    SIGNED8,
    STOCHASTIC,
    decode8,
    encode8,
    join_remainder,
    random_bits,
    split_remainder,
    stochastic,
)

#: Kernels take dtypes as constexpr: an address in a table has none of its own.
TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float64: tl.float64,
}


#: Options every kernel is compiled with. Triton up to 3.9 fuses products and sums by default, 3.10 will not: the
#: numbers must not depend on that, nor on TRITON_DEFAULT_FP_FUSION.
OPTIONS = {"enable_fp_fusion": True}


#: Places in ``control``, float64 ``[3]``: the norm of the gradients, their factor, and a mark that is not 0 if the step
#: must be skipped.
NORM, FACTOR, SKIP = (tl.constexpr(i) for i in range(3))


def compute_dtype(dtype: torch.dtype) -> tl.dtype:
    """Kernels compute in float32; in float64 where the parameter is."""
    return tl.float64 if dtype is torch.float64 else tl.float32


class Launcher:
    """A kernel and its constants: what is compiled once for a device, whatever tensors it is launched on.

    Args:
        kernel: A ``@triton.jit`` function whose constexprs come last. It must not be specialized on what changes
            between launches: addresses in its arguments are multiples of 16, or declared not to be looked at.
        options: Its constexprs, and ``num_warps``.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel = kernel
        self.options = options | OPTIONS
        self._handles: dict[torch.device, tuple[Any, ...]] = {}

    def compile(self, args: Sequence[Any]) -> Any:
        """The compiled kernel, for the current device; Triton keeps it."""
        return self.kernel.warmup(*args, grid=(1,), **self.options)

    def handle(self, device: torch.device, args: Sequence[Any]) -> tuple[Any, ...]:
        """What a launch on ``device`` needs of the loaded kernel; the JIT's own dispatch costs five times a launch."""
        if device not in self._handles or verify:
            with _on(device):
                compiled = self.compile(args)
                constants = [self.options[param.name] for param in self.kernel.params if param.name in self.options]
                handle = compiled, compiled.run, compiled.function, compiled.packed_metadata, constants
            if self._handles.setdefault(device, handle)[0] is not compiled:
                raise AssertionError(f"{self.kernel.__name__} should be compiled once, and is not for {args}")
        return self._handles[device]

    def __call__(self, n_programs: int, args: Sequence[Any]) -> None:
        """Launch, on the current stream of the first argument's device."""
        device = args[0].device
        compiled, run, function, metadata, constants = self._handles.get(device) or self.handle(device, args)
        gpu = driver.active
        if gpu.get_current_device() != (device.index or 0):
            with torch.cuda.device(device):
                self(n_programs, args)
            return
        stream = gpu.get_current_stream(device.index or 0)
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        # a profiler's; since Triton 3.5 they are chains, mostly empty
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            about = compiled.launch_metadata((n_programs, 1, 1), stream, *args, *constants)
        else:
            about = enter = leave = None
        run(n_programs, 1, 1, stream, function, metadata, about, enter, leave, *args, *constants)


#: Look whether launches would be compiled anew (a test's).
verify = False


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton compiles for the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch(launcher: Launcher, n_programs: int, *args: Any, warmup: bool = False) -> None:
    """Launch on a one-dimensional grid; with ``warmup`` it is only compiled and loaded."""
    if isinstance(launcher.kernel, JITFunction):
        if warmup or verify:
            launcher.handle(args[0].device, args)
        if n_programs and not warmup:
            launcher(n_programs, args)
    elif n_programs and not warmup:
        # the interpreter compiles nothing
        with _on(args[0].device):
            launcher.kernel[(n_programs,)](*args, **launcher.options)


@triton.jit
def chunk(grads_ptr, chunk_tensor_ptr, chunk_start_ptr, numels_ptr, CHUNK_SIZE: tl.constexpr):
    """A program's share: which tensor, from which element on, and how many elements are left there.

    A gradient at address 0 is missing in this step: nothing is left of its tensor.
    """
    pid = tl.program_id(0)
    tensor = tl.load(chunk_tensor_ptr + pid)
    start = tl.multiple_of(tl.load(chunk_start_ptr + pid), CHUNK_SIZE)
    remaining = tl.load(numels_ptr + tensor) - start
    # not fewer than none: the walk counts in int32
    return tensor, start, tl.where(tl.load(grads_ptr + tensor) != 0, remaining, 0)


@triton.jit
def for_each_block(
    BLOCK: tl.constexpr,
    CONSTANTS: tl.constexpr,
    carry,
    pointers,
    args,
    remaining,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    is_straight=True,
):
    """``carry = BLOCK(carry, pointers, args, first, offsets, mask, CONSTANTS)`` over a chunk; returns the last.

    ``first`` is the element of the chunk with which a block begins.

    A mask that comes from a loaded size forbids 128-bit accesses, so only a tensor's last chunk has one. All chunks of
    a tensor of which a pointer, to the parameter, gradient or a state, is no multiple of 16 go the same narrow way, and
    those that are not ``is_straight``. Blocks that carry nothing are smaller there, and have two dimensions.
    """
    # the compiler lays all loads of one shape out like the widest of them, and each store as its own address allows:
    # in blocks of one shape, values would get from narrow loads to narrow stores through shared memory
    ROW: tl.constexpr = BLOCK_SIZE if BLOCK_SIZE < GROUP else GROUP
    # an access an element takes registers: no more than four a thread
    ROWS: tl.constexpr = 4 if BLOCK_SIZE > 4 * ROW else BLOCK_SIZE // ROW
    NARROW_SIZE: tl.constexpr = BLOCK_SIZE if len(carry) else ROWS * ROW
    remainder = pointers[0].to(tl.int64) % 16
    for role in tl.static_range(1, len(pointers)):
        remainder |= pointers[role].to(tl.int64) % 16
    if (remaining >= CHUNK_SIZE) & (remainder == 0) & is_straight:
        aligned = ()
        for role in tl.static_range(len(pointers)):
            aligned = aligned + (_aligned(pointers[role]),)
        for i in range(0, CHUNK_SIZE, BLOCK_SIZE):
            carry = BLOCK(carry, aligned, args, i, i + tl.arange(0, BLOCK_SIZE), None, CONSTANTS)
    else:
        for i in range(0, tl.minimum(remaining, CHUNK_SIZE).to(tl.int32), NARROW_SIZE):
            if len(carry):
                offsets = i + tl.arange(0, BLOCK_SIZE)
            else:
                offsets = i + tl.arange(0, ROWS)[:, None] * ROW + tl.arange(0, ROW)[None, :]
            carry = BLOCK(carry, pointers, args, i, offsets, offsets < remaining, CONSTANTS)
    return carry


@triton.jit
def _aligned(pointer):
    """The same address, of which the compiler sees that it is a multiple of 16; a hint would be for all of its uses."""
    return tl.multiple_of((pointer.to(tl.int64) // 16 * 16).to(pointer.dtype), 16)


@triton.jit
def chunk_pointer(addresses_ptr, index, start, DTYPE: tl.constexpr):
    """The address of element ``start`` of tensor ``index``."""
    return tl.load(addresses_ptr + index).to(tl.pointer_type(DTYPE)) + start


@triton.jit
def chunk_pointers(fixed_ptr, grads_ptr, tensor, start, DTYPES: tl.constexpr, EACH: tl.constexpr = ()):
    """Of parameter, gradient, states and companions, whose dtypes are ``DTYPES``.

    An entry of each is for so many elements as ``EACH`` says; for one where that is empty.
    """
    N_ROLES: tl.constexpr = len(DTYPES) - 1
    pointers = (
        chunk_pointer(fixed_ptr, tensor * N_ROLES, start, DTYPES[0]),
        chunk_pointer(grads_ptr, tensor, start, DTYPES[1]),
    )
    for i in tl.static_range(1, N_ROLES):
        if len(EACH):
            first = start // EACH[1 + i]
        else:
            first = start
        pointers = pointers + (chunk_pointer(fixed_ptr, tensor * N_ROLES + i, first, DTYPES[1 + i]),)
    return pointers


@triton.jit
def load_noise(noise_ptr, steps_ptr, tensor, start, NOISE: tl.constexpr):
    """What random bits follow from, for :func:`~.codecs.random_bits`, and whether eights are neighbours in the whole.

    Args:
        noise_ptr, steps_ptr: See :class:`~.storage.Noise`.
        tensor: Whose.
        start: Its element from which offsets are counted.
        NOISE: ``(elements of a role that a thread has in a row, whether steps are addresses)``; empty: none is needed.
    """
    if len(NOISE) == 0:
        return (), True
    else:
        row_ptr = noise_ptr + tensor * 5
        seed = tl.load(row_ptr)
        step = tl.load(steps_ptr + tensor)
        if NOISE[1]:
            step = tl.load(step.to(tl.pointer_type(tl.float32)))
        first = tl.load(row_ptr + 2)
        gap = tl.load(row_ptr + 4)
        place = (first, tl.load(row_ptr + 3), gap)
        key = (seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
        stream = tl.load(row_ptr + 1).to(tl.uint32)
        return (key, step.to(tl.uint32), stream, start, place), (first % 8 == 0) & (gap == 0)


@triton.jit
def load_row(hyper_ptr, row, N_COLUMNS: tl.constexpr, COMPUTE: tl.constexpr):
    """A hyperparameter row: the factor of the gradient, and a tuple of the rest."""
    row_ptr = hyper_ptr + row * N_COLUMNS
    hyper = ()
    for i in tl.static_range(1, N_COLUMNS):
        hyper = hyper + (tl.load(row_ptr + i).to(COMPUTE),)
    return tl.load(row_ptr).to(COMPUTE), hyper


@triton.jit
def sqrt(x):
    """Correctly rounded: ``tl.sqrt`` alone is approximate for float32."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def divide(x, y):
    """Correctly rounded: ``/`` alone is approximate for float32."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def divide_by(x, y):
    """:func:`divide` by the same ``y`` for all elements, to the same bits in half of the instructions.

    The compiler takes ``1 / y`` out of the walk through a chunk. One correction by the remainder, which is exact, then
    rounds correctly (Markstein, 1990), as long as the remainder does not underflow: for roots of float32 it does not.
    """
    if x.dtype == tl.float64:
        return x / y
    else:
        inverse = tl.div_rn(1.0, y)
        quotient = x * inverse
        corrected = tl.fma(tl.fma(-quotient, y, x), inverse, quotient)
        # an infinite one leaves no remainder
        return tl.where(quotient == float("inf"), quotient, corrected)


@triton.jit
def load(pointers, mask, COMPUTE: tl.constexpr):
    """Values in the dtype kernels compute in; 0 where ``mask`` is off. ``mask=None`` is the full-chunk path."""
    if mask is None:
        return tl.load(pointers).to(COMPUTE)
    else:
        return tl.load(pointers, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def store(pointers, values, mask):
    """Round to the stored dtype once, at the end."""
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def read(block, role: tl.constexpr, COMPUTE: tl.constexpr):
    """Values of a role, the parameter (0) or a state, in a block.

    Args:
        block: ``(pointers, offsets, mask, groups, runs, noise, FORMATS)``: as in :func:`for_each_block`; offsets of the
            scales of its groups, in a tuple, and their mask if any; as in :func:`~.codecs.random_bits`; and for each
            role its kind, see :mod:`.codecs`, and its companion's index in ``pointers``, or nothing where all are plain
            tensors. No name may be given to such a tuple, by which its constants would become values.
    """
    pointers, offsets, mask = block[0], block[1], block[2]
    FORMATS: tl.constexpr = block[6]
    # the gradient has no role
    OWN: tl.constexpr = 1 + role if role else 0
    KIND: tl.constexpr = FORMATS[role][0] if len(FORMATS) else 0
    if KIND <= STOCHASTIC:
        return load(pointers[OWN] + offsets, mask, COMPUTE)
    elif KIND == MASTER:
        return load(pointers[FORMATS[role][1]] + offsets, mask, COMPUTE)
    elif KIND < MASTER:
        remainder = load(pointers[FORMATS[role][1]] + offsets, mask, pointers[FORMATS[role][1]].dtype.element_ty)
        visible = load(pointers[OWN] + offsets, mask, pointers[OWN].dtype.element_ty)
        return join_remainder(visible, remainder).to(COMPUTE)
    else:
        codes = load(pointers[OWN] + offsets, mask, tl.float32)
        scales = _load_scales(pointers[FORMATS[role][1]], block[3])
        return decode8(codes, scales, KIND == SIGNED8).to(COMPUTE)


@triton.jit
def read_states(block, N_STATES: tl.constexpr, COMPUTE: tl.constexpr):
    """A tuple of values, one of each state."""
    values = ()
    for i in tl.static_range(N_STATES):
        values = values + (read(block, 1 + i, COMPUTE),)
    return values


@triton.jit
def write(block, role: tl.constexpr, value):
    """Keep a role of a block, rounded once; ``block`` as for :func:`read`."""
    pointers, offsets, mask = block[0], block[1], block[2]
    FORMATS: tl.constexpr = block[6]
    OWN: tl.constexpr = 1 + role if role else 0
    KIND: tl.constexpr = FORMATS[role][0] if len(FORMATS) else 0
    own = pointers[OWN] + offsets
    if KIND == STOCHASTIC:
        bits = random_bits(block[5], role, offsets, block[4])
        tl.store(own, stochastic(value.to(tl.float32), bits, own.dtype.element_ty), mask=mask)
    elif KIND < STOCHASTIC:
        store(own, value, mask)
    elif KIND == MASTER:
        store(own, value, mask)
        store(pointers[FORMATS[role][1]] + offsets, value, mask)
    elif KIND < MASTER:
        companion = pointers[FORMATS[role][1]] + offsets
        visible, remainder = split_remainder(value, companion.dtype.element_ty)
        tl.store(own, visible, mask=mask)
        tl.store(companion, remainder, mask=mask)
    else:
        codes, scales = encode8(value.to(tl.float32), KIND == SIGNED8)
        tl.store(own, codes.to(own.dtype.element_ty), mask=mask)
        _store_scales(pointers[FORMATS[role][1]], scales, block[3])


@triton.jit
def _load_scales(pointer, groups):
    if len(groups) == 1:
        return tl.load(pointer + groups[0])
    else:
        return tl.load(pointer + groups[0], mask=groups[1], other=0.0)


@triton.jit
def _store_scales(pointer, scales, groups):
    if len(groups) == 1:
        tl.store(pointer + groups[0], scales)
    else:
        tl.store(pointer + groups[0], scales, mask=groups[1])


@triton.jit
def as_stored(block, i: tl.constexpr, value):
    """State ``i`` as a plain tensor keeps it, for algorithms that go on with that; else the value itself."""
    FORMATS: tl.constexpr = block[6]
    KIND: tl.constexpr = FORMATS[1 + i][0] if len(FORMATS) else 0
    if KIND == 0:
        return value.to(block[0][2 + i].dtype.element_ty).to(value.dtype)
    else:
        return value


@triton.jit
def groups_of(first, offsets, mask, EACH: tl.constexpr):
    """What :func:`read` has to know of the groups of a block of a chunk."""
    if len(EACH) == 0:
        return ()
    else:
        groups = first // GROUP + tl.arange(0, offsets.numel // GROUP)
        if mask is None:
            return (groups,)
        else:
            # no group is there in part
            grouped = tl.reshape(mask.to(tl.int32), (offsets.numel // GROUP, GROUP))
            return (groups, tl.max(grouped, axis=1) != 0)


@triton.jit
def runs_of(first, offsets, mask, NOISE: tl.constexpr):
    """What :func:`~.codecs.random_bits` may know of a block of a chunk."""
    if mask is None and len(NOISE) and NOISE[0] >= 4:
        return (first + tl.arange(0, offsets.numel // NOISE[0]) * NOISE[0],)
    else:
        return ()


@triton.jit
def save(block, i: tl.constexpr, value):
    """Keep a block of state ``i``; ``block`` is what an update was given for it."""
    write(block, 1 + i, value)


@triton.jit
def with_l2(g, p, l2):
    """The gradient with the L2 penalty's; an infinite parameter without one must not turn the state to NaN."""
    return tl.where(l2 != 0, g + l2 * p, g)


@triton.jit
def lerp(a, b, weight):
    return a + weight * (b - a)


@triton.jit
def maximum(a, b):
    """The larger; NaN where either is, as in torch."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN, as in torch."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def gradient_factor(maximize):
    """What a gradient is multiplied by, from the flag as a number."""
    return tl.where(maximize != 0, -1.0, 1.0).to(tl.float64)


@triton.jit
def bias_correction(beta, step):
    """``1 - beta**step`` of float64 blocks; in float32 the first steps would keep four digits."""
    return 1.0 - tl.exp(step * tl.log(beta))
