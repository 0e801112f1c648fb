"""Every kernel variant, compiled for every architecture; and none left out."""

from __future__ import annotations

import pytest
import triton.language as tl
from optimx.triton_kernels.device import TRITON_DTYPE
from triton.runtime.jit import JITFunction

from .assembly import examine, problems
from .compiler import TARGETS, Launch, compile_for, kernel_modules
from .variants import ALGORITHMS, Variant, cases, variants


@pytest.mark.parametrize(("variant", "architecture"), [pytest.param(*case, id=name) for name, case in cases().items()])
def test_assembly(variant: Variant, architecture: str) -> None:
    target = TARGETS[architecture]
    launch, limits = variant.on(target)
    kernel = compile_for(target, launch)
    found = problems(examine(kernel, limits.walk), limits)
    assert not found, "; ".join(found)
    assert kernel.metadata.name == f"_{variant.kernel}_kernel"


@pytest.fixture(scope="module")
def launches() -> list[tuple[str, Launch]]:
    """Of each variant: the kernel as profilers call it, and the launch."""
    return [(variant.kernel, variant.on(TARGETS["sm_90"])[0]) for variant in variants()]


def test_every_kernel_has_variants(launches: list[tuple[str, Launch]]) -> None:
    kernels = {
        value.__name__
        for module in kernel_modules()
        for value in vars(module).values()
        if isinstance(value, JITFunction) and value.__name__.endswith("_kernel")
    }
    assert kernels == {launch.launcher.kernel.__name__ for _, launch in launches}


def test_every_algorithm_is_listed() -> None:
    modules = [module for module in kernel_modules() if hasattr(module, "prepare")]
    assert {algorithm.module for algorithm in ALGORITHMS} == set(modules)


def test_every_constant_takes_every_value(launches: list[tuple[str, Launch]]) -> None:
    seen: dict[tuple[str, str], set] = {}
    for kernel, launch in launches:
        # passes of one walk take all together; algorithms of which only flags need it are compiled for some
        walk = kernel.rpartition("_")[2] if kernel.endswith(("_measure", "_adapt")) else kernel
        for name, value in launch.options.items():
            seen.setdefault((walk, name), set()).add(value)
    for (kernel, name), values in seen.items():
        if any(isinstance(value, bool) for value in values):
            assert values == {False, True}, (kernel, name)
        elif name == "NORM_DTYPE":
            assert values == {tl.float32, tl.float64}, (kernel, name)
        elif name.endswith("_DTYPE"):
            assert values == set(TRITON_DTYPE.values()), (kernel, name)
        elif name == "DTYPES":
            for role in zip(*(dtypes[:3] for dtypes in values), strict=False):
                # and of codes
                assert set(role) >= set(TRITON_DTYPE.values()), (kernel, name)
        elif name == "ALIGNMENT":
            assert values == {1, 16}, (kernel, name)
