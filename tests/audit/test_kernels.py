"""Every kernel variant, compiled for every architecture; and none left out."""

from __future__ import annotations

import pytest
from optimx.triton_kernels.device import TRITON_DTYPE
from triton.runtime.jit import JITFunction

from .assembly import examine, problems
from .compiler import TARGETS, Launch, compile_for, kernel_modules
from .variants import Variant, cases, variants


@pytest.mark.parametrize(("variant", "architecture"), [pytest.param(*case, id=name) for name, case in cases().items()])
def test_assembly(variant: Variant, architecture: str) -> None:
    target = TARGETS[architecture]
    launch, limits = variant.on(target)
    found = problems(examine(compile_for(target, launch)), limits)
    assert not found, "; ".join(found)


@pytest.fixture(scope="module")
def launches() -> list[Launch]:
    return [variant.on(TARGETS["sm_90"])[0] for variant in variants()]


def test_every_kernel_has_variants(launches: list[Launch]) -> None:
    kernels = {
        value.__name__
        for module in kernel_modules()
        for value in vars(module).values()
        if isinstance(value, JITFunction) and value.__name__.endswith("_kernel")
    }
    assert kernels == {launch.kernel.__name__ for launch in launches}


def test_every_constant_takes_every_value(launches: list[Launch]) -> None:
    seen: dict[tuple[str, str], set] = {}
    for launch in launches:
        for name, value in launch.options.items():
            seen.setdefault((launch.kernel.__name__, name), set()).add(value)
    for (kernel, name), values in seen.items():
        if any(isinstance(value, bool) for value in values):
            assert values == {False, True}, (kernel, name)
        elif name.endswith("_DTYPE"):
            assert values == set(TRITON_DTYPE.values()), (kernel, name)
        elif name == "ALIGNMENT":
            assert values == {1, 16}, (kernel, name)
