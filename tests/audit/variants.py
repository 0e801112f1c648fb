"""Every kernel variant that the launchers can launch, and what each must keep to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from optimx.triton_kernels import adam, grad_norm
from optimx.triton_kernels.device import TRITON_DTYPE
from optimx.triton_kernels.tensor_table import NUM_THREADS, LaunchSize, TensorTable
from triton.backends.compiler import GPUTarget

from .assembly import Limits
from .compiler import TARGETS, Launch, record

Dtypes = Sequence[torch.dtype]

#: Registers of an SM; vector registers of a CU.
REGISTER_FILE = {"cuda": 65536, "hip": 131072}
#: Threads that find registers on an SM or CU at the same time. With 16 bytes a thread and role, 1024 of them have 64 KB
#: of an Adam step in flight; 8 TB/s need about 45 KB an SM at a latency of 0.8 us. On CUDA it is 64 registers a thread.
THREADS = 1024
#: An unaligned tensor is the exception, float64 needs two registers a value, and `finish` is a single program.
THREADS_UNALIGNED, THREADS_FLOAT64 = 768, 512
#: Bytes of shared memory: one value a warp where they reduce. Elsewhere none: a layout would have been converted.
SHARED_REDUCTION = 128

#: Of params, grads, exp_avgs and exp_avg_sqs.
ADAM_DTYPES: dict[str, Dtypes] = {
    **{str(dtype)[6:]: [dtype] * 4 for dtype in TRITON_DTYPE},
    "float32-bfloat16_grads": [torch.float32, torch.bfloat16, torch.float32, torch.float32],
    "bfloat16-float32_states": [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32],
    "float32-bfloat16_states": [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16],
}


@dataclass(frozen=True)
class Variant:
    """A way to call a launcher.

    Attributes:
        kernel, options: Its name: "adam" and "float32-amsgrad".
        call: Calls the launcher, with tiles of the given size.
        reads, writes: Dtypes of the tensors a full chunk reads and writes; empty where nothing is said about widths.
        threads: How many an SM or CU must have registers for.
        shared: See :class:`.assembly.Limits`.
    """

    kernel: str
    options: str
    call: Callable[[LaunchSize], None]
    reads: Dtypes = ()
    writes: Dtypes = ()
    threads: int = THREADS
    shared: int = 0

    def on(self, target: GPUTarget) -> tuple[Launch, Limits]:
        """What is launched on ``target``, and what its assembly must keep to."""
        launch = record(lambda: self.call(LaunchSize(num_warps=NUM_THREADS // target.warp_size)))
        n_threads = launch.options["num_warps"] * target.warp_size
        n_elements = launch.options["BLOCK_SIZE"] // n_threads
        reads, writes = ([dtype.itemsize * n_elements for dtype in role] for role in (self.reads, self.writes))
        return launch, Limits(reads, writes, REGISTER_FILE[target.backend] // self.threads, self.shared)


def _name(*parts: str | bool, **flags: bool) -> str:
    return "-".join([*filter(None, parts), *(flag for flag, on in flags.items() if on)]) or "plain"


def _threads(dtypes: Dtypes, aligned: bool) -> int:
    if torch.float64 in dtypes:
        return THREADS_FLOAT64
    return THREADS if aligned else THREADS_UNALIGNED


def _table(size: LaunchSize, n_roles: int = 1) -> TensorTable:
    return TensorTable([16], [[torch.empty(16)]] * n_roles, [0], torch.device("cpu"), size)


def _addresses(*shape: int) -> torch.Tensor:
    return torch.empty(shape or 1, dtype=torch.int64)


def _numbers(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float64)


def _adam_variants() -> Iterator[Variant]:
    flags = product(ADAM_DTYPES.items(), (False, True), (False, True), (True, False))
    for (name, dtypes), amsgrad, control, aligned in flags:

        def call(size: LaunchSize, dtypes=dtypes, amsgrad=amsgrad, control=control, aligned=aligned) -> None:
            adam.adam_(
                _table(size, 4 if amsgrad else 3), _addresses(), _numbers(1, adam.HYPER_COLUMNS),
                _numbers(3) if control else None, dtypes=dtypes, amsgrad=amsgrad, aligned=aligned,
            )  # fmt: skip

        p, g, m, v = dtypes
        states = [m, v, v] if amsgrad else [m, v]
        yield Variant(
            "adam",
            _name(name, amsgrad=amsgrad, control=control, unaligned=not aligned),
            call,
            reads=[p, g, *states] if aligned else [],
            writes=[p, *states] if aligned else [],
            threads=_threads(dtypes, aligned),
        )


def _adam_prepare_variants() -> Iterator[Variant]:
    for control in (False, True):

        def call(size: LaunchSize, control=control) -> None:
            adam.prepare_(
                _numbers(2, adam.RAW_COLUMNS), _addresses(2, adam.RAW_COLUMNS), _addresses(2),
                _numbers(2, adam.HYPER_COLUMNS), _numbers(3) if control else None,
            )  # fmt: skip

        yield Variant("adam_prepare", _name(control=control), call, threads=THREADS_FLOAT64)


def _norm_variants() -> Iterator[Variant]:
    flags = product(TRITON_DTYPE, grad_norm.NORM_TYPES, (False, True), (True, False))
    for dtype, norm_type, scaled, aligned in flags:

        def call(size: LaunchSize, dtype=dtype, norm_type=norm_type, scaled=scaled, aligned=aligned) -> None:
            grad_norm.norm_(
                _table(size), _addresses(), torch.empty(()) if scaled else None, _numbers(2, 1), 0,
                dtype=dtype, norm_type=norm_type, aligned=aligned,
            )  # fmt: skip

        yield Variant(
            "norm",
            _name(str(dtype)[6:], f"{norm_type:g}", scaled=scaled, unaligned=not aligned),
            call,
            reads=[dtype] if aligned else [],
            threads=_threads([dtype], aligned),
            shared=SHARED_REDUCTION,
        )


def _finish_variants() -> Iterator[Variant]:
    flags = product(grad_norm.NORM_TYPES, (False, True), (False, True), ("", "found_inf", "check_finite"))
    for norm_type, clip, scaled, skip in flags:

        def call(size: LaunchSize, norm_type=norm_type, clip=clip, scaled=scaled, skip=skip) -> None:
            grad_norm.finish_(
                _numbers(2, 1), torch.empty(()), _numbers(3), norm_type=norm_type, max_norm=1.0 if clip else None,
                grad_scale=torch.empty(()) if scaled else None, found_inf=torch.empty(()) if skip else None,
                check_finite=skip == "check_finite",
            )  # fmt: skip

        yield Variant(
            "finish",
            _name(f"{norm_type:g}", skip, clip=clip, scaled=scaled),
            call,
            threads=THREADS_FLOAT64,
            shared=SHARED_REDUCTION,
        )


def _scale_variants() -> Iterator[Variant]:
    for dtype, aligned in product(TRITON_DTYPE, (True, False)):

        def call(size: LaunchSize, dtype=dtype, aligned=aligned) -> None:
            grad_norm.scale_(_table(size), _addresses(), _numbers(), dtype=dtype, aligned=aligned)

        moved = [dtype] if aligned else []
        options = _name(str(dtype)[6:], unaligned=not aligned)
        yield Variant("scale", options, call, moved, moved, threads=_threads([dtype], aligned))


@cache
def variants() -> tuple[Variant, ...]:
    """Every variant of every kernel."""
    families = (_adam_variants, _adam_prepare_variants, _norm_variants, _finish_variants, _scale_variants)
    return tuple(variant for family in families for variant in family())


def cases() -> dict[str, tuple[Variant, str]]:
    """Every variant on every architecture, by an id such as "adam-sm_90-float32-amsgrad"."""
    return {
        f"{variant.kernel}-{architecture}-{variant.options}": (variant, architecture)
        for variant in variants()
        for architecture in TARGETS
    }
