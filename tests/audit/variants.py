"""Every kernel variant that the launchers can launch, and what each must keep to."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from itertools import product, repeat
from types import ModuleType
from typing import Any

import torch
from optimx.triton_kernels import (
    adafactor,
    adam,
    grad_norm,
    guards,
    lagged,
    lamb,
    lion,
    matrix_walk,
    measured,
    muon,
    newton_schulz,
    sgd,
    tensor_sums,
    update,
)
from optimx.triton_kernels.device import TRITON_DTYPE
from optimx.triton_kernels.matrix_table import Shape, tables
from optimx.triton_kernels.storage import PLAIN
from optimx.triton_kernels.tensor_table import NUM_THREADS, LaunchSize
from triton.backends.compiler import GPUTarget

from tests.cases import CASES

from .assembly import Limits
from .budgets import CAUTIOUS, WATCHED, instructions, of_riders, of_scheme
from .compiler import TARGETS, Launch, record
from .sizes import Sizes, addresses, numbers
from .storage import MANY_SCHEMES, SCHEMES, Scheme, adafactor_scheme, scheme
from .walk import NARROWEST, Walk

Dtypes = tuple[torch.dtype, ...]
BF16 = torch.bfloat16

#: Registers of an SM; vector registers of a CU.
REGISTER_FILE = {"cuda": 65536, "hip": 131072}
#: Threads that find registers on an SM or CU at the same time. With 16 bytes a thread and role, 1024 of them have 64 KB
#: of an Adam step in flight; 8 TB/s need about 45 KB an SM at a latency of 0.8 us. On CUDA it is 64 registers a thread.
THREADS = 1024
#: Float64 needs two registers a value, and `finish` is a single program.
THREADS_FLOAT64 = 512
#: Bytes of shared memory: one value a warp where they reduce. Elsewhere none: a layout would have been converted.
SHARED_REDUCTION = 128
#: Scales of a block's groups, which are stored by other threads than have found them.
SHARED_SCALES = 64
#: Registers for codes and random bits: with these, 512 threads have 40 KB in flight.
THREADS_STORAGE = 512
#: Where a block's columns are summed, one value a column and warp; and where averages of columns meet a block of them.
SHARED_COLUMNS = 16384
#: A sort of a thousand norms, in a single program.
SHARED_JUDGE = 8192
#: Sums that ride along meet at the end of a program, where each thread has a few elements of them.
SHARED_RIDERS = 2048
#: With sums, 16-bit parameters take 96 registers on sm_90 and 122 on sm_80; with an average besides, those of 32 bits
#: take 78 on sm_100.
THREADS_SUMS_16 = 512
THREADS_SUMS_AVERAGE = 768


@dataclass(frozen=True)
class Algorithm:
    """What the generic kernels are compiled with.

    Attributes:
        module: Of ``triton_kernels``.
        update_variants: For each variant of its ``update``, by name, the variant and the number of states.
        n_scalars: Number of scalar states.
    """

    module: ModuleType
    update_variants: dict[str, tuple[tuple[bool, ...], int]]
    n_scalars: int = 1

    @property
    def name(self) -> str:
        return self.module.__name__.rpartition(".")[2]


def _algorithms() -> Iterator[Algorithm]:
    """Everything that the rules of ``tests/cases.py`` can ask for."""
    params = torch.zeros(2, 3), torch.zeros(3, 2).mT, torch.zeros(1)
    by_module: dict[str, dict[tuple[bool, ...], tuple[str, int]]] = {}
    n_scalars: dict[str, int] = {}
    for case in CASES:
        rule = case.cls.rule
        found = by_module.setdefault(rule.module, {})
        n_scalars[rule.module] = len(rule.scalars)
        for name, kwargs in [("", {}), *case.variants.items()]:
            (group,) = case.cls([torch.nn.Parameter(torch.zeros(1))], **kwargs).param_groups
            for kind, param in zip(("", "transposed", "vectors"), params, strict=True):
                variant = rule.variant_of(rule.group_variant(group), param)
                label = "-".join(filter(None, (kind, name)))
                found.setdefault(variant, (label, len(rule.state_names(variant))))
    for module, found in by_module.items():
        variants = {label: (variant, n_states) for variant, (label, n_states) in found.items()}
        yield Algorithm(import_module(f"optimx.triton_kernels.{module}"), variants, n_scalars[module])
    # which takes no vectors, and is in no table of them
    yield Algorithm(muon, {}, 0)


ALGORITHMS = tuple(_algorithms())
#: Those that the generic kernel updates.
ELEMENTWISE = [algorithm for algorithm in ALGORITHMS if hasattr(algorithm.module, "update")]

#: Of params, grads and all states.
DTYPES: dict[str, tuple[torch.dtype, torch.dtype, torch.dtype]] = {
    **{str(dtype)[6:]: (dtype, dtype, dtype) for dtype in TRITON_DTYPE},
    "float32-bfloat16_grads": (torch.float32, torch.bfloat16, torch.float32),
    "bfloat16-float32_states": (torch.bfloat16, torch.bfloat16, torch.float32),
    "float32-bfloat16_states": (torch.float32, torch.float32, torch.bfloat16),
}

TRITON_NAMES = {str(dtype)[6:] for dtype in TRITON_DTYPE}

#: Dtypes, with control.
EVERYTHING = [*product(DTYPES, (False, True))]
#: For all but Adam. What is an algorithm's own is its arithmetic and its number of roles: they decide on registers and
#: spills, mostly in 16 bits, where a thread has eight elements of each role. The walk, its accesses, and what control
#: does to them are the same code for all, so one variant of each is enough.
REDUCED = [
    *product(("float32", "bfloat16"), (False, True)),
    ("float16", False),
    ("float64", False),
    ("float32-bfloat16_grads", False),
    ("bfloat16-float32_states", True),
]


@dataclass(frozen=True)
class Variant:
    """A way to call a launcher.

    Attributes:
        kernel, options: Its name: "adam" and "float32-amsgrad".
        call: Calls the launcher.
        reads, writes: Dtypes of the tensors a full chunk reads and writes; empty where nothing is said about widths.
        threads: How many an SM or CU must have registers for.
        shared: See :class:`.assembly.Limits`.
        counted: Whether to count instructions.
        scheme: How roles are kept, where these are no plain tensors.
        architectures: Those that it is compiled for; empty: all.
        position: Which of the launches it is, where the launcher makes several.
        riders: How many sums and averages ride along.
    """

    kernel: str
    options: str
    call: Callable[[Sizes], None]
    reads: Dtypes = ()
    writes: Dtypes = ()
    threads: int = THREADS
    shared: int = 0
    counted: bool = False
    scheme: str = ""
    architectures: tuple[str, ...] = ()
    position: int = 0
    riders: tuple[int, int] = (0, 0)

    def on(self, target: GPUTarget) -> tuple[Launch, Limits]:
        """What is launched on ``target``, and what its assembly must keep to."""
        tiles = LaunchSize(num_warps=NUM_THREADS // target.warp_size)
        launch = record(lambda: self.call(Sizes(tiles)))[self.position]
        n_threads = launch.options["num_warps"] * target.warp_size
        tile = launch.options.get("TILE")
        # what looks at numbers alone has no blocks of elements
        block = launch.options.get("BLOCK_SIZE", 0) if tile is None else math.prod(tile[:3])
        n_elements = block // n_threads
        sizes = ([dtype.itemsize * n_elements for dtype in role] for role in (self.reads, self.writes))
        reads, writes = ([size for size in role if size >= NARROWEST] for role in sizes)
        limits = Limits(reads, writes, REGISTER_FILE[target.backend] // self.threads, self.shared)
        if self.counted:
            n_blocks = launch.options["CHUNK_SIZE"] // block if tile is None else tile[3] // tile[1]
            budget = instructions(self.kernel, target, self.reads)
            if "cautious" in self.options:
                budget += CAUTIOUS * (2 if "both" in self.options else 1)
            if "watched" in self.options:
                budget += WATCHED
            if self.scheme:
                budget = of_scheme(self.kernel, target, self.scheme)
            budget += of_riders(target, *self.riders)
            limits = replace(limits, instructions=budget, walk=Walk(reads, n_elements, n_blocks))
        return launch, limits


def _name(*parts: str | bool, **flags: bool) -> str:
    return "-".join([*filter(None, parts), *(flag for flag, on in flags.items() if on)]) or "plain"


def _threads(dtypes: Dtypes, threads: int = THREADS) -> int:
    return THREADS_FLOAT64 if torch.float64 in dtypes else threads


#: For variants with a flag, whose few instructions more come in any of them.
FLAGGED = [("float32", False), ("bfloat16", True)]


def _is_flagged(variant: str) -> bool:
    return "cautious" in variant or "clipped" in variant


def _choices(algorithm: Algorithm, variant: str) -> list[tuple[str, bool]]:
    """Dtypes, with control, of a variant."""
    if _is_flagged(variant):
        return FLAGGED
    return EVERYTHING if algorithm.module is adam else REDUCED


def _update_variants() -> Iterator[Variant]:
    for algorithm in ELEMENTWISE:
        choices = [
            (of_flags, choice) for of_flags in algorithm.update_variants.items()
            for choice in _choices(algorithm, of_flags[0]) if of_flags not in [*_of_walk(algorithm, "lagged")]
        ]  # fmt: skip
        for (flags, (variant, n_states)), (name, control) in choices:
            p, g, state = DTYPES[name]
            states = [state] * n_states
            if len({p, g, *states}) < len({*DTYPES[name]}):
                # without states the same as another
                continue

            def call(size, module=algorithm.module, variant=variant, control=control, dtypes=(p, g, *states)) -> None:
                update.update_(
                    module, size.table(len(dtypes) - 1), size.grads(), numbers(1, len(module.HYPER)),
                    numbers(3) if control else None, variant=variant, dtypes=dtypes,
                )  # fmt: skip

            yield Variant(
                algorithm.name,
                _name(name, flags, control=control),
                call,
                reads=[p, g, *states],
                writes=[p, *states],
                # flags take up to 69 registers in 16 bits on sm_90
                threads=_threads([p, g, *states], 896 if _is_flagged(flags) else THREADS),
                # control is read before the walk
                counted=not control,
            )


#: Sums, and dtypes of averages, that ride along with an update: those that every state has, all, averages without sums,
#: and with them.
RIDERS = [
    ((0, 1), None), ((0, 1, 2, 3), None), ((), torch.float32), ((), torch.bfloat16), ((0, 1, 2, 3), torch.float32),
]  # fmt: skip


def _riders_variants() -> Iterator[Variant]:
    """Adam in 32 and 16 bits; of the others, whose arithmetic does not matter here, SGD, which has the least."""
    choices = [(adam, name) for name in ("float32", "bfloat16", "float32-bfloat16_grads")] + [(sgd, "float32")]
    usual = {algorithm.module: algorithm.update_variants for algorithm in ELEMENTWISE}
    for (module, name), (sums, average), control in product(choices, RIDERS, (False, True)):
        if control and name != "float32":
            continue
        variant, n_states = max(usual[module].values(), key=lambda found: (found[1] > 0, -found[1], -sum(found[0])))
        p, g, state = DTYPES[name]
        dtypes = (p, g, *[state] * n_states)

        def call(
            size, module=module, variant=variant, control=control, dtypes=dtypes, sums=sums, average=average
        ) -> None:
            table = size.table(len(dtypes) - 1)
            partials = torch.empty(len(sums), table.n_chunks)
            riders = update.Riders(sums, 0, partials if sums else None)
            if average is not None:
                averages, weight = addresses(size.n_tensors), size.scalar(torch.float64)
                riders = riders._replace(averages=averages, average_dtype=average, weight=weight)
            update.update_(
                module, table, size.grads(), numbers(1, len(module.HYPER)), numbers(3) if control else None,
                variant=variant, dtypes=dtypes, riders=riders,
            )  # fmt: skip

        averages = () if average is None else (average,)
        threads = THREADS
        if sums and (average is not None or p.itemsize == 2):
            threads = THREADS_SUMS_16 if p.itemsize == 2 else THREADS_SUMS_AVERAGE
        kinds = [*[f"{len(sums)}_sums"] * bool(sums), *(f"{str(dtype)[6:]}_average" for dtype in averages)]
        yield Variant(
            module.__name__.rpartition(".")[2], _name(name, *kinds, control=control), call,
            reads=(*dtypes, *averages), writes=(p, *[state] * n_states, *averages),
            threads=threads, shared=SHARED_RIDERS if sums else 0, counted=not control,
            riders=(len(sums), len(averages)),
            # for sm_100, ptxas has 16 bytes of SGD's on the stack
            architectures=("sm_80", "sm_90", "gfx942") if module is sgd and sums and averages else (),
        )  # fmt: skip


#: Schemes that are compiled for an algorithm; Adam has all. What control and counts on a device do is the same for all.
IN_SCHEMES = {
    "adam": [*((name, False) for name in SCHEMES), ("stochastic-8bit", True)],
    "lion": [(name, False) for name in SCHEMES],
    "sgd": [(name, False) for name in SCHEMES],
}


def _architectures(kernel: str, name: str) -> tuple[str, ...]:
    """Adam's schemes are compiled for all; of others' each codec is, and what is put together of them for one."""
    return () if kernel == "adam" or name in MANY_SCHEMES else ("sm_90",)


def _storage_variants() -> Iterator[Variant]:
    for algorithm in ELEMENTWISE:
        variants = algorithm.update_variants
        # the usual one, if it has states
        variant, n_states = max(variants.get("", ((), 0)), *variants.values(), key=lambda found: min(found[1], 1))
        for name, control in IN_SCHEMES.get(algorithm.name, [("stochastic-8bit", False)]):
            kept = scheme(name, n_states)

            def call(size, module=algorithm.module, variant=variant, control=control, kept=kept) -> None:
                update.update_(
                    module, size.table(len(kept.dtypes) - 1), size.grads(), numbers(1, len(module.HYPER)),
                    numbers(3) if control else None, variant=variant, dtypes=kept.dtypes,
                    storage=kept.storage(counts_on_device=control),
                )  # fmt: skip

            roles = [*range(1 + n_states)]
            yield Variant(
                algorithm.name, _name(name, control=control), call, [*kept.reads(roles), BF16], kept.writes(roles),
                threads=THREADS_STORAGE, shared=SHARED_SCALES, counted=not control, scheme=name,
                architectures=_architectures(algorithm.name, name),
            )  # fmt: skip


def _storage_measured_variants() -> Iterator[Variant]:
    for name in ("stochastic-8bit", "remainder16-float32"):
        kept = scheme(name, 2)

        def call(size: Sizes, kept: Scheme = kept) -> None:
            launches = measured.measured_update_(
                lamb, size.table(len(kept.dtypes) - 1), size.grads(), numbers(1, len(lamb.HYPER)), None,
                variant=(), dtypes=kept.dtypes, storage=kept.storage(),
            )  # fmt: skip
            deque(launches, maxlen=0)

        yield Variant(
            "lamb_measure", name, call, [*kept.reads([0, 1, 2]), BF16], threads=THREADS_STORAGE,
            shared=SHARED_REDUCTION, counted=True, scheme=name,
        )  # fmt: skip


def _storage_adafactor_variants() -> Iterator[Variant]:
    choices = [(name, "", moment) for name in SCHEMES for moment in (False, True)]
    choices += [("stochastic-stochastic", kind, True) for kind in ("convolutions", "vectors", "crooked")]
    shapes = {"": (1, 2048, 2048), "crooked": (1, 2048, 2048), "convolutions": (4096, 3, 3), "vectors": (1, 1, 4096)}
    for name, kind, moment in choices:
        factored = kind != "vectors"
        kept = adafactor_scheme(name, 2 if factored else 1, moment)
        if not moment and kept.formats.kinds[0] == 0:
            # without a moment nothing is kept otherwise
            continue
        call = partial(
            _call_adafactor, shapes[kind], (factored, False, moment), False, kind != "convolutions", kept.dtypes,
            kept=kept, is_straight=not kind,
        )  # fmt: skip
        wide = not kind
        common: dict[str, Any] = {
            "threads": THREADS_STORAGE, "shared": SHARED_COLUMNS, "counted": wide, "scheme": name,
            "architectures": _architectures("adafactor", name),
        }  # fmt: skip
        roles = [0, len(kept.roles) - 1] if moment else [0]
        options = _name(name, kind, moment=moment)
        if not moment:
            yield Variant("adafactor_sums", options, call, [*kept.reads([0]), BF16], **common)
        yield Variant(
            "adafactor_update", options, call, [*kept.reads(roles), BF16] if wide else [],
            kept.writes(roles) if wide else [], position=6 if factored else 4, **common,
        )  # fmt: skip


def _prepare_variants() -> Iterator[Variant]:
    for algorithm, control in product(ALGORITHMS, (False, True)):

        def call(size: Sizes, algorithm=algorithm, control=control) -> None:
            n, n_raw, n_columns = size.n_tensors, len(algorithm.module.RAW), len(algorithm.module.HYPER)
            update.prepare_(
                algorithm.module, numbers(n, n_raw), addresses(n, n_raw), addresses(n, algorithm.n_scalars),
                size.grads(), numbers(n, n_columns), numbers(3) if control else None,
            )  # fmt: skip

        yield Variant(f"{algorithm.name}_prepare", _name(control=control), call, threads=THREADS_FLOAT64)


def _muon_variants() -> Iterator[Variant]:
    """The passes before and after the products, which are of 16 bits."""
    for name, control in REDUCED:
        p, g, state = DTYPES[name]
        matrix = torch.float64 if p is torch.float64 else torch.bfloat16
        passes = {
            "average": (muon.AVERAGE, (matrix, g, state), [g, state], [matrix, state]),
            "take": (muon.TAKE, (p, torch.bfloat16), [p, torch.bfloat16], [p]),
            "cautious": (muon.TAKE, (p, torch.bfloat16), [p, torch.bfloat16], [p]),
            "average_rows": (muon.AVERAGE_ROWS, (torch.float32, torch.float32, state), [], []),
        }
        for kind, (algorithm, dtypes, reads, writes) in passes.items():
            # float64 beside 16 bits is the exception, and takes an address an element
            is_wide = {torch.float64, torch.bfloat16}.issubset(dtypes)
            if is_wide:
                reads, writes = [], []
            variant = (kind == "cautious",) if algorithm is muon.TAKE else ()

            def call(size, algorithm=algorithm, dtypes=dtypes, control=control, variant=variant) -> None:
                update.update_(
                    algorithm, size.table(len(dtypes) - 1), size.grads(), numbers(1, len(algorithm.HYPER)),
                    numbers(3) if control else None, variant=variant, dtypes=dtypes,
                )  # fmt: skip

            yield Variant(
                "muon", _name(kind, name, control=control), call, reads=reads, writes=writes,
                threads=_threads(dtypes), counted=bool(reads) and not control,
            )  # fmt: skip


#: What multiplies matrices of 16 bits. Those of float32 have it on AMD's alone, where it rounds as float32 does.
MATRIX_INSTRUCTIONS = {
    80: "mma.sync",
    90: "wgmma.mma_async",
    100: "tcgen05.mma",
    "gfx942": "v_mfma_f32",
    "gfx950": "v_mfma_f32",
}
#: Bytes of shared memory: of a GeForce, which has the least, and of AMD's.
SHARED_PRODUCTS = {"cuda": 99 * 1024, "gfx942": 64 * 1024, "gfx950": 160 * 1024}


@dataclass(frozen=True)
class ProductVariant(Variant):
    """A product of matrices, whose program has a tile of them instead of a chunk.

    Attributes:
        symmetric: Tiles are stored twice.
    """

    symmetric: bool = False

    def on(self, target: GPUTarget) -> tuple[Launch, Limits]:
        (launch,) = record(lambda: self.call(Sizes(LaunchSize(num_warps=NUM_THREADS // target.warp_size))))
        size, inner = launch.options["SIZE"], launch.options["INNER"]
        (dtype,) = self.reads
        n_bytes = dtype.itemsize / (launch.options["num_warps"] * target.warp_size)
        on_cuda = target.backend == "cuda"
        has_units = dtype is not torch.float32 or not on_cuda
        # tiles of both operands; that of an addend is as large as several. Words go straight to gfx950's shared memory
        reads = [] if target.arch == "gfx950" and dtype is torch.float32 else [int(size * inner * n_bytes)] * 2
        return launch, Limits(
            reads=reads,
            # gfx942 stores what its matrix instructions leave in a thread, which is less than 16 bytes
            writes=[int(size * size * n_bytes)] * (1 + self.symmetric) if on_cuda else [],
            registers=REGISTER_FILE[target.backend] // self.threads,
            shared=SHARED_PRODUCTS["cuda" if on_cuda else target.arch],
            matrix=frozenset({MATRIX_INSTRUCTIONS[target.arch]} if has_units else ()),
        )


def _product_variants() -> Iterator[Variant]:
    """Those of iterations on wide and tall matrices, and without an addend, as the Gram form ends."""
    kinds = ("gram", "gram-tall", "polynomial", "apply", "apply-tall", "factor")
    choices = [*product((torch.bfloat16, torch.float32), kinds, (1024,))]
    choices += [(torch.float16, "apply", 1024), (torch.bfloat16, "gram", 512), (torch.bfloat16, "factor", 512)]
    for dtype, kind, side in choices:
        symmetric = kind.startswith(("gram", "polynomial"))

        def call(size: Sizes, dtype=dtype, kind=kind, side=side, symmetric=symmetric) -> None:
            # of any size: tiles are those of matrices whose shorter side is ``side``
            m, n = 16 * (1 + size.n_tensors % 4), 16 * (2 + size.n_tensors % 3)
            wide, square = (torch.empty(size.n_tensors, m, columns, dtype=dtype) for columns in (n, m))
            tall = torch.empty(size.n_tensors, n, m, dtype=dtype).mT
            x, out = (tall, torch.empty_like(tall)) if kind.endswith("tall") else (wide, torch.empty_like(wide))
            arguments = {
                "gram": (x, x.mT, square), "polynomial": (square, square, torch.empty_like(square), square),
                "apply": (square, x, out, x), "factor": (square, x, out),
            }[kind.removesuffix("-tall")]  # fmt: skip
            blocks = newton_schulz.blocks_for(side, dtype, on_amd=size.tiles.num_warps < NUM_THREADS // 32)
            newton_schulz.multiply_(*arguments, symmetric=symmetric, blocks=blocks)

        yield ProductVariant(
            "newton_schulz", _name(str(dtype)[6:], kind, str(side)), call, reads=(dtype,), threads=256,
            symmetric=symmetric,
        )  # fmt: skip


def _measured_variants() -> Iterator[Variant]:
    """The launches before the update."""
    for algorithm, (flags, (variant, n_states)) in _measured():
        # without a flag it is LAMB
        for name, control in FLAGGED if flags else REDUCED:
            p, g, state = DTYPES[name]
            dtypes = (p, g, *[state] * n_states)

            def call(size: Sizes, module=algorithm.module, variant=variant, dtypes=dtypes, control=control) -> None:
                launches = measured.measured_update_(
                    module, size.table(len(dtypes) - 1), size.grads(), numbers(1, len(module.HYPER)),
                    numbers(3) if control else None, variant=variant, dtypes=dtypes,
                )  # fmt: skip
                deque(launches, maxlen=0)

            # what flags do not measure they do not read
            is_whole = algorithm.module is lamb
            yield Variant(
                f"{algorithm.name}_measure",
                _name(name, flags, control=control),
                call,
                reads=dtypes if is_whole else [],
                # what sums up has narrow blocks as large as the wide ones: for sm_80, ptxas takes 71 registers in 16
                # bits, 64 elsewhere; 896 threads have 56 KB in flight
                threads=_threads(dtypes, 896),
                shared=SHARED_REDUCTION,
                counted=is_whole and not control,
                # for sm_80, ptxas has up to 16 bytes of two of them on the stack
                architectures=("sm_90", "sm_100", "gfx942", "gfx950") if flags and name == "bfloat16" else (),
            )
            if name == "float32":
                yield Variant(
                    f"{algorithm.name}_adapt",
                    _name(flags, control=control),
                    call,
                    threads=THREADS_FLOAT64,
                    shared=SHARED_REDUCTION,
                    position=1,
                )


def _measured() -> Iterator[tuple[Algorithm, tuple[str, tuple[tuple[bool, ...], int]]]]:
    """Algorithms and their variants, by name, that measure tensors before they update them."""
    for algorithm in ELEMENTWISE:
        yield from zip(repeat(algorithm), _of_walk(algorithm, "measured"), strict=False)


def _of_walk(algorithm: Algorithm, walk: str) -> Iterator[tuple[str, tuple[tuple[bool, ...], int]]]:
    """The variants of an algorithm, by name, that are updated by a walk."""
    rules = {case.cls.rule.module: case.cls.rule for case in CASES}
    for entry in algorithm.update_variants.items():
        if algorithm.name in rules and rules[algorithm.name].walk_of(entry[1][0]) == walk:
            yield entry


def _lagged_variants() -> Iterator[Variant]:
    """The update that counts cautious steps, with and without other sums; and the launches before and after it."""
    choices = [("float32", False), ("float32", True), ("bfloat16", False)]
    for algorithm in ELEMENTWISE:
        for (flags, (variant, n_states)), (name, control) in product(_of_walk(algorithm, "lagged"), choices):
            p, g, state = DTYPES[name]
            dtypes = (p, g, *[state] * n_states)
            call = partial(_call_lagged, algorithm.module, variant, dtypes, control=control)
            yield Variant(
                algorithm.name, _name(name, flags, control=control), call, reads=dtypes,
                writes=(p, *[state] * n_states), threads=THREADS_SUMS_16 if p.itemsize == 2 else 896,
                shared=SHARED_RIDERS, counted=not control, riders=(1, 0), position=1,
            )  # fmt: skip
            if name == "float32" and not control:
                watched = partial(_call_lagged, algorithm.module, variant, dtypes, sums=(0, 1, 2, 3))
                yield Variant(
                    algorithm.name, _name(name, flags, "4_sums"), watched, reads=dtypes,
                    writes=(p, *[state] * n_states), threads=THREADS_SUMS_AVERAGE, shared=SHARED_RIDERS, counted=True,
                    riders=(5, 0), position=1, architectures=("sm_90", "gfx942"),
                )  # fmt: skip
    # which have nothing of the algorithm but where columns are
    for control, is_cut in product((False, True), repeat=2):
        call = partial(_call_lagged, lion, (False, True, False, True), (BF16,) * 3, control=control, is_cut=is_cut)
        options = _name(control=control, cut=is_cut)
        if not is_cut:
            yield Variant("lagged_adapt", options, call, threads=THREADS_FLOAT64)
        position = 3 if is_cut else 2
        yield Variant("lagged_keep", options, call, threads=THREADS_FLOAT64, shared=SHARED_REDUCTION, position=position)


def _call_lagged(
    module: ModuleType,
    variant: tuple[bool, ...],
    dtypes: Dtypes,
    size: Sizes,
    *,
    control: bool = False,
    is_cut: bool = False,
    sums: tuple[int, ...] = (),
) -> None:
    table, n = size.table(len(dtypes) - 1), size.n_tensors
    launches = lagged.lagged_update_(
        module, table, size.grads(), numbers(n, len(module.HYPER)), numbers(3) if control else None,
        variant=variant, dtypes=dtypes, means=addresses(n), partials=torch.empty(len(sums) + 1, table.n_chunks),
        riders=update.Riders(sums), numels=addresses(n) if is_cut else None,
    )  # fmt: skip
    deque(launches, maxlen=0)


def _call_adafactor(
    shape: Shape,
    variant: tuple[bool, ...],
    control: bool,
    aligned: bool,
    dtypes: Dtypes,
    size: Sizes,
    whole: Shape | None = None,
    kept: Scheme | None = None,
    is_straight: bool = False,
) -> None:
    table = size.table(len(dtypes) - 1)
    storage = kept.storage() if kept else PLAIN
    walked = matrix_walk.walked(dtypes, variant[0], storage.formats)
    (matrices,) = tables(
        [shape] * size.n_tensors, [aligned] * size.n_tensors, variant[0], matrix_walk.row_divisor(walked),
        torch.device("cpu"), size.tiles, size.tiles.block(walked), whole and [whole] * size.n_tensors,
    )  # fmt: skip
    sums = matrix_walk.Sums.of(matrices, torch.float32, variant[0])
    partials = size.partials(matrices.n_programs)
    grad_scale, controls = (size.scalar(), numbers(3)) if control else (None, None)
    roles: dict[str, Any] = {"dtypes": dtypes, "aligned": aligned, "storage": storage}
    matrix_walk.sums_(
        table, matrices, size.grads(), grad_scale, controls, sums, *partials, factored=variant[0], **roles
    )
    update = matrix_walk.update_(
        table, matrices, size.grads(), numbers(size.n_tensors, len(adafactor.HYPER)), grad_scale, controls, sums,
        measured=control, variant=variant, is_straight=is_straight, **roles,
    )  # fmt: skip
    deque(update, maxlen=0)


def _adafactor_variants() -> Iterator[Variant]:
    """Matrices, kernels of convolutions and vectors."""
    shapes = {"": (1, 2048, 2048), "convolutions": (4096, 3, 3), "vectors": (1, 1, 4096)}
    update_variants = next(algorithm.update_variants for algorithm in ALGORITHMS if algorithm.module is adafactor)
    # here, where rows begin counts as well, so alignment is a constant of the launch
    choices = [*((*choice, True) for choice in REDUCED), ("float32", True, False)]
    for (flags, (variant, n_states)), (name, control, aligned) in product(update_variants.items(), choices):
        factored, transposed, moment = variant
        if name != "float32" and (transposed or moment):
            continue
        for kind in ("", "convolutions") if factored else ("vectors",):
            # rows of three begin anywhere
            wide = aligned and kind != "convolutions"
            p, g, state = DTYPES[name]
            dtypes = (p, g, *[state] * n_states)

            call = partial(_call_adafactor, shapes[kind], variant, control, wide, dtypes)
            options = _name(name, flags if kind != "convolutions" else "", kind if factored else "", control=control)
            if not aligned:
                options += "-unaligned"
            yield from _adafactor_launches(name, options, call, variant, control, aligned, wide, dtypes, kind)
    yield from _adafactor_launches_of_parts()


def _adafactor_launches_of_parts() -> Iterator[Variant]:
    """What there is besides, where a matrix is half of one."""
    dtypes = (torch.float32,) * 4
    for control, transposed in product((False, True), repeat=2):
        variant, shape = (True, transposed, False), (1, 2048, 2048)
        call = partial(_call_adafactor, shape, variant, control, True, dtypes, whole=(1, 4096, 2048))
        options = _name("float32", "transposed" if transposed else "", control=control)
        yield Variant("adafactor_mean", f"{options}-part", call, threads=THREADS_FLOAT64, shared=2048, position=4)
        if not transposed:
            yield Variant("adafactor_totals", options, call, threads=THREADS, position=1)
            yield Variant("lengths", options, call, threads=THREADS_FLOAT64, shared=512, position=7)


def _adafactor_launches(
    name: str,
    options: str,
    call: Callable[[Sizes], None],
    variant: tuple[bool, ...],
    control: bool,
    aligned: bool,
    wide: bool,
    dtypes: Dtypes,
    kind: str,
) -> Iterator[Variant]:
    """The launches of a call, as far as another variant has not the same."""
    factored, transposed, moment = variant
    plain = not (transposed or moment)
    p, g, state, *_ = dtypes
    moments = [state] * moment
    reads, lengths, updates, writes = [p, g], [g], [p, g, *moments], [p, *moments]
    if not wide:
        reads = lengths = updates = writes = []
    # rows that begin anywhere are the exception, and take an address an element
    threads = _threads(dtypes) if wide else THREADS_FLOAT64
    # a vector is no walk: one block a program
    common: dict[str, Any] = {
        "threads": threads, "shared": SHARED_COLUMNS, "counted": wide and factored and not control,
    }  # fmt: skip
    last = 6 if factored else 4
    if plain:
        yield Variant("adafactor_sums", options, call, reads, **common)
        yield Variant("adafactor_update", f"{options}-measure", call, lengths, position=last - 2, **common)
    # shapes of matrices are nothing to it
    if plain and name in TRITON_NAMES and aligned and kind != "convolutions":
        for role in (1, 2) if factored else (1,):
            which = ("rows", "columns")[role - 1]
            yield Variant("adafactor_average", f"{options}-{which}", call, threads=THREADS, position=role)
    if factored and not moment and aligned:
        yield Variant("adafactor_mean", options, call, threads=THREADS_FLOAT64, shared=2048, position=3)
    if plain and name == "float32" and aligned and kind != "convolutions":
        yield Variant("adafactor_size", options, call, threads=THREADS_FLOAT64, shared=512, position=last - 1)
    if not transposed:
        yield Variant("adafactor_update", options, call, updates, writes, position=last, **common)


def _norm_variants() -> Iterator[Variant]:
    for dtype, norm_type, scaled in product(TRITON_DTYPE, grad_norm.NORM_TYPES, (False, True)):
        # what is an algorithm's own is the arithmetic
        if norm_type != 2 and not scaled:
            continue

        def call(size: Sizes, dtype=dtype, norm_type=norm_type, scaled=scaled) -> None:
            grad_norm.norm_(
                size.table(), size.grads(), size.scalar() if scaled else None,
                numbers(2, size.offset + size.n_tensors), size.offset,
                dtype=dtype, norm_type=norm_type,
            )  # fmt: skip

        yield Variant(
            "norm",
            _name(str(dtype)[6:], f"{norm_type:g}", scaled=scaled),
            call,
            reads=[dtype],
            threads=_threads([dtype]),
            shared=SHARED_REDUCTION,
            counted=True,
        )
    yield from _watched_norm_variants()


def _watched_norm_variants() -> Iterator[Variant]:
    """Of gradients that somebody watches: the 2-norm, the largest, and how many are 0."""
    for dtype, scaled in product(TRITON_DTYPE, (False, True)):

        def call(size: Sizes, dtype=dtype, scaled=scaled) -> None:
            grad_norm.norm_(
                size.table(), size.grads(), size.scalar() if scaled else None,
                numbers(4, size.offset + size.n_tensors), size.offset, dtype=dtype, norm_type=2.0, watched=True,
            )  # fmt: skip

        yield Variant(
            "norm", _name(str(dtype)[6:], "watched", scaled=scaled), call, reads=[dtype], threads=_threads([dtype]),
            shared=SHARED_REDUCTION, counted=True,
        )  # fmt: skip


def _tensor_sums_variants() -> Iterator[Variant]:
    """What is watched of gradients, and what rides along with an update."""
    kinds = {
        "watched": (torch.float64, (False, True, True, False)),
        **{f"{n}_sums": (torch.float32, (False,) * n) for n in (1, 2, 4)},
    }
    for kind, (dtype, maxima) in kinds.items():

        def call(size: Sizes, dtype=dtype, maxima=maxima) -> None:
            table = size.table()
            partials = torch.empty(len(maxima), size.offset + table.n_chunks, dtype=dtype)[:, size.offset :]
            tensor_sums.tensor_sums_(partials, table.first_chunk, numbers(len(maxima), size.n_tensors), maxima=maxima)

        yield Variant("tensor_sums", kind, call, threads=THREADS_FLOAT64, shared=SHARED_REDUCTION)


def _judge_variants() -> Iterator[Variant]:
    """A program that reads one norm: every kind of clipping, with and without the window in which spikes are seen."""
    kinds = {
        "plain": guards.Clip(guards.NO_CLIPPING.value, (0.0,) * 4),
        "fixed": guards.Clip(guards.FIXED.value, (1.0, 0.0, 0.0, 0.0)),
        "normalize": guards.Clip(guards.FIXED.value, (1.0, 0.0, 0.0, 0.0), clamp=False),
        "percentile": guards.Clip(guards.PERCENTILE.value, (90.0, 0.0, 0.0, 0.0), window=1000),
        "z_score": guards.Clip(guards.Z_SCORE.value, (2.5, 0.97, 25.0, 1.0)),
    }
    for (kind, clip), window, skips in product(kinds.items(), (0, 128), (False, True)):
        spike = guards.Spike(window, (64.0, 6.0, 8.0, 0.01))

        def call(size: Sizes, clip=clip, spike=spike, skips=skips) -> None:
            spikes = numbers(3 + spike.window) if spike.window else None
            clipping = numbers(3 + clip.window) if clip.kind > guards.FIXED.value else None
            guards.judge_(numbers(3), numbers(13), spikes, clipping, spike=spike, clip=clip, skips_nonfinite=skips)

        yield Variant(
            "judge", _name(kind, spikes=window > 0, skips=skips), call, threads=THREADS_FLOAT64,
            shared=SHARED_JUDGE,
            # for sm_100, ptxas has 8 bytes of the single program on the stack
            architectures=("sm_80", "sm_90", "gfx942", "gfx950") if kind == "percentile" and window else (),
        )  # fmt: skip


def _finish_variants() -> Iterator[Variant]:
    clips = {"": (None, True), "clip": (1.0, True), "normalize": (1.0, False)}
    dtypes = (torch.float32, torch.float64)
    flags = product(dtypes, grad_norm.NORM_TYPES, clips, (False, True), ("", "found_inf", "check_finite"))
    for dtype, norm_type, clip, scaled, skip in flags:
        # normalizing is by the 2-norm; of the others, which differ in the reduction alone, and in another dtype of the
        # result, one variant each
        usual = dtype is torch.float32 and norm_type == 2
        if not usual and (clip, scaled, skip) != ("clip", True, "check_finite"):
            continue
        max_norm, clamp = clips[clip]

        def call(
            size: Sizes, dtype=dtype, norm_type=norm_type, max_norm=max_norm, clamp=clamp, scaled=scaled, skip=skip
        ) -> None:
            grad_norm.finish_(
                numbers(2, size.n_tensors), size.scalar(dtype), numbers(3),
                norm_type=norm_type, max_norm=max_norm, clamp=clamp,
                grad_scale=size.scalar() if scaled else None, found_inf=size.scalar() if skip else None,
                check_finite=skip == "check_finite",
            )  # fmt: skip

        yield Variant(
            "finish",
            _name(f"{norm_type:g}", skip, clip, scaled=scaled, float64=dtype is torch.float64),
            call,
            threads=THREADS_FLOAT64,
            shared=SHARED_REDUCTION,
        )


def _scale_variants() -> Iterator[Variant]:
    for dtype in TRITON_DTYPE:

        def call(size: Sizes, dtype=dtype) -> None:
            grad_norm.scale_(size.table(), size.grads(), numbers(), dtype=dtype)

        yield Variant("scale", str(dtype)[6:], call, [dtype], [dtype], threads=_threads([dtype]), counted=True)


@cache
def variants() -> tuple[Variant, ...]:
    """Every variant of every kernel."""
    families = (
        _update_variants,
        _muon_variants,
        _product_variants,
        _measured_variants,
        _lagged_variants,
        _adafactor_variants,
        _storage_variants,
        _storage_measured_variants,
        _storage_adafactor_variants,
        _prepare_variants,
        _riders_variants,
        _norm_variants,
        _tensor_sums_variants,
        _judge_variants,
        _finish_variants,
        _scale_variants,
    )
    return tuple(variant for family in families for variant in family())


def cases() -> dict[str, tuple[Variant, str]]:
    """Every variant on every architecture, by an id such as "rmsprop-sm_90-float32-momentum-centered"."""
    return {
        f"{variant.kernel}-{architecture}-{variant.options}": (variant, architecture)
        for variant in variants()
        for architecture in variant.architectures or TARGETS
    }
