"""Every variant through Triton's launcher, on a driver that runs nothing, with the arguments that a GPU would see.

Triton compiles a kernel anew where an integer is 1 or a multiple of 16, and where a pointer is a multiple of 16 bytes.
Counts of tensors and where partial results begin change between models and steps: they may not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest
from optimx.triton_kernels import device

from tests.fake_gpu import stub_driver

from .sizes import Sizes
from .variants import Variant, variants

#: One, few, multiples of 16, odd and many tensors; partial results and scalars that begin anywhere.
SIZES = [
    Sizes(n_tensors=n_tensors, offset=offset, shift=shift)
    for n_tensors, offset, shift in [(1, 1, 1), (2, 1, 0), (3, 0, 1), (16, 2, 0), (17, 1, 1), (1008, 0, 0)]
]


@pytest.fixture(scope="module")
def stub() -> Iterator[stub_driver.Stub]:
    if (reason := stub_driver.missing()) and os.environ.get("CI") != "true":
        pytest.skip(reason)
    # launches go by handle: they have to find out whether the JIT would have taken another kernel
    with stub_driver.active() as stub, patch.object(device, "verify", True):
        yield stub


def calls() -> dict[str, Variant]:
    """One variant of each call: some launch several kernels."""
    return {f"{variant.kernel}-{variant.options}": variant for variant in {v.call: v for v in variants()}.values()}


@pytest.mark.parametrize("variant", [pytest.param(variant, id=name) for name, variant in calls().items()])
def test_is_compiled_once(variant: Variant, stub: stub_driver.Stub) -> None:
    before = stub.launches
    variant.call(Sizes())
    n_launches = stub.launches - before
    assert n_launches > 0
    for sizes in SIZES:
        launches, modules = stub.launches, stub.modules
        variant.call(sizes)
        assert stub.launches - launches == n_launches
        # what the JIT has compiled, it loads
        assert stub.modules == modules, f"compiled anew for {sizes}"


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stub_driver.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="needs a C compiler"):
        stub_driver.build()
